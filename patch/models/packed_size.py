"""Bytes that packing makes of a model's masked layers: from masks, and what to expect of masks still to be learned."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from patch_kernels import TILE, payload_bytes, tiles_that_are_two_of_four
from patch_kernels.ops.tile_linear import DENSE_TILE_BYTES, SPARSE_TILE_BYTES


def packed_bytes(masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """(bytes of the layers as `export --format packed` writes them, bytes as dense 16-bit weights).

    masks  {layer name: keep (N, K) bool}. Tiles of 128x128 of which every group keeps two of four are stored sparse.
    """
    flags = {name: tiles_that_are_two_of_four(keep) for name, keep in masks.items()}
    packed = sum(payload_bytes(grid) + grid.numel() for grid in flags.values())
    return packed, sum(2 * keep.numel() for keep in masks.values())


def packed_text(masks: Mapping[str, Tensor]) -> str:
    """One line: the bytes that packing makes of the masked layers, and why when they are no fewer than dense ones."""
    packed, dense = packed_bytes(masks)
    text = f"packed: {packed:,} bytes in the masked layers, {packed / dense:.2f} of dense"
    if packed < dense:
        return text
    return f"{text}: only tiles of {TILE}x{TILE} that are 2:4 throughout get smaller"


def expected_packed_share(sparsity: float, tile: tuple[int, int]) -> float:
    """Bytes after packing, as a share of dense ones, that masks learned on tiles of this size can be expected to take.

    A packed tile is sparse when all the learned tiles that it touches are, here as if those were drawn independently.
    """
    touched = math.prod(_touched(size) for size in tile)
    share_sparse = (2 * sparsity) ** touched
    return 1 - share_sparse * (1 - SPARSE_TILE_BYTES / DENSE_TILE_BYTES)


def expected_packed_text(sparsity: float, tile: tuple[int, int]) -> str:
    """One line for what masks still to be learned will take, with the tile that makes it smaller if there is one."""
    share, best = (expected_packed_share(sparsity, size) for size in (tile, (TILE, TILE)))
    text = f"at sparsity {sparsity:g} on {tile[0]}x{tile[1]} tiles, packing will take about {share:.2f} of dense bytes"
    if share - best < 0.005:
        return text
    return f"{text}: it stores tiles of {TILE}x{TILE}, with which it would take {best:.2f}"


def _touched(size: int) -> int:
    """Learned tiles of this size along one side of a packed tile."""
    return math.ceil(TILE / size) + (size % TILE != 0 and TILE % size != 0)
