"""Start values of the logits from a one-shot pruned model: pure functions.

The random draw decides nothing important by itself (standard deviation 0.014); the prior adds or subtracts a
few of its standard deviations so that training starts near the one-shot mask and can still leave it.

Source: PATCH (Hourri, Mozaffari, Mehri Dehnavi 2025), initialisation; MaskLLM (Fang et al. 2024), prior
masks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patch.files.schema import require_choice
from patch.mask import tile_areas, tile_counts
from patch_kernels import PATTERNS
from patch_kernels.checks import require_finite, require_number, require_tensor

NOMINAL_STD = 0.014
PRIOR_MODES = ("add", "overwrite")


@torch.no_grad()
def pattern_prior(raw: Tensor, keep: Tensor, strength: float, *, std: float | None = None, mode: str = "add") -> Tensor:
    """2:4 logits that favour a given keep mask: (overlap - 1) * std * strength per pattern.

    raw       (G, 6) random draw.
    keep      (N, K) bool with N*K/4 = G; overlap is the number of kept weights that a pattern keeps too,
              0..2, so the matching pattern gets +std*strength, its complement -std*strength, the other four
              0.
    strength  0 returns raw unchanged.
    std       of the draw; None takes the sample's (NOMINAL_STD where that is undefined or zero).
    mode      "add" keeps the draw under the prior and so breaks the ties of the four middle patterns
              (MaskLLM's code); "overwrite" replaces it (the published PATCH code).
    raises    ValueError for shapes that do not match, a non-bool mask, a negative strength, an unknown mode.
    """
    require_tensor("pattern_prior, raw", raw, shape=("groups", 6), advice="Draw logits per group.")
    _check_keep("pattern_prior", keep)
    if keep.numel() != 4 * raw.shape[0] or keep.shape[1] % 4:
        got = f"expected {raw.shape[0]} groups of 4, got shape {tuple(keep.shape)}"
        raise ValueError(f"pattern_prior, keep: {got}. Mask and logits must belong to the same layer.")
    require_choice("pattern_prior, mode", mode, PRIOR_MODES)
    _check_strength("pattern_prior", strength)
    if strength == 0:
        return raw.clone()
    patterns = PATTERNS.to(raw.device, raw.dtype)
    overlap = keep.reshape(-1, 4).to(raw.device, raw.dtype) @ patterns.T
    prior = (overlap - 1) * (_deviation(raw, std) * strength)
    return raw + prior if mode == "add" else prior


@torch.no_grad()
def tile_prior(
    raw: Tensor, tile_scores: Tensor, density: float, strength: float, *, std: float | None = None
) -> Tensor:
    """Tile logits that favour the tiles in which an unstructured mask kept most: raw +- std * strength.

    raw          (rows, cols) random draw.
    tile_scores  (rows, cols) share of kept weights per tile (see tile_scores).
    density      target share of nonzeros, 0.5..1. The best round(2 * tiles * (density - 0.5)) tiles get +,
                 the others -: a layer whose share f of tiles is dense has density 0.5 + 0.5 f. Equal scores:
                 row-major.
    strength, std  as in pattern_prior.
    raises       ValueError for shapes that differ, a density outside 0.5..1, a negative strength, NaN scores.
    """
    require_tensor("tile_prior, raw", raw, shape=("rows", "cols"), advice="Draw logits per tile.")
    require_tensor("tile_prior, tile_scores", tile_scores, shape=raw.shape, advice="Use the same tile size for both.")
    advice = "Dense and 2:4 tiles reach densities of 0.5 to 1, which are sparsities of 0.5 to 0."
    require_number("tile_prior, density", density, ge=0.5, le=1, advice=advice)
    _check_strength("tile_prior", strength)
    require_finite("tile_prior, tile_scores", tile_scores, "Compute them again from a keep mask.")
    order = torch.argsort(tile_scores.flatten(), descending=True, stable=True)
    dense = torch.zeros(raw.numel(), dtype=torch.bool, device=raw.device)
    dense[order[: round(2 * raw.numel() * (density - 0.5))].to(raw.device)] = True
    return chosen_tile_prior(raw, dense.reshape(raw.shape), strength, std=std)


@torch.no_grad()
def chosen_tile_prior(raw: Tensor, dense: Tensor, strength: float, *, std: float | None = None) -> Tensor:
    """Tile logits that favour given dense tiles, such as a choice over the whole model: raw +- std * strength.

    raw            (rows, cols) random draw.
    dense          (rows, cols) bool, True for +.
    strength, std  as in pattern_prior.
    raises         ValueError for shapes that differ, a grid that is not bool, a negative strength.
    """
    require_tensor("tile_prior, raw", raw, shape=("rows", "cols"), advice="Draw logits per tile.")
    advice = "Use the same tile size for both."
    require_tensor("tile_prior, dense", dense, dtypes=(torch.bool,), shape=raw.shape, advice=advice)
    _check_strength("tile_prior", strength)
    if strength == 0:
        return raw.clone()
    return raw + (2 * dense.to(raw) - 1) * (_deviation(raw, std) * strength)


@torch.no_grad()
def tile_scores(keep: Tensor, tile: tuple[int, int]) -> Tensor:
    """Share of kept weights per tile of a bool (N, K) mask: float32 (rows, cols), edge tiles by true area."""
    _check_keep("tile_scores", keep)
    areas = tile_areas(tile, (keep.shape[0], keep.shape[1])).to(keep.device)
    return (tile_counts(keep, tile).double() / areas).float()


def _deviation(raw: Tensor, std: float | None) -> float:
    """The given standard deviation, else the sample's; a single value has none (torch.std is NaN)."""
    if std is not None:
        require_number("std", std, gt=0, advice="Leave it out to use the sample's.")
        return std
    if raw.numel() < 2:
        return NOMINAL_STD
    deviation = float(raw.double().std())
    return deviation if deviation > 0 and math.isfinite(deviation) else NOMINAL_STD


def _check_keep(what: str, keep: Tensor) -> None:
    advice = "Masks are explicit, never inferred from zeros of a weight."
    require_tensor(f"{what}, keep", keep, dtypes=(torch.bool,), shape=("N", "K"), advice=advice)


def _check_strength(what: str, strength: float) -> None:
    require_number(f"{what}, strength", strength, ge=0, advice="0 switches the prior off.")
