"""patch.learn.run: trajectory against a plain loop, accumulation, clean-up, checkpoints, resume, bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT
from support.learning import (
    BLOCKS,
    TILE,
    StopAt,
    assert_same_bits,
    config,
    final_logits,
    metrics_without_speed,
    resumable,
)
from torch import nn
from transformers import TrainerCallback

from patch.learn.config import MOMENTS
from patch.learn.masked_linear import MaskedLayers, MaskedLinear, SamplingState, initial_logits
from patch.learn.objective import Objective, density, weight_norm_ratio
from patch.learn.run import learn
from patch.learn.schedules import Schedule
from patch.learn.state import check_identity, run_identity
from patch.learn.trainer import ShuffledBlocks
from patch.mask import combine, sample_pattern_mask, sample_tile_mask
from patch.models.keep_masks import keep_masks
from patch.models.structure import maskable_linears
from patch.priors import tile_scores
from patch.pruning import prune_weight
from patch_kernels import reference


def priors(model):
    """2:4 magnitude masks and tile scores of unstructured magnitude masks."""
    masks, scores = {}, {}
    for name, linear in maskable_linears(model).items():
        weight = linear.weight.detach()
        masks[name] = prune_weight(weight, "magnitude").keep
        unstructured = prune_weight(weight, "magnitude", pattern="unstructured", sparsity=0.35)
        scores[name] = tile_scores(unstructured.keep, TILE)
    return {"prior_masks": masks, "tile_scores": scores}


def plain_loop(model, blocks, settings, prior_masks, tile_scores):
    """The method written from its formulas: no Trainer, no MaskedLinear, masks from patch.mask."""
    linears = maskable_linears(model)
    weights = {name: linear.weight.detach() for name, linear in linears.items()}
    logits = {}
    for index, (name, linear) in enumerate(linears.items()):
        pair = initial_logits(linear, index, settings, prior_masks[name], tile_scores[name])
        logits[name] = [None if value is None else value.requires_grad_() for value in pair]
    flat = [value for pair in logits.values() for value in pair if value is not None]
    accumulation = settings.global_batch_size // settings.local_batch_size
    total = settings.total_steps(len(blocks))
    order = ShuffledBlocks(blocks, settings).order
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in flat]
    schedule = {
        key: Schedule(*getattr(settings, key), total)
        for key in ("pattern_temperature", "pattern_scale", "tile_temperature", "tile_scale")
    }
    history = []
    for step in range(total):
        losses = []
        for micro in range(accumulation):
            draw = step * accumulation + micro
            masks = {}
            for index, (name, (pattern, tile)) in enumerate(logits.items()):
                shape = tuple(weights[name].shape)
                mask = prior_masks[name].double()
                if pattern is not None:
                    mask = sample_pattern_mask(
                        pattern,
                        shape,
                        temperature=schedule["pattern_temperature"].at(step),
                        scale=schedule["pattern_scale"].at(step),
                        noise=reference.pattern_noise(settings.seed, index, draw, pattern.shape[0]),
                    )
                if tile is not None:
                    dense = sample_tile_mask(
                        tile,
                        TILE,
                        shape,
                        temperature=schedule["tile_temperature"].at(step),
                        scale=schedule["tile_scale"].at(step),
                        noise=reference.tile_noise(settings.seed, index, draw, *tile.shape),
                    )
                    mask = combine(dense, mask)
                masks[name] = mask
            start = draw * settings.local_batch_size
            ids = blocks[order[start : start + settings.local_batch_size]]
            replaced = {f"{name}.weight": weights[name] * mask for name, mask in masks.items()}
            out = torch.func.functional_call(model, replaced, (ids,), {"use_cache": False}).logits
            if settings.objective == "distill":
                dense = model(ids, use_cache=False).logits.detach().softmax(-1)
                token_loss = (dense * (dense.log() - out.log_softmax(-1))).sum(-1).mean()
            else:
                token_loss = nn.functional.cross_entropy(out[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
            penalty = 0.0
            if settings.mode != "maskllm":
                penalty = settings.sparse_reg * (density(masks) - (1 - settings.target_sparsity)).abs()
            ratio = weight_norm_ratio(masks, weights, squared=settings.weight_reg_form == "squared")
            if not settings.weight_reg_normalized:
                ratio = ratio * sum(w.double().square().sum() for w in weights.values())
            penalty = penalty - settings.weight_reg * (1 - step / total) * ratio
            losses.append((token_loss + penalty) / accumulation)
        gradients = torch.autograd.grad(sum(losses), flat)
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        clip = min(1.0, settings.max_grad_norm / (norm.item() + 1e-6))
        warm = settings.warmup_steps
        if step < warm:
            factor = step / warm
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
            factor = settings.min_lr_ratio + (1 - settings.min_lr_ratio) * factor
        rate, (beta1, beta2) = settings.lr * factor, settings.betas
        with torch.no_grad():
            for value, gradient, (first, second) in zip(flat, gradients, moments, strict=True):
                value -= rate * settings.weight_decay * value
                first += (1 - beta1) * (gradient * clip - first)
                second += (1 - beta2) * ((gradient * clip) ** 2 - second)
                unbiased = (second / (1 - beta2 ** (step + 1))).sqrt()
                value -= rate * (first / (1 - beta1 ** (step + 1))) / (unbiased + settings.eps)
        history.append((sum(losses).item(), density(masks).item()))
    names = ("pattern_logits", "tile_logits")
    result = {
        f"{name}.{kind}": value.detach()
        for name, pair in logits.items()
        for kind, value in zip(names, pair, strict=True)
        if value is not None
    }
    return result, history


@pytest.mark.parametrize(
    ("mode", "objective"), [("joint", "tokens"), ("tile", "tokens"), ("maskllm", "tokens"), ("joint", "distill")]
)
def test_trajectory_is_that_of_an_independent_plain_loop(tiny_model, tmp_path, mode, objective):
    settings = config(mode, objective=objective, warmup_steps=2, sparse_reg=7.0, weight_reg=1e-3)
    model = tiny_model(dtype=torch.float64)
    given = priors(model)
    expected, history = plain_loop(tiny_model(dtype=torch.float64), BLOCKS, settings, **given)
    result = learn(model, BLOCKS, settings, output_dir=tmp_path, **given)
    assert [line["step"] for line in result.metrics] == list(range(1, 8))
    for line, (loss, _) in zip(result.metrics, history, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-6)
    got = final_logits(tmp_path)
    assert got.keys() == expected.keys()
    start = {}
    for index, (name, linear) in enumerate(maskable_linears(tiny_model(dtype=torch.float64)).items()):
        pattern, tile = initial_logits(linear, index, settings, given["prior_masks"][name], given["tile_scores"][name])
        start |= {f"{name}.pattern_logits": pattern, f"{name}.tile_logits": tile}
    moved = 0.0
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-8)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 0.01  # about 3.5 full steps of lr: the comparison above is not of two starting points


def test_first_step_has_learning_rate_zero(tiny_model, tmp_path):
    settings = config(save_steps=1, save_total_limit=9)
    learn(tiny_model(), BLOCKS, settings, output_dir=tmp_path)
    first = load_file(tmp_path / "checkpoint-1" / "logits.safetensors")
    second = load_file(tmp_path / "checkpoint-2" / "logits.safetensors")
    for index, (name, linear) in enumerate(maskable_linears(tiny_model()).items()):
        pattern, tile = initial_logits(linear, index, settings, None, None)
        assert torch.equal(first[f"{name}.pattern_logits"], pattern)
        assert torch.equal(first[f"{name}.tile_logits"], tile)
        assert not torch.equal(second[f"{name}.pattern_logits"], pattern)


def without_noise(monkeypatch):
    original = SamplingState.sampling
    monkeypatch.setattr(SamplingState, "sampling", lambda self, device, noise=True: original(self, device, noise=False))


@pytest.mark.parametrize("objective", ["tokens", "distill"])
@pytest.mark.parametrize("accepts_loss_kwargs", [True, False])
def test_accumulation_does_not_change_the_step(tiny_model, tmp_path, monkeypatch, accepts_loss_kwargs, objective):
    """Without noise all micro-batches have one mask, so 1 x 4 and 4 x 1 blocks are the same objective."""
    without_noise(monkeypatch)
    runs = {}
    for local in (4, 1):
        model = tiny_model(dtype=torch.float64)
        if not accepts_loss_kwargs:
            model.accepts_loss_kwargs = False
        settings = config(objective=objective, local_batch_size=local, warmup_steps=0, max_grad_norm=1000.0)
        result = learn(model, BLOCKS, settings, output_dir=tmp_path / str(local))
        runs[local] = (final_logits(tmp_path / str(local)), result.metrics)
    for name, value in runs[4][0].items():
        torch.testing.assert_close(runs[1][0][name], value, rtol=1e-6, atol=1e-8)
    for one, four in zip(runs[4][1], runs[1][1], strict=True):
        for key in ("loss", "lm_loss", "soft_density", "norm_ratio", "grad_norm", "lr"):
            assert four[key] == pytest.approx(one[key], rel=1e-5), key


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step, as they were before it."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("moments", MOMENTS)
def test_clipping_scales_the_step(tiny_model, tmp_path, moments):
    """One step. With eps = 1 its size is that of the gradient; with a small eps Adam would hide the clip."""
    free = Gradients()
    for limit, callbacks in ((1000.0, [free]), (0.01, [])):
        settings = config(
            moments=moments, max_grad_norm=limit, eps=1.0, lr=100.0, warmup_steps=0, save_steps=1, weight_decay=0.0025
        )
        result = learn(tiny_model(), BLOCKS[:4], settings, output_dir=tmp_path / str(limit), callbacks=callbacks)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in free.found.values()))
        assert 0.1 < norm < 1000.0 and result.metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)
        start = MaskedLayers(tiny_model(), maskable_linears(tiny_model()), settings).parameters()
        for name, value in final_logits(tmp_path / str(limit)).items():
            gradient = free.found[name] * min(1.0, limit / norm)
            # After one step the corrected moments are g and g * g.
            expected = 0.75 * start[name].detach() - 100 * gradient / (gradient.abs() + 1.0)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_compiled_layers_do_not_compile_again_during_training(tiny_model):
    class Compile(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for module in model.modules():
                if isinstance(module, MaskedLinear):
                    module.compile(fullgraph=True, backend="eager")

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    result = learn(tiny_model(), BLOCKS, config(), exclude=["*.self_attn.*", "*.mlp.[gu]*"], callbacks=[Compile()])
    assert list(result.masks) == [f"model.layers.{block}.mlp.down_proj" for block in range(2)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_norm_of_bfloat16_gradients_is_a_float32_one(tiny_model, tmp_path):
    gradients = Gradients()
    settings = config(logits_dtype="bfloat16", warmup_steps=0)
    result = learn(tiny_model(), BLOCKS[:4], settings, callbacks=[gradients])
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.found.values()))
    assert {g.dtype for g in gradients.found.values()} == {torch.bfloat16, torch.float32}
    assert result.metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "opt"])
@pytest.mark.parametrize("mode", ["joint", "tile", "maskllm"])
def test_result_is_a_plain_masked_model(tiny_model, arch, mode):
    model = tiny_model(arch)
    dense = {name: linear.weight.detach().clone() for name, linear in maskable_linears(model).items()}
    head = model.get_output_embeddings().weight.detach().clone()
    modules = dict(model.named_modules())
    model.get_input_embeddings().weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    given = priors(model)
    result = learn(model, BLOCKS, config(mode), **given)
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert model.config.use_cache
    assert not any(module.training for module in model.modules())
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert all(p.grad is None for p in model.parameters())
    attached = keep_masks(model)
    assert list(attached) == list(result.masks) == list(dense)
    for name, keep in result.masks.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, torch.where(keep, dense[name], 0))
        assert torch.equal(attached[name], keep)
        spread = reference.expand_tiles(result.tile_is_sparse[name], TILE, tuple(keep.shape))
        assert keep[~spread].all()
        assert (keep.reshape(-1, 4).sum(1)[spread.reshape(-1, 4)[:, 0]] == 2).all()
        if mode == "tile":
            assert torch.equal(keep & spread, given["prior_masks"][name] & spread)
    share = sum(int(keep.sum()) for keep in result.masks.values()) / sum(k.numel() for k in result.masks.values())
    assert result.hard_density == pytest.approx(share)
    assert result.soft_density == result.metrics[-1]["soft_density"]


@pytest.mark.parametrize("objective", ["tokens", "distill"])
def test_gradient_checkpointing_gives_the_same_bits_and_is_switched_off(tiny_model, tmp_path, objective):
    runs = {}
    for checkpointing in (False, True):
        model = tiny_model()
        folder = tmp_path / str(checkpointing)
        learn(model, BLOCKS, config(objective=objective, grad_checkpoint=checkpointing), output_dir=folder)
        runs[checkpointing] = final_logits(folder)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert_same_bits(runs[True], runs[False])


def test_bfloat16_model_learns_with_float32_logits(tiny_model, tmp_path):
    model = tiny_model(dtype=torch.bfloat16)
    result = learn(model, BLOCKS, config(), output_dir=tmp_path)
    assert all(value.dtype == torch.float32 for value in final_logits(tmp_path).values())
    assert next(iter(maskable_linears(model).values())).weight.dtype == torch.bfloat16
    assert all(math.isfinite(line["loss"]) for line in result.metrics)


def test_same_seed_same_bits_and_other_seed_other_bits(tiny_model, tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(hash(folder) % 1000)
        learn(tiny_model("opt"), BLOCKS, config(seed=seed), output_dir=tmp_path / folder)
    assert_same_bits(final_logits(tmp_path / "a"), final_logits(tmp_path / "b"))
    assert metrics_without_speed(tmp_path / "a") == metrics_without_speed(tmp_path / "b")
    a, c = final_logits(tmp_path / "a"), final_logits(tmp_path / "c")
    assert not any(torch.equal(a[name], c[name]) for name in a)


def test_random_state_of_the_caller_is_untouched(tiny_model):
    torch.manual_seed(17)
    expected = torch.rand(3)
    torch.manual_seed(17)
    model = tiny_model()
    torch.manual_seed(17)
    learn(model, BLOCKS, config())
    assert torch.equal(torch.rand(3), expected)


def test_penalty_moves_the_density_to_the_target(tiny_model):
    """From a start at density 0.75 the sampled density must approach the target, 0.55."""
    settings = config("tile", 0.45, lr=0.02, warmup_steps=0, weight_reg=0.0, sparse_reg=50.0, epochs=6)
    model = tiny_model()
    result = learn(model, BLOCKS, settings, prior_masks=priors(model)["prior_masks"])
    assert result.metrics[0]["soft_density"] > 0.7
    assert abs(result.soft_density - 0.55) < 0.03


def test_exact_budget_meets_the_target_in_a_short_run(tiny_model):
    model = tiny_model()
    result = learn(model, BLOCKS, config(sparsity=0.45, exact_budget=True))
    total = sum(keep.numel() for keep in result.masks.values())
    assert 0 <= total * 0.55 - result.hard_density * total < 32 * 32 + 1


@pytest.mark.parametrize("form", ["norm", "squared"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", None])
def test_objective_values(tiny_model, form, normalized, reduction):
    settings = config(
        weight_reg_form=form,
        weight_reg_normalized=normalized,
        layer_target=reduction is not None,
        layer_target_reduction=reduction or "mean",
    )
    model = tiny_model()
    layers = MaskedLayers(model, maskable_linears(model), settings)
    masks = {name: torch.rand(layer.shape).double() for name, layer in layers.layers.items()}
    weights = {name: layer.weight.detach().double() for name, layer in layers.layers.items()}
    sums = [torch.stack([m.sum(), (m * weights[n]).square().sum()]) for n, m in masks.items()]
    penalty, pooled, ratio = Objective(layers)(sums, 0.25)
    squared = form == "squared"
    assert pooled.item() == pytest.approx(density(masks).item())
    assert ratio.item() == pytest.approx(weight_norm_ratio(masks, weights, squared).item())
    if reduction is None:
        gap = abs(density(masks).item() - 0.65)
    else:
        blocks = [[m for n, m in masks.items() if f"layers.{i}." in n] for i in range(2)]
        gaps = [abs(density(block).item() - 0.65) for block in blocks]
        gap = sum(gaps) / (2 if reduction == "mean" else 1)
    kept = ratio.item()
    if not normalized:
        kept *= sum((w.square().sum() if squared else w.norm()).item() for w in weights.values())
    assert penalty.item() == pytest.approx(7.0 * gap - 10.0 * 0.75 * kept)


@pytest.mark.parametrize("arch", ["llama", "opt", "gemma3"])
def test_target_per_block_reaches_every_block(tiny_model, arch):
    settings = config(
        "tile", 0.35, lr=0.02, warmup_steps=0, weight_reg=0.0, sparse_reg=50.0, epochs=4, layer_target=True
    )
    model = tiny_model(arch)
    result = learn(model, BLOCKS, settings, prior_masks=priors(model)["prior_masks"])
    for block in range(2):
        assert density({n: k for n, k in result.masks.items() if f"layers.{block}." in n}) == pytest.approx(
            0.65, abs=0.06
        )


def test_metrics_lines(tiny_model, tmp_path):
    result = learn(tiny_model(), BLOCKS, config(log_steps=3), output_dir=tmp_path)
    assert [line["step"] for line in result.metrics] == [3, 6]
    assert metrics_without_speed(tmp_path) == [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in result.metrics
    ]
    line = result.metrics[0]
    assert set(line) >= {"loss", "lm_loss", "soft_density", "hard_density", "norm_ratio", "lr", "grad_norm"}
    # Values of step 2 (the third): schedules at 2/7, warm-up at 2/5.
    assert line["tile_scale"] == pytest.approx(25 + 325 * 2 / 7)
    assert line["pattern_temperature"] == pytest.approx(4 - 3.95 * 2 / 7)
    assert line["lr"] == pytest.approx(0.01 * 2 / 5)
    assert line["tokens_per_second"] > 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """An OPT run (its dropout makes the random state matter): folder and masks."""
    from support.models import build_tiny_model

    folder = tmp_path_factory.mktemp("whole")
    result = learn(build_tiny_model("opt"), BLOCKS, resumable(), output_dir=folder)
    return folder, result


def check_equal_to(uninterrupted, folder, result):
    whole, expected = uninterrupted
    assert_same_bits(final_logits(folder), final_logits(whole))
    assert metrics_without_speed(folder) == metrics_without_speed(whole)
    assert_same_bits(result.masks, expected.masks)
    assert_same_bits(result.tile_is_sparse, expected.tile_is_sparse)
    moments = [load_file(next(Path(f).glob("checkpoint-7")) / "optimizer.safetensors") for f in (folder, whole)]
    assert_same_bits(*moments)


@pytest.mark.parametrize("step", [1, 2, 4, 5, 7])
def test_resume_equals_the_uninterrupted_run(tiny_model, tmp_path, uninterrupted, step):
    model = tiny_model("opt")
    with pytest.raises(KeyboardInterrupt):
        learn(model, BLOCKS, resumable(), output_dir=tmp_path, callbacks=[StopAt(step)])
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())
    assert keep_masks(model) == {}
    # The interrupted model is dense again, and can go on.
    result = learn(model, BLOCKS, resumable(), output_dir=tmp_path, resume=True)
    check_equal_to(uninterrupted, tmp_path, result)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_resumed_distillation_equals_the_uninterrupted_run(tiny_model, tmp_path):
    """OPT's dropout would show in the dense model's predictions if they were made in training mode."""
    settings = resumable(objective="distill")
    whole = learn(tiny_model("opt"), BLOCKS, settings, output_dir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        learn(tiny_model("opt"), BLOCKS, settings, output_dir=tmp_path / "run", callbacks=[StopAt(3)])
    result = learn(tiny_model("opt"), BLOCKS, settings, output_dir=tmp_path / "run", resume=True)
    check_equal_to((tmp_path / "whole", whole), tmp_path / "run", result)


def test_distillation_of_all_dense_tiles_has_nothing_to_learn_from(tiny_model):
    """Nothing is pruned, so that the predictions are the dense model's: dropout aside, the divergence is 0."""
    settings = config("tile", 0.0, objective="distill", tile_prior_strength=30.0, tile_temperature=(1e-3, 1e-3))
    model = tiny_model()
    given = priors(model)
    given["tile_scores"] = {name: torch.ones_like(scores) for name, scores in given["tile_scores"].items()}
    result = learn(model, BLOCKS, settings, **given)
    assert [line["lm_loss"] for line in result.metrics] == [0.0] * 7


def test_resume_after_sigkill_in_another_process(tiny_model, tmp_path, uninterrupted):
    script = f"""
import sys; sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import torch; torch.set_num_threads({torch.get_num_threads()})
from patch.learn.run import learn
from support import learning as t
from support.models import build_tiny_model
learn(build_tiny_model("opt"), t.BLOCKS, t.resumable(), output_dir={str(tmp_path)!r},
        callbacks=[t.StopAt(5, kill=True)])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "result").exists()
    result = learn(tiny_model("opt"), BLOCKS, resumable(), output_dir=tmp_path, resume=True)
    check_equal_to(uninterrupted, tmp_path, result)


@pytest.mark.parametrize("damage", ["truncate", "flip", "no_manifest", "extra_file"])
def test_damaged_newest_checkpoint_is_reported_and_skipped(tiny_model, tmp_path, uninterrupted, damage, caplog):
    with pytest.raises(KeyboardInterrupt):
        learn(tiny_model("opt"), BLOCKS, resumable(), output_dir=tmp_path, callbacks=[StopAt(5)])
    newest = tmp_path / "checkpoint-4"
    file = newest / "logits.safetensors"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "no_manifest":
        (newest / "patch_manifest.json").unlink()
    else:
        (newest / "other.bin").write_bytes(b"x")
    result = learn(tiny_model("opt"), BLOCKS, resumable(), output_dir=tmp_path, resume=True)
    assert "ignoring an unusable checkpoint (kept as damaged-checkpoint-4)" in caplog.text
    assert (tmp_path / "damaged-checkpoint-4").is_dir()
    check_equal_to(uninterrupted, tmp_path, result)


def test_finished_run_is_applied_not_trained_again(tiny_model, tmp_path, uninterrupted):
    folder, expected = uninterrupted
    model = tiny_model("opt")
    result = learn(model, BLOCKS, resumable(), output_dir=folder, resume=True, callbacks=[StopAt(1)])
    assert_same_bits(result.masks, expected.masks)
    assert_same_bits(keep_masks(model), expected.masks)
    assert (result.metrics, result.hard_density, result.soft_density) == (
        expected.metrics,
        expected.hard_density,
        expected.soft_density,
    )


def test_resume_without_an_earlier_run_starts_one(tiny_model, tmp_path, uninterrupted):
    result = learn(tiny_model("opt"), BLOCKS, resumable(), output_dir=tmp_path / "new", resume=True)
    check_equal_to(uninterrupted, tmp_path / "new", result)


def test_half_written_metrics_line_is_dropped(tiny_model, tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        learn(tiny_model("opt"), BLOCKS, resumable(), output_dir=tmp_path, callbacks=[StopAt(5)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    result = learn(tiny_model("opt"), BLOCKS, resumable(), output_dir=tmp_path, resume=True)
    check_equal_to(uninterrupted, tmp_path, result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": resumable(lr=0.02)}, "expected lr of the run that wrote it, 0.01, got 0.02"),
        ({"config": resumable(local_batch_size=1)}, "expected local_batch_size of .*, 2, got 1"),
        ({"blocks": BLOCKS.flip(0)}, "expected the training blocks of the run"),
        ({"seed": 1}, "expected the model's weights of the run"),
        ({"exclude": ["*.fc1"]}, "expected the masked layers, prior masks or tile scores"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_resume_with_something_else_is_refused(tiny_model, tmp_path, uninterrupted, change, message, finished):
    folder = uninterrupted[0]
    if not finished:
        folder = tmp_path
        with pytest.raises(KeyboardInterrupt):
            learn(tiny_model("opt"), BLOCKS, resumable(), output_dir=folder, callbacks=[StopAt(3)])
    with pytest.raises(ValueError, match=message):
        learn(
            tiny_model("opt", seed=change.get("seed", 0)),
            change.get("blocks", BLOCKS),
            change.get("config", resumable()),
            output_dir=folder,
            resume=True,
            exclude=change.get("exclude", ()),
        )


def test_settings_younger_than_the_run_had_their_defaults(tiny_model, tmp_path):
    def identity(**settings):
        return run_identity(tiny_model(), BLOCKS, config(**settings), {}, 1)

    older = identity()
    for name in ("moments", "logits_dtype", "pattern_scale"):
        del older["config"][name]
    check_identity(tmp_path, older, identity())
    for name, value in (("moments", "int8"), ("logits_dtype", "bfloat16")):
        with pytest.raises(ValueError, match=f"expected {name} of the run that wrote it, 'float32', got '{value}'"):
            check_identity(tmp_path, older, identity(**{name: value}))


@pytest.mark.parametrize("damage", [[], {}, {"config": None}])
def test_identity_of_something_else_is_refused(tiny_model, tmp_path, damage):
    expected = run_identity(tiny_model(), BLOCKS, config(), {}, 1)
    found = expected | damage if damage else damage
    with pytest.raises(ValueError, match="expected the identity of a learning run, got something else"):
        check_identity(tmp_path, found, expected)


def test_used_folder_is_refused_without_resume(tiny_model, uninterrupted):
    with pytest.raises(ValueError, match=r"expected no earlier learning run, found .*. Pass resume=True"):
        learn(tiny_model("opt"), BLOCKS, resumable(), output_dir=uninterrupted[0])


def test_folders_of_something_else_are_refused(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"output_dir: expected a new folder .* holds other files \(config.json\)"):
        learn(tiny_model(), BLOCKS, config(), output_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_a_killed_removal_left_is_swept(tiny_model, tmp_path, uninterrupted):
    (tmp_path / "removed-checkpoint-2").mkdir()
    (tmp_path / "removed-checkpoint-2" / "logits.safetensors").touch()
    result = learn(tiny_model("opt"), BLOCKS, resumable(), output_dir=tmp_path, resume=True)
    assert not (tmp_path / "removed-checkpoint-2").exists()
    check_equal_to(uninterrupted, tmp_path, result)


def test_a_missed_target_is_said_as_sparsity(tiny_model, caplog):
    learn(tiny_model(), BLOCKS, config(sparsity=0.1))
    assert "the target sparsity 0.1000 was missed: the masks have 0." in caplog.text
    assert "Use exact_budget (--exact-budget)" in caplog.text


def test_changed_save_interval_may_resume(tiny_model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        learn(tiny_model(), BLOCKS, resumable(), output_dir=tmp_path, callbacks=[StopAt(3)])
    changed = dataclasses.replace(resumable(), save_steps=3, grad_checkpoint=True)
    assert learn(tiny_model(), BLOCKS, changed, output_dir=tmp_path, resume=True).metrics[-1]["step"] == 7


def test_not_finite_loss_stops_names_the_step_and_keeps_the_checkpoint(tiny_model, tmp_path):
    model = tiny_model()
    settings = config(save_steps=1)
    order = ShuffledBlocks(BLOCKS, settings).order
    blocks = BLOCKS.clamp(max=250)
    blocks[order[4 * 4 + 1]] = 255  # a block of the fifth step
    # Not in the weights, where it would be refused before any work.
    model.get_input_embeddings().register_forward_hook(
        lambda _, args, output: output.masked_fill((args[0] == 255)[..., None], float("nan"))
    )
    with pytest.raises(FloatingPointError, match=r"step 5: expected a finite loss .* got token loss nan"):
        learn(model, blocks, settings, output_dir=tmp_path)
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())
    assert all(value.isfinite().all() for value in final_logits(tmp_path).values())
    assert (tmp_path / "checkpoint-4").is_dir()
    assert not (tmp_path / "result").exists()


def test_training_early_stop_by_a_callback_is_not_a_result(tiny_model, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    with pytest.raises(RuntimeError, match="stopped at step 2 of 7 by a callback; call learn again"):
        learn(tiny_model(), BLOCKS, config(), output_dir=tmp_path, callbacks=[Stop()])


def test_two_processes_equal_one_with_twice_the_accumulation(tiny_model, tmp_path):
    """Ranks draw other noise and read other blocks, exactly those of the micro-batches of one process."""
    script = tmp_path / "ranks.py"
    script.write_text(
        f"""
import sys; sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import torch; torch.set_num_threads(1)
from patch.learn.run import learn
from support import learning as t
from support.models import build_tiny_model
learn(build_tiny_model(), t.BLOCKS, t.resumable(), output_dir={str(tmp_path / "ranks")!r})
"""
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    learn(tiny_model(), BLOCKS, resumable(), output_dir=tmp_path / "one")
    expected = final_logits(tmp_path / "one")
    for name, value in final_logits(tmp_path / "ranks").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    ranks, one = (metrics_without_speed(tmp_path / name) for name in ("ranks", "one"))
    assert [line["loss"] for line in ranks] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    with pytest.raises(ValueError, match="expected the number of processes of the run that wrote it"):
        learn(tiny_model(), BLOCKS, resumable(), output_dir=tmp_path / "ranks", resume=True)


def full_masks(model, value=True):
    return {name: torch.full(tuple(m.weight.shape), value) for name, m in maskable_linears(model).items()}


def one_of_four_masks(model):
    return {name: (torch.arange(mask.shape[1]) % 4 == 1).expand(mask.shape) for name, mask in full_masks(model).items()}


def with_nan(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    return model


BAD = [
    (
        lambda m: learn(m, BLOCKS.float(), config()),
        TypeError,
        r"train_blocks: expected torch.int64 \(samples, tokens\), got torch.float32",
    ),
    (lambda m: learn(m, BLOCKS.tolist(), config()), TypeError, r"torch.int64 \(samples, tokens\), got list"),
    (
        lambda m: learn(m, BLOCKS[0], config()),
        ValueError,
        r"train_blocks: expected torch.int64 \(samples, tokens\), got torch.int64 \(16,\)",
    ),
    (
        lambda m: learn(m, BLOCKS[:, :1], config()),
        ValueError,
        "train_blocks: expected samples of 2 or more tokens, got 1",
    ),
    (lambda m: learn(m, BLOCKS[:0], config()), ValueError, r"\(samples, tokens\), got torch.int64 \(0, 16\)"),
    (lambda m: learn(m, BLOCKS[:3], config()), ValueError, "at least global_batch_size = 4, got 3"),
    (
        lambda m: learn(m, BLOCKS + 100, config()),
        ValueError,
        "token ids from 0 below the vocabulary size 260, got 100 to",
    ),
    (lambda m: learn(m, BLOCKS - 1, config()), ValueError, "token ids from 0 below the vocabulary size 260, got -1 to"),
    (lambda m: learn(m, BLOCKS, {"mode": "joint"}), TypeError, "expected a LearnConfig, got dict"),
    (lambda m: learn(m, BLOCKS, config("tile")), ValueError, "expected 2:4 keep masks for mode tile"),
    (
        lambda m: learn(m, BLOCKS, config("tile"), prior_masks=one_of_four_masks(m)),
        ValueError,
        r"prior_masks\['model.layers.0.self_attn.q_proj'\]: expected exactly 2 of 4 .* first at row 0, column 0",
    ),
    (
        lambda m: learn(m, BLOCKS, config(), prior_masks={}),
        ValueError,
        "prior_masks: expected one for each of the 14 layers to mask, got 0: missing 14",
    ),
    (
        lambda m: learn(m, BLOCKS, config(), prior_masks={n: k.float() for n, k in full_masks(m).items()}),
        TypeError,
        r"prior_masks\['model.layers.0.self_attn.q_proj'\]: expected torch.bool .*, got torch.float32",
    ),
    (
        lambda m: learn(m, BLOCKS, config(), prior_masks={n: k[1:] for n, k in full_masks(m).items()}),
        ValueError,
        r"prior_masks\['model.*q_proj'\]: expected torch.bool \(128, 128\), got torch.bool \(127, 128\)",
    ),
    (
        lambda m: learn(m, BLOCKS, config(), prior_masks=full_masks(m)),
        ValueError,
        "prior_masks: expected 2:4 keep masks, got none with 2 of 4 in any group. Prune one-shot with pattern 2:4",
    ),
    (
        lambda m: learn(m, BLOCKS, config("maskllm"), prior_masks=full_masks(m, value=False)),
        ValueError,
        r"prior_masks\['model.*q_proj'\]: expected a 2:4 keep mask, True where .*, got one that keeps nothing",
    ),
    (
        lambda m: learn(m, BLOCKS, config(), prior_masks=list(full_masks(m).values())),
        TypeError,
        "prior_masks: expected tensors by layer name, got list. Use the masks of this model",
    ),
    (lambda m: learn(m, BLOCKS, config(), prior_masks="prior"), TypeError, "expected tensors by layer name, got str"),
    (lambda m: learn(m.lm_head, BLOCKS, config()), TypeError, "model: expected a causal language model, got Linear"),
    (
        lambda m: learn("model", BLOCKS, config()),
        TypeError,
        "model: expected a causal language model, got str. Load it first.",
    ),
    (lambda m: learn(m, BLOCKS, config(), report_to=["none-such"]), ValueError, "report_to: expected one of .*wandb"),
    (
        lambda m: learn(m, BLOCKS, config(), tile_scores=list(full_masks(m))),
        TypeError,
        "tile_scores: expected tensors by layer name, got list",
    ),
    (
        lambda m: learn(m, BLOCKS, config(tile=(64, 64)), tile_scores=priors(m)["tile_scores"]),
        ValueError,
        r"tile_scores\['.*'\]: expected .* \(2, 2\), got torch.float32 \(4, 4\)",
    ),
    (
        lambda m: learn(
            m,
            BLOCKS,
            config(),
            tile_scores={n: s * float("nan") for n, s in priors(m)["tile_scores"].items()},
        ),
        ValueError,
        "tile_scores\\[.*: expected finite values, got .* NaN",
    ),
    (lambda m: learn(m, BLOCKS, config(), resume=True), ValueError, "expected an output_dir to resume from"),
    (
        lambda m: learn(m.half(), BLOCKS, config()),
        ValueError,
        "layer 'model.layers.0.self_attn.q_proj': expected float32, .* got torch.float16, .* Load the model with",
    ),
    (
        lambda m: learn(with_nan(m), BLOCKS, config()),
        ValueError,
        "layer 'model.layers.1.mlp.up_proj': expected finite values, got 1 that",
    ),
    (lambda m: learn(m, BLOCKS, config(), exclude=["*.none"]), ValueError, "matches none"),
    (lambda m: learn(m, BLOCKS, config(), exclude=["*"]), ValueError, "which removes all"),
    (
        lambda m: learn(m.to("meta"), BLOCKS, config()),
        ValueError,
        "layer 'model.layers.0.self_attn.q_proj': expected a weight with values, got one on the meta device",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_refused_before_any_work(tiny_model, call, error, message):
    model = tiny_model()
    with pytest.raises(error, match=message):
        call(model)
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_odd_layers_and_pruned_models_are_refused(tiny_model):
    model = tiny_model()
    model.model.layers[0].mlp.gate_proj = nn.Linear(126, 192)
    with pytest.raises(
        ValueError,
        match=r"gate_proj', in_features for pattern 2:4: expected a multiple of 4, got 126. .*dense with exclude",
    ):
        learn(model, BLOCKS, config())
    model = tiny_model()
    learn(model, BLOCKS, config())
    with pytest.raises(ValueError, match="dense weights, got a pruned layer"):
        learn(model, BLOCKS, config())
    with pytest.raises(ValueError, match=r"samples of 2 to 8 tokens \(max_position_embeddings\), got 16"):
        learn(tiny_model("opt", max_position_embeddings=8), BLOCKS, config())


def test_layers_that_training_goes_past_are_named(tiny_model, monkeypatch):
    def fused(self, x):
        if self.training:  # as with a fused kernel
            gated = torch.nn.functional.linear(x, self.gate_proj.weight)
        else:
            gated = self.gate_proj(x)
        return self.down_proj(self.act_fn(gated) * self.up_proj(x))

    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", fused)
    message = r"call every layer that gets a mask, it did not call 2 \(model.layers.0.mlp.gate_proj, .*--exclude"
    with pytest.raises(ValueError, match=message):
        learn(model, BLOCKS, config(), **priors(model), progress=False)
    assert_same_bits(before, model.state_dict())


def test_global_batch_not_divisible_by_the_processes_is_refused(tiny_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"local_batch_size \* processes = 2 \* 3 = 6, got 4"):
        learn(tiny_model(), BLOCKS, config())


def test_model_stays_dense_after_any_error_inside_training(tiny_model):
    class Break(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            raise OSError("disk full")

    model = tiny_model().train()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with contextlib.suppress(OSError):
        learn(model, BLOCKS, config(grad_checkpoint=True), callbacks=[Break()])
    assert model.training
    assert model.config.use_cache
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])
