"""What the layers with a packed weight share: its buffers, and a schedule that follows the tile flags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from patch_kernels.ops import tile_linear
from patch_kernels.packed_dtype import BY_TORCH
from patch_kernels.projection_group import Operands


class PackedModule(nn.Module):
    """Base of TiledLinear and TiledExperts.

    Buffers: weight, the payload (payload_bytes,) uint8, and tile_is_sparse, uint8 of 0 and 1; and schedule (int32),
    which follows from the flags and is not part of the state.
    The payload has the name of the dense weight on purpose: who reads a dense layer from these tensors, or asks this
    layer for its weight, meets a tensor of another shape and dtype and stops; a missing one would be made up.
    """

    weight: Tensor
    tile_is_sparse: Tensor
    schedule: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        flags: tuple[int, ...],
        schedule: tuple[int, ...],
        bias: tuple[int, ...] | None,
        payload_bytes: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ):
        """flags, schedule, bias: the shapes of these tensors, all of which begin as zeros."""
        super().__init__()
        self.weight_dtype = dtype
        tile_is_sparse = torch.zeros(flags, dtype=torch.uint8, device=device)
        tiles = tile_is_sparse.numel()
        if payload_bytes is None:
            payload_bytes = tiles * tile_linear.DENSE_TILE_BYTES
        _check_packing(type(self).__name__, payload_bytes, tiles, dtype)
        self.register_buffer("weight", torch.zeros(payload_bytes, dtype=torch.uint8, device=device))
        self.register_buffer("tile_is_sparse", tile_is_sparse)
        words = torch.zeros(schedule, dtype=torch.int32, device=device)
        self.register_buffer("schedule", words, persistent=False)
        # The flags that the schedule was made from, their version then, and the bytes of their payload (None: unknown).
        self._schedule_of: tuple[Tensor, int, int | None] | None = None
        self._schedule_is_current = False  # what a compiler can follow of that
        if bias is not None:
            self.bias = nn.Parameter(torch.zeros(bias, dtype=dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @property
    def payload(self) -> Tensor:
        """The packed weight, (payload_bytes,) uint8."""
        return self.weight

    def _make_schedule(self, tile_is_sparse: Tensor) -> Tensor:
        raise NotImplementedError

    def refresh_schedule(self) -> None:
        """Make the schedule again after the flags have changed. Waits for the GPU: not inside a graph capture.

        What packs a weight, and a call on a GPU that finds other flags than those it was made from, see to it.
        """
        self._refresh_schedule(self.tile_is_sparse)

    def _refresh_schedule(self, tile_is_sparse: Tensor) -> None:
        self.schedule = self._make_schedule(tile_is_sparse)
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
                f"{type(self).__name__}, weight: expected {payload_bytes} bytes, as its tile flags say, got "
                f"{weight.numel()}. Load payload and flags of the same layer."
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


def _version(tensor: Tensor) -> int:
    """What differs once it is written to; tensors of inference mode count no versions."""
    return 0 if tensor.is_inference() else tensor._version


def _check_packing(layer: str, payload_bytes: int, tiles: int, dtype: torch.dtype) -> None:
    if dtype not in BY_TORCH:
        raise ValueError(f"{layer}: expected dtype float16 or bfloat16, got {dtype}. Convert the model first.")
    low, high = tiles * tile_linear.SPARSE_TILE_BYTES, tiles * tile_linear.DENSE_TILE_BYTES
    step = tile_linear.DENSE_TILE_BYTES - tile_linear.SPARSE_TILE_BYTES
    if not low <= payload_bytes <= high or (payload_bytes - low) % step:
        raise ValueError(
            f"{layer}: expected payload_bytes between {low} (all {tiles} tiles sparse) and {high} (all dense) in "
            f"steps of {step}, got {payload_bytes}. Use ops.payload_bytes(tile_is_sparse)."
        )
