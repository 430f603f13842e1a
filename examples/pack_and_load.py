"""Pack a masked model, save, load, generate: python examples/pack_and_load.py MODEL MASKS OUT [--prompt TEXT]."""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import patch
from patch.artifacts.apply import apply_artifact
from patch.artifacts.artifact import load_artifact
from patch.files.paths import require_new
from patch.packed import pack_model, save_packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="the dense model that the masks were made from")
    parser.add_argument("masks", help="folder of masks")
    parser.add_argument("out", help="new folder for the packed model")
    parser.add_argument("--prompt", default="Once upon a time")
    options = parser.parse_args()
    require_new("out", options.out, "folder")

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dense_bytes = model.get_memory_footprint()
    apply_artifact(model, load_artifact(options.masks))
    pack_model(model)
    save_packed(model, tokenizer, options.out)

    model = patch.load(options.out)
    prompt = tokenizer(options.prompt, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    print(f"{model.get_memory_footprint() / dense_bytes:.2f} of the dense bytes, embeddings included")


if __name__ == "__main__":
    main()
