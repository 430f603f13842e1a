"""One-shot pruning of one weight: each method against its formula in loops and fp64, and bad input."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from support.methods import ONE_WEIGHT_METHODS
from support.pruning_reference import (
    channel_energy,
    magnitude_reference,
    sparsegpt_reference,
    thanos_reference,
    two_of_four,
    wanda_reference,
)

from patch.pruning import METHODS, hessian, prune_weight, sparsegpt, wanda
from patch.pruning.options import PruneOptions
from patch.pruning.selection import keep_above_threshold, keep_in_rows, keep_two_of_four

SHAPES = [(6, 16), (5, 24), (9, 40)]


def make_case(n, k, *, seed=0, samples=3, dtype=torch.float32):
    """A weight (n, k) and calibration inputs of different lengths and channel scales."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    scale = torch.rand(k, generator=generator) * 3 + 0.1
    mix = torch.eye(k) + 0.2 * torch.randn(k, k, generator=generator) / math.sqrt(k)
    inputs = [((torch.randn(k + 7 * j, k, generator=generator) * scale) @ mix).to(dtype) for j in range(samples)]
    return weight, inputs


def reference_keep(method, weight, inputs, pattern, sparsity):
    if method == "magnitude":
        return magnitude_reference(weight, pattern, sparsity)
    if method == "wanda":
        return wanda_reference(weight, inputs, pattern, sparsity)
    reference = {"sparsegpt": sparsegpt_reference, "thanos": thanos_reference}[method]
    return reference(weight, inputs, pattern, sparsity)[1]


@pytest.mark.parametrize("pattern, sparsity", [("2:4", 0.5), ("unstructured", 0.3), ("unstructured", 0.45)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ONE_WEIGHT_METHODS)
def test_mask_equals_the_formula(method, shape, pattern, sparsity):
    weight, inputs = make_case(*shape, seed=sum(shape))
    pruned = prune_weight(weight, method, pattern=pattern, sparsity=sparsity, inputs=inputs)
    assert torch.equal(pruned.keep, reference_keep(method, weight, inputs, pattern, sparsity))
    assert pruned.keep.dtype == torch.bool
    assert not pruned.weight[~pruned.keep].any()


@pytest.mark.parametrize("pattern, sparsity", [("2:4", 0.5), ("unstructured", 0.45)])
@pytest.mark.parametrize("block_size", [None, 4, 20])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_sparsegpt_weights_equal_the_formula(shape, block_size, pattern, sparsity):
    weight, inputs = make_case(*shape, seed=7 + sum(shape))
    options = {"pattern": pattern, "sparsity": sparsity, "inputs": inputs, "block_size": block_size}
    expected, keep = sparsegpt_reference(weight, inputs, pattern, sparsity, block_size or 128)
    pruned = prune_weight(weight, "sparsegpt", **options)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=0, atol=1e-5)


def test_sparsegpt_default_block_is_128_columns():
    weight, inputs = make_case(3, 136)
    expected, keep = sparsegpt_reference(weight, inputs, "unstructured", 0.45, block_size=128)
    pruned = prune_weight(weight, "sparsegpt", pattern="unstructured", sparsity=0.45, inputs=inputs)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=0, atol=1e-5)


def test_sparsegpt_in_fp64_equals_the_formula_to_rounding():
    weight, inputs = make_case(6, 32, dtype=torch.float64)
    expected, keep = sparsegpt_reference(weight, inputs, "2:4", 0.5)
    pruned = prune_weight(weight, "sparsegpt", inputs=inputs)
    assert pruned.weight.dtype == torch.float64
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight, expected, rtol=0, atol=1e-11)


def test_sparsegpt_damping_is_used():
    weight, inputs = make_case(6, 32)
    expected, _ = sparsegpt_reference(weight, inputs, "2:4", 0.5, damping=0.5)
    pruned = prune_weight(weight, "sparsegpt", inputs=inputs, damping=0.5)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=0, atol=1e-5)
    usual = prune_weight(weight, "sparsegpt", inputs=inputs)
    assert (pruned.weight - usual.weight).abs().max() > 1e-3


def test_updating_methods_lose_less_than_wanda_and_magnitude():
    weight, inputs = make_case(32, 64, samples=8)
    x = torch.cat(inputs)
    loss = {
        method: ((prune_weight(weight, method, inputs=inputs).weight - weight) @ x.T).square().sum().item()
        for method in ONE_WEIGHT_METHODS
    }
    assert max(loss["sparsegpt"], loss["thanos"]) < loss["wanda"] < loss["magnitude"]


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_two_of_four_is_the_best_of_all_six_patterns(method):
    weight, inputs = make_case(16, 24, seed=3)
    energy = torch.ones(24) if method == "magnitude" else torch.tensor(channel_energy(inputs)).sqrt()
    score = (weight.abs() * energy).view(-1, 4).double()
    pruned = prune_weight(weight, method, inputs=inputs)
    kept = (score * pruned.keep.view(-1, 4)).sum(1)
    best = torch.stack([score[:, list(pair)].sum(1) for pair in itertools.combinations(range(4), 2)]).amax(0)
    torch.testing.assert_close(kept, best, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ONE_WEIGHT_METHODS)
@pytest.mark.parametrize("fill", [0.0, -0.0, 1.0, -2.5])
def test_two_of_four_is_exact_with_ties(method, fill):
    weight = torch.full((8, 16), fill)
    weight[:4] = torch.randint(0, 2, (4, 16), generator=torch.Generator().manual_seed(0)).float()
    _, inputs = make_case(8, 16)
    keep = prune_weight(weight, method, inputs=inputs).keep
    assert torch.equal(keep.view(-1, 4).sum(1), torch.full((32,), 2))


def test_every_tie_is_resolved_as_a_stable_sort_would():
    rows = torch.tensor(list(itertools.product([0.0, 1.0, 2.0, 3.0], repeat=4)))
    assert torch.equal(keep_two_of_four(rows), two_of_four(rows.tolist()))
    assert keep_two_of_four(torch.ones(1, 4)).tolist() == [[False, False, True, True]]


def test_unstructured_rules_with_ties():
    score = torch.tensor([[1.0, 1.0, 2.0, 2.0], [3.0, 1.0, 4.0, 2.0]])
    # Threshold: the value at rank int(8 * 0.25) is 1; all three ones go.
    assert keep_above_threshold(score, 0.25).tolist() == [
        [False, False, True, True],
        [True, False, True, True],
    ]
    # By rows: int(4 * 0.25) = 1 each, the first of equals.
    assert keep_in_rows(score, 0.25).tolist() == [[False, True, True, True], [True, False, True, True]]


def test_unstructured_counts():
    weight, inputs = make_case(4, 384)
    wanda_keep = prune_weight(weight, "wanda", pattern="unstructured", sparsity=0.45, inputs=inputs).keep
    assert ((~wanda_keep).sum(1) == 172).all()  # int(384 * 0.45)
    keep = prune_weight(weight, "magnitude", pattern="unstructured", sparsity=0.45).keep
    assert int((~keep).sum()) == int(4 * 384 * 0.45) + 1


def test_sparsity_a_hair_below_one_is_still_a_legal_rank():
    weight, _ = make_case(4, 16)
    keep = prune_weight(weight, "magnitude", pattern="unstructured", sparsity=math.nextafter(1.0, 0.0)).keep
    assert not keep.any()


def test_wanda_weighs_samples_not_tokens():
    _, inputs = make_case(4, 16, samples=2)
    statistics = wanda.Statistics(16)
    for x in inputs:
        statistics.add(x)
    expected = sum(x.double().square().sum(0) for x in inputs) / 2
    torch.testing.assert_close(statistics.channel_energy.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(expected, torch.tensor(channel_energy(inputs), dtype=torch.float64))
    assert statistics.samples == 2


def test_sparsegpt_weighs_samples_not_tokens():
    _, inputs = make_case(4, 16, samples=3)
    statistics = sparsegpt.Statistics(16)
    for x in inputs:
        statistics.add(x)
    expected = 2 * sum(x.double().T @ x.double() for x in inputs) / 3
    torch.testing.assert_close(statistics.hessian.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("pattern, sparsity", [("2:4", 0.5), ("unstructured", 0.5)])
@pytest.mark.parametrize("dead", [0, 3])
def test_shift_zero_metrics(dead, pattern, sparsity):
    weight, inputs = make_case(24, 32, seed=11)
    inputs = [x / 60 for x in inputs]  # energies on both sides of 1, where the rule changes
    for x in inputs:
        x[:, :dead] = 0
    options = {"pattern": pattern, "sparsity": sparsity, "inputs": inputs}
    shifted = prune_weight(weight, "wanda", shift_zero_metrics=True, **options)
    assert torch.equal(shifted.keep, wanda_reference(weight, inputs, pattern, sparsity, shift=True))
    plain = prune_weight(weight, "wanda", **options)
    assert torch.equal(plain.keep, wanda_reference(weight, inputs, pattern, sparsity))
    if dead:
        # Three of the first four channels are dead: unshifted they tie at 0, shifted the larger wins.
        assert not torch.equal(shifted.keep, plain.keep)


def test_shift_rule_by_hand():
    assert wanda.shifted(torch.tensor([0.5, 2.0])).tolist() == [1.0, 2.5]
    assert wanda.shifted(torch.tensor([0.0, 0.25])).tolist() == [0.25, 0.5]
    assert wanda.shifted(torch.tensor([0.0, 7.0])).tolist() == [1.0, 8.0]
    assert wanda.shifted(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_shift_changes_only_wanda():
    weight, inputs = make_case(8, 16)
    for method in ("magnitude", "sparsegpt", "thanos"):
        plain = prune_weight(weight, method, inputs=inputs)
        shifted = prune_weight(weight, method, inputs=inputs, shift_zero_metrics=True)
        assert torch.equal(plain.weight, shifted.weight)


def test_sparsegpt_zeroes_dead_columns_and_keeps_two_of_four():
    weight, inputs = make_case(8, 16)
    for x in inputs:
        x[:, 4:7] = 0
    expected, keep = sparsegpt_reference(weight, inputs, "2:4", 0.5)
    pruned = prune_weight(weight, "sparsegpt", inputs=inputs)
    assert not pruned.weight[:, 4:7].any()
    # Three dead columns in one group: one of them is kept by the mask although its weight is zero.
    assert (pruned.keep[:, 4:8].sum(1) == 2).all()
    assert pruned.keep[:, 7].all()
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=0, atol=1e-5)


def test_dead_columns_count_in_the_damping():
    weight, inputs = make_case(8, 16)
    inputs = [x / 50 for x in inputs]  # energies far below the 1 that stands for a dead column
    for x in inputs:
        x[:, 4:7] = 0
    expected, keep = sparsegpt_reference(weight, inputs, "2:4", 0.5, damping=0.1)
    pruned = prune_weight(weight, "sparsegpt", inputs=inputs, damping=0.1)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ONE_WEIGHT_METHODS)
def test_dtype_is_kept_and_nothing_changes_in_place(method, dtype):
    weight, inputs = make_case(8, 16, dtype=dtype)
    weight[0, :4] = torch.tensor([-0.0, -0.0, 0.0, 0.0], dtype=dtype)
    before, inputs_before = weight.clone(), [x.clone() for x in inputs]
    pruned = prune_weight(torch.nn.Parameter(weight), method, inputs=inputs)
    assert pruned.weight.dtype == dtype
    assert not pruned.weight.requires_grad
    assert pruned.weight.data_ptr() != weight.data_ptr()
    assert torch.equal(weight, before)
    assert all(torch.equal(a, b) for a, b in zip(inputs, inputs_before, strict=True))
    if not METHODS[method].updates_weights:
        kept, original = pruned.weight[pruned.keep], weight[pruned.keep]
        assert torch.equal(kept, original)
        assert torch.equal(kept.signbit(), original.signbit())
    assert not pruned.weight[~pruned.keep].signbit().any()


def test_a_kept_zero_stays_in_the_mask():
    weight = torch.tensor([[0.0, 0.0, 0.0, 5.0]])
    keep = prune_weight(weight, "magnitude").keep
    assert keep.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("method", ONE_WEIGHT_METHODS)
def test_same_input_same_result_whatever_the_strides(method):
    weight, inputs = make_case(12, 32)
    strided = torch.empty(32, 12).T.copy_(weight)
    views = [torch.empty(x.shape[1], x.shape[0]).T.copy_(x) for x in inputs]
    first = prune_weight(weight, method, inputs=inputs)
    second = prune_weight(weight, method, inputs=inputs)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.keep, prune_weight(strided, method, inputs=views).keep)


@pytest.mark.parametrize("method", ONE_WEIGHT_METHODS)
def test_sparsity_zero_changes_nothing(method):
    weight, inputs = make_case(4, 16)
    pruned = prune_weight(weight, method, pattern="unstructured", sparsity=0, inputs=inputs)
    assert torch.equal(pruned.weight, weight)
    assert pruned.keep.all()
    assert pruned.weight.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("method", ONE_WEIGHT_METHODS)
def test_unstructured_takes_any_width(method):
    weight, inputs = make_case(3, 7)
    keep = prune_weight(weight, method, pattern="unstructured", sparsity=0.4, inputs=inputs, block_size=5).keep
    assert keep.shape == (3, 7)
    if method == "sparsegpt":
        assert torch.equal(keep, sparsegpt_reference(weight, inputs, "unstructured", 0.4, block_size=5)[1])


def test_singular_hessian_is_damped_more_and_said(caplog):
    weight, inputs = make_case(6, 32)
    inputs = [x[:4] for x in inputs[:1]]  # rank 4 of 32
    with caplog.at_level(logging.WARNING, logger="patch.pruning.hessian"):
        pruned = prune_weight(weight, "sparsegpt", inputs=inputs, damping=0)
    assert "not positive definite with damping 0; retrying with 0.0001" in caplog.text
    assert torch.isfinite(pruned.weight).all()
    assert (pruned.keep.view(-1, 4).sum(1) == 2).all()


def test_damping_retries_are_bounded(caplog):
    statistics = sparsegpt.Statistics(8)
    statistics.hessian.copy_(-torch.eye(8))
    statistics.samples = 1
    with pytest.raises(ValueError, match=r"expected a Hessian that becomes positive definite.*Give more calibration"):
        sparsegpt.prune(torch.ones(4, 8), statistics, PruneOptions())
    assert len(caplog.records) == 4


def test_updated_weights_must_fit_their_dtype():
    # Two equal inputs: what is pruned from one column is added to its twin, beyond the range of fp16.
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    inputs = [torch.cat([x, x], dim=1)]
    weight = torch.full((2, 4), 60000.0, dtype=torch.float16)
    with pytest.raises(
        ValueError,
        match=r"updated weights in torch.float16: expected finite values, got .*NaN or infinite.*fp32 or bf16",
    ):
        prune_weight(weight, "sparsegpt", inputs=inputs, damping=1e-4)
    assert torch.isfinite(prune_weight(weight.bfloat16(), "sparsegpt", inputs=inputs, damping=1e-4).weight).all()


def test_reduced_matmul_precision_is_not_used_and_comes_back():
    weight, inputs = make_case(16, 64)
    expected = prune_weight(weight, "sparsegpt", inputs=inputs)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        pruned = prune_weight(weight, "sparsegpt", inputs=inputs)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        with hessian.full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(pruned.weight, expected.weight)


W = torch.ones(4, 8)
X = [torch.ones(3, 8)]
NAN = torch.full((4, 8), math.nan)
INF = torch.ones(3, 8).index_fill(0, torch.tensor([1]), math.inf)
BAD = {
    "unknown method": ((W, "wander"), {}, ValueError, "magnitude, wanda, sparsegpt, thanos, prox_sparse, got 'wander'"),
    "prox_sparse": ((W, "prox_sparse"), {}, ValueError, "got 'prox_sparse', .* Use patch.pruning.prune_model"),
    "method None": ((W, None), {}, ValueError, "method: expected one of .* got None. Choices are: magnitude"),
    "unhashable method": (
        (W, ["wanda"]),
        {},
        ValueError,
        r"method: expected one of .* got \['wanda'\]. Did you mean 'wanda'",
    ),
    "unknown pattern": (
        (W, "magnitude"),
        {"pattern": "4:8"},
        ValueError,
        "expected one of 2:4, tiles, unstructured, got '4:8'",
    ),
    "2:4 at 0.45": (
        (W, "magnitude"),
        {"sparsity": 0.45},
        ValueError,
        "expected 0.5 for pattern 2:4.*got 0.45.*Use pat",
    ),
    "sparsity 1": (
        (W, "magnitude"),
        {"pattern": "unstructured", "sparsity": 1.0},
        ValueError,
        "not including 1, got 1.0",
    ),
    "sparsity percent": (
        (W, "magnitude"),
        {"pattern": "unstructured", "sparsity": 45},
        ValueError,
        "got 45. Write 0.45",
    ),
    "sparsity negative": (
        (W, "magnitude"),
        {"pattern": "unstructured", "sparsity": -0.1},
        ValueError,
        "got -0.1",
    ),
    "sparsity NaN": (
        (W, "magnitude"),
        {"pattern": "unstructured", "sparsity": math.nan},
        ValueError,
        "got nan",
    ),
    "sparsity text": (
        (W, "magnitude"),
        {"pattern": "unstructured", "sparsity": "0.5"},
        ValueError,
        "got '0.5'",
    ),
    "sparsity bool": (
        (W, "magnitude"),
        {"pattern": "unstructured", "sparsity": False},
        ValueError,
        "got False",
    ),
    "block 0": (
        (W, "sparsegpt"),
        {"block_size": 0, "inputs": X},
        ValueError,
        "block_size: expected an integer >= 1, got 0. The default is 128",
    ),
    "block 6": (
        (W, "sparsegpt"),
        {"block_size": 6, "inputs": X},
        ValueError,
        "multiple of 4, got 6. Pattern 2:4 needs that",
    ),
    "block float": (
        (W, "sparsegpt"),
        {"block_size": 8.0, "inputs": X},
        ValueError,
        "block_size: expected an integer >= 1, got 8.0. The default is 128",
    ),
    "damping negative": (
        (W, "sparsegpt"),
        {"damping": -1, "inputs": X},
        ValueError,
        "damping: expected.*got -1",
    ),
    "damping inf": (
        (W, "sparsegpt"),
        {"damping": math.inf, "inputs": X},
        ValueError,
        "damping: expected.*got inf",
    ),
    "shift int": (
        (W, "wanda"),
        {"shift_zero_metrics": 1, "inputs": X},
        ValueError,
        "shift_zero_metrics: expected true or false, got 1",
    ),
    "weight list": (([[1.0]], "magnitude"), {}, TypeError, "weight: expected torch.float16 .*got list"),
    "weight int8": (
        (W.to(torch.int8), "magnitude"),
        {},
        TypeError,
        "got torch.int8 .* before quantizing",
    ),
    "weight fp8": (
        (W.to(torch.float8_e4m3fn), "magnitude"),
        {},
        TypeError,
        "got torch.float8_e4m3fn",
    ),
    "weight 1-D": ((W[0], "magnitude"), {}, ValueError, r"\(out_features, in_features\), got .* \(8,\)"),
    "weight empty": ((W[:0], "magnitude"), {}, ValueError, r"got torch.float32 \(0, 8\)"),
    "weight meta": ((W.to("meta"), "magnitude"), {}, ValueError, "meta device. Load the model first"),
    "weight NaN": ((NAN, "magnitude"), {}, ValueError, "weight: expected finite values, got 32 that are NaN"),
    "width 6": (
        (W[:, :6], "magnitude"),
        {},
        ValueError,
        "in_features for pattern 2:4: expected a multiple of 4, got 6.*unstructured",
    ),
    "no inputs": ((W, "wanda"), {}, ValueError, "calibration inputs for method 'wanda', got none"),
    "empty inputs": ((W, "sparsegpt"), {"inputs": []}, ValueError, "got an empty list"),
    "bare tensor": ((W, "wanda"), {"inputs": X[0]}, TypeError, "expected a list of .* got Tensor. Wrap"),
    "inputs generator": ((W, "wanda"), {"inputs": iter(X)}, TypeError, "got list_iterator"),
    "input width": (
        (W, "wanda"),
        {"inputs": [X[0], torch.ones(3, 4)]},
        ValueError,
        r"inputs\[1\]: expected .* \(tokens, 8\) on cpu, got .* \(3, 4",
    ),
    "input 3-D": (
        (W, "wanda"),
        {"inputs": [torch.ones(1, 3, 8)]},
        ValueError,
        r"got torch.float32 \(1, 3, 8\) .*one 2-D tensor per sample",
    ),
    "input no tokens": (
        (W, "wanda"),
        {"inputs": [torch.ones(0, 8)]},
        ValueError,
        r"expected .* \(tokens, 8\) .* got .* \(0, 8\) .*with tokens",
    ),
    "input ints": (
        (W, "wanda"),
        {"inputs": [torch.ones(3, 8).long()]},
        TypeError,
        r"inputs\[0\]: .*got torch.int64",
    ),
    "input inf": (
        (W, "sparsegpt"),
        {"inputs": [X[0], INF]},
        ValueError,
        r"inputs\[1\], calibration inputs: expected finite.*got 8 that are NaN or inf",
    ),
    "input device": (
        (W, "wanda"),
        {"inputs": [X[0].to("meta")]},
        ValueError,
        "on cpu, got .* on meta. .* on the weight's device",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    args, kwargs, kind, match = BAD[name]
    with pytest.raises(kind, match=match):
        prune_weight(*args, **kwargs)


def test_all_inputs_are_checked_before_any_is_used(monkeypatch):
    def add(self, x):
        raise AssertionError("work started before the check of all inputs")

    monkeypatch.setattr(wanda.Statistics, "add", add)
    with pytest.raises(ValueError, match=r"inputs\[1\]"):
        prune_weight(W, "wanda", inputs=[X[0], INF])


# Weights that are zero already.


def sparse_base(shape=(16, 32), share=0.5, seed=4):
    """(weight with a share of exact zeros, inputs); in column 3 the input is always zero."""
    weight, inputs = make_case(*shape)
    weight[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share] = 0
    for x in inputs:
        x[:, 3] = 0
    return weight, inputs


@pytest.mark.parametrize("method", ONE_WEIGHT_METHODS)
@pytest.mark.parametrize("pattern, sparsity", [("2:4", 0.5), ("unstructured", 0.25), ("unstructured", 0.7)])
def test_zeros_stay_zero_and_go_first(method, pattern, sparsity):
    weight, inputs = sparse_base()
    zeros = weight == 0
    pruned = prune_weight(weight, method, pattern=pattern, sparsity=sparsity, inputs=inputs)
    assert not pruned.weight[zeros].any()
    assert not pruned.weight[~pruned.keep].any()
    if pattern == "2:4":
        assert (pruned.keep.reshape(-1, 4).sum(1) == 2).all()
        # A weight that is not zero goes only where the group had no zero left to prune.
        spare = (pruned.keep & zeros).reshape(-1, 4).any(1)
        assert not ((~pruned.keep & ~zeros).reshape(-1, 4).any(1) & spare).any()
    elif sparsity < 0.5 and method != "thanos":  # which prunes by columns: the zeros to the right come too late
        assert not (~pruned.keep & ~zeros & (torch.arange(32) != 3)).any()


@pytest.mark.parametrize("method", ONE_WEIGHT_METHODS)
def test_pruning_a_pruned_weight_again_keeps_its_mask(method):
    weight, inputs = make_case(16, 32)
    first = prune_weight(weight, "magnitude")
    again = prune_weight(first.weight, method, inputs=inputs)
    assert torch.equal(again.keep, first.keep)


def test_zeros_go_before_weights_on_dead_inputs():
    """Both have the score 0 in Wanda; the weight may be needed on other text, the zero is not."""
    weight = torch.tensor([[0.5, 0.6, 0.0, 0.0], [0.5, 0.0, 0.7, 0.0]])
    x = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    keep = prune_weight(weight, "wanda", inputs=[x]).keep
    assert keep.tolist() == [[True, True, False, False], [True, False, True, False]]
