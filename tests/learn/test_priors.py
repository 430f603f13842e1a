"""patch.priors: values by hand, never NaN, order of ties, bad input."""

from __future__ import annotations

import pytest
import torch

from patch.mask import PATTERNS, harden
from patch.priors import NOMINAL_STD, chosen_tile_prior, pattern_prior, tile_prior, tile_scores

RAW = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) * 0.014
KEEP = PATTERNS.reshape(2, 12)  # group g keeps pattern g


def test_pattern_prior_values():
    prior = pattern_prior(RAW, KEEP, 3.0, std=0.5, mode="overwrite")
    expected = torch.zeros(6, 6)
    for group in range(6):
        expected[group, group] = 1.5
        expected[group, 5 - group] = -1.5  # 1100 and 0011 and so on are complements
    assert torch.equal(prior, expected)
    assert torch.equal(pattern_prior(RAW, KEEP, 3.0, std=0.5), RAW + expected)


def test_pattern_prior_uses_the_sample_deviation_and_makes_the_mask_win():
    prior = pattern_prior(RAW, KEEP, 3.0, mode="overwrite")
    assert prior[0, 0].item() == pytest.approx(3 * RAW.std().item(), rel=1e-6)
    keep, _ = harden(pattern_prior(RAW, KEEP, 30.0), None, (2, 12), (2, 12))
    assert torch.equal(keep, KEEP)


def test_pattern_prior_uses_the_mask_not_zeros_and_counts_overlap_of_other_masks():
    one_kept = torch.tensor([[True, False, False, False]])
    prior = pattern_prior(torch.zeros(1, 6), one_kept, 1.0, std=1.0, mode="overwrite")
    assert prior.tolist() == [[0.0, 0.0, 0.0, -1.0, -1.0, -1.0]]


@pytest.mark.parametrize("mode", ["add", "overwrite"])
def test_strength_zero_keeps_the_draw(mode):
    assert torch.equal(pattern_prior(RAW, KEEP, 0.0, mode=mode), RAW)
    assert torch.equal(tile_prior(RAW, RAW, 0.55, 0.0), RAW)


def test_inputs_are_not_changed():
    before = RAW.clone()
    pattern_prior(RAW, KEEP, 3.0)
    tile_prior(RAW, RAW.abs(), 0.7, 3.0)
    assert torch.equal(RAW, before)


@pytest.mark.parametrize("raw", [torch.tensor([[0.01]]), torch.zeros(1, 1), torch.zeros(2, 2)])
def test_undefined_deviation_falls_back_to_the_nominal_one(raw):
    """torch.std of one value is NaN, and a zero deviation would switch the prior off silently."""
    logits = tile_prior(raw, torch.ones_like(raw), 1.0, 3.0)
    torch.testing.assert_close(logits, raw + 3 * NOMINAL_STD)


@pytest.mark.parametrize(("density", "dense"), [(0.5, 0), (0.55, 1), (0.625, 2), (0.65, 2), (0.75, 4), (1.0, 8)])
def test_tile_prior_marks_the_best_tiles_for_the_density(density, dense):
    # round(2 * 8 * (density - 0.5)) with half to even, as in the published code.
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.3, 0.2, 0.8, 0.4]])
    logits = tile_prior(torch.zeros(2, 4), scores, density, 2.0, std=0.5)
    expected = torch.full((8,), -1.0)
    expected[[1, 6, 3, 2, 7, 4, 5, 0][:dense]] = 1.0
    assert torch.equal(logits, expected.reshape(2, 4))


def test_tile_prior_adds_to_the_draw_and_breaks_ties_in_row_major_order():
    logits = tile_prior(RAW, torch.ones(6, 6), 0.75, 3.0, std=1.0)
    assert ((logits - RAW).flatten()[:18] > 0).all()
    assert ((logits - RAW).flatten()[18:] < 0).all()


def test_chosen_tiles_get_the_same_shift_as_the_best_scored_ones():
    dense = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.equal(chosen_tile_prior(torch.zeros(6, 6), dense, 2.0, std=0.5), torch.where(dense, 1.0, -1.0))
    chosen = chosen_tile_prior(RAW, dense, 3.0, std=1.0)
    assert torch.equal(chosen, tile_prior(RAW, dense.float(), 0.5 + 0.5 * dense.float().mean().item(), 3.0, std=1.0))
    assert torch.equal(chosen_tile_prior(RAW, dense, 0.0), RAW)


def test_tile_scores_are_shares_of_the_true_area():
    keep = torch.zeros(3, 10, dtype=torch.bool)
    keep[0, :4] = True
    keep[2] = True
    scores = tile_scores(keep, (2, 8))
    expected = torch.tensor([[4 / 16, 0.0], [1.0, 1.0]])
    assert torch.equal(scores, expected)
    assert scores.dtype == torch.float32


def test_tile_scores_of_an_all_kept_mask_are_one_whatever_the_tile():
    for tile in [(1, 4), (2, 8), (128, 128)]:
        assert (tile_scores(torch.ones(5, 12, dtype=torch.bool), tile) == 1).all()


GRID = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pattern_prior(RAW[:, :5], KEEP, 3.0), r"raw: expected a tensor \(groups, 6\), got .* \(6, 5\)"),
        (lambda: pattern_prior(RAW, KEEP.float(), 3.0), "keep: expected torch.bool .* got torch.float32"),
        (lambda: pattern_prior(RAW, KEEP[:1], 3.0), "6 groups of 4"),
        (lambda: pattern_prior(RAW, KEEP, -1.0), "strength: expected a number >= 0, got -1"),
        (lambda: pattern_prior(RAW, KEEP, float("nan")), "strength: expected a finite number >= 0, got nan"),
        (lambda: pattern_prior(RAW, KEEP, 3.0, mode="replace"), "mode: expected one of add, overwrite, got 'replace'"),
        (lambda: pattern_prior(RAW, KEEP, 3.0, std=0.0), "std: expected a number > 0"),
        (
            lambda: tile_prior(GRID, torch.zeros(2, 3), 0.6, 3.0),
            r"tile_scores: expected a tensor \(2, 2\), got .* \(2, 3\)",
        ),
        (lambda: tile_prior(GRID, GRID, 0.45, 3.0), "density: expected a number >= 0.5 and <= 1, got 0.45"),
        (lambda: tile_prior(GRID, GRID, 55, 3.0), "density: expected .*got 55"),
        (
            lambda: tile_prior(GRID, GRID * float("nan"), 0.6, 3.0),
            "tile_scores: expected finite values, got 4 that are NaN",
        ),
        (lambda: tile_prior(GRID, GRID, 0.6, -3.0), "strength: expected a number >= 0, got -3.0"),
        (lambda: chosen_tile_prior(GRID, GRID, 3.0), "tile_prior, dense: expected torch.bool .* got torch.float32"),
        (
            lambda: chosen_tile_prior(GRID, GRID[:1] > 0, 3.0),
            r"tile_prior, dense: expected .* \(2, 2\), got .* \(1, 2\)",
        ),
        (lambda: chosen_tile_prior(GRID, GRID > 0, -3.0), "strength: expected a number >= 0, got -3.0"),
        (lambda: tile_scores(GRID, (1, 4)), "keep: expected torch.bool"),
        (lambda: tile_scores(KEEP, (0, 4)), r"tile \(rows, columns\): expected two integers >= 1, got \(0, 4\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
