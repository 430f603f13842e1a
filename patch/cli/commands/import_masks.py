"""`patch-llm import-masks`: masks of MaskLLM or of the PATCH authors as an artifact for the other commands."""

from __future__ import annotations

from patch.cli import inputs, outputs
from patch.files.schema import record
from patch.settings import RESOLVED_NAME, Names, NewPath, dump_yaml, setting

NAME = "import-masks"
SUMMARY = "take masks made elsewhere: a MaskLLM file, or mask.npz of the PATCH authors"
EXAMPLES = """\
examples:
  patch-llm import-masks Vinnnf/LLaMA-2-7B-MaskLLM-C4 --model meta-llama/Llama-2-7b-hf --out maskllm
  patch-llm import-masks mohammad-mozaffari/llama_2_7b-PATCH-45Sparse --model ./llama-2-7b --out patch45
  patch-llm import-masks mask_compressed.npz --model ./llama --out maskllm
  patch-llm import-masks maskllm.pt --allow-pt --model ./llama --out maskllm

The result is used like that of prune or learn: `patch-llm eval --masks maskllm`, `patch-llm learn --prior maskllm`.
"""


@record(kw_only=True)
class Options(inputs.ModelSettings):
    """Settings of `import-masks`."""

    source: str = setting(help="mask file, folder with one, or Hugging Face id", metavar="SOURCE", positional=True)
    model: str = setting(help=inputs.MODEL_HELP + " (the dense model the masks are for)", metavar="MODEL")
    out: NewPath = setting(help="folder to write", metavar="DIR")
    exclude: Names = setting((), inputs.EXCLUDE_HELP, metavar="A,B")
    allow_pt: bool = setting(False, "also read a .pt of masks or of masked weights, whose zeros count as pruned")
    overwrite: bool = setting(False, "replace an earlier result in --out")


def run(options: Options) -> None:
    """Read, check against the model's shapes, write; the model's weights are not loaded."""
    out = outputs.check_new_folder(options.out, overwrite=options.overwrite, what="result")
    from patch.artifacts.artifact import save_artifact
    from patch.artifacts.foreign import read_masks
    from patch.models.facts import config_fingerprint
    from patch.models.keep_masks import measured_sparsity

    model = inputs.load_model_shapes(options.model)
    found = read_masks(options.source, model, exclude=options.exclude, allow_pt=options.allow_pt)
    measured = measured_sparsity(found.masks)
    if found.pattern != "2:4" and measured > 0.5:
        got = f"got sparsity {measured:.4f}. Tiles are dense or 2:4."
        raise ValueError(f"{options.source}: expected masks that prune at most half of the weights, {got}")
    # The PATCH authors' format holds MaskLLM's masks too, and those of any method that export-masks was given.
    told = (found.provenance["meta"] or {}).get("method")
    meta = outputs.provenance(
        None,
        None,
        model=options.model,
        config_fingerprint=config_fingerprint(model.config),
        method=told.lower() if isinstance(told, str) else "maskllm" if found.pattern == "2:4" else "patch",
        pattern=found.pattern,
        # A file made from the zeros of weights may prune a few more than half.
        sparsity=0.5 if found.pattern == "2:4" else measured,
        measured_sparsity=measured,
        exclude=options.exclude,
        imported_from=found.provenance,
    )
    resolved = dump_yaml(options, header="patch-llm import-masks --config THIS_FILE")
    out = save_artifact(out, found.masks, meta=meta, extra={RESOLVED_NAME: resolved}, replace=options.overwrite)
    print(f"imported {len(found.masks)} layers ({found.pattern}): sparsity {measured:.4f}")
    outputs.print_written(out, "masks", f"patch-llm eval --model {options.model} --masks {out} --data TEXT")


def on_interrupt(options: Options) -> str:
    """Importing keeps nothing of a part."""
    return f"nothing was written to {options.out}; run the same command again"
