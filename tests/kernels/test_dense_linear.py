"""dense_linear and StreamedLinear: exact on integers, within the two-times rule, and nn.Linear in everything else."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from patch_kernels import StreamedLinear, dense_linear

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 7, 8, 9, 20])
@pytest.mark.parametrize("shape", [(1, 1), (33, 31), (130, 777), (65, 2048)])
def test_integers_are_exact(shape, tokens, dtype):
    generator = torch.Generator().manual_seed(tokens)
    weight, x = (torch.randint(-2, 3, (n, shape[1]), generator=generator).to(dtype) for n in (shape[0], tokens))
    bias = torch.randint(-2, 3, shape[:1], generator=generator).to(dtype)
    for given in (bias, None):
        expected = x.double() @ weight.double().T + (0 if given is None else given.double())
        assert torch.equal(dense_linear(x, weight, given), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_data_two_times_rule(dtype):
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 1000, generator=generator).to(dtype) for n in (700, 8))
    exact = x.double() @ weight.double().T
    whole = dense_linear(x, weight)
    assert (whole.double() - exact).abs().max() <= 2 * (F.linear(x, weight).double() - exact).abs().max()
    for i in range(8):
        assert torch.equal(dense_linear(x[i], weight), whole[i])
    assert torch.equal(dense_linear(x.T.contiguous().T, weight), whole)
    assert torch.equal(dense_linear(x.reshape(2, 4, 1000), weight).reshape(8, 700), whole)
    bias = torch.randn(1400, generator=generator).to(dtype)[::2]
    assert torch.equal(dense_linear(x, weight, bias), dense_linear(x, weight, bias.contiguous()))


def test_opcheck():
    x, weight = torch.randn(3, 40).bfloat16(), torch.randn(50, 40).bfloat16()
    for sample in ((x, weight, None), (x[0], weight, weight[:, 0].contiguous()), (x, weight.T.contiguous().T, None)):
        torch.library.opcheck(torch.ops.patch_kernels.dense_linear.default, sample)


def test_streamed_linear_is_the_same_module():
    linear = torch.nn.Linear(40, 50, dtype=torch.bfloat16)
    parameters, state = dict(linear.named_parameters()), copy.deepcopy(linear.state_dict())
    seen = []
    linear.register_forward_hook(lambda *a: seen.append(1))
    x = torch.randn(2, 3, 40).bfloat16()
    with torch.no_grad():
        before = linear(x)
        StreamedLinear.of_linear(linear)
        assert torch.allclose(linear(x), before, atol=0.02) and torch.equal(linear(x), copy.deepcopy(linear)(x))
    assert len(seen) >= 3 and isinstance(linear, torch.nn.Linear)
    assert all(linear.get_parameter(name) is value for name, value in parameters.items())
    assert state.keys() == linear.state_dict().keys()
    linear(x).sum().backward()  # gradients are nn.Linear's
    assert linear.weight.grad is not None
    assert linear.float()(x.float()).dtype == torch.float32
    StreamedLinear.to_linear(linear)
    assert type(linear) is torch.nn.Linear


def test_streamed_linear_leaves_what_it_cannot_do_to_torch():
    linear = torch.nn.Linear(40, 50, dtype=torch.bfloat16).requires_grad_(False)
    StreamedLinear.of_linear(linear)
    with pytest.raises(RuntimeError):
        linear(torch.randn(2, 41).bfloat16())
    with torch.autocast("cpu"):
        assert linear(torch.randn(2, 40)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert linear(torch.randn(2, 40).bfloat16()).dtype == torch.float16
    x = torch.ones(2, 40).bfloat16()
    assert torch.func.jvp(linear, (x,), (x,))[1].abs().sum() > 0
    linear.bias.requires_grad_()
    linear(x).sum().backward()
    assert torch.equal(linear.bias.grad, torch.full_like(linear.bias, 2))
    with pytest.raises(ValueError, match=r"expected an nn\.Linear, got Conv1d. Leave it"):
        StreamedLinear.of_linear(torch.nn.Conv1d(1, 1, 1))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 40).bfloat16()
    with torch.no_grad():
        assert torch.equal(compiled(x), linear(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: dense_linear(x.float(), w), r"x: expected torch.float16 or torch.bfloat16 .*, got torch.float32"),
        (lambda x, w: dense_linear(None, w), "x: expected .*, got NoneType. Convert it"),
        (lambda x, w: dense_linear(x[0, 0], w), r"x: expected .* \(\.\.\., K\), got torch.bfloat16 \(\)"),
        (lambda x, w: dense_linear(x, w[:, :4]), r"weight: expected torch.bfloat16 \(N, 8\) on cpu, got .*\(6, 4\)"),
        (lambda x, w: dense_linear(x, w.half()), r"weight: expected torch.bfloat16 .*, got torch.float16"),
        (lambda x, w: dense_linear(x, w, w[0]), r"bias: expected torch.bfloat16 \(6,\) on cpu, got .*\(8,\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 8).bfloat16(), torch.zeros(6, 8).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x.float(), w, b), "x must be"),
        (lambda x, w, b: (x, w[0], b), "weight must be"),
        (lambda x, w, b: (x, w, b[:3]), "bias must be"),
    ],
)
def test_the_op_itself_keeps_memory_safe(change, message):
    arguments = change(torch.zeros(2, 8).bfloat16(), torch.zeros(6, 8).bfloat16(), torch.zeros(6).bfloat16())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.patch_kernels.dense_linear(*arguments)
