"""The packed weight's ops by torch's own kernels: slow and right, for GPUs that the compiled ones cannot serve.

torch brings a CUDA runtime of its own, so it may run on a driver that is too old for the runtime of this build.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from patch_kernels.reference import TILE

_SLOT = 8192  # 16-bit units of a slot of 128 rows (docs/reference/format.md)
_CHUNK = 1 << 22  # weights that are unpacked at a time; their positions take 8 bytes each


def unpack_tiles(payload: Tensor, tile_is_sparse: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """The dense weight (rows, cols), bit for bit that of the compiled op. Does not wait for the GPU."""
    tile_rows, tile_cols = tile_is_sparse.shape
    like: dict[str, Any] = {"device": payload.device}
    units = payload.view(torch.int16)
    flags = tile_is_sparse.bool()
    sizes = torch.where(flags, _SLOT + 1024, 2 * _SLOT).flatten()
    starts = (sizes.cumsum(0) - sizes).reshape(tile_rows, 1, tile_cols, 1)

    r = torch.arange(TILE, **like)[:, None, None]
    k, c = torch.arange(TILE, **like), torch.arange(TILE // 4, **like)
    swizzle = (r & 7) << 3
    dense = _SLOT * (k >> 6) + 64 * r + ((k & 63) ^ swizzle)
    kept = 64 * r + (torch.arange(TILE // 2, **like) ^ swizzle)
    lane = 4 * (r & 7) + 2 * (c >> 3 & 1) + (c >> 2 & 1)
    nibbles = _SLOT + 2 * ((r >> 4) * 64 + lane * 2 + (c >> 4)) + (r >> 3 & 1)

    weight = payload.new_empty((rows, cols), dtype=dtype)
    step = max(1, _CHUNK // (TILE * TILE * tile_cols))
    for first in range(0, tile_rows, step):
        start, is_sparse = starts[first : first + step], flags[first : first + step, None, :, None]
        # A sparse tile has fewer units than a dense one: what is read there beyond the payload's end is not used.
        as_dense = units[(start + dense).clamp_(max=units.numel() - 1)]
        codes = units[start + nibbles] >> 4 * (c & 3) & 15
        columns = torch.stack([codes & 3, codes >> 2], dim=-1).long()
        values = units[start + kept].reshape(columns.shape)
        as_sparse = torch.zeros_like(as_dense).reshape(*codes.shape, 4).scatter_(-1, columns, values)
        chunk = torch.where(is_sparse, as_sparse.reshape(as_dense.shape), as_dense)
        here = weight[TILE * first : TILE * (first + step)]
        here.copy_(chunk.reshape(-1, TILE * tile_cols)[: here.shape[0], :cols].view(dtype))
    return weight


def tile_linear(
    x: Tensor,
    payload: Tensor,
    tile_is_sparse: Tensor,
    schedule: Tensor | None,
    out_features: int,
    bias: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    """ops.tile_linear in the order of its schema: unpack, then torch's product."""
    weight = unpack_tiles(payload, tile_is_sparse, out_features, x.shape[-1], x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def _tile_linear_group(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weights = [(*args[i : i + 5], args[-1]) for i in range(0, len(args) - 1, 5)]
    return tuple(tile_linear(x, *weight) for weight in weights)


def tile_experts(
    x: Tensor,
    experts: Tensor,
    payload: Tensor,
    tile_is_sparse: Tensor,
    schedule: Tensor | None,
    begins: Tensor | None,
    out_features: int,
    parts: int,
    bias: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    """ops.tile_experts in the order of its schema: an expert that was hit after the other. Waits for the GPU."""
    y = x.new_empty((experts.shape[0], parts * out_features))
    sizes = torch.where(tile_is_sparse.bool(), 2 * _SLOT + 2048, 4 * _SLOT).sum((1, 2)).tolist()
    matrices = payload.split(sizes)
    for expert in experts.unique().tolist():
        at = (experts == expert).nonzero()[:, 0]
        rows = x[at * x.shape[0] // experts.shape[0]]
        of_expert = range(expert * parts, (expert + 1) * parts)
        weights = [unpack_tiles(matrices[i], tile_is_sparse[i], out_features, x.shape[1], x.dtype) for i in of_expert]
        y[at] = torch.nn.functional.linear(rows, torch.cat(weights), None if bias is None else bias[expert])
    return y


def serve(dispatch_key: str) -> torch.library.Library:
    """Take the place of the compiled kernels of a dispatch key ("CUDA") for as long as the returned object lives."""
    library = torch.library.Library("patch_kernels", "IMPL")
    kernels: dict[str, Any] = {
        "unpack_tiles": lambda payload, flags, _schedule, *rest: unpack_tiles(payload, flags, *rest),
        "tile_linear": tile_linear,
        "tile_linear_train": tile_linear,
        "tile_experts": tile_experts,
        "tile_experts_train": tile_experts,
    }
    kernels |= {f"tile_linear_group{count}": _tile_linear_group for count in (2, 3, 4)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # of a kernel that is replaced
        for op, kernel in kernels.items():
            library.impl(op, kernel, dispatch_key)
    return library
