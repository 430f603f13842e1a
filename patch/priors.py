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

from patch.mask import tile_areas, tile_counts
from patch_kernels import PATTERNS

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
    if raw.dim() != 2 or raw.shape[1] != 6:
        raise ValueError(f"pattern_prior: expected raw logits (groups, 6), got {tuple(raw.shape)}; draw them per group")
    _check_keep("pattern_prior", keep)
    if keep.numel() != 4 * raw.shape[0] or keep.shape[1] % 4:
        raise ValueError(
            f"pattern_prior: expected a keep mask of {raw.shape[0]} groups of 4, got shape "
            f"{tuple(keep.shape)}; mask and logits must belong to the same layer"
        )
    if mode not in PRIOR_MODES:
        raise ValueError(f"pattern_prior: expected mode 'add' or 'overwrite', got {mode!r}; use 'add'")
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
    if raw.dim() != 2 or tile_scores.shape != raw.shape:
        raise ValueError(
            f"tile_prior: expected scores of the logits' shape {tuple(raw.shape)}, got "
            f"{tuple(tile_scores.shape)}; compute them with the same tile size"
        )
    if not 0.5 <= density <= 1:
        raise ValueError(
            f"tile_prior: expected a density of 0.5 to 1 (sparsity 0 to 0.5), got {density}; dense and 2:4 "
            "tiles cannot reach another"
        )
    _check_strength("tile_prior", strength)
    if tile_scores.isnan().any():
        raise ValueError("tile_prior: expected finite tile scores, got NaN; compute them again from a keep mask")
    if strength == 0:
        return raw.clone()
    dense_tiles = round(2 * raw.numel() * (density - 0.5))
    order = torch.argsort(tile_scores.flatten(), descending=True, stable=True)
    sign = torch.full((raw.numel(),), -1.0, dtype=raw.dtype, device=raw.device)
    sign[order[:dense_tiles].to(raw.device)] = 1.0
    return raw + sign.reshape(raw.shape) * (_deviation(raw, std) * strength)


@torch.no_grad()
def tile_scores(keep: Tensor, tile: tuple[int, int]) -> Tensor:
    """Share of kept weights per tile of a bool (N, K) mask: float32 (rows, cols), edge tiles by true area."""
    _check_keep("tile_scores", keep)
    areas = tile_areas(tile, (keep.shape[0], keep.shape[1])).to(keep.device)
    return (tile_counts(keep, tile).double() / areas).float()


def _deviation(raw: Tensor, std: float | None) -> float:
    """The given standard deviation, else the sample's; a single value has none (torch.std is NaN)."""
    if std is not None:
        if not std > 0 or not math.isfinite(std):
            raise ValueError(f"std: expected a finite number > 0, got {std}; leave it out to use the sample's")
        return std
    if raw.numel() < 2:
        return NOMINAL_STD
    deviation = float(raw.double().std())
    return deviation if deviation > 0 and math.isfinite(deviation) else NOMINAL_STD


def _check_keep(what: str, keep: Tensor) -> None:
    if keep.dtype != torch.bool or keep.dim() != 2:
        raise ValueError(
            f"{what}: expected a bool (N, K) keep mask, got {keep.dtype} {tuple(keep.shape)}; masks are "
            "explicit, never inferred from zeros of a weight"
        )


def _check_strength(what: str, strength: float) -> None:
    if not strength >= 0 or not math.isfinite(strength):
        raise ValueError(f"{what}: expected a strength >= 0, got {strength}; 0 switches the prior off")
