"""Weight quantisation of SLiM, simulated: integer codes with scales, and the weight they stand for.

A weight w becomes the code clamp(round(w * scale), -2^(q-1), 2^(q-1) - 1) of q bits and is read back as
code / scale. What differs is where the scale comes from: the largest |w| of the matrix or of a group
(AbsMax), or a clipping value alpha < max |w| that costs less on the whole (SLiM-Quant).
Source: Mozaffari, Yazdanbakhsh, Mehri Dehnavi, "SLiM: One-shot Quantization and Sparsity with Low-rank
Approximation for LLM Weight Compression", 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patch.pruning.selection import working_dtype
from patch.slim.options import Grid, check_groups
from patch_kernels.checks import FLOATS, require_tensor

_LEAST_BINS, _MOST_BINS, _WEIGHTS_PER_BIN = 512, 20_000, 1000
# SLiM scales up the one percent of input channels that matter most. The factor is AWQ's middle ground.
_IMPORTANT_SHARE, _IMPORTANT_FACTOR = 100, 2.0
# Parts of a group's largest weight at which it may be clipped; below a third no rounding is ever cheaper.
_CLIPPED_PARTS = tuple(part / 40 for part in range(39, 13, -1))


@dataclass(frozen=True)
class Quantized:
    """A quantised weight: `codes / (scale of the entry) / (factor of the column)`.

    weight          (N, K) dequantised, dtype of the original, exactly 0 where pruned
    codes           (N, K) int8
    scale           fp32 (fp64 for fp64 weights), codes per unit of weight: (1, 1) for one per matrix,
                    (N, K / block) for groups along a row, (N / block, K) for groups along a column
    column_factor   (K,) what a column was multiplied by before rounding, or None
    """

    weight: Tensor
    codes: Tensor
    scale: Tensor
    column_factor: Tensor | None = None


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    keep: Tensor | None = None,
    *,
    bits: int = 4,
    clip: bool = True,
    block: int | None = None,
    along_rows: bool = False,
    column_factor: Tensor | None = None,
    search: bool = False,
) -> Quantized:
    """Quantise weight (N, K); nothing is changed in place.

    keep           (N, K) bool, True where a weight stays; others are 0 before and after and have no part in the
                   scales. None: all stay.
    bits           q, 2 to 8
    clip           SLiM-Quant for the whole matrix; False: its AbsMax. Groups use their AbsMax, but for `search`.
    block          length of a group, None for one scale per matrix: groups of `block` consecutive entries of a
                   row (along_rows) or of a column, which it must divide
    column_factor  (K,) from `important_columns`
    search         with block: clip each group at the part of its AbsMax, from 1 to 0.35 in steps of 0.025, that has
                   the least squared error
    A matrix or group of zeros has scale 1. Scores and scales are fp32 (fp64 for fp64 weights).
    raises         ValueError or TypeError before any work.
    """
    check_matrix(weight, keep)
    Grid(bits, block)  # refuses other numbers
    if block is not None:
        check_groups(tuple(weight.shape), block, along_rows, "weight")
    elif search:
        advice = "Pass block, or clip=True for the whole matrix."
        raise ValueError(f"search: expected a group size as block as well, got None. {advice}")
    kept = weight.detach().to(working_dtype(weight))
    if keep is not None:
        kept = kept.masked_fill(~keep, 0)
    if column_factor is not None:
        kept = kept * column_factor.to(kept)
    groups = _grouped(kept, block, along_rows)
    if block is None and clip:
        limit = clipping_value(kept if keep is None else kept[keep], bits).reshape(1, 1)
    else:
        limit = groups.abs().amax(dim=_axis(block, along_rows), keepdim=True)
        if search:
            limit = _searched_limit(groups, limit, bits, _axis(block, along_rows))
    scale, rounded = _rounded(groups, limit, bits)
    restored = (rounded / scale).reshape(kept.shape)
    if column_factor is not None:
        restored = restored / column_factor.to(restored)
    if keep is not None:
        restored = restored.masked_fill(~keep, 0)  # -0.0 of a scaled zero would be another bit pattern
    if block is not None:
        scale = scale.squeeze(2 if along_rows else 1)
    return Quantized(
        restored.to(weight.dtype), rounded.reshape(kept.shape).to(torch.int8), scale.contiguous(), column_factor
    )


def clipping_value(values: Tensor, bits: int) -> Tensor:
    """SLiM-Quant's alpha (scalar, dtype of values) for these weights of any shape; 0 if all are 0.

    Of the centres v of a histogram of |w| with densities f and bin width dx, the one with the least
        sum over v_j < alpha of f_j (v_j - floor(v_j / delta) delta)^2 + sum over the others of f_j (v_j - alpha)^2
    with delta = alpha / 2^q: in every tenth of the range first, then in all bins around the best of these.

    This is the published code's estimate. The paper rounds to the nearest of 2^(q-1) steps, which is what
    quantize_weight does; both expect the same error: delta^2 / 3 for a floor with delta = alpha / 2^q and
    (2 delta)^2 / 12 for rounding to steps twice as long.
    """
    magnitudes = values.detach().abs().flatten()
    if magnitudes.numel() == 0 or not magnitudes.any():
        return magnitudes.new_zeros(())
    bins = max(_LEAST_BINS, min(magnitudes.numel() // _WEIGHTS_PER_BIN, _MOST_BINS))
    low, high = magnitudes.min().item(), magnitudes.max().item()
    if low == high:  # no histogram: every weight is +-high
        return magnitudes.max()
    density = torch.histc(magnitudes, bins, low, high).double().cpu()
    width = (high - low) / bins
    centres = low + (torch.arange(bins, dtype=torch.float64) + 0.5) * width

    def best(candidates: range) -> int:
        errors = torch.stack([_clipping_error(density, centres, i, bits) for i in candidates])
        return candidates[int(errors.argmin())]

    step = bins // 10
    coarse = best(range(0, bins, step))
    fine = best(range(max(0, coarse - step), min(bins, coarse + step + 1)))
    return magnitudes.new_tensor(centres[fine].item())


def important_columns(weight: Tensor, energy: Tensor) -> Tensor:
    """Factor (K,) of every column before rounding: 2 for the 1 % that matter most, at least one, else 1.

    They have the largest input energy (K,) times sum of |weight| over the rows; a factor of 2 halves their
    rounding error as long as they do not set the scale (the idea of AWQ). The scales are those of the scaled
    weight, so no weight is clipped because of it.
    """
    score = energy * weight.detach().to(energy).abs().sum(0)
    factor = torch.ones_like(score)
    factor[score.topk(max(1, score.numel() // _IMPORTANT_SHARE)).indices] = _IMPORTANT_FACTOR
    return factor


def _rounded(groups: Tensor, limit: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scales, codes) of groups whose largest code stands for `limit`, which broadcasts to them."""
    # A tensor divided by a tensor: number / tensor is a product with the reciprocal, one rounding more.
    scale = torch.full_like(limit, 2 ** (bits - 1) - 1) / limit
    scale = scale.masked_fill(~scale.isfinite(), 1)  # all zeros, or too small for the reciprocal
    return scale, (groups * scale).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _searched_limit(groups: Tensor, largest: Tensor, bits: int, axis: int | tuple[int, int]) -> Tensor:
    """The limit of each group with the least squared error; of equal ones the largest."""

    def error(limit: Tensor) -> Tensor:
        scale, rounded = _rounded(groups, limit, bits)
        return (rounded / scale - groups).square().sum(dim=axis, keepdim=True)

    best, least = largest, error(largest)
    for part in _CLIPPED_PARTS:
        limit = largest * part
        new = error(limit)
        best, least = torch.where(new < least, limit, best), torch.minimum(new, least)
    return best


def _clipping_error(density: Tensor, centres: Tensor, index: int, bits: int) -> Tensor:
    alpha = centres[index]
    delta = alpha / 2**bits
    below, above = centres[:index], centres[index:]
    rounding = below - torch.floor(below / delta) * delta
    return (density[:index] * rounding**2).sum() + (density[index:] * (above - alpha) ** 2).sum()


def _grouped(weight: Tensor, block: int | None, along_rows: bool) -> Tensor:
    """The weight as a view in which a group is one axis."""
    if block is None:
        return weight
    rows, columns = weight.shape
    return (
        weight.reshape(rows, columns // block, block) if along_rows else weight.reshape(rows // block, block, columns)
    )


def _axis(block: int | None, along_rows: bool) -> int | tuple[int, int]:
    return (0, 1) if block is None else 2 if along_rows else 1


def check_matrix(weight: Tensor, keep: Tensor | None) -> None:
    """Refuse what is no weight (N, K), and a mask that is not of its shape."""
    advice = "Pass a Linear's weight."
    require_tensor("weight", weight, dtypes=FLOATS, shape=("N", "K"), advice=advice, error=TypeError)
    if keep is not None:
        advice = "Pass the layer's own mask."
        require_tensor("keep", keep, dtypes=(torch.bool,), shape=weight.shape, advice=advice, error=TypeError)
