"""TiledWeight: a packed weight with what is needed to read it back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patch_kernels.checks import require_tensor
from patch_kernels.ops import tile_linear


@dataclass(frozen=True)
class TiledWeight:
    """A weight (N, K) packed into dense and 2:4 tiles of 128x128.

    payload         1-D uint8, ops.payload_bytes(tile_is_sparse) bytes (docs/reference/format.md)
    tile_is_sparse  (ceil(N/128), ceil(K/128)) bool
    shape, dtype    of the weight; dtype is fp16 or bf16
    schedule        ops.make_schedule(tile_is_sparse), which the GPU kernels need; None: they unpack and call cuBLAS
    """

    payload: Tensor
    tile_is_sparse: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    schedule: Tensor | None = None

    @classmethod
    def pack(cls, weight: Tensor, keep: Tensor, tile_is_sparse: Tensor) -> TiledWeight:
        """See ops.pack_tiles for shapes and errors."""
        payload = tile_linear.pack_tiles(weight, keep, tile_is_sparse)
        schedule = tile_linear.make_schedule(tile_is_sparse)
        shape = (weight.shape[0], weight.shape[1])
        return cls(payload, tile_is_sparse.bool(), shape, weight.dtype, schedule)

    def unpack(self) -> Tensor:
        """The dense weight (N, K), zeros where pruned."""
        return tile_linear.unpack_tiles(self.payload, self.tile_is_sparse, self.shape, self.dtype, self.schedule)

    @property
    def nbytes(self) -> int:
        """Bytes of payload and flags."""
        return self.payload.numel() + self.tile_is_sparse.numel()

    def matmul(self, x: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False) -> Tensor:
        """x @ weight.T + bias; see ops.tile_linear.

        raises  ValueError for an x, bias or schedule that does not fit the weight: the op knows neither K nor dtype.
        """
        advice = "Convert it, or pack the weight in its dtype."
        for what, tensor, dtype, shape in (
            ("x", x, self.dtype, (..., self.shape[1])),
            ("bias", bias, self.dtype, (self.shape[0],)),
            ("schedule", self.schedule, torch.int32, (tile_linear.schedule_words(tile_linear.tile_grid(self.shape)),)),
        ):
            if tensor is not None or what == "x":
                require_tensor(f"TiledWeight.matmul, {what}", tensor, dtypes=(dtype,), shape=shape, advice=advice)
        flags = tile_linear.tile_flags(self.tile_is_sparse)
        return tile_linear.tile_linear(x, self.payload, flags, self.shape[0], bias, self.schedule, batch_invariant)


def tiles_that_are_two_of_four(keep: Tensor) -> Tensor:
    """Flags (ceil(N/128), ceil(K/128)) of the tiles whose every group keeps exactly 2 of 4: these can be packed sparse.

    keep (N, K) bool, made by any mask at any tile size.
    """
    kept, expected = tile_linear.kept_of_groups(keep)
    right = kept == expected
    rows, groups = right.shape
    grid = tile_linear.tile_grid((rows, keep.shape[1]))
    padded = torch.nn.functional.pad(right, (0, grid[1] * 32 - groups, 0, grid[0] * 128 - rows), value=True)
    return padded.reshape(grid[0], 128, grid[1], 32).all(3).all(1)
