"""Problems whose every product and sum is exact."""

from __future__ import annotations

import torch

from support.strategies import hybrid_mask


def integer_case(rows, cols, tokens, sparse_share, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    keep, tile_is_sparse = hybrid_mask(rows, cols, sparse_share, generator)
    weight = torch.randint(-2, 3, (rows, cols), generator=generator).to(dtype)
    x = torch.randint(-2, 3, (tokens, cols), generator=generator).to(dtype)
    bias = torch.randint(-3, 4, (rows,), generator=generator).to(dtype)
    return weight, keep, tile_is_sparse, x, bias
