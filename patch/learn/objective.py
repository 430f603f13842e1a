"""Terms of the objective: density of the masks, the share of the weights' norm that they keep, and the divergence from
the dense model's predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from patch.learn.masked_linear import MaskedLayers


def density(masks: Iterable[Tensor] | Mapping[str, Tensor]) -> Tensor:
    """Share of nonzeros of all masks together, sum over everything / number of everything.

    masks   float (soft, differentiable) or bool masks of any shapes, or a mapping to them.
    returns float64 scalar: a 16-bit sum would be off by up to 0.4 %.
    raises  ValueError when there is no mask.
    """
    masks = _as_list("density", masks)
    total = sum(mask.sum(dtype=torch.int64 if mask.dtype == torch.bool else torch.float64) for mask in masks)
    return torch.as_tensor(total).double() / sum(mask.numel() for mask in masks)


def weight_norm_ratio(
    masks: Iterable[Tensor] | Mapping[str, Tensor],
    weights: Iterable[Tensor] | Mapping[str, Tensor],
    squared: bool = False,
) -> Tensor:
    """How much of the weights' norm the masks keep: sum_l ||M*W||_F / sum_l ||W||_F, float64 scalar.

    masks, weights  matching lists (or mappings in the same order); gradients flow to the masks, not to the
                    weights.
    squared         use squared norms in numerator and denominator (the paper's equation; the published
                    numbers come from the unsquared form).
    raises          ValueError for different numbers or shapes.
    """
    masks, weights = _as_list("weight_norm_ratio", masks), _as_list("weight_norm_ratio", weights)
    if len(masks) != len(weights) or any(m.shape != w.shape for m, w in zip(masks, weights, strict=True)):
        got = " and ".join(str([tuple(t.shape) for t in tensors[:3]]) for tensors in (masks, weights))
        counts = f"{len(masks)} masks and {len(weights)} weights with {got}"
        raise ValueError(f"weight_norm_ratio: expected one weight per mask and equal shapes, got {counts}. Pair them.")
    power = 2 if squared else 1
    kept = sum(_norm(_select(mask, weight)) ** power for mask, weight in zip(masks, weights, strict=True))
    return cast(Tensor, kept / sum(_norm(weight.detach()) ** power for weight in weights))


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over all positions of KL(softmax(target) || softmax(logits)), scalar in float32 (float64 for float64).

    logits, target  (..., vocabulary) of one shape; no gradient flows to target.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    student, teacher = (each.flatten(0, -2).log_softmax(-1, dtype=dtype) for each in (logits, target.detach()))
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _as_list(what: str, tensors: Iterable[Tensor] | Mapping[str, Tensor]) -> list[Tensor]:
    result = list(tensors.values() if isinstance(tensors, Mapping) else tensors)
    if not result:
        raise ValueError(f"{what}: expected at least one mask, got none; check which layers are masked")
    return result


def _select(mask: Tensor, weight: Tensor) -> Tensor:
    """mask * weight in float64, exactly 0 where the mask is 0 even if the weight there is not finite."""
    weight = weight.detach().double()
    return mask.double() * torch.where((mask == 0) & ~weight.isfinite(), 0.0, weight)


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.double())


class Objective:
    """The two regulariser terms from the layers' fused sums."""

    def __init__(self, layers: MaskedLayers) -> None:
        self.config = config = layers.config
        masked = list(layers.layers.values())
        device = masked[0].weight.device
        self.elems = torch.tensor([layer.weight.numel() for layer in masked], dtype=torch.float64, device=device)
        norms = [torch.linalg.vector_norm(layer.weight.detach(), dtype=torch.float64) for layer in masked]
        self.squared_norms = torch.stack([norm.to(device) for norm in norms]).square()
        groups = torch.tensor(layers.block_of_layer if config.layer_target else [0] * len(masked), device=device)
        # (groups, layers): sums by a product, since index_add has no fixed order on a GPU.
        self.membership = (groups == torch.arange(int(groups.max()) + 1, device=device)[:, None]).double()
        self.group_elems = self.membership @ self.elems

    def __call__(self, sums: list[Tensor], progress: float) -> tuple[Tensor, Tensor, Tensor]:
        """(penalty with gradient, density, kept share of the norm) of one micro-batch; progress = t / T."""
        config = self.config
        table = torch.stack([pair.to(self.elems.device) for pair in sums])
        penalty = table.new_zeros(())
        if config.mode != "maskllm":
            gap = (self.membership @ table[:, 0] / self.group_elems - (1.0 - config.target_sparsity)).abs()
            total = gap.mean() if config.layer_target_reduction == "mean" else gap.sum()
            penalty = penalty + config.sparse_reg * total
        if config.weight_reg > 0:
            kept, dense = self._norms(table[:, 1])
            kept = kept / dense if config.weight_reg_normalized else kept
            penalty = penalty - config.weight_reg * (1.0 - progress) * kept
        with torch.no_grad():
            density = table[:, 0].sum() / self.elems.sum()
            kept, dense = self._norms(table[:, 1])
        return penalty, density, kept / dense

    def _norms(self, kept_squares: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.weight_reg_form == "squared":
            return kept_squares.sum(), self.squared_norms.sum()
        # The clamp keeps the gradient of sqrt finite for a layer whose kept weights are all zero.
        return kept_squares.clamp_min(1e-30).sqrt().sum(), self.squared_norms.sqrt().sum()
