"""Packed models: nn.Linear with masks as TiledLinear, saved and loaded through transformers.

Importing this package registers the quantization method "patch" with transformers. Without it transformers refuses a
packed folder: its `weight` tensors have other shapes than the layers.
"""

from __future__ import annotations

from patch.packed.convert import pack_model, unpack_model
from patch.packed.load import load
from patch.packed.projections import fuse_projections, stream_head, unfuse_projections, unstream_head
from patch.packed.save import save_dense, save_packed

__all__ = [
    "fuse_projections",
    "load",
    "pack_model",
    "save_dense",
    "save_packed",
    "stream_head",
    "unfuse_projections",
    "unpack_model",
    "unstream_head",
]
