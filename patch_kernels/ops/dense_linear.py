"""Typed wrapper of dense_linear: an ordinary weight and a few tokens on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patch_kernels.checks import require_tensor
from patch_kernels.ops import LIBRARY_PATH  # noqa: F401  loads the library
from patch_kernels.packed_dtype import BY_TORCH

MOST_TOKENS = 8  # csrc/cpu/dense_linear.cpp
_dense_linear = torch.ops.patch_kernels.dense_linear.default


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight.T + bias on a CPU, without gradients. Where the CPU has AVX-512, up to 8 tokens take a kernel that
    reads the weight at the memory's speed; everything else is torch.nn.functional.linear.

    x        (..., K) fp16 or bf16
    weight   (N, K) of x's dtype
    bias     (N,) of x's dtype, or None; added in fp32
    returns  (..., N); sums are fp32. Row i does not depend on the number of rows up to 8
             where the weight is contiguous; another one is torch's.
    raises   ValueError for other kinds, dtypes and shapes.
    """
    advice = "Convert it, or use torch.nn.functional.linear."
    require_tensor("dense_linear, x", x, dtypes=BY_TORCH, shape=(..., "K"), advice=advice)
    like: dict[str, Any] = {"dtypes": (x.dtype,), "device": x.device}
    shape = ("N", x.shape[-1])
    require_tensor("dense_linear, weight", weight, shape=shape, advice="Convert it to the dtype of x.", **like)
    if bias is not None:
        require_tensor("dense_linear, bias", bias, shape=weight.shape[:1], advice="Pass None for none.", **like)
    return _dense_linear(x, weight, bias)


@torch.library.register_fake("patch_kernels::dense_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
