"""nn.Linear with a low-rank adapter beside the weight, and the layers of a model that have one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patch.models.keep_masks import set_keep_mask
from patch.models.structure import linear_at

ADAPTER_DTYPE = torch.bfloat16
ADAPTER_KEYS = (".lora_left", ".lora_right")


class AdaptedLinear(nn.Linear):
    """nn.Linear with a low-rank adapter beside the weight: y = x W^T + bias + (x L) R.

    lora_left   L (in_features, rank) bf16
    lora_right  R (rank, out_features) bf16
    Both are saved with the state dict. They are stored in bf16 and computed with in the dtype of x.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
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
        keep = getattr(linear, "keep_mask", None)
        if isinstance(keep, Tensor):
            set_keep_mask(adapted, keep)
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
        where = f"{next(iter(adapted))}: expected a layer without adapters, {len(adapted)} layers have some"
        raise ValueError(f"{where}. Model folders cannot hold them, keep the artifact or compress without lora_rank.")


def attach_adapter(model: nn.Module, name: str, rank: int) -> AdaptedLinear:
    """Put a layer with an adapter of zeros in the place of the layer `name`."""
    adapted = AdaptedLinear.from_linear(linear_at(model, name), rank)
    model.set_submodule(name, adapted)
    return adapted
