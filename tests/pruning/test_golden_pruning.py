"""Layer-wise pruning methods, both patterns, against plain fp64 loops: equal masks, weights to fp64 rounding."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from support.models import build_tiny_model
from support.pruning_reference import magnitude_reference, sparsegpt_reference, thanos_reference, wanda_reference

from patch.pruning import METHODS, PruneOptions, hessian, prune_model, prune_weight
from patch.pruning.selection import smallest_of_all

# Rounding of fp64 in systems whose condition number is at most a few thousand.
ROUNDING = {"rtol": 0, "atol": 1e-11}
LAYER_WISE = ["magnitude", "wanda", "sparsegpt", "thanos"]
PATTERNS = [("2:4", 0.5), ("unstructured", 0.45)]
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def reference(method, weight, inputs, pattern, sparsity, **options):
    """(fp64 weight, keep) of a method."""
    if method == "magnitude":
        keep = magnitude_reference(weight, pattern, sparsity)
    elif method == "wanda":
        keep = wanda_reference(weight, inputs, pattern, sparsity)
    else:
        formula = {"sparsegpt": sparsegpt_reference, "thanos": thanos_reference}[method]
        return formula(weight, inputs, pattern, sparsity, **options)
    return weight.double() * keep, keep


def make_layer(n=12, k=16, *, dead=(5,), seed=0):
    """fp32 weight (n, k) and samples of different lengths with correlated channels, those in `dead` always zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    mix = torch.eye(k) + torch.randn(k, k, generator=generator) / math.sqrt(k)
    scale = torch.rand(k, generator=generator) * 3 + 0.2
    inputs = [(torch.randn(tokens, k, generator=generator) @ mix) * scale for tokens in (2 * k, k + 3, 3 * k)]
    for x in inputs:
        x[:, list(dead)] = 0
    return weight, inputs


def assert_pruned(pruned, expected, keep):
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight, expected.to(pruned.weight.dtype), **ROUNDING)
    assert not pruned.weight[~keep].any()


@pytest.mark.parametrize("pattern, sparsity", PATTERNS)
@pytest.mark.parametrize("method", LAYER_WISE)
@pytest.mark.parametrize("dead", [(5,), (4, 5, 6)])
def test_layer(dead, method, pattern, sparsity):
    """With three dead channels in a group of four, 2:4 has to keep a weight of one of them."""
    weight, inputs = make_layer(dead=dead)
    expected, keep = reference(method, weight, inputs, pattern, sparsity)
    pruned = prune_weight(weight.double(), method, pattern=pattern, sparsity=sparsity, inputs=inputs, precision="fp64")
    assert_pruned(pruned, expected, keep)
    # The same in fp64 from fp32 weights, rounded once at the end.
    pruned = prune_weight(weight, method, pattern=pattern, sparsity=sparsity, inputs=inputs, precision="fp64")
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight, expected.float(), rtol=2**-23, atol=1e-11)


@pytest.mark.parametrize("pattern, sparsity", PATTERNS)
@pytest.mark.parametrize("method", LAYER_WISE)
def test_whole_model(method, pattern, sparsity):
    model = small_llama()
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    expected, masks = prune_whole_model(model, method, ids, pattern, sparsity)
    keep = prune_model(
        model, method, pattern=pattern, sparsity=sparsity, calibration=ids, precision="fp64", progress=False
    )
    assert sorted(keep) == sorted(masks)
    for name in masks:
        assert torch.equal(keep[name], masks[name]), name
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-10)


def small_llama():
    """Two blocks in fp64, with weights large enough that one block's pruning changes the next one's inputs."""
    model = build_tiny_model(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


@torch.no_grad()
def prune_whole_model(model, method, ids, pattern, sparsity):
    """For each block: run the whole model, blocks before it pruned, and prune its layers. (model, masks)."""
    model, masks = copy.deepcopy(model), {}
    for block in range(2):
        linears = {name: model.get_submodule(name) for name in (f"model.layers.{block}.{kind}" for kind in LINEARS)}
        seen = {name: [] for name in linears}
        handles = [
            linear.register_forward_hook(lambda _, args, __, inputs=seen[name]: inputs.append(args[0][0]))
            for name, linear in linears.items()
        ]
        for row in ids:
            model(row[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            weight, masks[name] = reference(method, linear.weight, seen[name], pattern, sparsity)
            linear.weight.copy_(weight)
    return model, masks


# Thanos: what the golden layer is too small for.


@pytest.mark.parametrize("pattern, sparsity", [*PATTERNS, ("unstructured", 0.2), ("unstructured", 0.8)])
@pytest.mark.parametrize("block_size", [4, 12, 32, 100])
def test_thanos_blocks(block_size, pattern, sparsity):
    """One group per block, a last block that is cut short (32 = 12 + 12 + 8), all columns, more than all."""
    weight, inputs = make_layer(9, 32)
    expected, keep = reference("thanos", weight, inputs, pattern, sparsity, block_size=block_size)
    pruned = prune_weight(
        weight.double(), "thanos", pattern=pattern, sparsity=sparsity, inputs=inputs, block_size=block_size
    )
    assert_pruned(pruned, expected, keep)


def test_thanos_unstructured_takes_any_width_and_block():
    weight, inputs = make_layer(5, 23)
    expected, keep = reference("thanos", weight, inputs, "unstructured", 0.37, block_size=7)
    pruned = prune_weight(weight.double(), "thanos", pattern="unstructured", sparsity=0.37, inputs=inputs, block_size=7)
    assert_pruned(pruned, expected, keep)
    assert int((~keep).sum()) == int(0.37 * 5 * 23)


@pytest.mark.parametrize("k, pattern, sparsity, block_size", [(136, "unstructured", 0.45, 128), (516, "2:4", 0.5, 512)])
def test_thanos_default_blocks(k, pattern, sparsity, block_size):
    weight, inputs = make_layer(2, k)
    options = {"pattern": pattern, "sparsity": sparsity, "inputs": inputs, "precision": "fp64"}
    pruned = prune_weight(weight, "thanos", **options)
    assert torch.equal(pruned.weight, prune_weight(weight, "thanos", block_size=block_size, **options).weight)
    assert not torch.equal(pruned.weight, prune_weight(weight, "thanos", block_size=64, **options).weight)
    assert not torch.equal(pruned.weight, prune_weight(weight, "thanos", block_size=2 * k, **options).weight)


def test_thanos_prunes_every_row():
    """The published n:m code leaves the last of its sorted rows dense."""
    weight, inputs = make_layer()
    pruned = prune_weight(weight, "thanos", inputs=inputs)
    assert ((~pruned.keep).sum(1) == 8).all()
    assert not pruned.weight[:, 5].any()


def test_thanos_one_block_is_the_least_error_of_its_mask():
    """With all columns in one block the update is the least-squares optimum of each row."""
    weight, inputs = make_layer(dead=())
    weight, inputs = weight.double(), [x.double() for x in inputs]
    pruned = prune_weight(weight, "thanos", pattern="unstructured", inputs=inputs, damping=0)
    h = sum(x.T @ x for x in inputs)
    for new, old, keep in zip(pruned.weight, weight, pruned.keep, strict=True):
        best = torch.linalg.solve(h[keep][:, keep], h[keep] @ old)
        torch.testing.assert_close(new[keep], best, **ROUNDING)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_thanos_solves_few_rows_at_once(monkeypatch, pattern):
    weight, inputs = make_layer(40, 32)
    weight = weight.double()
    options = {"pattern": pattern, "sparsity": 0.5, "inputs": inputs, "block_size": 16}
    whole = prune_weight(weight, "thanos", **options)
    sizes = []
    factorize = torch.linalg.cholesky_ex

    def recorded(matrix, **kwargs):
        if matrix.dim() == 3:
            sizes.append(matrix.numel())
        return factorize(matrix, **kwargs)

    monkeypatch.setattr(hessian, "_SYSTEM_ELEMS", 700)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", recorded)
    assert_pruned(prune_weight(weight, "thanos", **options), whole.weight, whole.keep)
    assert len(sizes) > 4
    assert max(sizes) <= 700


def test_thanos_damps_a_singular_hessian_more_and_says_so(caplog):
    weight, inputs = make_layer(6, 32)
    with caplog.at_level(logging.WARNING, logger="patch.pruning.hessian"):
        pruned = prune_weight(weight, "thanos", inputs=[inputs[0][:4]], damping=0)
    assert "Hessian (32 x 32) is not positive definite with damping 0; retrying with 0.0001" in caplog.text
    assert torch.isfinite(pruned.weight).all()
    assert (pruned.keep.view(-1, 4).sum(1) == 2).all()


def test_thanos_gives_up_on_a_hessian_that_is_none(caplog):
    statistics = METHODS["thanos"].code.Statistics(8)
    statistics.hessian.copy_(torch.eye(8) - 1)
    statistics.hessian.diagonal().fill_(1e-3)
    weight = torch.ones(4, 8)
    with pytest.raises(ValueError, match=r"expected a Hessian that becomes positive definite.*Give more calibration"):
        METHODS["thanos"].prune(weight, statistics, PruneOptions())
    assert len(caplog.records) == 4


def test_thanos_updates_must_fit_the_dtype():
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    weight = torch.full((2, 4), 60000.0, dtype=torch.float16)
    with pytest.raises(
        ValueError,
        match=r"updated weights in torch.float16: expected finite values, got .*NaN or infinite.*fp32 or bf16",
    ):
        prune_weight(weight, "thanos", inputs=[torch.cat([x, x], dim=1)], damping=1e-4)


def test_ties_go_by_column_then_row():
    score = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 2.0]])
    order = [(0, 1), (0, 0), (1, 0), (1, 1), (0, 2), (1, 2)]
    for count in range(7):
        expected = torch.zeros(2, 3, dtype=torch.bool)
        for row, column in order[:count]:
            expected[row, column] = True
        assert torch.equal(smallest_of_all(score, count), expected)
