"""Packs the masked linear layers of a model, and unpacks them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from patch.files.schema import listed
from patch.models.adapted_linear import refuse_adapters
from patch.models.checks import require_layer, require_mask
from patch.models.keep_masks import check_masks_hold, keep_masks
from patch.models.mixtures import closed, open_mixtures, opened, replace
from patch.models.stay_dense import directly_read_linears, is_plain_linear
from patch.models.structure import decoder_of, linear_at
from patch.packed.experts import pack_experts
from patch.packed.projections import fuse_projections, stream_head, unstream_head
from patch.packed.quantizer import mark_dense, mark_packed
from patch.packed.swap import cast_model, stays_fp32, unpack_layers
from patch_kernels import TiledLinear, tiles_that_are_two_of_four
from patch_kernels.checks import require_tensor
from patch_kernels.packed_dtype import BY_TORCH

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
_CAST = "Pass dtype=torch.bfloat16 to cast the model."


@torch.no_grad()
def pack_model(model: Model, masks: Mapping[str, Tensor] | None = None, *, dtype: torch.dtype | None = None) -> Model:
    """Replace nn.Linear by patch_kernels.TiledLinear in place, layer by layer; returns the model.

    Experts of a mixture, whose layers have names such as mlp.experts.3.gate_proj, become one PackedExperts.

    masks   {layer name: keep (N, K) bool}; default the masks attached to the model (patch.models.keep_masks). Weights
            must be zero where they prune, which apply_keep_masks(model, masks) sees to.
            A 128x128 tile is stored sparse exactly if every group in it keeps 2 of 4; other tiles are stored
            dense with their zeros, so any mask at any tile size is kept exactly.
    dtype   fp16 or bf16: cast the whole model first; None: it must be fp16 or bf16 already.
    raises  ValueError or TypeError before any layer is changed.

    Layers that a packed one cannot stand for (patch.models.stay_dense) stay nn.Linear with their zeros, and are named.
    Peak memory is the model plus about two layers. A transformers model also gets its quantization_config, so
    that save_pretrained and from_pretrained (after `import patch.packed`) round-trip it.
    """
    refuse_adapters(model)
    open_mixtures(decoder_of(model))
    masks = dict(keep_masks(model) if masks is None else masks)
    _check_masks(model, masks, dtype)
    direct = directly_read_linears(model)
    if stay := sorted(name for name in masks if name in direct or not is_plain_linear(linear_at(model, name))):
        why = "the model reads their weight itself, or they compute more than a linear layer"
        if len(stay) == len(masks):
            raise ValueError(f"expected layers that can be packed, got {listed(stay)}: {why}. Export the model dense.")
        logger.warning("kept dense, with zeros where pruned: %s; %s", listed(stay), why)
        masks = {name: keep for name, keep in masks.items() if name not in stay}
    if dtype is not None:
        cast_model(model, dtype)
    for path, experts in list(opened(model)):
        own = {name.removeprefix(f"{path}."): masks.pop(name) for name in list(masks) if name.startswith(f"{path}.")}
        # One without masks is dense as it was.
        replace(model, experts, pack_experts(experts, own) if own else closed(experts))
    for name, keep in masks.items():
        linear = linear_at(model, name)
        keep = keep.to(linear.weight.device)
        packed = TiledLinear.from_linear(linear, keep, tiles_that_are_two_of_four(keep))
        model.set_submodule(name, packed)
        del linear, keep
        masks[name] = torch.empty(0)  # frees the mask when nobody else holds it
    fuse_projections(model)
    stream_head(model)
    if hasattr(model, "config"):
        mark_packed(model)
    return model


@torch.no_grad()
def unpack_model(model: Model, *, dtype: torch.dtype | None = None) -> Model:
    """Replace TiledLinear by nn.Linear with zeros where pruned, in place, layer by layer; returns the model.

    Packed mixtures become the model's own modules.

    dtype   of the new layers; default that of the packed weight. No keep masks are attached: which zeros of a
            dense tile were pruned is not stored.
    raises  ValueError when the model has no packed layer.
    """
    unpack_layers(model, dtype=dtype)
    unstream_head(model)
    if hasattr(model, "config"):
        mark_dense(model)
    return model


def _check_masks(model: nn.Module, masks: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    if not masks:
        got = f"{type(model).__name__} without one"
        raise ValueError(f"expected a model with keep masks, got {got}; prune it or learn masks first, or pass masks=")
    if dtype is not None and dtype not in BY_TORCH:
        raise ValueError(f"expected dtype float16 or bfloat16, got {dtype}; the packed format holds 16-bit weights")
    shared = _shared_weights(model)
    for name, keep in masks.items():
        weight = require_layer(model, name, "masks", "Use masks of this model.").weight
        require_mask(keep, weight.shape, f"masks[{name!r}]")
        if id(weight) in shared:
            raise ValueError(f"{name}: its weight is shared with another module (tied?); leave this layer out of masks")
        if weight.is_meta:
            got = "got one on the meta device (offloaded?)"
            raise ValueError(f"{name}.weight: expected values in memory, {got}. Load the model without offloading.")
        if dtype is None:
            require_tensor(f"{name}.weight", weight, dtypes=tuple(BY_TORCH), advice=_CAST)
        elif stays_fp32(model, f"{name}.weight", dtype):
            got = f"one that {type(model).__name__} keeps in float32"
            raise ValueError(f"{name}: expected a layer that may be cast to {dtype}, got {got}. Leave it out of masks.")
    check_masks_hold(model, masks)
    if dtype is None and len({linear_at(model, name).weight.dtype for name in masks}) > 1:
        raise ValueError(f"expected one dtype for all masked layers, got fp16 and bf16. {_CAST}")


def _shared_weights(model: nn.Module) -> set[int]:
    """id() of the parameters that more than one module holds."""
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {key for key, count in held.items() if count > 1}
