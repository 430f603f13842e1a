"""ProjectionGroup: layers that are called with the same x in turn (q, k, v of attention), computed in one op call."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from patch_kernels.ops import tile_linear

# With more tokens the multiplications take the time, and results that wait for their layers take memory.
_MOST_TOKENS = 64
# Rounds that may pass before all members were seen together; then a group does not look any more.
_MOST_ROUNDS = 32

Operands = tuple[Tensor, Tensor, Tensor | None]  # payload, tile flags, bias
# x and {id(layer): what its result was made from, the version of that, the result}
_Version = tuple[int, int, int]
_Stash = tuple[Tensor, dict[int, tuple[Operands, _Version, Tensor]]]


class Member(Protocol):
    """What a group needs of a layer (TiledLinear)."""

    out_features: int
    in_features: int
    batch_invariant: bool

    def operands(self) -> Operands: ...

    def current_schedule(self, weight: Tensor, tile_is_sparse: Tensor) -> Tensor | None: ...


class ProjectionGroup:
    """Computes `size` layers in one op call when the first of them is called, and hands the others what is theirs.

    It begins by observing. When all its layers were called with the same x, unmodified, one after another, that is
    taken for the rule: from then on a call of the first one computes all of them, and each other one takes its result
    if it is called with that x, still unmodified, and still has the tensors that the result was made from. Results that
    one does not take are dropped, and the group is over: its layers compute for themselves. So it is where a group does
    not see its layers together for long (cross attention: q sees another tensor than k and v).

    Layers hold the group; it knows them by weak references. So a copy of a model has groups of its own, and a copy of a
    layer brings no other along. Threads that share a model get right results, but soon one by one.
    Writes that torch does not count (through .data, or a NumPy view) between two calls of a round are not seen.
    """

    def __init__(self, size: int):
        self.size = size
        self.is_over = False
        self._rounds = 0
        # What was seen of a round: x, its version and the layers so far; weak references.
        self._seen: tuple[Any, int, tuple[Any, ...]] | None = None
        self._members: tuple[Any, ...] = ()  # in the order of their calls; none while observing
        # Results that wait for their layers. One tuple, which threads see whole; a dict's pop is atomic, so that none
        # gets a result that another one has.
        self._stash: _Stash | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is unpickled, observes for itself."""
        return ProjectionGroup, (self.size,)

    def result(self, layer: Member, x: Tensor, operands: Operands) -> Tensor | None:
        """The layer's result for x where the group has it or computes it, else None. For calls without gradients."""
        members = self._members
        if members and members[0]() is not layer:
            stash = self._stash
            return None if stash is None else self._take(stash, layer, x, operands)
        # Tensors of inference mode count no versions; subclasses (fake tensors) may be anything.
        if type(x) is not Tensor or torch.is_inference_mode_enabled() or x.is_inference():
            return None
        if members:
            return self._compute(members, layer, x)
        if not self.is_over:
            self._observe(layer, x)
        return None

    def _observe(self, layer: Member, x: Tensor) -> None:
        seen, this = self._seen, weakref.ref(layer)
        if seen is not None and seen[0]() is x and seen[1] == x._version and this not in seen[2]:
            layers = (*seen[2], this)
            if len(layers) == self.size:
                self._members, self._seen = layers, None
            else:
                self._seen = (*seen[:2], layers)
            return
        self._rounds += 1
        self._seen = weakref.ref(x), x._version, (this,)
        if self._rounds == _MOST_ROUNDS:
            self._end()

    def _compute(self, members: tuple[Any, ...], first: Member, x: Tensor) -> Tensor | None:
        if self._stash is not None:
            self._end()
            return None
        if x.numel() > _MOST_TOKENS * first.in_features:
            return None
        device, exact, needs_schedule = x.device, first.batch_invariant, x.is_cuda
        weights: list[Any] = []
        made_of = []
        try:
            for member in members:
                layer = member()
                if layer is None or layer.batch_invariant != exact:
                    self._end()
                    return None
                weight, tile_is_sparse, bias = operands = layer.operands()
                if weight.device != device:  # offloaded until it is called
                    self._end()
                    return None
                schedule = layer.current_schedule(weight, tile_is_sparse) if needs_schedule else None
                weights += weight, tile_is_sparse, schedule, layer.out_features, bias
                made_of.append((id(layer), operands, _version(x, weight, bias)))
            results = tile_linear.tile_linear_group(x, weights, exact)
        except (RuntimeError, ValueError):  # the layer that it is about says it
            self._end()
            return None
        waiting = {}
        for (key, operands, version), y in zip(made_of[1:], results[1:], strict=True):
            waiting[key] = operands, version, y
        self._stash = x, waiting
        if self.is_over:  # by another thread, meanwhile
            self._stash = None
        return results[0]

    def _take(self, stash: _Stash, layer: Member, x: Tensor, operands: Operands) -> Tensor | None:
        waiting = stash[1].pop(id(layer), None)
        if waiting is not None and stash[0] is x:
            made_of, version, result = waiting
            weight, tile_is_sparse, bias = operands
            is_same = made_of[0] is weight and made_of[1] is tile_is_sparse and made_of[2] is bias
            if is_same and version == _version(x, weight, bias):
                if not stash[1] and self._stash is stash:
                    self._stash = None
                return result
        self._end()
        return None

    def _end(self) -> None:
        self.is_over = True
        self._seen, self._members, self._stash = None, (), None


def _version(x: Tensor, weight: Tensor, bias: Tensor | None) -> _Version:
    """What differs once one of these is changed in place or elsewhere. RuntimeError for tensors of inference mode."""
    version = x._version + weight._version + (0 if bias is None else bias._version)
    return version, x.data_ptr(), weight.data_ptr()
