"""Packing the linear layers of a model and back; dense and packed export."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from support.models import mask_model
from torch import nn

import patch
from patch.models.keep_masks import apply_keep_masks, keep_masks, set_keep_mask
from patch.models.stay_dense import directly_read_linears
from patch.models.structure import block_linears, maskable_linears
from patch.packed.convert import pack_model, unpack_model
from patch.packed.save import save_dense, save_packed
from patch.packed.swap import cast_model, layer_sha256, packed_layers
from patch_kernels import TiledLinear


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "opt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pack_keeps_every_weight_bit_and_unpack_returns_them(tiny_model, arch, dtype):
    model = mask_model(
        tiny_model(arch, dtype=dtype, hidden_size=160, head_dim=40) if arch != "opt" else tiny_model(arch, dtype=dtype)
    )
    masked = {name: model.get_submodule(name).weight.clone() for name in keep_masks(model)}
    biases = {name: model.get_submodule(name).bias for name in masked}
    sparse_tiles = 0
    assert pack_model(model) is model
    for name, weight in masked.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, TiledLinear)
        assert torch.equal(layer.tiled_weight.unpack().view(torch.int16), weight.view(torch.int16))
        sparse_tiles += int(layer.tile_is_sparse.sum())
    assert sparse_tiles > 0
    assert isinstance(model.lm_head, nn.Linear)
    assert unpack_model(model) is model
    for name, weight in masked.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and torch.equal(layer.weight, weight)
        assert (layer.bias is None) == (biases[name] is None)
        assert biases[name] is None or torch.equal(layer.bias, biases[name])
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_size_follows_the_share_of_sparse_tiles(tiny_model, share):
    model = mask_model(tiny_model(dtype=torch.bfloat16, hidden_size=128, intermediate_size=256), share)
    pack_model(model)
    for _, layer in packed_layers(model):
        sparse = int(layer.tile_is_sparse.sum())
        assert layer.payload.numel() == 18432 * sparse + 32768 * (layer.tile_is_sparse.numel() - sparse)
        assert share not in (0.0, 1.0) or sparse == share * layer.tile_is_sparse.numel()


def test_masks_of_any_tile_size_are_exact(tiny_model):
    """A tile that mixes dense and 2:4 parts is stored dense, with its zeros."""
    model = tiny_model(dtype=torch.bfloat16)
    masks = {}
    for name, linear in maskable_linears(model).items():
        masks[name] = torch.ones_like(linear.weight, dtype=torch.bool)
        masks[name][:64, 2:4] = False
    apply_keep_masks(model, masks)
    expected = {name: model.get_submodule(name).weight.clone() for name in masks}
    pack_model(model)
    for name, layer in packed_layers(model):
        assert not layer.tile_is_sparse[0].any()
        assert torch.equal(layer.tiled_weight.unpack(), expected[name])


def test_pruned_infinities_do_not_survive(tiny_model):
    model = tiny_model(dtype=torch.bfloat16)
    keep = {
        n: torch.tensor([True, True, False, False]).repeat(m.weight.shape[0], m.weight.shape[1] // 4)
        for n, m in maskable_linears(model).items()
    }
    for name in keep:
        model.get_submodule(name).weight.data[0, 3] = float("inf")
    apply_keep_masks(model, keep)
    pack_model(model, keep)
    assert model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()


def test_values_where_masks_prune_are_not_lost_in_silence(tiny_model):
    """Merging an adapter, or training, puts values where the mask prunes."""
    model = mask_model(tiny_model(dtype=torch.bfloat16), 1.0)
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    masks = {name: keep_masks(model)[name] for name in names}
    for name in names:
        model.get_submodule(name).weight.data += 1
    message = (
        r"0.mlp.up_proj: expected zeros where the keep mask prunes, got 12288 other values \(24576 in 2 layers\). They"
    )
    for given in (None, masks):
        with pytest.raises(ValueError, match=message + " would be lost: if you agree, apply_keep_masks"):
            pack_model(model, given)
        assert not list(packed_layers(model))
    apply_keep_masks(model, keep_masks(model))
    pack_model(model)


SSM = {
    "mamba": ("MambaConfig", {"time_step_rank": 8}, ["dt_proj", "in_proj", "out_proj", "x_proj"]),
    "mamba2": (
        "Mamba2Config",
        {"num_heads": 8, "head_dim": 32, "n_groups": 1, "chunk_size": 8},
        ["in_proj", "out_proj"],
    ),
}


@pytest.mark.parametrize("arch", SSM)
def test_layers_that_the_model_reads_itself_stay_dense(tmp_path, caplog, arch):
    import transformers

    name, overrides, linears = SSM[arch]
    config = getattr(transformers, name)(
        vocab_size=260, hidden_size=128, num_hidden_layers=2, state_size=8, **overrides
    )
    model = mask_model(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval())
    for linear in block_linears(model).values():  # masks of an earlier version
        if not hasattr(linear, "keep_mask"):
            keep = torch.rand(linear.weight.shape) < 0.5
            linear.weight.data.masked_fill_(~keep, 0)
            set_keep_mask(linear, keep)
    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    masks = keep_masks(model)
    direct = directly_read_linears(model) & masks.keys()
    assert len(masks) == 2 * len(linears) and len(direct) == (2 if "dt_proj" in linears else 0)
    pack_model(model)
    assert {name for name, _ in packed_layers(model)} == masks.keys() - direct
    assert not direct or "kept dense, with zeros where pruned: 2 (backbone.layers.0.mixer.dt_proj" in caplog.text
    torch.testing.assert_close(model(ids).logits, expected, rtol=2e-2, atol=2e-2)
    got = model(ids).logits
    save_packed(model, None, tmp_path / "packed")
    assert torch.equal(patch.load(tmp_path / "packed")(ids).logits, got)


def test_a_model_of_layers_that_are_read_directly_only_is_refused():
    model = nn.MultiheadAttention(128, 2, dtype=torch.bfloat16)
    assert directly_read_linears(model) == {"out_proj"}
    masks = {"out_proj": torch.tensor([True, False]).repeat(128, 64)}
    model.out_proj.weight.data.masked_fill_(~masks["out_proj"], 0)
    with pytest.raises(
        ValueError, match=r"expected layers that can be packed, got 1 \(out_proj\): the model reads their"
    ):
        pack_model(model, masks)


class Router(nn.Linear):
    """As routers of mixtures of experts are."""

    def __init__(self, hidden, experts):
        super().__init__(hidden, experts)

    def forward(self, x):
        return torch.topk(super().forward(x), 2)


class Spelled(nn.Linear):
    """As Falcon's layers are."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


def test_classes_with_a_forward_of_their_own(caplog):
    model = nn.Sequential(Spelled(128, 128), Router(128, 8)).bfloat16()
    masks = {name: torch.tensor([True, False]).repeat(n, 64) for name, n in (("0", 128), ("1", 8))}
    for name, keep in masks.items():
        model.get_submodule(name).weight.data.masked_fill_(~keep, 0)
    x = torch.randn(3, 128).bfloat16()
    expected = model(x)
    pack_model(model, masks)
    assert isinstance(model[0], TiledLinear) and type(model[1]) is Router
    assert "kept dense, with zeros where pruned: 1 (1); the model reads their weight itself, or they" in caplog.text
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)


def test_only_given_layers_are_packed(tiny_model):
    model = mask_model(tiny_model(dtype=torch.bfloat16))
    name = "model.layers.1.mlp.down_proj"
    pack_model(model, {name: keep_masks(model)[name]})
    assert [n for n, _ in packed_layers(model)] == [name]
    assert list(model.config.quantization_config.layers) == [name]


def test_cast_on_request_only(tiny_model):
    model = mask_model(tiny_model(dtype=torch.float32))
    frequencies = model.model.rotary_emb.inv_freq.clone()
    with pytest.raises(
        ValueError, match=r"expected torch.float16 or torch.bfloat16, got torch.float32 .*\. Pass dtype=torch.bfloat16"
    ):
        pack_model(model)
    assert not list(packed_layers(model))
    pack_model(model, dtype=torch.float16)
    assert model.lm_head.weight.dtype == model.config.dtype == torch.float16
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)  # not rounded
    assert model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.dtype == torch.float16


def test_plain_module_without_config():
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)).bfloat16()
    masks = {"0": torch.tensor([True, False, True, False]).repeat(64, 32)}
    x = torch.randn(3, 128).bfloat16()
    model[0].weight.data.masked_fill_(~masks["0"], 0)
    expected = copy.deepcopy(model)
    pack_model(model, masks)
    assert isinstance(model[0], TiledLinear)
    torch.testing.assert_close(model(x), expected(x))
    unpack_model(model, dtype=torch.float32)
    assert torch.equal(model[0].weight, expected[0].weight.float())


def test_pack_refuses_before_it_changes_anything(tiny_model):
    model = tiny_model(dtype=torch.bfloat16)
    name, head = "model.layers.0.mlp.up_proj", "lm_head"
    ones = {n: torch.ones_like(m.weight, dtype=torch.bool) for n, m in maskable_linears(model).items()}
    cases = [
        ({}, None, ValueError, "without one; prune it or learn masks first"),
        (None, None, ValueError, "without one; prune it or learn masks first"),
        (
            ones | {"model.layers.9.up": ones[name]},
            None,
            ValueError,
            "masks: expected an nn.Linear at 'model.layers.9.up' of LlamaForCausalLM, found nothing",
        ),
        (
            ones | {"model.norm": ones[name]},
            None,
            ValueError,
            "at 'model.norm' of LlamaForCausalLM, found LlamaRMSNorm",
        ),
        (ones | {name: ones[name].float()}, None, TypeError, "expected torch.bool .*got torch.float32"),
        (ones | {name: [True]}, None, TypeError, "got list"),
        (
            ones | {name: ones[name][1:]},
            None,
            ValueError,
            r"up_proj'\]: expected torch.bool \(192, 128\), got torch.bool \(191, 128\)",
        ),
        (ones, torch.float32, ValueError, "dtype float16 or bfloat16, got torch.float32"),
        (ones, torch.int8, ValueError, "dtype float16 or bfloat16, got torch.int8"),
    ]
    for masks, dtype, error, message in cases:
        with pytest.raises(error, match=message):
            pack_model(model, masks, dtype=dtype)
        assert not list(packed_layers(model)) and model.lm_head.weight.dtype == torch.bfloat16
    model.get_submodule(name).half()
    with pytest.raises(ValueError, match="one dtype for all masked layers"):
        pack_model(model, ones)
    tied = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="shared with another module"):
        pack_model(tied, {head: torch.ones_like(tied.lm_head.weight, dtype=torch.bool)})
    with pytest.raises(ValueError, match="packed layers, got LlamaForCausalLM without one"):
        unpack_model(model)


def test_checksum_sees_every_part(tiny_model):
    model = pack_model(mask_model(tiny_model(dtype=torch.bfloat16), 1.0))
    layer = model.model.layers[0].mlp.up_proj
    before = layer_sha256(layer)
    layer.payload[-1] ^= 1
    assert layer_sha256(layer) != before
    layer.payload[-1] ^= 1
    assert layer_sha256(layer) == before
    layer.tile_is_sparse[-1, -1] ^= 1
    assert layer_sha256(layer) != before


def test_cast_refuses_values_that_would_become_infinite(tiny_model):
    model = mask_model(tiny_model(dtype=torch.float32))
    model.model.norm.weight.data[3] = -70000.0
    with pytest.raises(
        ValueError, match=r"model.norm.weight: expected values of at most 65504 for torch.float16, got 70000"
    ):
        pack_model(model, dtype=torch.float16)
    assert model.dtype == torch.float32 and not list(packed_layers(model))


def test_offloaded_weights_are_refused(tiny_model):
    model = mask_model(tiny_model(dtype=torch.bfloat16))
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(
        ValueError, match=r"1.mlp.up_proj.weight: expected values in memory, got one on the meta device"
    ):
        pack_model(model)


def test_cast_model_without_config():
    model = nn.Linear(2, 2)
    cast_model(model, torch.float16)
    assert model.weight.dtype == torch.float16


# ---- export ----


@pytest.mark.parametrize("packed", [False, True])
def test_dense_export_opens_with_plain_transformers(tmp_path, tiny_model, tokenizer, packed):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = mask_model(tiny_model(dtype=torch.bfloat16))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if packed:
        pack_model(model)
    save_dense(model, tokenizer, tmp_path / "dense")
    assert any(packed_layers(model)) == packed  # the model itself is as it was
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not [key for key in config if "quant" in key or "spars" in key or "mask" in key or "tile" in key]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("ab")["input_ids"] == tokenizer("ab")["input_ids"]


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForSequenceClassification"])
def test_models_of_other_heads_are_opened_as_what_they_are(tmp_path, tiny_model, name):
    import transformers

    model = getattr(transformers, name)._from_config(tiny_model().config, dtype=torch.bfloat16)
    save_dense(mask_model(model), None, tmp_path / "dense")
    save_packed(pack_model(model), None, tmp_path / "packed")
    assert type(patch.load(tmp_path / "packed")) is type(model)


def test_export_refuses(tmp_path, tiny_model, tokenizer):
    model = mask_model(tiny_model(dtype=torch.bfloat16), 1.0)
    with pytest.raises(ValueError, match=r"without a packed layer; call patch.packed.pack_model"):
        save_packed(model, tokenizer, tmp_path / "a")
    name = "model.layers.0.mlp.up_proj"
    model.get_submodule(name).weight.data.fill_(1)
    with pytest.raises(
        ValueError, match=f"{name}: expected zeros where the keep mask prunes, got 12288 other values. "
    ):
        save_dense(model, tokenizer, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_export_replaces_an_earlier_export_only(tmp_path, tiny_model):
    model = pack_model(mask_model(tiny_model(dtype=torch.bfloat16)))
    save_packed(model, None, tmp_path / "a")
    save_dense(model, None, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="found other files"):
        save_packed(model, None, tmp_path / "b")


@pytest.mark.parametrize("packed", [False, True])
def test_export_that_does_not_load_as_the_model_leaves_nothing(tmp_path, tiny_model, packed):
    """fp32 norms in a bf16 model are read back as bf16."""
    model = mask_model(tiny_model(dtype=torch.bfloat16))
    if packed:
        pack_model(model)
    model.model.norm.float()
    save = save_packed if packed else save_dense
    with pytest.raises(
        ValueError,
        match=r"1 \(model.norm.weight\): expected the model's tensors \(torch.float32 \(128,\)\) when what was written "
        r"is opened again, got others \(torch.bfloat16 \(128,\)\). Nothing was kept; give the whole model one dtype",
    ):
        save(model, None, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_what_the_model_keeps_in_fp32_is_neither_cast_nor_packed(tiny_model):
    model = mask_model(tiny_model())
    model._keep_in_fp32_modules_strict = {"norm.weight"}
    pack_model(model, dtype=torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    model = mask_model(tiny_model())
    model._keep_in_fp32_modules = {"mlp.up_proj"}  # in fp16 only
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = "model.layers.0.mlp.up_proj: expected a layer that may be cast to torch.float16, got one that LlamaFor"
    with pytest.raises(ValueError, match=message):
        pack_model(model, dtype=torch.float16)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    pack_model(model, dtype=torch.bfloat16)
