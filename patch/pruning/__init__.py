"""Pruning: magnitude, Wanda, SparseGPT and Thanos for one weight or a whole model, ProxSparse for a whole model.

A method is one module with a function `prune(weight, statistics, options) -> Pruned` and, if it needs
calibration data, a class `Statistics` that takes a layer's inputs one sample at a time and keeps only what
the method uses.
"""

from __future__ import annotations

from patch.pruning.compensation import COMPENSATIONS, Compensation, compensate
from patch.pruning.model import check_prunable, prune_model
from patch.pruning.options import PATTERNS, PruneOptions
from patch.pruning.proxsparse.training import ProxSparseConfig
from patch.pruning.registry import LEARNED_METHODS, METHODS, Method, get_method, reference_method
from patch.pruning.selection import Pruned
from patch.pruning.weight import prune_weight

__all__ = [
    "COMPENSATIONS",
    "LEARNED_METHODS",
    "METHODS",
    "PATTERNS",
    "Compensation",
    "Method",
    "ProxSparseConfig",
    "PruneOptions",
    "Pruned",
    "check_prunable",
    "compensate",
    "get_method",
    "prune_model",
    "prune_weight",
    "reference_method",
]
