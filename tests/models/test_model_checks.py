"""Checks of a whole model: values of every saved tensor, and ids that its vocabulary has."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from patch.learn import LearnConfig, learn
from patch.models import checks
from patch.models.structure import maskable_linears
from patch.pruning import compensate, prune_model

IDS = torch.zeros(2, 16, dtype=torch.long)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.input_layernorm", "lm_head"])
def test_a_weight_that_is_not_finite_is_named(tiny_model, dtype, bad, name):
    model = tiny_model(dtype=dtype)
    checks.require_finite_model(model)
    model.get_submodule(name).weight.data.view(-1)[-1] = bad
    message = rf"--model: expected finite weights, 1 \({name}.weight\) of 21 tensors have NaN or infinity\. Get"
    with pytest.raises(ValueError, match=message):
        checks.require_finite_model(model, "--model")


def test_many_bad_tensors_are_counted(tiny_model):
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"21 \(model.embed_tokens.weight, .*, \.\.\.\) of 21 tensors"):
        checks.require_finite_model(model)


@pytest.mark.parametrize(
    ("value", "persistent", "refused"),
    [(math.nan, True, True), (math.inf, True, True), (-math.inf, True, False), (math.nan, False, False)],
)
def test_a_saved_buffer_may_hold_a_causal_mask(tiny_model, value, persistent, refused):
    model = tiny_model()
    model.model.register_buffer("bias", torch.tensor([0.0, value]), persistent=persistent)
    model.model.register_buffer("empty", torch.zeros(0))
    model.model.register_buffer("counts", torch.zeros(2, dtype=torch.long))
    if refused:
        with pytest.raises(ValueError, match=r"1 \(model.bias\) of 24 tensors have NaN"):
            checks.require_finite_model(model)
    else:
        checks.require_finite_model(model)


def test_eight_bit_floats_are_read(tiny_model):
    model = tiny_model()
    weight = model.lm_head.weight.detach().to(torch.float8_e4m3fn)
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    checks.require_finite_model(model)
    model.lm_head.weight.data.view(torch.uint8)[0, 0] = 0x7F  # NaN of this format
    with pytest.raises(ValueError, match=r"1 \(lm_head.weight\)"):
        checks.require_finite_model(model)


def test_offloaded_weights_are_named(tiny_model):
    model = tiny_model()
    model.model.layers[1].mlp.to("meta")
    message = r"model: expected all weights in memory, 3 \(model.layers.1.mlp.gate_proj.weight, .*on the meta device"
    with pytest.raises(ValueError, match=message + r" \(offloaded\)\. Load the model without offloading"):
        checks.require_finite_model(model)


def pruned(model):
    prune_model(model, "magnitude", progress=False)


def trained(model):
    prune_model(model, "prox_sparse", calibration=IDS, progress=False)


def compensated(model):
    masks = {name: torch.ones_like(m.weight, dtype=torch.bool) for name, m in maskable_linears(model).items()}
    compensate(model, masks, calibration=IDS, progress=False)


def learned(model):
    learn(model, IDS, LearnConfig.from_preset("maskllm", global_batch_size=2, local_batch_size=1), progress=False)


@pytest.mark.parametrize("work", [pruned, trained, compensated, learned])
def test_work_on_a_model_begins_with_the_check(tiny_model, work):
    model = tiny_model()
    model.model.norm.weight.data[3] = math.nan  # in no layer that is masked
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"expected finite weights, 1 \(model.norm.weight\) of 21"):
        work(model)
    assert all(
        torch.equal(tensor, before[name]) or name == "model.norm.weight" for name, tensor in model.state_dict().items()
    )


def test_tokens_without_a_row_are_named(tokenizer):
    checks.require_known_tokens(torch.tensor([0, 259]), 260, "--prompt", tokenizer)
    checks.require_known_tokens(torch.tensor([0, 10**6]), None, "--prompt", tokenizer)
    message = r"--prompt: expected tokens of the model's 250 \(rows of its embedding\), got '<s>' \(id 256\)\. Use"
    with pytest.raises(ValueError, match=message):
        checks.require_known_tokens(torch.tensor([3, 256, 300]), 250, "--prompt", tokenizer)


@pytest.mark.parametrize(
    ("key", "value", "least", "refused"),
    [
        ("pad_token_id", 260, 0, 260),
        ("bos_token_id", -1, 0, -1),
        ("eos_token_id", [3, 300], 0, 300),
        ("pad_token_id", -1, -1, None),
        ("pad_token_id", -2, -1, -2),
        ("pad_token_id", 259, 0, None),
        ("pad_token_id", None, 0, None),
    ],
)
def test_special_tokens_of_a_configuration(key, value, least, refused):
    config = SimpleNamespace(**{key: value})
    if refused is None:
        checks.require_known_special_tokens(config, "config.json", 260, least=least)
        return
    message = rf"config.json: {key}: expected a token of the vocabulary \(0 to 259\), got {refused}\. Correct the file"
    with pytest.raises(ValueError, match=message):
        checks.require_known_special_tokens(config, "config.json", 260, least=least)
