"""Thanos: prune a block of columns at a time, and update each row for all it lost in the block at once.

Weights are scored as by Wanda, |w| times the norm of the input channel, with their values at the start of
the block. For a row w that loses the columns q of a block that starts at b, the columns from b on change by
-t @ G[q, :] where G[q, q] t = w[q] and G = inverse(H[b:, b:]), H the damped Hessian of the layer's squared
output error. Source: Ilin and Richtarik, "Thanos: A Block-wise Pruning Algorithm for Efficient Large Language
Model Compression", 2025.

In the published code for n:m the last row always stays dense; here every row is pruned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patch.pruning.hessian import Statistics, damped_until, eliminate, full_precision, inverse_factor
from patch.pruning.options import PruneOptions
from patch.pruning.selection import Pruned, check_updated, keep_two_of_four, smallest_of_all, whole_pattern, zeros_first

__all__ = ["Statistics", "costs", "prune"]


def prune(weight: Tensor, statistics: Statistics, options: PruneOptions, stays: Tensor | None = None) -> Pruned:
    """Prune weight (N, K) and update what is kept.

    2:4: two of every four. Unstructured: int(sparsity * N * K) weights of the whole matrix; a block prunes
    those of the smallest scores of all remaining columns that lie in it. Columns whose input was always zero
    are set to zero. Weights that are 0 already go first and none becomes another value. Raises ValueError when the
    Hessian cannot be inverted even with much more damping, or the updated weights leave the range of the weight's
    dtype. stays (N, K) bool is not pruned, with pattern 2:4; it makes up for what is.
    """
    # The diagonal is twice Wanda's channel energy; a common factor changes no order.
    norm = statistics.hessian.diagonal().sqrt()
    start = weight.detach().to(norm.dtype).masked_fill(norm == 0, 0)
    zeros = weight.detach() == 0
    with full_precision():
        result, keep = damped_until(
            statistics.hessian, options.damping, lambda damped: _prune(start, zeros, norm, damped, options, stays)
        )
    result = result.to(weight.dtype)
    check_updated(result)
    return Pruned(result, whole_pattern(keep, options.pattern, stays))


def costs(weight: Tensor, statistics: Statistics, options: PruneOptions) -> Tensor:
    """What pruning each weight (N, K) adds to the squared error of the layer's output, taken alone."""
    return weight.detach().to(statistics.hessian.dtype).square() * statistics.hessian.diagonal()


def _prune(
    weight: Tensor, zeros: Tensor, norm: Tensor, damped: Tensor, options: PruneOptions, stays: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """New weight and what of it is not 0 (N, K); None when a system is not positive definite in this precision.

    zeros  (N, K): what was 0 before
    """
    factor = inverse_factor(damped)
    if factor is None:
        return None
    weight = weight.clone()
    keep = torch.ones_like(weight, dtype=torch.bool)
    left = int(options.sparsity * weight.numel())
    for start in range(0, weight.shape[1], options.block_size):
        block = slice(start, min(start + options.block_size, weight.shape[1]))
        width = block.stop - start
        if options.pattern == "2:4":
            own = None if stays is None else stays[:, block]
            pruned = ~keep_two_of_four(zeros_first(weight[:, block].abs() * norm[block], zeros[:, block]), own)
        else:
            score = zeros_first(weight[:, start:].abs() * norm[start:], zeros[:, start:])
            pruned = smallest_of_all(score, left)[:, :width]
            left -= int(pruned.sum())
        pruned |= zeros[:, block]
        # With inverse(H) = U^T U, inverse(H[b:, b:]) is U[b:, b:]^T U[b:, b:] as U is upper triangular. These
        # are its first rows, so one factorization serves all blocks.
        inverse = factor[block, block].T @ factor[block, start:]
        updated = eliminate(weight[:, start:], inverse, pruned)
        if updated is None:
            return None
        weight[:, start:] = updated
        keep[:, block] = ~pruned
    return weight, keep
