"""`patch-llm export`: write a pruned model as an ordinary dense folder or in the packed tile format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from patch.cli import inputs, outputs
from patch.files.schema import record
from patch.settings import NewPath, setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "export"
SUMMARY = "write the pruned model, packed (smaller) or dense (works everywhere)"
EXAMPLES = """\
examples:
  patch-llm export --model ./llama --masks learned --format packed --out packed
  patch-llm export --model ./llama --masks learned --format dense --out pruned

A packed folder is loaded by patch.load(DIR), or by AutoModelForCausalLM after `import patch.packed`. A dense folder has
zeros where weights were pruned and needs no PATCH at all.
"""


@record(kw_only=True)
class Options(inputs.MaskSettings, inputs.ModelSettings):
    """Settings of `export`."""

    model: str = setting(help=inputs.MODEL_HELP + " (the dense model the masks were made from)", metavar="MODEL")
    masks: NewPath = setting(help="folder made by prune or learn", metavar="DIR")
    out: NewPath = setting(help="folder to write", metavar="DIR")
    format: Literal["packed", "dense"] = setting("packed", "packed or dense", metavar="FORMAT")
    dtype: inputs.DtypeName = setting("auto", "bf16, fp16; dense also fp32 (default: the model's own)", metavar="DTYPE")
    overwrite: bool = setting(False, "replace an earlier export in --out")

    @model_validator(mode="after")
    def _packed_is_16_bit(self) -> Options:
        if self.format == "packed" and self.dtype in ("float32", "fp32"):
            why = "The packed format holds 16-bit weights."
            raise ValueError(f"--dtype: expected bf16 or fp16 with --format packed, got {self.dtype!r}. {why}")
        return self


def run(options: Options) -> None:
    """Load the dense model, apply the masks, write; see the module's docstring."""
    out = outputs.check_new_folder(options.out, overwrite=options.overwrite, what="export")
    inputs.artifact_folder(options.masks)
    from patch.models.keep_masks import keep_masks
    from patch.models.structure import linear_at
    from patch.packed.convert import pack_model
    from patch.packed.save import save_dense, save_packed
    from patch.packed.swap import packed_layers

    model = inputs.load_model(options.model, device="cpu")
    tokenizer = inputs.load_tokenizer(options.model)
    inputs.put_masks(options, options.masks, model)
    _cast(model, options)
    masks = keep_masks(model)
    sparsity = outputs.print_sparsity(model, masks)["coverage"]["sparsity"]
    before = sum(linear_at(model, name).weight.nbytes for name in masks)
    if options.format == "packed":
        pack_model(model)
        after = sum(layer.payload.numel() + layer.tile_is_sparse.numel() for _, layer in packed_layers(model))
        after += sum(linear_at(model, name).weight.nbytes for name in keep_masks(model))  # those that stay dense
        out = save_packed(model, tokenizer, out, replace=options.overwrite)
    else:
        after = before
        out = save_dense(model, tokenizer, out, replace=options.overwrite)
    share = after / before
    print(f"bytes of the {len(masks)} masked layers: {before:,} dense -> {after:,} {options.format} ({share:.3f}x)")
    if options.format == "packed":
        grids = [layer.tile_is_sparse for _, layer in packed_layers(model)]
        sparse, tiles = sum(int(grid.sum()) for grid in grids), sum(grid.numel() for grid in grids)
        # Half of a 2:4 tile is zeros: zeros elsewhere make no bytes smaller.
        why = "; zeros in the others take their bytes, masks of --tile 128,128 pack smaller"
        print(f"tiles of 128x128 stored 2:4: {sparse} of {tiles}{why if sparse < sparsity * tiles else ''}")
    outputs.print_written(out, f"the {options.format} model", f"patch-llm generate --model {out} --prompt 'Once'")


def _cast(model: PreTrainedModel, options: Options) -> None:
    """Cast the model where --dtype or the packed format asks for it, after the masks have met its own weights."""
    import torch

    from patch.packed.swap import cast_model

    wanted = inputs.dtype_of(options.dtype)
    if isinstance(wanted, str):
        is_wide = options.format == "packed" and model.dtype not in (torch.float16, torch.bfloat16)
        wanted = torch.bfloat16 if is_wide else model.dtype
    if wanted != model.dtype:
        why = " (the packed format holds 16-bit weights)" if options.dtype == "auto" else ""
        print(f"weights cast from {model.dtype} to {wanted}{why}".replace("torch.", ""))
        cast_model(model, wanted)


def on_interrupt(options: Options) -> str:
    """Export keeps nothing of a part."""
    return f"nothing was written to {options.out}; run the same command again"
