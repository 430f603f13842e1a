"""Packed mixtures: the masked model's results, through files, and folders that must be refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES, build
from support.models import mask_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

import patch
from patch.models.keep_masks import apply_keep_masks
from patch.models.mixtures import Experts, close_mixtures, opened
from patch.models.structure import maskable_linears
from patch.packed.convert import pack_model, unpack_model
from patch.packed.experts import PackedExperts
from patch.packed.load import load
from patch.packed.quantization_config import PatchConfig
from patch.packed.save import save_dense, save_packed
from patch.packed.swap import cast_model, packed_layers, packed_zeros
from patch_kernels import TiledExperts

IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
NAMES = ["Qwen3-MoE", "GPT-OSS", "Llama 4 (text)", "Nemotron-H", "JetMoE"]
EXPERTS = "model.layers.0.mlp.experts"


def masked(name, exclude=()):
    """A model with masks of which about every second matrix is 2:4."""
    model = build(FAMILIES[name])
    cast_model(model, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for layer, linear in maskable_linears(model, exclude).items():
        linear.weight.data.add_((linear.weight == 0) * 1e-3)  # what is kept is not zero by chance
        groups = torch.rand(linear.weight.numel() // 4, 4, generator=generator).argsort(1) < 2
        is_sparse = torch.rand(1, generator=generator) < 0.6
        masks[layer] = (
            groups.view(linear.weight.shape) if is_sparse else torch.ones_like(linear.weight, dtype=torch.bool)
        )
    apply_keep_masks(model, masks, exclude=exclude)
    return model, masks


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.fixture
def packed():
    return pack_model(masked("Qwen3-MoE")[0])


@pytest.fixture
def saved(packed, tmp_path):
    return save_packed(packed, None, tmp_path / "model")


@pytest.mark.parametrize("name", NAMES)
def test_every_form_goes_through_files_and_back(name, tmp_path):
    model, masks = masked(name)
    dense = copy.deepcopy(model)
    close_mixtures(dense)
    expected = {key: value.clone() for key, value in dense.state_dict().items()}
    pack_model(model)
    assert any(isinstance(module, PackedExperts) for module in model.modules())
    assert not any(isinstance(module, Experts) for module in model.modules())
    spread = logits(dense).float().std()
    assert (logits(model) - logits(dense)).float().abs().median() < 0.02 * spread
    # Zeros in the files are those of the masks.
    save_packed(model, None, tmp_path / "one")
    loaded = load(tmp_path / "one")
    pruned = sum(keep.numel() - int(keep.sum()) for keep in masks.values())
    assert sum(zeros for zeros, _ in packed_zeros(loaded).values()) == pruned
    assert sum(total for _, total in packed_zeros(loaded).values()) == sum(keep.numel() for keep in masks.values())
    config = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    for again in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "one")):
        assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "two", max_shard_size="60KB")
    again = patch.load(tmp_path / "two")
    assert torch.equal(logits(again), logits(model))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(IDS, **options), model.generate(IDS, **options))
    # Dense export of the packed model: the model's own form, read by plain transformers.
    save_dense(again, None, tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert plain.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in plain.state_dict().items())
    again.dequantize()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    assert type(again.get_submodule(next(opened(masked(name)[0]))[0])) is type(
        build(FAMILIES[name]).get_submodule(next(opened(masked(name)[0]))[0])
    )


def test_plain_transformers_refuses_a_folder_of_which_only_experts_are_packed(tmp_path):
    """No attention layer's shape stops it: the experts' own name does."""
    model, masks = masked("OLMoE", [f"*.{name}_proj" for name in "qkvo"])
    pack_model(model, masks)
    assert {type(layer) for _, layer in packed_layers(model)} == {TiledExperts}
    save_packed(model, None, tmp_path / "model")
    code = """
import sys, transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("refused:", error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0 and "refused:" in result.stdout, result.stderr
    assert "experts.gate_up_proj" in result.stderr


def test_experts_that_were_left_out_stay_as_they_are(tmp_path):
    """Of a mixture with masks the others are packed dense; one without any mask is not touched."""
    exclude = ["*.layers.1.mlp.experts.*", "*.layers.0.mlp.experts.2.*"]
    model, masks = masked("Mixtral", exclude)
    dense = {name: layer.weight.clone() for name, layer in maskable_linears(model).items()}
    own = model.model.layers[1].mlp.experts.original
    pack_model(model, masks)
    assert model.model.layers[1].mlp.experts is own
    gate_up = model.get_submodule(f"{EXPERTS}.gate_up")
    for part, projection in enumerate(("gate_proj", "up_proj")):
        found = gate_up.tiled_weight(2, part)
        assert not found.tile_is_sparse.any()
        assert torch.equal(found.unpack(), dense[f"{EXPERTS}.2.{projection}"])
    save_packed(model, None, tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")), logits(model))


def test_folders_without_experts_keep_their_version(tiny_model, tmp_path):
    pack_model(mask_model(tiny_model(dtype=torch.bfloat16))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2 and not any("experts" in layer for layer in config["layers"].values())


def test_results_of_an_expert_are_those_of_its_layers():
    """By hand, in whole numbers: up, squared ReLU, down, weighted sum."""
    model = build(FAMILIES["Nemotron-H"])
    cast_model(model, torch.bfloat16)
    linears = maskable_linears(model)
    path, experts = next(opened(model))
    generator = torch.Generator().manual_seed(0)
    for index in range(4):
        for layer in experts.layers(index).values():
            layer.weight.data.copy_(torch.randint(-1, 2, layer.weight.shape, generator=generator))
    weights = {name: layer.weight.float().clone() for name, layer in linears.items()}
    pack_model(model, {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in linears.items()})
    x = torch.randint(-1, 2, (5, 32), generator=generator).to(torch.bfloat16)
    chosen = torch.tensor([[0, 3], [3, 1], [1, 0], [0, 1], [3, 0]])
    share = torch.tensor([[1.0, 2], [1, 1], [2, 1], [1, 1], [1, 2]], dtype=torch.bfloat16)
    expected = torch.zeros(5, 32)
    for token in range(5):
        for expert, weight in zip(chosen[token].tolist(), share[token].float(), strict=True):
            up = functional.linear(x[token].float(), weights[f"{path}.{expert}.up_proj"])
            between = up.relu().square().bfloat16().float()
            expected[token] += weight * functional.linear(between, weights[f"{path}.{expert}.down_proj"]).bfloat16()
    assert torch.equal(model.get_submodule(path)(x, chosen, share).float(), expected.bfloat16().float())


@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS"])
def test_compile_without_graph_breaks(name):
    model = pack_model(masked(name)[0])
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected, rtol=2e-2, atol=2e-2)


def test_gradients_reach_what_is_before_packed_experts():
    model, _ = masked("Mixtral")
    experts, module = copy.deepcopy(model.model.layers[0].mlp.experts), pack_model(model).model.layers[0].mlp.experts
    chosen = torch.tensor([[0, 1], [2, 1]])
    found = []
    for called in (experts, module):
        x = torch.ones(2, 32, dtype=torch.bfloat16).requires_grad_()
        share = torch.full((2, 2), 0.5, dtype=torch.bfloat16, requires_grad=True)
        called(x, chosen, share).sum().backward()
        found.append((x.grad, share.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-4)


def test_a_copy_is_a_model_of_its_own(packed):
    expected = logits(packed)
    twin = copy.deepcopy(packed)
    packed.get_submodule(f"{EXPERTS}.down").payload.zero_()
    assert torch.equal(logits(twin), expected) and not torch.equal(logits(packed), expected)
    packed.load_state_dict(twin.state_dict())
    assert torch.equal(logits(packed), expected)
    assert torch.equal(logits(unpack_model(twin)).isfinite(), torch.ones(2, 24, 64, dtype=torch.bool))


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def edit_layer(**values):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["layers"][f"{EXPERTS}.gate_up"] |= values
        config["quantization_config"].pop("config_sha256", None)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


DAMAGES = {
    "other experts": (
        edit_layer(experts=8, payload_bytes=8 * 2 * 18432),
        r"expected matrices of .* got \{'gate_up': \(8,",
    ),
    "one of two": (edit_layer(experts=None), "expected experts and parts of a mixture, got one of them alone"),
    "three parts": (edit_layer(parts=3), "parts: expected 1, or 2 for gate and up, got 3"),
    "half a tile": (edit_layer(payload_bytes=18433), "for 1x1 tiles of 4 experts with 2 matrices, got 18433"),
    "another dtype": (edit_layer(dtype="float16"), "expected one dtype for all layers"),
    "no payload": (
        edit_tensors(lambda t: t.pop(f"{EXPERTS}.gate_up.weight")),
        r"gate_up.weight: expected U8 .* got nothing",
    ),
    "no flags": (
        edit_tensors(lambda t: t.pop(f"{EXPERTS}.down.tile_is_sparse")),
        r"down.tile_is_sparse: expected U8 \(4, 1, 1\), got nothing",
    ),
    "a flag of 2": (
        edit_tensors(lambda t: t[f"{EXPERTS}.down.tile_is_sparse"].fill_(2)),
        r"down.tile_is_sparse: expected flags of 0 and 1, got 2",
    ),
    "other flags": (
        edit_tensors(lambda t: t[f"{EXPERTS}.down.tile_is_sparse"].fill_(1)),
        r"down: expected a payload of \d+ bytes for its tiles, got \d+",
    ),
    "a changed byte": (
        edit_tensors(lambda t: t[f"{EXPERTS}.gate_up.weight"][7:8].bitwise_xor_(1)),
        f"{EXPERTS}.gate_up: expected a packed weight of SHA-256",
    ),
    "no such block": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace("layers.0.mlp.experts", "layers.0.mlp.others")
        ),
        r"layer 'model.layers.0.mlp.others': expected a mixture of experts as packed, found nothing",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_refused(saved, name):
    damage, message = DAMAGES[name]
    damage(saved)
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_another_dtype_is_refused(saved):
    with pytest.raises(
        ValueError, match=r"expected dtype torch.bfloat16 as packed, got torch.float32. Leave dtype out"
    ):
        load(saved, dtype=torch.float32)


def test_description_of_a_mixture():
    layer = {"out_features": 16, "in_features": 32, "bias": False, "dtype": "bfloat16", "sha256": "0" * 64}
    layer |= {"payload_bytes": 8 * 18432, "experts": 4, "parts": 2}
    config = PatchConfig(
        layers={"a.experts.gate_up": layer, "a.experts.down": layer | {"parts": 1, "payload_bytes": 73728}}
    )
    assert list(config.mixtures) == ["a.experts"] and list(config.mixtures["a.experts"]) == ["gate_up", "down"]
    assert config.written_version == 3


@pytest.mark.parametrize("name", ["Mixtral", "Llama 4 (text)"])
def test_no_tokens_make_no_rows(name):
    model, _ = masked(name)
    path, experts = next(opened(model))
    x = torch.zeros(0, 32, dtype=torch.bfloat16)
    routes = () if experts.form.takes == "batched" else (torch.zeros(0, 2, dtype=torch.int64), x[:, :2])
    assert experts(x, *routes).shape == (0, 32)
    assert pack_model(model).get_submodule(path)(x, *routes).shape == (0, 32)


def test_calls_that_do_not_fit_are_refused(packed):
    experts = packed.get_submodule(EXPERTS)
    x, share = torch.zeros(1, 32, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)
    with pytest.raises((ValueError, RuntimeError), match="expert"):
        experts(x, torch.tensor([[0, 4]]), share)
    with pytest.raises(ValueError, match=r"TiledExperts, x: expected torch.bfloat16 \(T, 32\), got"):
        experts(x.float(), torch.tensor([[0, 1]]), share)
