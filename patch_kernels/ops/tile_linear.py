"""Typed wrappers of the packed weight's ops: checks with readable errors, fake kernels, autograd. masked.py has
those of mask learning.

The C++ schemas (csrc/schema.cpp) have no defaults, so autograd always sees every input at its place.
tile_linear has no autograd formula on purpose: one costs 5 us a call even under no_grad. Training goes through
tile_linear_train.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from patch_kernels import card_check
from patch_kernels._library import gemm_status
from patch_kernels.checks import require_sizes, require_tensor
from patch_kernels.ops import LIBRARY_PATH
from patch_kernels.packed_dtype import BY_TORCH
from patch_kernels.reference import TILE

_ops = torch.ops.patch_kernels
# Overloads, found once: looking them up takes as long as a check of x.
_tile_linear = _ops.tile_linear.default
_tile_linear_train = _ops.tile_linear_train.default
_tile_linear_groups = {n: getattr(_ops, f"tile_linear_group{n}").default for n in (2, 3, 4)}

DENSE_TILE_BYTES = 32768
SPARSE_TILE_BYTES = 18432


def tile_grid(shape: Sequence[int], tile: Sequence[int] = (TILE, TILE)) -> tuple[int, int]:
    """Number of tile rows and columns that cover a weight of shape (N, K); edge tiles may be cut.

    raises  ValueError for sizes that are no integers >= 1.
    """
    require_sizes("weight shape (N, K)", shape, "Pass the shape of a 2-D weight.")
    require_sizes("tile (rows, columns)", tile, "Use (128, 128).")
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def payload_bytes(tile_is_sparse: Tensor) -> int:
    """Bytes of the packed payload for a grid of tile flags: 18432 for a sparse tile, 32768 for a dense one."""
    sparse = int(tile_is_sparse.bool().sum())
    return sparse * SPARSE_TILE_BYTES + (tile_is_sparse.numel() - sparse) * DENSE_TILE_BYTES


def kept_of_groups(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Kept weights of every group of four of a bool mask (N, K), and how many a 2:4 mask keeps there.

    returns  (N, ceil(K/4)) and (ceil(K/4),) uint8: 2, but 1 for a last group that the edge cuts to one column.
    """
    rows, cols = keep.shape
    groups = -(-cols // 4)
    kept = torch.nn.functional.pad(keep, (0, groups * 4 - cols)).reshape(rows, groups, 4).sum(2, dtype=torch.uint8)
    expected = torch.full((groups,), 2, dtype=torch.uint8, device=keep.device)
    if cols % 4 == 1:
        expected[-1] = 1
    return kept, expected


def two_of_four_violations(keep: Tensor, tile_is_sparse: Tensor) -> tuple[int, tuple[int, int] | None]:
    """Groups inside sparse tiles that do not keep exactly 2 of 4: their number, and the first one's (row, column).

    keep (N, K) bool; tile_is_sparse (ceil(N/128), ceil(K/128)) bool. A last group cut by the matrix edge to one or two
    columns must keep them all.
    """
    kept, expected = kept_of_groups(keep)
    rows, groups = kept.shape
    row_tile = torch.arange(rows, device=keep.device) // TILE
    group_tile = torch.arange(groups, device=keep.device) * 4 // TILE
    inside = tile_is_sparse.bool()[row_tile][:, group_tile]
    wrong = (kept != expected) & inside
    count = int(wrong.count_nonzero())
    if count == 0:
        return 0, None
    row, group = divmod(int(wrong.flatten().to(torch.uint8).argmax()), groups)
    return count, (row, 4 * group)


def require_two_of_four(what: str, keep: Tensor, tile_is_sparse: Tensor, advice: str) -> None:
    """Refuse a keep mask (N, K) with groups in sparse tiles that do not keep exactly 2 of 4, see above."""
    count, first = two_of_four_violations(keep, tile_is_sparse)
    if first is not None:
        raise ValueError(
            f"{what}: expected exactly 2 of 4 kept values in every group of a sparse tile, got {count} groups that "
            f"are not, the first at row {first[0]}, column {first[1]}. {advice}"
        )


def tile_flags(tile_is_sparse: Tensor) -> Tensor:
    """Tile flags as the ops take them: uint8 0 and 1 (a view of bool flags)."""
    return tile_is_sparse.view(torch.uint8) if tile_is_sparse.dtype == torch.bool else tile_is_sparse


def _check_grid(op: str, tile_is_sparse: Tensor, shape: Sequence[int]) -> None:
    advice = "It is one flag per 128x128 tile; use patch_kernels.tile_grid(shape) for its shape."
    dtypes = (torch.bool, torch.uint8)
    require_tensor(f"{op}, tile_is_sparse", tile_is_sparse, dtypes=dtypes, shape=tile_grid(shape), advice=advice)


def pack_tiles(weight: Tensor, keep: Tensor, tile_is_sparse: Tensor) -> Tensor:
    """Pack a weight into dense and 2:4 tiles, format v1 (docs/reference/format.md).

    weight          (N, K) fp16 or bf16; any sizes, edge tiles are padded with zeros.
    keep            (N, K) bool, True where a weight stays. Dropped weights of dense tiles are stored as zeros.
    tile_is_sparse  (ceil(N/128), ceil(K/128)) bool; inside a sparse tile every group of four keeps exactly two.
    returns         payload, 1-D uint8 of payload_bytes(tile_is_sparse) bytes, on weight's device.
    raises          ValueError for wrong shapes, dtypes or devices, and for groups that are not 2 of 4 (with their
                    number and the first row and column).
    """
    require_tensor(
        "pack_tiles, weight",
        weight,
        dtypes=BY_TORCH,
        shape=("N", "K"),
        advice="Convert it first, for example weight.to(torch.bfloat16).",
    )
    shape, device = tuple(weight.shape), weight.device
    advice = "Pass the keep mask itself (True where a weight stays), on the weight's device."
    require_tensor("pack_tiles, keep", keep, dtypes=(torch.bool,), shape=shape, device=device, advice=advice)
    _check_grid("pack_tiles", tile_is_sparse, shape)
    require_tensor("pack_tiles, tile_is_sparse", tile_is_sparse, device=device, advice="Move it to the weight.")
    require_two_of_four("pack_tiles", keep, tile_is_sparse, "Mark their tiles dense or prune to 2:4.")
    # Packing happens once per layer: one CPU implementation serves every device.
    payload = _ops.pack_tiles(weight.cpu(), keep.cpu(), tile_flags(tile_is_sparse.cpu()).contiguous())
    return payload.to(weight.device)


def unpack_tiles(
    payload: Tensor,
    tile_is_sparse: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    schedule: Tensor | None = None,
) -> Tensor:
    """Inverse of pack_tiles: the dense (N, K) weight, bit for bit, zeros where pruned.

    schedule (make_schedule) tells a GPU where the tiles lie; without it, every tile counts the flags before it.
    """
    if dtype not in BY_TORCH:
        raise ValueError(f"unpack_tiles: expected dtype float16 or bfloat16, got {dtype}. Use that of pack_tiles.")
    require_sizes("unpack_tiles, shape", shape, "Pass that of the packed weight.")
    _check_grid("unpack_tiles", tile_is_sparse, tuple(shape))
    size, advice = (payload_bytes(tile_is_sparse),), "Pass what pack_tiles returned, with its flags."
    like: dict[str, Any] = {"device": tile_is_sparse.device, "contiguous": True, "advice": advice}
    require_tensor("unpack_tiles, payload", payload, dtypes=(torch.uint8,), shape=size, **like)
    if schedule is not None:
        rows, cols = tile_is_sparse.shape
        words, like["advice"] = (schedule_words((rows, cols)),), "Pass make_schedule(tile_is_sparse)."
        require_tensor("unpack_tiles, schedule", schedule, dtypes=(torch.int32,), shape=words, **like)
    return _ops.unpack_tiles(payload, tile_flags(tile_is_sparse), schedule, shape[0], shape[1], dtype)


def make_schedule(tile_is_sparse: Tensor) -> Tensor:
    """What tile_linear's GPU kernels read about a layer's tiles: offsets, order of rows, cuts of K (csrc/gemm/plan.h).

    tile_is_sparse  (R, C) bool or uint8 on any device; read on the host, so a GPU tensor is waited for.
    returns         int32 (words,) on the same device. Depends on the flags alone; not part of any file.
    """
    require_tensor("make_schedule, tile_is_sparse", tile_is_sparse, dtypes=(torch.bool, torch.uint8), shape=("R", "C"))
    words = _ops.make_schedule(tile_flags(tile_is_sparse.cpu()).contiguous())
    return words.to(tile_is_sparse.device)


def tile_linear(
    x: Tensor,
    payload: Tensor,
    tile_is_sparse: Tensor,
    out_features: int,
    bias: Tensor | None,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """y = x @ weight.T + bias with the weight packed by pack_tiles.

    x         (..., K) of the packed dtype (fp16 or bf16); leading sizes may be 0, strides are free. Its dtype and K are
              not in the payload: TiledWeight and TiledLinear know and check both.
    tile_is_sparse  (ceil(N/128), ceil(K/128)) uint8 of 0 and 1, contiguous (tile_flags makes it of bool).
    bias      (N,) of x's dtype, or None; added in fp32.
    schedule  make_schedule(tile_is_sparse). Without it a GPU unpacks and calls cuBLAS; a CPU does not need it.
    batch_invariant  row i of y does not depend on the number of rows, bit for bit, at some cost in speed: on a CPU from
              about 16 rows on, where the kernel for few rows then does all (docs/inside/cpu.md).
    returns   (..., N) in x's dtype; accumulation is fp32; the same bits from run to run and from any number of threads.
    An inf or NaN of x at a pruned position of a sparse tile does not reach y, but where weights are unpacked for torch
    or cuBLAS.
    Gradients reach x and bias; the weight is frozen: on Hopper it is read before the kernel ahead of this call on the
    stream has ended (docs/inside/gemm.md), so do not write payload or schedule by a kernel directly before.
    """
    given: Any = bias
    if not isinstance(x, Tensor) or not (given is None or isinstance(given, Tensor)):
        require_tensor("tile_linear, x", x)
        require_tensor("tile_linear, bias", given, advice="Pass None for none.")
    return multiply(x, payload, tile_is_sparse, out_features, bias, schedule, batch_invariant)


_decided: set[int] = set()  # CUDA devices whose kernels are known to work, or not to


def multiply(
    x: Tensor,
    payload: Tensor,
    tile_is_sparse: Tensor,
    out_features: int,
    bias: Tensor | None,
    schedule: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    """tile_linear where x and bias are known to be tensors. Of a small layer's time the host's part is most."""
    if forward_ad._current_level >= 0:
        refuse_forward_mode("tile_linear", x)
    op = _tile_linear_train if is_grad_enabled() and needs_grad(x, bias) else _tile_linear
    if x.is_cuda and schedule is not None and not is_compiling() and x.get_device() not in _decided:
        return _first_calls(op, x, payload, tile_is_sparse, schedule, out_features, bias, batch_invariant)
    return op(x, payload, tile_is_sparse, schedule, out_features, bias, batch_invariant)


def call_on_card(op: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """A call with a schedule on a CUDA device, whose kernels are checked before they are used."""
    return _first_calls(op, x, *args) if x.get_device() not in _decided else op(x, *args)


def _first_calls(op: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """Calls on a CUDA device until its kernels are known to work, or not to."""
    if type(x) not in (Tensor, Parameter):  # fake: there may be no such device
        return op(x, *args)
    index = x.get_device()
    if not torch.cuda.is_current_stream_capturing():
        card_check.ensure(index)
    y = op(x, *args)
    _say_if_dense(index)
    if gemm_status(LIBRARY_PATH, index)["state"] != "unchecked":
        _decided.add(index)
    return y


def refuse_forward_mode(op: str, x: Tensor) -> None:
    """Refuse a dual tensor."""
    if forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            f"{op}, x: expected no forward-mode derivative, for which a packed weight has no formula, got a dual "
            "tensor. Use reverse mode, or unpack the weight."
        )


def tile_linear_group(x: Tensor, weights: Sequence[Any], batch_invariant: bool = False) -> Sequence[Tensor]:
    """tile_linear of one x (..., K) and two to four weights of the same K and dtype, in one call.

    No gradients: backward through its results gives none to x (torch warns of it).

    weights  payload, tile_is_sparse, schedule, out_features, bias of each weight in turn, in one flat list
    returns  item i is what tile_linear returns for weight i, bit for bit
    raises   ValueError for another number of weights, RuntimeError for what tile_linear's op refuses
    """
    count, rest = divmod(len(weights), 5)
    op = None if rest else _tile_linear_groups.get(count)
    if op is None:
        raise ValueError(
            f"tile_linear_group, weights: expected 5 values for each of 2 to 4, got {len(weights)} values."
        )
    if x.is_cuda and not is_compiling() and x.get_device() not in _decided:
        return _first_calls(op, x, *weights, batch_invariant)
    return op(x, *weights, batch_invariant)


def needs_grad(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd has to see a call where gradients are enabled."""
    return x.requires_grad or (bias is not None and bias.requires_grad)


@functools.cache
def _say_if_dense(device_index: int) -> None:
    """Warn once a device if its sparse kernels are not used, or not the best ones."""
    status = gemm_status(LIBRARY_PATH, device_index)
    name = torch.cuda.get_device_name(device_index)
    if status["state"] != "works":
        why = status["reason"] or "the first call was inside a graph capture; make one call before capturing"
        warnings.warn(
            f"patch_kernels: expected a sparse GEMM kernel for cuda:{device_index} ({name}), got none: {why}. "
            "tile_linear unpacks the weight and calls cuBLAS there: right, but not faster than dense.",
            stacklevel=5,
        )
    elif status["reason"]:
        warnings.warn(
            f"patch_kernels: cuda:{device_index} ({name}) uses the portable kernels: {status['reason']}. "
            "Please report this with the output of `patch-llm info`.",
            stacklevel=5,
        )


def schedule_words(grid: tuple[int, int]) -> int:
    """int32 words of make_schedule for a grid of tiles: header, tiles, order, cuts of rows and of pairs."""
    rows, cols = grid
    return 3 + rows * cols + rows + 9 * (rows + -(-rows // 2))


def _fake_linear(
    x: Tensor,
    payload: Tensor,
    tile_is_sparse: Tensor,
    schedule: Tensor | None,
    out_features: int,
    bias: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _fake_linear_group(x: Tensor, *weights: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty((*x.shape[:-1], rows)) for rows in weights[3::5])


def _register_fakes() -> None:
    fake = torch.library.register_fake
    fake("patch_kernels::tile_linear", _fake_linear)
    fake("patch_kernels::tile_linear_train", _fake_linear)
    for count in _tile_linear_groups:
        fake(f"patch_kernels::tile_linear_group{count}", _fake_linear_group)
    fake(
        "patch_kernels::unpack_tiles",
        lambda payload, tile_is_sparse, schedule, rows, cols, dtype: payload.new_empty((rows, cols), dtype=dtype),
    )

    fake(
        "patch_kernels::make_schedule",
        lambda flags: flags.new_empty(schedule_words(tuple(flags.shape)), dtype=torch.int32),
    )

    @fake("patch_kernels::pack_tiles")
    def _(weight: Tensor, keep: Tensor, tile_is_sparse: Tensor) -> Tensor:
        # The size depends on the flags' values: an unbacked size for the compiler.
        size = torch.library.get_ctx().new_dynamic_size()
        return weight.new_empty(size, dtype=torch.uint8)


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, payload, tile_is_sparse, schedule, _, bias, _ = inputs
    ctx.save_for_backward(payload, tile_is_sparse, schedule)
    ctx.in_features, ctx.dtype, ctx.has_bias = x.shape[-1], x.dtype, bias is not None


def _backward_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    payload, tile_is_sparse, schedule = ctx.saved_tensors
    out_features = grad.shape[-1]
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = _ops.unpack_tiles(payload, tile_is_sparse, schedule, out_features, ctx.in_features, ctx.dtype)
        grad_x = grad @ weight
    if ctx.has_bias and ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, out_features).sum(0)
    return grad_x, None, None, None, None, grad_bias, None


_register_fakes()
torch.library.register_autograd("patch_kernels::tile_linear_train", _backward_linear, setup_context=_setup_linear)
