"""`patch-llm compress`: quantise what masks keep and add low-rank adapters; writes an artifact."""

from __future__ import annotations

import dataclasses

from patch.cli import inputs, outputs
from patch.files.schema import part_of, record
from patch.settings import RESOLVED_NAME, NewPath, dump_yaml, setting
from patch.slim.options import CompressOptions

NAME = "compress"
SUMMARY = "quantise a masked model (simulated) and add low-rank adapters (SLiM)"
EXAMPLES = """\
examples:
  patch-llm compress --model ./llama --masks learned --quantize-weight --out quantised
  patch-llm compress --model ./llama --masks learned --quantize-weight --lora-rank 0.1 --data text.txt \\
      --seqlen 256 --nsamples 64 --out slim
  patch-llm eval --model ./llama --masks learned,slim --data heldout.txt

The masks may come from prune (any method) or learn; they do not change.
"""


@record(kw_only=True)
class Options(CompressOptions, inputs.CalibrationSettings, inputs.MaskSettings, inputs.PlacementSettings):
    """Settings of `compress`: those of patch.slim.CompressOptions, and what they are put on."""

    model: str = setting(help=inputs.MODEL_HELP + " (the dense model the masks were made from)", metavar="MODEL")
    masks: NewPath = setting(help="folder made by prune or learn", metavar="DIR")
    out: NewPath = setting(help="folder to write", metavar="DIR")
    data: str | None = setting(None, inputs.DATA_HELP + " (for adapters and important weights)", metavar="TEXT")
    shift_zero_metrics: bool = setting(False, "raise the statistics of inputs that are always zero")
    overwrite: bool = setting(False, "replace an earlier result in --out")


def run(options: Options) -> None:
    """Compress and save; see the module's docstring."""
    settings = _settings(options)
    out = outputs.check_new_folder(options.out, overwrite=options.overwrite, what="result")
    masks = inputs.artifact_folder(options.masks)
    if options.overwrite:
        outputs.check_input_stays(masks, out)
    if settings.needs_calibration:
        inputs.check_text_source(options.data)
    from patch.artifacts.artifact import save_artifact
    from patch.files.progress import say
    from patch.models.keep_masks import measured_sparsity
    from patch.models.structure import linear_at
    from patch.slim.compress import adapters, compress_model

    model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    artifact = inputs.load_masks(options, options.masks, model)
    inputs.refuse_further_steps(artifact.meta, options.masks, {"compression": "compress"})
    ranks = f", adapters of rank {settings.lora_rank:g} of the smaller size" if settings.lora_rank else ""
    bits = f", {settings.bitwidth} bits a kept weight (simulated)" if settings.quantize_weight else ""
    say(f"plan: {len(artifact.masks)} layers, sparsity {measured_sparsity(artifact.masks):.4f} stays{bits}{ranks}")
    calibration, text_sha256 = inputs.load_calibration(options, model) if settings.needs_calibration else (None, None)
    errors = compress_model(
        model,
        artifact.masks,
        settings,
        weights=artifact.weights,
        calibration=calibration,
        shift_zero_metrics=options.shift_zero_metrics,
    )
    covered = outputs.print_sparsity(model, artifact.masks)
    source = {"compression": settings.as_dict(), "compressed_from": str(options.masks)}
    if calibration is not None:
        source["compression_data"] = {"data": options.data, "text_sha256": text_sha256, "seqlen": calibration.shape[1]}
    resolved = dataclasses.replace(options, overwrite=False)
    out = save_artifact(
        out,
        artifact.masks,
        meta=artifact.meta | covered | source,
        tile_scores=artifact.tile_scores,
        tile_is_sparse=artifact.tile_is_sparse,
        weights={name: linear_at(model, name).weight for name in artifact.masks},
        adapters=adapters(model),
        extra={RESOLVED_NAME: dump_yaml(resolved, header="patch-llm compress --config THIS_FILE")},
        replace=options.overwrite,
    )
    mean = sum(errors.values()) / len(errors)
    print(f"compressed {len(errors)} layers: relative error {mean:.4f} on average, {max(errors.values()):.4f} at most")
    outputs.print_written(
        out, "the compressed weights", f"patch-llm eval --model {options.model} --masks {out} --data TEXT"
    )


def on_interrupt(options: Options) -> str:
    """Compression keeps nothing of a part."""
    return f"nothing was written to {options.out}; run the same command again"


def _settings(options: Options) -> CompressOptions:
    settings = part_of(CompressOptions, options)
    if not settings.is_active:
        raise ValueError("expected --quantize-weight or --lora-rank, got neither. Give at least one of them.")
    settings.refuse_unread()
    return settings
