"""PackedExperts: the experts of a block with packed weights, in the place of the module that transformers has there.

Only the experts that tokens are sent to are computed, all of them in one op call for each of the two projections
(`patch_kernels.tile_experts`): what is before the activation, and what is behind it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from patch.models.mixtures import Experts, Form, arguments, between, form_of, weighted
from patch_kernels import TiledExperts, tiles_that_are_two_of_four
from patch_kernels.packed_dtype import BY_NAME

DOWN = "down"


class PackedExperts(nn.Module):
    """Called as the module it stands for, with its results; packed weights are frozen.

    original     that module, without its matrices; its code computes what is between the projections
    projections  {name: packed matrices}, by the names of `projection_names`; they become children

    A buffer of one byte has the name of the model's own first matrices: transformers without `patch.packed` meets a
    tensor of another shape there and stops, where it would make up a missing one.
    """

    def __init__(self, original: nn.Module, form: Form, projections: Mapping[str, TiledExperts]):
        super().__init__()
        self.__dict__["original"], self.form = original, form
        self._signature = inspect.signature(type(original).forward)
        for name in form.parameters:
            original._parameters[name] = None
        self._modules.update(original._modules)
        self._modules.update(projections)
        self._parameters.update({name: own for name, own in original._parameters.items() if own is not None})
        first = next(iter(projections.values()))
        self.experts = first.experts
        self._buffers[form.first] = torch.zeros(1, dtype=torch.uint8, device=first.weight.device)
        self.train(original.training)

    @property
    def projections(self) -> dict[str, TiledExperts]:
        """Packed matrices by name, in the order of their calls."""
        return {name: cast(TiledExperts, self._modules[name]) for name in projection_names(self.form)}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        bound = arguments(self._signature, self, args, kwargs)
        if self.form.takes == "sorted":
            return self._sorted(*bound)
        return self._batched(*bound) if self.form.takes == "batched" else self._routed(*bound)

    def _routed(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = self._experts(hidden, chosen.reshape(-1))
        if (norm := self._modules.get("post_expert_norm")) is not None:
            y = norm(y)
        return weighted(y.view(*chosen.shape, y.shape[-1]), weights, hidden.dtype)

    def _batched(self, hidden: Tensor) -> Tensor:
        # An expert without biases makes zeros of zeros: tokens that were not sent to it are left out.
        rows = hidden.ne(0).any(-1).nonzero()[:, 0]
        y = self._experts(hidden[rows], rows // max(1, len(hidden) // self.experts))
        return hidden.new_zeros(len(hidden), y.shape[-1]).index_copy(0, rows, y)

    def _sorted(self, rows: Tensor, sizes: Sequence[int] | Tensor) -> Tensor:
        counts = torch.as_tensor(sizes, device=rows.device)
        experts = torch.arange(self.experts, device=rows.device).repeat_interleave(counts)
        (matrices,) = self.projections.values()
        return cast(Tensor, matrices(rows, experts))

    def _experts(self, x: Tensor, experts: Tensor) -> Tensor:
        """Row i of x by every expert that it is sent to: (len(experts), out)."""
        first, down = self.projections.values()
        return cast(Tensor, down(between(self.original, self.form, first(x, experts)), experts))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("original")
            if original is None or name.startswith("_"):
                raise
            return getattr(original, name)

    def extra_repr(self) -> str:
        return f"{self.experts} experts of {type(self.original).__name__}"


def projection_names(form: Form) -> dict[str, tuple[str, ...]]:
    """{name of packed matrices: an expert's layers that they hold}, in the order of their calls."""
    if form.takes == "sorted":
        return {"matrices": form.projections}
    *first, last = form.projections
    return {"gate_up" if len(first) == 2 else "up": tuple(first), DOWN: (last,)}


@torch.no_grad()
def pack_experts(experts: Experts, masks: Mapping[str, Tensor]) -> PackedExperts:
    """Pack an opened mixture, which must not be used any more.

    masks  {name of a layer from `experts` on: keep (N, K) bool}; layers without one are packed in dense tiles
    """
    projections = {}
    for name, layers in projection_names(experts.form).items():
        keeps = list(_keeps(experts, layers, masks))
        projections[name] = TiledExperts.pack(
            (weight.detach() for weight in _weights(experts, layers)),
            keeps,
            [tiles_that_are_two_of_four(keep) for keep in keeps],
            _biases(experts, layers),
            parts=len(layers),
        )
    return PackedExperts(experts.original, experts.form, projections)


def _weights(experts: Experts, layers: Sequence[str]) -> Iterator[Tensor]:
    """Matrices of these layers, expert by expert."""
    return (cast(Tensor, experts.layers(index)[layer].weight) for index in range(experts.experts) for layer in layers)


def _keeps(experts: Experts, layers: Sequence[str], masks: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Their keep masks; of a layer without one, one that keeps all."""
    names = (experts.layer_names(index)[layer] for index in range(experts.experts) for layer in layers)
    for name, weight in zip(names, _weights(experts, layers), strict=True):
        keep = masks.get(name)
        yield torch.ones_like(weight, dtype=torch.bool) if keep is None else keep.to(weight.device)


def _biases(experts: Experts, layers: Sequence[str]) -> Tensor | None:
    """(experts, out of all layers)."""
    if not experts.form.biased:
        return None
    rows = [
        torch.cat([cast(Tensor, experts.layers(index)[layer].bias) for layer in layers])
        for index in range(experts.experts)
    ]
    return torch.stack(rows).detach()


@torch.no_grad()
def unpack_experts(packed: PackedExperts, dtype: torch.dtype | None = None) -> nn.Module:
    """The model's own module with zeros where pruned; the packed one must not be used any more."""
    form, original = packed.form, cast(nn.Module, packed.original)
    for name in form.parameters:
        parts: dict[str, Tensor] = {}
        for key, layers in projection_names(form).items():
            tiled = packed.projections[key]
            if name.endswith("_bias"):
                biases = cast(Tensor, tiled.bias).detach().chunk(len(layers), dim=1)
                parts |= dict(zip(layers, biases, strict=True))
                continue
            for part, layer in enumerate(layers):
                matrices = [tiled.tiled_weight(index, part).unpack() for index in range(packed.experts)]
                parts[layer] = torch.stack(matrices)
        joined = form.join(name, parts)
        original.register_parameter(name, nn.Parameter(joined if dtype is None else joined.to(dtype), False))
    return original.train(packed.training)


def packed_like(module: nn.Module, name: str, described: Mapping[str, Mapping[str, Any]], advice: str) -> PackedExperts:
    """An empty packed module on the meta device for one of the model's own.

    name       of the module, begins messages
    described  {projection: its entry in quantization_config.layers}
    raises     ValueError where the module keeps no experts, or others than those that were packed
    """
    form = form_of(module)
    if form is None:
        raise ValueError(f"{name}: expected a mixture of experts as packed, got {type(module).__name__}. {advice}")
    dtypes = module._parameters[form.first].dtype, BY_NAME[next(iter(described.values()))["dtype"]].torch  # type: ignore[union-attr]
    if dtypes[0] != dtypes[1]:
        fix = "Leave dtype out, or call model.dequantize()."
        raise ValueError(f"{name}: expected dtype {dtypes[1]} as packed, got {dtypes[0]}. {fix}")
    expected = dict(sorted(_sizes(module, form).items(), reverse=True))
    keys = ("experts", "parts", "out_features", "in_features", "bias")
    got = {key: tuple(described[key][size] for size in keys) for key in sorted(described, reverse=True)}
    if expected != got:
        raise ValueError(
            f"{name}: expected matrices of (experts, parts, out, in, bias) {expected}, got {got}. {advice}"
        )
    projections = {
        key: TiledExperts(
            layer["experts"],
            layer["parts"],
            layer["in_features"],
            layer["out_features"],
            layer["bias"],
            payload_bytes=layer["payload_bytes"],
            dtype=BY_NAME[layer["dtype"]].torch,
            device="meta",
        )
        for key, layer in described.items()
    }
    return PackedExperts(module, form, projections)


def _sizes(module: nn.Module, form: Form) -> dict[str, tuple[int, int, int, int, bool]]:
    """(experts, parts, out, in, bias) of every projection, from the module's own parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in form.parameters:
        if not name.endswith("_bias"):
            parts = form.split(name, cast(Tensor, module._parameters[name]))
            shapes |= {layer: tuple(part.shape) for layer, part in parts.items()}
    return {
        key: (shapes[layers[0]][0], len(layers), *shapes[layers[0]][1:], form.biased)  # type: ignore[misc]
        for key, layers in projection_names(form).items()
    }
