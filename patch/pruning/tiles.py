"""Which tiles of a model stay dense: those whose 2:4 mask costs most, as many as the budget of nonzeros allows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from patch.mask import exact_budget, expand_tiles, nonzero_budget, tile_areas, tile_counts


def choose_dense_tiles(
    losses: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    sparsity: float,
    tile: tuple[int, int],
    groups: Mapping[str, object] | None = None,
) -> dict[str, Tensor]:
    """The dense tiles of a model, {layer: (rows, cols) bool, True where dense}.

    losses    {layer: (rows, cols)}: what a tile costs with its 2:4 mask, in units that compare within a group
    masks     {layer: keep (N, K) bool}, 2:4 everywhere
    sparsity  share of zeros, 0 to 0.5
    groups    {layer: what shares its budget}; None: one budget for the whole model
    Tiles are taken by loss per weight that they gain (ragged tiles gain fewer), highest first, until the next one
    would exceed the nonzeros of the budget; equal ones in the order of the layers. So a group has at least the
    sparsity, and less than a tile more.
    """
    chosen: dict[str, Tensor] = {}
    members: dict[object, list[str]] = {}
    for name in masks:
        members.setdefault(None if groups is None else groups[name], []).append(name)
    for names in members.values():
        kept = [tile_counts(masks[name], tile).cpu() for name in names]
        gains = [
            tile_areas(tile, (masks[name].shape[0], masks[name].shape[1])) - counts
            for name, counts in zip(names, kept, strict=True)
        ]
        budget = nonzero_budget(sum(masks[name].numel() for name in names), sparsity)
        scores = [losses[name].cpu().double() / gain.clamp(min=1) for name, gain in zip(names, gains, strict=True)]
        # A 2:4 mask may keep a weight more than the budget of an odd number of weights.
        spare = max(0, budget - sum(int(counts.sum()) for counts in kept))
        chosen |= zip(names, exact_budget(scores, gains, spare), strict=True)
    return {name: chosen[name] for name in masks}


def with_dense_tiles(keep: Tensor, dense: Tensor, tile: tuple[int, int]) -> Tensor:
    """The mask (N, K) bool with all of its dense tiles (rows, cols) kept."""
    return keep | stays_dense(keep.shape, dense, tile).to(keep.device)


def stays_dense(shape: tuple[int, ...] | torch.Size, dense: Tensor, tile: tuple[int, int]) -> Tensor:
    """Where a weight of a shape (N, K) lies in a dense tile of (rows, cols): bool (N, K)."""
    return expand_tiles(dense, tile, (shape[0], shape[1]))
