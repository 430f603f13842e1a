"""Which tiles of a model stay dense: those whose 2:4 mask costs most, as many as the budget of nonzeros allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from patch.mask import exact_budget, nonzero_budget, tile_areas, tile_counts


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
        # A 2:4 mask may keep a weight more than the budget of an odd number of weights.
        spare = max(0, budget - sum(int(counts.sum()) for counts in kept))
        chosen |= zip(names, costliest_tiles([losses[name] for name in names], gains, spare), strict=True)
    return {name: chosen[name] for name in masks}


def costliest_tiles(losses: Sequence[Tensor], gains: Sequence[Tensor], spare: int) -> list[Tensor]:
    """Grids (rows, cols) bool of the tiles that lose most per weight that they gain by being dense.

    gains  matching int64 grids, the weights that a 2:4 pattern prunes in a tile; spare: how many of them may stay
    """
    scores = [loss.cpu().double() / gain.clamp(min=1) for loss, gain in zip(losses, gains, strict=True)]
    return exact_budget(scores, gains, spare)
