"""Sampling, combining and hardening of masks: pure functions, the definition of PATCH's mask distribution.

A weight (N, K) has one categorical distribution over the six 2:4 patterns per group of 4 and one dense/sparse
distribution per tile. The mask is m + (1 - m) * M, m the tile's probability of being dense and M the 2:4
mask. Everything is computed in float32 (float64 for float64 logits). Shapes: N rows, K columns, G = N*K/4
groups, (rows, cols) = (ceil(N / tile[0]), ceil(K / tile[1])) tiles; edge tiles may be ragged.

Source: PATCH (Hourri, Mozaffari, Mehri Dehnavi 2025), section 3; the 2:4 part is MaskLLM (Fang et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from patch_kernels import PATTERNS, tile_grid
from patch_kernels.checks import require_multiple, require_number, require_sizes, require_tensor

__all__ = [
    "PATTERNS",
    "combine",
    "exact_budget",
    "expand_tiles",
    "harden",
    "nonzero_budget",
    "sample_pattern_mask",
    "sample_tile_mask",
    "tile_areas",
    "tile_counts",
    "tile_grid",
    "tile_sums",
]

_SAME_LAYER = "It must belong to the same weight and tile size."


def sample_pattern_mask(
    logits: Tensor,
    shape: tuple[int, int],
    *,
    temperature: float,
    scale: float,
    hard: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    """Gumbel-softmax sample of the 2:4 mask: softmax((scale * logits + noise) / temperature) @ PATTERNS.

    logits  (G, 6) float; scale multiplies the logits only, never the noise.
    noise   (G, 6) standard Gumbel; drawn from torch's global generator if None.
    hard    one-hot forward, soft gradient (straight-through).
    returns (N, K); every group of a soft or hard sample sums to 2.
    raises  ValueError for K % 4 != 0, wrong logits or noise shape, temperature <= 0.
    """
    _check_pattern_logits(logits, shape)
    _check_temperature(temperature)
    logits = _compute_dtype(logits)
    if noise is None:
        noise = -torch.empty_like(logits).exponential_().log()
    require_tensor("pattern noise", noise, shape=logits.shape, advice=_SAME_LAYER)
    probability = torch.softmax((scale * logits + noise.to(logits)) / temperature, dim=1)
    if hard:
        one_hot = functional.one_hot(probability.argmax(1), 6).to(probability)
        probability = _straight_through(one_hot, probability)
    return (probability @ PATTERNS.to(probability)).reshape(shape)


def sample_tile_mask(
    logits: Tensor,
    tile: tuple[int, int],
    shape: tuple[int, int],
    *,
    temperature: float,
    scale: float,
    hard: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    """Sample of each tile's share of dense, sigmoid((scale * logits + noise) / temperature), spread over the
    tiles.

    logits  (rows, cols) float, one per tile, positive means dense.
    noise   (rows, cols) standard logistic (difference of two Gumbels, dense - sparse); drawn if None.
    hard    0/1 forward (dense iff scale * logit + noise > 0), soft gradient.
    returns (N, K).
    raises  ValueError for a bad tile, wrong logits or noise shape, temperature <= 0.
    """
    grid = tile_grid(shape, tile)
    require_tensor("tile logits", logits, shape=grid, advice=_SAME_LAYER)
    _check_temperature(temperature)
    logits = _compute_dtype(logits)
    if noise is None:
        exponentials = torch.empty(2, *grid, dtype=logits.dtype, device=logits.device).exponential_()
        noise = exponentials[1].log() - exponentials[0].log()
    require_tensor("tile noise", noise, shape=grid, advice=_SAME_LAYER)
    score = scale * logits + noise.to(logits)
    dense = torch.sigmoid(score / temperature)
    if hard:
        dense = _straight_through((score > 0).to(dense), dense)
    return expand_tiles(dense, tile, shape)


def combine(tile_mask: Tensor, pattern_mask: Tensor) -> Tensor:
    """Joint mask m + (1 - m) * M of a tile mask m and a 2:4 mask M, both (N, K) (bool counts as 0/1)."""
    advice = "Sample both masks for the same weight."
    require_tensor("combine, pattern_mask", pattern_mask, shape=tile_mask.shape, advice=advice)
    if tile_mask.dtype == torch.bool and pattern_mask.dtype == torch.bool:
        return tile_mask | pattern_mask
    if tile_mask.dtype == torch.bool:
        tile_mask = tile_mask.to(pattern_mask.dtype)
    return tile_mask + (1 - tile_mask) * pattern_mask


@torch.no_grad()
def harden(
    pattern: Tensor, tile_logits: Tensor | None, tile: tuple[int, int], shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Final 0/1 mask without noise: the best pattern of each group, and dense tiles where the logit is > 0.

    pattern      pattern logits (G, 6) float, or a fixed keep mask (N, K) bool.
    tile_logits  (rows, cols), or None: every tile is sparse. A logit of exactly 0 is sparse.
    returns      keep (N, K) bool, tile_is_sparse (rows, cols) bool.
    raises       ValueError for shapes that do not belong together.
    """
    grid = tile_grid(shape, tile)
    if pattern.dtype == torch.bool:
        require_tensor("fixed keep mask", pattern, shape=shape, advice=_SAME_LAYER)
        keep = pattern.clone()
    else:
        _check_pattern_logits(pattern, shape)
        keep = PATTERNS.to(pattern.device)[pattern.argmax(1)].reshape(shape)
    if tile_logits is None:
        return keep, torch.ones(grid, dtype=torch.bool, device=keep.device)
    require_tensor("tile logits", tile_logits, shape=grid, advice=_SAME_LAYER)
    dense = tile_logits.to(keep.device) > 0
    return keep | expand_tiles(dense, tile, shape), ~dense


def tile_areas(tile: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Number of weights in each tile, int64 (rows, cols); edge tiles count what they really hold."""
    rows, cols = tile_grid(shape, tile)
    heights = (shape[0] - torch.arange(rows) * tile[0]).clamp(max=tile[0])
    widths = (shape[1] - torch.arange(cols) * tile[1]).clamp(max=tile[1])
    return heights[:, None] * widths


def tile_counts(keep: Tensor, tile: tuple[int, int]) -> Tensor:
    """Number of kept weights in each tile of a bool (N, K) mask: int64 (rows, cols)."""
    advice = "Masks are explicit, never inferred from zeros of a weight."
    require_tensor("tile_counts, keep", keep, dtypes=(torch.bool,), shape=("N", "K"), advice=advice)
    rows, cols = tile_grid((keep.shape[0], keep.shape[1]), tile)
    padding = (0, cols * tile[1] - keep.shape[1], 0, rows * tile[0] - keep.shape[0])
    padded = functional.pad(keep, padding)
    return padded.reshape(rows, tile[0], cols, tile[1]).sum((1, 3), dtype=torch.int64)


def tile_sums(values: Tensor, tile: tuple[int, int]) -> Tensor:
    """Sum of each tile of values (N, K), float64 (rows, cols)."""
    rows, cols = tile_grid((values.shape[0], values.shape[1]), tile)
    padding = (0, cols * tile[1] - values.shape[1], 0, rows * tile[0] - values.shape[0])
    padded = functional.pad(values, padding)
    return padded.reshape(rows, tile[0], cols, tile[1]).sum((1, 3), dtype=torch.float64)


def nonzero_budget(total: int, sparsity: float) -> int:
    """Largest number of nonzeros among `total` weights that honours the sparsity (share of zeros)."""
    # The offset absorbs the rounding of 1 - sparsity: 0.65 * 20 must give 13, never 12.
    return math.floor(total * (1.0 - sparsity) + 1e-6)


@torch.no_grad()
def exact_budget(tile_logits: Sequence[Tensor], gains: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Choose the dense tiles of a whole model by logit so that the nonzero budget is met, not only in
    expectation.

    tile_logits  one (rows, cols) grid per layer.
    gains        matching int64 grids: nonzeros that a tile gains by being dense (its area minus its 2:4
                 nonzeros).
    budget       nonzeros that may be added to the all-sparse model.
    returns      bool grids, True where dense: the longest prefix of all tiles in descending order of their
                 logits (ties in layer order) whose gains fit. Never exceeds the budget; falls short by less
                 than one tile.
    raises       ValueError for mismatched grids or a negative budget.
    """
    if len(tile_logits) != len(gains) or any(a.shape != b.shape for a, b in zip(tile_logits, gains, strict=True)):
        got = " and ".join(str([tuple(grid.shape) for grid in grids]) for grids in (tile_logits, gains))
        raise ValueError(f"exact_budget: expected logits and gains of equal shapes, got {got}. Compute both per layer.")
    advice = "The 2:4 masks alone keep more than the target allows; lower the target sparsity."
    require_number("exact_budget, nonzeros", budget, ge=0, advice=advice)
    if not tile_logits:
        return []
    logits = torch.cat([grid.flatten().cpu().double() for grid in tile_logits])
    gain = torch.cat([grid.flatten().cpu() for grid in gains])
    order = torch.argsort(logits, descending=True, stable=True)
    dense = torch.zeros_like(logits, dtype=torch.bool)
    dense[order] = gain[order].cumsum(0) <= budget
    parts = dense.split([grid.numel() for grid in tile_logits])
    return [part.reshape(grid.shape).to(grid.device) for part, grid in zip(parts, tile_logits, strict=True)]


def expand_tiles(grid: Tensor, tile: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Spread a (rows, cols) grid over its tiles, the ragged edge cut off: (N, K)."""
    return grid.repeat_interleave(tile[0], 0)[: shape[0]].repeat_interleave(tile[1], 1)[:, : shape[1]]


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Value of hard to the last bit, gradient of soft (hard - soft + soft would round)."""
    return hard + (soft - soft.detach())


def _compute_dtype(tensor: Tensor) -> Tensor:
    """16-bit logits are widened: a bf16 softmax has 8 bits and fp16 Gumbel noise can overflow."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _check_pattern_logits(logits: Tensor, shape: tuple[int, int]) -> None:
    require_sizes("weight shape (N, K)", shape, "Pass the shape of a 2-D weight.")
    require_multiple("2:4 patterns, columns of the weight", shape[1], 4, "Exclude this layer.")
    require_tensor("pattern logits", logits, shape=(shape[0] * shape[1] // 4, 6), advice=_SAME_LAYER)


def _check_temperature(temperature: float) -> None:
    require_number("temperature", temperature, gt=0, advice="The paper ends at 0.05.")
