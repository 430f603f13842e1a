"""One op for all experts of a mixture: typed wrapper with readable errors, fake kernels, autograd.

As tile_linear, it is two ops: tile_experts has no autograd formula, because one costs time in every call, and
tile_experts_train has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from patch_kernels.checks import require_number, require_tensor
from patch_kernels.ops import tile_linear
from patch_kernels.packed_dtype import BY_TORCH

_ops = torch.ops.patch_kernels
_tile_experts = _ops.tile_experts.default
_tile_experts_train = _ops.tile_experts_train.default


def tile_experts(
    x: Tensor,
    experts: Tensor,
    payload: Tensor,
    tile_is_sparse: Tensor,
    out_features: int,
    parts: int = 1,
    bias: Tensor | None = None,
    schedule: Tensor | None = None,
    begins: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Rows of x, each times the packed weights of the experts that it is sent to: all of them in one call.

    Row p of y is x[p // fan] @ weight[experts[p]].T + bias[experts[p]], where fan = P / T: top_k where rows of x are
    tokens, in the order of the router's (T, top_k) choices, and 1 where every row has one expert.

    x               (T, K) of the packed dtype (fp16 or bf16); T may be 0, strides are free
    experts         (P,) int64 of 0 to E - 1, P a multiple of T, on x's device
    payload         1-D uint8: E * parts matrices (N, K), each as pack_tiles writes it, one after another; matrix
                    e * parts + q is part q of expert e. K and dtype are not in there: TiledExperts knows both.
    tile_is_sparse  (E * parts, ceil(N/128), ceil(K/128)) uint8 of 0 and 1, contiguous
    out_features    N, of a part
    bias            (E, parts * N) of x's dtype, or None; added in fp32
    schedule        (E * parts, words) int32, make_schedule of each matrix; begins (E * parts + 1,) int64 on the CPU,
                    the byte of the payload at which each matrix begins and where the last one ends. Both are for GPUs.
    batch_invariant row p of y does not depend on the other rows, bit for bit, as in tile_linear
    returns         (P, parts * N) in x's dtype. On a CPU the bits that tile_linear gives for the rows of an expert
                    together; on a GPU the sums are split as a launch for several experts is
    raises          ValueError for what Python sees, RuntimeError for experts that there are not, for packed weights
                    of sizes that do not fit, and for a CUDA stream that is captured

    Gradients reach x and bias; the weights are frozen. On a GPU a call waits for `experts`, so it is refused while a
    CUDA graph is captured.
    """
    advice = "Flatten leading dimensions, and convert it to the dtype of the weights."
    require_tensor("tile_experts, x", x, dtypes=BY_TORCH, advice=advice)
    if x.dim() != 2:
        raise ValueError(f"tile_experts, x: expected (T, K), got {tuple(x.shape)}. {advice}")
    require_tensor("tile_experts, experts", experts, dtypes=(torch.int64,), advice="Convert the router's choices.")
    if experts.dim() != 1:
        raise ValueError(
            f"tile_experts, experts: expected (P,), got {tuple(experts.shape)}. Flatten (T, top_k) choices."
        )
    require_number("tile_experts, parts", parts, ge=1, integer=True, advice="Use 2 for gate and up, else 1.")
    # The op says it where a compiler has no sizes yet.
    if not is_compiling() and (experts.shape[0] % x.shape[0] if x.shape[0] else experts.shape[0]):
        raise ValueError(
            f"tile_experts, experts: expected a multiple of the {x.shape[0]} rows of x, got {experts.shape[0]}. "
            "Pass as many experts for every row."
        )
    if forward_ad._current_level >= 0:
        tile_linear.refuse_forward_mode("tile_experts", x)
    has_grad = is_grad_enabled() and tile_linear.needs_grad(x, bias)
    op = _tile_experts_train if has_grad else _tile_experts
    args = (experts, payload, tile_is_sparse, schedule, begins, out_features, parts, bias, batch_invariant)
    if x.is_cuda and schedule is not None and not is_compiling():
        return tile_linear.call_on_card(op, x, *args)
    return op(x, *args)


def matrix_begins(tile_is_sparse: Tensor) -> Tensor:
    """Byte of the payload at which each matrix begins, and its end: (matrices + 1,) int64 on the CPU.

    tile_is_sparse  (matrices, R, C) of 0 and 1, on any device
    """
    flags = tile_is_sparse.cpu().long()
    sparse, tiles = flags.sum((1, 2)), flags.shape[1] * flags.shape[2]
    sizes = tiles * tile_linear.DENSE_TILE_BYTES - sparse * (
        tile_linear.DENSE_TILE_BYTES - tile_linear.SPARSE_TILE_BYTES
    )
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def make_schedules(tile_is_sparse: Tensor) -> Tensor:
    """make_schedule of every matrix: (matrices, words) int32 on the device of the flags (matrices, R, C)."""
    flags = tile_is_sparse.cpu()
    return torch.stack([tile_linear.make_schedule(matrix) for matrix in flags]).to(tile_is_sparse.device)


def _fake_experts(
    x: Tensor,
    experts: Tensor,
    payload: Tensor,
    tile_is_sparse: Tensor,
    schedule: Tensor | None,
    begins: Tensor | None,
    out_features: int,
    parts: int,
    bias: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    return x.new_empty((experts.shape[0], parts * out_features))


@torch.library.custom_op(
    "patch_kernels::tile_experts_grad_x",
    mutates_args=(),
    schema="(Tensor grad, Tensor experts, Tensor payload, Tensor tile_is_sparse, int tokens, int in_features, "
    "int parts) -> Tensor",
)
def _grad_x(
    grad: Tensor,
    experts: Tensor,
    payload: Tensor,
    tile_is_sparse: Tensor,
    tokens: int,
    in_features: int,
    parts: int,
) -> Tensor:
    """An op of its own: which experts were hit is known where there are values, so no compiler can trace it."""
    if tokens == 0:
        return grad.new_zeros((0, in_features))
    begins, rows = matrix_begins(tile_is_sparse).tolist(), grad.shape[1] // parts
    grads = grad.new_empty((experts.shape[0], in_features))  # of each row of y
    for expert in experts.unique().tolist():
        weights = [
            _ops.unpack_tiles(
                payload[begins[i] : begins[i + 1]], tile_is_sparse[i], None, rows, in_features, grad.dtype
            )
            for i in range(expert * parts, (expert + 1) * parts)
        ]
        at = (experts == expert).nonzero()[:, 0]
        grads[at] = grad[at] @ torch.cat(weights)
    return grads.view(tokens, -1, in_features).sum(1)


@_grad_x.register_fake
def _(
    grad: Tensor,
    experts: Tensor,
    payload: Tensor,
    tile_is_sparse: Tensor,
    tokens: int,
    in_features: int,
    parts: int,
) -> Tensor:
    return grad.new_empty((tokens, in_features))


def _setup_experts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, experts, payload, tile_is_sparse, _, _, _, parts, bias, _ = inputs
    ctx.save_for_backward(experts, payload, tile_is_sparse)
    ctx.x_shape, ctx.parts = x.shape, parts
    ctx.bias_shape = None if bias is None else bias.shape


def _backward_experts(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    experts, payload, tile_is_sparse = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _ops.tile_experts_grad_x(grad, experts, payload, tile_is_sparse, *ctx.x_shape, ctx.parts)
    if ctx.bias_shape is not None and ctx.needs_input_grad[8]:
        # In fp32: an expert adds up many rows one by one.
        sums = grad.new_zeros(ctx.bias_shape, dtype=torch.float32).index_add(0, experts, grad.float())
        grad_bias = sums.to(grad.dtype)
    return grad_x, None, None, None, None, None, None, None, grad_bias, None


for _name in ("tile_experts", "tile_experts_train"):
    torch.library.register_fake(f"patch_kernels::{_name}", _fake_experts)
torch.library.register_autograd("patch_kernels::tile_experts_train", _backward_experts, setup_context=_setup_experts)
