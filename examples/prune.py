"""Prune a model one-shot and keep its masks: python examples/prune.py MODEL TEXT OUT [--sparsity 0.45]."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from patch.artifacts.artifact import save_artifact
from patch.data import load_documents, pack_blocks, tokenize
from patch.files.paths import require_new
from patch.models.facts import fingerprints
from patch.models.keep_masks import measured_sparsity
from patch.pruning import METHODS, prune_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="transformers folder or name")
    parser.add_argument("text", help=".txt, .jsonl or .parquet for calibration")
    parser.add_argument("out", help="new folder for the masks")
    parser.add_argument("--method", default="wanda", choices=list(METHODS))
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of zeros; below 0.5 whole tiles stay dense")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="length of a sample; the papers use the model's context")
    options = parser.parse_args()
    require_new("out", options.out, "folder")

    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    blocks = pack_blocks(tokenize(tokenizer, load_documents(options.text)), options.tokens)

    made_from = fingerprints(model)
    how = {"pattern": "2:4" if options.sparsity == 0.5 else "tiles", "sparsity": options.sparsity}
    masks = prune_model(model, options.method, calibration=blocks[: options.samples], **how)
    updated = METHODS[options.method].updates_weights
    weights = {name: model.get_submodule(name).weight.detach() for name in masks} if updated else None
    meta = {"model": options.model, "method": options.method} | how | made_from
    save_artifact(options.out, masks, weights=weights, meta=meta)
    print(f"{len(masks)} layers, sparsity {measured_sparsity(masks):.3f}, in {options.out}")


if __name__ == "__main__":
    main()
