"""Low-rank adapters for what compression took away: y = x W_C^T + (x L) R.

SLiM-LoRA takes the best approximation of the error in the norm that the layer's inputs weigh: with
x = sqrt(input energy), U S V^T = svd((W - W_C) diag(x)), L = diag(1/x) V S and R = U^T. With x = 1 this is the
naive one. Source: SLiM (Mozaffari, Yazdanbakhsh, Mehri Dehnavi 2025), section on SLiM-LoRA.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patch.models import set_keep_mask
from patch.pruning.hessian import full_precision
from patch.pruning.selection import keep_two_of_four
from patch.slim.options import CompressOptions
from patch.slim.quantize import quantize_weight

ADAPTER_DTYPE = torch.bfloat16
ADAPTER_KEYS = (".lora_left", ".lora_right")
_PRUNING_STEPS = 100
# Share of the mean diagonal that keeps the systems of pruned adapters regular (rank padding is all zeros).
_RIDGE = 1e-10


class AdaptedLinear(nn.Linear):
    """nn.Linear with a low-rank adapter beside the weight: y = x W^T + bias + (x L) R.

    lora_left   L (in_features, rank) bf16
    lora_right  R (rank, out_features) bf16
    Both are saved with the state dict. They are stored in bf16 and computed with in the dtype of x.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.rank = rank
        self.lora_left = nn.Parameter(torch.zeros(in_features, rank, dtype=ADAPTER_DTYPE, device=device))
        self.lora_right = nn.Parameter(torch.zeros(rank, out_features, dtype=ADAPTER_DTYPE, device=device))

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int) -> AdaptedLinear:
        """The layer with an adapter of zeros; weight, bias and keep mask are shared, not copied."""
        # On meta: a weight that is replaced at once is neither allocated nor drawn from the random generator.
        adapted = cls(linear.in_features, linear.out_features, rank, False, "meta", linear.weight.dtype)
        adapted.weight, adapted.bias = linear.weight, linear.bias
        for side in ("lora_left", "lora_right"):
            zeros = torch.zeros_like(getattr(adapted, side), device=linear.weight.device)
            setattr(adapted, side, nn.Parameter(zeros))
        adapted.train(linear.training)
        if isinstance(getattr(linear, "keep_mask", None), Tensor):
            set_keep_mask(adapted, linear.keep_mask)
        return adapted

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x @ self.lora_left.to(x.dtype)) @ self.lora_right.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers of a model that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters, for formats that hold weights only and would leave them out."""
    if adapted := adapted_layers(model):
        raise ValueError(
            f"{next(iter(adapted))}: expected a layer without adapters, {len(adapted)} layers have some and model "
            "folders do not hold them. Keep the artifact, or compress without lora_rank."
        )


def attach_adapter(model: nn.Module, name: str, rank: int) -> AdaptedLinear:
    """Put a layer with an adapter of zeros in the place of the layer `name`."""
    adapted = AdaptedLinear.from_linear(model.get_submodule(name), rank)
    model.set_submodule(name, adapted)
    return adapted


@torch.no_grad()
def make_adapter(error: Tensor, options: CompressOptions, energy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Adapters for an error W - W_C (N, K), fp32 or fp64: L (K, rank) and R (rank, N), both bf16.

    energy  (K,) of the inputs, needed by slim_lora. An input that was always zero costs nothing, so its row
            of L is zero. (The published code gives up on x for the whole layer then, unless
            shift_zero_metrics lifts the zeros.)
    """
    rank = options.rank(tuple(error.shape))
    x = energy.to(error.dtype).sqrt() if options.slim_lora else torch.ones_like(error[0])
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
