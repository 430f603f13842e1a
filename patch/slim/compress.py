"""Quantisation and low-rank adapters on top of any keep masks: PATCH's, MaskLLM's or a one-shot method's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from patch.files.progress import tracked
from patch.models.adapted_linear import AdaptedLinear, adapted_layers, attach_adapter
from patch.models.checks import check_device, require_tokens
from patch.models.keep_masks import check_keep_masks
from patch.models.modes import placed
from patch.models.structure import decoder_blocks, maskable_linears
from patch.pruning.options import PruneOptions
from patch.pruning.selection import Pruned, check_weight, working_dtype
from patch.pruning.sequential import store, update_blocks
from patch.pruning.wanda import Statistics, shifted
from patch.slim.lora import adapter_product, make_adapter
from patch.slim.options import CompressOptions
from patch.slim.quantize import Quantized, check_matrix, important_columns, quantize_weight
from patch_kernels.checks import require_tensor


@dataclass(frozen=True)
class Compressed:
    """A compressed weight.

    weight       (N, K) W_C in the dtype of the original, exactly 0 where the mask prunes
    left, right  adapters L (K, rank) and R (rank, N) in bf16, or None
    quantized    codes and scales of W_C, or None
    error        relative error |(W - W_C - (L R)^T) diag(x)|_F / |W diag(x)|_F with x = sqrt(energy), or 1
                 where no energy is given; 0 for a weight of zeros
    """

    weight: Tensor
    left: Tensor | None
    right: Tensor | None
    quantized: Quantized | None
    error: float


@torch.no_grad()
def compress_weight(
    weight: Tensor,
    keep: Tensor,
    options: CompressOptions,
    *,
    energy: Tensor | None = None,
    updated: Tensor | None = None,
) -> Compressed:
    """Compress the dense weight (N, K) under its keep mask (N, K); nothing is changed in place.

    energy   (K,) of the layer's inputs (patch.pruning.wanda.Statistics), for settings that need calibration
    updated  (N, K) what the pruning method made of the kept weights (SparseGPT); default: the dense ones
    Without `updated` the kept weights are taken once more from W - (L R)^T when the adapters are known, and
    quantised again, as published: only rounding is left of their error. Updated ones make up for what is
    pruned and stay as they are.
    raises   ValueError or TypeError before any work.
    """
    check_matrix(weight, keep)
    if energy is not None:
        require_tensor("energy", energy, shape=weight.shape[1:], advice="Pass the layer's own statistics.")
    dtype = working_dtype(weight)
    dense = weight.detach().to(dtype)
    energy = None if energy is None else energy.to(dtype)
    if options.needs_calibration and energy is None:
        raise ValueError("energy: expected the input energies for slim_lora or scale_important_weights, got none.")

    def compressed(values: Tensor) -> tuple[Tensor, Quantized | None]:
        if not options.quantize_weight:
            return values.masked_fill(~keep, 0).to(weight.dtype), None
        kept = values.masked_fill(~keep, 0)
        factor = important_columns(kept, cast(Tensor, energy)) if options.scale_important_weights else None
        quantized = quantize_weight(
            kept,
            keep,
            bits=options.bitwidth,
            clip=options.slim_quant,
            block=options.weight_tile_size if options.weight_tiled_quantization else None,
            along_rows=options.column_wise_grouping,
            column_factor=factor,
        )
        return quantized.weight.to(weight.dtype), quantized

    result, quantized = compressed(dense if updated is None else updated.detach().to(dtype))
    left = right = None
    residual = dense - result.to(dtype)
    if options.lora_rank > 0:
        left, right = make_adapter(residual, options, energy)
        product = adapter_product(left, right, dtype)
        if updated is None:
            result, quantized = compressed(dense - product)
        residual = dense - result.to(dtype) - product
    x = 1.0 if energy is None else energy.sqrt()
    norm = (dense * x).norm().item()
    return Compressed(result, left, right, quantized, (residual * x).norm().item() / norm if norm > 0 else 0.0)


def compress_model(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    options: CompressOptions,
    *,
    weights: Mapping[str, Tensor] | None = None,
    calibration: Tensor | None = None,
    shift_zero_metrics: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Apply masks and compress the masked layers in place; returns {layer name: error} (see `Compressed`).

    model        the dense causal language model. With adapters its layers become `AdaptedLinear`.
    masks        {layer name: keep (N, K) bool}; layers without one stay dense
    weights      what the pruning method made of the kept weights, for any of the layers in masks
    calibration  (samples, seqlen) int64 token ids, for settings that need them. Blocks are compressed in order
                 and each sees what the compressed blocks before it produce, as in one-shot pruning.
    shift_zero_metrics  lift the energies of inputs that are always zero (see patch.pruning.wanda.shifted)
    device       where each block is put while it is worked on; None: where it is
    raises       ValueError or TypeError before any work. After an error during the work some layers are
                 compressed and the others dense.
    """
    weights = dict(weights or {})
    linears = _check_model(model, masks, options, weights, calibration)
    check_device(device)
    if options.lora_rank > 0:
        linears = {
            name: attach_adapter(model, name, options.rank(layer.weight.shape)) for name, layer in linears.items()
        }
    errors: dict[str, float] = {}

    def update(name: str, linear: nn.Linear, statistics: Statistics | None) -> Pruned:
        energy = None if statistics is None else statistics.channel_energy
        if energy is not None and shift_zero_metrics:
            energy = shifted(energy)
        keep = masks[name].to(linear.weight.device)
        updated = weights[name].to(linear.weight.device) if name in weights else None
        made = compress_weight(linear.weight, keep, options, energy=energy, updated=updated)
        if isinstance(linear, AdaptedLinear):
            linear.lora_left.copy_(cast(Tensor, made.left))
            linear.lora_right.copy_(cast(Tensor, made.right))
        _mark(linear, options)
        errors[name] = made.error
        return Pruned(made.weight, keep)

    if options.needs_calibration:
        update_blocks(
            model,
            linears,
            cast(Tensor, calibration),
            lambda weight: Statistics(weight.shape[1], dtype=working_dtype(weight), device=weight.device),
            update,
            device=device,
            what="compressing",
            progress=progress,
        )
        return errors
    with torch.no_grad():
        for name, linear in tracked(linears.items(), "compressing", "layer", show=progress):
            with placed(linear, device):
                store(linear, update(name, linear, None))
    return errors


def adapters(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer name: (L, R)} of a compressed model, as an artifact stores them."""
    return {
        name: (layer.lora_left.detach(), layer.lora_right.detach()) for name, layer in adapted_layers(model).items()
    }


def stored_options(settings: Mapping[str, Any] | None) -> CompressOptions | None:
    """Options of an artifact from CompressOptions.as_dict(); None for one of an uncompressed model.

    raises  ValueError when the settings are not those of this version.
    """
    try:
        return None if settings is None else CompressOptions(**settings)
    except ValueError as error:
        got = f"got others ({error}). The artifact was made by another version; compress again."
        raise ValueError(f"compression: expected the settings of CompressOptions, {got}") from None


@torch.no_grad()
def restore_compression(
    model: nn.Module, stored: Mapping[str, tuple[Tensor, Tensor]], options: CompressOptions | None
) -> None:
    """Give a masked model the adapters of an artifact and mark its layers as compressed with `options`."""
    for name, (left, right) in stored.items():
        layer = attach_adapter(model, name, left.shape[1])
        layer.lora_left.data = left.to(layer.weight.device, copy=True)  # in the dtype that was stored
        layer.lora_right.data = right.to(layer.weight.device, copy=True)
    if options is not None:
        for linear in maskable_linears(model).values():
            if isinstance(getattr(linear, "keep_mask", None), Tensor):
                _mark(linear, options)


def _mark(linear: Any, options: CompressOptions) -> None:
    """Note on a layer how it was compressed."""
    linear.compression = options


def _check_model(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    options: CompressOptions,
    weights: Mapping[str, Tensor],
    calibration: Tensor | None,
) -> dict[str, nn.Linear]:
    """The layers to compress."""
    if not options.is_active:
        raise ValueError("options: expected quantize_weight or a lora_rank above 0, got neither. Set one of them.")
    made = ((name, getattr(module, "compression", None)) for name, module in model.named_modules())
    if compressed := [name for name, options in made if isinstance(options, CompressOptions)]:
        raise ValueError(f"layer '{compressed[0]}': expected a model that is not compressed yet. Load it again.")
    linears = check_keep_masks(model, masks, [name for name in maskable_linears(model) if name not in masks])
    for name, linear in linears.items():
        label = f"layer '{name}'"
        check_weight(linear.weight, PruneOptions("unstructured"), label)
        options.check_shape(tuple(linear.weight.shape), label)
        own = getattr(linear, "keep_mask", None)
        if options.lora_rank > 0 and isinstance(own, Tensor) and not own.all():
            wanted = "expected its dense weight, which adapters are made from, got a pruned one"
            raise ValueError(f"{label}: {wanted}. Load the dense model and pass the masks (and updated weights).")
        if isinstance(own, Tensor) and (revived := int((masks[name].to(own.device) & ~own).sum())):
            wanted = f"expected a mask that keeps no weight which was pruned before, got {revived} of them"
            raise ValueError(f"{label}: {wanted}. Load the dense model and pass the masks.")
    for name, weight in weights.items():
        if name not in linears:
            raise ValueError(f"weights['{name}']: expected a layer in masks, got another. Use those of one pruning.")
        advice = "Use the masks and weights of one pruning."
        require_tensor(f"weights['{name}']", weight, shape=linears[name].weight.shape, advice=advice)
    if options.needs_calibration:
        if calibration is None:
            wanted = "expected token ids for slim_lora or scale_important_weights, got none"
            raise ValueError(f"calibration: {wanted}. Pass (samples, seqlen) token ids, or switch these off.")
        require_tokens(model, calibration, "calibration")
        decoder_blocks(model)
    return linears
