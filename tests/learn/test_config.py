"""patch.learn: schedules, density and norm terms, presets, validation of every setting."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from patch.learn.config import LearnConfig
from patch.learn.objective import density, weight_norm_ratio
from patch.learn.schedules import Schedule, learning_rate_factor


def masks_and_weights():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(shape, generator=generator) for shape in [(3, 8), (16, 4)]]
    weights = [torch.randn(mask.shape, generator=generator) for mask in masks]
    return masks, weights


def test_schedule_is_linear_then_constant():
    schedule = Schedule(4.0, 0.05, 10)
    assert schedule.at(0) == 4.0
    assert schedule.at(5) == pytest.approx(2.025)
    assert schedule.at(10) == pytest.approx(0.05)
    assert schedule.at(11) == schedule.at(10)


@pytest.mark.parametrize(("total", "warmup"), [(12, 5), (2000, 5), (7, 0), (3, 5)])
def test_learning_rate_is_transformers_cosine_with_warmup(total, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total):
        assert learning_rate_factor(step, total, warmup) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()
    if warmup:
        assert learning_rate_factor(0, total, warmup) == 0.0
    assert learning_rate_factor(2000, 2000, 0, min_ratio=0.1) == pytest.approx(0.1)


def test_density_pools_all_elements_in_more_than_float16_precision():
    masks, _ = masks_and_weights()
    total = sum(float(mask.double().sum()) for mask in masks)
    assert density(masks).item() == pytest.approx(total / (24 + 64), rel=1e-12)
    assert density({"a": masks[0], "b": masks[1]}) == density(masks)
    keep = torch.arange(88) < 55
    assert density([keep[:24].reshape(3, 8), keep[24:]]).item() == 55 / 88
    # A bf16 sum would return 1000/1001 rounded to 8 bits.
    big = torch.ones(1001, dtype=torch.bfloat16)
    big[0] = 0
    assert density([big]).item() == pytest.approx(1000 / 1001, rel=1e-12)
    assert density([big]).dtype == torch.float64


def test_density_gradient_is_one_over_the_total():
    masks, _ = masks_and_weights()
    masks[0].requires_grad_()
    density(masks).backward()
    torch.testing.assert_close(masks[0].grad, torch.full((3, 8), 1 / 88))


@pytest.mark.parametrize("squared", [False, True])
def test_weight_norm_ratio(squared):
    masks, weights = masks_and_weights()
    power = 2 if squared else 1
    top = sum((m.double() * w.double()).square().sum().sqrt() ** power for m, w in zip(masks, weights, strict=True))
    bottom = sum(w.double().square().sum().sqrt() ** power for w in weights)
    assert weight_norm_ratio(masks, weights, squared).item() == pytest.approx((top / bottom).item(), rel=1e-12)
    ones = [torch.ones_like(mask) for mask in masks]
    assert weight_norm_ratio(ones, weights, squared).item() == pytest.approx(1.0)


def test_weight_norm_ratio_trains_the_mask_only_and_drops_infinite_pruned_weights():
    mask = torch.tensor([[1.0, 0.0, 0.5, 0.0]], requires_grad=True)
    # 0 * inf would be NaN; the denominator is infinite and the numerator 5, so the ratio is 0.
    assert weight_norm_ratio([mask], [torch.tensor([[3.0, float("inf"), 8.0, 1.0]])]) == 0
    finite = torch.tensor([[3.0, 1.0, 8.0, 2.0]], requires_grad=True)
    weight_norm_ratio([mask], [finite]).backward()
    assert finite.grad is None
    assert mask.grad.isfinite().all()
    norm = (9 + 16) ** 0.5
    expected = 3.0 * 3.0 / norm / float(finite.detach().norm())
    assert mask.grad[0, 0].item() == pytest.approx(expected, rel=1e-6)


def test_presets_have_the_published_values():
    joint = LearnConfig.from_preset("joint", 0.25)
    assert (joint.lr, joint.sparse_reg, joint.weight_reg) == (1e-3, 7.0, 10.0)
    assert (joint.tile_scale, joint.tile_temperature) == ((25.0, 350.0), (2.0, 0.05))
    assert LearnConfig.from_preset("joint", 0.45).tile_temperature == (4.0, 0.05)
    tile = LearnConfig.from_preset("tile", 0.45)
    assert (tile.lr, tile.sparse_reg, tile.weight_reg) == (1e-4, 3.0, 0.1)
    assert (tile.tile_scale, tile.tile_temperature) == ((100.0, 500.0), (2.0, 0.05))
    for config in (joint, tile):
        assert (config.pattern_temperature, config.pattern_scale) == ((4.0, 0.05), (100.0, 500.0))
        assert (config.betas, config.weight_decay, config.warmup_steps) == ((0.9, 0.95), 0.0, 5)
        assert (config.max_grad_norm, config.global_batch_size, config.seed) == (1.0, 256, 42)
        assert (config.pattern_prior_strength, config.tile_prior_strength, config.init_std) == (
            3.0,
            3.0,
            0.014,
        )
        assert not (config.hard_pattern or config.hard_tile)
    llm = LearnConfig.from_preset("maskllm")
    assert (llm.target_sparsity, llm.weight_decay, llm.weight_reg) == (0.5, 0.1, 1e-5)


def test_512000_blocks_are_2000_steps():
    config = LearnConfig.from_preset("joint", 0.45)
    assert config.total_steps(512_000) == 2000
    assert dataclasses.replace(config, epochs=3).total_steps(600) == 6
    assert config.accumulation_steps(4) == 64


def test_overrides_and_lists_from_files():
    config = LearnConfig.from_preset("tile", 0.3, lr=1, tile=[64, 32], tile_scale=[1, 2])
    assert (config.lr, config.tile, config.tile_scale) == (1, (64, 32), (1, 2))
    assert hash(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "both"}, "mode: expected one of joint, tile, maskllm, got 'both'"),
        ({"target_sparsity": 0.51}, "from 0 to 0.5, got 0.51"),
        ({"target_sparsity": 45}, "from 0 to 0.5, got 45"),
        ({"target_sparsity": -0.1}, "from 0 to 0.5, got -0.1"),
        (
            {"target_sparsity": float("nan")},
            "target_sparsity: expected a share of zeros from 0 to 0.5, got nan. 45 percent is 0.45",
        ),
        ({"target_sparsity": "0.45"}, "target_sparsity: expected a share of zeros from 0 to 0.5, got '0.45'"),
        ({"mode": "maskllm", "target_sparsity": 0.45}, "expected 0.5 with mode maskllm"),
        ({"tile": (128, 6)}, "columns a multiple of 4"),
        ({"tile": (0, 128)}, "tile: expected positive"),
        ({"tile": (1, 1)}, "columns a multiple of 4"),
        ({"tile": 128}, "tile: expected 2 values, each an integer, got 128. Write for example 128,128"),
        ({"tile": (128.0, 128.0)}, r"tile: expected 2 values, each an integer, got .*128\.0"),
        ({"lr": 0.0}, "lr: expected a number > 0"),
        ({"lr": "1e-3"}, "lr: expected a number > 0, got '1e-3'"),
        (
            {"betas": (0.9, 1.0)},
            r"betas: expected two numbers from 0 up to but not including 1, got .*1\.0\b.* 0\.9,0\.95",
        ),
        ({"weight_decay": -0.1}, "weight_decay: expected a number >= 0"),
        ({"sparse_reg": -7.0}, "sparse_reg: expected a number >= 0"),
        ({"weight_reg_form": "published"}, "weight_reg_form: expected one of norm, squared"),
        ({"prior_mode": "mix"}, "prior_mode: expected one of add, overwrite"),
        ({"layer_target_reduction": "max"}, "layer_target_reduction: expected one of mean, sum"),
        ({"tile_temperature": (4.0, 0.0)}, r"tile_temperature: expected \(start, end\), two numbers > 0, got .*0\.0\b"),
        ({"pattern_scale": (100.0,)}, r"pattern_scale: expected \(start, end\), two numbers > 0, got \(100\.0,\)"),
        ({"hard_tile": 1}, "hard_tile: expected true or false, got 1"),
        ({"warmup_steps": -1}, "warmup_steps: expected an integer >= 0, got -1"),
        ({"epochs": 0}, "epochs: expected an integer >= 1"),
        ({"local_batch_size": True}, "local_batch_size: expected an integer >= 1, got True"),
        ({"local_batch_size": 3}, "multiple of local_batch_size .* = 3 \\* 1 = 3, got 256"),
        ({"save_steps": 0}, "save_steps: expected an integer >= 1"),
        ({"min_lr_ratio": 2.0}, r"min_lr_ratio: expected a number from 0 to 1, got 2\.0"),
        ({"seed": -1}, "seed: expected an integer from 0 to 4294967295, got -1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LearnConfig(**settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LearnConfig.from_preset("dense", 0.4), "preset: expected one of .* got 'dense'"),
        (lambda: LearnConfig.from_preset("joint"), "expected a target sparsity"),
        (
            lambda: LearnConfig.from_preset("joint", sparsity=0.4, target_sparsity=0.3),
            "preset joint: expected the mode as .* and the target as sparsity, got target_sparsity besides. Leave it",
        ),
        (lambda: LearnConfig.from_preset("joint", 0.4, mode="tile"), "preset joint: expected .*, got mode besides"),
        (
            lambda: LearnConfig.from_preset("joint", 0.4, learning_rate=1e-3),
            "LearnConfig: expected a known setting, got 'learning_rate'. Settings are: mode, .* lr, ",
        ),
        (lambda: LearnConfig().accumulation_steps(3), r"1 \* 3 = 3, got 256"),
        (lambda: LearnConfig().total_steps(255), "at least global_batch_size = 256, got 255"),
        (lambda: Schedule(1.0, 0.0, 0), "steps: expected an integer >= 1, got 0"),
        (lambda: Schedule(1.0, 0.0, 4).at(-1), "Schedule, step: expected a number >= 0, got -1"),
        (lambda: density([]), "at least one mask, got none"),
        (lambda: weight_norm_ratio([torch.ones(2, 4)] * 2, [torch.ones(2, 4)]), "one weight per mask"),
        (lambda: weight_norm_ratio([torch.ones(2, 4)], [torch.ones(4, 2)]), "equal shapes"),
    ],
)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
