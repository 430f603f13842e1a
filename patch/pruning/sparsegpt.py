"""SparseGPT: prune column by column and let the weights to the right make up for the error.

With X the layer's inputs, H = 2/n * sum over n samples of X^T X is the Hessian of the layer's squared output
error, and U the upper Cholesky factor of its inverse. Pruning w in column c costs w^2 / U_cc^2; the weights
to its right change by -(w / U_cc) * U[c, c+1:]. Source: Frantar and Alistarh, "SparseGPT: Massive Language
Models Can be Accurately Pruned in One-Shot", 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from patch.pruning.hessian import Statistics, damped_until, full_precision, inverse_factor, removal_costs
from patch.pruning.options import GROUP, PruneOptions
from patch.pruning.selection import (
    Pruned,
    check_updated,
    keep_above_threshold,
    keep_two_of_four,
    whole_pattern,
    zeros_first,
)

__all__ = ["Statistics", "costs", "prune", "sweep"]


def prune(weight: Tensor, statistics: Statistics, options: PruneOptions, stays: Tensor | None = None) -> Pruned:
    """Prune weight (N, K) and update what is kept.

    stays  (N, K) bool: what is not pruned, with pattern 2:4; it makes up for what is
    Columns whose input was always zero are set to zero. Weights that are 0 already go first and none becomes another
    value. Raises ValueError when the Hessian cannot be inverted even with much more damping, or the updated weights
    leave the range of the weight's dtype.
    """
    dead = statistics.hessian.diagonal() == 0
    current = weight.detach().to(statistics.hessian.dtype).masked_fill(dead, 0)
    keep = weight.detach() != 0
    with full_precision():
        factor = damped_until(statistics.hessian, options.damping, inverse_factor)
        sweep(current, keep, factor, options.block_size, partial(_choose, options=options, stays=stays))
    result = current.to(weight.dtype)
    check_updated(result)
    return Pruned(result, whole_pattern(keep, options.pattern, stays))


def costs(weight: Tensor, statistics: Statistics, options: PruneOptions) -> Tensor:
    """What pruning each weight (N, K) adds to the squared error of the layer's output once others make up for it."""
    return removal_costs(weight, statistics.hessian, options.damping)


def sweep(
    weight: Tensor, keep: Tensor, factor: Tensor, block_size: int, choose: Callable[..., None] | None = None
) -> None:
    """Zero what is not kept, column by column in place, the columns to the right making up for the error.

    weight  (N, K) in the precision of factor (K, K), the U of `inverse_factor`
    keep    (N, K) bool; given, or what may be kept, of which is chosen as the columns are reached by
            choose(block (N, B), keep (N, B), diagonal of U (B,), column in the block, first column of the block)
    """
    for start in range(0, weight.shape[1], block_size):
        part = slice(start, min(start + block_size, weight.shape[1]))
        error = _sweep_block(weight[:, part], keep[:, part], factor[part, part], start, choose)
        weight[:, part.stop :] -= error @ factor[part, part.stop :]
    weight.masked_fill_(~keep, 0)


def _sweep_block(block: Tensor, keep: Tensor, factor: Tensor, start: int, choose: Callable[..., None] | None) -> Tensor:
    """One block of `sweep`; returns the scaled errors (N, B), from which the columns after it are updated."""
    diagonal = factor.diagonal()
    error = torch.empty_like(block)
    for c in range(block.shape[1]):
        if choose is not None:
            choose(block, keep, diagonal, c, start)
        error[:, c] = (block[:, c] / diagonal[c]).masked_fill(keep[:, c], 0)
        block[:, c + 1 :].addr_(error[:, c], factor[c, c + 1 :], alpha=-1)
    return error


def _choose(
    block: Tensor,
    keep: Tensor,
    diagonal: Tensor,
    column: int,
    start: int,
    *,
    options: PruneOptions,
    stays: Tensor | None,
) -> None:
    """Choose what to keep: of a whole block at its first column, or of each group of four at its first."""
    if options.pattern == "2:4" and column % GROUP == 0:
        group = slice(column, column + GROUP)
        score = block[:, group].square() / diagonal[group].square()
        own = None if stays is None else stays[:, start + column : start + column + GROUP]
        keep[:, group] &= keep_two_of_four(zeros_first(score, ~keep[:, group]), own)
    elif options.pattern == "unstructured" and column == 0:
        keep &= keep_above_threshold(zeros_first(block.square() / diagonal.square(), ~keep), options.sparsity)
