"""Keep masks attached to layers.

A keep mask is a bool tensor of the weight's shape, True where a weight stays; it lives on its layer as the buffer
`keep_mask` and is never derived from zeros of the weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from patch.models.structure import maskable_linears

_LISTED_NAMES = 5


def set_keep_mask(linear: nn.Linear, keep: torch.Tensor) -> None:
    """Attach `keep` (N, K) bool to a layer as the buffer `keep_mask` (not saved with the state dict).

    The mask is moved to the weight's device, not copied when it is there already. The weight is not changed.
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(
            f"set_keep_mask expected an nn.Linear, got {type(linear).__name__}. Convert packed layers back first."
        )
    _check_keep(keep, linear, "the layer")
    linear.register_buffer("keep_mask", keep.to(linear.weight.device), persistent=False)


def keep_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """The keep masks attached to the model's `nn.Linear` layers, {module path: (N, K) bool}; may be {}."""
    return {
        name: module.keep_mask
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
        linear.weight.masked_fill_(~linear.keep_mask, 0)


def check_keep_masks(
    model: nn.Module, masks: Mapping[str, torch.Tensor], exclude: Sequence[str] = ()
) -> dict[str, nn.Linear]:
    """The layers of `maskable_linears(model, exclude)`; raises unless `masks` has a fitting mask for each."""
    linears = maskable_linears(model, exclude)
    missing = [name for name in linears if name not in masks]
    extra = [name for name in masks if name not in linears]
    if missing or extra:
        raise ValueError(
            f"expected one keep mask for each of the {len(linears)} maskable layers, got {len(masks)} masks: "
            f"missing {_listed(missing)}; not in the model {_listed(extra)}. Use the masks of this model, "
            "and name layers that stay dense in exclude."
        )
    for name, keep in masks.items():
        _check_keep(keep, linears[name], f"layer '{name}'")
    return linears


def measured_sparsity(masks: Mapping[str, torch.Tensor]) -> float:
    """Share of pruned weights over all masks together, 0..1, from exact counts."""
    if not masks:
        raise ValueError("expected at least one keep mask, got none. Prune or learn first, or pass keep_masks(model).")
    for name, keep in masks.items():
        if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool:
            raise TypeError(f"expected bool keep masks, got {_kind(keep)} for '{name}'. Use keep.bool().")
    total = sum(keep.numel() for keep in masks.values())
    # By parts: torch turns what it counts into int64 first, which for a whole mask is 8 times the mask.
    kept = sum(int(torch.count_nonzero(rows)) for keep in masks.values() for rows in keep.split(1024))
    return 1 - kept / total


def _check_keep(keep: torch.Tensor, linear: nn.Linear, label: str) -> None:
    if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool:
        raise TypeError(
            f"expected a bool keep mask for {label}, got {_kind(keep)}. Pass an explicit mask, True where a "
            "weight stays."
        )
    if keep.shape != linear.weight.shape:
        raise ValueError(
            f"expected a keep mask of shape {tuple(linear.weight.shape)} for {label}, got "
            f"{tuple(keep.shape)}. The mask belongs to another model or layer."
        )


def _kind(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED_NAMES])
    return f"{len(names)} ({shown}{', ...' if len(names) > _LISTED_NAMES else ''})" if names else "0"


def check_masks_hold(model: nn.Module) -> None:
    """Refuse a model whose weights no longer obey the keep masks attached to it (training can undo "
    "pruning)."""
    modules = dict(model.named_modules())
    for name, keep in keep_masks(model).items():
        violations = int((modules[name].weight.detach().ne(0) & ~keep).sum())
        if violations:
            raise ValueError(
                f"{name}: expected zeros where the keep mask prunes, got {violations} other values; apply "
                "the masks "
                "again with patch.models.apply_keep_masks"
            )
