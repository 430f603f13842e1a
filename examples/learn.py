"""Learn a PATCH mask on frozen weights: python examples/learn.py MODEL TEXT OUT [--sparsity 0.45]."""

import argparse
import copy

from transformers import AutoModelForCausalLM, AutoTokenizer

from patch.artifacts.artifact import save_artifact
from patch.data import load_documents, pack_blocks, tokenize
from patch.files.paths import require_new
from patch.learn import LearnConfig, learn
from patch.models.facts import fingerprints
from patch.models.keep_masks import measured_sparsity
from patch.pruning import prune_tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="transformers folder or name")
    parser.add_argument("text", help=".txt, .jsonl or .parquet to learn from")
    parser.add_argument("out", help="new folder for the masks; OUT-run keeps checkpoints and metrics")
    parser.add_argument("--sparsity", type=float, default=0.45, help="share of zeros, 0 to 0.5")
    parser.add_argument("--steps", type=int, default=2000, help="at most; a short text is read once")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="length of a block; the papers use the model's context")
    options = parser.parse_args()
    require_new("out", options.out, "folder")

    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    blocks = pack_blocks(tokenize(tokenizer, load_documents(options.text)), options.tokens)

    made_from = fingerprints(model)
    # A one-shot hybrid is where learning starts from; it is made on a copy, since pruning works in place.
    prior = prune_tiles(copy.deepcopy(model), "sparsegpt", sparsity=options.sparsity, calibration=blocks[:128])
    config = LearnConfig.from_preset(
        "joint",
        sparsity=options.sparsity,
        global_batch_size=options.batch_size,
        tile_prior_budget="model",
        exact_budget=True,
    )
    blocks = blocks[: options.steps * options.batch_size]
    result = learn(
        model,
        blocks,
        config,
        prior_masks=prior.masks,
        tile_scores=prior.tile_scores,
        output_dir=f"{options.out}-run",
        resume=True,
    )
    save_artifact(
        options.out,
        result.masks,
        tile_is_sparse=result.tile_is_sparse,
        meta={"model": options.model, "method": "patch", "sparsity": options.sparsity} | made_from,
    )
    print(f"sparsity {measured_sparsity(result.masks):.3f}, in {options.out}")


if __name__ == "__main__":
    main()
