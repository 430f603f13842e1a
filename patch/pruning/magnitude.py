"""Magnitude pruning: the smallest absolute values go. No calibration data, no weight update.

2:4: two of every four. Unstructured: one threshold per weight matrix.
Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015.
"""

from __future__ import annotations

import torch

from patch.pruning.options import PruneOptions
from patch.pruning.selection import Pruned, keep_above_threshold, keep_two_of_four, select, working_dtype


def prune(weight: torch.Tensor, statistics: None, options: PruneOptions, stays: torch.Tensor | None = None) -> Pruned:
    """Prune weight (N, K) by |weight|; `statistics` is unused. stays (N, K) bool: not pruned, with pattern 2:4."""
    score = weight.detach().to(working_dtype(weight, options.precision)).abs()
    keep = keep_two_of_four(score, stays) if options.pattern == "2:4" else keep_above_threshold(score, options.sparsity)
    return select(weight, keep)


def costs(weight: torch.Tensor, statistics: None, options: PruneOptions) -> torch.Tensor:
    """What pruning each weight (N, K) adds to the squared change of the weight."""
    return weight.detach().to(working_dtype(weight, options.precision)).square()
