"""Mask learning as plain PyTorch writes it: every mask, noise and expanded tile at full size, kept by autograd or, with
gradient checkpointing, drawn again from the same random state.

The rival of bench_masked_weight and bench_learn_step. Source of the mathematics: PATCH (Hourri, Mozaffari, Mehri
Dehnavi 2025), section 3; MaskLLM (Fang et al. 2024).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patch.learn.config import LearnConfig
from patch.learn.masked_linear import MaskedLinear
from patch_kernels import PATTERNS
from patch_kernels.reference import expand_tiles, unpack_keep

Noise = tuple[Tensor | None, Tensor | None]  # Gumbel (groups, 6), logistic (rows, cols)


def sample_mask(
    pattern_logits: Tensor | None,
    tile_logits: Tensor | None,
    keep: Tensor | None,
    patterns: Tensor,
    shape: tuple[int, int],
    tile: tuple[int, int],
    settings: dict,
    noise: Noise | None = None,
) -> Tensor:
    """Mask (N, K) in the logits' dtype.

    keep      fixed 2:4 mask (N, K) of that dtype, where there are no pattern logits.
    patterns  PATTERNS in that dtype and on that device: made here, it would be a copy from the host each time.
    settings  the temperatures, scales and hard_* of masked_weight; noise is drawn here if None.
    """
    mask = keep
    if pattern_logits is not None:
        gumbel = -torch.empty_like(pattern_logits).exponential_().log() if noise is None else noise[0]
        scores = settings["pattern_scale"] * pattern_logits + gumbel
        probability = torch.softmax(scores / settings["pattern_temperature"], dim=1)
        if settings.get("hard_pattern"):
            one_hot = torch.zeros_like(probability).scatter_(1, probability.argmax(1, keepdim=True), 1.0)
            probability = one_hot - probability.detach() + probability
        mask = (probability @ patterns).reshape(shape)
    if tile_logits is None:
        return mask
    uniform_type = torch.promote_types(tile_logits.dtype, torch.float32)  # a 16-bit uniform is 1 too often
    logistic = torch.logit(torch.rand_like(tile_logits, dtype=uniform_type)) if noise is None else noise[1]
    scores = settings["tile_scale"] * tile_logits + logistic.to(tile_logits)
    dense = torch.sigmoid(scores / settings["tile_temperature"])
    if settings.get("hard_tile"):
        dense = (scores > 0).to(dense) - dense.detach() + dense
    dense = expand_tiles(dense, tile, shape)
    return dense + (1 - dense) * mask


class EagerLinear(nn.Module):
    """y = x @ (weight * mask).T; the mask is drawn in forward, so that checkpointing draws it again and keeps none.

    sums    mask sum and norm of the masked weight, as far as the penalty needs them, of the first forward since
            EagerMasks.forget: a recomputation must make its own, but no penalty uses them.
    """

    def __init__(self, layer: MaskedLinear, index: int, masks: EagerMasks) -> None:
        super().__init__()
        self.weight, self.bias, self.tile = layer.weight, layer.bias, layer.tile
        dtype = layer.weight.dtype
        for name in ("pattern_logits", "tile_logits"):
            logits = getattr(layer, name)
            setattr(self, name, None if logits is None else nn.Parameter(logits.detach().to(dtype, copy=True)))
        fixed = layer.fixed_pattern
        self.keep = None if fixed is None else unpack_keep(fixed, layer.shape).to(dtype)
        self.index, self.masks = index, masks
        self.sums: tuple[Tensor | None, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        masks, config = self.masks, self.masks.config
        mask = sample_mask(
            self.pattern_logits,
            self.tile_logits,
            self.keep,
            masks.patterns,
            tuple(self.weight.shape),
            self.tile,
            masks.settings,
            None if masks.noise is None else masks.noise(self.index),
        )
        masked = mask * self.weight
        kept = mask.sum(dtype=masks.sum_dtype) if config.mode != "maskllm" else None
        norm = torch.linalg.vector_norm(masked, dtype=masks.sum_dtype) if config.weight_reg > 0 else None
        if self.sums is None:
            self.sums = kept, norm
        return F.linear(x, masked, self.bias)


class EagerMasks:
    """EagerLinear in the place of every MaskedLinear of a model, with the same start.

    The logits have the weights' dtype. `noise(layer index)` gives the noise instead of torch's generator.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, MaskedLinear],
        config: LearnConfig,
        noise: Callable[[int], Noise] | None = None,
    ) -> None:
        self.config, self.noise = config, noise
        self.layers = {name: EagerLinear(layer, index, self) for index, (name, layer) in enumerate(layers.items())}
        for name, layer in self.layers.items():
            model.set_submodule(name, layer)
        self.settings: dict = {}  # temperatures, scales and hard_* of the optimiser step
        weights = [layer.weight for layer in self.layers.values()]
        self.patterns = PATTERNS.to(weights[0])
        self.elems = sum(weight.numel() for weight in weights)
        self.sum_dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
        self.dense_norms = [self._power(torch.linalg.vector_norm(w, dtype=self.sum_dtype)) for w in weights]

    def parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in (layer.pattern_logits, layer.tile_logits) if p is not None]

    def _power(self, norm: Tensor) -> Tensor:
        return norm.square() if self.config.weight_reg_form == "squared" else norm

    def penalty(self, progress: float) -> Tensor:
        """Both regulariser terms of the forward pass since `forget`."""
        config = self.config
        kept, norms = zip(*(layer.sums for layer in self.layers.values()), strict=True)
        total = torch.zeros((), dtype=self.sum_dtype, device=self.dense_norms[0].device)
        if config.mode != "maskllm":
            total = total + config.sparse_reg * (sum(kept) / self.elems - (1 - config.target_sparsity)).abs()
        if config.weight_reg > 0:
            share = sum(self._power(norm) for norm in norms)
            share = share / sum(self.dense_norms) if config.weight_reg_normalized else share
            total = total - config.weight_reg * (1 - progress) * share
        return total

    def forget(self) -> None:
        """Drop the sums, and with them what autograd keeps; before the next forward pass."""
        for layer in self.layers.values():
            layer.sums = None


def shared_copy(model: nn.Module) -> nn.Module:
    """The model again on the same storage: own modules and own, frozen Parameters, no memory for weights."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)
