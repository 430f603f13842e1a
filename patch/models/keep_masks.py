"""Keep masks attached to layers.

A keep mask is a bool tensor of the weight's shape, True where a weight stays; it lives on its layer as the buffer
`keep_mask` and is never derived from zeros of the weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from patch.models.checks import require_layers, require_mask
from patch.models.structure import maskable_linears


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

    masks    {module path: (N, K) bool}; the names must be those of `maskable_linears(model, exclude)`.
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
    """The layers of `maskable_linears(model, exclude)`; raises unless `masks` has a fitting mask for each."""
    linears = maskable_linears(model, exclude)
    require_layers(masks, linears, "masks")
    for name, keep in masks.items():
        require_mask(keep, linears[name].weight.shape, f"layer '{name}'")
    return linears


def measured_sparsity(masks: Mapping[str, torch.Tensor]) -> float:
    """Share of pruned weights over all masks together, 0..1, from exact counts."""
    if not masks:
        raise ValueError("expected at least one keep mask, got none. Prune or learn first, or pass keep_masks(model).")
    for name, keep in masks.items():
        require_mask(keep, ("N", "K"), f"layer '{name}'")
    total = sum(keep.numel() for keep in masks.values())
    return 1 - _nonzeros(masks.values()) / total


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


def sparsity_text(masks: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Module]) -> str:
    """The sparsity of the masks, and the share of zeros in the masked layers where that is another one."""
    of_masks, of_weights = measured_sparsity(masks), zero_share(*layers.values())
    if abs(of_masks - of_weights) <= 0.001:
        return f"sparsity {of_masks:.4f}"
    return f"sparsity {of_masks:.4f} by the masks, but {of_weights:.4f} of the weights are 0"


def _nonzeros(tensors: Iterable[torch.Tensor]) -> int:
    # By parts: torch turns what it counts into int64 first, which for a whole mask is 8 times the mask.
    return sum(int(torch.count_nonzero(rows)) for tensor in tensors for rows in tensor.split(1024))


def check_masks_hold(model: nn.Module) -> None:
    """Refuse a model whose weights no longer obey the keep masks attached to it (training can undo pruning)."""
    modules = dict(model.named_modules())
    for name, keep in keep_masks(model).items():
        if violations := int((modules[name].weight.detach().ne(0) & ~keep).sum()):
            where = f"{name}: expected zeros where the keep mask prunes"
            raise ValueError(f"{where}, got {violations} other values; apply the masks again with apply_keep_masks")
