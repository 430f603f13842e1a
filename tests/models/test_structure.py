"""Which layers are maskable, and the keep masks attached to them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from patch.models.adapted_linear import AdaptedLinear
from patch.models.keep_masks import apply_keep_masks, keep_masks, measured_sparsity, set_keep_mask
from patch.models.structure import block_weights, decoder_blocks, decoder_of, maskable_linears
from patch_kernels import TiledLinear

GATED = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"] + [
    f"mlp.{kind}_proj" for kind in ("gate", "up", "down")
]
OPT = [f"self_attn.{kind}_proj" for kind in ("k", "v", "q", "out")] + ["fc1", "fc2"]
EXPECTED = {
    "llama": ("model.layers", GATED),
    "qwen2": ("model.layers", GATED),
    "gemma3": ("model.layers", GATED),
    "opt": ("model.decoder.layers", OPT),
}


def random_masks(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(linear.weight.shape, generator=generator) < 0.5
        for name, linear in maskable_linears(model).items()
    }


class Sandwich(nn.Module):
    """A decoder with linears around its blocks and a nested list inside them."""

    def __init__(self):
        super().__init__()
        self.project_in = nn.Linear(8, 8)
        self.adapters = nn.ModuleList([nn.Linear(2, 2)])
        self.blocks = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8)])}) for _ in "ab"])
        self.norms = nn.ModuleList([nn.LayerNorm(8)])


@pytest.mark.parametrize("arch", EXPECTED)
def test_layers_of_each_architecture(tiny_model, arch):
    model = tiny_model(arch)
    prefix, kinds = EXPECTED[arch]
    names = [f"{prefix}.{index}.{kind}" for index in range(2) for kind in kinds]
    linears = maskable_linears(model)
    assert sorted(linears) == sorted(names)
    assert list(linears) == [name for name, _ in model.named_modules() if name in linears]
    assert all(model.get_submodule(name) is linear for name, linear in linears.items())
    path, blocks = decoder_blocks(model)
    assert path == prefix
    assert blocks is model.get_submodule(prefix)
    assert not any(linear is model.get_output_embeddings() for linear in linears.values())


@pytest.mark.parametrize("arch", EXPECTED)
@pytest.mark.parametrize("tied", [False, True])
def test_head_and_embeddings_are_never_masked(tiny_model, arch, tied):
    model = tiny_model(arch, tie_word_embeddings=tied)
    head = model.get_output_embeddings().weight
    assert (head is model.get_input_embeddings().weight) == tied
    weights = [linear.weight for linear in maskable_linears(model).values()]
    assert not any(weight is head or weight is model.get_input_embeddings().weight for weight in weights)


@pytest.mark.parametrize("arch", EXPECTED)
def test_bare_decoder_has_the_same_layers(tiny_model, arch):
    model = tiny_model(arch)
    decoder = decoder_of(model)
    assert decoder_of(decoder) is decoder
    assert list(maskable_linears(decoder).values()) == list(maskable_linears(model).values())


def test_a_head_that_is_called_decoder_is_not_taken_for_one():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model = Sandwich()
            self.decoder = nn.Linear(8, 6)

        def get_decoder(self):
            return self.decoder

    assert decoder_blocks(Named())[0] == "base_model.blocks"
    assert list(maskable_linears(Named())) == ["base_model.blocks.0.experts.0", "base_model.blocks.1.experts.0"]


def test_layer_as_wide_as_the_vocabulary_is_masked(tiny_model):
    model = tiny_model("llama", intermediate_size=260)
    assert len(maskable_linears(model)) == 14


def test_opt_embedding_projections_stay_dense(tiny_model):
    model = tiny_model("opt", word_embed_proj_dim=64)
    assert isinstance(model.model.decoder.project_in, nn.Linear)
    assert not any("project" in name for name in maskable_linears(model))


def test_outermost_and_largest_list_is_taken():
    model = Sandwich()
    assert decoder_blocks(model)[0] == "blocks"
    assert list(maskable_linears(model)) == ["blocks.0.experts.0", "blocks.1.experts.0"]


def test_body_without_blocks_counts_whole():
    assert list(maskable_linears(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))) == ["0", "2"]


@pytest.mark.parametrize("tied", [False, True])
def test_head_of_a_model_without_blocks_is_not_masked(tied):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = (
                nn.Embedding(6, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 6, bias=False),
            )
            if tied:
                self.head.weight = self.embed.weight

        def get_output_embeddings(self):
            return None if tied else self.head

    assert list(maskable_linears(Flat())) == ["body"]


def test_exclude(tiny_model):
    model = tiny_model("llama")
    names = list(maskable_linears(model))
    kept = maskable_linears(model, exclude=["*.k_proj", "model.layers.1.*"])
    assert list(kept) == [n for n in names if n.startswith("model.layers.0.") and not n.endswith("k_proj")]
    # The head is a layer of the model, so naming it is no mistake; it is excluded anyway.
    assert list(maskable_linears(model, exclude=("lm_head",))) == names


def test_mask_is_a_buffer_that_follows_the_layer_but_not_the_state_dict():
    linear = nn.Linear(8, 4)
    keep = torch.rand(4, 8) < 0.5
    set_keep_mask(linear, keep)
    assert "keep_mask" in dict(linear.named_buffers())
    assert "keep_mask" not in linear.state_dict()
    assert torch.equal(copy.deepcopy(linear).keep_mask, keep)
    assert linear.half().keep_mask.dtype == torch.bool
    assert linear.to("meta").keep_mask.is_meta
    replaced = nn.Linear(8, 4)
    set_keep_mask(replaced, keep)
    set_keep_mask(replaced, ~keep)
    assert torch.equal(replaced.keep_mask, ~keep)


def test_set_keep_mask_does_not_touch_the_weight():
    linear = nn.Linear(8, 4)
    before = linear.weight.clone()
    set_keep_mask(linear, torch.zeros(4, 8, dtype=torch.bool))
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("arch", EXPECTED)
def test_apply_and_read_back(tiny_model, arch):
    model = tiny_model(arch)
    original = {name: linear.weight.clone() for name, linear in maskable_linears(model).items()}
    parameters = list(model.parameters())
    assert keep_masks(model) == {}
    masks = random_masks(model)
    apply_keep_masks(model, masks)
    read = keep_masks(model)
    assert list(read) == list(masks)
    for name, linear in maskable_linears(model).items():
        assert torch.equal(read[name], masks[name])
        assert torch.equal(linear.weight, torch.where(masks[name], original[name], 0))
        assert linear.weight.requires_grad
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_apply_selects_infinite_values_away(tiny_model):
    model = tiny_model("llama")
    linear = model.model.layers[0].self_attn.q_proj
    linear.weight.data[0, 0] = math.inf
    masks = random_masks(model)
    masks["model.layers.0.self_attn.q_proj"][0, 0] = False
    apply_keep_masks(model, masks)
    assert linear.weight[0, 0] == 0
    assert torch.isfinite(linear.weight).all()


def test_apply_with_excluded_layers(tiny_model):
    model = tiny_model("llama")
    masks = {name: keep for name, keep in random_masks(model).items() if not name.endswith("k_proj")}
    apply_keep_masks(model, masks, exclude=["*.k_proj"])
    assert list(keep_masks(model)) == list(masks)


def test_measured_sparsity_is_exact():
    keep = torch.ones(3, 8, dtype=torch.bool)
    other = torch.zeros(1, 8, dtype=torch.bool)
    keep[0, :2] = False
    assert measured_sparsity({"a": keep, "b": other}) == 10 / 32
    assert measured_sparsity({"a": torch.ones(2, 2, dtype=torch.bool)}) == 0.0


def gpt2():
    import transformers

    config = transformers.GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def test_gpt2_is_refused_with_its_reason():
    with pytest.raises(ValueError, match=r"expected a model with nn.Linear.*GPT2LMHeadModel.*Conv1D, as in GPT-2"):
        maskable_linears(gpt2())
    with pytest.raises(ValueError, match=r"list of blocks that contain nn.Linear.*Conv1D.*Use a causal"):
        decoder_blocks(gpt2())


BAD_MODELS = {
    "no linear": (
        lambda: nn.Sequential(nn.ReLU()),
        {},
        ValueError,
        "got Sequential with none in its decoder",
    ),
    "not a module": (
        lambda: "meta-llama/Llama-2-7b",
        {},
        TypeError,
        "expected a torch.nn.Module, got str. Load the",
    ),
    "pattern is text": (
        lambda: nn.Sequential(nn.Linear(4, 4)),
        {"exclude": "0"},
        TypeError,
        "list of patterns, got '0'",
    ),
    "pattern is int": (
        lambda: nn.Sequential(nn.Linear(4, 4)),
        {"exclude": [0]},
        TypeError,
        r"list of patterns, got \[0\]",
    ),
    "no list": (
        lambda: nn.Sequential(nn.Linear(4, 4)),
        {"exclude": 5},
        TypeError,
        "expected exclude as a list of patterns, got 5. Write",
    ),
    "name without its block": (
        lambda: Sandwich(),
        {"exclude": ["experts.0"]},
        ValueError,
        r"Did you mean '\*.experts.0'\?",
    ),
    "name of a part": (
        lambda: Sandwich(),
        {"exclude": ["experts"]},
        ValueError,
        r"Did you mean '\*.experts.\*'\?",
    ),
    "pattern unknown": (
        lambda: Sandwich(),
        {"exclude": ["*.kproj"]},
        ValueError,
        r"got '\*.kproj' which matches none of",
    ),
    "pattern of a block": (
        lambda: Sandwich(),
        {"exclude": ["blocks.0"]},
        ValueError,
        r"'blocks.0' which matches none.* Did you mean 'blocks.0.\*'\?",
    ),
    "nothing left": (
        lambda: nn.Sequential(nn.Linear(4, 4)),
        {"exclude": ["*"]},
        ValueError,
        "removes all 1 nn.Linear",
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model_or_pattern_is_refused(name):
    make, kwargs, kind, match = BAD_MODELS[name]
    with pytest.raises(kind, match=match):
        maskable_linears(make(), **kwargs)


KEEP = torch.ones(4, 8, dtype=torch.bool)
BAD_MASKS = {
    "float": (
        KEEP.float(),
        TypeError,
        r"keep: expected torch.bool \(4, 8\), got torch.float32 \(4, 8\). Pass the keep mask",
    ),
    "uint8": (KEEP.to(torch.uint8), TypeError, r"got torch.uint8 \(4, 8\)"),
    "list": (KEEP.tolist(), TypeError, "got list"),
    "transposed": (KEEP.T, ValueError, r"keep: expected torch.bool \(4, 8\), got torch.bool \(8, 4\)"),
    "flat": (KEEP.flatten(), ValueError, r"got torch.bool \(32,\). Pass the keep mask of this layer"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_mask_is_refused(name):
    keep, kind, match = BAD_MASKS[name]
    linear = nn.Linear(8, 4)
    with pytest.raises(kind, match=match):
        set_keep_mask(linear, keep)
    assert not hasattr(linear, "keep_mask")


def test_mask_on_another_module_is_refused():
    with pytest.raises(TypeError, match=r"expected an nn.Linear, got Conv1d. Convert packed"):
        set_keep_mask(nn.Conv1d(8, 4, 1), KEEP)


def break_masks(masks, how):
    first, *_, last = masks
    if how == "missing":
        del masks[first], masks[last]
    elif how == "extra":
        masks |= {f"model.layers.{index}.mlp.up_proj": masks[last] for index in range(7, 14)}
    elif how == "shape":
        masks[last] = masks[last].T.contiguous()[:5]
    elif how == "dtype":
        masks[last] = masks[last].float()
    elif how == "none":
        masks.clear()


@pytest.mark.parametrize(
    "how, kind, match",
    [
        (
            "missing",
            ValueError,
            r"missing 2 \(model.layers.0.self_attn.q_proj, model.layers.1.mlp.down_proj\)",
        ),
        (
            "extra",
            ValueError,
            r"missing 0; not maskable layers of the model 7 \(model.layers.7.mlp.up_proj, .*, ...\). Use the",
        ),
        ("shape", ValueError, r"layer 'model.layers.1.mlp.down_proj': .*bool \(128, 192\), got torch.bool \(5, 128\)"),
        ("dtype", TypeError, "layer 'model.layers.1.mlp.down_proj': expected torch.bool .*, got torch.float32"),
        ("none", ValueError, "masks: expected one for each of the 14 layers to mask, got 0: missing 14"),
    ],
)
def test_bad_masks_change_nothing(tiny_model, how, kind, match):
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    masks = random_masks(model)
    break_masks(masks, how)
    with pytest.raises(kind, match=match):
        apply_keep_masks(model, masks)
    assert keep_masks(model) == {}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "given, meant",
    [
        ("down_proj", "*.down_proj"),
        ("*down_projs", "*.down_proj"),
        ("self_attn", "*.self_attn.*"),
        ("model.layers.1", "model.layers.1.*"),
        ("layers.1", "*.layers.1.*"),
        ("*.kproj", "*.k_proj"),
    ],
)
def test_pattern_that_matches_nothing_names_the_near_one(tiny_model, given, meant):
    model = tiny_model("llama")
    with pytest.raises(ValueError) as error:
        maskable_linears(model, [given])
    assert str(error.value).endswith(f"Did you mean '{meant}'?")
    assert len(maskable_linears(model, [meant])) < 14


def test_names_of_masks_that_lack_a_prefix_are_named(tiny_model):
    model = tiny_model("llama")
    masks = {name.removeprefix("model."): keep for name, keep in random_masks(model).items()}
    meant = "Is 'layers.0.self_attn.q_proj' meant for 'model.layers.0.self_attn.q_proj'"
    with pytest.raises(ValueError, match=meant):
        apply_keep_masks(model, masks)


def test_masks_on_offloaded_weights_are_refused(tiny_model):
    model = tiny_model("llama")
    masks = random_masks(model)
    model.model.layers[1].mlp.to("meta")
    where = "layer 'model.layers.1.mlp.gate_proj': expected a weight in memory, got one on the meta device"
    with pytest.raises(ValueError, match=where):
        apply_keep_masks(model, masks)
    assert keep_masks(model) == {}


def test_sparsity_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one keep mask, got none"):
        measured_sparsity({})
    with pytest.raises(TypeError, match=r"layer 'a': expected torch\.bool \(N, K\), got torch\.float32"):
        measured_sparsity({"a": torch.ones(2, 2)})


def test_packed_model_is_told_to_unpack():
    class TiledLinear(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"packed already; call patch.packed.unpack_model first"):
        maskable_linears(nn.Sequential(TiledLinear()))


def test_block_weights_count_every_matrix_of_the_blocks_once():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.zeros(3, 8, 4))
            self.up_bias = nn.Parameter(torch.zeros(3, 4))
            self.mix = nn.Parameter(torch.zeros(1, 1, 8))

    model = Sandwich()
    model.blocks[0]["fused"] = Experts()
    model.blocks[1]["shared"] = nn.Linear(8, 8)
    model.blocks[1]["shared"].weight = model.blocks[0]["experts"][0].weight
    model.blocks[1]["packed"] = TiledLinear(12, 4)
    adapted = AdaptedLinear.from_linear(nn.Linear(8, 2), 4)
    model.blocks[1]["adapted"] = adapted
    assert block_weights(model) == {
        "blocks.0.experts.0.weight": 64,
        "blocks.0.fused.up": 96,
        "blocks.1.experts.0.weight": 64,
        "blocks.1.packed.weight": 48,
        "blocks.1.adapted.weight": 16,
    }


def test_block_weights_of_a_packed_model_are_those_of_the_dense_one(tiny_model):
    model = tiny_model("llama", dtype=torch.bfloat16)
    dense = block_weights(model)
    assert dense == {f"{name}.weight": layer.weight.numel() for name, layer in maskable_linears(model).items()}
    for name, layer in maskable_linears(model).items():
        model.set_submodule(name, TiledLinear(layer.in_features, layer.out_features, False))
    assert block_weights(model) == dense
