"""SparseGPT: prune column by column and let the weights to the right make up for the error.

With X the layer's inputs, H = 2/n * sum over n samples of X^T X is the Hessian of the layer's squared output
error, and U the upper Cholesky factor of its inverse. Pruning w in column c costs w^2 / U_cc^2; the weights
to its right change by -(w / U_cc) * U[c, c+1:]. Source: Frantar and Alistarh, "SparseGPT: Massive Language
Models Can be Accurately Pruned in One-Shot", 2023.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from patch.pruning.selection import GROUP, Pruned, PruneOptions, keep_above_threshold, keep_two_of_four

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
_DAMPING_FACTOR = 10
_LEAST_DAMPING = 1e-4


class Statistics:
    """Hessian of the layer's squared output error: `hessian` (in_features, in_features), symmetric."""

    def __init__(self, in_features: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None):
        self.in_features = in_features
        self.samples = 0
        self.hessian = torch.zeros(in_features, in_features, dtype=dtype, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Add one sample (tokens, in_features). Every sample weighs the same, however many tokens it has."""
        x = x.detach().to(self.hessian.dtype)
        self.samples += 1
        with _full_precision():
            self.hessian.addmm_(x.T, x, beta=(self.samples - 1) / self.samples, alpha=2 / self.samples)


def prune(weight: torch.Tensor, statistics: Statistics, options: PruneOptions) -> Pruned:
    """Prune weight (N, K) and update what is kept.

    Columns whose input was always zero are set to zero. Raises ValueError when the Hessian cannot be inverted
    even with much more damping, or the updated weights leave the range of the weight's dtype.
    """
    dead = statistics.hessian.diagonal() == 0
    current = weight.detach().to(statistics.hessian.dtype).masked_fill(dead, 0)
    with _full_precision():
        factor = _inverse_factor(statistics.hessian, dead, options.damping)
        keep = torch.empty_like(current, dtype=torch.bool)
        for start in range(0, current.shape[1], options.block_size):
            end = min(start + options.block_size, current.shape[1])
            error = _prune_block(current[:, start:end], keep[:, start:end], factor[start:end, start:end], options)
            current[:, end:] -= error @ factor[start:end, end:]
    result = current.masked_fill_(~keep, 0).to(weight.dtype)
    if not torch.isfinite(result).all():
        raise ValueError(
            f"expected updated weights within the range of {weight.dtype}, got NaN or infinite ones. Prune "
            "in fp32 or bf16, raise damping, or give more calibration samples."
        )
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


def _inverse_factor(hessian: torch.Tensor, dead: torch.Tensor, damping: float) -> torch.Tensor:
    """U with inverse(H + damping * mean(diag H) * I) = U^T U; damping grows until H is positive definite."""
    scale = (hessian.diagonal() + dead).mean()
    for attempt in range(_ATTEMPTS):
        damped = hessian.clone()
        damped.diagonal().add_(dead).add_(damping * scale)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper
        if attempt + 1 < _ATTEMPTS:
            raised = max(damping * _DAMPING_FACTOR, _LEAST_DAMPING)
            logger.warning(
                "Hessian (%d x %d) is not positive definite with damping %g; retrying with %g",
                *hessian.shape,
                damping,
                raised,
            )
            damping = raised
    raise ValueError(
        "expected a Hessian that becomes positive definite with damping, got one that does not with "
        f"{damping:g} of its mean diagonal. Give more calibration samples, use fp32 activations, or another "
        "method."
    )


@contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 products without TF32 or bf16 shortcuts, which are too coarse for a matrix that is inverted."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
