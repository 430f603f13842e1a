"""`patch-llm permute`: reorder the channels of a dense model so that 2:4 costs less; the model computes the same."""

from __future__ import annotations

from patch.cli import inputs, outputs
from patch.files.schema import record
from patch.settings import NewPath, setting

NAME = "permute"
SUMMARY = "reorder a dense model's channels so that 2:4 costs less, before anything is pruned"
EXAMPLES = """\
examples:
  patch-llm permute --model ./llama --data calibration.txt --out llama-permuted
  patch-llm prune --model llama-permuted --method sparsegpt --pattern tiles --sparsity 0.45 --data c4 --out hybrid

The result is an ordinary dense model. Masks made from the original do not fit it: prune, learn and compensate start
from the new folder. `patch-llm oneshot --reorder` does this by itself.
"""


@record(kw_only=True)
class Options(inputs.CalibrationSettings, inputs.PlacementSettings):
    """Settings of `permute`."""

    model: str = setting(help=inputs.MODEL_HELP + ", dense", metavar="MODEL")
    data: str = setting(help="calibration " + inputs.DATA_HELP, metavar="TEXT")
    out: NewPath = setting(help="folder to write", metavar="DIR")
    keep_residual: bool = setting(False, "leave the residual stream, and with it embeddings, norms and head, as it is")
    overwrite: bool = setting(False, "replace an earlier export in --out")


def run(options: Options) -> None:
    """Permute and save the dense model; see the module's docstring."""
    out = outputs.check_new_folder(options.out, overwrite=options.overwrite, what="export")
    inputs.check_text_source(options.data)
    inputs.check_model_path(options.model, packed=False)
    from patch.packed.save import save_dense
    from patch.pruning.permutation import permute_channels

    model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    tokenizer = inputs.load_tokenizer(options.model)
    calibration, _ = inputs.load_calibration(options, model, tokenizer)
    orders = permute_channels(model, calibration, hidden=not options.keep_residual, seed=options.seed)
    stream = "not the residual stream" if orders.hidden is None else "the residual stream"
    print(f"reordered the inner channels of {len(orders.inner)} layers, {stream}")
    out = save_dense(model, tokenizer, out, replace=options.overwrite)
    outputs.print_written(out, "the reordered dense model", f"patch-llm oneshot --model {out} --data TEXT --out packed")


def on_interrupt(options: Options) -> str:
    """Permuting keeps nothing of a part."""
    return f"nothing was written to {options.out}; run the same command again"
