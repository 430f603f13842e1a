"""MaskedLinear and MaskedLayers: forward and gradients by the pure functions, noise keys, swap in and out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import patch_kernels
from patch.learn.config import LearnConfig
from patch.learn.masked_linear import (
    MaskedLayers,
    MaskedLinear,
    SamplingState,
    dense_tiles,
    initial_logits,
    two_of_four,
)
from patch.mask import combine, harden, sample_pattern_mask, sample_tile_mask
from patch.models.structure import maskable_linears
from patch.priors import chosen_tile_prior, pattern_prior, tile_prior
from patch.pruning.selection import keep_two_of_four
from patch_kernels import PATTERNS, reference, tile_grid

SHAPE, TILE = (10, 24), (4, 8)
SETTINGS = {
    "pattern_temperature": 0.7,
    "pattern_scale": 20.0,
    "tile_temperature": 0.9,
    "tile_scale": 15.0,
}


def make_layer(mode="joint", *, dtype=torch.float64, **state):
    torch.manual_seed(0)
    linear = nn.Linear(SHAPE[1], SHAPE[0], dtype=dtype)
    keep = harden(torch.randn(60, 6), None, TILE, SHAPE)[0]
    logits_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    layer = MaskedLinear(
        linear,
        index=3,
        tile=TILE,
        state=SamplingState(seed=7, draw=11, **(SETTINGS | state)),
        pattern_logits=None if mode == "tile" else torch.randn(60, 6, dtype=logits_dtype) * 0.1,
        tile_logits=None if mode == "maskllm" else torch.randn(3, 3, dtype=logits_dtype) * 0.1,
        fixed_keep=keep if mode == "tile" else None,
    )
    layer.requires_grad_(False)
    for logits in (layer.pattern_logits, layer.tile_logits):
        if logits is not None:
            logits.requires_grad_()
    return layer, keep


def expected_mask(layer, keep, hard_pattern=False, hard_tile=False):
    mask = keep.double()
    if layer.pattern_logits is not None:
        mask = sample_pattern_mask(
            layer.pattern_logits,
            SHAPE,
            temperature=SETTINGS["pattern_temperature"],
            scale=SETTINGS["pattern_scale"],
            hard=hard_pattern,
            noise=reference.pattern_noise(7, 3, 11, 60),
        )
    if layer.tile_logits is None:
        return mask
    tile = sample_tile_mask(
        layer.tile_logits,
        TILE,
        SHAPE,
        temperature=SETTINGS["tile_temperature"],
        scale=SETTINGS["tile_scale"],
        hard=hard_tile,
        noise=reference.tile_noise(7, 3, 11, 3, 3),
    )
    return combine(tile, mask)


@pytest.mark.parametrize("mode", ["joint", "tile", "maskllm"])
@pytest.mark.parametrize("hard", [{}, {"hard_pattern": True}, {"hard_tile": True}])
def test_forward_sums_and_gradients_are_those_of_the_pure_functions(mode, hard):
    layer, keep = make_layer(mode, collect=True, **hard)
    x = torch.randn(5, SHAPE[1], dtype=torch.float64)
    y = layer(x)
    (sums,) = layer.state.take_sums()
    mask = expected_mask(layer, keep, **hard)
    torch.testing.assert_close(y, functional.linear(x, layer.weight * mask, layer.bias))
    expected_sums = torch.stack([mask.sum(), (mask * layer.weight).square().sum()])
    torch.testing.assert_close(sums, expected_sums)

    logits = [p for p in layer.parameters() if p.requires_grad]
    target = torch.randn_like(y)
    got = torch.autograd.grad((y * target).sum() + (sums * sums.new_tensor([0.3, 0.2])).sum(), logits)
    again = functional.linear(x, layer.weight * mask, layer.bias)
    loss = (again * target).sum() + 0.3 * expected_sums[0] + 0.2 * expected_sums[1]
    for value, reference_value in zip(got, torch.autograd.grad(loss, logits), strict=True):
        torch.testing.assert_close(value, reference_value, rtol=1e-9, atol=1e-11)


def test_hard_tile_in_tile_mode_is_not_governed_by_hard_pattern():
    """The published code passes hard_2_4 where hard_tile is meant."""
    layer, _ = make_layer("tile", hard_tile=True)
    weight = layer(torch.eye(SHAPE[1], dtype=torch.float64)).T - layer.bias[:, None]
    share = weight / layer.weight
    assert torch.equal(share.round(), share.round(decimals=9))
    layer, _ = make_layer("tile", hard_pattern=True)
    weight = layer(torch.eye(SHAPE[1], dtype=torch.float64)).T - layer.bias[:, None]
    share = weight / layer.weight
    assert not torch.equal(share.round(), share.round(decimals=9))


def test_noise_depends_on_seed_layer_and_draw_only():
    x = torch.randn(2, SHAPE[1], dtype=torch.float64)
    layer, _ = make_layer()
    first = layer(x)
    torch.manual_seed(123)
    assert torch.equal(layer(x), first)
    for attribute, owner in (("seed", layer.state), ("draw", layer.state), ("index", layer)):
        before = getattr(owner, attribute)
        setattr(owner, attribute, before + 1)
        assert not torch.equal(layer(x), first)
        setattr(owner, attribute, before)
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize("mode", ["joint", "tile", "maskllm"])
def test_eval_mode_uses_the_hardened_mask(mode):
    layer, keep = make_layer(mode)
    hard, sparse = layer.eval().harden()
    x = torch.randn(3, SHAPE[1], dtype=torch.float64)
    weight = torch.where(hard, layer.weight, 0)
    torch.testing.assert_close(layer(x), functional.linear(x, weight, layer.bias), rtol=0, atol=1e-12)
    fixed = keep if mode == "tile" else layer.pattern_logits
    assert torch.equal(hard, harden(fixed, layer.tile_logits, TILE, SHAPE)[0])
    assert sparse.all() == (mode == "maskllm")


def test_bfloat16_weight_keeps_float32_logits_and_gradients():
    layer, _ = make_layer(dtype=torch.bfloat16)
    y = layer(torch.randn(2, SHAPE[1], dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.pattern_logits.grad.dtype == layer.tile_logits.grad.dtype == torch.float32
    # A bf16 logit near 0.042 cannot be moved by 1e-4: half a unit in its last place is 1.2e-4.
    assert torch.tensor(0.042, dtype=torch.bfloat16) + 1e-4 == torch.tensor(0.042, dtype=torch.bfloat16)
    assert torch.tensor(0.042) + 1e-4 != torch.tensor(0.042)


def test_sums_are_stashed_only_while_collecting():
    layer, _ = make_layer()
    layer(torch.randn(1, SHAPE[1], dtype=torch.float64))
    assert layer.state.take_sums() == []


def test_an_announced_step_does_not_compile_again():
    layer, _ = make_layer(collect=True, dtype=torch.float32)
    x = torch.randn(2, SHAPE[1])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for draw in range(12):
        layer.state.draw, layer.state.tile_scale = draw, 15.0 + draw
        layer.state.pattern_temperature = layer.state.tile_temperature = 4.0 - 0.3 * draw
        layer.state.sampling(x.device)
        results = [(function(x), *layer.state.take_sums()) for function in (compiled, layer)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def config(mode="joint", **overrides):
    return LearnConfig.from_preset(mode, 0.5 if mode == "maskllm" else 0.3, tile=(32, 32), **overrides)


def test_initial_logits_are_draw_plus_prior():
    linear = nn.Linear(64, 96)
    keep = harden(torch.randn(64 * 96 // 4, 6), None, (32, 32), (96, 64))[0]
    scores = torch.rand(3, 2)
    plain, plain_tile = initial_logits(linear, 2, config(), None, None)
    assert plain.dtype == plain_tile.dtype == torch.float32
    assert plain.std().item() == pytest.approx(0.014, rel=0.05)
    pattern, tile = initial_logits(linear, 2, config(), keep, scores)
    torch.testing.assert_close(pattern, pattern_prior(plain, keep, 3.0))
    torch.testing.assert_close(tile, tile_prior(plain_tile, scores, 0.7, 3.0, std=0.014))
    dense = scores > 0.5
    _, tile = initial_logits(linear, 2, config(), keep, dense)
    torch.testing.assert_close(tile, chosen_tile_prior(plain_tile, dense, 3.0, std=0.014))
    other, _ = initial_logits(linear, 3, config(), None, None)
    assert not torch.equal(other, plain)
    assert initial_logits(linear, 2, config("tile"), keep, scores)[0] is None
    assert initial_logits(linear, 2, config("maskllm"), keep, scores)[1] is None


def test_groups_of_dense_tiles_start_from_their_two_largest_weights():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 5.0, 6.0, 7.0, 8.0], [0.0, 0.0, 0.0, 0.0, 9.0, -9.0, 9.0, 1.0]])
    keep = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 1, 1, 1]]).bool()
    expected = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 1, 1, 1]]).bool()
    assert torch.equal(two_of_four(keep, weight), expected)


@pytest.mark.parametrize(
    ("sparsity", "first", "second"),
    [
        (0.5, [[0, 0], [0, 0]], [[0, 0], [0, 0]]),
        (0.33, [[0, 0], [0, 0]], [[1, 0], [1, 0]]),  # 1218 nonzeros to spend: 512 + 256, a third tile takes 512
        (0.32, [[0, 1], [0, 0]], [[1, 0], [1, 0]]),
        (0.0, [[1, 1], [1, 1]], [[1, 1], [1, 1]]),
    ],
)
def test_tile_prior_may_spend_the_budget_over_the_whole_model(sparsity, first, second):
    """The ragged tile that loses 3 comes before the whole ones that lose 4 and 3: it has half of their weights."""
    linears = {"first": nn.Linear(64, 64), "second": nn.Linear(64, 48)}
    scores = {"first": torch.tensor([[1.0, 4.0], [3.0, 2.0]]), "second": torch.tensor([[8.0, 1.0], [3.0, 0.4]])}
    chosen = dense_tiles(linears, scores, LearnConfig.from_preset("joint", sparsity, tile=(32, 32)))
    assert {name: grid.int().tolist() for name, grid in chosen.items()} == {"first": first, "second": second}


@pytest.mark.parametrize("mode", ["joint", "tile"])
def test_masked_layers_start_from_the_model_s_budget_and_from_masks_with_dense_tiles(tiny_model, mode):
    model = tiny_model()
    linears = maskable_linears(model)
    keep = {name: torch.ones_like(linear.weight, dtype=torch.bool) for name, linear in linears.items()}
    settings = LearnConfig.from_preset(mode, 0.45, tile=(64, 64), tile_prior_budget="model", tile_prior_strength=30.0)
    grids = {name: torch.zeros(tile_grid(tuple(linear.weight.shape), (64, 64))) for name, linear in linears.items()}
    losses = {name: grid + index for index, (name, grid) in enumerate(grids.items())}
    layers = MaskedLayers(model, linears, settings, prior_masks=keep, tile_scores=losses)
    chosen = dense_tiles(linears, losses, settings)
    for name, layer in layers.layers.items():
        assert torch.equal(layer.tile_logits > 0, chosen[name])
        magnitude = keep_two_of_four(layer.weight.detach().abs())
        if mode == "tile":
            assert torch.equal(layer.pattern_keep(), magnitude)
        else:
            _, index = (magnitude.reshape(-1, 1, 4) == PATTERNS).all(2).nonzero().unbind(1)
            raw, _ = initial_logits(linears[name], layer.index, settings, None, None)
            assert torch.equal((layer.pattern_logits - raw).argmax(1), index)


def test_layer_with_one_tile_has_finite_logits():
    _, tile = initial_logits(nn.Linear(16, 16), 0, config(), None, torch.ones(1, 1))
    assert tile.isfinite().all()


def test_swap_in_and_out_shares_the_weights(tiny_model):
    model = tiny_model("qwen2")  # has biases
    before = dict(model.named_modules())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    layers = MaskedLayers(model, maskable_linears(model), config())
    masked = [m for m in model.modules() if isinstance(m, MaskedLinear)]
    assert len(masked) == len(layers.layers) == 14
    assert masked[0].weight is before["model.layers.0.self_attn.q_proj"].weight
    assert set(layers.parameters()) == {
        f"{name}.{kind}" for name in layers.layers for kind in ("pattern_logits", "tile_logits")
    }
    layers.remove()
    layers.remove()
    assert dict(model.named_modules()) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])


def test_hard_density_is_that_of_the_hardened_masks(tiny_model):
    model = tiny_model("llama", intermediate_size=200)  # ragged edge tiles
    layers = MaskedLayers(model, maskable_linears(model), config())
    keep, _ = layers.harden()
    nonzeros = sum(int(mask.sum()) for mask in keep.values())
    assert layers.hard_density() == pytest.approx(nonzeros / sum(mask.numel() for mask in keep.values()))


@pytest.mark.parametrize("sparsity", [0.0, 0.13, 0.25, 0.45, 0.5])
def test_exact_budget_of_a_model(tiny_model, sparsity):
    model = tiny_model("llama", intermediate_size=200)
    exact = LearnConfig.from_preset("joint", sparsity, tile=(32, 32), exact_budget=True)
    keep, sparse = MaskedLayers(model, maskable_linears(model), exact).harden()
    total = sum(mask.numel() for mask in keep.values())
    nonzeros = sum(int(mask.sum()) for mask in keep.values())
    assert nonzeros <= total * (1 - sparsity) + 1e-6
    assert total * (1 - sparsity) - nonzeros < 32 * 32
    for name, mask in keep.items():
        spread = reference.expand_tiles(sparse[name], (32, 32), tuple(mask.shape))
        assert mask[~spread].all()
        assert (mask.reshape(-1, 4).sum(1)[spread.reshape(-1, 4)[:, 0]] == 2).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pattern_logits or fixed_keep, got both or neither"),
        (
            {"pattern_logits": torch.zeros(60, 6), "fixed_keep": torch.ones(10, 24).bool()},
            "got both or neither",
        ),
        ({"fixed_keep": torch.ones(10, 24).bool()}, "a fixed mask without tile_logits"),
    ],
)
def test_bad_construction_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedLinear(nn.Linear(24, 10), index=0, tile=TILE, state=SamplingState(0), **arguments)


def test_packed_fixed_pattern_is_half_a_byte_per_group():
    layer, keep = make_layer("tile")
    assert layer.fixed_pattern.numel() == 30
    assert torch.equal(layer.fixed_pattern, patch_kernels.pack_keep(keep))
    assert torch.equal(layer.pattern_keep(), keep)
    assert "fixed_pattern" not in layer.state_dict()
