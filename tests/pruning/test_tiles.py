"""Pruning to dense and 2:4 tiles: losses against plain autograd, budgets, masks, what updates in dense tiles."""

from __future__ import annotations

import copy

import pytest
import torch
from support.methods import ONE_WEIGHT_METHODS
from support.models import build_spread_model, build_tiny_model
from torch.nn import functional

from patch.mask import expand_tiles, nonzero_budget, tile_areas, tile_counts
from patch.models.keep_masks import keep_masks, measured_sparsity
from patch.models.structure import linear_at, maskable_linears
from patch.pruning import TileOptions, compensate, prune_model, prune_tiles, prune_weight
from patch.pruning.fisher import tile_losses
from patch.pruning.tiles import choose_dense_tiles

# 32 hidden and 48 intermediate channels: tiles of 20 x 24 are ragged on both sides.
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
TILE = (20, 24)


def build(arch="llama", dtype=torch.float32):
    """A tiny model whose layers have gradients of different sizes."""
    return build_spread_model(arch, scale=0.3, dtype=dtype, **SMALL)


def token_ids(samples=4, seqlen=16, seed=0):
    return torch.randint(0, 256, (samples, seqlen), generator=torch.Generator().manual_seed(seed))


def two_of_four(model):
    return {name: torch.arange(w.weight.numel()).reshape(w.weight.shape) % 4 < 2 for name, w in linears(model)}


def linears(model):
    return maskable_linears(model).items()


def plain_losses(model, masks, ids):
    """By one backward pass through the whole model a sample, tile by tile."""
    losses = {name: torch.zeros(-(-k.shape[0] // TILE[0]), -(-k.shape[1] // TILE[1])) for name, k in masks.items()}
    losses = {name: grid.double() for name, grid in losses.items()}
    for sample in ids:
        model.zero_grad()
        logits = model(input_ids=sample[None]).logits[0, :-1]
        functional.cross_entropy(logits, sample[1:]).backward()
        for name, keep in masks.items():
            weight = linear_at(model, name).weight
            lost = (weight.grad * weight.detach()).square().masked_fill(keep, 0)
            for row in range(losses[name].shape[0]):
                for col in range(losses[name].shape[1]):
                    part = lost[row * TILE[0] : (row + 1) * TILE[0], col * TILE[1] : (col + 1) * TILE[1]]
                    losses[name][row, col] += part.sum() / len(ids)
    model.zero_grad()
    return losses


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "opt"])
def test_losses_are_those_of_a_backward_pass_through_the_whole_model(arch):
    extra = {"ffn_dim": 48, "word_embed_proj_dim": 32} if arch == "opt" else {}
    sizes = {k: v for k, v in SMALL.items() if arch != "opt" or k in ("hidden_size", "num_attention_heads")}
    model = build_tiny_model(arch, dtype=torch.float64, **sizes, **extra)
    masks, ids = two_of_four(model), token_ids()
    expected = plain_losses(model, masks, ids)
    got = tile_losses(model, masks, ids, TILE, progress=False)
    assert got.keys() == expected.keys()
    for name, losses in got.items():
        torch.testing.assert_close(losses, expected[name], rtol=1e-9, atol=0, msg=name)


def test_losses_leave_the_model_as_it_was():
    model = build()
    linear = next(iter(maskable_linears(model).values()))
    linear.weight.requires_grad_(False)
    linear.weight.grad = torch.ones_like(linear.weight)
    model.train()
    before = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    tile_losses(model, two_of_four(model), token_ids(), TILE, progress=False)
    assert model.training and [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(linear.weight.grad, torch.ones_like(linear.weight))
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_size_of_a_chunk_changes_nothing():
    model, ids = build(), token_ids(5)
    masks = two_of_four(model)
    whole = tile_losses(model, masks, ids, TILE, chunk=5, progress=False)
    parts = tile_losses(model, masks, ids, TILE, chunk=2, progress=False)
    assert all(torch.equal(whole[name], parts[name]) for name in masks)


def test_an_interrupted_choice_goes_on_where_it_stopped(tmp_path, monkeypatch):
    from patch.pruning import fisher

    model, ids = build(), token_ids(6)
    masks = two_of_four(model)
    whole = tile_losses(model, masks, ids, TILE, progress=False)
    runs, real = [], fisher._Run

    def interrupted(*args):
        if len(runs) == 4:
            raise KeyboardInterrupt
        runs.append(args)
        return real(*args)

    monkeypatch.setattr(fisher, "_Run", interrupted)
    where = {"chunk": 2, "stages": tmp_path, "key": "same", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        tile_losses(model, masks, ids, TILE, **where)
    monkeypatch.setattr(fisher, "_Run", lambda *args: runs.append(args) or real(*args))
    resumed = tile_losses(model, masks, ids, TILE, **where)
    assert len(runs) == 6
    assert all(torch.equal(whole[name], resumed[name]) for name in masks)
    other = tile_losses(model, masks, ids[:2], TILE, chunk=2, stages=tmp_path, key="other", progress=False)
    assert len(runs) == 8
    assert not torch.equal(other[name := next(iter(masks))], whole[name])


@pytest.mark.parametrize("sparsity", [0.0, 0.11, 0.25, 0.45, 0.5])
@pytest.mark.parametrize("groups", [None, {"a": 0, "b": 0, "c": 1}])
def test_every_group_has_its_sparsity_and_less_than_a_tile_more(sparsity, groups):
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (50, 64), "b": (64, 24), "c": (20, 72)}
    masks = {name: torch.arange(n * k).reshape(n, k) % 4 < 2 for name, (n, k) in shapes.items()}
    losses = {name: torch.rand(-(-n // 20), -(-k // 24), generator=generator) for name, (n, k) in shapes.items()}
    dense = choose_dense_tiles(losses, masks, sparsity, TILE, groups)
    for group in {0, 1} if groups else {None}:
        names = [name for name in masks if groups is None or groups[name] == group]
        areas = {name: tile_areas(TILE, shapes[name]) for name in names}
        kept = {n: torch.where(dense[n], areas[n], tile_counts(masks[n], TILE)) for n in names}
        total = sum(int(area.sum()) for area in areas.values())
        nonzeros, budget = sum(int(count.sum()) for count in kept.values()), nonzero_budget(total, sparsity)
        assert budget - 240 < nonzeros <= budget
        # What is dense costs more a gained weight than what is not.
        values = {n: losses[n] / (areas[n] - tile_counts(masks[n], TILE)) for n in names}
        chosen = torch.cat([values[n][dense[n]] for n in names])
        others = torch.cat([values[n][~dense[n]] for n in names])
        assert not len(chosen) or not len(others) or chosen.min() >= others.max()


@pytest.mark.parametrize("by", ["fisher", "error", "share"])
@pytest.mark.parametrize("method", ONE_WEIGHT_METHODS)
def test_masks_are_dense_tiles_and_two_of_four(method, by):
    model, dense = build(), build()
    tiles = TileOptions(by=by, tile=TILE)
    pruned = prune_tiles(model, method, sparsity=0.3, tiles=tiles, calibration=token_ids(), progress=False)
    assert 0.3 <= measured_sparsity(pruned.masks) < 0.3 + 240 / sum(k.numel() for k in pruned.masks.values())
    for name, keep in pruned.masks.items():
        weight, original = linear_at(model, name).weight, linear_at(dense, name).weight
        inside = expand_tiles(~pruned.tile_is_sparse[name], TILE, keep.shape)
        assert keep[inside].all()
        groups, apart = keep.reshape(-1, 4), ~inside.reshape(-1, 4).any(1)
        assert (groups[apart].sum(1) == 2).all()
        assert not weight[~keep].any()
        assert torch.equal(keep_masks(model)[name], keep)
        if method in ("magnitude", "wanda"):
            assert torch.equal(weight[keep], original[keep])
    changed = [(linear_at(model, n).weight != linear_at(dense, n).weight) & k for n, k in pruned.masks.items()]
    assert any(bool(c.any()) for c in changed) == (method in ("sparsegpt", "thanos"))


def test_dense_tiles_make_up_for_the_others():
    """SparseGPT's sweep with the final mask given changes the same weights: dense tiles were part of the sweep."""
    model, again = build(dtype=torch.float64), build(dtype=torch.float64)
    tiles = TileOptions(tile=TILE)
    pruned = prune_tiles(model, "sparsegpt", sparsity=0.3, tiles=tiles, calibration=token_ids(), progress=False)
    compensate(again, pruned.masks, calibration=token_ids(), method="sparsegpt", progress=False)
    original = build(dtype=torch.float64)
    moved = 0
    for name, grid in pruned.tile_is_sparse.items():
        weight = linear_at(model, name).weight
        assert torch.equal(weight, linear_at(again, name).weight), name
        inside = expand_tiles(~grid, TILE, weight.shape)
        moved += int((weight != linear_at(original, name).weight)[inside].sum())
    assert moved > 0


def test_half_the_weights_are_two_of_four_and_none_is_dense():
    ids = token_ids()
    for sparsity, tile in ((0.5, TILE), (0.0, (128, 128))):
        model, plain = build(), build()
        tiles = TileOptions(tile=tile)
        masks = prune_model(
            model, "sparsegpt", pattern="tiles", sparsity=sparsity, tiles=tiles, calibration=ids, progress=False
        )
        if sparsity:
            expected = prune_model(plain, "sparsegpt", calibration=ids, progress=False)
            assert all(torch.equal(masks[name], expected[name]) for name in masks)
        else:
            assert all(keep.all() for keep in masks.values())
        for name, linear in linears(model):
            assert torch.equal(linear.weight, linear_at(plain, name).weight), name


@pytest.mark.parametrize("budget", ["model", "block", "layer"])
def test_the_budget_is_that_of_the_model_of_a_block_or_of_a_layer(budget):
    model = build()
    tiles = TileOptions(budget=budget, tile=(4, 4))
    masks = prune_model(
        model, "wanda", pattern="tiles", sparsity=0.25, tiles=tiles, calibration=token_ids(), progress=False
    )
    names = {"model": [""], "block": ["layers.0.", "layers.1."], "layer": list(masks)}[budget]
    for part in names:
        own = {name: keep for name, keep in masks.items() if part in name}
        assert measured_sparsity(own) == pytest.approx(0.25, abs=8 / sum(keep.numel() for keep in own.values()))
    shares = {round(measured_sparsity({name: keep}), 3) for name, keep in masks.items()}
    assert (len(shares) == 1) == (budget == "layer")


@pytest.mark.parametrize("method", ONE_WEIGHT_METHODS)
def test_one_weight_keeps_the_tiles_that_cost_most(method):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 48, generator=generator)
    weight[20:, 24:] *= 10  # this tile, which is right of what is pruned in its rows
    inputs = [torch.randn(64, 48, generator=generator) for _ in range(2)]
    pruned = prune_weight(weight, method, pattern="tiles", sparsity=0.375, inputs=inputs, tile=TILE)
    inside = torch.zeros_like(pruned.keep)
    inside[20:, 24:] = True
    assert pruned.keep[inside].all()
    assert (pruned.keep.reshape(-1, 4)[~inside.reshape(-1, 4).any(1)].sum(1) == 2).all()
    assert (~pruned.keep).float().mean() == 0.375
    assert torch.equal(pruned.weight[inside], weight[inside]) == (method in ("magnitude", "wanda"))


REFUSED = {
    "too sparse": ({"sparsity": 0.6}, "sparsity: expected .*0.5, got 0.6. .*unstructured"),
    "sparsity NaN": ({"sparsity": float("nan")}, "sparsity: expected .*0.5, got nan"),
    "no text": ({"calibration": None}, "token ids for method 'wanda', got none. .*method='magnitude' with by='error'"),
    "no text for fisher": (
        {"method": "magnitude", "calibration": None},
        "expected token ids for tiles by fisher, got none. .*by='error'",
    ),
    "one token": ({"calibration": token_ids(2, 1)}, "expected samples of 2 to 128 tokens .*got 1"),
    "method": ({"method": "prox_sparse"}, "pattern: expected 2:4 for method ProxSparse, got tiles"),
    "tiles elsewhere": ({"pattern": "2:4", "sparsity": 0.5}, "tiles: expected none with pattern 2:4, got one. Leave"),
    "stages elsewhere": (
        {"pattern": "2:4", "sparsity": 0.5, "tiles": None, "stages": "x"},
        "stages: expected none with pattern 2:4, got one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_any_work(case):
    arguments, message = REFUSED[case]
    values = {
        "method": "wanda",
        "pattern": "tiles",
        "sparsity": 0.3,
        "calibration": token_ids(),
        "tiles": TileOptions(),
    }
    values |= arguments
    model = build()
    with pytest.raises(ValueError, match=message):
        prune_model(model, values.pop("method"), progress=False, **values)
    assert not keep_masks(model)


def test_options_are_records():
    model = build()
    with pytest.raises(TypeError, match=r"tiles: expected patch.pruning.TileOptions, got dict. Write TileOptions\("):
        prune_tiles(model, "wanda", sparsity=0.4, calibration=token_ids(), tiles={"by": "fisher"})
    with pytest.raises(TypeError, match=r"blocks: expected patch.pruning.BlockOptions, got dict. Write BlockOptions\("):
        compensate(model, two_of_four(model), calibration=token_ids(), blocks={"epochs": 1})
    assert not keep_masks(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"by": "hessian"}, "by: expected one of fisher, error, share, got 'hessian'"),
        ({"budget": "row"}, "budget: expected one of model, block, layer, got 'row'"),
        ({"tile": (0, 4)}, "tile: expected .*got"),
        ({"samples": 0}, "samples: expected an integer >= 1, got 0"),
    ],
)
def test_options_of_tiles_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        TileOptions(**fields)
