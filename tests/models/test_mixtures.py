"""Mixtures are opened: every matrix of every expert is a layer, and nothing else about the model changes."""

from __future__ import annotations

import copy

import pytest
import torch
from support.families import FAMILIES, WINDOW, build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from patch.models.coverage import coverage_of
from patch.models.facts import model_fingerprint, weights_fingerprint
from patch.models.keep_masks import apply_keep_masks
from patch.models.mixtures import Experts, close_mixtures, open_mixtures, opened
from patch.models.structure import block_weights, layers_to_mask, maskable_linears
from patch.pruning import prune_model

# {family: (what its experts' module takes, layers of an expert, mixtures in two blocks)}
MIXTURES = {
    "Mixtral": ("routed", 3, 2),
    "OLMoE": ("routed", 3, 2),
    "Qwen3-MoE": ("routed", 3, 2),
    "Phi-3.5-MoE": ("routed", 3, 2),
    "GPT-OSS": ("routed", 3, 2),
    "DeepSeek-V3": ("routed", 3, 1),
    "Qwen2-MoE": ("routed", 3, 1),
    "Granite-MoE": ("routed", 3, 2),
    "Llama 4 (text)": ("batched", 3, 1),
    "Aria (text)": ("routed", 3, 2),
    "Nemotron-H": ("routed", 2, 1),
    "JetMoE": ("sorted", 1, 8),
    "Jamba": ("routed", 3, 1),
    "Qwen3-Next": ("routed", 3, 2),
}
IDS = torch.randint(3, 60, (2, WINDOW), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize("name", MIXTURES)
def test_an_opened_model_is_the_same_model(name):
    takes, layers, mixtures = MIXTURES[name]
    model = build(FAMILIES[name])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected, facts = logits(model), (weights_fingerprint(model), model_fingerprint(model))
    open_mixtures(model)
    found = dict(opened(model))
    assert len(found) == mixtures
    for experts in found.values():
        assert experts.form.takes == takes and experts.experts == 4
        assert sum(isinstance(module, nn.Linear) for module in experts.modules()) == 4 * layers
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert same(model.state_dict(), state)
    assert (weights_fingerprint(model), model_fingerprint(model)) == facts
    open_mixtures(model)
    assert dict(opened(model)) == found  # once is enough
    close_mixtures(model)
    assert torch.equal(logits(model), expected) and same(model.state_dict(), state)


@pytest.mark.parametrize("name", ["Qwen3-MoE", "GPT-OSS", "Llama 4 (text)", "Nemotron-H", "JetMoE"])
def test_layers_are_the_experts_own_matrices(name):
    """Changed as layers, the model's own tensors change, wherever the layers lie; loading goes the other way."""
    model = build(FAMILIES[name])
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    linears = maskable_linears(model)
    path, experts = next(opened(model))
    layers = {key: layer for key, layer in linears.items() if key.startswith(f"{path}.2")}
    assert len(layers) == MIXTURES[name][1]
    for layer in layers.values():
        layer.weight.data.mul_(2)
    twin = copy.deepcopy(model)  # its layers are no views of one tensor any more
    for changed in (model.state_dict(), twin.state_dict(), twin.state_dict()):
        for own in experts.form.parameters:
            wanted = dense[f"{path}.{own}"].clone()
            if not own.endswith("_bias"):
                wanted[2] *= 2
            assert torch.equal(changed.pop(f"{path}.{own}"), wanted)
        assert all(torch.equal(value, dense[key]) for key, value in changed.items())
    twin.load_state_dict(dense)
    assert same(twin.state_dict(), dense)
    assert torch.equal(twin.get_submodule(next(iter(layers))).weight * 2, layers[next(iter(layers))].weight)


def test_state_dict_takes_no_second_copy():
    model = copy.deepcopy(build(FAMILIES["GPT-OSS"]))
    open_mixtures(model)
    model = copy.deepcopy(model)
    state = model.state_dict()
    pointers = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    assert {tensor.untyped_storage().data_ptr() for tensor in state.values()} == pointers


@pytest.mark.parametrize("name", MIXTURES)
def test_a_pruned_model_is_saved_in_the_models_own_form(name, tmp_path):
    """save_pretrained of the opened model; plain transformers finds the zeros that were reported."""
    model = build(FAMILIES[name])
    masks = prune_model(model, "magnitude", progress=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert not any(isinstance(module, Experts) for module in again.modules())
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    zeros, before = (
        sum(int((p == 0).sum()) for key, p in m.named_parameters() if key.startswith("model.layers"))
        for m in (again, build(FAMILIES[name]))
    )
    assert zeros - before == sum(keep.numel() - int(keep.sum()) for keep in masks.values())


def test_only_experts_with_tokens_are_called():
    model = build(FAMILIES["Llama 4 (text)"])
    open_mixtures(model)
    _, experts = next(opened(model))
    called = []
    for index in range(experts.experts):
        layer = experts.layers(index)["up_proj"]
        layer.register_forward_pre_hook(lambda layer, args, index=index: called.append((index, len(args[0]))))
    x = torch.zeros(4, 5, 32)
    x[1, :2], x[3, 4] = 1, 1
    y = experts(x.reshape(-1, 32))
    assert called == [(1, 2), (3, 1)]
    assert y.reshape(4, 5, 32).ne(0).any(-1).nonzero().tolist() == [[1, 0], [1, 1], [3, 4]]


def test_without_values_experts_have_as_many_tokens():
    """Sizes of a run are asked of fake tensors, whose routes are unknown."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(FAMILIES["Mixtral"])
        open_mixtures(model)
        _, experts = next(opened(model))
        seen = []
        for index in range(experts.experts):
            layer = experts.layers(index)["down_proj"]
            layer.register_forward_pre_hook(lambda layer, args: seen.append(len(args[0])))
        assert logits(model).shape == (2, WINDOW, 64)
    assert seen == [2 * WINDOW * 2 // 4] * 4


def test_experts_of_other_devices_are_refused():
    model = build(FAMILIES["Mixtral"])
    open_mixtures(model)
    _, experts = next(opened(model))
    with pytest.raises(ValueError, match=r"expected numbers below 4, got 4; experts spread over devices are not"):
        experts(torch.zeros(1, 32), torch.tensor([[0, 4]]), torch.ones(1, 2))


def test_what_a_module_had_stays():
    """A module under two names, what is trained, and who reads the model's own tensors."""
    model = Decoder(Times(), nn.Identity())
    model.layers[1].experts = shared = model.layers[0].experts
    shared.down_proj.requires_grad_(False)
    own = shared.gate_up_proj
    open_mixtures(model)
    experts = model.layers[0].experts
    assert isinstance(experts, Experts) and model.layers[1].experts is experts
    assert experts.gate_up_proj.data_ptr() == own.data_ptr() and experts.act_fn is shared.act_fn
    assert all(parameter.requires_grad for parameter in experts.parameters())
    with pytest.raises(AttributeError, match="no_such"):
        _ = experts.no_such
    close_mixtures(model)
    assert model.layers[0].experts is model.layers[1].experts is shared
    assert shared.gate_up_proj.requires_grad and shared.gate_up_proj.data_ptr() == own.data_ptr()


class Unknown(nn.Module):
    """Experts that are multiplied in a way of their own."""

    def __init__(self, experts=4):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 16, 8))
        self.down_proj = nn.Parameter(torch.randn(experts, 8, 8))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        gate, up = torch.einsum("th,eoh->teo", hidden_states, self.gate_up_proj).chunk(2, dim=-1)
        y = torch.einsum("tei,ehi->teh", self.act_fn(gate) + up, self.down_proj)
        return (y.gather(1, top_k_index[..., None].expand(-1, -1, y.shape[-1])) * top_k_weights[..., None]).sum(1)


class Mixture(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.router, self.experts, self.dense = nn.Linear(8, 4), experts, nn.Linear(8, 8)


class Decoder(nn.Module):
    def __init__(self, *experts):
        super().__init__()
        self.layers = nn.ModuleList([Mixture(module) for module in experts])


class Times(Unknown):
    """The same with the usual product between."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        gate, up = torch.einsum("th,eoh->teo", hidden_states, self.gate_up_proj).chunk(2, dim=-1)
        y = torch.einsum("tei,ehi->teh", self.act_fn(gate) * up, self.down_proj)
        return (y.gather(1, top_k_index[..., None].expand(-1, -1, y.shape[-1])) * top_k_weights[..., None]).sum(1)


def test_forms_are_found_by_what_they_compute():
    model = Decoder(Times(), Unknown())
    open_mixtures(model)
    assert [name for name, _ in opened(model)] == ["layers.0.experts"]
    assert "layers.0.experts.3.gate_proj" in maskable_linears(model)


def test_what_is_not_known_is_refused_with_its_share():
    model = Decoder(Unknown(), Unknown())
    share = 768 / (768 + 64 + 32)
    message = (
        r"expected the decoder's weights in nn.Linear layers, or in experts of a form that is known, got another form "
        rf"in 'layers\.\*\.experts' \({share:.1%}\)\. Leave them dense with exclude=\['layers\.\*\.experts'\]"
    )
    for make in (lambda: layers_to_mask(model), lambda: prune_model(model, "magnitude", progress=False)):
        with pytest.raises(ValueError, match=message):
            make()
    masks = prune_model(model, "magnitude", exclude=["layers.*.experts"], progress=False)
    assert list(masks) == ["layers.0.dense", "layers.1.dense"]
    assert model.layers[0].experts.down_proj.count_nonzero() == 256
    apply_keep_masks(model, masks)  # masks that there are say themselves what stays dense


def test_a_large_part_in_another_form_is_refused_too():
    model = Decoder(nn.Identity())
    model.layers[0].table = nn.ParameterList([nn.Parameter(torch.randn(8, 8))])
    with pytest.raises(ValueError, match=r"got another form in 'layers\.\*\.table' \(40\.0%\)"):
        layers_to_mask(model)
    assert list(layers_to_mask(model, ["*.table"])) == ["layers.0.router", "layers.0.dense"]


def test_weights_of_experts_are_counted_as_layers():
    model = build(FAMILIES["Mixtral"])
    total = sum(block_weights(model).values())
    linears = maskable_linears(model)
    assert sum(block_weights(model).values()) == total
    found = coverage_of(model, {name: layer.weight.numel() for name, layer in linears.items()}, 0)
    assert found.left_dense == {"model.layers.*.mlp.gate.weight": 2 * 4 * 32}
