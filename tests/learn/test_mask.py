"""patch.mask: sampling against the formulas, hardening, exact budgets, ragged tiles, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from patch.mask import (
    PATTERNS,
    combine,
    exact_budget,
    harden,
    nonzero_budget,
    sample_pattern_mask,
    sample_tile_mask,
    tile_areas,
    tile_counts,
)

SHAPE = (10, 24)  # ragged for every tile below
GROUPS = 60


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gumbel(*shape):
    return -torch.empty(*shape, dtype=torch.float64).exponential_(generator=generator(1)).log()


def pattern_logits(dtype=torch.float64):
    return torch.randn(GROUPS, 6, generator=generator(2), dtype=dtype)


def naive_expand(grid, tile, shape):
    out = torch.empty(shape, dtype=grid.dtype)
    for row in range(shape[0]):
        for column in range(shape[1]):
            out[row, column] = grid[row // tile[0], column // tile[1]]
    return out


def test_patterns_are_the_six_in_the_published_order():
    text = ["".join(str(int(bit)) for bit in row) for row in PATTERNS]
    assert text == ["1100", "1010", "1001", "0110", "0101", "0011"]


def test_pattern_sample_matches_the_formula_and_scales_only_the_logits():
    logits, noise = pattern_logits(), gumbel(GROUPS, 6)
    mask = sample_pattern_mask(logits, SHAPE, temperature=0.7, scale=3.0, noise=noise)
    expected = torch.zeros(GROUPS, 4, dtype=torch.float64)
    for group in range(GROUPS):
        weights = [math.exp((3.0 * logits[group, k] + noise[group, k]) / 0.7) for k in range(6)]
        for k in range(6):
            expected[group] += weights[k] / sum(weights) * PATTERNS[k].double()
    torch.testing.assert_close(mask, expected.reshape(SHAPE), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mask.reshape(-1, 4).sum(1), torch.full((GROUPS,), 2.0).double())


def test_hard_pattern_sample_is_the_best_pattern_with_the_soft_gradient():
    logits, noise = pattern_logits().requires_grad_(), gumbel(GROUPS, 6)
    weight = torch.randn(SHAPE, generator=generator(3), dtype=torch.float64)
    hard = sample_pattern_mask(logits, SHAPE, temperature=0.5, scale=2.0, hard=True, noise=noise)
    best = PATTERNS[(2 * logits + noise).argmax(1)].reshape(SHAPE)
    assert torch.equal(hard.detach(), best.double())
    (hard_gradient,) = torch.autograd.grad((hard * weight).sum(), logits)
    soft = sample_pattern_mask(logits, SHAPE, temperature=0.5, scale=2.0, noise=noise)
    (soft_gradient,) = torch.autograd.grad((soft * weight).sum(), logits)
    torch.testing.assert_close(hard_gradient, soft_gradient)


@pytest.mark.parametrize("tile", [(1, 4), (4, 8), (3, 20), (128, 128)])
def test_tile_sample_matches_the_formula_on_ragged_tiles(tile):
    rows, cols = -(-SHAPE[0] // tile[0]), -(-SHAPE[1] // tile[1])
    logits = torch.randn(rows, cols, generator=generator(4), dtype=torch.float64)
    noise = gumbel(rows, cols) - gumbel(rows, cols).flip(0)
    mask = sample_tile_mask(logits, tile, SHAPE, temperature=0.3, scale=5.0, noise=noise)
    expected = naive_expand(torch.sigmoid((5 * logits + noise) / 0.3), tile, SHAPE)
    torch.testing.assert_close(mask, expected, rtol=0, atol=0)
    hard = sample_tile_mask(logits, tile, SHAPE, temperature=0.3, scale=5.0, noise=noise, hard=True)
    assert torch.equal(hard, naive_expand((5 * logits + noise > 0).double(), tile, SHAPE))


def test_tile_sample_equals_the_two_class_gumbel_softmax():
    logits = torch.randn(3, 3, generator=generator(5), dtype=torch.float64)
    dense, sparse = gumbel(3, 3), gumbel(3, 3).flip(1)
    classes = torch.stack([sparse, 4 * logits + dense], -1) / 0.6
    expected = torch.softmax(classes, -1)[..., 1]
    mask = sample_tile_mask(logits, (4, 8), SHAPE, temperature=0.6, scale=4.0, noise=dense - sparse)
    torch.testing.assert_close(mask, naive_expand(expected, (4, 8), SHAPE))


def test_drawn_noise_has_the_gumbel_and_logistic_law():
    torch.manual_seed(0)
    shape = (400, 400)
    zeros = torch.zeros(40_000, 6)
    hard = sample_pattern_mask(zeros, shape, temperature=1.0, scale=1.0, hard=True)
    # Each position is kept by 3 of 6 equally likely patterns.
    assert abs(hard.reshape(-1, 4).mean(0) - 0.5).max() < 0.01
    logit = torch.full((100, 100), 0.5)
    dense = sample_tile_mask(logit, (4, 4), shape, temperature=1.0, scale=2.0, hard=True)
    # P(logistic > -x) = sigmoid(x): 0.731 for scale * logit = 1; the standard error is 0.0044.
    assert abs(dense[::4, ::4].mean() - 0.7311) < 0.02


def test_gradients_by_finite_differences():
    noise, tile_noise = gumbel(GROUPS, 6), gumbel(3, 3)
    patterns = pattern_logits().requires_grad_()
    tiles = torch.randn(3, 3, generator=generator(6), dtype=torch.float64, requires_grad=True)

    def joint(patterns, tiles):
        pattern = sample_pattern_mask(patterns, SHAPE, temperature=0.8, scale=1.5, noise=noise)
        tile = sample_tile_mask(tiles, (4, 8), SHAPE, temperature=0.8, scale=1.5, noise=tile_noise)
        return combine(tile, pattern)

    assert gradcheck(joint, (patterns, tiles))


@pytest.mark.parametrize("temperature", [4.0, 0.05])
def test_extreme_schedules_give_no_nan_and_16_bit_logits_are_widened(temperature):
    for dtype in (torch.bfloat16, torch.float16):
        mask = sample_pattern_mask((pattern_logits() * 100).to(dtype), SHAPE, temperature=temperature, scale=500.0)
        assert mask.dtype == torch.float32
        assert mask.isfinite().all()


def test_combine():
    m, pattern = torch.tensor([[0.25, 1.0]]), torch.tensor([[0.5, 0.0]])
    assert torch.equal(combine(m, pattern), torch.tensor([[0.625, 1.0]]))
    a, b = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    assert torch.equal(combine(a, b), torch.tensor([[True, True, False]]))
    assert torch.equal(combine(a, b.float()), torch.tensor([[1.0, 1.0, 0.0]]))


def test_harden_takes_argmax_and_strictly_positive_tiles():
    logits = pattern_logits()
    tiles = torch.tensor([[1e-30, 0.0, -0.0], [-1.0, 2.0, -3.0], [0.0, 0.0, 5.0]])
    keep, sparse = harden(logits, tiles, (4, 8), SHAPE)
    assert torch.equal(sparse, tiles <= 0)
    dense = naive_expand(tiles > 0, (4, 8), SHAPE)
    best = PATTERNS[logits.argmax(1)].reshape(SHAPE)
    assert torch.equal(keep, dense | best)
    assert keep.dtype == sparse.dtype == torch.bool


def test_harden_without_tiles_and_with_a_fixed_mask():
    keep, sparse = harden(pattern_logits(), None, (4, 8), SHAPE)
    assert sparse.shape == (3, 3)
    assert sparse.all()
    assert (keep.reshape(-1, 4).sum(1) == 2).all()
    again, _ = harden(keep, torch.full((3, 3), -1.0), (4, 8), SHAPE)
    assert torch.equal(again, keep)
    assert again.data_ptr() != keep.data_ptr()


@pytest.mark.parametrize("seed", range(50))
def test_soft_masks_approach_the_hardened_one(seed):
    """Without noise, at the end of the schedules, the sampled mask is the hardened one."""
    logits = torch.randn(GROUPS, 6, generator=generator(seed))
    tiles = torch.randn(3, 3, generator=generator(seed + 100))
    keep, _ = harden(logits, tiles, (4, 8), SHAPE)
    pattern = sample_pattern_mask(logits, SHAPE, temperature=0.05, scale=500.0, noise=torch.zeros(GROUPS, 6))
    tile = sample_tile_mask(tiles, (4, 8), SHAPE, temperature=0.05, scale=350.0, noise=torch.zeros(3, 3))
    assert torch.equal(combine(tile, pattern) > 0.5, keep)


def test_areas_and_counts_are_true_on_ragged_edges():
    keep = torch.rand(SHAPE, generator=generator(7)) > 0.3
    for tile in [(4, 8), (3, 20), (128, 128), (1, 4)]:
        areas, counts = tile_areas(tile, SHAPE), tile_counts(keep, tile)
        assert int(areas.sum()) == keep.numel()
        for r in range(areas.shape[0]):
            for c in range(areas.shape[1]):
                part = keep[r * tile[0] : (r + 1) * tile[0], c * tile[1] : (c + 1) * tile[1]]
                assert (int(areas[r, c]), int(counts[r, c])) == (part.numel(), int(part.sum()))


@pytest.mark.parametrize("seed", range(40))
def test_exact_budget_is_never_exceeded_and_missed_by_less_than_a_tile(seed):
    shapes, tile = [(10, 24), (16, 16), (5, 8)], (4, 8)
    sparsity = (seed % 11) / 20
    keeps = [harden(torch.randn(n * k // 4, 6, generator=generator(seed)), None, tile, (n, k))[0] for n, k in shapes]
    grids = [tile_areas(tile, shape) for shape in shapes]
    logits = [torch.randn(g.shape, generator=generator(seed + i)).round(decimals=1) for i, g in enumerate(grids)]
    gains = [area - tile_counts(keep, tile) for area, keep in zip(grids, keeps, strict=True)]
    total = sum(n * k for n, k in shapes)
    budget = nonzero_budget(total, sparsity)
    dense = exact_budget(logits, gains, budget - sum(int(keep.sum()) for keep in keeps))
    hard = [harden(k, d.float(), tile, s)[0] for k, d, s in zip(keeps, dense, shapes, strict=True)]
    nonzeros = sum(int(keep.sum()) for keep in hard)
    assert nonzeros <= budget
    assert budget - nonzeros < 32
    chosen = torch.cat([grid[d] for grid, d in zip(logits, dense, strict=True)])
    others = torch.cat([grid[~d] for grid, d in zip(logits, dense, strict=True)])
    if len(chosen) and len(others):
        assert chosen.min() >= others.max()


def test_exact_budget_ends():
    logits, gains = [torch.tensor([[1.0, -5.0]])], [torch.tensor([[8, 8]])]
    assert exact_budget(logits, gains, 0)[0].tolist() == [[False, False]]
    assert exact_budget(logits, gains, 15)[0].tolist() == [[True, False]]
    assert exact_budget(logits, gains, 16)[0].tolist() == [[True, True]]
    assert exact_budget([], [], 3) == []


def test_nonzero_budget_is_not_fooled_by_rounding():
    # 1 - 0.35 is 0.65 and 0.65 * 20 is 13, but 1 - 0.9 style rounding must not lose a weight.
    for total in range(4, 4000, 4):
        for percent in range(0, 51):
            assert nonzero_budget(total, percent / 100) == total * (100 - percent) // 100


LOGITS, TILES = torch.zeros(GROUPS, 6), torch.zeros(3, 3)
KEEP = torch.ones(SHAPE, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sample_pattern_mask(LOGITS, (10, 25), temperature=1, scale=1),
            "columns of the weight: expected a multiple of 4, got 2[56]",
        ),
        (
            lambda: sample_pattern_mask(LOGITS[:-1], SHAPE, temperature=1, scale=1),
            r"expected a tensor \(60, 6\)",
        ),
        (
            lambda: sample_pattern_mask(LOGITS, SHAPE, temperature=0, scale=1),
            "temperature: expected .* > 0, got 0",
        ),
        (
            lambda: sample_pattern_mask(LOGITS, SHAPE, temperature=float("nan"), scale=1),
            "temperature: expected .* got nan",
        ),
        (
            lambda: sample_pattern_mask(LOGITS, SHAPE, temperature=1, scale=1, noise=LOGITS[1:]),
            "pattern noise: expected a tensor",
        ),
        (
            lambda: sample_pattern_mask(LOGITS, (240,), temperature=1, scale=1),
            r"weight shape \(N, K\): expected two integers >= 1, got \(240,\)",
        ),
        (
            lambda: sample_tile_mask(TILES, (4, 8), (9, 33), temperature=1, scale=1),
            "tile logits: expected a tensor",
        ),
        (
            lambda: sample_tile_mask(TILES, (0, 8), SHAPE, temperature=1, scale=1),
            r"tile \(rows, columns\): expected two integers >= 1, got \(0, 8\)",
        ),
        (
            lambda: sample_tile_mask(TILES, (4.0, 8), SHAPE, temperature=1, scale=1),
            r"tile \(rows, columns\): expected two integers >= 1, got \(4\.0, 8\)",
        ),
        (
            lambda: sample_tile_mask(TILES, ("4", 8), SHAPE, temperature=1, scale=1),
            r"tile \(rows, columns\): expected two integers >= 1, got \('4', 8\)",
        ),
        (lambda: sample_tile_mask(TILES, (4, 8), SHAPE, temperature=-1, scale=1), "temperature: expected"),
        (
            lambda: sample_tile_mask(TILES, (4, 8), SHAPE, temperature=1, scale=1, noise=TILES[:1]),
            "tile noise: expected a tensor",
        ),
        (
            lambda: combine(torch.zeros(2, 4), torch.zeros(4, 2)),
            r"pattern_mask: expected a tensor \(2, 4\), got .* \(4, 2\)",
        ),
        (lambda: harden(LOGITS, TILES[:2], (4, 8), SHAPE), "tile logits: expected a tensor"),
        (lambda: harden(KEEP[:1], TILES, (4, 8), SHAPE), "fixed keep mask: expected a tensor"),
        (lambda: harden(LOGITS, None, (4, 8), (10, 26)), "columns of the weight: expected a multiple of 4, got 2[56]"),
        (lambda: tile_counts(KEEP.float(), (4, 8)), "keep: expected torch.bool .* got torch.float32"),
        (lambda: exact_budget([TILES], [TILES[:1].long()], 1), "equal shapes"),
        (lambda: exact_budget([TILES], [TILES.long()], -1), "nonzeros: expected a number >= 0, got -1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
