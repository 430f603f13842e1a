"""AdamW in place on fp32 or bf16 parameters, with moments in fp32, bf16 or 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.patch_kernels
SCALE_BLOCK = 256  # values of an 8-bit moment that share a scale
_PARAM_DTYPES = (torch.float32, torch.bfloat16)
_MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
_MAX_UINT32 = (1 << 32) - 1


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

    param       fp32 or bf16, any shape, contiguous (on a GPU at a multiple of 16 bytes, as the moments); grad like it.
    exp_avg, exp_avg_sq   m and v of param's shape, both fp32, bf16 or uint8; zeros before the first step.
    exp_avg_scale, exp_avg_sq_scale   with uint8 moments: fp32 (ceil(elements / 256),), zeros before the first step. A
                value is its code times its block's scale, a power of two. m has 1 + 4 + 3 bits of sign, exponent and
                mantissa, v 5 + 3; a positive v never becomes 0. Infinity or NaN makes its whole block NaN.
    step        number of this step, from 1.
    grad_scale  fp32 with one element on param's device, or None; for clipping without another pass.
    seed, stream   of the stochastic rounding of what is stored below fp32; give each parameter its own stream. The
                random bits are a function of (seed, stream, step, element) alone: the result depends neither on
                threads, device nor on earlier calls. Arithmetic is fp32 everywhere.
    raises      ValueError naming the argument, what was expected and what came.
    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), as torch.optim.AdamW; 8-bit blocks after Dettmers et al.
    2022 (arXiv 2110.02861), with other codes.
    """
    _check_tensors(param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, grad_scale)
    if not (1 <= step <= _MAX_UINT32 and -(1 << 63) <= seed < 1 << 63 and 0 <= stream < 1 << 30):
        raise ValueError(
            "adamw_step: expected a step in [1, 2^32), a 64-bit seed and a stream in [0, 2^30), got "
            f"step={step}, seed={seed}, stream={stream}. Count steps from 1 and parameters from 0."
        )
    if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(
            "adamw_step: expected lr, eps and weight_decay >= 0 and betas in [0, 1), got "
            f"lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={tuple(betas)}. Usual are eps=1e-8 and "
            "betas=(0.9, 0.95)."
        )
    _ops.adamw_step(
        param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, grad_scale, lr, *betas, eps, weight_decay,
        step, seed, stream,
    )  # fmt: skip
    torch.autograd.graph.increment_version(param)  # so that a graph that saved the old values says so


def _check_tensors(param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, grad_scale) -> None:
    if param.dtype not in _PARAM_DTYPES or not param.is_contiguous():
        raise ValueError(
            f"adamw_step: expected a contiguous param in float32 or bfloat16, got {param.dtype} "
            f"{tuple(param.shape)} with strides {param.stride()}. Convert it, or use torch.optim.AdamW."
        )
    if exp_avg.dtype not in _MOMENT_DTYPES:
        raise ValueError(
            f"adamw_step: expected exp_avg in float32, bfloat16 or uint8, got {exp_avg.dtype}. Start with zeros."
        )
    scale = (scale_shape(param), torch.float32) if exp_avg.dtype == torch.uint8 else None
    expected = {
        "grad": (grad, (tuple(param.shape), param.dtype)),
        "exp_avg": (exp_avg, (tuple(param.shape), exp_avg.dtype)),
        "exp_avg_sq": (exp_avg_sq, (tuple(param.shape), exp_avg.dtype)),
        "exp_avg_scale": (exp_avg_scale, scale),
        "exp_avg_sq_scale": (exp_avg_sq_scale, scale),
    }
    if grad_scale is not None:
        expected["grad_scale"] = (grad_scale.reshape(-1), ((1,), torch.float32))
    for name, (tensor, wanted) in expected.items():
        got = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
        if got != wanted:
            raise ValueError(
                f"adamw_step: expected {name} as {_described(wanted)} for a param {tuple(param.shape)} with moments in "
                f"{exp_avg.dtype}, got {_described(got)}. Scales belong to uint8 moments."
            )
        if tensor is not None and tensor.device != param.device:
            raise ValueError(f"adamw_step: expected {name} on {param.device} like param, got {tensor.device}. Move it.")
        if tensor is not None and name.startswith("exp_avg") and not tensor.is_contiguous():
            raise ValueError(
                f"adamw_step: expected a contiguous {name}, got strides {tensor.stride()}. It is written in place."
            )


def _described(shape_and_dtype) -> str:
    return "None" if shape_and_dtype is None else f"{shape_and_dtype[1]} {shape_and_dtype[0]}"


torch.library.register_fake("patch_kernels::adamw_step", lambda *_: None)
