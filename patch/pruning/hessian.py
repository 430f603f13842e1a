"""The Hessian of a layer's squared output error: gathering it, inverting it, and removing weights by it.

With X the layer's inputs, H = 2/n * sum over n samples of X^T X. What SparseGPT, Thanos and compensation
share is here. Sources: Frantar and Alistarh, "SparseGPT", 2023; Hassibi and Stork, "Second Order Derivatives
for Network Pruning: Optimal Brain Surgeon", 1992.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from patch_kernels.checks import all_finite

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_ATTEMPTS = 5
_DAMPING_FACTOR = 10
_LEAST_DAMPING = 1e-4
# Elements of the small systems solved at once by `eliminate`: 256 MiB in fp32.
_SYSTEM_ELEMS = 1 << 26


class Statistics:
    """Hessian of the layer's squared output error: `hessian` (in_features, in_features), symmetric."""

    def __init__(self, in_features: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None):
        self.in_features = in_features
        self.samples = 0
        self.hessian = torch.zeros(in_features, in_features, dtype=dtype, device=device)

    def add(self, x: Tensor) -> None:
        """Add one sample (tokens, in_features). Every sample weighs the same, however many tokens it has."""
        x = x.detach().to(self.hessian.dtype)
        self.samples += 1
        with full_precision():
            self.hessian.addmm_(x.T, x, beta=(self.samples - 1) / self.samples, alpha=2 / self.samples)


def damped_until(hessian: Tensor, damping: float, attempt: Callable[[Tensor], _Result | None]) -> _Result:
    """What `attempt` makes of H + damping * mean(diag H) * I; the damping grows until it makes something.

    hessian  (K, K). Inputs that were always zero get the diagonal entry 1 first.
    attempt  takes the damped Hessian and returns None when it is not positive definite in its precision
    raises   ValueError when even much more damping does not help.
    """
    dead = hessian.diagonal() == 0
    scale = (hessian.diagonal() + dead).mean()
    for trial in range(_ATTEMPTS):
        damped = hessian.clone()
        damped.diagonal().add_(dead).add_(damping * scale)
        result = attempt(damped)
        if result is not None:
            return result
        if trial + 1 < _ATTEMPTS:
            raised = max(damping * _DAMPING_FACTOR, _LEAST_DAMPING)
            logger.warning(
                "Hessian (%d x %d) is not positive definite with damping %g; retrying with %g",
                *hessian.shape,
                damping,
                raised,
            )
            damping = raised
    got = f"got one that does not with {damping:g} of its mean diagonal. Give more calibration samples"
    raise ValueError(f"expected a Hessian that becomes positive definite with damping, {got}, or use fp32.")


def inverse_factor(damped: Tensor) -> Tensor | None:
    """Upper triangular U with inverse(H) = U^T U, or None when H (K, K) is not positive definite."""
    inverse = inverse_of(damped)
    if inverse is None:
        return None
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed or not all_finite(upper) else upper


def inverse_of(damped: Tensor) -> Tensor | None:
    """inverse(H), or None when H (K, K) is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    return inverse if all_finite(inverse) else None


def removal_costs(weight: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """What pruning each weight (N, K) adds to the squared error of the layer's output once its row makes up for it.

    w^2 / inverse(H)_kk with H (K, K) damped, in the dtype of H (Optimal Brain Surgeon, eq. 5, without the half).
    """
    with full_precision():
        inverse = damped_until(hessian, damping, inverse_of)
    return weight.detach().to(hessian.dtype).square() / inverse.diagonal()


def eliminate(weight: Tensor, inverse: Tensor, pruned: Tensor) -> Tensor | None:
    """Remove `pruned` from every row at once and let the other weights make up for it exactly.

    weight   (N, K)
    inverse  (C, K), the first C rows of the inverse (K, K) of the damped Hessian; C = K for all columns
    pruned   (N, C) bool: only the first C columns can be removed
    returns  (N, K): for row w with pruned columns q, w - t @ inverse[q, :] where inverse[q, q] t = w[q]; of
             all rows with zeros at q that is the one with the least error (v - w) H (v - w)^T. Exactly 0 at
             q. None when a system is not positive definite in this precision.
    """
    counts = pruned.sum(1)
    # Pruned columns first: the systems of all rows of a chunk then have one shape.
    order = (~pruned).to(torch.uint8).argsort(dim=1, stable=True)
    result = weight.clone()
    start = 0
    while start < len(weight):
        width = max(1, int(counts[start:].max()))
        rows = slice(start, start + max(1, _SYSTEM_ELEMS // width**2))
        width = int(counts[rows].max())
        start = rows.stop
        if width == 0:
            continue
        columns = order[rows, :width]
        padding = torch.arange(width, device=weight.device) >= counts[rows, None]
        system = inverse[columns[:, :, None], columns[:, None, :]]
        system.masked_fill_(padding[:, :, None] | padding[:, None, :], 0)
        system.diagonal(dim1=1, dim2=2).add_(padding)
        lower, failed = torch.linalg.cholesky_ex(system)
        if failed.any():
            return None
        right = weight[rows].gather(1, columns).masked_fill(padding, 0)
        solved = torch.cholesky_solve(right[:, :, None], lower)[:, :, 0]
        spread = torch.zeros_like(pruned[rows], dtype=weight.dtype).scatter_(1, columns, solved)
        result[rows] -= spread @ inverse
    # Exactly, not up to the rounding of the update.
    result[:, : pruned.shape[1]].masked_fill_(pruned, 0)
    return result


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products without TF32 or bf16 shortcuts, which are too coarse for a matrix that is inverted."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
