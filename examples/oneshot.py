"""A dense model to a packed one, nothing learned: python examples/oneshot.py MODEL TEXT OUT [--sparsity 0.45]."""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import patch
from patch.files.paths import require_new
from patch.packed import pack_model, save_packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="transformers folder or name")
    parser.add_argument("text", help=".txt, .jsonl or .parquet; its last tenth is measured on, the rest pruned with")
    parser.add_argument("out", help="new folder for the packed model")
    parser.add_argument("--sparsity", type=float, default=0.45)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="length of a sample; the papers use the model's context")
    options = parser.parse_args()
    require_new("out", options.out, "folder")

    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    result = patch.oneshot(
        model,
        tokenizer,
        calibration=options.text,
        sparsity=options.sparsity,
        nsamples=options.samples,
        seqlen=options.tokens,
    )
    pack_model(model, dtype=torch.bfloat16)
    save_packed(model, tokenizer, options.out)
    print(f"perplexity {result.dense:.2f} dense, {result.pruned:.2f} pruned, {result.reconstructed:.2f} reconstructed")
    print(f"{result.sparsity:.1%} zeros, {result.packed_bytes / result.dense_bytes:.2f} of the layers' dense bytes")


if __name__ == "__main__":
    main()
