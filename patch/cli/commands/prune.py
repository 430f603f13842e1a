"""`patch-llm prune`: one-shot pruning and ProxSparse; writes the masks (and updated weights) as an artifact."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from patch import settings
from patch.cli import inputs, outputs
from patch.files.progress import say
from patch.files.schema import default_of, fields_of, record
from patch.pruning.options import (
    DEFAULT_DAMPING,
    Budget,
    Damping,
    ExpertOptions,
    Pattern,
    Precision,
    PruneOptions,
    TileOptions,
    TilesBy,
)
from patch.pruning.registry import METHODS, Method, get_method, make_options, method_names, reference_method
from patch.runs.stages import remove_stages, stages_folder
from patch.settings import RESOLVED_NAME, AtLeastOne, Names, NewPath, Share, Tile, dump_yaml, setting

if TYPE_CHECKING:
    from torch import Tensor

NAME = "prune"
SUMMARY = "prune a model one-shot (magnitude, Wanda, SparseGPT, Thanos) or by ProxSparse"
EXAMPLES = """\
examples:
  patch-llm prune --model ./llama --method wanda --data calibration.txt --out wanda
  patch-llm prune --model ./llama --method sparsegpt --pattern tiles --sparsity 0.45 --data c4 --out hybrid
      dense and 2:4 tiles, 45 % zeros in the whole model; `patch-llm compensate --masks hybrid` goes on from there
  patch-llm prune --model ./llama --method sparsegpt --data c4 --target-sparsity 0.45 --out prior
      2:4, and scores of the tiles as published, which `patch-llm learn --prior prior` starts from
  patch-llm prune --model ./llama --method prox_sparse --prox-lambda 0.25 --data c4 --seqlen 4096 --out prox
      trains a copy of the weights for 400 steps to choose the masks; settings prox.NAME for --set and --config
"""
_TEXT_SETTINGS = {"data", "text_field", "nsamples", "seqlen"}
_EXPERT_SETTINGS = {"expert_tokens", "few_experts"}
SECTION_FLAGS = {
    flag: (method.settings_type, method.section, name) for method in METHODS.values() for flag, name in method.flags
}


@record(kw_only=True)
class Options(inputs.ExpertSettings, inputs.CalibrationSettings, inputs.PlacementSettings):
    """Settings of `prune`; those of prox_sparse are in the section `prox` (patch.pruning.ProxSparseConfig)."""

    model: str = setting(help=inputs.MODEL_HELP, metavar="MODEL")
    out: NewPath = setting(help="folder to write", metavar="DIR")
    method: str = setting("wanda", "pruning method", metavar="METHOD", choices=method_names)
    pattern: Pattern = setting(
        "2:4", "2:4 keeps two of four; tiles leaves whole tiles dense; or unstructured", metavar="PATTERN"
    )
    sparsity: Share = setting(0.5, "share of zeros, 0 to 0.5; 2:4 is always 0.5", metavar="SHARE")
    tiles_by: TilesBy | None = setting(
        None, "tiles: what ranks them: fisher (default), error or share", metavar="SCORE"
    )
    budget: Budget | None = setting(
        None, "tiles: what has the sparsity: the model (default), every block or every layer", metavar="PART"
    )
    data: str | None = setting(None, inputs.DATA_HELP + " (not needed by magnitude)", metavar="TEXT")
    nsamples: AtLeastOne | None = setting(  # type: ignore[assignment]  # what the method says, where there is none
        None, "calibration samples (default: what is usual for the method)"
    )
    target_sparsity: Share | None = setting(
        None, "also score tiles from an unstructured reference with this share of zeros", metavar="SHARE"
    )
    tile: Tile = setting((128, 128), "rows,columns of a tile", metavar="R,C")
    shift_zero_metrics: bool = setting(False, "Wanda: raise the statistics of inputs that are always zero")
    precision: Precision = setting("fp32", "fp32 or fp64, of scores, statistics and updates", metavar="P")
    damping: Damping | None = setting(
        None, "SparseGPT, Thanos: share of the mean diagonal added to the Hessian (default 0.01)", metavar="SHARE"
    )
    block_size: AtLeastOne | None = setting(
        None, "SparseGPT, Thanos: columns treated at once (default 128; 512 for Thanos 2:4)"
    )
    exclude: Names = setting((), inputs.EXCLUDE_HELP, metavar="A,B")
    overwrite: bool = setting(False, "replace an earlier result in --out")
    prox: dict[str, Any] = setting(factory=dict)


def run(options: Options) -> None:
    """Prune and save; see the module's docstring."""
    out = outputs.check_new_folder(options.out, overwrite=options.overwrite, what="result")
    from patch.artifacts.artifact import save_artifact
    from patch.models.facts import fingerprints
    from patch.models.keep_masks import zeros_already
    from patch.models.packed_size import expected_packed_text, packed_text
    from patch.models.structure import maskable_linears
    from patch.pruning.model import check_prunable, prune_model, prune_tiles
    from patch.pruning.tile_scores import reference_tile_scores

    method = get_method(options.method)
    pruning = make_options(
        method,
        options.pattern,
        options.sparsity,
        options.block_size,
        DEFAULT_DAMPING if options.damping is None else options.damping,
        options.shift_zero_metrics,
        options.precision,
    )
    tiles = _tile_options(options)
    _refuse_ignored(options, method, tiles)
    own = _own_settings(options, method)
    section: dict[str, Any] = {} if own is None else {method.section: settings.to_dict(own)}
    options = dataclasses.replace(options, **section)
    reads_text = _reads_text(method, tiles)
    if reads_text:
        options = dataclasses.replace(options, nsamples=options.nsamples or method.nsamples)
        inputs.check_text_source(options.data)
    model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    made_from = fingerprints(model)
    calibration, text_sha256 = inputs.load_calibration(options, model) if reads_text else (None, None)
    linears = maskable_linears(model, options.exclude)
    if found := zeros_already(linears):
        say(f"WARNING: {found}")
    # The reference is made from the dense model, so before that is pruned.
    scores, tile_is_sparse = None, None
    if options.target_sparsity is not None:
        say(f"first the unstructured reference that scores the tiles, then the {options.pattern} masks")
        say(expected_packed_text(options.target_sparsity, options.tile))
        check_prunable(model, method, pruning, calibration, exclude=options.exclude)
        scores = reference_tile_scores(
            model, options.method, options.target_sparsity, options.tile, **_shared(options, pruning, calibration)
        )
    stages = stages_folder(out)
    if tiles is not None:
        if options.sparsity == 0.5:
            say("at a sparsity of 0.5 no tile stays dense; give --sparsity 0.45 or less for a hybrid")
        hybrid = prune_tiles(
            model,
            options.method,
            sparsity=options.sparsity,
            tiles=tiles,
            stages=stages,
            **_shared(options, pruning, calibration),
        )
        masks, tile_is_sparse = hybrid.masks, hybrid.tile_is_sparse
        scores = {name: grid.float() for name, grid in hybrid.tile_scores.items()}
    else:
        masks = prune_model(
            model,
            options.method,
            pattern=options.pattern,
            sparsity=options.sparsity,
            prox=own,
            **_shared(options, pruning, calibration),
        )
    print(f"pruned {len(masks)} layers with {options.method}")
    covered = outputs.print_sparsity(model, masks)
    weights = {name: linear.weight for name, linear in linears.items()} if method.updates_weights else None
    meta = outputs.provenance(
        options.data if calibration is not None else None,
        text_sha256,
        model=options.model,
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
        damping=pruning.damping,
        block_size=pruning.block_size,
        tiles=None if tiles is None else dataclasses.asdict(tiles),
        expert_tokens=options.expert_tokens,
        few_experts=options.few_experts,
        exclude=options.exclude,
        **section,
        **made_from,
        **covered,
    )
    # Repeating a run must not replace its result.
    resolved = dump_yaml(dataclasses.replace(options, overwrite=False), header="patch-llm prune --config THIS_FILE")
    extra = {RESOLVED_NAME: resolved}
    out = save_artifact(
        out,
        masks,
        meta=meta,
        tile_scores=scores,
        tile_is_sparse=tile_is_sparse,
        weights=weights,
        extra=extra,
        replace=options.overwrite,
    )
    if tiles is not None:
        remove_stages(stages)
    print(packed_text(masks))
    outputs.print_written(out, "masks", f"patch-llm eval --model {options.model} --masks {out} --data TEXT")


def on_interrupt(options: Options) -> str:
    """Pruning keeps nothing of a part but the gradients that choose tiles."""
    stages = stages_folder(options.out)
    if stages.is_dir():
        return f"nothing was written to {options.out}; the same command again goes on with what {stages} holds"
    return f"nothing was written to {options.out}; run the same command again"


def _tile_options(options: Options) -> TileOptions | None:
    """How tiles are chosen, None with another pattern, whose settings of tiles are refused."""
    given = {"by": options.tiles_by, "budget": options.budget}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.pattern == "tiles":
        if options.target_sparsity is not None:
            advice = "Leave it out: the tiles are scored and chosen for --sparsity."
            got = f"got {options.target_sparsity}"
            raise ValueError(f"target_sparsity: expected none with pattern tiles, {got}. {advice}")
        return TileOptions(tile=options.tile, **chosen)
    for name, field in (("by", "tiles_by"), ("budget", "budget")):
        if name in chosen:
            got = f"got {chosen[name]!r}"
            advice = "Leave it out, or use --pattern tiles."
            raise ValueError(f"{field}: expected none with pattern {options.pattern}, {got}. {advice}")
    return None


def _reads_text(method: Method, tiles: TileOptions | None) -> bool:
    return method.needs_calibration or (tiles is not None and tiles.by == "fisher")


def _refuse_ignored(options: Options, method: Method, tiles: TileOptions | None) -> None:
    """Refuse settings that were given and that neither the method nor the reference of the tile scores reads."""
    read = {*method.options}
    if options.target_sparsity is not None:
        read |= {*get_method(reference_method(options.method)).options}
    if _reads_text(method, tiles):
        read |= _TEXT_SETTINGS
    if method.reads_inputs:
        read |= _EXPERT_SETTINGS
    able = {"precision", "damping", "block_size", "shift_zero_metrics"} | _TEXT_SETTINGS | _EXPERT_SETTINGS
    for name in sorted(able - read):
        value = getattr(options, name)
        if value != default_of(fields_of(Options)[name]):
            users = ", ".join(key for key, other in METHODS.items() if name in other.options)
            advice = f"Leave it out, or use --method {users}." if users else "Leave it out."
            raise ValueError(f"{name}: expected none with method {options.method}, got {value!r}. {advice}")


def _own_settings(options: Options, method: Method) -> Any:
    """The section of the method's own settings, checked; None for a method without. Others' sections are refused."""
    for name, other in METHODS.items():
        if other.section and other.section != method.section and getattr(options, other.section):
            got = f"got {', '.join(getattr(options, other.section))}. Leave them out, or use --method {name}."
            raise ValueError(f"{other.section}: expected no settings with method {options.method}, {got}")
    if method.settings_type is None:
        return None
    return settings.build(method.settings_type, getattr(options, method.section), prefix=f"{method.section}.")


def _shared(options: Options, pruning: PruneOptions, calibration: Tensor | None) -> dict[str, Any]:
    return {
        "calibration": calibration,
        "shift_zero_metrics": options.shift_zero_metrics,
        "precision": options.precision,
        "damping": pruning.damping,
        "block_size": options.block_size,
        "experts": ExpertOptions(options.expert_tokens, options.few_experts),
        "exclude": options.exclude,
    }
