"""Ops on hybrid dense / 2:4 weights and the drop-in linear layer. Knows no model and no training."""

from patch_kernels.ops.adamw import adamw_step
from patch_kernels.ops.dense_linear import dense_linear
from patch_kernels.ops.masked_weight import MaskSampling, mask_sampling, masked_linear, masked_weight
from patch_kernels.ops.tile_experts import tile_experts
from patch_kernels.ops.tile_linear import payload_bytes, tile_grid, tile_linear
from patch_kernels.reference import PATTERNS, TILE, pack_keep, unpack_keep
from patch_kernels.streamed_linear import StreamedLinear
from patch_kernels.tiled_experts import TiledExperts
from patch_kernels.tiled_linear import TiledLinear
from patch_kernels.tiled_weight import TiledWeight, tiles_that_are_two_of_four

__all__ = [
    "PATTERNS",
    "TILE",
    "MaskSampling",
    "StreamedLinear",
    "TiledExperts",
    "TiledLinear",
    "TiledWeight",
    "adamw_step",
    "dense_linear",
    "mask_sampling",
    "masked_linear",
    "masked_weight",
    "pack_keep",
    "payload_bytes",
    "tile_experts",
    "tile_grid",
    "tile_linear",
    "tiles_that_are_two_of_four",
    "unpack_keep",
]
