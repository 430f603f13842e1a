"""Train kept weights, block by block, until they make up for a mask: python examples/compensate.py MODEL MASKS ..."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from patch.artifacts.artifact import load_artifact, save_artifact
from patch.data import load_documents, pack_blocks, tokenize
from patch.files.paths import require_new
from patch.pruning import compensate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="the DENSE model: what a mask removed cannot be made up for once it is gone")
    parser.add_argument("masks", help="folder of patch-llm prune, learn or import-masks, or of the examples here")
    parser.add_argument("text", help="text for calibration")
    parser.add_argument("heldout", help="other text, to see whether it helped")
    parser.add_argument("out", help="new folder for masks and updated weights")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="length of a sample; the papers use the model's context")
    options = parser.parse_args()
    require_new("out", options.out, "folder")

    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    artifact = load_artifact(options.masks, model=model)
    calibration, heldout = (
        pack_blocks(tokenize(tokenizer, load_documents(path)), options.tokens)[: options.samples]
        for path in (options.text, options.heldout)
    )

    result = compensate(model, artifact.masks, calibration=calibration, heldout=heldout)
    weights = {name: model.get_submodule(name).weight.detach() for name in artifact.masks}
    save_artifact(options.out, artifact.masks, weights=weights, meta=artifact.meta)
    print(f"perplexity {result.perplexity_before:.2f} with the masks alone, {result.perplexity_after:.2f} after")


if __name__ == "__main__":
    main()
