"""Reordered channels: the same function, the exact way back, cheaper 2:4 patterns, and refusals."""

from __future__ import annotations

import copy
import itertools
import logging

import pytest
import torch
from support.models import build_tiny_model, mask_model

from patch.models.structure import maskable_linears
from patch.pruning.channel_search import best_order
from patch.pruning.hessian import removal_costs
from patch.pruning.permutation import ChannelOrders, apply_orders, permute_channels

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
DOWN, OUT = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"


def lost(costs):
    """What a 2:4 pattern of costs (N, K) prunes: the sum of the two least of every four neighbours."""
    least = costs.reshape(-1, 4).topk(2, largest=False).values
    return float(least.sum(dtype=torch.float64))


def token_ids(samples=4, seqlen=32, seed=0):
    return torch.randint(0, 256, (samples, seqlen), generator=torch.Generator().manual_seed(seed))


def build(arch="llama", dtype=torch.float64, **overrides):
    """A tiny model with no two parameters alike: norms are not all 1, biases not all 0."""
    model = build_tiny_model(arch, dtype=dtype, **(SMALL | overrides if arch in ("llama", "qwen2") else overrides))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def permuted(model, **options):
    return permute_channels(model, token_ids(), steps=20, progress=False, **options)


def logits(model):
    with torch.no_grad():
        return model(token_ids(2, seed=9)).logits


def moved(order):
    return not torch.equal(order, torch.arange(len(order)))


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 4, "intermediate_size": 36, "hidden_size": 20}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("gemma3", {}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {}),
    ],
)
def test_the_model_computes_the_same(arch, overrides):
    model = build(arch, **overrides)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    orders = permuted(model)
    readers = ("down_proj", "o_proj", "fc2", "out_proj")
    assert orders.inner.keys() == {name for name in maskable_linears(model) if name.endswith(readers)}
    assert any(map(moved, orders.inner.values())) and moved(orders.hidden)
    assert any(not torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    # Norms and rotary embeddings compute in fp32 also in a model of fp64.
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    apply_orders(model, orders.inverse)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_orders_make_a_copy_alike_and_the_seed_decides():
    model, other, third = build(), build(), build()
    orders = permuted(model)
    apply_orders(other, orders)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    again = permuted(third)
    assert torch.equal(orders.hidden, again.hidden)
    assert all(torch.equal(order, again.inner[name]) for name, order in orders.inner.items())


def test_query_heads_of_a_group_share_the_order_of_their_value_head():
    model = build()
    before = copy.deepcopy(model)
    order = permuted(model, hidden=False).inner[OUT]
    assert torch.equal(order // 8, torch.arange(16) // 8)
    columns = torch.cat([order[:8], order[:8] + 8, order[8:] + 8, order[8:] + 16])
    old, new = (m.model.layers[0].self_attn for m in (before, model))
    assert torch.equal(new.v_proj.weight, old.v_proj.weight[order])
    assert torch.equal(new.o_proj.weight, old.o_proj.weight[:, columns])
    assert torch.equal(new.q_proj.weight, old.q_proj.weight)


def test_without_hidden_the_stream_stays():
    model = build()
    embeddings = model.model.embed_tokens.weight.clone()
    assert permuted(model, hidden=False).hidden is None
    assert torch.equal(model.model.embed_tokens.weight, embeddings)


def test_bf16_is_moved_and_not_rounded():
    model = build(dtype=torch.bfloat16)
    before = copy.deepcopy(model)
    orders = permuted(model)
    assert moved(orders.hidden) and len(orders.inner) == 4
    apply_orders(model, orders.inverse)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("heads", [1, 2])
def test_the_search_finds_the_best_groups_of_a_small_layer(heads):
    costs = torch.rand(6, 8 * heads, generator=torch.Generator().manual_seed(1)).square()
    order = best_order(costs, heads, 60, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort().values, torch.arange(8 * heads))
    for head in range(heads):
        inside = range(8 * head, 8 * head + 8)
        splits = ([*first, *(set(inside) - set(first))] for first in itertools.combinations(inside, 4))
        part = order[inside.start : inside.stop]
        assert lost(costs[:, part]) == min(lost(costs[:, columns]) for columns in splits)


@pytest.mark.parametrize("seed", range(4))
def test_columns_of_very_different_costs_stay_an_order(seed):
    """What is worth an exchange to one group is not to another, and both must agree."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(4, 64, generator=generator) * 10.0 ** (torch.arange(64) % 8)
    order = best_order(costs, 1, 20, generator)
    assert torch.equal(order.sort().values, torch.arange(64))


def test_the_search_separates_large_columns():
    costs = torch.ones(3, 512)
    costs[:, :256] = 100
    order = best_order(costs, 1, 60, torch.Generator().manual_seed(0))
    assert lost(costs) == 3 * 2 * 64 * 101
    assert lost(costs[:, order]) == 3 * 2 * 128


def test_the_search_samples_the_rows_of_a_tall_layer():
    costs = torch.ones(5000, 16)
    costs[:, :8] = 100
    order = best_order(costs, 1, 20, torch.Generator().manual_seed(0))
    assert lost(costs[:, order]) == 5000 * 2 * 4


def test_costs_are_those_of_the_optimal_surgeon():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    hessian = x.T @ x
    costs = removal_costs(weight, hessian, 0.0)
    for row, column in itertools.product(range(2), range(4)):
        rest = [k for k in range(4) if k != column]
        fit = torch.linalg.lstsq(x[:, rest], x[:, column]).solution
        error = (weight[row, column] * (x[:, column] - x[:, rest] @ fit)).square().sum()
        torch.testing.assert_close(costs[row, column], error)


def test_a_stream_that_is_read_in_an_unknown_way_stays(caplog):
    model = build()
    model.model.layers[1].register_parameter("scale", torch.nn.Parameter(torch.ones(32, dtype=torch.float64)))
    with caplog.at_level(logging.WARNING):
        orders = permuted(model)
    assert orders.hidden is None and len(orders.inner) == 4
    assert caplog.messages == [
        "the residual stream stays as it is: what 'model.layers.1.scale' reads of it is not known"
    ]


def test_channels_whose_order_is_read_are_put_back(caplog):
    model = build()
    weights = copy.deepcopy(model.state_dict())
    scale = torch.linspace(1, 2, 48, dtype=torch.float64)
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] * scale,))
    with caplog.at_level(logging.WARNING):
        orders = permuted(model)
    assert all(name.endswith("o_proj") for name in orders.inner) and orders.hidden is not None
    assert torch.equal(model.state_dict()[f"{DOWN}.weight"], weights[f"{DOWN}.weight"][orders.hidden])
    assert caplog.messages == ["inner channels of the MLPs stay as they are: LlamaForCausalLM reads their order"]


def test_refusals():
    with pytest.raises(ValueError, match=r"model: expected a dense one, got one with masks\. Permute before pruning\."):
        permuted(mask_model(build()))
    model = build()
    for block in model.model.layers:
        block.mlp.down_proj, block.self_attn.o_proj = (
            torch.nn.Sequential(layer) for layer in (block.mlp.down_proj, block.self_attn.o_proj)
        )
    wanted = (
        r"model: expected an MLP of gate_proj, up_proj and down_proj, or an attention with v_proj and o_proj, got "
        r"LlamaForCausalLM with 0, gate_proj, k_proj, q_proj, up_proj, v_proj\. Prune it without permuting\."
    )
    with pytest.raises(ValueError, match=wanted):
        permuted(model)


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (ChannelOrders({"lm_head": torch.arange(32)}), r"expected layers of LlamaForCausalLM, got 'lm_head'"),
        (
            ChannelOrders({DOWN: torch.zeros(48, dtype=torch.int64)}),
            rf"'{DOWN}': expected an order of 48 channels, got",
        ),
        (ChannelOrders({OUT: torch.arange(16).flip(0)}), r"expected an order of 16 channels inside their 2 heads, got"),
        (ChannelOrders({}, torch.arange(31)), r"'hidden': expected an order of 32 channels, got"),
    ],
)
def test_orders_of_another_model_are_refused(orders, message):
    model = build()
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message + r".*Use the orders of this model\."):
        apply_orders(model, orders)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_an_order_of_a_stream_that_is_not_known_is_refused():
    model = build()
    model.model.register_parameter("scale", torch.nn.Parameter(torch.ones(32, dtype=torch.float64)))
    with pytest.raises(ValueError, match="orders: expected none of the residual stream for this model, got one"):
        apply_orders(model, ChannelOrders({}, torch.arange(32)))
