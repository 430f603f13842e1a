"""Projections of a packed model in one op call: bit for bit what the layers compute alone, on every way to a model."""

from __future__ import annotations

import copy

import pytest
import torch
from support.families import FAMILIES, build
from support.models import mask_model
from torch.utils._python_dispatch import TorchDispatchMode

import patch
from patch.models.keep_masks import keep_masks
from patch.packed import fuse_projections, pack_model, save_packed, stream_head, unfuse_projections, unpack_model
from patch.packed.swap import packed_layers
from patch_kernels import StreamedLinear, TiledLinear

IDS = torch.randint(3, 250, (7, 9), generator=torch.Generator().manual_seed(0))


class Calls(TorchDispatchMode):
    """Counts calls of tile_linear and tile_linear_group inside the block."""

    def __enter__(self):
        self.one = self.group = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "patch_kernels":
            self.one += func._opname == "tile_linear"
            self.group += func._opname.startswith("tile_linear_group")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def calls(model, **inputs):
    with Calls() as counted:
        model(**(inputs or {"input_ids": IDS[:1]}))
    return counted.one, counted.group


@torch.no_grad()
def output(model, **inputs):
    return model(**(inputs or {"input_ids": IDS[:1]})).logits


def alone(model):
    model = copy.deepcopy(model)
    unfuse_projections(model)
    return model


def groups(model):
    return {layer.group for _, layer in packed_layers(model)} - {None}


@pytest.fixture
def packed(tiny_model):
    return pack_model(mask_model(tiny_model(dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    ("arch", "overrides", "of_layers"),
    [
        ("llama", {}, (3, 2)),
        ("llama", {"attention_bias": True, "mlp_bias": True}, (3, 2)),
        ("qwen2", {}, (3, 2)),
        ("gemma3", {}, (3, 2)),
        ("opt", {}, (3,)),
    ],
)
def test_logits_and_generated_tokens_are_the_same(tiny_model, arch, overrides, of_layers):
    model = pack_model(mask_model(tiny_model(arch, dtype=torch.bfloat16, **overrides)))
    layers = len(list(packed_layers(model)))
    plain = alone(model)
    for ids in (IDS[:1], IDS, IDS[:, :1]):
        for _ in range(2):
            assert torch.equal(output(model, input_ids=ids), output(plain, input_ids=ids))
    assert calls(model) == (layers - 2 * sum(of_layers), 2 * len(of_layers))
    assert calls(plain) == (layers, 0)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS[:1], **settings), plain.generate(IDS[:1], **settings))


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3", "Qwen3-Next", "GPT-J", "Gemma2", "Jamba"])
def test_other_families(name):
    """Mixtures of experts, latent and linear attention: what is fused gives what it gives alone."""
    model = pack_model(mask_model(build(FAMILIES[name])), dtype=torch.bfloat16)
    plain = alone(model)
    ids = IDS[:2] % 60
    for _ in range(2):
        assert torch.equal(output(model, input_ids=ids), output(plain, input_ids=ids))
    assert calls(model, input_ids=ids)[1] > 0
    assert not any(group.is_over for group in groups(model))


def test_cross_attention_is_found_out():
    """q sees the decoder, k and v the encoder: no product is wasted, and the layers are left alone in the end."""
    import transformers

    config = transformers.T5Config(
        vocab_size=260, d_model=128, d_kv=32, d_ff=192, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model = transformers.T5ForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    masks = keep_masks(mask_model(model))
    pack_model(model, {name: keep for name, keep in masks.items() if not name.endswith(".wo")})  # it reads its dtype
    names = [name for name, _ in packed_layers(model)]
    crosses = [name for name in names if "EncDecAttention" in name and not name.endswith(".o")]
    assert len(groups(model)) == 6 and len(crosses) == 6
    plain, inputs = alone(model), {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    for _ in range(20):
        assert torch.equal(output(model, **inputs), output(plain, **inputs))
        assert calls(model, **inputs) == (len(names) - 2 * (3 + 2), 4)
    assert all(model.get_submodule(name).group is None for name in crosses) and len(groups(model)) == 4


def test_every_way_to_a_packed_model(packed, tmp_path):
    import transformers

    expected = output(alone(packed))
    save_packed(packed, None, tmp_path / "packed")
    for model in (
        packed,
        patch.load(tmp_path / "packed"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed"),
        copy.deepcopy(packed),
    ):
        assert len(groups(model)) == 4
        assert torch.equal(output(model), expected)
        assert calls(model) == (4, 4)
        assert torch.equal(output(model), expected)
    packed.save_pretrained(tmp_path / "again")  # with groups that are at work
    again = patch.load(tmp_path / "again")
    assert again.state_dict().keys() == packed.state_dict().keys()
    assert torch.equal(output(again), expected)


def test_on_and_off(packed):
    unfuse_projections(packed)
    assert not groups(packed)
    for _ in range(2):
        assert calls(packed) == (14, 0)
    assert fuse_projections(packed) == 4 and len(groups(packed)) == 4
    before = groups(packed)
    assert fuse_projections(packed) == 4 and not groups(packed) & before
    packed.model.layers[0].mlp.up_proj = packed.model.layers[0].mlp.up_proj.to_linear()
    assert fuse_projections(packed) == 3
    unpack_model(packed)
    assert fuse_projections(packed) == 0
    assert not any(isinstance(module, TiledLinear) for module in packed.modules())


def test_a_layer_that_is_replaced_ends_its_group(packed):
    calls(packed)
    assert calls(packed) == (4, 4)
    mlp = packed.model.layers[0].mlp
    mlp.up_proj = mlp.up_proj.to_linear()
    expected = output(alone(packed))
    for _ in range(3):
        assert torch.equal(output(packed), expected)
    assert calls(packed) == (5, 3)


def test_training_beside_packed_layers(packed):
    plain = alone(packed)
    calls(packed)
    grads = []
    for model in (packed, plain):
        embedding = model.get_input_embeddings().weight.requires_grad_()
        model(IDS, labels=IDS).loss.backward()
        grads.append(embedding.grad)
    assert torch.equal(*grads)
    assert calls(packed) == (4, 4)


def test_adapters_beside_fused_layers(packed):
    peft = pytest.importorskip("peft", minversion="0.21")
    packed_lora = pytest.importorskip("patch.packed.lora", exc_type=ImportError)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(packed, packed_lora.for_packed(peft.LoraConfig(**settings))).eval()
    plain = alone(model)
    for _ in range(3):
        assert torch.equal(output(model), output(plain))
    assert calls(model) == (4, 4)
    for other in (model, plain):
        other.train()(IDS, labels=IDS).loss.backward()
    for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None) and (one.grad is None or torch.equal(one.grad, two.grad)), name
    with model.eval().disable_adapter(), plain.eval().disable_adapter():
        assert torch.equal(output(model), output(plain))


def test_offloaded_layers_are_computed_alone(packed):
    """accelerate puts a layer's tensors in place for its own call only."""
    accelerate = pytest.importorskip("accelerate")
    expected = output(packed)
    assert calls(packed) == (4, 4)
    accelerate.cpu_offload(packed, execution_device=torch.device("cpu"), offload_buffers=True)
    for _ in range(3):
        assert torch.equal(output(packed), expected)
    assert calls(packed) == (14, 0)


def test_compiled_and_inference_mode(packed):
    expected = output(alone(packed))
    calls(packed)
    with torch.inference_mode():
        assert torch.equal(packed(IDS[:1]).logits, expected)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(packed, backend="eager")(IDS[:1]).logits, expected)
    assert calls(packed) == (4, 4)


def test_the_head_is_streamed_and_given_back(packed, tmp_path):
    weight = packed.lm_head.weight
    assert type(packed.lm_head) is StreamedLinear and stream_head(packed)
    save_packed(packed, None, tmp_path / "packed")
    again = patch.load(tmp_path / "packed")
    assert type(again.lm_head) is StreamedLinear
    assert torch.equal(output(again, input_ids=IDS[:1, :4]), output(packed, input_ids=IDS[:1, :4]))
    unpack_model(packed)
    assert type(packed.lm_head) is torch.nn.Linear and packed.lm_head.weight is weight
    again.dequantize()
    assert type(again.lm_head) is torch.nn.Linear


def test_dequantize_after_saving(packed, tmp_path):
    packed.save_pretrained(tmp_path / "saved")  # which makes a string of config.dtype
    packed.dequantize()
    assert not any(packed_layers(packed)) and packed.dtype == torch.bfloat16


@torch.no_grad()
def test_other_memory_behind_a_tensor_is_noticed(packed):
    for _ in range(4):
        output(packed)
    attention = packed.model.layers[0].self_attn
    x = torch.randn(1, 2, attention.q_proj.in_features).bfloat16()
    expected = attention.k_proj.tiled_weight.matmul(2 * x)
    attention.q_proj(x)
    x.data = 2 * x
    assert torch.equal(attention.k_proj(x), expected)
