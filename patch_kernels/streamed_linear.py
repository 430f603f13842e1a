"""StreamedLinear: an ordinary linear layer, read at the memory's speed for a few tokens on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from patch_kernels.ops.dense_linear import MOST_TOKENS, _dense_linear
from patch_kernels.ops.tile_linear import needs_grad
from patch_kernels.packed_dtype import BY_TORCH


class StreamedLinear(nn.Linear):
    """nn.Linear that hands up to 8 tokens of a 16-bit weight on a CPU to ops.dense_linear.

    What of_linear makes is the same module with the same parameters, tied ones included: only its class changes, so
    names, hooks and saved files stay. Calls with gradients, under autocast, of other devices and dtypes are nn.Linear's
    own.
    """

    @staticmethod
    def of_linear(linear: nn.Linear) -> None:
        """Make a layer of exactly the class nn.Linear one of this class, in place."""
        if type(linear) is not nn.Linear:
            raise ValueError(f"StreamedLinear: expected an nn.Linear, got {type(linear).__name__}. Leave it as it is.")
        linear.__class__ = StreamedLinear

    @staticmethod
    def to_linear(linear: nn.Linear) -> None:
        """Undo of_linear, in place; other layers stay as they are."""
        if type(linear) is StreamedLinear:
            linear.__class__ = nn.Linear  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if (
            weight.dtype in BY_TORCH
            and x.dtype == weight.dtype
            and x.device.type == weight.device.type == "cpu"
            and 0 < x.numel() <= MOST_TOKENS * self.in_features
            and x.shape[-1:] == weight.shape[1:]
            and x.layout == torch.strided
            and (bias is None or bias.dtype == weight.dtype)
            and not (torch.is_grad_enabled() and (needs_grad(x, bias) or weight.requires_grad))
            and not torch.is_autocast_enabled("cpu")
            and forward_ad._current_level < 0
        ):
            return _dense_linear(x, weight, bias)
        return nn.functional.linear(x, weight, bias)
