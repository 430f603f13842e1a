"""`patch-llm prune`: one-shot pruning and ProxSparse; writes the masks (and updated weights) as an artifact."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patch import settings
from patch.cli import inputs, outputs
from patch.settings import RESOLVED_NAME, dump_yaml, setting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from patch.pruning import ProxSparseConfig

NAME = "prune"
SUMMARY = "prune a model one-shot (magnitude, Wanda, SparseGPT, Thanos) or by ProxSparse"
EXAMPLES = """\
examples:
  patch-llm prune --model ./llama --method wanda --data calibration.txt --out wanda
  patch-llm prune --model ./llama --method sparsegpt --data c4 --target-sparsity 0.45 --out prior
      the second also scores the tiles, which `patch-llm learn --prior prior` starts from
  patch-llm prune --model ./llama --method prox_sparse --prox-lambda 0.25 --data c4 --seqlen 4096 --out prox
      trains a copy of the weights for 400 steps to choose the masks; settings prox.NAME for --set and --config
"""
SECTION_FLAGS = {
    "--prox-lambda": ("prox.lam", "LAMBDA", "prox_sparse: weight of its regulariser (default 0.1)"),
    "--prox-lr": ("prox.lr", "LR", "prox_sparse: peak learning rate (default 1e-4)"),
    "--prox-steps": ("prox.steps", "N", "prox_sparse: training steps (default 400)"),
}
DEFAULT_NSAMPLES = 128


@dataclass(frozen=True)
class Options:
    """Settings of `prune`; those of prox_sparse are in the section `prox` (patch.pruning.ProxSparseConfig)."""

    model: str = setting(help=inputs.MODEL_HELP, metavar="MODEL")
    out: Path = setting(help="folder to write", metavar="DIR")
    method: str = setting("wanda", "magnitude, wanda (default), sparsegpt, thanos or prox_sparse", metavar="METHOD")
    pattern: Literal["2:4", "unstructured"] = setting(
        "2:4", "2:4 keeps two of four consecutive weights; or unstructured", metavar="PATTERN"
    )
    sparsity: float = setting(0.5, "share of zeros, 0 to 0.5; 2:4 is always 0.5", metavar="SHARE")
    data: str | None = setting(None, inputs.DATA_HELP + " (not needed by magnitude)", metavar="TEXT")
    text_field: str | None = setting(None, "column of a .jsonl or .parquet file (default text)", metavar="NAME")
    nsamples: int | None = setting(None, "calibration samples (default 128; prox_sparse 400)", metavar="N")
    seqlen: int | None = setting(None, "tokens per sample (default 2048, or what the model allows)", metavar="N")
    target_sparsity: float | None = setting(
        None, "also score tiles from an unstructured reference with this share of zeros", metavar="SHARE"
    )
    tile: tuple[int, int] = setting((128, 128), "rows,columns of a scored tile (default 128,128)", metavar="R,C")
    shift_zero_metrics: bool = setting(False, "Wanda: raise the statistics of inputs that are always zero")
    precision: Literal["fp32", "fp64"] = setting("fp32", "of scores, statistics and updates", metavar="P")
    damping: float = setting(
        0.01, "SparseGPT, Thanos: share of the mean diagonal added to the Hessian (default 0.01)", metavar="SHARE"
    )
    block_size: int | None = setting(
        None, "SparseGPT, Thanos: columns treated at once (default 128; 512 for Thanos 2:4)", metavar="N"
    )
    exclude: tuple[str, ...] = setting((), "layers to leave dense, as patterns such as '*.k_proj'", metavar="A,B")
    seed: int = setting(0, "seed of the calibration samples (default 0)", metavar="N")
    dtype: str = setting("auto", "dtype to load the model in (default: its own)", metavar="DTYPE")
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: the GPU if there is one)", metavar="DEVICE")
    overwrite: bool = setting(False, "replace an earlier result in --out")
    prox: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("sparsity", "target_sparsity"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 0.5:
                raise ValueError(f"{name}: expected a share of zeros from 0 to 0.5, got {value}. 45 percent is 0.45.")
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError(
                f"sparsity: expected 0.5 with pattern 2:4, got {self.sparsity}. Use --pattern unstructured, or "
                "`patch-llm learn` for 2:4 tiles at less sparsity."
            )
        for name in ("nsamples", "seqlen"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value}. Leave it out for the default.")
        if min(self.tile) < 1 or self.tile[1] % 4:
            raise ValueError(
                f"tile: expected rows,columns > 0 with columns a multiple of 4, got {self.tile}. Use 128,128."
            )
        if self.seed < 0:
            raise ValueError(f"seed: expected an integer >= 0, got {self.seed}. Use 0.")


def run(options: Options) -> None:
    """Prune and save; see the module's docstring."""
    out = outputs.check_new_folder(options.out, overwrite=options.overwrite, what="result")
    from patch.artifacts.artifact import save_artifact
    from patch.models.facts import config_fingerprint
    from patch.models.keep_masks import measured_sparsity
    from patch.models.structure import maskable_linears
    from patch.pruning import check_prunable, get_method, proxsparse, prune_model
    from patch.pruning.registry import make_options

    method = get_method(options.method)
    pruning = make_options(
        method,
        options.pattern,
        options.sparsity,
        options.block_size,
        options.damping,
        options.shift_zero_metrics,
        options.precision,
    )
    usual = proxsparse.DEFAULT_NSAMPLES if method.is_learned else DEFAULT_NSAMPLES
    options = dataclasses.replace(options, nsamples=options.nsamples or usual)
    prox = _prox_config(options)
    if prox is not None:
        options = dataclasses.replace(options, prox=settings.to_dict(prox))
    if method.needs_calibration:
        inputs.check_text_source(options.data)
    model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    calibration, text_sha256 = inputs.load_calibration(options, model) if method.needs_calibration else (None, None)
    # The reference is made from the dense model, so before that is pruned.
    scores = None
    if options.target_sparsity is not None:
        check_prunable(model, method, pruning, calibration, exclude=options.exclude)
        scores = _tile_scores(options, model, calibration)
    masks = prune_model(
        model,
        options.method,
        pattern=options.pattern,
        sparsity=options.sparsity,
        prox=prox,
        **_shared(options, calibration),
    )
    linears = maskable_linears(model, options.exclude)
    weights = {name: linear.weight for name, linear in linears.items()} if method.updates_weights else None
    meta = outputs.provenance(
        options.data if calibration is not None else None,
        text_sha256,
        model=options.model,
        config_fingerprint=config_fingerprint(model.config),
        method=options.method,
        pattern=options.pattern,
        sparsity=options.sparsity,
        tile=options.tile,
        target_sparsity=options.target_sparsity,
        seed=options.seed,
        nsamples=options.nsamples,
        seqlen=None if calibration is None else calibration.shape[1],
        shift_zero_metrics=options.shift_zero_metrics,
        precision=options.precision,
        damping=options.damping,
        block_size=pruning.block_size,
        exclude=options.exclude,
        **({} if prox is None else {"prox": options.prox}),
    )
    # Repeating a run must not replace its result.
    resolved = dump_yaml(dataclasses.replace(options, overwrite=False), header="patch-llm prune --config THIS_FILE")
    save_artifact(out, masks, meta=meta, tile_scores=scores, weights=weights, extra={RESOLVED_NAME: resolved})
    print(f"pruned {len(masks)} layers with {options.method}: sparsity {measured_sparsity(masks):.4f}")
    outputs.print_written(out, "masks", f"patch-llm eval --model {options.model} --masks {out} --data TEXT")


def on_interrupt(options: Options) -> str:
    """Pruning keeps nothing of a part."""
    return f"nothing was written to {options.out}; run the same command again"


def _prox_config(options: Options) -> ProxSparseConfig | None:
    """The section `prox`, checked; None for other methods, which must not have one."""
    from patch.pruning import LEARNED_METHODS, ProxSparseConfig

    if options.method not in LEARNED_METHODS:
        if options.prox:
            raise ValueError(
                f"prox: expected no settings with method {options.method}, got {', '.join(options.prox)}. Leave them "
                "out, or use --method prox_sparse."
            )
        return None
    if options.pattern != "2:4":
        raise ValueError(
            f"pattern: expected 2:4 with method prox_sparse, got {options.pattern}. Use --method wanda for an "
            "unstructured mask."
        )
    return settings.build(ProxSparseConfig, options.prox, prefix="prox.")


def _tile_scores(options: Options, model: nn.Module, calibration: Tensor | None) -> dict[str, Tensor]:
    """Share of weights that an unstructured reference keeps in each tile."""
    from patch.priors import tile_scores
    from patch.pruning import prune_model, reference_method

    reference = copy.deepcopy(model)
    masks = prune_model(
        reference,
        reference_method(options.method),
        pattern="unstructured",
        sparsity=options.target_sparsity,
        **_shared(options, calibration),
    )
    return {name: tile_scores(keep, options.tile) for name, keep in masks.items()}


def _shared(options: Options, calibration: Tensor | None) -> dict[str, Any]:
    return {
        "calibration": calibration,
        "shift_zero_metrics": options.shift_zero_metrics,
        "precision": options.precision,
        "damping": options.damping,
        "block_size": options.block_size,
        "exclude": options.exclude,
    }
