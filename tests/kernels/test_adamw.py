"""adamw_step: arithmetic against torch and the reference, stochastic rounding, determinism, refusals."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from support import ROOT
from support.adamw import MOMENT_DTYPES, PARAM_DTYPES, SETTINGS, adamw_state, digest, run_steps, same_bits
from torch import nn

from patch_kernels import adamw_step, reference


@pytest.mark.parametrize("moments", MOMENT_DTYPES)
@pytest.mark.parametrize("dtype", PARAM_DTYPES)
@pytest.mark.parametrize("elems", [0, 1, 7, 255, 256, 257, 3001])
def test_equals_reference_bit_for_bit(elems, dtype, moments):
    got, expected = (run_steps(f, elems, dtype, moments) for f in (adamw_step, reference.adamw_step))
    for name, value in expected.items():
        assert same_bits(got[name], value), name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fp32_equals_torch(weight_decay):
    generator = torch.Generator().manual_seed(1)
    param = nn.Parameter(torch.randn(1000, generator=generator))
    state = {"param": param.detach().clone(), "exp_avg": torch.zeros(1000), "exp_avg_sq": torch.zeros(1000)}
    settings = SETTINGS | {"weight_decay": weight_decay}
    optimizer = torch.optim.AdamW([param], fused=True, **settings)
    for step in range(1, 31):
        param.grad = torch.randn(1000, generator=generator)
        optimizer.step()
        adamw_step(**state, grad=param.grad, step=step, **settings)
    torch.testing.assert_close(state["param"], param.detach(), rtol=1e-6, atol=1e-7)
    for name in ("exp_avg", "exp_avg_sq"):  # sums of gradients of size 1, which cancel
        torch.testing.assert_close(state[name], optimizer.state[param][name], rtol=1e-6, atol=1e-7)


def test_strided_gradient_and_any_shape():
    grad = torch.randn(6, 5).T
    states = [adamw_state(30, torch.float32, torch.bfloat16, torch.Generator().manual_seed(2)) for _ in range(2)]
    states[0] = {name: value.reshape(5, 6) for name, value in states[0].items()}
    adamw_step(**states[0], grad=grad, step=1, **SETTINGS)
    adamw_step(**states[1], grad=grad.flatten(), step=1, **SETTINGS)
    assert all(same_bits(states[0][name].flatten(), value) for name, value in states[1].items())


def rounded(values, step=1, moments=torch.bfloat16):
    """First moment after a step with beta1 = 0, that is fp32 values rounded by the op."""
    state = adamw_state(values.numel(), torch.float32, moments, torch.Generator())
    settings = SETTINGS | {"betas": (0.0, 0.95), "lr": 0.0}
    adamw_step(**state, grad=values, step=step, **settings)
    if moments == torch.uint8:
        return reference.decode_moment(state["exp_avg"], state["exp_avg_scale"], signed=True)
    return state["exp_avg"]


def test_every_bfloat16_value_stays_exact():
    """Infinities too; NaN stays NaN."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    got = rounded(every.float())
    assert torch.equal(got.isnan(), every.isnan())
    assert torch.equal(got[~every.isnan()], every[~every.isnan()])


def test_rounds_to_a_neighbour_and_never_to_infinity():
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=torch.Generator().manual_seed(3))
    edges = torch.tensor([0x7F7FFFFF, 0x7F7F0001, -0x00800001, 0x00000001, 0x007FFFFF, 0x7F800001])
    values = torch.cat([bits, edges]).to(torch.int32).view(torch.float32)
    got = rounded(values)
    assert torch.equal(got.isnan(), values.isnan())
    finite = values.isfinite()
    down = (values.view(torch.int32) & -(1 << 16))[finite]  # towards zero
    steps = (got.float().view(torch.int32)[finite] - down) >> 16
    zero = (got == 0)[finite]  # the sign of a zero is free: 0 + (g - 0) * 1
    assert ((steps == 0) | (steps == 1) | (zero & (down & 0x7FFFFFFF == 0))).all()
    assert got[finite].isfinite().all()


def test_rounding_up_has_exactly_the_probability_of_the_fraction():
    """All 65536 random values, for fractions of every size, both signs, a carry into the exponent, subnormals."""
    random = torch.arange(1 << 16)
    for base in (0x3F800000, 0x3FFF0000, 0x00010000, 0x42290000):
        for fraction in (0, 1, 2, 255, 0x7FFF, 0x8000, 0xFFFF):
            value = torch.tensor([base + fraction], dtype=torch.int32).view(torch.float32)
            for signed in (value, -value):
                got = reference.round_to_bfloat16(signed.expand(1 << 16).contiguous(), random).float()
                assert (got.abs() > base_value(base)).sum() == fraction
                assert torch.equal(got.signbit(), signed.signbit().expand(1 << 16))


def base_value(bits):
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.uint8])
def test_rounding_is_unbiased(moments):
    """The op's own random bits: mean of 2^16 roundings of each of 16 values, within 5 standard deviations."""
    values = torch.cat([torch.linspace(1.0, 1.99, 12), torch.tensor([0.0423, -1.7, 3e-5, -2e-5])])
    got = rounded(values.repeat(1 << 16), moments=moments).float().double().reshape(-1, 16)
    deviation = got.std(0) / 2**8
    assert ((got.mean(0) - values.double()).abs() <= 5 * deviation).all()
    for value, column in zip(values, got.T, strict=True):
        low, high = column.min(), column.max()
        assert low <= value <= high and column.unique().numel() <= 2


def test_rounding_bits_are_random_and_apart():
    """Bits of steps, streams and tensors are uniform and do not correlate, nor with the noise of a mask."""
    keys = [(1, 0, 1, 1), (1, 0, 1, 2), (1, 0, 2, 1), (1, 1, 1, 1), (2, 0, 1, 1)]
    streams = torch.stack([reference.rounding_bits(*key, 1 << 16).double() for key in keys]) / 65536
    assert (streams.mean(1) - 0.5).abs().max() < 0.006 and (streams.var(1) - 1 / 12).abs().max() < 0.002
    assert (torch.corrcoef(streams) - torch.eye(5)).abs().max() < 0.02
    neighbours = torch.stack([streams[0, :-1], streams[0, 1:]])
    assert torch.corrcoef(neighbours)[0, 1].abs() < 0.02
    noise = reference.pattern_noise(1, 5, 1, 8192)[:, 0]  # the same key, counter words 2 and 3 equal
    draws = streams[0].reshape(-1, 8)[:, 1]
    assert torch.corrcoef(torch.stack([draws, noise]))[0, 1].abs() < 0.06


def test_the_second_moment_takes_the_bits_of_its_neighbours_first():
    """One Philox call for both moments; the two of one element are independent."""
    for elems in (1, 7, 8, 4096):
        first, second = (reference.rounding_bits(5, 2, 3, what, elems + 1) for what in (1, 2))
        swapped = torch.arange(elems) ^ 1
        assert torch.equal(second[:elems], first[swapped])
    both = torch.stack([first.double(), second.double()])
    assert torch.corrcoef(both)[0, 1].abs() < 0.06


def test_values_of_every_size_equal_the_reference():
    """Zeros of both signs, subnormals and values up to overflow; in whole lanes of eight, and mixed."""
    generator = torch.Generator().manual_seed(8)
    for dtype in PARAM_DTYPES:
        for moments in MOMENT_DTYPES:
            state = adamw_state(4099, dtype, moments, generator)
            size = 2.0 ** torch.randint(-149, 60, (4099,), generator=generator)
            state["param"].copy_(state["param"].double() * size * torch.randint(0, 2, (4099,), generator=generator))
            expected = {name: value.clone() for name, value in state.items()}
            for step in range(1, 4):
                grad = torch.randn(4099, generator=generator) * 2.0 ** torch.randint(
                    -149, 50, (4099,), generator=generator
                )
                grad[torch.arange(4099) // 8 % 3 == step % 3] = -0.0
                for function, target in ((adamw_step, state), (reference.adamw_step, expected)):
                    function(**target, grad=grad.to(dtype), step=step, seed=1, stream=2, **SETTINGS | {"lr": 1e-2})
            for name, value in expected.items():
                assert same_bits(state[name], value), (dtype, moments, name)


def test_without_eps_a_zero_gradient_moves_nothing():
    """The root is of at least 2^-100, so no 0 / 0."""
    state = adamw_state(300, torch.float32, torch.float32, torch.Generator().manual_seed(0))
    before = state["param"].clone()
    adamw_step(**state, grad=torch.zeros(300), step=1, **SETTINGS | {"eps": 0.0, "weight_decay": 0.0})
    assert torch.equal(state["param"], before)


def test_every_code_is_exact_and_orders_as_its_value():
    scale = torch.tensor([0.25])
    codes = torch.arange(256, dtype=torch.uint8)
    for signed, top in ((True, 0x78), (False, 0xF8)):
        values = reference.decode_moment(codes, scale, signed)
        assert torch.equal(values[:128].sort().values, values[:128])
        usable = codes[(codes & 0x7F if signed else codes) < top]  # below twice the scale
        block = torch.cat([values[usable.long()], torch.full((256 - len(usable),), 0.25)])
        for random in (0, 0x8000, 0xFFFF):
            again, scales = reference.encode_moment(block, torch.full((256,), random), signed)
            assert torch.equal(again[: len(usable)], usable) and torch.equal(scales, scale)


def test_a_positive_second_moment_never_becomes_zero():
    grad = torch.full((512,), 1e-12)
    grad[0] = 1.0
    state = adamw_state(512, torch.float32, torch.uint8, torch.Generator())
    for step in range(1, 20):
        adamw_step(**state, grad=grad, step=step, **SETTINGS)
        assert (state["exp_avg_sq"] > 0).all()
    adamw_step(**state, grad=torch.zeros(512), step=20, **SETTINGS)
    assert (state["exp_avg_sq"] > 0).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_not_finite_gradient_makes_its_block_of_codes_nan(value):
    grad = torch.ones(512)
    grad[3] = value
    state = adamw_state(512, torch.float32, torch.uint8, torch.Generator())
    adamw_step(**state, grad=grad, step=1, **SETTINGS)
    for name in ("exp_avg", "exp_avg_sq"):
        decoded = reference.decode_moment(state[name], state[f"{name}_scale"], name == "exp_avg")
        assert decoded[:256].isnan().all() and decoded[256:].isfinite().all()


def test_extreme_magnitudes_of_codes():
    """Scales at both ends of fp32: nothing overflows, and the second moment is never too small."""
    for value in (1e-45, 1e-39, 1e-30, 3e38):
        got = rounded(torch.full((256,), value), moments=torch.uint8)
        assert ((got - value).abs() <= max(0.125 * value, 2.0**-142)).all(), value


@pytest.mark.parametrize("moments", MOMENT_DTYPES)
@pytest.mark.parametrize("dtype", PARAM_DTYPES)
def test_threads_do_not_change_the_result(dtype, moments):
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 4):
            torch.set_num_threads(number)
            results.append(run_steps(adamw_step, 20_011, dtype, moments, steps=2))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_every_instruction_set_gives_the_same_bits(isa):
    paths = [str(ROOT), str(ROOT / "tests")]
    script = f"import sys; sys.path[:0] = {paths!r}; from support import adamw as t; print(t.digest())"
    environment = dict(os.environ, PATCH_KERNELS_CPU_ISA=isa)
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [digest()]


@pytest.mark.parametrize("moments", MOMENT_DTYPES)
@pytest.mark.parametrize("dtype", PARAM_DTYPES)
def test_opcheck(dtype, moments):
    state = adamw_state(300, dtype, moments, torch.Generator().manual_seed(0))
    names = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
    tensors = (state["param"], torch.ones(300, dtype=dtype), *(state.get(name) for name in names), torch.ones(1))
    torch.library.opcheck(torch.ops.patch_kernels.adamw_step.default, (*tensors, 0.1, 0.9, 0.95, 1e-8, 0.1, 1, 0, 0))


def test_a_graph_with_the_old_parameter_says_so():
    param = torch.ones(8, requires_grad=True)
    loss = param.square().sum()
    state = {"param": param, "exp_avg": torch.zeros(8), "exp_avg_sq": torch.zeros(8)}
    with torch.no_grad():
        adamw_step(**state, grad=torch.ones(8), step=1, **SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def bad_call(**changes):
    state = adamw_state(300, torch.float32, changes.pop("moments", torch.bfloat16), torch.Generator())
    adamw_step(**(state | {"grad": torch.zeros(300), "step": 1} | SETTINGS | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(param=torch.zeros(300).half()),
            r"step, param: expected contiguous torch.float32 or torch.bfloat16, got torch.float16 \(300,\)",
        ),
        (dict(param=torch.zeros(600)[::2]), r"param: expected contiguous .*, got .*strides \(2,\)"),
        (dict(exp_avg=torch.zeros(300).int()), "exp_avg: expected .* or torch.uint8, got torch.int32"),
        (dict(grad=torch.zeros(299)), r"grad: expected torch.float32 \(300,\) .* got torch.float32 \(299,\)"),
        (dict(grad=torch.zeros(300).bfloat16()), "grad: expected torch.float32 .* got torch.bfloat16"),
        (dict(grad=torch.zeros(300, device="meta")), r"grad: expected .* on cpu, got .* on meta. As param"),
        (
            dict(exp_avg=torch.zeros(299).bfloat16()),
            r"exp_avg: expected contiguous torch.bfloat16 .*\(300,\).* got .*\(299,\)",
        ),
        (dict(exp_avg_sq=torch.zeros(300)), r"exp_avg_sq: expected contiguous torch.bfloat16 .* got torch.float32"),
        (
            dict(exp_avg_sq=torch.zeros(600).bfloat16()[::2]),
            r"exp_avg_sq: expected contiguous .* got .* strides \(2,\)",
        ),
        (
            dict(exp_avg_scale=torch.zeros(2)),
            r"exp_avg_scale: expected None .* got torch.float32 \(2,\). Scales belong",
        ),
        (
            dict(moments=torch.uint8, exp_avg_scale=None),
            r"exp_avg_scale: expected contiguous torch.float32 .*\(2,\) .* got NoneType",
        ),
        (
            dict(moments=torch.uint8, exp_avg_sq_scale=torch.zeros(1)),
            r"exp_avg_sq_scale: expected .*\(2,\).*got .*\(1,\)",
        ),
        (dict(grad_scale=torch.ones(2)), r"grad_scale: expected torch.float32 \(1,\) .* got torch.float32 \(2,\)"),
        (dict(step=0), "step, step: expected a number >= 1 and < 4294967296, got 0. Count steps from 1"),
        (dict(seed=1 << 63), "seed: expected .* got 9223372036854775808. It has 64 bits"),
        (dict(stream=1 << 30), "stream: expected .* >= 0 and < 1073741824, got 1073741824"),
        (dict(lr="1"), r"adamw_step, lr: expected a number, got '1'. Usual are"),
        (dict(lr=None), r"adamw_step, lr: expected a number, got None. Usual are"),
        (dict(step=1.0), "adamw_step, step: expected an integer, got 1.0. Count steps from 1"),
        (dict(seed=0.5), "adamw_step, seed: expected an integer, got 0.5"),
        (dict(betas=0.9), r"adamw_step, betas: expected \(beta1, beta2\), got 0.9. Usual are \(0.9, 0.95\)"),
        (dict(betas=(0.9,)), r"adamw_step, betas: expected \(beta1, beta2\), got \(0.9,\)"),
        (dict(lr=-1.0), r"lr: expected a number >= 0, got -1.0"),
        (dict(betas=(0.9, 1.0)), "betas: expected a number >= 0 and < 1, got 1.0"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        bad_call(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(param=torch.zeros(8).half()), "param must be contiguous float32 or bfloat16"),
        (dict(grad=torch.zeros(7)), "grad must have param's dtype and shape"),
        (dict(exp_avg_sq=torch.zeros(8).bfloat16()), "moments must be contiguous, of one dtype and of param's shape"),
        (dict(exp_avg=torch.zeros(8).half(), exp_avg_sq=torch.zeros(8).half()), "moments must be float32, bfloat16 or"),
        (dict(exp_avg_scale=torch.zeros(1)), "scales belong to uint8 moments"),
        (dict(grad_scale=torch.ones(2)), "grad_scale must be one float32 value"),
        (
            dict(
                exp_avg=torch.zeros(8).byte(),
                exp_avg_sq=torch.zeros(8).byte(),
                exp_avg_scale=torch.zeros(2),
                exp_avg_sq_scale=torch.zeros(1),
            ),
            "scales must be contiguous float32, one per 256 values",
        ),
    ],
)
def test_callers_of_the_bare_op_are_refused(change, message):
    """What Python would have caught; memory is safe without it too."""
    tensors = {name: torch.zeros(8) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    tensors |= {"exp_avg_scale": None, "exp_avg_sq_scale": None, "grad_scale": None}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.patch_kernels.adamw_step(*(tensors | change).values(), 0.1, 0.9, 0.95, 1e-8, 0.0, 1, 0, 0)
