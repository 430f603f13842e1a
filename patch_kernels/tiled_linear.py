"""TiledLinear: drop-in for nn.Linear whose frozen weight is packed into dense and 2:4 tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from patch_kernels.checks import kind_of
from patch_kernels.ops import tile_linear
from patch_kernels.ops.tile_linear import multiply
from patch_kernels.packed_dtype import BY_TORCH
from patch_kernels.projection_group import Operands, ProjectionGroup
from patch_kernels.tiled_weight import TiledWeight


class TiledLinear(nn.Module):
    """y = x @ weight.T + bias with the weight in packed format v1.

    in_features, out_features   K and N
    payload_bytes               size of the packed weight, ops.payload_bytes(tile_is_sparse)
    dtype                       fp16 or bf16: of the weight, the bias, x and y

    batch_invariant             row i of y does not depend on the number of rows, bit for bit; may be set at any time
    group                       a ProjectionGroup that computes this layer with others, or None; changes no result

    Buffers: weight, the payload (payload_bytes,) uint8, and tile_is_sparse (ceil(N/128), ceil(K/128)) uint8 of 0 and 1;
    and schedule (int32, ops.make_schedule), which follows from the flags and is not part of the state.
    The payload has the name of the dense weight on purpose: who reads a dense layer from these tensors, or asks this
    layer for its weight, meets a tensor of another shape and dtype and stops; a missing one would be made up.
    A new module holds zeros and all-dense flags until its state is loaded or from_linear fills it.
    """

    weight: Tensor
    tile_is_sparse: Tensor
    schedule: Tensor
    bias: nn.Parameter | None
    group: ProjectionGroup | None = None  # layers that are computed with this one

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        payload_bytes: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        batch_invariant: bool = False,
    ):
        super().__init__()
        grid = tile_linear.tile_grid((out_features, in_features))
        tiles = grid[0] * grid[1]
        if payload_bytes is None:
            payload_bytes = tiles * tile_linear.DENSE_TILE_BYTES
        _check_packing(payload_bytes, tiles, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.weight_dtype = dtype
        self.batch_invariant = batch_invariant
        self.register_buffer("weight", torch.zeros(payload_bytes, dtype=torch.uint8, device=device))
        self.register_buffer("tile_is_sparse", torch.zeros(grid, dtype=torch.uint8, device=device))
        words = torch.zeros(tile_linear.schedule_words(grid), dtype=torch.int32, device=device)
        self.register_buffer("schedule", words, persistent=False)
        # The flags that the schedule was made from, their version then, and the bytes of their payload (None: unknown).
        self._schedule_of: tuple[Tensor, int, int | None] | None = None
        self._schedule_is_current = False  # what a compiler can follow of that
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, keep: Tensor, tile_is_sparse: Tensor) -> TiledLinear:
        """Pack a dense layer; see ops.pack_tiles for what keep and tile_is_sparse must be."""
        tiled = TiledWeight.pack(linear.weight.detach(), keep, tile_is_sparse)
        module = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            payload_bytes=tiled.payload.numel(),
            dtype=linear.weight.dtype,
            device="meta",
        )
        module.weight = tiled.payload
        module.tile_is_sparse = tile_linear.tile_flags(tiled.tile_is_sparse).clone()
        module.refresh_schedule()
        if linear.bias is not None:
            module.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return module.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The same layer as nn.Linear, zeros where pruned."""
        weight = self.tiled_weight.unpack()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    @property
    def payload(self) -> Tensor:
        """The packed weight, (payload_bytes,) uint8."""
        return self.weight

    @property
    def tiled_weight(self) -> TiledWeight:
        """View of the packed weight."""
        shape = (self.out_features, self.in_features)
        flags = self.tile_is_sparse
        schedule = self.schedule if self._has_schedule_of(flags) else None
        return TiledWeight(self.weight, flags.bool(), shape, self.weight_dtype, schedule)

    def refresh_schedule(self) -> None:
        """Make the schedule again after the flags have changed. Waits for the GPU: not inside a graph capture.

        from_linear, and a call on a GPU that finds other flags than those it was made from, see to it.
        """
        self._refresh_schedule(self.tile_is_sparse)

    def _refresh_schedule(self, tile_is_sparse: Tensor) -> None:
        self.schedule = tile_linear.make_schedule(tile_is_sparse)
        self._schedule_is_current = True
        if is_compiling():
            return
        has_values = type(tile_is_sparse) is Tensor and not tile_is_sparse.is_meta  # a fake tensor is a subclass
        payload_bytes = tile_linear.payload_bytes(tile_is_sparse) if has_values else None
        self._schedule_of = tile_is_sparse, _version(tile_is_sparse), payload_bytes

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._schedule_is_current = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "tile_is_sparse":
            self._schedule_is_current = False
        super().__setattr__(name, value)

    def _has_schedule_of(self, tile_is_sparse: Tensor) -> bool:
        made_of = self._schedule_of
        return made_of is not None and made_of[0] is tile_is_sparse and made_of[1] == _version(tile_is_sparse)

    def current_schedule(self, weight: Tensor, tile_is_sparse: Tensor) -> Tensor | None:
        """The schedule for a call with this payload and these flags: a CPU needs none.

        raises  ValueError for a payload of another size than the flags say: a GPU would read beyond it.
        """
        if not weight.is_cuda:
            return None
        schedule = self._buffers.get("schedule")
        is_there = schedule is not None and schedule.get_device() == weight.get_device()
        if is_compiling():
            if not is_there or not self._schedule_is_current:
                self.refresh_schedule()
            return self.schedule
        if not is_there or not self._has_schedule_of(tile_is_sparse):
            self._refresh_schedule(tile_is_sparse)
            schedule = self.schedule
        payload_bytes = None if self._schedule_of is None else self._schedule_of[2]
        if payload_bytes is not None and weight.numel() != payload_bytes:
            raise ValueError(
                f"TiledLinear, weight: expected {payload_bytes} bytes, as its tile flags say, got {weight.numel()}. "
                "Load payload and flags of the same layer."
            )
        return schedule

    def operands(self) -> Operands:
        """Payload, flags and bias as they are now.

        Nothing may keep them: .to(), functional_call and offloading put others in their place. They are read where they
        lie: an attribute of nn.Module takes half a microsecond.
        """
        try:
            buffers = self._buffers
            return buffers["weight"], buffers["tile_is_sparse"], self._parameters["bias"]  # type: ignore[return-value]
        except KeyError:  # plain attributes or properties, as torch's parametrizations make them
            return self.weight, self.tile_is_sparse, self.bias

    def forward(self, x: Tensor) -> Tensor:
        if not (isinstance(x, Tensor) and x.dtype == self.weight_dtype and x.dim() and x.shape[-1] == self.in_features):
            wanted = f"{self.weight_dtype} (..., {self.in_features})"
            raise ValueError(f"TiledLinear, x: expected {wanted}, got {kind_of(x)}. Convert x, or pack in its dtype.")
        weight, tile_is_sparse, bias = operands = self.operands()
        if self.group is not None and not is_compiling():
            y = self._from_group(x, operands)
            if y is not None:
                return y
        schedule = self.current_schedule(weight, tile_is_sparse)
        return multiply(x, weight, tile_is_sparse, self.out_features, bias, schedule, self.batch_invariant)

    def _from_group(self, x: Tensor, operands: Operands) -> Tensor | None:
        group = self.group
        if (
            group is None
            or (is_grad_enabled() and tile_linear.needs_grad(x, operands[2]))
            or forward_ad._current_level >= 0
        ):
            return None
        y = group.result(self, x, operands)
        if group.is_over:
            self.group = None
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={self.weight_dtype}, payload_bytes={self.weight.numel()}"
        )


def _version(tensor: Tensor) -> int:
    """What differs once it is written to; tensors of inference mode count no versions."""
    return 0 if tensor.is_inference() else tensor._version


def _check_packing(payload_bytes: int, tiles: int, dtype: torch.dtype) -> None:
    if dtype not in BY_TORCH:
        raise ValueError(f"TiledLinear: expected dtype float16 or bfloat16, got {dtype}. Convert the model first.")
    low, high = tiles * tile_linear.SPARSE_TILE_BYTES, tiles * tile_linear.DENSE_TILE_BYTES
    step = tile_linear.DENSE_TILE_BYTES - tile_linear.SPARSE_TILE_BYTES
    if not low <= payload_bytes <= high or (payload_bytes - low) % step:
        raise ValueError(
            f"TiledLinear: expected payload_bytes between {low} (all {tiles} tiles sparse) and {high} (all dense) in "
            f"steps of {step}, got {payload_bytes}. Use ops.payload_bytes(tile_is_sparse)."
        )
