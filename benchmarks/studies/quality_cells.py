"""The cells of the quality study: every method at every share of zeros, and ablations."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks.studies.quality_study import Cell, Made, Settings, Study
from patch.learn.config import LearnConfig
from patch.learn.run import learn
from patch.priors import tile_scores
from patch.pruning import METHODS, get_method, prune_model
from patch.pruning.fisher import tile_losses
from patch.pruning.options import TileOptions

PRIOR = "sparsegpt"
FISHER = "fisher"  # a prior of tiles: the loss that each adds, over the whole model
ABLATIONS = ("tiles", "learning", "tile", "layer", "prior")
ABLATION_TILES = (64, 32, 16)


def all_cells(settings: Settings, ablations: Sequence[str] = ()) -> dict[str, Cell]:
    """Every cell of the study by name, what a cell needs before it."""
    cells = [Cell("dense", "dense", "dense", 0.0, _dense)]
    for method, row in METHODS.items():
        if "2:4" in row.patterns:
            cells.append(_one_shot(settings, method, "2:4", 0.5))
    for method, row in METHODS.items():
        if "tiles" in row.patterns:
            cells += [tiles_cell(settings, method, target) for target in settings.targets]
    for method, row in METHODS.items():
        if "unstructured" in row.patterns:
            cells += [_one_shot(settings, method, "unstructured", target) for target in settings.targets]
    cells.append(_learned(settings, "maskllm", "MaskLLM 2:4", "MaskLLM 2:4", "maskllm", 0.5))
    for target in settings.targets:
        name, label = f"joint-{_percent(target)}", f"PATCH joint {_share(target)}"
        cells.append(_learned(settings, name, label, "PATCH joint", "joint", target))
    for target in settings.targets:
        name, label = f"joint-{_percent(target)}-fisher", f"PATCH joint from Fisher {_share(target)}"
        cells.append(_learned(settings, name, label, "PATCH joint from Fisher", "joint", target, tiles=FISHER))
    for target in settings.targets:
        name, label = f"tile-{_percent(target)}", f"PATCH tile {_share(target)}"
        # As published: the fixed patterns of PATCH-Tile are MaskLLM's.
        cells.append(_learned(settings, name, label, "PATCH tile", "tile", target, patterns="maskllm"))
    for ablation in ablations:
        cells += _ablation(settings, ablation)
    return {cell.name: cell for cell in cells}


def chosen_cells(cells: dict[str, Cell], patterns: Sequence[str]) -> list[Cell]:
    """Cells whose names match one of the patterns; raises ValueError for a pattern that matches none."""
    for pattern in patterns:
        if not fnmatch.filter(cells, pattern):
            raise ValueError(
                f"--cells: expected names or patterns of cells, got {pattern!r}. Known: {', '.join(cells)}."
            )
    return [cell for cell in cells.values() if any(fnmatch.fnmatch(cell.name, p) for p in patterns)]


def _dense(study: Study, seed: int, needed: dict[str, dict[str, Tensor]]) -> Made:
    return Made(study.dense(), {}, 0)


def _one_shot(settings: Settings, method: str, pattern: str, target: float) -> Cell:
    """A method as it is, 2:4 everywhere or unstructured."""
    row = get_method(method)
    nsamples = settings.prox_samples if row.learns else settings.nsamples

    def make(study: Study, seed: int, needed: dict[str, dict[str, Tensor]]) -> Made:
        model = study.dense()
        masks = prune_model(
            model,
            method,
            pattern=pattern,
            sparsity=target,
            calibration=study.calibration(seed, nsamples) if row.needs_calibration else None,
            prox=dataclasses.replace(settings.prox, seed=seed) if row.learns else None,
            device=study.device,
            progress=False,
        )
        samples = settings.prox.steps * settings.prox.batch_size if row.learns else nsamples
        tokens = samples * settings.window if row.needs_calibration else 0
        return Made(model, masks, tokens, row.updates_weights)

    if pattern == "2:4":
        own = {"prox": dataclasses.asdict(settings.prox), "samples": nsamples} if row.learns else {}
        return Cell(method, f"{row.label} 2:4", f"{row.label} 2:4", target, make, own)
    label = f"{row.label} {_share(target)}"
    return Cell(f"{method}-{_percent(target)}", label, f"{row.label} unstructured", target, make)


def tiles_cell(settings: Settings, method: str, target: float, **fields: Any) -> Cell:
    """A hybrid in one shot; `fields` are those of TileOptions that differ from the default."""
    row = get_method(method)
    options = TileOptions(tile=settings.tile, **fields)

    def make(study: Study, seed: int, needed: dict[str, dict[str, Tensor]]) -> Made:
        model = study.dense()
        masks = prune_model(
            model,
            method,
            pattern="tiles",
            sparsity=target,
            tiles=options,
            calibration=study.calibration(seed),
            device=study.device,
            progress=False,
        )
        return Made(model, masks, settings.nsamples * settings.window, row.updates_weights)

    name = "-".join([method, "tiles", _percent(target), *fields.values()])
    changed = "".join(f", {key} {value}" for key, value in fields.items())
    group = "ablation" if fields else f"{row.label} tiles"
    own = {"tiles": dataclasses.asdict(options)}
    return Cell(name, f"{row.label} tiles {_share(target)}{changed}", group, target, make, own)


def _learned(
    settings: Settings,
    name: str,
    label: str,
    group: str,
    mode: str,
    target: float,
    *,
    prior: str | None = PRIOR,
    patterns: str | None = None,
    tiles: str | None = None,
    **fields: Any,
) -> Cell:
    """A cell that learns: patterns from `patterns` or else `prior` in 2:4, tile scores from `prior` unstructured.

    tiles  FISHER: from the loss that each tile of these patterns adds, and a budget over the whole model
    """
    if tiles == FISHER:
        fields["tile_prior_budget"] = "model"
    config = LearnConfig.from_preset(
        mode,
        target,
        **{
            "tile": settings.tile,
            "lr": settings.lr,
            "local_batch_size": settings.batch_size,
            "global_batch_size": settings.batch_size,
            # Every result has the zeros that its name says.
            "exact_budget": mode != "maskllm",
        }
        | fields,
    )
    start = patterns or prior
    scored = mode != "maskllm" and prior is not None
    reference = f"{prior}-{_percent(target)}" if scored and tiles is None else None

    def make(study: Study, seed: int, needed: dict[str, dict[str, Tensor]]) -> Made:
        model = study.dense()
        scores, tokens = None, study.blocks.numel()
        if reference is not None:
            scores = {name: tile_scores(keep, config.tile) for name, keep in needed[reference].items()}
        elif tiles == FISHER:
            samples = study.calibration(seed)
            tokens += samples.numel()
            scores = tile_losses(model, needed[start], samples, config.tile, device=study.device, progress=False)
        outcome = learn(
            model,
            study.blocks,
            dataclasses.replace(config, seed=seed),
            prior_masks=None if start is None else needed[start],
            tile_scores=scores,
            progress=False,
        )
        return Made(model, outcome.masks, tokens, tile_is_sparse=outcome.tile_is_sparse)

    own = {"learn": dataclasses.asdict(config), "steps": settings.steps}
    needs = tuple(cell for cell in (start, reference) if cell is not None)
    return Cell(name, label, group, target, make, own, needs, learns=True)


def _ablation(settings: Settings, ablation: str) -> list[Cell]:
    """A hybrid at the first target with one setting changed at a time: tiles of one shot, the others of PATCH joint."""
    target = settings.targets[0]
    if ablation == "tiles":
        changes = ({"by": "error"}, {"by": "share"}, {"budget": "block"}, {"budget": "layer"})
        return [tiles_cell(settings, PRIOR, target, **change) for change in changes]
    base, label = f"joint-{_percent(target)}", f"PATCH joint {_share(target)}"
    make = functools.partial(_learned, settings, group="ablation", mode="joint", target=target)
    if ablation == "learning":
        base, label = f"{base}-fisher", f"PATCH joint from Fisher {_share(target)}"
        return [
            make(f"{base}-distill", label=f"{label}, distilled", tiles=FISHER, objective="distill"),
            make(f"{base}-hard", label=f"{label}, straight through", tiles=FISHER, hard_pattern=True, hard_tile=True),
        ]
    if ablation == "tile":
        sizes = [size for size in ABLATION_TILES if size < settings.tile[0]]
        return [make(f"{base}-tile{s}", label=f"{label}, tile {s}x{s}", tile=(s, s)) for s in sizes]
    if ablation == "layer":
        return [make(f"{base}-layer", label=f"{label}, target per block", layer_target=True)]
    return [
        make(f"{base}-prior-{prior or 'none'}", label=f"{label}, prior {prior or 'none'}", prior=prior)
        for prior in (None, "magnitude", "wanda")
    ]


def _percent(target: float) -> str:
    return f"{100 * target:g}"


def _share(target: float) -> str:
    return f"{_percent(target)}%"
