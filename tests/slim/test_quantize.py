"""Quantisation of kept weights against float64 NumPy references written from the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patch.pruning.selection import keep_two_of_four
from patch.slim.quantize import clipping_value, important_columns, quantize_weight


def heavy_tailed(rows, columns, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return (draw * draw.abs()).to(dtype)


def kept_of(weight):
    return keep_two_of_four(weight.abs())


def absmax_reference(weight, scale, bits):
    """codes and weight, from the formula."""
    codes = np.clip(np.round(weight * scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes, codes / scale


def alpha_reference(values, bits):
    """SLiM-Quant's clipping value by plain loops."""
    w = np.abs(values.ravel())
    bins = max(512, min(w.size // 1000, 20000))
    density, edges = np.histogram(w, bins=bins, density=True)
    centre, dx = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]

    def error(i):
        alpha = centre[i]
        delta = alpha / 2**bits
        total = 0.0
        for j in range(bins):
            cost = (centre[j] - np.floor(centre[j] / delta) * delta) if j < i else (centre[j] - alpha)
            total += density[j] * cost**2
        return dx * total

    step = bins // 10
    coarse = min(range(0, bins, step), key=error)
    return centre[min(range(max(0, coarse - step), min(bins, coarse + step + 1)), key=error)]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_absmax_per_matrix(bits, masked):
    weight = heavy_tailed(24, 32)
    keep = kept_of(weight) if masked else None
    made = quantize_weight(weight, keep, bits=bits, clip=False)
    kept = (weight if keep is None else weight * keep).numpy()
    scale = (2 ** (bits - 1) - 1) / np.abs(kept).max()
    codes, expected = absmax_reference(kept, scale, bits)
    assert made.codes.dtype == torch.int8 and np.array_equal(made.codes.numpy(), codes)
    np.testing.assert_array_equal(made.weight.numpy(), expected)
    assert made.scale.shape == (1, 1) and made.scale.item() == scale


@pytest.mark.parametrize("along_rows", [True, False])
def test_absmax_per_group(along_rows):
    weight = heavy_tailed(24, 32)
    keep = kept_of(weight)
    made = quantize_weight(weight, keep, block=8, along_rows=along_rows)
    kept = (weight * keep).numpy()
    expected = np.empty_like(kept)
    for row in range(24):
        for column in range(32):
            block = kept[row, column // 8 * 8 :][:8] if along_rows else kept[row // 8 * 8 :, column][:8]
            scale = 7 / np.abs(block).max()
            expected[row, column] = absmax_reference(kept[row, column], scale, 4)[1]
    np.testing.assert_array_equal(made.weight.numpy(), expected)
    assert made.scale.shape == ((24, 4) if along_rows else (3, 32))


@pytest.mark.parametrize("along_rows", [True, False])
def test_searched_groups_have_the_cheapest_part_of_their_largest_weight(along_rows):
    weight, bits = heavy_tailed(16, 32), 3
    keep = kept_of(weight)
    made = quantize_weight(weight, keep, bits=bits, block=16, along_rows=along_rows, search=True)
    scale = made.scale.repeat_interleave(16, 1 if along_rows else 0)
    assert torch.equal(made.weight, (made.codes / scale).masked_fill(~keep, 0))
    group = (slice(0, 1), slice(0, 16)) if along_rows else (slice(0, 16), slice(0, 1))
    kept = weight.masked_fill(~keep, 0)[group]
    errors = {}
    for part in range(40, 13, -1):
        scale = 3 / (kept.abs().max() * (part / 40))
        errors[part] = float(((kept * scale).round().clamp(-4, 3) / scale - kept).square().sum())
    best = min(errors, key=errors.__getitem__)
    assert best < 40
    assert float(made.scale[0, 0]) == float(3 / (kept.abs().max() * (best / 40)))
    plain = quantize_weight(weight, keep, bits=bits, block=16, along_rows=along_rows)
    assert (made.weight - weight)[keep].norm() < (plain.weight - weight)[keep].norm()


@pytest.mark.parametrize("bits", [3, 4])
def test_clipping_value_is_that_of_the_reference(bits):
    weight = heavy_tailed(64, 96)
    keep = kept_of(weight)
    expected = alpha_reference(weight[keep].numpy(), bits)
    assert clipping_value(weight[keep], bits).item() == pytest.approx(expected, rel=1e-12)
    made = quantize_weight(weight, keep, bits=bits)
    assert made.scale.item() == pytest.approx((2 ** (bits - 1) - 1) / expected, rel=1e-12)
    assert expected < weight.abs().max().item()  # something is clipped, or AbsMax would do


def test_clipping_value_in_single_precision():
    weight = heavy_tailed(64, 96, dtype=torch.float32)
    expected = alpha_reference(weight.double().numpy(), 4)
    assert clipping_value(weight, 4).item() == pytest.approx(expected, rel=1e-6)


def test_clipping_costs_less_than_the_largest_weight_where_tails_are_heavy():
    weight = heavy_tailed(64, 96)
    errors = [(quantize_weight(weight, clip=clip).weight - weight).square().sum() for clip in (True, False)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", [{}, {"clip": False}, {"block": 16}, {"block": 16, "along_rows": True}])
def test_zeros_stay_zero_and_values_are_few(dtype, setting):
    weight = heavy_tailed(32, 64, dtype=dtype)
    keep = kept_of(weight)
    weight[~keep] = float("inf")  # what is pruned has no part in anything
    made = quantize_weight(weight, keep, **setting)
    assert made.weight.dtype == dtype and not made.weight[~keep].any() and not made.codes[~keep].any()
    assert not torch.signbit(made.weight[~keep]).any()
    assert made.weight.isfinite().all()
    if "block" not in setting:
        assert made.weight.unique().numel() <= 16
    assert made.scale.dtype == torch.float32


def test_a_matrix_or_group_of_zeros_and_one_of_equal_weights():
    zeros = torch.zeros(4, 8)
    for setting in ({}, {"clip": False}, {"block": 4}):
        made = quantize_weight(zeros, **setting)
        assert not made.weight.any() and torch.equal(made.scale, torch.ones_like(made.scale))
    equal = torch.full((4, 8), 0.5) * torch.tensor([1, -1] * 4)
    assert torch.equal(quantize_weight(equal).weight, equal)
    tiny = torch.full((4, 8), 1e-44)  # its reciprocal is infinite
    assert not quantize_weight(tiny, clip=False).weight.any()


def test_important_columns_are_rounded_more_finely():
    weight = heavy_tailed(64, 300)
    energy = torch.ones(300, dtype=torch.float64)
    energy[[5, 17, 200]] = 1e6
    factor = important_columns(weight, energy)
    assert factor.nonzero().numel() == 300 and (factor == 2).nonzero().flatten().tolist() == [5, 17, 200]
    plain, scaled = (quantize_weight(weight, clip=False, column_factor=f) for f in (None, factor))
    limit = max(weight.abs().max().item(), 2 * weight[:, [5, 17, 200]].abs().max().item())
    assert scaled.scale.item() == 7 / limit
    _, expected = absmax_reference((weight * factor).numpy(), 7 / limit, 4)
    np.testing.assert_array_equal(scaled.weight.numpy(), expected / factor.numpy())
    columns = factor == 2
    lost = [(made.weight - weight)[:, columns].square().sum() for made in (plain, scaled)]
    assert lost[1] < lost[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": torch.ones(4)}, ValueError, r"weight: expected torch.float16 .* \(N, K\), got .* \(4,\)"),
        ({"weight": torch.ones(4, 4, dtype=torch.int8)}, TypeError, "weight: expected .* got torch.int8"),
        ({"keep": torch.ones(4, 8)}, TypeError, r"keep: expected torch.bool \(4, 8\), got torch.float32"),
        ({"keep": torch.ones(4, 4, dtype=torch.bool)}, ValueError, r"keep: expected .* got torch.bool \(4, 4\)"),
        ({"bits": 1}, ValueError, "bitwidth: expected 2 to 8 bits, got 1. The usual number is 4"),
        ({"bits": 4.0}, ValueError, "bitwidth: expected 2 to 8 bits, got 4.0"),
        ({"block": 0}, ValueError, "block: expected a group size of 1 or more, got 0"),
        ({"block": 3}, ValueError, "weight, rows: expected a multiple of the group size 3, got 4"),
        ({"search": True}, ValueError, "search: expected a group size as block as well, got None. Pass block, or"),
        ({"block": 3, "along_rows": True}, ValueError, "weight, columns: expected a multiple .* 3, got 8"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    values = {"weight": torch.ones(4, 8)} | arguments
    with pytest.raises(error, match=message):
        quantize_weight(values.pop("weight"), values.pop("keep", None), **values)
