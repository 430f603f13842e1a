"""Experts that few calibration tokens reach: named before anything changes, and treated by the stated rule."""

from __future__ import annotations

import copy

import pytest
import torch
from support.families import FAMILIES, build
from torch import nn

from patch.models.mixtures import opened
from patch.models.structure import maskable_linears
from patch.pruning import BlockOptions, ExpertOptions, TileOptions, compensate, prune_model
from patch.pruning.block_inputs import capture_block_inputs
from patch.pruning.fisher import tile_losses
from patch.pruning.hessian import Statistics

IDS = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    """A mixture of which expert 3 of the first block gets no token, others few."""
    model = build(FAMILIES["Mixtral"])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1  # so that the first value that the router sees is positive
        model.model.layers[0].mlp.gate.weight[3] = torch.eye(32)[0] * -100
    return model


def tokens_of(model, ids=IDS):
    """{layer of an expert: tokens that reach it} in the model as it is, by its own routers."""
    linears = maskable_linears(model)
    counts = {name: 0 for name in linears if ".experts." in name}
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: counts.__setitem__(name, counts[name] + len(args[0]))
        )
        for name, layer in linears.items()
        if name in counts
    ]
    with torch.no_grad():
        for sample in ids:
            model(sample[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return counts


def few_of(counts, least):
    return {name for name, count in counts.items() if count < least}


def text_of(counts, least):
    """How a message names the experts."""
    experts = {}
    for name, count in counts.items():
        path, _, rest = name.partition(".experts.")
        experts.setdefault(f"{path}.experts", {})[int(rest.split(".")[0])] = count
    parts = []
    for path, found in experts.items():
        if few := [f"{index} ({count})" for index, count in sorted(found.items()) if count < least]:
            parts.append(f"{path}: {', '.join(few)}")
    return "; ".join(parts)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "thanos"])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "tiles"])
def test_experts_with_few_tokens_are_named_and_pruned_by_magnitude(model, method, pattern, caplog):
    counts = tokens_of(copy.deepcopy(model))
    least = 60
    few = few_of(counts, least)
    assert 9 <= len(few) < len(counts) == 24 and counts["model.layers.0.mlp.experts.3.up_proj"] == 0
    sparsity = {"2:4": 0.5, "unstructured": 0.3, "tiles": 0.5}[pattern]
    options = {"pattern": pattern, "sparsity": sparsity, "progress": False}
    if pattern == "tiles":
        options["tiles"] = TileOptions(by="error", tile=(8, 8))
    by_magnitude = copy.deepcopy(model)
    dense = {name: layer.weight.clone() for name, layer in maskable_linears(by_magnitude).items()}
    expected = prune_model(by_magnitude, "magnitude", **options)
    masks = prune_model(model, method, calibration=IDS, experts=ExpertOptions(least), **options)
    linears = maskable_linears(model)
    for name in few:
        if pattern != "unstructured":  # of which magnitude prunes by layer, Wanda by row
            assert torch.equal(masks[name], expected[name]), name
        assert torch.equal(linears[name].weight, dense[name] * masks[name]), name
    others = [name for name in masks if name not in few]
    assert any(not torch.equal(masks[name], expected[name]) for name in others)
    said = [record.getMessage() for record in caplog.records if "experts get fewer" in record.getMessage()]
    experts = len(few) // 3
    assert said == [
        f"{experts} of 8 experts get fewer than {least} calibration tokens: {text_of(counts, least)}; "
        "they go by magnitude; few='route' (--few-experts route) gives them more, as does more text"
    ]


def test_refuse_names_them_before_anything_changes(model):
    counts = tokens_of(copy.deepcopy(model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options = ExpertOptions(40, "refuse")
    with pytest.raises(ValueError) as error:
        prune_model(model, "wanda", calibration=IDS, experts=options, progress=False)
    message = str(error.value)
    assert message.startswith("calibration: expected 40 tokens or more for every expert, but ")
    assert text_of(counts, 40) in message and "leave them dense with exclude" in message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(
        TypeError, match=r"experts: expected patch\.pruning\.ExpertOptions, got int\. Write ExpertOptions"
    ):
        prune_model(model, "wanda", calibration=IDS, experts=40, progress=False)


def test_forced_routing_calls_them_with_the_tokens_they_score_best(model, caplog):
    reference = copy.deepcopy(model)
    counts = tokens_of(copy.deepcopy(model))
    name = "model.layers.0.mlp.experts.3.up_proj"
    assert counts[name] == 0
    wanted = 12
    masks = prune_model(model, "wanda", calibration=IDS, experts=ExpertOptions(wanted, "route"), progress=False)
    assert f"{text_of(counts, wanted)}; 2 are called with more tokens, those that the router scores" in caplog.text
    assert "magnitude" not in caplog.text
    # By hand: of each sample the three tokens that the router scores highest for expert 3.
    inputs = []
    mlp = reference.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for sample in IDS:
            reference(sample[None], use_cache=False)
    best = [x[mlp.gate(x)[0][:, 3].argsort(descending=True, stable=True)[: wanted // len(IDS)]] for x in inputs]
    linear = maskable_linears(reference)[name]
    norms = torch.cat(best).square().sum(0)
    score = linear.weight.abs() * norms.sqrt()
    kept = score.reshape(-1, 4).argsort(1, descending=True)[:, :2]
    expected = torch.zeros(linear.weight.numel() // 4, 4, dtype=torch.bool).scatter_(1, kept, True)
    assert torch.equal(masks[name], expected.view_as(linear.weight))
    _, experts = next(opened(model))
    assert experts.extra_rows is None


def test_routing_leaves_what_the_model_computes(model):
    """Rows that are added for statistics do not reach the results: later blocks see what they would have seen."""
    seen = {}
    for few in ("magnitude", "route"):
        twin = copy.deepcopy(model)
        linears = {name: layer for name, layer in maskable_linears(twin).items() if "layers.1.self_attn" in name}
        linears[name] = maskable_linears(twin)[name := "model.layers.0.mlp.experts.0.up_proj"]
        exclude = [key for key in maskable_linears(twin) if key not in linears]
        prune_model(twin, "wanda", calibration=IDS, exclude=exclude, experts=ExpertOptions(60, few), progress=False)
        seen[few] = twin
    with torch.no_grad():
        inputs = [capture_block_inputs(twin, IDS) for twin in seen.values()]
        assert torch.equal(inputs[0].hidden[0], inputs[1].hidden[0])
        y = [twin.model.layers[0].mlp(torch.ones(1, 3, 32)) for twin in seen.values()]
    assert y[0].shape == y[1].shape == (1, 3, 32)


def test_it_is_the_same_again(model):
    first, second = (
        prune_model(copy.deepcopy(model), "sparsegpt", calibration=IDS, experts=ExpertOptions(30, few), progress=False)
        for few in ("route", "route")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["least_squares", "sparsegpt", "blocks"])
def test_compensation_leaves_weights_of_unseen_experts(model, method):
    dense = {name: layer.weight.clone() for name, layer in maskable_linears(model).items()}
    masks = {name: (torch.arange(weight.numel()) % 4 < 2).view_as(weight) for name, weight in dense.items()}
    few = few_of(tokens_of(copy.deepcopy(model)), 60)
    blocks = {"blocks": BlockOptions(epochs=1)} if method == "blocks" else {}
    result = compensate(
        model, masks, calibration=IDS, method=method, experts=ExpertOptions(60), progress=False, **blocks
    )
    linears = maskable_linears(model)
    unseen = "model.layers.0.mlp.experts.3.down_proj"
    assert unseen in few
    for name in few if method != "blocks" else [unseen]:
        assert torch.equal(linears[name].weight, dense[name] * masks[name]), name
    assert any(not torch.equal(layer.weight, dense[name] * masks[name]) for name, layer in linears.items())
    assert all(after <= before * (1 + 1e-6) for before, after in result.layer_errors.values())


def test_blocks_of_which_only_unseen_experts_are_pruned(model):
    """No sample gives their weights a gradient."""
    dense = {name: layer.weight.clone() for name, layer in maskable_linears(model).items()}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in dense.items()}
    unseen = "model.layers.0.mlp.experts.3.up_proj"
    masks[unseen].view(-1)[::2] = False
    result = compensate(model, masks, calibration=IDS, blocks=BlockOptions(epochs=1), progress=False)
    assert list(result.block_errors) == [0]
    linears = maskable_linears(model)
    assert all(torch.equal(linears[name].weight, dense[name] * masks[name]) for name in dense)


class Listed(nn.Module):
    """A mixture as a list, of which a token reaches the expert of its number."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x):
        chosen = self.gate(x).argmax(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            y[chosen == index] = expert(x[chosen == index])
        return x + y


class ListModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Listed(), Listed()])

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("few", ["magnitude", "route"])
def test_lists_of_experts_have_the_same_rule(few, caplog):
    """Their code calls them, so that no more tokens can be sent to them: magnitude is what is left."""
    torch.manual_seed(1)
    model = ListModel()
    with torch.no_grad():
        model.blocks[0].gate.weight[2] = 0
        model.blocks[0].gate.bias[:] = torch.tensor([0.0, 0, -100, 0])
    dense = model.blocks[0].experts[2].weight.clone()
    ids = torch.randint(0, 16, (2, 64), generator=torch.Generator().manual_seed(0))
    masks = prune_model(model, "sparsegpt", calibration=ids, experts=ExpertOptions(4, few), progress=False)
    assert "blocks.0.experts: 2 (0)" in caplog.text and "they go by magnitude" in caplog.text
    assert list(masks) == [f"blocks.{block}.experts.{index}" for block in (0, 1) for index in range(4)]
    largest = dense.abs().reshape(-1, 4).argsort(1, descending=True)[:, :2]
    expected = torch.zeros(16, 4, dtype=torch.bool).scatter_(1, largest, True).view(8, 8)
    assert torch.equal(masks["blocks.0.experts.2"], expected)
    assert torch.equal(model.blocks[0].experts[2].weight, dense * expected)


def test_tokens_of_an_expert_are_what_its_statistics_are_made_of(model, monkeypatch):
    rows = {}
    add = Statistics.add

    def noted(self, x):
        rows[id(self)] = rows.get(id(self), 0) + len(x)
        add(self, x)

    monkeypatch.setattr(Statistics, "add", noted)
    counts = tokens_of(copy.deepcopy(model))
    first = {count for name, count in counts.items() if "layers.0" in name}
    prune_model(model, "sparsegpt", calibration=IDS, experts=ExpertOptions(1), progress=False)
    assert len(first - {0}) == 3 and first - {0} <= set(rows.values())


def test_losses_of_tiles_are_found_in_a_mixture_that_is_not_opened():
    opened_one, closed_one = build(FAMILIES["Mixtral"]), build(FAMILIES["Mixtral"])
    masks = {name: torch.zeros_like(m.weight, dtype=torch.bool) for name, m in maskable_linears(opened_one).items()}
    expected, got = (tile_losses(model, masks, IDS, (16, 16), progress=False) for model in (opened_one, closed_one))
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    assert any(loss.any() for name, loss in got.items() if ".experts." in name)
