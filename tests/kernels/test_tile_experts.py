"""tile_experts: exact on integers, the bits of tile_linear, gradients, tracing, refusing bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.experts_case import experts_case, real_numbers, some_experts, whole_numbers
from torch._dynamo.testing import CompileCounterWithBackend

from patch_kernels import by_torch, reference, tile_experts
from patch_kernels.ops import tile_experts as experts_op
from patch_kernels.ops import tile_linear

DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shape", [(130, 260), (256, 128), (1, 5)])
def test_integers_are_exact(shape, parts, dtype):
    case = experts_case(6, parts, shape, dtype)
    for tokens in (0, 1, 3, 70):
        for fan in (1, 2, 8):
            x = whole_numbers(torch.Generator().manual_seed(tokens), dtype, tokens, shape[1])
            experts = some_experts(tokens * fan, 6, fan)
            assert torch.equal(case.packed(x, experts), reference.tile_experts(x, experts, case.dense, case.bias))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    experts=st.integers(1, 5),
    parts=st.integers(1, 3),
    tokens=st.integers(0, 40),
    fan=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_mixture_is_exact(shape, experts, parts, tokens, fan, dtype, with_bias, seed):
    case = experts_case(experts, parts, shape, dtype, with_bias, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = whole_numbers(generator, dtype, tokens, shape[1])
    chosen = torch.randint(0, experts, (tokens * fan,), generator=generator)
    assert torch.equal(case.packed(x, chosen), reference.tile_experts(x, chosen, case.dense, case.bias))


def one_by_one(case, x, experts, batch_invariant=False):
    """By tile_linear, of every expert's rows together."""
    packed = case.packed
    y = x.new_empty(len(experts), packed.parts * packed.out_features)
    for expert in range(packed.experts):
        at = (experts == expert).nonzero()[:, 0]
        rows = x[at * len(x) // len(experts)]
        for part in range(packed.parts):
            columns = slice(part * packed.out_features, (part + 1) * packed.out_features)
            bias = None if case.bias is None else case.bias[expert, columns]
            weight = packed.tiled_weight(expert, part)
            y[at, columns] = weight.matmul(rows, bias, batch_invariant=batch_invariant)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_the_bits_of_tile_linear_for_any_number_of_threads(batch_invariant, dtype):
    case = experts_case(5, 2, (200, 300), dtype, numbers=real_numbers)
    case.packed.batch_invariant = batch_invariant
    before = torch.get_num_threads()
    try:
        for tokens in (1, 2, 9, 40, 150):
            x = torch.randn(tokens, 300).to(dtype)
            experts = some_experts(2 * tokens, 5, tokens)
            expected = one_by_one(case, x, experts, batch_invariant)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                assert torch.equal(case.packed(x, experts), expected)
    finally:
        torch.set_num_threads(before)


def test_all_tokens_to_one_expert_and_one_expert_several_times():
    case = experts_case(4, 2, (130, 132))
    x = whole_numbers(torch.Generator().manual_seed(1), torch.bfloat16, 20, 132)
    for experts in (torch.full((20,), 2), torch.full((60,), 3), torch.tensor([0, 0, 3, 3, 3, 0] * 10)):
        y = case.packed(x, experts)
        assert torch.equal(y, reference.tile_experts(x, experts, case.dense, case.bias))


def test_strides():
    case = experts_case(4, 2, (130, 132))
    x = whole_numbers(torch.Generator().manual_seed(1), torch.bfloat16, 6, 132)
    experts = some_experts(12, 4, 1)
    expected = case.packed(x, experts)
    wide = torch.zeros(6, 264, dtype=torch.bfloat16)
    wide[:, ::2] = x
    for other in (x.T.contiguous().T, wide[:, ::2]):
        assert not other.is_contiguous() and torch.equal(case.packed(other, experts), expected)
    assert torch.equal(case.packed(x, experts.repeat_interleave(2)[::2]), expected)
    case.packed.bias = torch.nn.Parameter(case.bias.T.contiguous().T, requires_grad=False)
    assert torch.equal(case.packed(x, experts), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40, 400])
def test_real_data_two_times_rule(tokens, dtype):
    case = experts_case(3, 2, (256, 1000), dtype, numbers=real_numbers)
    x = torch.randn(tokens, 1000, generator=torch.Generator().manual_seed(2)).to(dtype)
    experts = some_experts(2 * tokens, 3, 5)
    y = case.packed(x, experts)
    rows, weights, bias = x.repeat_interleave(2, 0), case.dense, case.bias
    error, of_torch = 0.0, 0.0
    for expert in experts.unique().tolist():
        at = experts == expert
        exact = rows[at].double() @ weights[expert].double().T + bias[expert].double()
        plain = F.linear(rows[at], weights[expert], bias[expert])
        error = max(error, float((y[at].double() - exact).abs().max()))
        of_torch = max(of_torch, float((plain.double() - exact).abs().max()))
    assert error <= 2 * of_torch


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("fan", [1, 3])
def test_gradients_reach_x_and_bias(tokens, fan):
    case = experts_case(5, 2, (130, 132), with_bias=True)
    generator = torch.Generator().manual_seed(3)
    x = whole_numbers(generator, torch.bfloat16, tokens, 132)
    experts = some_experts(tokens * fan, 5, 7)
    grad = torch.randint(-1, 2, (tokens * fan, 260), generator=generator).bfloat16()
    ours, bias = x.clone().requires_grad_(), case.bias.clone().requires_grad_()
    case.packed.bias = torch.nn.Parameter(bias.detach())
    case.packed(ours, experts).backward(grad)
    exact, exact_bias = x.double().requires_grad_(), case.bias.double().requires_grad_()
    rows = exact.repeat_interleave(fan, 0)
    y = (rows[:, None] @ case.dense.double()[experts].mT)[:, 0] + exact_bias[experts]
    y.backward(grad.double())
    assert torch.equal(ours.grad, exact.grad.bfloat16())
    assert torch.equal(case.packed.bias.grad, exact_bias.grad.bfloat16())
    if tokens:
        only_bias = case.packed(x, experts)
        only_bias.backward(grad)
        assert torch.equal(case.packed.bias.grad, (2 * exact_bias.grad).bfloat16())


def test_gradients_of_real_data_two_times_rule():
    case = experts_case(4, 1, (300, 400), numbers=real_numbers, with_bias=False)
    generator = torch.Generator().manual_seed(4)
    x, grad = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((50, 400), (100, 300)))
    experts = some_experts(100, 4, 6)

    def by_rows(a, experts):
        dense = case.dense.to(a.dtype)
        return torch.stack([F.linear(a[p // 2], dense[expert]) for p, expert in enumerate(experts.tolist())])

    grads = []
    for dtype, function in ((torch.bfloat16, case.packed), (torch.bfloat16, by_rows), (torch.float64, by_rows)):
        a = x.to(dtype).clone().requires_grad_()
        function(a, experts).backward(grad.to(dtype))
        grads.append(a.grad.double())
    ours, of_torch, exact = grads
    assert (ours - exact).abs().max() <= 2 * (of_torch - exact).abs().max()


def samples():
    case = experts_case(4, 2, (130, 132))
    without = experts_case(3, 1, (64, 260), torch.float16, with_bias=False)
    for rows, fan in ((6, 2), (0, 1), (1, 8)):
        x = whole_numbers(torch.Generator().manual_seed(rows), torch.bfloat16, rows, 132)
        yield case.op_arguments(x, some_experts(rows * fan, 4, rows))
    x = whole_numbers(torch.Generator().manual_seed(1), torch.float16, 5, 260)
    yield without.op_arguments(x.T.contiguous().T, some_experts(5, 3, 1), True)


@pytest.mark.parametrize("index", range(4))
def test_opcheck(index):
    x, *rest = list(samples())[index]
    torch.library.opcheck(torch.ops.patch_kernels.tile_experts.default, (x, *rest))
    train = torch.ops.patch_kernels.tile_experts_train.default
    torch.library.opcheck(train, (x, *rest))
    torch.library.opcheck(train, (x.clone().requires_grad_(), *rest))
    if rest[7] is not None:
        rest[7] = rest[7].clone().requires_grad_()
        torch.library.opcheck(train, (x.clone().requires_grad_(), *rest))
    experts, payload, flags, _, _, out_features, parts, *_ = rest
    grad = x.new_ones(len(experts), parts * out_features)
    arguments = grad, experts, payload, flags, len(x), x.shape[1], parts
    torch.library.opcheck(torch.ops.patch_kernels.tile_experts_grad_x.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_fullgraph(backend):
    case = experts_case(4, 2, (130, 132))
    x = whole_numbers(torch.Generator().manual_seed(1), torch.bfloat16, 24, 132)
    experts = some_experts(48, 4, 1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(case.packed, fullgraph=True, dynamic=None, backend=counter)
    for tokens in (24, 1, 2, 7, 16):
        expected = case.packed(x[:tokens], experts[: 2 * tokens])
        assert torch.equal(compiled(x[:tokens], experts[: 2 * tokens]), expected)
    assert counter.frame_count <= 3  # static, dynamic, and the special size 1
    trained, eager = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.compile(case.packed, fullgraph=True, backend=backend)(trained, experts).sum().backward()
    case.packed(eager, experts).sum().backward()
    assert torch.equal(trained.grad, eager.grad)


def test_fake_cuda_kernels_need_no_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 300, dtype=torch.float16, device="cuda")
        experts = torch.empty(8, dtype=torch.int64, device="cuda")
        payload = torch.empty(3 * 2 * 6 * 32768, dtype=torch.uint8, device="cuda")
        flags = torch.empty(6, 2, 3, dtype=torch.uint8, device="cuda")
        begins = torch.empty(7, dtype=torch.int64)
        y = torch.ops.patch_kernels.tile_experts(x, experts, payload, flags, None, begins, 200, 2, None, False)
        assert (y.shape, y.device.type, y.dtype) == ((8, 400), "cuda", torch.float16)


def test_by_torch_is_the_same():
    """What serves a GPU with too old a driver, on a CPU."""
    case = experts_case(4, 2, (130, 260))
    x = whole_numbers(torch.Generator().manual_seed(1), torch.bfloat16, 6, 260)
    experts = some_experts(12, 4, 1)
    assert torch.equal(by_torch.tile_experts(*case.op_arguments(x, experts)), case.packed(x, experts))


def test_begins_and_schedules_are_of_each_matrix():
    case = experts_case(3, 2, (200, 300))
    flags = case.packed.tile_is_sparse
    begins = experts_op.matrix_begins(flags)
    sizes = [tile_linear.payload_bytes(matrix) for matrix in flags]
    assert begins.tolist() == [sum(sizes[:i]) for i in range(7)] and int(begins[-1]) == case.packed.payload.numel()
    schedules = experts_op.make_schedules(flags)
    assert all(torch.equal(schedules[i], tile_linear.make_schedule(flags[i])) for i in range(6))


CASE = experts_case(3, 2, (130, 132))
X, EXPERTS = torch.zeros(2, 132).bfloat16(), torch.tensor([0, 2, 1, 1])
PACKED = CASE.packed.weight, CASE.packed.tile_is_sparse, 130, 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tile_experts(X.float(), EXPERTS, *PACKED),
            "tile_experts, x: expected torch.float16 or torch.bfloat16, got torch.float32 .*Flatten leading",
        ),
        (lambda: tile_experts(X[0], EXPERTS, *PACKED), r"tile_experts, x: expected \(T, K\), got \(132,\). Flatten"),
        (
            lambda: tile_experts(X, EXPERTS.int(), *PACKED),
            r"tile_experts, experts: expected torch.int64, got torch.int32 \(4,\). Convert the router's choices",
        ),
        (
            lambda: tile_experts(X, EXPERTS.reshape(2, 2), *PACKED),
            r"tile_experts, experts: expected \(P,\), got \(2, 2\). Flatten",
        ),
        (
            lambda: tile_experts(X, EXPERTS[:3], *PACKED),
            "experts: expected a multiple of the 2 rows of x, got 3. Pass as many experts for every row",
        ),
        (lambda: tile_experts(X[:0], EXPERTS, *PACKED), "experts: expected a multiple of the 0 rows of x, got 4"),
        (lambda: tile_experts(X, EXPERTS, *PACKED[:3], 0), "tile_experts, parts: expected a number >= 1, got 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def op(x=X, experts=EXPERTS, payload=PACKED[0], flags=PACKED[1], rows=130, parts=2, bias=None):
    return torch.ops.patch_kernels.tile_experts(x, experts, payload, flags, None, None, rows, parts, bias, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=X.float()), r"x must be \(T, K\) float16 or bfloat16"),
        (dict(x=X[0]), r"x must be \(T, K\) float16 or bfloat16"),
        (dict(x=X[:, :0]), r"x must be \(T, K\) float16 or bfloat16"),
        (dict(rows=-1), "expected out_features >= 0 and parts >= 1, got -1 and 2"),
        (dict(parts=0), "expected out_features >= 0 and parts >= 1, got 130 and 0"),
        (dict(payload=PACKED[0][:7]), "payload has 7 bytes, but its tile flags need "),
        (dict(payload=PACKED[0].view(torch.int8)), "payload must be a contiguous 1-D uint8 tensor"),
        (dict(flags=PACKED[1].bool()), r"tile_is_sparse must be contiguous uint8 of shape \(E\*parts, "),
        (dict(flags=PACKED[1][:5]), "tile_is_sparse must be contiguous uint8 of shape"),
        (dict(rows=900), "tile_is_sparse must be contiguous uint8 of shape"),
        (dict(x=X[:, :100]), "tile_is_sparse must be contiguous uint8 of shape"),
        (dict(experts=EXPERTS.int()), r"experts must be \(P,\) int64"),
        (dict(experts=EXPERTS[:3]), "expected a multiple of 2 experts, as x has rows, got 3"),
        (dict(experts=EXPERTS[:0]), "expected a multiple of 2 experts, as x has rows, got 0"),
        (dict(x=X[:0]), "expected a multiple of 0 experts, as x has rows, got 4"),
        (dict(experts=EXPERTS + 1), "experts must be 0 to 2, got 3 in row 1"),
        (dict(experts=EXPERTS - 1), "experts must be 0 to 2, got -1 in row 0"),
        (dict(bias=CASE.bias[:2]), r"bias must be \(E, parts\*N\) of x's dtype"),
        (dict(bias=CASE.bias.half()), r"bias must be \(E, parts\*N\) of x's dtype"),
    ],
)
def test_the_op_itself_keeps_memory_safe(arguments, message):
    with pytest.raises(RuntimeError, match=f"tile_experts: {message}"):
        op(**arguments)


def test_forward_mode_is_refused():
    with pytest.raises(NotImplementedError, match="tile_experts, x: expected no forward-mode derivative"):
        torch.func.jvp(lambda x: CASE.packed(x, EXPERTS), (X,), (X,))
