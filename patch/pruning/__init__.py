"""Pruning: one-shot methods for one weight or a whole model, ProxSparse for a whole model, compensation for any mask.

A one-shot method is one module with the functions `prune(weight, statistics, options, stays) -> Pruned` and
`costs(weight, statistics, options)`, and, if it needs calibration data, a class `Statistics` that takes a layer's
inputs one sample at a time and keeps only what the method uses. The row of patch.pruning.registry says the rest
(docs/inside/add_a_method.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from patch.files.lazy import lazy_names

if TYPE_CHECKING:
    from patch.pruning.compensation import Compensation, compensate
    from patch.pruning.hybrid import Hybrid
    from patch.pruning.model import check_prunable, prune_model, prune_tiles
    from patch.pruning.options import COMPENSATIONS, PATTERNS, BlockOptions, ExpertOptions, PruneOptions, TileOptions
    from patch.pruning.permutation import ChannelOrders, apply_orders, permute_channels
    from patch.pruning.proxsparse.config import ProxSparseConfig
    from patch.pruning.registry import METHODS, Method, get_method
    from patch.pruning.selection import Pruned
    from patch.pruning.weight import prune_weight

__all__ = [
    "COMPENSATIONS",
    "METHODS",
    "PATTERNS",
    "BlockOptions",
    "ChannelOrders",
    "Compensation",
    "ExpertOptions",
    "Hybrid",
    "Method",
    "ProxSparseConfig",
    "PruneOptions",
    "Pruned",
    "TileOptions",
    "apply_orders",
    "check_prunable",
    "compensate",
    "get_method",
    "permute_channels",
    "prune_model",
    "prune_tiles",
    "prune_weight",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "COMPENSATIONS": "options",
        "METHODS": "registry",
        "PATTERNS": "options",
        "BlockOptions": "options",
        "ChannelOrders": "permutation",
        "Hybrid": "hybrid",
        "ExpertOptions": "options",
        "TileOptions": "options",
        "Compensation": "compensation",
        "Method": "registry",
        "ProxSparseConfig": "proxsparse.config",
        "PruneOptions": "options",
        "Pruned": "selection",
        "apply_orders": "permutation",
        "check_prunable": "model",
        "compensate": "compensation",
        "get_method": "registry",
        "permute_channels": "permutation",
        "prune_model": "model",
        "prune_tiles": "model",
        "prune_weight": "weight",
    },
)
