"""One-shot pruning: magnitude, Wanda, SparseGPT and Thanos, for one weight or a whole model.

A method is one module with a function `prune(weight, statistics, options) -> Pruned` and, if it needs
calibration data, a class `Statistics` that takes a layer's inputs one sample at a time and keeps only what
the method uses.
"""

from __future__ import annotations

from patch.pruning.compensation import COMPENSATIONS, Compensation, compensate
from patch.pruning.methods import METHODS, Method, get_method, prune_weight
from patch.pruning.model import prune_model
from patch.pruning.selection import PATTERNS, Pruned, PruneOptions

__all__ = [
    "COMPENSATIONS",
    "METHODS",
    "PATTERNS",
    "Compensation",
    "Method",
    "PruneOptions",
    "Pruned",
    "compensate",
    "get_method",
    "prune_model",
    "prune_weight",
]
