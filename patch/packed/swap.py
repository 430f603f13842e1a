"""The packed layers of a model: finding them, unpacking them, their checksums, and casting what is around them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
from torch import nn

from patch.packed.experts import PackedExperts, unpack_experts
from patch_kernels import TiledExperts, TiledLinear, TiledWeight


def packed_layers(model: nn.Module) -> Iterator[tuple[str, TiledLinear | TiledExperts]]:
    """(name, layer) of every packed layer in module order; the matrices of a mixture's projection are one."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, (TiledLinear, TiledExperts)))


def packed_matrices(layer: TiledLinear | TiledExperts) -> Iterator[TiledWeight]:
    """The packed weights of a layer, one after the other."""
    if isinstance(layer, TiledLinear):
        yield layer.tiled_weight
        return
    for expert in range(layer.experts):
        for part in range(layer.parts):
            yield layer.tiled_weight(expert, part)


@torch.no_grad()
def packed_zeros(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{name: (zeros, weights)} of every packed layer, counted in its unpacked weight, one layer at a time."""
    counts = {}
    for name, layer in packed_layers(model):
        zeros = total = 0
        for matrix in packed_matrices(layer):
            weight = matrix.unpack()
            zeros, total = zeros + weight.numel() - int(weight.count_nonzero()), total + weight.numel()
        counts[name] = zeros, total
    return counts


def unpack_layers(model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
    """Replace every packed layer by nn.Linear, and every packed mixture by the model's own module, in place.

    Weights have zeros where they were pruned; see convert.unpack_model.
    """
    packed = {
        name: module for name, module in model.named_modules() if isinstance(module, (TiledLinear, PackedExperts))
    }
    if not packed:
        raise ValueError(f"expected packed layers, got {type(model).__name__} without one; pack_model makes them")
    for name in list(packed):
        module = packed.pop(name)
        if isinstance(module, PackedExperts):
            model.set_submodule(name, unpack_experts(module, dtype))
        else:
            linear = module.to_linear()
            model.set_submodule(name, linear if dtype is None else linear.to(dtype))


def layer_sha256(layer: TiledLinear | TiledExperts) -> str:
    """SHA-256 over the tile flags and the payload of a packed layer."""
    digest = hashlib.sha256()
    for buffer in (layer.tile_is_sparse, layer.payload):
        digest.update(buffer.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def cast_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters and saved buffers in place, as from_pretrained(dtype=...) would.

    Non-persistent floating point buffers (rotary frequencies) stay fp32; model.to(dtype) would round them. So does what
    the model class itself keeps in fp32 (routers of mixtures).
    raises  ValueError, before anything is changed, for a value that would become infinite.
    """
    largest = torch.finfo(dtype).max
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and torch.finfo(parameter.dtype).max > largest:
            low, high = (float(value) for value in parameter.detach().aminmax())
            if max(-low, high) > largest and max(-low, high) < float("inf"):
                got = f"got {max(-low, high):g}"
                raise ValueError(f"{name}: expected values of at most {largest:g} for {dtype}, {got}. Use bfloat16.")
    saved = set(model.state_dict())
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    for name, tensor in (*model.named_parameters(), *buffers):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if stays_fp32(model, name, dtype) else dtype)
    if hasattr(model, "config"):
        model.config.dtype = dtype


def stays_fp32(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Whether the class of a transformers model keeps a tensor in fp32 when the model is loaded in `dtype`."""
    parts = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16:
        parts += getattr(model, "_keep_in_fp32_modules", None) or ()
    return any(fnmatchcase(name, f"*{part}*") for part in parts)
