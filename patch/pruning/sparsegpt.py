"""SparseGPT: prune column by column and let the weights to the right make up for the error.

With X the layer's inputs, H = 2/n * sum over n samples of X^T X is the Hessian of the layer's squared output
error, and U the upper Cholesky factor of its inverse. Pruning w in column c costs w^2 / U_cc^2; the weights
to its right change by -(w / U_cc) * U[c, c+1:]. Source: Frantar and Alistarh, "SparseGPT: Massive Language
Models Can be Accurately Pruned in One-Shot", 2023.
"""

from __future__ import annotations

import torch

from patch.pruning.hessian import Statistics, damped_until, full_precision, inverse_factor
from patch.pruning.selection import (
    GROUP,
    Pruned,
    PruneOptions,
    check_updated,
    keep_above_threshold,
    keep_two_of_four,
)

__all__ = ["Statistics", "prune"]


def prune(weight: torch.Tensor, statistics: Statistics, options: PruneOptions) -> Pruned:
    """Prune weight (N, K) and update what is kept.

    Columns whose input was always zero are set to zero. Raises ValueError when the Hessian cannot be inverted
    even with much more damping, or the updated weights leave the range of the weight's dtype.
    """
    dead = statistics.hessian.diagonal() == 0
    current = weight.detach().to(statistics.hessian.dtype).masked_fill(dead, 0)
    with full_precision():
        factor = damped_until(statistics.hessian, options.damping, inverse_factor)
        keep = torch.empty_like(current, dtype=torch.bool)
        for start in range(0, current.shape[1], options.block_size):
            end = min(start + options.block_size, current.shape[1])
            error = _prune_block(current[:, start:end], keep[:, start:end], factor[start:end, start:end], options)
            current[:, end:] -= error @ factor[start:end, end:]
    result = current.masked_fill_(~keep, 0).to(weight.dtype)
    check_updated(result)
    return Pruned(result, keep)


def _prune_block(block: torch.Tensor, keep: torch.Tensor, factor: torch.Tensor, options: PruneOptions) -> torch.Tensor:
    """Prune a block of columns (N, B) in place, filling keep (N, B); factor is U of the block.

    Returns the scaled errors (N, B), from which the columns after the block are updated.
    """
    diagonal = factor.diagonal()
    if options.pattern == "unstructured":
        keep.copy_(keep_above_threshold(block.square() / diagonal.square(), options.sparsity))
    error = torch.empty_like(block)
    for c in range(block.shape[1]):
        if options.pattern == "2:4" and c % GROUP == 0:
            group = slice(c, c + GROUP)
            keep[:, group] = keep_two_of_four(block[:, group].square() / diagonal[group].square())
        error[:, c] = (block[:, c] / diagonal[c]).masked_fill(keep[:, c], 0)
        block[:, c + 1 :].addr_(error[:, c], factor[c, c + 1 :], alpha=-1)
    return error
