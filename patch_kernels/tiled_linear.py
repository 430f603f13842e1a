"""TiledLinear: drop-in for nn.Linear whose frozen weight is packed into dense and 2:4 tiles."""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from patch_kernels.checks import kind_of
from patch_kernels.ops import tile_linear
from patch_kernels.ops.tile_linear import multiply
from patch_kernels.packed_module import PackedModule
from patch_kernels.projection_group import Operands, ProjectionGroup
from patch_kernels.tiled_weight import TiledWeight


class TiledLinear(PackedModule):
    """y = x @ weight.T + bias with the weight in packed format v1.

    in_features, out_features   K and N
    payload_bytes               size of the packed weight, ops.payload_bytes(tile_is_sparse)
    dtype                       fp16 or bf16: of the weight, the bias, x and y

    batch_invariant             row i of y does not depend on the number of rows, bit for bit; may be set at any time
    group                       a ProjectionGroup that computes this layer with others, or None; changes no result

    Buffers: weight, the payload (payload_bytes,) uint8, tile_is_sparse (ceil(N/128), ceil(K/128)) uint8 of 0 and 1, and
    schedule (packed_module.py).
    A new module holds zeros and all-dense flags until its state is loaded or from_linear fills it.
    """

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
        grid = tile_linear.tile_grid((out_features, in_features))
        schedule = (tile_linear.schedule_words(grid),)
        super().__init__(grid, schedule, (out_features,) if bias else None, payload_bytes, dtype, device)
        self.in_features, self.out_features = in_features, out_features
        self.batch_invariant = batch_invariant

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
    def tiled_weight(self) -> TiledWeight:
        """View of the packed weight."""
        shape = (self.out_features, self.in_features)
        flags = self.tile_is_sparse
        schedule = self.schedule if self._has_schedule_of(flags) else None
        return TiledWeight(self.weight, flags.bool(), shape, self.weight_dtype, schedule)

    def _make_schedule(self, tile_is_sparse: Tensor) -> Tensor:
        return tile_linear.make_schedule(tile_is_sparse)

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
