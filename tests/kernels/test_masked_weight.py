"""masked_weight: arithmetic, gradients, noise and refusals, against the plain PyTorch reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.masked_weight import MODES, NOISE, make_case, run

from patch_kernels import (
    MaskSampling,
    _host,
    mask_sampling,
    masked_linear,
    masked_weight,
    pack_keep,
    reference,
)


def assert_matches(case, relative, **kwargs):
    grad = torch.randn(case[0].shape, generator=torch.Generator().manual_seed(99)).to(case[0].dtype)
    names = ("masked", "sums", "pattern gradient", "tile gradient")
    results = run(masked_weight, case, grad, **kwargs), run(reference.masked_weight, case, grad, **kwargs)
    for name, got, expected in zip(names, *results, strict=True):
        if expected is None:
            assert got is None
            continue
        difference = (got.double() - expected.double()).abs().max()
        rounding = torch.finfo(got.dtype).eps if name == "masked" else 0
        assert difference <= (relative + rounding) * max(expected.double().abs().max(), 1), name


@pytest.mark.parametrize("noise", [None, NOISE])
@pytest.mark.parametrize("hard", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "tile"), [((128, 128), (128, 128)), ((33, 52), (16, 16)), ((9, 68), (4, 12)), ((130, 260), (64, 128))]
)
def test_equals_reference_in_fp64(shape, tile, mode, hard, noise):
    case = make_case(*shape, tile, mode, torch.float64)
    settings = dict(pattern_temperature=0.7, pattern_scale=2.0, tile_temperature=1.3, tile_scale=3.0)
    assert_matches(case, 1e-12, tile=tile, hard_pattern=hard[0], hard_tile=hard[1], noise=noise, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_equals_reference_in_working_precision(mode, dtype):
    case = make_case(130, 260, (64, 128), mode, dtype)
    assert_matches(case, 4e-6, tile=(64, 128), pattern_scale=2.0, tile_scale=3.0, noise=NOISE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hard", [False, True])
def test_bfloat16_logits_are_their_values(dtype, hard):
    """The mask is that of the same logits in float32; their gradient is the float32 one, rounded once."""
    weight, pattern, tiles, _ = make_case(130, 260, (64, 128), "joint", dtype)
    short = pattern.bfloat16()
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(99)).to(dtype)
    kwargs = dict(tile=(64, 128), noise=NOISE, pattern_scale=2.0, hard_pattern=hard)
    got = run(masked_weight, (weight, short, tiles, None), grad, **kwargs)
    expected = run(masked_weight, (weight, short.float(), tiles, None), grad, **kwargs)
    assert got[2].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(got[:2] + got[3:], expected[:2] + expected[3:], strict=True))
    assert torch.equal(got[2], expected[2].bfloat16())


@pytest.mark.parametrize(("mode", "hard", "noise"), itertools.product(MODES, (False,), (None, NOISE)))
@pytest.mark.parametrize("tile", [(4, 4), (3, 8), (16, 16)])
@pytest.mark.parametrize("shape", [(4, 8), (7, 20), (5, 4)])
def test_gradcheck(shape, tile, mode, hard, noise):
    weight, pattern, tiles, fixed = make_case(*shape, tile, mode, torch.float64)
    leaves = [t.requires_grad_() for t in (pattern, tiles) if t is not None]

    def function(*logits):
        logits = list(logits)
        p = logits.pop(0) if pattern is not None else None
        t = logits.pop(0) if tiles is not None else None
        return masked_weight(
            weight, p, t, tile=tile, fixed_pattern=fixed, noise=noise, pattern_temperature=1.5, tile_scale=2.0
        )

    assert torch.autograd.gradcheck(function, leaves)


def philox_python(counter, key):
    """Philox4x32-10 by its definition, on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [product1 >> 32 ^ c[1] ^ k[0], product1 & 0xFFFFFFFF, product0 >> 32 ^ c[3] ^ k[1], product0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known-answer vectors of the Random123 distribution
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert tuple(philox_python(counter, key)) == words
    tensors = [torch.tensor([c], dtype=torch.int64) for c in counter]
    assert tuple(int(w) for w in reference.philox4x32(tensors, key[0] | key[1] << 32)) == words


def test_exponential_variates_are_right_to_the_last_bit_of_u():
    """All 2^21 inputs against float64. Where u is near 1, a log2 with an absolute error of 2^-22 (a GPU's) would lose
    the largest Gumbel values: the series does not."""
    u = (torch.arange(1 << 21, dtype=torch.float64) + 0.5) / (1 << 21)
    exact = -torch.log2(u)
    values = torch.frombuffer(bytearray(_host.exponentials()), dtype=torch.float32).double()
    assert ((values - exact) / exact).abs().max() < 4e-7
    tail = u > 1 - 1 / 32
    assert ((values - exact) / exact)[tail].abs().max() < 2e-7
    gpu_log2 = exact + torch.where(torch.arange(1 << 21) % 2 == 0, 2.0**-22, -(2.0**-22))
    assert ((gpu_log2 - exact) / exact)[tail].abs().max() > 0.3  # what the series is there for
    assert ((gpu_log2 - exact) / exact)[~tail].abs().max() < 1e-5  # and where it is not needed


def test_noise_statistics():
    """10^7 Gumbel draws: mean, variance, tail, independence, within five standard errors; logistic draws."""
    groups = 1_700_000
    gumbel = torch.cat([reference.pattern_noise(1, layer, 3, groups // 10) for layer in range(10)])
    n = gumbel.numel()
    variance = torch.pi**2 / 6
    assert n > 10_000_000
    assert abs(gumbel.mean() - 0.5772156649) < 5 * (variance / n) ** 0.5
    assert abs(gumbel.var() - variance) < 5 * (4.4 * variance**2 / n) ** 0.5  # kurtosis 5.4
    for threshold in (-1.5, 0.0, 3.0, 5.0, 8.0, 12.0):
        share = 1 - math.exp(-math.exp(-threshold))
        assert abs((gumbel > threshold).double().mean() - share) < 5 * (share / n) ** 0.5 + 1e-9
    assert gumbel.max() < 16 and gumbel.min() > -3  # 21 bits: the largest is -ln(2^-22)
    assert abs(torch.corrcoef(gumbel.T) - torch.eye(6)).max() < 5 / groups**0.5
    assert abs((gumbel[1:, 0] * gumbel[:-1, 0]).mean() - gumbel[:, 0].mean() ** 2) < 10 * variance / groups**0.5
    logistic = reference.tile_noise(1, 2, 3, 1000, 300)
    assert abs(logistic.mean()) < 0.02 and abs(logistic.var() - torch.pi**2 / 3) < 0.05


def test_hard_samples_follow_the_softmax():
    """The op's own noise: one logit vector, 65536 groups, frequencies of the six patterns against the law."""
    logits = torch.tensor([0.5, -0.3, 0.0, 1.0, -1.0, 0.2]).repeat(65536, 1)
    mask, _ = masked_weight(torch.ones(512, 512), logits, None, hard_pattern=True, noise=(0, 0, 0))
    codes = (mask.reshape(-1, 4) * torch.tensor([8.0, 4.0, 2.0, 1.0])).sum(1).int()
    counts = torch.stack([(codes == code).sum() for code in (0b1100, 0b1010, 0b1001, 0b0110, 0b0101, 0b0011)])
    expected = torch.softmax(logits[0], 0) * 65536
    assert counts.sum() == 65536
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # chi-squared, 5 degrees of freedom, p = 0.001


def test_noise_is_a_function_of_its_key():
    case = make_case(64, 64, (32, 32), "joint")
    call = lambda noise: masked_weight(*case[:3], tile=(32, 32), noise=noise)[0]  # noqa: E731
    assert torch.equal(call(NOISE), call(NOISE))
    for other in ((6, 7, 9), (5, 8, 9), (5, 7, 10), (5 + (1 << 32), 7, 9), (-5, 7, 9)):
        assert not torch.equal(call(NOISE), call(other))


def test_threads_do_not_change_the_result():
    case = make_case(500, 516, (64, 64), "joint")
    grad = torch.randn(500, 516)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(masked_weight, case, grad, tile=(64, 64), noise=NOISE)
        torch.set_num_threads(4)
        four = run(masked_weight, case, grad, tile=(64, 64), noise=NOISE)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.3, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("scale", [1.0, 100.0, 500.0])
@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16])
def test_no_nan_over_the_schedules(temperature, scale, logits):
    weight, pattern, tiles, _ = make_case(128, 128, (32, 32), "joint", torch.bfloat16)
    kwargs = dict(
        tile=(32, 32), pattern_temperature=temperature, pattern_scale=scale, tile_temperature=temperature,
        tile_scale=scale, noise=NOISE,
    )  # fmt: skip
    grad = torch.ones(128, 128).bfloat16()
    for size in (1.0, 1e-30, 30.0):
        results = run(masked_weight, (weight, (size * pattern).to(logits), size * tiles, None), grad, **kwargs)
        assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize("noise", [None, NOISE])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_backward_sees_the_mask_of_forward(mode, dtype, hard, noise):
    """The masked weight that backward computes again has the bits of the one that forward returned."""
    weight, pattern, tiles, fixed = make_case(130, 260, (64, 128), mode, dtype)
    sampling = mask_sampling(pattern_scale=2.0, noise=None if noise is None else (noise[0], noise[2]))
    arguments = (weight, pattern, fixed, tiles, *sampling, 64, 128, hard, hard, 7)
    ops = torch.ops.patch_kernels
    masked, _ = ops.masked_weight(*arguments)
    grads = torch.randn_like(weight), torch.ones(2, dtype=torch.float64)
    again = ops.masked_weight_backward(*grads, *arguments, True)
    assert torch.equal(again[2], masked)
    without = ops.masked_weight_backward(*grads, *arguments, False)
    assert without[2].numel() == 0
    assert torch.equal(again[0], without[0]) and torch.equal(again[1], without[1])


def test_soft_masks_have_density_one_half_per_group():
    weight, pattern, _, _ = make_case(64, 64, (32, 32), "pattern")
    masked, sums = masked_weight(torch.ones_like(weight), pattern, None, noise=NOISE)
    assert torch.allclose(masked.reshape(-1, 4).sum(1), torch.full((1024,), 2.0), atol=1e-5)
    assert abs(sums[0] - 64 * 32) < 1e-3


def test_dropped_infinity_stays_dropped():
    keep = torch.tensor([[True, True, False, False]])
    weight = torch.tensor([[1.0, 2.0, float("inf"), float("nan")]])
    tiles = torch.tensor([[-1.0]], requires_grad=True)
    masked, sums = masked_weight(weight, None, tiles, tile=(4, 4), hard_tile=True, fixed_pattern=pack_keep(keep))
    assert masked.tolist() == [[1.0, 2.0, 0.0, 0.0]] and sums.tolist() == [2.0, 5.0]
    masked.sum().backward()
    assert tiles.grad.isfinite().all()


def saved_by(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return saved


def test_nothing_of_the_logits_size_is_saved():
    """Backward recomputes: autograd keeps the inputs themselves, no other tensor but the five numbers of the step."""
    case = make_case(64, 64, (16, 16), "joint")
    pattern, tiles = case[1].requires_grad_(), case[2].requires_grad_()
    inputs = {t.data_ptr() for t in (case[0], pattern, tiles)}
    saved = saved_by(lambda: masked_weight(case[0], pattern, tiles, tile=(16, 16), noise=NOISE))
    assert {t.data_ptr() for t in saved if t.numel() > 4} == inputs

    x = torch.randn(5, 64)
    saved = saved_by(lambda: masked_linear(x, case[0], None, pattern, tiles, mask_sampling(), layer=0, tile=(16, 16)))
    assert {t.data_ptr() for t in saved if t.numel() > 4} == inputs | {x.data_ptr()}


def linear_case(mode, dtype=torch.float64):
    weight, pattern, tiles, fixed = make_case(12, 20, (8, 8), mode, dtype)
    for logits in (pattern, tiles):
        if logits is not None:
            logits.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 20, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(12, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    sampling = mask_sampling(pattern_temperature=1.5, tile_scale=2.0, noise=(5, 9))
    return x, weight, bias, pattern, tiles, sampling, dict(layer=7, tile=(8, 8), fixed_pattern=fixed)


@pytest.mark.parametrize("mode", MODES)
def test_masked_linear_gradcheck(mode):
    x, weight, bias, pattern, tiles, sampling, kwargs = linear_case(mode)
    learned = [t for t in (x, bias, pattern, tiles) if t is not None]
    function = lambda *_: masked_linear(x, weight, bias, pattern, tiles, sampling, **kwargs)  # noqa: E731
    assert torch.autograd.gradcheck(function, learned)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("mode", MODES)
def test_masked_linear_is_the_linear_layer_of_the_masked_weight(mode, needs):
    """Same bits forward; gradients of whatever needs one."""
    x, weight, bias, pattern, tiles, sampling, kwargs = linear_case(mode, torch.float32)
    x.requires_grad_(needs[0]), bias.requires_grad_(needs[1])
    leaves = [t for t in (x, bias, pattern, tiles) if t is not None and t.requires_grad]
    results = []
    for fused in (True, False):
        if fused:
            y, sums = masked_linear(x, weight, bias, pattern, tiles, sampling, **kwargs)
        else:
            masked, sums = masked_weight(weight, pattern, tiles, sampling=sampling, **kwargs)
            y = torch.nn.functional.linear(x, masked, bias)
        results.append((y, sums, *torch.autograd.grad(y.square().sum() + sums.sum(), leaves)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_masked_linear_with_one_output_unused():
    x, weight, bias, pattern, tiles, sampling, kwargs = linear_case("joint")
    y, sums = masked_linear(x, weight, bias, pattern, tiles, sampling, **kwargs)
    y.sum().backward(retain_graph=True)
    only_y = pattern.grad.clone()
    pattern.grad = None
    sums.sum().backward()
    assert only_y.abs().sum() > 0 and pattern.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 24), r"x: expected torch.float32 \(..., 20\) like the weight, got torch.float32 \(2, 24\)"),
        (torch.zeros(2, 20).half(), r"got torch.float16 \(2, 20\). Convert x; autocast"),
        (torch.zeros(()), r"got torch.float32 \(\)"),
    ],
)
def test_masked_linear_refuses_other_inputs(x, message):
    _, weight, bias, pattern, tiles, sampling, kwargs = linear_case("joint", torch.float32)
    with pytest.raises(ValueError, match=message):
        masked_linear(x, weight, bias, pattern, tiles, sampling, **kwargs)


def test_masked_linear_refuses_autocast():
    x, weight, bias, pattern, tiles, sampling, kwargs = linear_case("joint", torch.float32)
    message = r"got torch.float32 \(2, 3, 20\) under autocast. Convert x; autocast is not supported"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=message):
        masked_linear(x, weight, bias, pattern, tiles, sampling, **kwargs)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=False):  # another device's is none of its business
        masked_linear(x, weight, bias, pattern, tiles, sampling, **kwargs)


def test_masked_linear_takes_meta_tensors():
    """A device that knows no autocast."""
    on_meta = [None if t is None else t.to("meta") for t in linear_case("joint", torch.float32)[:5]]
    y, _ = masked_linear(*on_meta, mask_sampling(device="meta"), layer=0, tile=(8, 8))
    assert y.shape == (2, 3, 12)


@pytest.mark.parametrize("linear", [False, True])
def test_second_derivatives_are_refused(linear):
    """They would be wrong without a word: to autograd the backward op is a constant."""
    x, weight, bias, pattern, tiles, sampling, kwargs = linear_case("joint")
    if linear:
        y, _ = masked_linear(x, weight, bias, pattern, tiles, sampling, **kwargs)
        wanted = (x, pattern, tiles)
    else:
        y, _ = masked_weight(weight, pattern, tiles, sampling=sampling, **kwargs)
        wanted = (pattern, tiles)
    for gradient in torch.autograd.grad(y.square().sum(), wanted, create_graph=True):
        with pytest.raises(NotImplementedError, match=r"first derivatives only, got .* use patch_kernels.reference"):
            torch.autograd.grad(gradient.sum(), pattern, retain_graph=True)


def op_arguments(mode, shape=(12, 20), tile=(8, 8), dtype=torch.float32, noise=True, hard=False, contiguous=True):
    weight, pattern, tiles, fixed = make_case(*shape, tile, mode, dtype)
    if not contiguous:
        weight, pattern, tiles = (t.T.contiguous().T for t in (weight, pattern, tiles))
    grads = [None if t is None else t.requires_grad_() for t in (pattern, tiles)]
    sampling = mask_sampling(pattern_temperature=0.7, tile_scale=3.0, noise=(1, 3) if noise else None)
    return (weight, grads[0], fixed, grads[1], *sampling, *tile, hard, hard, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        op_arguments("joint"),
        op_arguments("tile"),
        op_arguments("pattern"),
        op_arguments("joint", noise=False),
        op_arguments("joint", hard=True),
        op_arguments("joint", dtype=torch.bfloat16),
        op_arguments("joint", contiguous=False),
        op_arguments("tile", shape=(5, 4)),
        op_arguments("joint", dtype=torch.float64),
    ],
)
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.patch_kernels.masked_weight.default, arguments)
    inputs = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    grads = torch.randn_like(inputs[0]), torch.ones(2, dtype=torch.float64)
    for with_masked in (False, True):
        torch.library.opcheck(torch.ops.patch_kernels.masked_weight_backward.default, (*grads, *inputs, with_masked))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("linear", [False, True])
def test_compiles_once_for_all_steps(backend, linear):
    """Forward and backward in one graph each, whatever temperature and draw are."""
    weight, pattern, tiles, _ = make_case(64, 64, (32, 32), "joint")
    pattern.requires_grad_(), tiles.requires_grad_()
    x = torch.randn(3, 64)

    def step(sampling):
        if linear:
            y, sums = masked_linear(x, weight, None, pattern, tiles, sampling, layer=2, tile=(32, 32))
        else:
            y, sums = masked_weight(weight, pattern, tiles, tile=(32, 32), sampling=sampling, layer=2)
        return y.square().sum() + sums.sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    values = set()
    for draw in range(4):
        sampling = mask_sampling(pattern_temperature=4.0 - draw, tile_temperature=1 + draw, noise=(1, draw))
        results = []
        for function in (compiled, step):
            value = function(sampling)
            results.append((value, *torch.autograd.grad(value, (pattern, tiles))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        values.add(results[0][0].item())
    assert len(values) == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiles_with_plain_numbers():
    """Another graph for other numbers, but the same bits."""
    weight, pattern, tiles, _ = make_case(64, 64, (32, 32), "joint")
    pattern.requires_grad_(), tiles.requires_grad_()

    def step(temperature, scale, draw):
        kwargs = dict(pattern_temperature=temperature, tile_temperature=temperature, tile_scale=scale)
        masked, sums = masked_weight(weight, pattern, tiles, tile=(32, 32), noise=(1, 2, draw), **kwargs)
        return masked.square().sum() + sums.sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for draw in range(4):
        results = []
        for function in (compiled, step):
            value = function(4.0 - draw, 1.5 + draw, draw)
            results.append((value, *torch.autograd.grad(value, (pattern, tiles))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


WEIGHT, PATTERN, TILES, _ = make_case(8, 8, (4, 4), "joint")
FIXED = make_case(8, 8, (4, 4), "tile")[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weight=WEIGHT[0]), r"weight: expected .* \(N, K\), got torch.float32 \(8,\)"),
        (dict(weight=WEIGHT.int()), "got torch.int32"),
        (dict(weight=torch.zeros(8, 6)), "columns of weight: expected a multiple of 4, got 6"),
        (dict(tile=(0, 4)), r"tile \(rows, columns\): expected two integers >= 1, got \(0, 4\)"),
        (dict(tile=(4, 6)), "columns of tile: expected a multiple of 4, got 6"),
        (dict(pattern_logits=None), "expected pattern_logits or fixed_pattern, got neither"),
        (dict(fixed_pattern=FIXED), "expected pattern_logits or fixed_pattern, got both"),
        (
            dict(pattern_logits=PATTERN[:3]),
            r"pattern_logits: expected torch.float32 or torch.bfloat16 \(16, 6\).*got .*\(3, 6\)",
        ),
        (dict(pattern_logits=PATTERN.half()), "pattern_logits: expected torch.float32 .* got torch.float16"),
        (dict(tile_logits=TILES[:1]), r"tile_logits: expected torch.float32 \(2, 2\).*got .*\(1, 2\)"),
        (dict(tile_logits=TILES.to("meta")), "tile_logits: expected .* on cpu, got .* on meta"),
        (dict(tile=128), r"masked_weight, tile \(rows, columns\): expected two integers >= 1, got 128. Use \(128, 128"),
        (dict(noise=(1, 2)), r"masked_weight, noise: expected \(seed, layer, draw\), got \(1, 2\)"),
        (dict(noise=7), r"masked_weight, noise: expected \(seed, layer, draw\), got 7"),
        (dict(noise=(1.5, 0, 0)), "seed of noise: expected an integer, got 1.5"),
        (dict(pattern_temperature="1"), "pattern_temperature: expected a number, got '1'. Schedules"),
        (dict(pattern_temperature=0.0), "pattern_temperature: expected a number > 0, got 0.0"),
        (dict(tile_temperature=float("nan")), "tile_temperature: expected a finite number > 0, got nan"),
        (dict(pattern_scale=float("inf")), "pattern_scale: expected a finite number, got inf"),
        (dict(tile_scale=-float("inf")), "tile_scale: expected a finite number, got -inf"),
        (dict(tile_scale=float("nan")), "tile_scale: expected a finite number, got nan"),
        (dict(layer=3), r"layer with sampling, got layer=3 alone. Pass sampling, or noise="),
        (dict(layer=3, noise=(1, 3, 0)), "got layer=3 alone"),
        (
            dict(sampling=mask_sampling(), tile_scale=2.0, noise=(1, 0, 0)),
            "sampling without the numbers that it holds, got tile_scale, noise too. Pass them to mask_sampling",
        ),
        (dict(sampling=mask_sampling(), pattern_temperature=0.5), "got pattern_temperature too"),
        (dict(sampling=mask_sampling(), pattern_scale=2.0), "got pattern_scale too"),
        (dict(sampling=mask_sampling(), tile_temperature=0.5), "got tile_temperature too"),
        (dict(noise=(1, -1, 0)), "masked_weight, layer: expected .* >= 0 and < 2147483648, got -1"),
        (dict(noise=(1, 0, 1 << 32)), "draw of noise: expected .* >= 0 and < 4294967296, got 4294967296"),
        (dict(noise=(1 << 63, 0, 0)), "seed of noise: .* got 9223372036854775808. It has 64 bits"),
        (dict(sampling=mask_sampling(device="meta")), "sampling.factors: expected .* on cpu, got .* on meta"),
        (dict(sampling=MaskSampling(torch.ones(4), None)), r"sampling.factors: expected torch.float64 \(4,\)"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    call = dict(weight=WEIGHT, pattern_logits=PATTERN, tile_logits=TILES, tile=(4, 4)) | arguments
    with pytest.raises(ValueError, match=message):
        masked_weight(**call)


SAMPLING = mask_sampling(noise=(1, 2))
GOOD = dict(weight=WEIGHT, pattern=PATTERN, fixed=None, tiles=TILES, factors=SAMPLING.factors, key=SAMPLING.key)
GOOD |= dict(rows=4, cols=4, hard_pattern=False, hard_tile=False, layer=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=WEIGHT[0]), r"weight must be \(N, K\)"),
        (dict(fixed=FIXED), "give either pattern_logits or fixed_pattern"),
        (dict(rows=0), "tile must have at least 1 row"),
        (dict(factors=torch.ones(4)), "factors must be four doubles"),
        (dict(factors=torch.ones(3).double()), "factors must be four doubles"),
        (dict(factors=torch.tensor([0.0, 1, 1, 1]).double()), "factors must be finite, with positive temperatures"),
        (dict(factors=torch.tensor([1, torch.inf, 1, 1]).double()), "factors must be finite"),
        (dict(key=torch.ones(3).long()), "key has the wrong dtype or number of elements; expected 2, got 3"),
        (dict(key=torch.ones(2)), "key has the wrong dtype"),
        (dict(pattern=PATTERN[1:]), "pattern_logits has the wrong dtype or number of elements; expected 96, got 90"),
        (dict(tiles=TILES.bfloat16()), "tile_logits has the wrong dtype"),
    ],
)
def test_callers_of_the_bare_op_are_refused(change, message):
    """What Python would have caught; memory is safe without it too."""
    with pytest.raises(RuntimeError, match=message):
        torch.ops.patch_kernels.masked_weight(*(GOOD | change).values())


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ((WEIGHT[:4], torch.ones(2).double()), "grad_masked must be like weight and grad_sums two doubles"),
        ((WEIGHT.double(), torch.ones(2).double()), "grad_masked must be like weight"),
        ((WEIGHT, torch.ones(2)), "grad_sums two doubles"),
    ],
)
def test_bare_backward_refuses_other_gradients(grads, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.patch_kernels.masked_weight_backward(*grads, *GOOD.values(), False)
