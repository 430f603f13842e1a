"""`patch-llm compress`: quantise what masks keep and add low-rank adapters; writes an artifact."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patch.cli import inputs, outputs
from patch.settings import RESOLVED_NAME, dump_yaml, setting

if TYPE_CHECKING:
    from patch.slim.options import CompressOptions

NAME = "compress"
SUMMARY = "quantise a masked model (simulated) and add low-rank adapters (SLiM)"
EXAMPLES = """\
examples:
  patch-llm compress --model ./llama --masks learned --quantize-weight --out quantised
  patch-llm compress --model ./llama --masks learned --quantize-weight --lora-rank 0.1 --data calibration.txt --out slim
  patch-llm eval --model ./llama --masks learned,slim --data heldout.txt

The masks may come from prune (any method) or learn; they do not change.
"""
SECTION_FLAGS: dict[str, tuple[str, str, str]] = {}


@dataclass(frozen=True)
class Options:
    """Settings of `compress`; those of the compression are the fields of patch.slim.CompressOptions."""

    model: str = setting(help=inputs.MODEL_HELP + " (the dense model the masks were made from)", metavar="MODEL")
    masks: Path = setting(help="folder made by prune or learn", metavar="DIR")
    out: Path = setting(help="folder to write", metavar="DIR")
    quantize_weight: bool = setting(False, "quantise the kept weights")
    bitwidth: int = setting(4, "bits of weights and quantised adapters, 2 to 8 (default 4)", metavar="N")
    slim_quant: bool = setting(True, "clip as SLiM-Quant; off: scale by the largest weight")
    weight_tiled_quantization: bool = setting(False, "one scale per group of --weight-tile-size, not per matrix")
    weight_tile_size: int = setting(256, "weights in a group (default 256)", metavar="N")
    column_wise_grouping: bool = setting(False, "groups along a row of the weight; off: along a column")
    scale_important_weights: bool = setting(False, "round the 1 %% of columns that matter most more finely")
    lora_rank: float = setting(
        0.0, "rank of adapters as a share of the layer's smaller size (default none)", metavar="R"
    )
    slim_lora: bool = setting(True, "weigh the adapters' error by the inputs (needs --data)")
    prune_lora: bool = setting(False, "2:4 sparse left adapters")
    quantize_lora: bool = setting(False, "quantise the adapters in groups of --lora-tile-size")
    lora_tile_size: int = setting(256, "group size of adapters (default 256)", metavar="N")
    pad_lora: bool = setting(False, "round the rank up to a multiple of --lora-tile-size")
    data: str | None = setting(None, inputs.DATA_HELP + " (for adapters and important weights)", metavar="TEXT")
    text_field: str | None = setting(None, "column of a .jsonl or .parquet file (default text)", metavar="NAME")
    nsamples: int = setting(128, "calibration samples (default 128)", metavar="N")
    seqlen: int | None = setting(None, "tokens per sample (default 2048, or what the model allows)", metavar="N")
    shift_zero_metrics: bool = setting(False, "raise the statistics of inputs that are always zero")
    seed: int = setting(0, "seed of the calibration samples (default 0)", metavar="N")
    dtype: str = setting("auto", "dtype to load the model in (default: its own)", metavar="DTYPE")
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: the GPU if there is one)", metavar="DEVICE")
    overwrite: bool = setting(False, "replace an earlier result in --out")

    def __post_init__(self) -> None:
        for name in ("nsamples", "seqlen"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value}. Leave it out for the default.")
        if self.seed < 0:
            raise ValueError(f"seed: expected an integer >= 0, got {self.seed}. Use 0.")


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
    from patch.slim.compress import adapters, compress_model

    model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    artifact = inputs.load_masks(options.masks, model)
    if artifact.meta.get("compression") is not None:
        raise ValueError(
            f"--masks: expected masks that are not compressed yet, {options.masks} is a result of compress. Give what "
            "it was made from."
        )
    calibration, text_sha256 = inputs.load_calibration(options, model) if settings.needs_calibration else (None, None)
    errors = compress_model(
        model,
        artifact.masks,
        settings,
        weights=artifact.weights,
        calibration=calibration,
        shift_zero_metrics=options.shift_zero_metrics,
    )
    source = {"compression": settings.as_dict(), "compressed_from": str(options.masks)}
    if calibration is not None:
        source["compression_data"] = {"data": options.data, "text_sha256": text_sha256, "seqlen": calibration.shape[1]}
    resolved = dataclasses.replace(options, overwrite=False)
    save_artifact(
        out,
        artifact.masks,
        meta=artifact.meta | source,
        tile_scores=artifact.tile_scores,
        tile_is_sparse=artifact.tile_is_sparse,
        weights={name: model.get_submodule(name).weight for name in artifact.masks},
        adapters=adapters(model),
        extra={RESOLVED_NAME: dump_yaml(resolved, header="patch-llm compress --config THIS_FILE")},
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
    from patch.slim.options import CompressOptions

    names = {field.name for field in dataclasses.fields(Options)}
    chosen = (field.name for field in dataclasses.fields(CompressOptions) if field.name in names)
    settings = CompressOptions(**{name: getattr(options, name) for name in chosen})
    if not settings.is_active:
        raise ValueError("expected --quantize-weight or --lora-rank, got neither. Give at least one of them.")
    return settings
