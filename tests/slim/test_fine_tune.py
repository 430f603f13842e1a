"""Fine-tuning under the mask: it learns, the zeros hold, what breaks them is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TrainerCallback

from patch.models.keep_masks import keep_masks
from patch.models.structure import maskable_linears
from patch.pruning import prune_model
from patch.slim import CompressOptions, compress_model
from patch.slim.fine_tune import FineTuneOptions, fine_tune

QUICK = {"lr": 2e-3, "warmup_steps": 1, "batch_size": 8, "local_batch_size": 4, "log_steps": 1}


def blocks(count=48, tokens=16):
    """Counting bytes: easy to learn."""
    starts = torch.randint(0, 200, (count, 1), generator=torch.Generator().manual_seed(0))
    return starts + torch.arange(tokens)


def masked(tiny_model, settings=None, **overrides):
    model = tiny_model(**overrides)
    if settings is None:
        prune_model(model, "magnitude", progress=False)
    else:
        masks = prune_model(copy.deepcopy(model), "magnitude", progress=False)
        compress_model(model, masks, CompressOptions(slim_lora=False, **settings), progress=False)
    return model


def loss_of(model):
    with torch.no_grad():
        return model(blocks(8), labels=blocks(8)).loss.item()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Breaks(TrainerCallback):
    """Writes into a pruned weight at the end of a step, after the zeros were set again."""

    def __init__(self, model, step):
        self.name, keep = list(keep_masks(model).items())[2]
        self.weight, self.where, self.step = model.get_submodule(self.name).weight, (~keep).nonzero()[0], step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.weight[tuple(self.where)] = 1.0


@pytest.mark.parametrize(
    ("settings", "weights", "adapters"),
    [
        (None, True, False),
        ({"lora_rank": 0.1}, True, True),
        ({"lora_rank": 0.1, "prune_lora": True}, True, False),
        ({"lora_rank": 0.1, "quantize_weight": True}, False, True),
    ],
)
def test_it_learns_and_trains_what_it_says(tiny_model, settings, weights, adapters):
    model = masked(tiny_model, settings)
    before, masks, first = state(model), keep_masks(model), loss_of(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    result = fine_tune(model, blocks(), FineTuneOptions(**QUICK), progress=False)
    assert result.steps == 6 and result.trained == tuple(masks)
    assert [step for step, _ in result.losses] == [1, 2, 3, 4, 5, 6]
    assert loss_of(model) < first - 0.02 and result.losses[-1][1] < result.losses[0][1]
    after = state(model)
    for name, keep in masks.items():
        assert not after[f"{name}.weight"][~keep].any()
    for name in before:
        layer, _, part = name.rpartition(".")
        trained = layer in masks and (weights if part == "weight" else adapters and part.startswith("lora"))
        assert torch.equal(before[name], after[name]) != trained, name
    assert not model.training and flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_pruned_weights_have_no_part_in_the_gradient(tiny_model):
    """Dropped before clipping: the norm is that of the kept weights' gradient."""
    model = masked(tiny_model)
    seen = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for name, keep in keep_masks(model).items():
                gradient = model.get_submodule(name).weight.grad
                seen.append(bool(gradient[keep].any()) and not gradient[~keep].any())

    fine_tune(model, blocks(8), FineTuneOptions(**QUICK), progress=False, callbacks=[Norm()])
    assert len(seen) == len(keep_masks(model)) and all(seen)


def test_small_steps_are_not_lost_in_bf16(tiny_model):
    """Weights above 2^-5 have a spacing of 2^-12 or more in bf16: a step of 2e-5 alone would be rounded away."""
    model = masked(tiny_model, {"lora_rank": 0.1}, dtype=torch.bfloat16)
    before, dtypes = state(model), [parameter.dtype for parameter in model.parameters()]
    fine_tune(model, blocks(), FineTuneOptions(**QUICK | {"lr": 2e-5, "epochs": 6}), progress=False)
    assert dtypes == [parameter.dtype for parameter in model.parameters()]
    for name, keep in keep_masks(model).items():
        weight = model.get_submodule(name).weight
        large = keep & (weight.abs() > 2**-5)
        assert not weight[~keep].any()
        assert (weight != before[f"{name}.weight"])[large].float().mean() > 0.2


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [(None, torch.float32), ({"lora_rank": 0.1}, torch.float32), ({"lora_rank": 0.1}, torch.bfloat16)],
)
def test_resumed_is_uninterrupted(tiny_model, tmp_path, settings, dtype):
    options = FineTuneOptions(**QUICK, save_steps=2)
    whole = masked(tiny_model, settings, dtype=dtype)
    fine_tune(whole, blocks(), options, output_dir=tmp_path / "whole", progress=False)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    parts = masked(tiny_model, settings, dtype=dtype)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(parts, blocks(), options, output_dir=tmp_path / "parts", progress=False, callbacks=[Stop()])
    with pytest.raises(ValueError, match=r"output_dir: expected no earlier run, .* has checkpoints"):
        fine_tune(parts, blocks(), options, output_dir=tmp_path / "parts", progress=False)
    again = masked(tiny_model, settings, dtype=dtype)
    result = fine_tune(again, blocks(), options, output_dir=tmp_path / "parts", resume=True, progress=False)
    assert result.steps == 6
    expected, got = state(whole), state(again)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_broken_zero_is_refused_at_the_end_with_the_layers_name(tiny_model):
    model = masked(tiny_model)
    breaks = Breaks(model, 6)
    with pytest.raises(ValueError, match=f"{breaks.name}: expected zeros where the keep mask prunes, got 1 other"):
        fine_tune(model, blocks(), FineTuneOptions(**QUICK), progress=False, callbacks=[breaks])


def test_a_broken_zero_is_refused_before_it_is_saved(tiny_model, tmp_path):
    model = masked(tiny_model)
    breaks = Breaks(model, 2)
    with pytest.raises(ValueError, match=f"{breaks.name}: expected zeros"):
        options = FineTuneOptions(**QUICK, save_steps=2)
        fine_tune(model, blocks(), options, output_dir=tmp_path, progress=False, callbacks=[breaks])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_zeros_are_set_again_in_the_next_step(tiny_model):
    model = masked(tiny_model)
    fine_tune(model, blocks(), FineTuneOptions(**QUICK), progress=False, callbacks=[Breaks(model, 5)])
    for name, keep in keep_masks(model).items():
        assert not model.get_submodule(name).weight[~keep].any()


def test_a_loss_that_is_not_finite_stops_before_the_step(tiny_model):
    model = masked(tiny_model)
    model.lm_head.weight.data[5] = float("nan")
    before = state(model)
    with pytest.raises(FloatingPointError, match="step 1, loss: expected finite values, got nan"):
        fine_tune(model, blocks(), FineTuneOptions(**QUICK), progress=False)
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before if "lm_head" not in name)


def test_a_gradient_that_is_not_finite_stops_before_the_step(tiny_model):
    model = masked(tiny_model)
    before = state(model)
    handle = model.model.layers[0].mlp.register_full_backward_hook(lambda _, given, __: (given[0] * float("inf"),))
    with pytest.raises(FloatingPointError, match=r"step 1, gradient of .*layers.0.*: expected finite values, got"):
        fine_tune(model, blocks(), FineTuneOptions(**QUICK), progress=False)
    handle.remove()
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_kept_zeros_are_trained(tiny_model):
    """Only the mask says what is pruned."""
    model = masked(tiny_model)
    name, keep = next(iter(keep_masks(model).items()))
    weight = model.get_submodule(name).weight
    weight.data.zero_()
    fine_tune(model, blocks(), FineTuneOptions(**QUICK), progress=False)
    assert torch.equal(weight != 0, keep)


def other_masks(model):
    name, keep = list(keep_masks(model).items())[1]
    keep[0] = keep[0].flip(0)
    model.get_submodule(name).weight.data[0] = 0


@pytest.mark.parametrize(
    ("change", "settings", "tokens", "what"),
    [
        (lambda m: m.lm_head.weight.data.mul_(2), {}, blocks(), "another model"),
        (other_masks, {}, blocks(), "another model, masks"),
        (None, {}, blocks() + 1, "another blocks"),
        (None, {"lr": 1e-3}, blocks(), "another lr"),
    ],
)
def test_another_run_is_not_resumed(tiny_model, tmp_path, change, settings, tokens, what):
    options = QUICK | {"save_steps": 2}
    fine_tune(masked(tiny_model), blocks(16), FineTuneOptions(**options), output_dir=tmp_path, progress=False)
    model = masked(tiny_model)
    if change is not None:
        change(model)
    before = state(model)
    with pytest.raises(ValueError, match=f"resume: expected the model, masks, blocks and settings .* got {what}"):
        chosen = FineTuneOptions(**options | settings)
        fine_tune(model, tokens[:16], chosen, output_dir=tmp_path, resume=True, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())


def test_an_incomplete_checkpoint_is_passed_over(tiny_model, tmp_path, caplog):
    options = FineTuneOptions(**QUICK, save_steps=2)
    whole = masked(tiny_model)
    fine_tune(whole, blocks(), options, output_dir=tmp_path, progress=False)
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text("{")  # killed while it was written
    again = masked(tiny_model)
    result = fine_tune(again, blocks(), options, output_dir=tmp_path, resume=True, progress=False)
    assert result.steps == 6 and "ignoring an incomplete checkpoint" in caplog.text
    expected, got = state(whole), state(again)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def broken_start(model):
    name, keep = next(iter(keep_masks(model).items()))
    model.get_submodule(name).weight.data.masked_fill_(~keep, 0.5)


@pytest.mark.parametrize(
    ("change", "arguments", "error", "message"),
    [
        (broken_start, {}, ValueError, "q_proj: expected zeros where the keep mask prunes"),
        (lambda m: m.half(), {}, ValueError, "q_proj': expected float32, bfloat16 .* got torch.float16"),
        (lambda m: [delattr(x, "keep_mask") for x in maskable_linears(m).values()], {}, ValueError, "got none. Prune"),
        (None, {"resume": True}, ValueError, "resume: expected an output_dir to resume from, got none"),
        (None, {"blocks": blocks(48, 1)}, ValueError, "blocks: expected samples of 2 (or more|to .*) tokens.*, got 1"),
        (None, {"blocks": blocks(7)}, ValueError, "blocks: expected at least batch_size = 8, got 7"),
        (None, {"blocks": blocks() + 400}, ValueError, "blocks: expected token ids from 0 below the vocabulary"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(tiny_model, change, arguments, error, message):
    model = masked(tiny_model)
    if change is not None:
        change(model)
    before = state(model)
    with pytest.raises(error, match=message):
        tokens = arguments.pop("blocks", blocks())
        fine_tune(model, tokens, FineTuneOptions(**QUICK), progress=False, **arguments)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())


def test_folders_of_something_else_are_refused(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"output_dir: expected a new folder .* holds other files \(config.json\)"):
        fine_tune(masked(tiny_model), blocks(), FineTuneOptions(**QUICK), output_dir=tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_batch_must_divide_among_the_processes(tiny_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple of local_batch_size \* processes = 4 \* 3"):
        fine_tune(masked(tiny_model), blocks(), FineTuneOptions(**QUICK), progress=False)


def test_quantised_weights_alone_cannot_be_trained(tiny_model):
    model = masked(tiny_model, {"quantize_weight": True})
    with pytest.raises(ValueError, match="expected weights or adapters to train, got quantised ones only"):
        fine_tune(model, blocks(), FineTuneOptions(**QUICK), progress=False)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": 0}, ValueError, "lr: expected a number > 0, got 0"),
        ({"lr": "1e-5"}, ValueError, "lr: expected a number > 0, got '1e-5'. The default is 1e-05"),
        ({"lr": -1.0}, ValueError, "lr: expected a number > 0, got -1.0"),
        ({"epochs": 0}, ValueError, "epochs: expected an integer >= 1, got 0"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps: expected an integer >= 0, got -1"),
        ({"grad_checkpoint": 1}, ValueError, "grad_checkpoint: expected true or false, got 1"),
        (
            {"batch_size": 6, "local_batch_size": 4},
            ValueError,
            "batch_size: expected a multiple of local_batch_size .* = 4 .* 1 = 4",
        ),
    ],
)
def test_options_are_checked_when_made(settings, error, message):
    with pytest.raises(error, match=message):
        FineTuneOptions(**settings)


def test_published_defaults():
    options = FineTuneOptions()
    assert (options.lr, options.weight_decay, options.warmup_steps, options.batch_size) == (1e-5, 1e-2, 5, 64)
