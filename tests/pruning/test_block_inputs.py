"""Sequential calibration and pruning of whole models."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from support.families import FAMILIES
from support.families import build as build_family
from support.methods import ONE_WEIGHT_METHODS
from torch import nn
from torch.utils._pytree import tree_leaves

from patch.models.keep_masks import keep_masks, measured_sparsity
from patch.models.modes import calibration_mode
from patch.models.structure import decoder_blocks, maskable_linears
from patch.pruning import METHODS, ExpertOptions, ProxSparseConfig, prune_model, prune_weight, sparsegpt, wanda
from patch.pruning.block_inputs import capture_block_inputs

ARCHITECTURES = ["llama", "qwen2", "gemma3", "opt"]
SEQLEN = 40  # longer than Gemma-3's window of 16, so that its two masks differ


def token_ids(samples=3, seqlen=SEQLEN, seed=0):
    return torch.randint(0, 256, (samples, seqlen), generator=torch.Generator().manual_seed(seed))


def build(tiny_model, arch, **overrides):
    """A tiny model with weights large enough that attention and pruning matter, biases included."""
    small = {"hidden_size": 32, "num_attention_heads": 2}
    small |= (
        {"ffn_dim": 48, "word_embed_proj_dim": 32}
        if arch == "opt"
        else {"intermediate_size": 48, "num_key_value_heads": 1}
    )
    overrides = small | overrides
    if arch == "gemma3" and "num_hidden_layers" not in overrides:
        overrides |= {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
    model = tiny_model(arch, **overrides)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def few_steps(method):
    """Settings with which a method that learns is as quick here as the others."""
    return {"prox": ProxSparseConfig(steps=3)} if METHODS[method].learns else {}


@torch.no_grad()
def layer_inputs(model, ids, linears):
    """What each layer is called with in plain runs of the whole model, one (tokens, in) tensor per sample."""
    seen = {name: [] for name in linears}
    handles = [
        linear.register_forward_hook(lambda _, args, __, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, linear in linears.items()
    ]
    for row in ids:
        model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def prune_reference(model, method, ids, **options):
    """Sequential pruning by whole-model runs: nothing is captured or replayed. Returns (model, masks)."""
    model = copy.deepcopy(model).eval()
    prefix, blocks = decoder_blocks(model)
    masks = {}
    for index in range(len(blocks)):
        start = f"{prefix}.{index}." if prefix else f"{index}."
        linears = {name: m for name, m in maskable_linears(model).items() if name.startswith(start)}
        inputs = layer_inputs(model, ids, linears)
        for name, linear in linears.items():
            pruned = prune_weight(linear.weight, method, inputs=inputs[name], **options)
            linear.weight.copy_(pruned.weight)
            masks[name] = pruned.keep
    return model, masks


def assert_same(model, masks, expected_model, expected_masks):
    assert list(masks) == list(maskable_linears(model))
    for name, keep in masks.items():
        assert torch.equal(keep, expected_masks[name]), name
    expected = expected_model.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("pattern, sparsity", [("2:4", 0.5), ("unstructured", 0.35)])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "thanos"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equals_pruning_by_whole_model_runs(tiny_model, arch, method, pattern, sparsity):
    model = build(tiny_model, arch)
    options = {"pattern": pattern, "sparsity": sparsity}
    expected = prune_reference(model, method, token_ids(), **options)
    masks = prune_model(model, method, calibration=token_ids(), **options)
    assert_same(model, masks, *expected)
    assert abs(measured_sparsity(masks) - sparsity) < 1 / 32  # wanda rounds down in rows of 32


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "GPT-2"])
def test_every_family_equals_pruning_by_whole_model_runs(name):
    """State spaces, shared keys, mixtures, wrappers for images: blocks get what the model would give them."""
    model = build_family(FAMILIES[name])
    ids = token_ids() % 60
    expected = prune_reference(model, "wanda", ids)
    masks = prune_model(model, "wanda", calibration=ids, experts=ExpertOptions(tokens=1))
    assert_same(model, masks, *expected)


def test_eager_attention_masks_are_captured_too(tiny_model):
    model = build(tiny_model, "gemma3", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    expected = prune_reference(model, "wanda", token_ids())
    assert_same(model, prune_model(model, "wanda", calibration=token_ids()), *expected)


def test_later_blocks_see_pruned_ones(tiny_model):
    """The reference test would pass for a wrong scheme only if schemes could not be told apart; they can."""
    model = build(tiny_model, "llama")
    dense_inputs = layer_inputs(model, token_ids(), maskable_linears(model))
    masks = prune_model(model, "sparsegpt", calibration=token_ids())
    dense = build(tiny_model, "llama")
    from_dense = {
        name: prune_weight(linear.weight, "sparsegpt", inputs=dense_inputs[name]).keep
        for name, linear in maskable_linears(dense).items()
    }
    differs = {name for name in masks if not torch.equal(masks[name], from_dense[name])}
    assert not any(name.startswith("model.layers.0.") for name in differs)
    assert any(name.startswith("model.layers.1.") for name in differs)


@torch.no_grad()
def test_gemma3_blocks_keep_their_own_masks(tiny_model):
    model = build(tiny_model, "gemma3")
    _, blocks = decoder_blocks(model)
    ids = token_ids()
    hidden = model(ids[:1], output_hidden_states=True, use_cache=False).hidden_states
    with calibration_mode(model):
        inputs = capture_block_inputs(model, ids)
        assert torch.equal(inputs.hidden[0], hidden[0])
        inputs.advance(0, blocks[0])
        assert torch.equal(inputs.hidden[0], hidden[1])
        with_its_own = next(inputs.run(1, blocks[1]))
        with_block_0 = next(inputs.run(0, blocks[1]))
    assert torch.equal(with_its_own, hidden[2])
    assert not torch.allclose(with_block_0, hidden[2], atol=1e-3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_magnitude_needs_no_calibration(tiny_model, arch):
    model = build(tiny_model, arch)
    original = {name: linear.weight.clone() for name, linear in maskable_linears(model).items()}
    masks = prune_model(model, "magnitude")
    for name, linear in maskable_linears(model).items():
        pruned = prune_weight(original[name], "magnitude")
        assert torch.equal(masks[name], pruned.keep)
        assert torch.equal(linear.weight, pruned.weight)


@pytest.mark.parametrize("method", METHODS)
def test_only_maskable_weights_change_and_masks_are_attached(tiny_model, method):
    model = build(tiny_model, "llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exclude = ["*.k_proj", "model.layers.0.mlp.*"]
    masks = prune_model(model, method, calibration=token_ids(), exclude=exclude, **few_steps(method))
    assert len(masks) == 14 - 2 - 3
    changed = {key.removesuffix(".weight") for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert changed == set(masks)
    attached = keep_masks(model)
    assert all(attached[name] is keep for name, keep in masks.items())
    assert list(attached) == list(masks)
    for name, keep in masks.items():
        weight = model.get_submodule(name).weight
        assert not weight[~keep].any()
        assert weight.requires_grad and weight.grad is None


def test_a_block_without_layers_to_prune_is_passed_through(tiny_model):
    model = build(tiny_model, "llama")
    dense_inputs = layer_inputs(model, token_ids(), maskable_linears(model))
    masks = prune_model(model, "wanda", calibration=token_ids(), exclude=["model.layers.0.*"])
    assert all(name.startswith("model.layers.1.") for name in masks)
    fresh = build(tiny_model, "llama")
    for name, keep in masks.items():
        weight = fresh.get_submodule(name).weight
        assert torch.equal(keep, prune_weight(weight, "wanda", inputs=dense_inputs[name]).keep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ONE_WEIGHT_METHODS)  # gradients overflow in fp16
def test_half_precision_models(tiny_model, method, dtype):
    model = build(tiny_model, "qwen2", dtype=dtype)
    masks = prune_model(model, method, calibration=token_ids())
    assert all(linear.weight.dtype == dtype for linear in maskable_linears(model).values())
    assert measured_sparsity(masks) == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_same_result_twice(tiny_model, method):
    first, second = build(tiny_model, "llama"), build(tiny_model, "llama")
    masks = prune_model(first, method, calibration=token_ids(), **few_steps(method))
    again = prune_model(second, method, calibration=token_ids(), **few_steps(method))
    assert_same(first, masks, second, again)


@pytest.mark.parametrize("method", METHODS)
def test_naming_the_device_changes_nothing(tiny_model, method):
    plain, placed = build(tiny_model, "gemma3"), build(tiny_model, "gemma3")
    options = {"calibration": token_ids(), **few_steps(method)}
    masks = prune_model(plain, method, **options)
    assert_same(plain, masks, placed, prune_model(placed, method, device="cpu", **options))
    assert hook_count(placed) == 0


def test_options_reach_the_method(tiny_model):
    ids = token_ids()
    options = {"block_size": 32, "damping": 0.3}
    model = build(tiny_model, "llama")
    expected = prune_reference(model, "sparsegpt", ids, pattern="unstructured", sparsity=0.3, **options)
    masks = prune_model(model, "sparsegpt", pattern="unstructured", sparsity=0.3, calibration=ids, **options)
    assert_same(model, masks, *expected)
    model = build(tiny_model, "llama")
    expected = prune_reference(model, "wanda", ids, shift_zero_metrics=True)
    assert_same(model, prune_model(model, "wanda", calibration=ids, shift_zero_metrics=True), *expected)


def test_one_sample_and_one_token(tiny_model):
    for ids in (token_ids(samples=1), token_ids(seqlen=1)):
        model = build(tiny_model, "llama")
        expected = prune_reference(model, "wanda", ids)
        assert_same(model, prune_model(model, "wanda", calibration=ids), *expected)


def test_bare_decoder(tiny_model):
    full, bare = build(tiny_model, "llama"), build(tiny_model, "llama").model
    expected = prune_model(full, "wanda", calibration=token_ids())
    masks = prune_model(bare, "wanda", calibration=token_ids())
    assert [f"model.{name}" for name in masks] == list(expected)
    assert all(torch.equal(a, b) for a, b in zip(masks.values(), expected.values(), strict=True))


def test_sparsity_zero_leaves_the_model_dense(tiny_model):
    model = build(tiny_model, "llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    masks = prune_model(model, "magnitude", pattern="unstructured", sparsity=0)
    assert measured_sparsity(masks) == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# State before and after, and after an interruption.


def hook_count(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def state(model):
    return {
        "training": [module.training for module in model.modules()],
        "use_cache": model.config.use_cache,
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": hook_count(model),
        "grad": torch.is_grad_enabled(),
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def test_model_state_is_as_before(tiny_model):
    model = build(tiny_model, "opt", dropout=0.5).train()
    model.model.decoder.layers[1].eval()
    model.model.decoder.layers[0].fc1.weight.requires_grad_(False)
    before = state(model)
    assert before["use_cache"] is True
    masks = prune_model(model, "wanda", calibration=token_ids())
    after = state(model)
    assert after == before
    # Dropout was off: the same model in eval mode gives the same masks.
    expected = prune_model(build(tiny_model, "opt"), "wanda", calibration=token_ids())
    assert all(torch.equal(masks[name], expected[name]) for name in masks)


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, model, where, error):
    """Make the pruning raise at one of its stages, once block 0 is done where that is possible."""
    calls, prune = [], sparsegpt.prune

    def raising(*args):
        raise error

    def raise_on_ninth(weight, statistics, options, stays=None):
        calls.append(1)
        if len(calls) == 9:
            raise error
        return prune(weight, statistics, options)

    if where == "capture":
        model.model.layers[0].mlp.register_forward_hook(raising)
    elif where == "statistics":
        monkeypatch.setattr(sparsegpt.Statistics, "add", raising)
    else:
        monkeypatch.setattr(sparsegpt, "prune", raise_on_ninth)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("where", ["capture", "statistics", "prune"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_interruption_leaves_no_trace(tiny_model, monkeypatch, where, error, device):
    model = build(tiny_model, "llama").train()
    dense = {name: linear.weight.clone() for name, linear in maskable_linears(model).items()}
    interrupt(monkeypatch, model, where, error)
    before = state(model)
    with pytest.raises(error):
        prune_model(model, "sparsegpt", calibration=token_ids(), device=device)
    after = state(model)
    assert {**after, "attributes": None} == {**before, "attributes": None}
    masks = keep_masks(model)
    assert len(masks) == (8 if where == "prune" else 0)
    # Each layer is either finished with its mask or untouched.
    for name, linear in maskable_linears(model).items():
        if name in masks:
            assert not linear.weight[~masks[name]].any()
        else:
            assert torch.equal(linear.weight, dense[name])


def test_statistics_live_for_one_block_only(tiny_model, monkeypatch):
    alive, most, left = weakref.WeakSet(), [], []

    class Counted(wanda.Statistics):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            alive.add(self)
            most.append(len(alive))

    prune = wanda.prune

    def counting(weight, statistics, options, stays=None):
        left.append(len(alive))
        return prune(weight, statistics, options)

    # The registry takes both from the method's module.
    monkeypatch.setattr(wanda, "Statistics", Counted)
    monkeypatch.setattr(wanda, "prune", counting)
    prune_model(build(tiny_model, "llama", num_hidden_layers=4), "wanda", calibration=token_ids(), progress=False)
    # The last statistics of a block go when its function returns, so never more than one block's four: q, k and v
    # share one, gate and up another. The first is only asked what it holds.
    assert len(most) == 1 + 16
    assert max(most) == 4
    assert left == [4, 4, 4, 3, 2, 2, 1] * 4
    assert len(alive) == 0


def test_progress_bar_can_be_silenced(tiny_model, capsys):
    prune_model(build(tiny_model, "llama"), "wanda", calibration=token_ids(), progress=False)
    prune_model(build(tiny_model, "llama"), "magnitude", progress=False)
    assert capsys.readouterr() == ("", "")


# Decoders that are not from transformers, to show what the capture relies on.


class ToyBlock(nn.Module):
    def __init__(self, style):
        super().__init__()
        self.up, self.down, self.style = nn.Linear(8, 16), nn.Linear(16, 8), style
        if style == "unused":
            self.spare = nn.Linear(8, 8)

    def forward(self, hidden_states, extra=None, state=None):
        if state is not None:
            hidden_states = hidden_states + state.pop("once")
        added = 0 if extra is None else extra
        hidden_states = hidden_states + self.down(torch.tanh(self.up(input=hidden_states + added)))
        return (hidden_states, None) if self.style == "tuple" else hidden_states


class ToyDecoder(nn.Module):
    """Each style calls its blocks in another way."""

    def __init__(self, style="plain"):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.per_token, self.style = nn.Embedding(50, 8), nn.Embedding(50, 8), style
        self.blocks = nn.ModuleList([ToyBlock(style) for _ in range(3)])

    def forward(self, ids, use_cache=None):
        h = self.embed(ids)
        order = reversed(self.blocks) if self.style == "reversed" else self.blocks
        for index, block in enumerate(order):
            if self.style == "token_dependent":
                h = block(h, self.per_token(ids) * (index + 1))
            elif self.style == "late":
                h = block(h, self.per_token(ids) * (index > 0))
            elif self.style == "keyword":
                h = block(hidden_states=h, extra=torch.ones(8) * index)
            elif self.style == "mutated":
                h = block(h, state={"once": torch.ones(8)})
            elif self.style == "tuple":
                h = block(h)[0]
            elif self.style == "between":
                h = block(h * 2)
            elif self.style == "early_stop" and index == 2:
                return h
            else:
                h = block(h)
        return h


@torch.no_grad()
def toy_reference(model, ids):
    """Like prune_reference, for layers called with the keyword `input`."""
    model, masks = copy.deepcopy(model), {}
    for index, block in enumerate(model.blocks):
        seen = {"up": [], "down": []}
        handles = [
            getattr(block, kind).register_forward_hook(
                lambda _, args, kwargs, __, seen=seen[kind]: seen.append(
                    (args[0] if args else kwargs["input"]).flatten(0, -2)
                ),
                with_kwargs=True,
            )
            for kind in seen
        ]
        for row in ids:
            model(row[None])
        for handle in handles:
            handle.remove()
        for kind, inputs in seen.items():
            pruned = prune_weight(getattr(block, kind).weight, "sparsegpt", inputs=inputs)
            getattr(block, kind).weight.copy_(pruned.weight)
            masks[f"blocks.{index}.{kind}"] = pruned.keep
    return model, masks


@pytest.mark.parametrize("style", ["plain", "token_dependent", "keyword", "mutated", "tuple"])
@pytest.mark.parametrize("repeats", [0, 1, 2])
def test_other_ways_to_call_blocks(style, repeats):
    # With repeats the first samples are equal, so token dependence shows only in a later one.
    ids = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(1))
    ids[1 : 1 + repeats] = ids[0]
    model = ToyDecoder(style)
    expected = toy_reference(model, ids)
    assert_same(model, prune_model(model, "sparsegpt", calibration=ids), *expected)


def test_dependence_on_tokens_in_later_blocks_only():
    ids = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(1))
    model = ToyDecoder("late")
    expected = toy_reference(model, ids)
    assert_same(model, prune_model(model, "sparsegpt", calibration=ids), *expected)


@pytest.mark.parametrize(
    "style, match",
    [
        ("between", "another computation around block 1.*use method='magnitude'"),
        ("reversed", "another computation around block 2"),
        ("early_stop", "call its 3 blocks in order, got 2 of the first 3 called"),
        ("unused", "layer to prune, got none in 3: blocks.0.spare,blocks.1.spare,blocks.2.spare. .* with exclude"),
    ],
)
def test_decoders_that_cannot_be_calibrated(style, match):
    model = ToyDecoder(style)
    with pytest.raises(ValueError, match=match):
        prune_model(model, "wanda", calibration=torch.zeros(2, 5, dtype=torch.int64))
    assert hook_count(model) == 0
    prune_model(model, "magnitude")


# Bad input: refused before anything changes.


def poison(model, value=float("nan")):
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    return model


IDS = torch.zeros(2, 8, dtype=torch.int64)
BAD = {
    "no calibration": (
        {"calibration": None},
        ValueError,
        "token ids for method 'wanda', got none.*use method='magn",
    ),
    "float ids": (
        {"calibration": IDS.float()},
        TypeError,
        r"expected torch.int64 \(samples, tokens\), got torch.float32",
    ),
    "int32 ids": (
        {"calibration": IDS.int()},
        TypeError,
        r"calibration: .* got torch.int32 \(2, 8\). Pass token windows",
    ),
    "list of ids": ({"calibration": IDS.tolist()}, TypeError, "got list. Pass token windows"),
    "one sample flat": (
        {"calibration": IDS[0]},
        ValueError,
        r"calibration: expected torch.int64 \(samples, tokens\), got torch.int64 \(8,\)",
    ),
    "no samples": ({"calibration": IDS[:0]}, ValueError, r"\(samples, tokens\), got torch.int64 \(0, 8\)"),
    "no tokens": ({"calibration": IDS[:, :0]}, ValueError, r"\(samples, tokens\), got torch.int64 \(2, 0\)"),
    "id too large": (
        {"calibration": IDS + 260},
        ValueError,
        "below the vocabulary size 260, got 260 to 260. Use the m",
    ),
    "id negative": ({"calibration": IDS - 1}, ValueError, "got -1 to -1"),
    "too long": ({"calibration": IDS.repeat(1, 17)}, ValueError, "samples of 1 to 128 tokens.*got 136. Cut windows"),
    "method": ({"method": "wander"}, ValueError, "expected one of magnitude, .* got 'wander'"),
    "pattern": ({"pattern": "1:4"}, ValueError, "got '1:4'"),
    "sparsity": ({"sparsity": 0.25}, ValueError, "expected 0.5 for pattern 2:4"),
    "exclude": ({"exclude": ["*.qproj"]}, ValueError, "matches none of the 15"),
    "device name": ({"device": "gpu"}, ValueError, "a torch device such as 'cuda' or 'cpu', got 'gpu'"),
    "device meta": ({"device": "meta"}, ValueError, "expected a device that holds values, got 'meta'. Pass None"),
    "device kind": ({"device": 1.5}, ValueError, "got 1.5. Pass None"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_changes_nothing(tiny_model, name):
    overrides, kind, match = BAD[name]
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = {"method": "wanda", "calibration": IDS} | overrides
    with pytest.raises(kind, match=match):
        prune_model(model, arguments.pop("method"), **arguments)
    assert keep_masks(model) == {}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_said(tiny_model):
    with pytest.raises(ValueError, match="got 'cuda' but torch sees no GPU"):
        prune_model(tiny_model("llama"), "magnitude", device="cuda")


def test_damaged_weight_is_named(tiny_model):
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.mlp.up_proj': expected finite values, got 1 that"):
        prune_model(poison(tiny_model("llama")), "magnitude")


def test_odd_width_is_named_before_any_work(tiny_model):
    model = tiny_model("llama", intermediate_size=190)
    with pytest.raises(
        ValueError,
        match=r"'model.layers.0.mlp.down_proj', in_features for pattern 2:4: expected a multiple of 4, got 190",
    ):
        prune_model(model, "magnitude")
    assert keep_masks(model) == {}
    prune_model(model, "magnitude", exclude=["*.down_proj"])


def test_overflowing_activations_are_named(tiny_model):
    model = tiny_model("llama")
    model.model.layers[1].input_layernorm.weight.data.fill_(3e38)
    with pytest.raises(
        ValueError, match=r"layer 'model.layers.1.self_attn.q_proj', calibration inputs: expected finite values"
    ):
        prune_model(model, "wanda", calibration=IDS)
    assert hook_count(model) == 0


def test_gpt2_is_refused():
    import transformers

    config = transformers.GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    with pytest.raises(ValueError, match="Conv1D, as in GPT-2"):
        prune_model(transformers.GPT2LMHeadModel(config), "magnitude")


def test_failure_inside_a_method_names_the_layer(tiny_model, monkeypatch):
    def failing(weight, statistics, options, stays=None):
        raise ValueError("expected something, got nothing. Try again.")

    monkeypatch.setattr(wanda, "prune", failing)
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.self_attn.q_proj': expected something"):
        prune_model(tiny_model("llama"), "wanda", calibration=IDS)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_what_is_kept_does_not_grow_with_the_context_of_the_config(tiny_model, arch):
    def kept_bytes(positions):
        model = build(tiny_model, arch, max_position_embeddings=positions)
        with calibration_mode(model):
            inputs = capture_block_inputs(model, token_ids())
        calls = [[(call.args, call.kwargs) for call in sample] for sample in inputs._calls]
        tensors = [leaf for leaf in tree_leaves([inputs.hidden, calls]) if isinstance(leaf, torch.Tensor)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    assert kept_bytes(1 << 20) == kept_bytes(64) > 0
