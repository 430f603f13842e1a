"""TiledExperts: the packed matrices of one projection of a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import cast

import torch
from torch import Tensor, nn

from patch_kernels.checks import kind_of, require_at_least, require_multiple, require_number, require_tensor
from patch_kernels.ops import tile_experts, tile_linear
from patch_kernels.packed_module import PackedModule
from patch_kernels.tiled_weight import TiledWeight


class TiledExperts(PackedModule):
    """Rows of x times the packed weights of the experts that they are sent to, in one call.

    experts                     E
    parts                       matrices of an expert that share x: 2 for gate and up, whose results lie side by side
    in_features, out_features   K and N of a matrix
    bias                        whether there is one, (E, parts * N)
    payload_bytes               size of the packed weights, ops.payload_bytes(tile_is_sparse)
    dtype                       fp16 or bf16: of the weights, the bias, x and y

    batch_invariant             row p of y does not depend on the other rows, bit for bit; may be set at any time

    Buffers: weight, the payload (payload_bytes,) uint8, in which matrix expert * parts + part follows the ones before
    it; tile_is_sparse (E * parts, ceil(N/128), ceil(K/128)) uint8 of 0 and 1; and schedule (packed_module.py).
    A new module holds zeros and all-dense flags until its state is loaded or `pack` makes it.
    """

    def __init__(
        self,
        experts: int,
        parts: int,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        payload_bytes: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        batch_invariant: bool = False,
    ):
        for name, value in (("experts", experts), ("parts", parts)):
            require_number(f"TiledExperts, {name}", value, ge=1, integer=True, advice="Pass those of the model.")
        grid = tile_linear.tile_grid((out_features, in_features))
        flags, schedule = (experts * parts, *grid), (experts * parts, tile_linear.schedule_words(grid))
        of_bias = (experts, parts * out_features) if bias else None
        super().__init__(flags, schedule, of_bias, payload_bytes, dtype, device)
        self.experts, self.parts = experts, parts
        self.in_features, self.out_features = in_features, out_features
        self.batch_invariant = batch_invariant
        self._begins: Tensor | None = None  # made with the schedule; no buffer, because it stays on the CPU

    @classmethod
    def pack(
        cls,
        weights: Iterable[Tensor],
        keeps: Iterable[Tensor],
        tile_flags: Iterable[Tensor],
        bias: Tensor | None = None,
        *,
        parts: int = 1,
    ) -> TiledExperts:
        """Pack matrices: the parts of expert 0, of expert 1 and so on.

        weights, keeps, tile_flags  of each matrix what ops.pack_tiles takes. All flags are read first, which say the
                                    size of the result; then the others, one matrix after another, so that the memory
                                    is that of the result and one matrix.
        bias                        (E, parts * N) of the weights' dtype, or None
        parts                       matrices of an expert
        raises                      ValueError for matrices of different shapes or dtypes, for another number of weights
                                    or masks than flags, and for what pack_tiles refuses
        """
        flags = list(tile_flags)
        what = "TiledExperts.pack, number of tile_flags"
        require_at_least(what, len(flags), 1, "Pass those of all parts of all experts.")
        require_multiple(what, len(flags), parts, "Pass those of all parts of all experts.", named="parts = ")
        module: TiledExperts | None = None
        begin = 0
        for index, (of_matrix, weight, keep) in enumerate(zip_longest(flags, weights, keeps)):
            if of_matrix is None or weight is None or keep is None:
                raise ValueError(
                    f"TiledExperts.pack: expected weight, keep mask and tile flags of each of {len(flags)} matrices, "
                    f"got too few or too many from matrix {index} on. Pass as many of each."
                )
            if module is None:
                module = cls._like(weight, flags, bias, parts)
            require_tensor(
                f"TiledExperts.pack, matrix {index}",
                weight,
                dtypes=(module.weight_dtype,),
                shape=(module.out_features, module.in_features),
                advice="Matrices of one projection have one shape and dtype.",
            )
            payload = tile_linear.pack_tiles(weight, keep, of_matrix)
            module.weight[begin : begin + payload.numel()] = payload
            begin += payload.numel()
        module = cast(TiledExperts, module)
        module.refresh_schedule()
        return module

    @classmethod
    def _like(cls, weight: Tensor, flags: list[Tensor], bias: Tensor | None, parts: int) -> TiledExperts:
        """Without its payload yet."""
        advice = "Pass weight matrices."
        require_tensor("TiledExperts.pack, matrix 0", weight, shape=("N", "K"), advice=advice)
        rows, cols = weight.shape
        module = cls(
            len(flags) // parts,
            parts,
            cols,
            rows,
            bias is not None,
            payload_bytes=sum(tile_linear.payload_bytes(of_matrix) for of_matrix in flags),
            dtype=weight.dtype,
            device="meta",
        )
        module.weight = torch.empty(module.weight.shape, dtype=torch.uint8, device=weight.device)
        module.tile_is_sparse = torch.stack([tile_linear.tile_flags(of_matrix) for of_matrix in flags])
        if bias is not None:
            shape = (module.experts, parts * rows)
            require_tensor("TiledExperts.pack, bias", bias, dtypes=(weight.dtype,), shape=shape, advice="Stack them.")
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return module

    def tiled_weight(self, expert: int, part: int = 0) -> TiledWeight:
        """View of a packed matrix."""
        for name, value, count in (("expert", expert, self.experts), ("part", part, self.parts)):
            require_number(f"TiledExperts.tiled_weight, {name}", value, ge=0, lt=count, integer=True)
        index, flags = expert * self.parts + part, self.tile_is_sparse
        begin = tile_linear.payload_bytes(flags[:index])
        end = begin + tile_linear.payload_bytes(flags[index])
        schedule = self.schedule[index] if self._has_schedule_of(flags) else None
        shape = (self.out_features, self.in_features)
        return TiledWeight(self.weight[begin:end], flags[index].bool(), shape, self.weight_dtype, schedule)

    def _make_schedule(self, tile_is_sparse: Tensor) -> Tensor:
        self._begins = tile_experts.matrix_begins(tile_is_sparse)
        return tile_experts.make_schedules(tile_is_sparse)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """(P, parts * N) for x (T, K) and experts (P,): see ops.tile_experts."""
        if not (
            isinstance(x, Tensor) and x.dtype == self.weight_dtype and x.dim() == 2 and x.shape[1] == self.in_features
        ):
            wanted = f"{self.weight_dtype} (T, {self.in_features})"
            raise ValueError(f"TiledExperts, x: expected {wanted}, got {kind_of(x)}. Convert x, or pack in its dtype.")
        weight, flags, bias = self.operands()
        schedule = self.current_schedule(weight, flags)
        begins = None if schedule is None else self._begins
        return tile_experts.tile_experts(
            x, experts, weight, flags, self.out_features, self.parts, bias, schedule, begins, self.batch_invariant
        )

    def extra_repr(self) -> str:
        return (
            f"experts={self.experts}, parts={self.parts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}, dtype={self.weight_dtype}, "
            f"payload_bytes={self.weight.numel()}"
        )
