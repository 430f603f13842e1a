"""patch.learn.optimizer: which optimizer a config gets, its state, convergence, and learning with it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from support.adamw import same_bits
from support.learning import (
    BLOCKS,
    StopAt,
    assert_same_bits,
    config,
    final_logits,
    metrics_without_speed,
)
from torch import nn

from patch.learn.config import MOMENTS, LearnConfig
from patch.learn.masked_linear import MaskedLayers, initial_logits
from patch.learn.optimizer import LowPrecisionAdamW, make_optimizer, moment_state, scale_gradients
from patch.learn.run import learn
from patch.models.structure import maskable_linears


def stepped(optimizer, parameters, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def make_parameters():
    shapes = (((40, 6), torch.float32), ((300,), torch.bfloat16))
    return [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(1)).to(d)) for s, d in shapes]


@pytest.mark.parametrize("moments", MOMENTS)
def test_state_dict_round_trip_keeps_dtypes_and_goes_on_bit_for_bit(moments):
    whole = make_parameters()
    optimizer = LowPrecisionAdamW(whole, moments=moments, seed=5)
    stepped(optimizer, whole, 3)
    parts = [nn.Parameter(p.detach().clone()) for p in whole]
    resumed = LowPrecisionAdamW(parts, lr=9.0, moments=moments, seed=5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["lr"] == 1e-3
    for parameter in parts:
        expected = moment_state(parameter, moments)
        assert {n: v.dtype for n, v in resumed.state[parameter].items()} == {n: v.dtype for n, v in expected.items()}
    stepped(optimizer, whole, 3, first=3)
    stepped(resumed, parts, 3, first=3)
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(whole, parts, strict=True))
    for a, b in zip(whole, parts, strict=True):
        assert all(same_bits(value, resumed.state[b][name]) for name, value in optimizer.state[a].items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_goes_on_bit_for_bit(copied):
    parameters = make_parameters()
    optimizer = LowPrecisionAdamW(parameters, moments="int8", seed=5)
    stepped(optimizer, parameters, 2)
    scale_gradients(optimizer, torch.tensor(0.3))
    twin, twins = copied((optimizer, parameters))
    stepped(optimizer, parameters, 2, first=2)
    stepped(twin, twins, 2, first=2)
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(parameters, twins, strict=True))


def test_a_copy_of_a_fused_optimizer_forgets_the_scale_too():
    parameters = [nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    scale_gradients(optimizer, torch.tensor(0.3))
    optimizer = copy.deepcopy(optimizer)
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones(3)
    scale_gradients(optimizer, torch.tensor(0.5))
    optimizer.step()
    assert optimizer.grad_scale is None


def test_parameters_round_apart():
    """Equal parameters with equal gradients: each has its own stream."""
    twins = [nn.Parameter(torch.ones(2000)) for _ in range(2)]
    optimizer = LowPrecisionAdamW(twins)
    for parameter in twins:
        parameter.grad = torch.full((2000,), 0.3)
    optimizer.step()
    first, second = (optimizer.state[parameter]["exp_avg"] for parameter in twins)
    assert not torch.equal(first, second) and first.float().mean() == pytest.approx(0.03, rel=1e-3)


def test_schedule_closure_missing_gradient_and_gradient_scale():
    first, second = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
    optimizer = LowPrecisionAdamW([first, second], lr=1.0, moments="float32", eps=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 * step)
    optimizer.grad_scale = torch.tensor(0.25)

    def closure():
        first.grad = torch.full((5,), 4.0)
        return first.sum()

    assert optimizer.step(closure) == 0.0 and torch.equal(first.detach(), torch.zeros(5))  # learning rate 0
    scheduler.step()
    optimizer.grad_scale = torch.tensor(0.25)
    optimizer.step(closure)
    assert first.detach() == pytest.approx(torch.full((5,), -0.1 / 1.5))  # the scaled gradient is 1
    assert second not in optimizer.state


def test_moves_a_bfloat16_logit_by_steps_that_nearest_rounding_loses():
    """From 0.042 by 500 steps of 1e-4, each less than half a unit in the last place."""
    ends = {}
    for name in ("torch", "patch"):
        logits = nn.Parameter(torch.full((1024,), 0.042).bfloat16())
        settings = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
        rival = torch.optim.AdamW([logits], fused=True, **settings)
        optimizer = rival if name == "torch" else LowPrecisionAdamW([logits], **settings)
        for _ in range(500):
            logits.grad = torch.full_like(logits, -1.0)
            optimizer.step()
        ends[name] = logits.detach().double().mean().item()
    assert ends["torch"] == pytest.approx(0.042, abs=2e-4)
    assert ends["patch"] == pytest.approx(0.042 + 500 * 1e-4, rel=0.02)


@pytest.mark.parametrize("moments", MOMENTS)
def test_converges_as_with_fp32_moments(moments):
    """Noisy least squares with curvatures over four decades in each block of 256."""
    target = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    curvature = 10.0 ** torch.linspace(-4, 0, 4096)[torch.randperm(4096, generator=torch.Generator().manual_seed(1))]
    errors = []
    for kind in ("float32", moments):
        x = nn.Parameter(torch.zeros(4096))
        optimizer = LowPrecisionAdamW([x], lr=0.02, moments=kind)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 400)
        generator = torch.Generator().manual_seed(2)
        for _ in range(400):
            noise = torch.randn(4096, generator=generator)
            x.grad = curvature * (x.detach() - target + 0.5 * noise)
            optimizer.step()
            scheduler.step()
        errors.append((x.detach() - target).square().mean().sqrt().item())
    assert errors[1] <= 1.1 * errors[0] + 0.01, errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LowPrecisionAdamW([nn.Parameter(torch.zeros(1))], moments="fp8"), "one of float32, .* got 'fp8'"),
        (lambda: LowPrecisionAdamW([nn.Parameter(torch.zeros(2).double())]), r"got torch.float64 \(2,\). Use torch"),
    ],
)
def test_optimizer_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_state_of_other_moments_is_refused():
    parameters = make_parameters()
    optimizer = LowPrecisionAdamW(parameters, moments="bfloat16")
    stepped(optimizer, parameters, 1)
    other = LowPrecisionAdamW(make_parameters(), moments="int8")
    with pytest.raises(ValueError, match=r"of parameter 0 with moments in int8: .* got .*bfloat16.*. Load one saved"):
        other.load_state_dict(optimizer.state_dict())


def test_config_chooses_the_optimizer():
    logits = {"a": nn.Parameter(torch.zeros(4, 6)), "b": nn.Parameter(torch.zeros(2, 2))}
    torch_own = make_optimizer(logits, config(weight_decay=0.3))
    assert type(torch_own) is torch.optim.AdamW and torch_own.param_groups[0]["fused"]
    assert torch_own.param_groups[0]["weight_decay"] == 0.3
    double = {"a": nn.Parameter(torch.zeros(4, 6).double())}
    assert type(make_optimizer(double, config())) is torch.optim.AdamW
    own = make_optimizer(logits, config(moments="int8", seed=9))
    assert (own.moments, own.seed, own.param_groups[0]["lr"]) == ("int8", 9, 0.01)
    half = {"a": nn.Parameter(torch.zeros(4, 6).bfloat16())}
    assert make_optimizer(half, config(logits_dtype="bfloat16")).moments == "float32"


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.AdamW(p, fused=False),
        lambda p: LowPrecisionAdamW(p, moments="float32"),
    ],
)
@pytest.mark.parametrize("factor", [0.25, 1.0])
def test_scaling_in_the_optimizer_is_scaling_before_it(make, factor):
    """Powers of two, so that both give the same bits. A factor holds for one step: every third step has none."""
    results = []
    for inside in (True, False):
        parameters = [nn.Parameter(torch.ones(33)), nn.Parameter(torch.zeros(4, 6))]
        optimizer = make(parameters)
        for step in range(6):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)) + 1
            scale = torch.tensor((factor, 2 * factor, 1.0)[step % 3])
            if not inside:
                for parameter in parameters:
                    parameter.grad.mul_(scale)
            elif step % 3 < 2:
                scale_gradients(optimizer, scale)
            optimizer.step()
        results.append(parameters)
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_bfloat16_logits_start_as_the_float32_ones_rounded(tiny_model):
    linear = next(iter(maskable_linears(tiny_model()).values()))
    keep = torch.tensor([True, True, False, False]).repeat(linear.out_features, linear.in_features // 4)
    pattern, tile = initial_logits(linear, 0, config(logits_dtype="bfloat16"), keep, None)
    expected, same_tile = initial_logits(linear, 0, config(), keep, None)
    assert torch.equal(pattern, expected.bfloat16()) and torch.equal(tile, same_tile)


def test_float64_models_are_refused_before_any_work(tiny_model):
    for setting in ("moments", "logits_dtype"):
        with pytest.raises(ValueError, match=f"{setting}: expected float32 for the float64 weights of .* got bfloat16"):
            learn(tiny_model(dtype=torch.float64), BLOCKS, config(**{setting: "bfloat16"}))


@pytest.mark.parametrize(("setting", "value"), [("moments", "int4"), ("logits_dtype", "float16")])
def test_config_refuses_other_names(setting, value):
    with pytest.raises(
        ValueError, match=f"{setting}: expected one of float32, bfloat16.* got '{value}'. (Choices are|Did you mean)"
    ):
        LearnConfig.from_preset("joint", 0.45, **{setting: value})


@pytest.mark.parametrize(
    ("logits_dtype", "moments", "bytes_per_weight"),
    [
        ("float32", "bfloat16", 12.0),
        ("float32", "int8", 9.1),
        ("bfloat16", "float32", 15.0),
        ("bfloat16", "bfloat16", 9.0),
        ("bfloat16", "int8", 6.1),
    ],
)
def test_learning_resumes_bit_for_bit_within_the_memory(tiny_model, tmp_path, logits_dtype, moments, bytes_per_weight):
    settings = config(moments=moments, logits_dtype=logits_dtype, save_steps=2, max_grad_norm=0.1)
    learn(tiny_model(), BLOCKS, settings, output_dir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        learn(tiny_model(), BLOCKS, settings, output_dir=tmp_path / "parts", callbacks=[StopAt(5)])
    learn(tiny_model(), BLOCKS, settings, output_dir=tmp_path / "parts", resume=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert_same_bits(final_logits(whole), final_logits(parts))
    assert metrics_without_speed(whole) == metrics_without_speed(parts)
    states = [load_file(folder / "checkpoint-7" / "optimizer.safetensors") for folder in (whole, parts)]
    assert_same_bits(*states)
    weights = sum(linear.weight.numel() for linear in maskable_linears(tiny_model()).values())
    tensors = [*states[0].values(), *final_logits(whole).values()]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert held <= bytes_per_weight * weights + 16 * weights // (32 * 32) + 4 * len(tensors)
    # Rounding costs little: the run is close to that in fp32.
    learn(tiny_model(), BLOCKS, config(save_steps=2, max_grad_norm=0.1), output_dir=tmp_path / "fp32")
    bound = 0.15 if moments == "int8" else 0.02
    start = MaskedLayers(tiny_model(), maskable_linears(tiny_model()), settings).parameters()
    for name, value in final_logits(tmp_path / "fp32").items():
        moved, got = value - start[name].detach(), final_logits(whole)[name] - start[name].detach()
        assert (got - moved).norm() <= bound * moved.norm(), name
