"""`patch-llm export-masks`: the masks of an artifact as the PATCH authors' mask.npz."""

from __future__ import annotations

from patch.cli import inputs, outputs
from patch.files.schema import record
from patch.settings import NewPath, setting

NAME = "export-masks"
SUMMARY = "write masks as the mask.npz of the PATCH authors"
EXAMPLES = """\
examples:
  patch-llm export-masks learned --out mask.npz --base-model meta-llama/Llama-2-7b-hf
"""


@record(kw_only=True)
class Options:
    """Settings of `export-masks`."""

    masks: NewPath = setting(help="folder made by prune, learn or import-masks", metavar="DIR", positional=True)
    out: NewPath = setting(help="new .npz file to write", metavar="FILE")
    base_model: str | None = setting(
        None, "name of the dense model that the file tells (default: what the artifact tells)", metavar="ID"
    )


def run(options: Options) -> None:
    """Read, verify, write."""
    from patch.artifacts.artifact import load_artifact
    from patch.artifacts.foreign import patch_meta, write_masks
    from patch.models.keep_masks import measured_sparsity

    outputs.check_new_file(options.out, "--out")  # before the masks are read; write_masks looks again
    outputs.claim(options.out)
    artifact = load_artifact(inputs.artifact_folder(options.masks))
    meta = patch_meta(artifact.masks, artifact.meta, options.base_model)
    write_masks(options.out, artifact.masks, meta)
    print(f"{len(artifact.masks)} layers: sparsity {measured_sparsity(artifact.masks):.4f}")
    if artifact.weights:
        print("note: mask.npz holds masks only; the weights that the method updated stay in the artifact")
    outputs.print_written(options.out, "masks", f"patch-llm import-masks {options.out} --model MODEL --out DIR")


def on_interrupt(options: Options) -> str:
    """A part of the file is removed."""
    return f"nothing was written to {options.out}; run the same command again"
