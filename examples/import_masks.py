"""Use masks that MaskLLM or the authors of PATCH published: python examples/import_masks.py MODEL MASKS.npz OUT."""

import argparse

from transformers import AutoModelForCausalLM

from patch.artifacts.artifact import save_artifact
from patch.artifacts.foreign import read_masks
from patch.files.paths import require_new
from patch.models.facts import fingerprints
from patch.models.keep_masks import measured_sparsity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="transformers folder or name")
    parser.add_argument("masks", help=".npz file, a folder with one, or a Hugging Face repository")
    parser.add_argument("out", help="new folder for the masks")
    options = parser.parse_args()
    require_new("out", options.out, "folder")

    model = AutoModelForCausalLM.from_pretrained(options.model)
    found = read_masks(options.masks, model)
    meta = {"model": options.model, "pattern": found.pattern} | fingerprints(model)
    save_artifact(options.out, found.masks, meta=meta)
    print(
        f"{len(found.masks)} layers ({found.pattern}), sparsity {measured_sparsity(found.masks):.3f}, in {options.out}"
    )


if __name__ == "__main__":
    main()
