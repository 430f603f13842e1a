"""The ops of mask learning: a frozen weight under a sampled PATCH mask, alone and inside a linear layer.

Backward recomputes everything from the inputs and a counter-based random stream: nothing of the size of the logits, of
the mask or of the masked weight is kept between forward and backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from patch_kernels.checks import (
    FLOATS,
    kind_of,
    require_multiple,
    require_number,
    require_parts,
    require_sizes,
    require_tensor,
)
from patch_kernels.ops.tile_linear import tile_grid
from patch_kernels.reference import TILE

_ops = torch.ops.patch_kernels


class MaskSampling(NamedTuple):
    """What a mask depends on beside weight and logits, as tensors on the weight's device; made by mask_sampling.

    Tensors, so that torch.compile does not recompile when a schedule moves on, and a CUDA graph reads what was copied
    into them before its replay.
    """

    factors: Tensor  # (4,) float64: 1/temperature and scale/temperature of the patterns, the same of the tiles
    key: Tensor | None  # (2,) int64: seed and draw of the noise; None for no noise


def mask_sampling(
    *,
    pattern_temperature: float = 1.0,
    pattern_scale: float = 1.0,
    tile_temperature: float = 1.0,
    tile_scale: float = 1.0,
    noise: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
) -> MaskSampling:
    """Temperatures, logit scales and noise for masked_weight and masked_linear; one serves all layers of a step.

    noise   (seed, draw), a 64-bit seed and a draw in [0, 2^32); None for none.
    returns tensors on `device`; copying them there does not wait for it.
    raises  ValueError for a temperature that is not positive, a value that is not finite, a draw out of range.
    """
    values = {
        "pattern_temperature": pattern_temperature,
        "tile_temperature": tile_temperature,
        "pattern_scale": pattern_scale,
        "tile_scale": tile_scale,
    }
    for name, value in values.items():
        least = 0 if name.endswith("temperature") else None
        require_number(f"masked_weight, {name}", value, gt=least, advice="Schedules of a temperature end above 0.")
    if noise is not None:
        require_parts("mask_sampling, noise", noise, "seed", "draw")
        what, advice = "masked_weight, seed of noise", "It has 64 bits."
        require_number(what, noise[0], ge=-(1 << 63), lt=1 << 63, advice=advice, integer=True)
        what, advice = "masked_weight, draw of noise", "Count draws from 0."
        require_number(what, noise[1], ge=0, lt=1 << 32, advice=advice, integer=True)
    factors = torch.tensor(
        [
            1 / pattern_temperature,
            pattern_scale / pattern_temperature,
            1 / tile_temperature,
            tile_scale / tile_temperature,
        ],
        dtype=torch.float64,
    )
    key = None if noise is None else torch.tensor(noise, dtype=torch.int64)
    return MaskSampling(
        factors.to(device, non_blocking=True), None if key is None else key.to(device, non_blocking=True)
    )


def masked_weight(
    weight: Tensor,
    pattern_logits: Tensor | None,
    tile_logits: Tensor | None,
    *,
    tile: tuple[int, int] = (TILE, TILE),
    pattern_temperature: float = 1.0,
    pattern_scale: float = 1.0,
    tile_temperature: float = 1.0,
    tile_scale: float = 1.0,
    hard_pattern: bool = False,
    hard_tile: bool = False,
    fixed_pattern: Tensor | None = None,
    noise: tuple[int, int, int] | None = None,
    sampling: MaskSampling | None = None,
    layer: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sample a PATCH mask, apply it to a frozen weight, and sum what the regularisers need, in one pass.

    p = softmax((pattern_scale * pattern_logits + Gumbel) / pattern_temperature)      per group, six patterns
    d = sigmoid((tile_scale * tile_logits + logistic) / tile_temperature)             per tile, share of "dense"
    mask = d + (1 - d) * (p @ PATTERNS)          masked = mask * weight

    weight          (N, K) fp16, bf16, fp32 or fp64, K a multiple of 4; gets no gradient.
    pattern_logits  (N*K/4, 6) fp32 or bf16 (fp64 with an fp64 weight), or None with fixed_pattern.
    tile_logits     (ceil(N/tile[0]), ceil(K/tile[1])) fp32 (fp64), or None: every tile is sparse (MaskLLM).
    fixed_pattern   pack_keep(keep) of a fixed mask (PATCH-Tile), instead of pattern_logits.
    hard_pattern, hard_tile   forward value is the likeliest choice, gradient that of the soft one (straight-through).
    noise           (seed, layer, draw): Philox noise that is a function of these alone, so recomputation, resuming and
                    any sharding see the same mask; None for no noise.
    sampling        mask_sampling(...) with `layer`, instead of the temperatures, scales and noise: for a compiled or
                    captured step, and to make the tensors once for all layers. Without it the numbers are copied from
                    the host, which a CUDA graph cannot capture, and torch.compile compiles again for new ones.
    returns         masked, like weight; sums (2,) fp64: sum of the mask, and sum of masked**2. Both are differentiable.
                    Backward recomputes everything; nothing of the logits' size is kept.
    raises          ValueError naming the argument, what was expected and what came.
    Source: PATCH (arXiv 2509.23410) section 3; Gumbel-softmax, Jang et al. 2017; MaskLLM, Fang et al. 2024.
    """
    numbers = {
        "pattern_temperature": pattern_temperature,
        "pattern_scale": pattern_scale,
        "tile_temperature": tile_temperature,
        "tile_scale": tile_scale,
    }
    if sampling is None:
        if layer != 0:
            advice = "Pass sampling, or noise=(seed, layer, draw)."
            raise ValueError(f"masked_weight: expected layer with sampling, got layer={layer} alone. {advice}")
        if noise is not None:
            require_parts("masked_weight, noise", noise, "seed", "layer", "draw")
        layer = 0 if noise is None else noise[1]
        drawn = None if noise is None else (noise[0], noise[2])
        sampling = mask_sampling(**numbers, noise=drawn, device=weight.device)
    elif noise is not None or any(value != 1.0 for value in numbers.values()):
        given = [name for name, value in numbers.items() if value != 1.0] + ["noise"] * (noise is not None)
        what = "masked_weight: expected sampling without the numbers that it holds"
        raise ValueError(f"{what}, got {', '.join(given)} too. Pass them to mask_sampling.")
    _check_masked_weight(weight, pattern_logits, tile_logits, fixed_pattern, tile, sampling, layer)
    return _ops.masked_weight(
        weight, pattern_logits, fixed_pattern, tile_logits, *sampling, *tile, hard_pattern, hard_tile, layer
    )


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern_logits: Tensor | None,
    tile_logits: Tensor | None,
    sampling: MaskSampling,
    *,
    layer: int,
    tile: tuple[int, int] = (TILE, TILE),
    hard_pattern: bool = False,
    hard_tile: bool = False,
    fixed_pattern: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x @ masked.T + bias, sums) with masked, sums = masked_weight(weight, ...); the arguments are explained there.

    The masked weight lives during the matrix product only. Backward computes its gradient, and from that in one pass
    the logits' gradients and the masked weight again, for x's gradient.

    x        (..., K) of weight's dtype; gets a gradient where it requires one, as does bias. weight is frozen.
    returns  y (..., N) in weight's dtype and sums (2,) fp64, both differentiable.
    raises   ValueError as masked_weight, for an x of another dtype or width, and under autocast.
    """
    _check_masked_weight(weight, pattern_logits, tile_logits, fixed_pattern, tile, sampling, layer)
    kind = weight.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if x.dtype != weight.dtype or x.shape[-1:] != weight.shape[1:] or autocast:
        got = f"{kind_of(x)}{' under autocast' if autocast else ''}"
        wanted = f"{weight.dtype} (..., {weight.shape[1]}) like the weight"
        raise ValueError(f"masked_linear, x: expected {wanted}, got {got}. Convert x; autocast is not supported.")
    return _MaskedLinear.apply(
        x,
        weight,
        bias,
        pattern_logits,
        fixed_pattern,
        tile_logits,
        *sampling,
        (*tile, hard_pattern, hard_tile, layer),
    )


class _MaskedLinear(torch.autograd.Function):
    """Saves x and the inputs of the mask, never the masked weight."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pattern_logits: Tensor | None,
        fixed_pattern: Tensor | None,
        tile_logits: Tensor | None,
        factors: Tensor,
        key: Tensor | None,
        constants: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        masked, sums = _ops.masked_weight(weight, pattern_logits, fixed_pattern, tile_logits, factors, key, *constants)
        return functional.linear(x, masked, bias), sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, *mask_inputs, ctx.constants = inputs
        ctx.save_for_backward(x, weight, *mask_inputs)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, pattern_logits, fixed_pattern, tile_logits, factors, key = ctx.saved_tensors
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        grad_rows = grad_y.reshape(-1, weight.shape[0])
        grad_masked = grad_rows.T @ x.reshape(-1, weight.shape[1])
        grad_pattern, grad_tile, masked = _ops.masked_weight_backward(
            grad_masked, grad_sums, weight, pattern_logits, fixed_pattern, tile_logits, factors, key,
            *ctx.constants, needs_x,
        )  # fmt: skip
        del grad_masked
        return (
            grad_y @ masked if needs_x else None,
            None,
            grad_rows.sum(0) if needs_bias else None,
            None if pattern_logits is None else grad_pattern,
            None,
            None if tile_logits is None else grad_tile,
            None,
            None,
            None,
        )


def _check_masked_weight(
    weight: Tensor,
    pattern_logits: Tensor | None,
    tile_logits: Tensor | None,
    fixed_pattern: Tensor | None,
    tile: tuple[int, int],
    sampling: MaskSampling,
    layer: int,
) -> None:
    advice = "Exclude this layer from masking."
    require_tensor("masked_weight, weight", weight, dtypes=FLOATS, shape=("N", "K"), advice=advice)
    require_multiple("masked_weight, columns of weight", weight.shape[1], 4, advice)
    require_sizes("masked_weight, tile (rows, columns)", tile, "Use (128, 128).")
    require_multiple("masked_weight, columns of tile", tile[1], 4, "A group of four may not cross tiles.")
    require_number("masked_weight, layer", layer, ge=0, lt=1 << 31, advice="Count layers from 0.", integer=True)
    if (pattern_logits is None) == (fixed_pattern is None):
        got = "neither" if pattern_logits is None else "both"
        raise ValueError(f"masked_weight: expected pattern_logits or fixed_pattern, got {got}. Learn or fix it.")
    groups = weight.shape[0] * weight.shape[1] // 4
    real = (torch.float64,) if weight.dtype == torch.float64 else (torch.float32,)
    learned = real if weight.dtype == torch.float64 else (torch.float32, torch.bfloat16)
    expected = (
        ("pattern_logits", pattern_logits, (groups, 6), learned),
        ("fixed_pattern", fixed_pattern, ((groups + 1) // 2,), (torch.uint8,)),
        ("tile_logits", tile_logits, tile_grid(tuple(weight.shape), tile), real),
        ("sampling.factors", sampling.factors, (4,), (torch.float64,)),
        ("sampling.key", sampling.key, (2,), (torch.int64,)),
    )
    advice = "Make it for this weight and tile, on the weight's device."
    for name, tensor, shape, dtypes in expected:
        if tensor is not None:
            what = f"masked_weight, {name}"
            require_tensor(what, tensor, dtypes=dtypes, shape=shape, device=weight.device, advice=advice)


def _fake_backward(
    grad_masked: Tensor,
    grad_sums: Tensor,
    weight: Tensor,
    pattern_logits: Tensor | None,
    fixed_pattern: Tensor | None,
    tile_logits: Tensor | None,
    factors: Tensor,
    key: Tensor | None,
    rows: int,
    cols: int,
    hard_pattern: bool,
    hard_tile: bool,
    layer: int,
    with_masked: bool,
) -> tuple[Tensor, ...]:
    real = torch.float64 if weight.dtype == torch.float64 else torch.float32
    grads = tuple(
        weight.new_empty(0, dtype=real) if logits is None else weight.new_empty(logits.shape, dtype=logits.dtype)
        for logits in (pattern_logits, tile_logits)
    )
    return *grads, weight.new_empty(weight.shape if with_masked else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.constants = (*inputs[:6], inputs[6:])
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_masked: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
    weight, pattern_logits, fixed_pattern, tile_logits, *sampling = ctx.saved_tensors
    grad_pattern, grad_tile, _ = _ops.masked_weight_backward(
        grad_masked, grad_sums, weight, pattern_logits, fixed_pattern, tile_logits, *sampling, *ctx.constants, False
    )
    return (
        None,
        None if pattern_logits is None else grad_pattern,
        None,
        None if tile_logits is None else grad_tile,
        *([None] * (2 + len(ctx.constants))),
    )


def _second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "masked_weight: expected first derivatives only, got a backward pass through its backward pass. For second "
        "derivatives use patch_kernels.reference.masked_weight."
    )


torch.library.register_fake(
    "patch_kernels::masked_weight",
    lambda weight, *_: (weight.new_empty(weight.shape), weight.new_empty(2, dtype=torch.float64)),
)
torch.library.register_fake("patch_kernels::masked_weight_backward", _fake_backward)
torch.library.register_autograd("patch_kernels::masked_weight", _backward, setup_context=_setup_context)
# Without a formula autograd would take the gradients for constants.
torch.library.register_autograd("patch_kernels::masked_weight_backward", _second_derivative)
