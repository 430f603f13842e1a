"""Problems of the masked-weight op."""

from __future__ import annotations

import torch

from patch_kernels import pack_keep, tile_grid
from support.strategies import two_of_four_keep

NOISE = (5, 7, 9)


MODES = ("joint", "tile", "pattern")


def make_case(rows, cols, tile, mode, dtype=torch.float32, seed=0):
    """(weight, pattern_logits | None, tile_logits | None, fixed_pattern | None)"""
    generator = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64).to(dtype)
    pattern = torch.randn(rows * cols // 4, 6, generator=generator, dtype=torch.float64).to(real)
    tiles = torch.randn(tile_grid((rows, cols), tile), generator=generator, dtype=torch.float64).to(real)
    fixed = pack_keep(two_of_four_keep(rows, cols, generator))
    return (
        weight,
        None if mode == "tile" else pattern,
        None if mode == "pattern" else tiles,
        fixed if mode == "tile" else None,
    )


def run(function, case, grad, **kwargs):
    weight, pattern, tiles, fixed = case
    leaves = [None if t is None else t.clone().requires_grad_() for t in (pattern, tiles)]
    masked, sums = function(weight, *leaves, fixed_pattern=fixed, **kwargs)
    ((masked * grad).sum().double() + 0.3 * sums[0] + 0.01 * sums[1]).backward()
    return masked.detach(), sums.detach(), *(None if t is None else t.grad for t in leaves)
