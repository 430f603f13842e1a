"""The one list of shapes and masks that tests and benchmarks share."""

from __future__ import annotations

import torch

from patch_kernels import PATTERNS, reference, tile_grid

# Below, at and above a tile and a group, and far from both.
SHAPES = [
    (1, 1),
    (3, 5),
    (100, 70),
    (127, 129),
    (128, 128),
    (129, 130),
    (130, 132),
    (256, 384),
    (257, 513),
]
TOKENS = [0, 1, 2, 15, 16, 17, 48, 63, 64, 65, 130, 300]


def two_of_four_keep(rows: int, cols: int, generator: torch.Generator) -> torch.Tensor:
    """Random keep mask, exactly 2 of 4 in every group; a last group cut to one or two columns keeps them all."""
    groups = -(-cols // 4)
    score = torch.rand(rows, groups * 4, generator=generator)
    score[:, cols:] = -1
    chosen = score.reshape(-1, 4).topk(2, dim=1).indices
    keep = torch.zeros(rows * groups, 4, dtype=torch.bool).scatter_(1, chosen, True)
    return keep.reshape(rows, groups * 4)[:, :cols].contiguous()


def hybrid_mask(rows: int, cols: int, sparse_share: float, generator: torch.Generator):
    """Random (keep, tile_is_sparse) with about sparse_share of the 128x128 tiles sparse."""
    tile_is_sparse = torch.rand(tile_grid((rows, cols)), generator=generator) < sparse_share
    inside = reference.expand_tiles(tile_is_sparse, (128, 128), (rows, cols))
    return two_of_four_keep(rows, cols, generator) | ~inside, tile_is_sparse


def random_patterns(groups: int, generator: torch.Generator) -> torch.Tensor:
    """One of the six patterns for each group: (groups, 4) bool."""
    return PATTERNS[torch.randint(0, 6, (groups,), generator=generator)]
