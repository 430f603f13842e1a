"""Ops on hybrid dense / 2:4 weights and the drop-in linear layer. Knows no model and no training."""

from patch_kernels.adamw import adamw_step
from patch_kernels.layout import TiledWeight, tiles_that_are_two_of_four
from patch_kernels.linear import TiledLinear
from patch_kernels.masked import MaskSampling, mask_sampling, masked_linear, masked_weight
from patch_kernels.ops import payload_bytes, tile_grid, tile_linear
from patch_kernels.reference import PATTERNS, TILE, pack_keep, unpack_keep

__all__ = [
    "PATTERNS",
    "TILE",
    "MaskSampling",
    "TiledLinear",
    "TiledWeight",
    "adamw_step",
    "mask_sampling",
    "masked_linear",
    "masked_weight",
    "pack_keep",
    "payload_bytes",
    "tile_grid",
    "tile_linear",
    "tiles_that_are_two_of_four",
    "unpack_keep",
]
