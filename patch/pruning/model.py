"""Pruning of a whole model: block by block, or with masks that are learned for all of it at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn

from patch.files.progress import tracked
from patch.models.checks import check_device, require_finite_model, require_tokens
from patch.models.coverage import warn_of_dense_rest
from patch.models.keep_masks import apply_keep_masks, keep_mask_of, set_keep_mask
from patch.models.modes import placed
from patch.models.structure import decoder_blocks, layers_to_mask
from patch.pruning.hybrid import Hybrid, TilePruning
from patch.pruning.options import ExpertOptions, Pattern, Precision, PruneOptions, TileOptions, require_options
from patch.pruning.plan import say_plan
from patch.pruning.proxsparse.config import ProxSparseConfig
from patch.pruning.registry import Method, get_method, make_options
from patch.pruning.selection import check_weight
from patch.pruning.sequential import store, update_blocks
from patch_kernels.checks import require_number

_LESS_SPARSE = "45 percent is 0.45; dense and 2:4 tiles reach no more than 0.5, pattern='unstructured' does."


def prune_model(
    model: nn.Module,
    method: str,
    *,
    pattern: Pattern = "2:4",
    sparsity: float = 0.5,
    calibration: torch.Tensor | None = None,
    shift_zero_metrics: bool = False,
    block_size: int | None = None,
    damping: float = 0.01,
    precision: Precision = "fp32",
    tiles: TileOptions | None = None,
    experts: ExpertOptions | None = None,
    stages: str | os.PathLike[str] | None = None,
    prox: ProxSparseConfig | None = None,
    exclude: Sequence[str] = (),
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Prune the maskable layers of a causal language model in place; returns {layer name: keep (N, K) bool}.

    Blocks are pruned in order. All layers of a block use statistics of the still dense block, fed by the
    already pruned blocks before it. The keep masks are also attached to the layers
    (`patch.models.keep_masks`).

    method       of `prune_weight`, or "prox_sparse", which trains the whole model and knows only 2:4: see
                 `patch.pruning.proxsparse.training.learn_masks`. Its masks are applied to the original weights.
    pattern      of `prune_weight`; with "tiles" the share of zeros, 0 to 0.5, is that of the whole model, and its tiles
                 are chosen before any is pruned: see `tiles`
    calibration  (samples, seqlen) int64 token ids, read by all but magnitude, and by "tiles" chosen by fisher.
    tiles        how dense tiles are chosen with pattern "tiles"; None: the defaults of `TileOptions`.
    experts      what is done about experts of a mixture with few calibration tokens; None: `ExpertOptions`, by which
                 they are named in a warning and pruned by magnitude.
    stages       folder in which a long choice of tiles keeps what it has: the same call again goes on there.
    prox         how prox_sparse trains; None: the published defaults.
    exclude      fnmatch patterns over names of layers that stay dense.
    device       where each block (prox_sparse: the model) is put while it is worked on; None: where it is.
    progress     say on stderr what will be done, and how far it is: a bar on a terminal, otherwise a line now and then.
    Other arguments as in `prune_weight`. Arguments, weights and token ids are checked before any work.
    Train/eval state, `use_cache` and hooks are as before afterwards, also after an exception; layers that
    were pruned by then stay pruned and have their mask. Source: the sequential scheme of SparseGPT and Wanda.
    """
    chosen = get_method(method)
    if pattern != "tiles" and (tiles is not None or stages is not None):
        given = "tiles" if tiles is not None else "stages"
        raise ValueError(f"{given}: expected none with pattern {pattern}, got one. Leave it out, or use 'tiles'.")
    if pattern == "tiles":
        return prune_tiles(
            model,
            method,
            sparsity=sparsity,
            calibration=calibration,
            tiles=tiles,
            experts=experts,
            stages=stages,
            shift_zero_metrics=shift_zero_metrics,
            block_size=block_size,
            damping=damping,
            precision=precision,
            prox=prox,
            exclude=exclude,
            device=device,
            progress=progress,
        ).masks
    options = make_options(chosen, pattern, sparsity, block_size, damping, shift_zero_metrics, precision)
    if chosen.needs_calibration and calibration is None:
        advice = "Pass windows of (samples, seqlen) token ids, or use method='magnitude'."
        raise ValueError(f"calibration: expected token ids for method '{method}', got none. {advice}")
    if chosen.learns:
        warn_of_dense_rest(model, layers_to_mask(model, exclude))
        masks = chosen.code.learn_masks(model, calibration, prox, exclude=exclude, device=device, progress=progress)
        apply_keep_masks(model, masks, exclude=exclude)
        return {name: keep_mask_of(model.get_submodule(name)) for name in masks}
    _require_no_prox(method, prox)
    _require_expert_options(experts)
    linears = check_prunable(model, chosen, options, calibration, exclude=exclude, device=device)
    warn_of_dense_rest(model, linears)

    how = f"{method}, {pattern}" if pattern == "2:4" else f"{method}, {pattern} {sparsity:g}"
    if options.sparsity == 0:
        for linear in linears.values():
            set_keep_mask(linear, torch.ones_like(linear.weight, dtype=torch.bool))
        return {name: keep_mask_of(linear) for name, linear in linears.items()}
    if not chosen.reads_inputs:
        say_plan("pruning", how, model, linears, show=progress)
        _prune_layers(chosen, linears, options, device, f"pruning ({method})", progress)
    else:
        calibration = cast(torch.Tensor, calibration)
        new_statistics = partial(chosen.new_statistics, options=options)
        say_plan("pruning", how, model, linears, calibration, new_statistics, show=progress)
        update_blocks(
            model,
            linears,
            calibration,
            new_statistics,
            lambda name, linear, statistics: chosen.prune(linear.weight, statistics, options),
            device=device,
            what=f"pruning ({method})",
            progress=progress,
            experts=experts,
        )
    return {name: keep_mask_of(linear) for name, linear in linears.items()}


def prune_tiles(
    model: nn.Module,
    method: str,
    *,
    sparsity: float,
    calibration: torch.Tensor | None = None,
    tiles: TileOptions | None = None,
    experts: ExpertOptions | None = None,
    stages: str | os.PathLike[str] | None = None,
    shift_zero_metrics: bool = False,
    block_size: int | None = None,
    damping: float = 0.01,
    precision: Precision = "fp32",
    prox: ProxSparseConfig | None = None,
    exclude: Sequence[str] = (),
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Hybrid:
    """`prune_model` with pattern "tiles", and what its tiles were chosen by; arguments as there."""
    chosen, tiles = get_method(method), TileOptions() if tiles is None else tiles
    require_options("tiles", tiles, TileOptions)
    _require_expert_options(experts)
    require_number("sparsity", sparsity, ge=0, le=0.5, advice=_LESS_SPARSE)
    options = make_options(chosen, "tiles", sparsity, block_size, damping, shift_zero_metrics, precision)
    if calibration is None and (chosen.reads_inputs or tiles.by == "fisher"):
        reader, way_out = f"method '{method}'", "method='magnitude' with by='error'"
        if not chosen.reads_inputs:
            reader, way_out = "tiles by fisher", "by='error'"
        advice = f"Pass windows of (samples, seqlen) token ids, or use {way_out}."
        raise ValueError(f"calibration: expected token ids for {reader}, got none. {advice}")
    _require_no_prox(method, prox)
    linears = check_prunable(model, chosen, options, calibration, exclude=exclude, device=device)
    if tiles.by == "fisher":
        require_tokens(model, calibration, "calibration", least=2)
    if tiles.by == "fisher" or tiles.budget == "block":
        decoder_blocks(model)
    warn_of_dense_rest(model, linears)
    pruning = TilePruning(
        model=model,
        name=method,
        method=chosen,
        options=options,
        tiles=tiles,
        linears=linears,
        calibration=calibration,
        experts=experts,
        stages=None if stages is None else Path(stages),
        device=device,
        progress=progress,
    )
    how = f"{method}, tiles {sparsity:g} by {tiles.by}"
    new_statistics = pruning.new_statistics if chosen.reads_inputs else None
    say_plan("pruning", how, model, linears, calibration, new_statistics, show=progress)
    return pruning.run()


def _require_no_prox(method: str, prox: ProxSparseConfig | None) -> None:
    if prox is not None:
        raise ValueError(f"prox: expected None for method '{method}', got settings of prox_sparse. Leave it out.")


def _require_expert_options(experts: ExpertOptions | None) -> None:
    if experts is not None:
        require_options("experts", experts, ExpertOptions)


def check_prunable(
    model: nn.Module,
    method: Method,
    options: PruneOptions,
    calibration: torch.Tensor | None,
    *,
    exclude: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> dict[str, nn.Linear]:
    """The layers `prune_model` prunes; raises what it raises for this model, these weights and token ids."""
    if method.learns:
        return method.code.check_learnable(model, calibration, exclude=exclude, device=device)
    linears = layers_to_mask(model, exclude)
    if method.reads_inputs:
        require_tokens(model, calibration, "calibration")
        decoder_blocks(model)
    check_device(device)
    for name, linear in linears.items():
        check_weight(linear.weight, options, f"layer '{name}'")
    require_finite_model(model)
    return linears


@torch.no_grad()
def _prune_layers(
    chosen: Method,
    linears: Mapping[str, nn.Linear],
    options: PruneOptions,
    device: torch.device | str | None,
    what: str,
    progress: bool,
) -> None:
    """Prune each layer on its own, for a method without calibration."""
    for linear in tracked(linears.values(), what, "layer", show=progress):
        with placed(linear, device):
            store(linear, chosen.prune(linear.weight, None, options))
