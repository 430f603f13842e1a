"""Keep masks attached to layers.

A keep mask is a bool tensor of the weight's shape, True where a weight stays; it lives on its layer as the buffer
`keep_mask` and is never derived from zeros of the weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from patch.models.checks import require_layers, require_mask
from patch.models.structure import block_linears, linear_at, maskable_linears


def set_keep_mask(linear: nn.Linear, keep: torch.Tensor) -> None:
    """Attach `keep` (N, K) bool to a layer as the buffer `keep_mask` (not saved with the state dict).

    The mask is moved to the weight's device, not copied when it is there already. The weight is not changed.
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(
            f"linear: expected an nn.Linear, got {type(linear).__name__}. Convert packed layers back first."
        )
    require_mask(keep, linear.weight.shape, "keep")
    linear.register_buffer("keep_mask", keep.to(linear.weight.device), persistent=False)


def keep_mask_of(linear: nn.Module) -> torch.Tensor:
    """The keep mask of a layer that has one."""
    return cast(torch.Tensor, linear.keep_mask)


def keep_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """The keep masks attached to the model's `nn.Linear` layers, {module path: (N, K) bool}; may be {}."""
    return {
        name: keep_mask_of(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and isinstance(getattr(module, "keep_mask", None), torch.Tensor)
    }


@torch.no_grad()
def apply_keep_masks(model: nn.Module, masks: Mapping[str, torch.Tensor], *, exclude: Sequence[str] = ()) -> None:
    """Zero the weights that `masks` prunes, in place, and attach the masks.

    masks    {module path: (N, K) bool}; the names must be those of `maskable_linears(model, exclude)`, and may be
             those of layers that stay dense unless a mask of an earlier version names them (routers).
    exclude  the patterns of layers that were left dense on purpose.
    Everything is checked before the first weight changes; raises ValueError or TypeError. A pruned value is
    selected away, not multiplied by zero, so an infinite one does not become NaN.
    """
    linears = check_keep_masks(model, masks, exclude)
    for name, linear in linears.items():
        set_keep_mask(linear, masks[name])
        linear.weight.masked_fill_(~keep_mask_of(linear), 0)


def check_keep_masks(
    model: nn.Module, masks: Mapping[str, torch.Tensor], exclude: Sequence[str] = ()
) -> dict[str, nn.Linear]:
    """The layers of `maskable_linears(model, exclude)`; raises unless `masks` has a fitting mask for each.

    Layers that a mask of an earlier version names although they stay dense now (routers) are among them.
    """
    linears = maskable_linears(model, exclude)
    stay_dense = block_linears(model).keys() - maskable_linears(model).keys()
    linears |= {name: linear_at(model, name) for name in masks if name in stay_dense}
    require_layers(masks, linears, "masks")
    for name, keep in masks.items():
        weight = linears[name].weight
        require_mask(keep, weight.shape, f"layer '{name}'")
        if weight.is_meta:
            got = "got one on the meta device (offloaded)"
            raise ValueError(f"layer '{name}': expected a weight in memory, {got}. Load the model without offloading.")
    return linears


def measured_sparsity(masks: Mapping[str, torch.Tensor]) -> float:
    """Share of pruned weights over all masks together, 0..1, from exact counts."""
    if not masks:
        raise ValueError("expected at least one keep mask, got none. Prune or learn first, or pass keep_masks(model).")
    for name, keep in masks.items():
        require_mask(keep, ("N", "K"), f"layer '{name}'")
    total = sum(keep.numel() for keep in masks.values())
    return sum(pruned_weights(keep) for keep in masks.values()) / total


def pruned_weights(keep: torch.Tensor) -> int:
    """How many weights a mask (N, K) bool prunes."""
    return keep.numel() - _nonzeros([keep])


# Dense models have next to none; a layer with more was pruned before.
_ZEROS_OF_A_DENSE_LAYER = 0.05


def zero_share(*layers: nn.Module) -> float:
    """Share of the weights of layers that are exactly 0, whatever their masks say."""
    weights = [cast(torch.Tensor, layer.weight) for layer in layers]
    return 1 - _nonzeros(weights) / sum(weight.numel() for weight in weights)


def zeros_already(layers: Mapping[str, nn.Module]) -> str | None:
    """What to say of a model that is to be masked and whose layers hold many zeros already, None for a dense one."""
    sparse = [name for name, layer in layers.items() if zero_share(layer) > _ZEROS_OF_A_DENSE_LAYER]
    if not sparse:
        return None
    share = f"{100 * zero_share(*layers.values()):.1f} % of the weights to mask are zero already"
    where = f"in {len(sparse)} of {len(layers)} layers, '{sparse[0]}' for example"
    return f"{share} ({where}): was the model pruned before? New masks count only what they prune themselves."


def other_zeros(masks: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Module]) -> str | None:
    """What to say where the share of zeros in masked layers is not the sparsity of their masks, else None."""
    of_masks, of_weights = measured_sparsity(masks), zero_share(*layers.values())
    if abs(of_masks - of_weights) <= 0.001:
        return None
    return f"sparsity {of_masks:.4f} by the masks, but {of_weights:.4f} of the weights in these layers are 0"


def _nonzeros(tensors: Iterable[torch.Tensor]) -> int:
    # By parts: torch turns what it counts into int64 first, which for a whole mask is 8 times the mask.
    return sum(int(torch.count_nonzero(rows)) for tensor in tensors for rows in tensor.split(1024))


def check_masks_hold(model: nn.Module, masks: Mapping[str, torch.Tensor] | None = None) -> None:
    """Refuse a model whose weights are not zero where keep masks prune: training or merging an adapter can undo that.

    masks  {module path: (N, K) bool}; default those that are attached to the model
    """
    masks = keep_masks(model) if masks is None else masks
    found = {
        name: count for name, keep in masks.items() if (count := _lost_values(linear_at(model, name).weight, keep))
    }
    if found:
        name, count = next(iter(found.items()))
        what = f"expected zeros where the keep mask prunes, got {count} other values"
        what += f" ({sum(found.values())} in {len(found)} layers)" if len(found) > 1 else ""
        advice = "They would be lost: if you agree, apply_keep_masks(model, masks) drops them; else prune these weights"
        raise ValueError(f"{name}: {what}. {advice}, or keep a merged adapter apart.")


def _lost_values(weight: torch.Tensor, keep: torch.Tensor) -> int:
    """How many values that are not zero stand where a mask prunes; by parts, so that temporaries stay small."""
    rows = zip(weight.detach().split(1024), keep.split(1024), strict=True)
    return sum(int(part.ne(0).logical_and_(~kept.to(part.device)).count_nonzero()) for part, kept in rows)
