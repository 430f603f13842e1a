"""Low-rank adapters for what compression took away: y = x W_C^T + (x L) R.

SLiM-LoRA takes the best approximation of the error in the norm that the layer's inputs weigh: with
x = sqrt(input energy), U S V^T = svd((W - W_C) diag(x)), L = diag(1/x) V S and R = U^T. With x = 1 this is the
naive one. Source: SLiM (Mozaffari, Yazdanbakhsh, Mehri Dehnavi 2025), section on SLiM-LoRA.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from patch.models.adapted_linear import ADAPTER_DTYPE
from patch.pruning.hessian import full_precision
from patch.pruning.selection import keep_two_of_four
from patch.slim.options import CompressOptions
from patch.slim.quantize import quantize_weight

_PRUNING_STEPS = 100
# Share of the mean diagonal that keeps the systems of pruned adapters regular (rank padding is all zeros).
_RIDGE = 1e-10


@torch.no_grad()
def make_adapter(error: Tensor, options: CompressOptions, energy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Adapters for an error W - W_C (N, K), fp32 or fp64: L (K, rank) and R (rank, N), both bf16.

    energy  (K,) of the inputs, needed by slim_lora. An input that was always zero costs nothing, so its row
            of L is zero. (The published code gives up on x for the whole layer then, unless
            shift_zero_metrics lifts the zeros.)
    """
    rank = options.rank(tuple(error.shape))
    x = cast(Tensor, energy).to(error.dtype).sqrt() if options.slim_lora else torch.ones_like(error[0])
    left_singular, singular, _ = torch.linalg.svd(error * x, full_matrices=False)
    found = min(rank, singular.numel())
    left = error.new_zeros(error.shape[1], rank)
    right = error.new_zeros(rank, error.shape[0])
    # V S = diag(x) (W - W_C)^T U. Taken from the SVD its rows have the rounding error of the largest one, which
    # the division by x would blow up for an input that is almost always zero.
    with full_precision():
        left[:, :found] = x[:, None] * (error.T @ left_singular[:, :found])
    right[:found] = left_singular[:, :found].T
    if options.prune_lora:
        left, right = prune_left(left, right)
    left = (left / x[:, None]).masked_fill_(x[:, None] == 0, 0)
    if options.quantize_lora:
        left, right = (
            quantize_weight(part, bits=options.bitwidth, block=options.lora_tile_size).weight for part in (left, right)
        )
    return left.to(ADAPTER_DTYPE), right.to(ADAPTER_DTYPE)


def prune_left(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Left adapter (K, r) with two of every four along K, and both adjusted to approximate the same product.

    The support is that of the largest values. With it fixed, |L R - L0 R0|_F is brought down by turns: R has a
    closed form (least squares), L takes a gradient step of the length that cannot overshoot, on its support.
    The published code takes 1000 steps of Adam on both; this needs no learning rate and never gets worse.
    """
    dtype = left.dtype
    target_left, target_right = left.double(), right.double()
    keep = keep_two_of_four(target_left.abs().T.contiguous()).T
    left, right = target_left.masked_fill(~keep, 0), target_right
    for _ in range(_PRUNING_STEPS):
        right = _least_squares_right(left, target_left) @ target_right
        gram = right @ right.T
        slope = left @ gram - target_left @ (target_right @ right.T)
        steepest = torch.linalg.eigvalsh(gram)[-1]
        if steepest <= 0:  # nothing to approximate
            break
        left = (left - slope / steepest).masked_fill(~keep, 0)
    right = _least_squares_right(left, target_left) @ target_right
    return left.to(dtype), right.to(dtype)


def _least_squares_right(left: Tensor, target_left: Tensor) -> Tensor:
    """X (r, r) with the least |left X - target_left|, so that X R0 is the best right adapter."""
    gram = left.T @ left
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    return torch.linalg.solve(gram, left.T @ target_left)


def adapter_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """(L R)^T (N, K), the weight that the adapters stand for."""
    with full_precision():
        return right.to(dtype).T @ left.to(dtype).T
