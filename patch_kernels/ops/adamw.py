"""AdamW in place on fp32 or bf16 parameters, with moments in fp32, bf16 or 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patch_kernels.checks import kind_of, require_number, require_parts, require_tensor

_ops = torch.ops.patch_kernels
SCALE_BLOCK = 256  # values of an 8-bit moment that share a scale
PARAM_DTYPES = (torch.float32, torch.bfloat16)
_MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


def scale_shape(param: Tensor) -> tuple[int]:
    """Shape of the scales of a parameter's 8-bit moment."""
    return (-(-param.numel() // SCALE_BLOCK),)


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None,
    grad_scale: Tensor | None = None,
    seed: int = 0,
    stream: int = 0,
) -> None:
    """One step of AdamW in one pass and in place: param and moments are written, nothing of their size is allocated.

    step, lr and what follows from them are numbers of the call: a captured CUDA graph would replay one step's, so
    do not capture it.

    g = grad_scale * grad;  m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g * g
    param = (1 - lr * weight_decay) * param - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
    where the root is of at least 2^-100: 1e-15 beside eps, and no division by 0 without it.

    param       fp32 or bf16, any shape, contiguous (on a GPU at a multiple of 16 bytes, as the moments); grad like it.
    exp_avg, exp_avg_sq   m and v of param's shape, both fp32, bf16 or uint8; zeros before the first step.
    exp_avg_scale, exp_avg_sq_scale   with uint8 moments: fp32 (ceil(elements / 256),), zeros before the first step. A
                value is its code times its block's scale, a power of two. m has 1 + 4 + 3 bits of sign, exponent and
                mantissa, v 5 + 3; a positive v never becomes 0. Infinity or NaN makes its whole block NaN.
    step        number of this step, from 1.
    grad_scale  fp32 with one element on param's device, or None; for clipping without another pass.
    seed, stream   of the stochastic rounding of what is stored below fp32; give each parameter its own stream. The
                random bits are a function of (seed, stream, step, element) alone: the result depends neither on
                threads, device nor on earlier calls. Arithmetic is fp32 everywhere. Those of v are m's of the
                neighbouring element, so that both moments share a call of the generator.
    raises      ValueError naming the argument, what was expected and what came.
    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), as torch.optim.AdamW; 8-bit blocks after Dettmers et al.
    2022 (arXiv 2110.02861), with other codes.
    """
    moments = (("exp_avg", exp_avg, exp_avg_scale), ("exp_avg_sq", exp_avg_sq, exp_avg_sq_scale))
    _check_tensors(param, grad, moments, grad_scale)
    require_number("adamw_step, step", step, ge=1, lt=1 << 32, advice="Count steps from 1.", integer=True)
    require_number("adamw_step, seed", seed, ge=-(1 << 63), lt=1 << 63, advice="It has 64 bits.", integer=True)
    require_number("adamw_step, stream", stream, ge=0, lt=1 << 30, advice="Count parameters from 0.", integer=True)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        require_number(f"adamw_step, {name}", value, ge=0, advice="Usual are lr=1e-3, eps=1e-8 and weight_decay=0.")
    require_parts("adamw_step, betas", betas, "beta1", "beta2", advice="Usual are (0.9, 0.95).")
    for beta in betas:
        require_number("adamw_step, betas", beta, ge=0, lt=1, advice="Usual are 0.9 and 0.95.")
    _ops.adamw_step(
        param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, grad_scale, lr, *betas, eps, weight_decay,
        step, seed, stream,
    )  # fmt: skip
    torch.autograd.graph.increment_version(param)  # so that a graph that saved the old values says so


def _check_tensors(
    param: Tensor,
    grad: Tensor,
    moments: tuple[tuple[str, Tensor, Tensor | None], ...],
    grad_scale: Tensor | None,
) -> None:
    advice = "Convert it, or use torch.optim.AdamW."
    require_tensor("adamw_step, param", param, dtypes=PARAM_DTYPES, contiguous=True, advice=advice)
    shape, device, dtype = param.shape, param.device, moments[0][1].dtype
    require_tensor("adamw_step, grad", grad, dtypes=(param.dtype,), shape=shape, device=device, advice="As param.")
    require_tensor("adamw_step, exp_avg", moments[0][1], dtypes=_MOMENT_DTYPES, advice="Start with zeros.")
    like: dict[str, Any] = {"device": device, "contiguous": True, "advice": "Start with zeros."}
    for name, moment, own_scale in moments:
        require_tensor(f"adamw_step, {name}", moment, dtypes=(dtype,), shape=shape, **like)
        if dtype == torch.uint8:
            sizes = scale_shape(param)
            require_tensor(f"adamw_step, {name}_scale", own_scale, dtypes=(torch.float32,), shape=sizes, **like)
        elif own_scale is not None:
            got = f"expected None with moments in {dtype}, got {kind_of(own_scale)}. Scales belong to uint8 moments."
            raise ValueError(f"adamw_step, {name}_scale: {got}")
    if grad_scale is not None:
        what, advice = "adamw_step, grad_scale", "It is one number."
        require_tensor(what, grad_scale.reshape(-1), dtypes=(torch.float32,), shape=(1,), device=device, advice=advice)


torch.library.register_fake("patch_kernels::adamw_step", lambda *_: None)
