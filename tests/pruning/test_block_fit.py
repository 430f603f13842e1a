"""Reconstruction of blocks: errors fall, zeros stay, resumed runs are equal, what does not help is undone."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from support.models import build_spread_model

from patch.models.keep_masks import keep_masks
from patch.models.structure import decoder_blocks, linear_at, maskable_linears
from patch.pruning import BlockOptions, block_fit, compensate, reconstruction
from patch.pruning.block_inputs import hidden_of

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
QUICK = BlockOptions(epochs=3, batch_size=4)


def build(arch="llama", dtype=torch.float32):
    return build_spread_model(arch, scale=0.2, dtype=dtype, **(SMALL if arch != "opt" else {}))


def token_ids(samples=8, seqlen=24, seed=0):
    return torch.randint(0, 256, (samples, seqlen), generator=torch.Generator().manual_seed(seed))


def masks_of(model):
    return {
        n: torch.arange(m.weight.numel()).reshape(m.weight.shape) % 4 < 2 for n, m in maskable_linears(model).items()
    }


def run(model, masks=None, **options):
    values = {"calibration": token_ids(), "blocks": QUICK, "progress": False} | options
    return compensate(model, masks or masks_of(model), method="blocks", **values)


def weights_of(model):
    return {name: linear.weight.detach().clone() for name, linear in maskable_linears(model).items()}


@pytest.mark.parametrize(
    ("epochs", "nsamples", "expected"), [(2, 512, 8), (2, 4096, 8), (2, 128, 2), (1, 128, 1), (4, 128, 4), (1, 5, 1)]
)
def test_few_samples_are_taken_in_small_steps(epochs, nsamples, expected):
    assert BlockOptions(epochs=epochs).samples_a_step(nsamples) == expected
    assert BlockOptions(epochs=epochs, batch_size=8).samples_a_step(nsamples) == 8
    assert BlockOptions(epochs=epochs).for_samples(nsamples) == BlockOptions(epochs=epochs, batch_size=expected)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "opt"])
def test_every_block_comes_nearer_to_the_dense_output_than_least_squares(arch):
    layers, blocks = build(arch), build(arch)
    compensate(layers, masks_of(layers), calibration=token_ids(), method="least_squares", progress=False)
    result = run(blocks)
    assert list(result.block_errors) == [0, 1]
    for before, after in result.block_errors.values():
        assert after < before
    dense = build(arch)
    for name, keep in masks_of(dense).items():
        assert torch.equal(keep_masks(blocks)[name], keep)
        assert not linear_at(blocks, name).weight[~keep].any()

    def last_hidden(model):
        with torch.no_grad():
            return model(input_ids=token_ids(), output_hidden_states=True).hidden_states[1]

    errors = [float((last_hidden(model) - last_hidden(dense)).square().mean()) for model in (layers, blocks)]
    assert errors[1] < errors[0]


def test_the_errors_are_those_of_the_blocks_outputs():
    model, dense = build(), build()
    result = run(model)
    _, blocks = decoder_blocks(model)
    seen = []
    handle = blocks[0].register_forward_hook(lambda block, args, output: seen.append(hidden_of(output).double()))
    dense_handle = decoder_blocks(dense)[1][0].register_forward_hook(
        lambda block, args, output: seen.append(hidden_of(output).double())
    )
    with torch.no_grad():
        for ids in token_ids():
            model(input_ids=ids[None])
            dense(input_ids=ids[None])
    handle.remove()
    dense_handle.remove()
    error = sum(float((ours - wanted).square().sum()) for ours, wanted in zip(seen[::2], seen[1::2], strict=True))
    norm = sum(float(wanted.square().sum()) for wanted in seen[1::2])
    assert result.block_errors[0][1] == pytest.approx(error / norm, rel=1e-6)


def test_16_bit_models_are_trained_in_32():
    model, exact = build(dtype=torch.bfloat16), build(dtype=torch.bfloat16).float()
    got, expected = run(model).block_errors, run(exact).block_errors
    assert all(linear.weight.dtype == torch.bfloat16 for linear in maskable_linears(model).values())
    for index, (before, after) in got.items():
        assert after < before
        assert after == pytest.approx(expected[index][1], rel=0.05)  # bf16 has 8 bits


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    models = [build(), build(), build()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        run(model, blocks=BlockOptions(epochs=2, batch_size=4, seed=seed))
    first, second, third = (weights_of(model) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_one_sample_at_a_time_gives_the_same_to_rounding(monkeypatch):
    together, apart = build(dtype=torch.float64), build(dtype=torch.float64)
    run(together)
    monkeypatch.setattr(block_fit._Forward, "_goes_together", lambda self: False)
    run(apart)
    for name, weight in weights_of(together).items():
        torch.testing.assert_close(weight, linear_at(apart, name).weight.detach(), rtol=1e-3, atol=1e-4, msg=name)


def test_an_interrupted_run_goes_on_after_its_finished_blocks(tmp_path, monkeypatch):
    whole, resumed = build(), build()
    expected = run(whole)
    fitted, real = [], reconstruction.fit_block

    def interrupted(index, *args, **kwargs):
        if index == 1:
            raise KeyboardInterrupt
        return real(index, *args, **kwargs)

    monkeypatch.setattr(reconstruction, "fit_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(build(), stages=tmp_path)
    monkeypatch.setattr(reconstruction, "fit_block", lambda i, *a, **k: (fitted.append(i), real(i, *a, **k)))
    result = run(resumed, stages=tmp_path)
    assert fitted == [1]
    assert result.block_errors == expected.block_errors
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, linear_at(resumed, name).weight), name
    run(build(), stages=tmp_path, calibration=token_ids(seed=1))  # made from other text: nothing of it is used
    assert fitted == [1, 0, 1]


def test_a_damaged_stage_is_made_again(tmp_path, caplog):
    expected = build()
    run(expected, stages=tmp_path)
    file = tmp_path / "block-0000" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    model = build()
    with caplog.at_level(logging.WARNING):
        run(model, stages=tmp_path)
    assert "making stage block-0000 again" in caplog.text
    assert all(torch.equal(weight, linear_at(model, name).weight) for name, weight in weights_of(expected).items())


def test_a_block_that_does_not_gain_keeps_its_weights(caplog):
    layers, model = build(), build()
    compensate(layers, masks_of(layers), calibration=token_ids(), method="least_squares", progress=False)
    with caplog.at_level(logging.WARNING):
        result = run(model, blocks=BlockOptions(epochs=1, lr=50.0))
    assert "block 0 keeps its weights: its error went from" in caplog.text
    assert all(after == before for before, after in result.block_errors.values())
    for name, weight in weights_of(layers).items():
        assert torch.equal(weight, linear_at(model, name).weight), name


def test_masks_that_prune_nothing_change_nothing():
    model = build()
    before = weights_of(model)
    result = run(model, {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in before.items()})
    assert result.block_errors == {} == result.layer_errors
    assert all(torch.equal(weight, linear_at(model, name).weight) for name, weight in before.items())


def test_what_the_forward_pass_uses_may_be_made_from_the_weights():
    """Rounded weights with the gradient passed through them, as for quantization."""
    model = build()
    masks = masks_of(model)
    dense = copy.deepcopy(model)
    run(model, masks)  # to have inputs of a block that differ from the dense model's
    _, blocks = decoder_blocks(dense)
    members = {n: m for n, m in maskable_linears(dense).items() if "layers.0." in n}
    from patch.models.modes import calibration_mode
    from patch.pruning.block_inputs import capture_block_inputs

    def rounded(name, weight):
        step = weight.detach().abs().max() / 3
        return weight + ((weight / step).round() * step * masks[name] - weight).detach()

    with calibration_mode(dense):
        inputs = capture_block_inputs(dense, token_ids())
        targets = list(inputs.run(0, blocks[0]))

    def error():
        kept = {name: linear.weight.detach().clone() for name, linear in members.items()}
        with torch.no_grad():
            for name, linear in members.items():
                linear.weight.copy_(rounded(name, linear.weight))
            got = list(inputs.run(0, blocks[0]))
            for name, linear in members.items():
                linear.weight.copy_(kept[name])
        return reconstruction.relative_error(got, targets)

    for name, linear in members.items():
        linear.weight.data.masked_fill_(~masks[name], 0)
    before = error()
    block_fit.fit_block(0, blocks[0], members, masks, inputs, targets, QUICK, effective=rounded)
    assert error() < before
    assert all(not linear.weight[~masks[name]].any() for name, linear in members.items())


def test_too_little_memory_names_the_settings(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reconstruction, "fit_block", full)
    with pytest.raises(MemoryError) as refused:
        run(build())
    assert str(refused.value) == (
        "batch_size: expected memory to fit block 0 to so many samples a step, got too little for 4 of 24 tokens. "
        "Give batch_size=2, shorter ones such as seqlen=12, or method='least_squares'."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": QUICK}, "blocks: expected none with method 'least_squares', got one. Leave it out"),
        ({"stages": "x"}, "stages: expected none with method 'least_squares', got one"),
    ],
)
def test_settings_of_blocks_are_refused_elsewhere(options, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        compensate(model, masks_of(model), calibration=token_ids(), method="least_squares", progress=False, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ({"lr": 0.0}, "lr: expected a number > 0, got 0.0"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"seed": -1}, "seed: expected an integer from 0"),
    ],
)
def test_options_of_blocks_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        BlockOptions(**fields)
