"""tile_linear and TiledLinear: exact on integers, within the two-times rule on real data, refusing bad input."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.integer_case import integer_case
from support.strategies import SHAPES, TOKENS, hybrid_mask
from torch._dynamo.testing import CompileCounterWithBackend

from patch_kernels import TiledLinear, TiledWeight, reference
from patch_kernels.ops import tile_linear

DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_exact(shape, tokens, dtype):
    for sparse_share in (0.0, 0.5, 1.0):
        weight, keep, tiles, x, bias = integer_case(*shape, tokens, sparse_share, dtype, seed=tokens)
        y = TiledWeight.pack(weight, keep, tiles).matmul(x, bias)
        assert torch.equal(y, reference.tile_linear(x, torch.where(keep, weight, 0), bias))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    cols=st.integers(1, 300),
    tokens=st.integers(0, 140),
    sparse_share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_is_exact(rows, cols, tokens, sparse_share, dtype, with_bias, seed):
    weight, keep, tiles, x, bias = integer_case(rows, cols, tokens, sparse_share, dtype, seed)
    bias = bias if with_bias else None
    y = TiledWeight.pack(weight, keep, tiles).matmul(x, bias)
    assert torch.equal(y, reference.tile_linear(x, torch.where(keep, weight, 0), bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 17, 200])
@pytest.mark.parametrize("shape", [(256, 2048), (1000, 777)])
def test_real_data_two_times_rule(shape, tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    keep, tiles = hybrid_mask(*shape, 0.6, generator)
    weight = torch.where(keep, torch.randn(shape, generator=generator) * 0.05, 0).to(dtype)
    x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    exact = x.double() @ weight.double().T + bias.double()
    error = (TiledWeight.pack(weight, keep, tiles).matmul(x, bias).double() - exact).abs()
    torch_error = (F.linear(x, weight, bias).double() - exact).abs()
    assert error.max() <= 2 * torch_error.max()
    # Element bound: one rounding to the output type and K fp32 operations.
    unit = 2.0**-10 if dtype == torch.float16 else 2.0**-7
    magnitude = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    assert (error <= unit * exact.abs() + 2 * shape[1] * 2.0**-24 * magnitude + torch.finfo(dtype).tiny).all()


def test_a_row_does_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(1)
    keep, tiles = hybrid_mask(200, 500, 0.5, generator)
    tiled = TiledWeight.pack(torch.randn(200, 500, generator=generator).bfloat16(), keep, tiles)
    x = torch.randn(1500, 500, generator=generator).bfloat16()
    whole = tiled.matmul(x, batch_invariant=True)
    for tokens in (1, 2, 16, 17, 63, 64, 65, 100, 1024, 1025):
        assert torch.equal(tiled.matmul(x[:tokens], batch_invariant=True), whole[:tokens])


def test_leading_dimensions_and_strides():
    weight, keep, tiles, x, bias = integer_case(130, 132, 24, 0.5, torch.bfloat16, 3)
    tiled = TiledWeight.pack(weight, keep, tiles)
    expected = reference.tile_linear(x, torch.where(keep, weight, 0), bias)
    assert torch.equal(tiled.matmul(x.reshape(2, 3, 4, 132), bias), expected.reshape(2, 3, 4, 130))
    assert torch.equal(tiled.matmul(x[0], bias), expected[0])
    assert torch.equal(tiled.matmul(x.T.contiguous().T, bias), expected)
    wide = torch.zeros(24, 264, dtype=torch.bfloat16)
    wide[:, ::2] = x
    assert torch.equal(tiled.matmul(wide[:, ::2], bias), expected)
    assert tiled.matmul(x.new_empty(0, 5, 132)).shape == (0, 5, 130)


def test_special_values():
    """inf and NaN pass kept positions as in a dense layer and never leave pruned positions of sparse tiles."""
    keep = torch.tensor([[True, True, False, False]] * 2)
    weight = torch.tensor([[1.0, 2.0, float("inf"), float("nan")], [0.0, -0.0, 1.0, 1.0]], dtype=torch.bfloat16)
    tiled = TiledWeight.pack(weight, keep, torch.ones(1, 1, dtype=torch.bool))
    x = torch.tensor([[1.0, 1.0, float("nan"), float("inf")], [float("inf"), 1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    y = tiled.matmul(x)
    assert y[0].tolist() == [3.0, 0.0]
    assert y[1, 0] == float("inf") and y[1, 1].isnan()
    large = TiledWeight.pack(torch.full((1, 4), 65504.0).half(), keep[:1], torch.ones(1, 1, dtype=torch.bool))
    assert large.matmul(torch.full((1, 4), 2.0).half()).item() == float("inf")


def test_gradients_reach_x_and_bias():
    weight, keep, tiles, x, bias = integer_case(130, 132, 20, 0.5, torch.bfloat16, 4)
    tiled = TiledWeight.pack(weight, keep, tiles)
    grad = torch.randint(-2, 3, (20, 130)).bfloat16()
    results = []
    for function in (
        lambda a, b: tiled.matmul(a, b),
        lambda a, b: F.linear(a, torch.where(keep, weight, 0), b),
    ):
        a, b = x.clone().requires_grad_(), bias.clone().requires_grad_()
        function(a, b).backward(grad)
        results.append((a.grad, b.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def linear_samples():
    weight, keep, tiles, x, bias = integer_case(130, 132, 6, 0.5, torch.bfloat16, 5)
    tiled = TiledWeight.pack(weight, keep, tiles)
    packed = tiled.payload, tile_linear.tile_flags(tiles)
    yield x, *packed, None, 130, bias, False
    yield x, *packed, tiled.schedule, 130, None, True
    yield x.reshape(2, 3, 132), *packed, None, 130, bias, False
    yield x.T.contiguous().T, *packed, tiled.schedule, 130, None, False
    yield x[:0], *packed, None, 130, bias, False
    yield x[0], *packed, None, 130, None, False
    yield x[::2], *packed, None, 130, bias, True
    yield x.half().bfloat16(), *packed, None, 130, bias, False


@pytest.mark.parametrize("index", range(8))
def test_opcheck_linear(index):
    sample = list(linear_samples())[index]
    torch.library.opcheck(torch.ops.patch_kernels.tile_linear.default, sample)
    x, *rest = sample
    torch.library.opcheck(torch.ops.patch_kernels.tile_linear_train.default, sample)
    torch.library.opcheck(torch.ops.patch_kernels.tile_linear_train.default, (x.clone().requires_grad_(), *rest))


def group_sample(tokens, with_bias, count=3):
    """x and the arguments of tile_linear's op behind it for weights of 132 columns."""
    x = torch.randn(tokens, 132, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    weights = []
    for seed, rows in enumerate((130, 64, 1, 300)[:count]):
        weight, keep, tiles, _, bias = integer_case(rows, 132, 1, 0.5, torch.bfloat16, seed)
        tiled = TiledWeight.pack(weight, keep, tiles)
        used = bias if with_bias and seed != 1 else None
        weights.append((tiled.payload, tile_linear.tile_flags(tiles), tiled.schedule, rows, used))
    return x, weights


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 70])
def test_a_group_is_its_weights_one_by_one(tokens, with_bias, count):
    x, weights = group_sample(tokens, with_bias, count)
    flat = [value for weight in weights for value in weight]
    results = tile_linear.tile_linear_group(x, flat)
    assert len(results) == count
    assert not tokens or len({y.untyped_storage().data_ptr() for y in results}) == count
    for y, weight in zip(results, weights, strict=True):
        assert torch.equal(y, torch.ops.patch_kernels.tile_linear(x, *weight, False))
    assert all(map(torch.equal, tile_linear.tile_linear_group(x.T.contiguous().T, flat, True), results))
    op = getattr(torch.ops.patch_kernels, f"tile_linear_group{count}").default
    torch.library.opcheck(op, (x, *flat, False))


def test_a_group_keeps_memory_safe():
    x, (one, two) = group_sample(3, True, 2)
    payload, flags, _, rows, bias = one
    op = torch.ops.patch_kernels.tile_linear_group2
    for arguments, message in (
        ((x, *two, two[0], *one[1:]), "tile_linear_group: payload has .* bytes, but its"),
        ((x, *two, payload, flags, None, 900, bias), "contiguous uint8 of shape"),
        ((x, *two, payload, flags.bool(), None, rows, bias), "contiguous uint8 of shape"),
        ((x.float(), *one, *two), "tile_linear_group: x must be float16 or bfloat16"),
        ((x, *two, payload, flags, None, rows, bias[:1]), "bias must have"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, False)
    for weights in ([], one, (*one, *two)[:9], one * 5):
        message = rf"expected 5 values for each of 2 to 4, got {len(weights)} values"
        with pytest.raises(ValueError, match=message):
            tile_linear.tile_linear_group(x, weights)


def test_opcheck_pack_and_unpack():
    weight, keep, tiles, *_ = integer_case(130, 132, 6, 0.5, torch.float16, 6)
    flags = tile_linear.tile_flags(tiles)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # output size depends on the flags' values
    torch.library.opcheck(torch.ops.patch_kernels.pack_tiles.default, (weight, keep, flags), test_utils=tests)
    payload = tile_linear.pack_tiles(weight, keep, tiles)
    for schedule in (tile_linear.make_schedule(tiles), None):
        torch.library.opcheck(
            torch.ops.patch_kernels.unpack_tiles.default, (payload, flags, schedule, 130, 132, torch.float16)
        )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_fullgraph(backend):
    weight, keep, tiles, x, bias = integer_case(130, 132, 24, 0.5, torch.bfloat16, 7)
    linear = torch.nn.Linear(132, 130, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    layer = TiledLinear.from_linear(linear, keep, tiles)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=None, backend=counter)
    for tokens in (24, 1, 2, 7, 16):
        assert torch.equal(compiled(x[:tokens]), layer(x[:tokens]))
    assert counter.frame_count <= 3  # static, dynamic, and the special size 1
    trained = x.clone().requires_grad_()
    torch.compile(layer, fullgraph=True, backend=backend)(trained).sum().backward()
    assert trained.grad.abs().sum() > 0


def test_fake_cuda_kernels_need_no_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 7, 300, dtype=torch.float16, device="cuda")
        payload = torch.empty(6 * 32768, dtype=torch.uint8, device="cuda")
        flags = torch.empty(2, 3, dtype=torch.uint8, device="cuda")
        y = torch.ops.patch_kernels.tile_linear(x, payload, flags, None, 200, None, False)
        assert (y.shape, y.device.type, y.dtype) == ((4, 7, 200), "cuda", torch.float16)


@pytest.mark.parametrize("strict", [True, False])
def test_a_layer_on_a_fake_card_is_exported_with_its_schedule(strict):
    """No check of the card's kernels: there may be none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = TiledLinear(384, 256, device="cuda")
        x = torch.empty(4, 384, dtype=torch.bfloat16, device="cuda")
        assert (layer(x).shape, layer(x).device.type) == ((4, 256), "cuda")
        nodes = torch.export.export(layer, (x,), strict=strict).graph.nodes
    calls = [node for node in nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [torch.ops.patch_kernels.tile_linear.default]
    assert calls[0].args[3] is not None and not tile_linear._decided


def test_schedule_follows_the_flags():
    """The GPU kernels read the schedule, not the flags: whatever changes the flags must make it new."""
    linear = torch.nn.Linear(260, 390, dtype=torch.bfloat16)
    keep, tiles = hybrid_mask(390, 260, 0.5, torch.Generator().manual_seed(9))
    layer = TiledLinear.from_linear(linear, keep, tiles)
    expected = tile_linear.make_schedule(tiles)
    assert torch.equal(layer.schedule, expected) and torch.equal(layer.tiled_weight.schedule, expected)
    assert torch.equal(TiledWeight.pack(linear.weight.detach(), keep, tiles).schedule, expected)
    assert "schedule" not in layer.state_dict()

    other = TiledLinear(260, 390, payload_bytes=layer.payload.numel())
    assert other.tiled_weight.schedule is None
    other.load_state_dict(layer.state_dict())
    assert other.tiled_weight.schedule is None  # made when it is needed
    other.refresh_schedule()
    assert torch.equal(other.tiled_weight.schedule, expected)
    other.tile_is_sparse = torch.zeros_like(other.tile_is_sparse)
    assert other.tiled_weight.schedule is None
    other.load_state_dict(layer.state_dict())
    assert other.tiled_weight.schedule is None
    assert copy.deepcopy(layer).tiled_weight.schedule is None  # other flags: made when it is needed


def test_schedule_op():
    flags = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.uint8)
    assert torch.ops.patch_kernels.make_schedule(flags).shape == (tile_linear.schedule_words((2, 3)),)
    torch.library.opcheck(torch.ops.patch_kernels.make_schedule.default, (flags,))
    with pytest.raises(RuntimeError, match="contiguous 2-D uint8"):
        torch.ops.patch_kernels.make_schedule(flags.bool())


def test_dense_path_is_said_once(monkeypatch):
    answers = [
        ({"family": "sm90", "state": "works", "reason": ""}, None),
        ({"family": "none", "state": "disabled", "reason": "no kernel for compute capability 7.0"}, r"7\.0.* cuBLAS"),
        ({"family": "sm90", "state": "unchecked", "reason": ""}, "make one call before capturing"),
        ({"family": "sm80", "state": "works", "reason": "the wgmma kernels failed"}, "portable kernels: the wgmma"),
    ]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    for device, (status, message) in enumerate(answers):
        monkeypatch.setattr(tile_linear, "gemm_status", lambda path, index, status=status: status)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tile_linear._say_if_dense(100 + device)
            tile_linear._say_if_dense(100 + device)
        assert len(caught) == (message is not None)
        if message:
            assert re.search(message, str(caught[0].message))


def test_tiled_linear_is_a_drop_in():
    linear = torch.nn.Linear(132, 130, dtype=torch.float16)
    keep, tiles = hybrid_mask(130, 132, 0.5, torch.Generator().manual_seed(8))
    layer = TiledLinear.from_linear(linear, keep, tiles)
    assert (layer.in_features, layer.out_features, layer.bias.dtype) == (132, 130, torch.float16)
    back = layer.to_linear()
    assert torch.equal(back.weight, torch.where(keep, linear.weight, 0))
    assert torch.equal(back.bias, linear.bias)
    assert "payload_bytes" in repr(layer)
    other = TiledLinear(132, 130, payload_bytes=layer.payload.numel(), dtype=torch.float16)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 132).half()
    assert torch.equal(other(x), layer(x))
    assert torch.equal(layer.to(torch.float16)(x), other(x))


def test_tensors_that_are_put_in_place_of_a_layers_own_are_used():
    """As .to(), functional_call, offloading, parametrizations and pruning of torch do it."""
    linear = torch.nn.Linear(132, 130, dtype=torch.float16)
    keep, tiles = hybrid_mask(130, 132, 0.5, torch.Generator().manual_seed(8))
    layer, x = TiledLinear.from_linear(linear, keep, tiles), torch.randn(3, 132).half()
    expected = TiledWeight.pack(linear.weight.detach(), keep, tiles).matmul(x, torch.ones(130).half())
    with torch.no_grad():
        layer(x)
        assert torch.equal(torch.func.functional_call(layer, {"bias": torch.ones(130).half()}, (x,)), expected)
        layer._parameters["bias"] = torch.nn.Parameter(torch.ones(130).half())
        assert torch.equal(layer(x), expected)
        del layer.bias
        layer.bias = torch.ones(130).half()  # a plain attribute
        assert torch.equal(layer(x), expected)


def test_pack_refuses_groups_that_are_not_two_of_four():
    keep = torch.ones(130, 132, dtype=torch.bool)
    keep[:, 2::4] = keep[:, 3::4] = False
    keep[5, 6] = True
    keep[129, 131] = True
    tiles = torch.ones(2, 2, dtype=torch.bool)
    weight = torch.randn(130, 132).half()
    with pytest.raises(ValueError, match="got 2 groups that are not, the first at row 5, column 4"):
        tile_linear.pack_tiles(weight, keep, tiles)
    with pytest.raises(RuntimeError, match=r"2 groups in sparse tiles.*first at row 5, column 4"):
        torch.ops.patch_kernels.pack_tiles(weight, keep, tile_linear.tile_flags(tiles))


def test_readers_of_a_dense_weight_stop():
    """The packed weight has its name, but neither its shape nor its dtype."""
    layer = TiledLinear(132, 130)
    x = torch.ones(2, 132).bfloat16()
    for read in (lambda: torch.nn.functional.linear(x, layer.weight), lambda: x @ layer.weight):
        with pytest.raises(RuntimeError):
            read()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        torch.nn.Linear(132, 130).load_state_dict(layer.state_dict(), strict=False)


W, KEEP, TILES = torch.zeros(130, 132).half(), torch.ones(130, 132, dtype=torch.bool), torch.zeros(2, 2).bool()
FLAGS = tile_linear.tile_flags(TILES)
TILED = TiledWeight.pack(W, KEEP, TILES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tile_linear.pack_tiles(W.float(), KEEP, TILES),
            r"weight: expected torch.float16 or torch.bfloat16 \(N, K\), got torch.float32 \(130, 132\)",
        ),
        (
            lambda: tile_linear.pack_tiles(W[0], KEEP, TILES),
            r"weight: expected .* \(N, K\), got torch.float16 \(132,\)",
        ),
        (
            lambda: tile_linear.pack_tiles(W, KEEP.float(), TILES),
            r"keep: expected torch.bool \(130, 132\) on cpu, got torch.float32",
        ),
        (
            lambda: tile_linear.pack_tiles(W, KEEP[:1], TILES),
            r"keep: expected torch.bool \(130, 132\) .*got torch.bool \(1, 132\)",
        ),
        (
            lambda: tile_linear.pack_tiles(W, KEEP, TILES[:1]),
            r"tile_is_sparse: expected torch.bool .*\(2, 2\), got torch.bool \(1, 2\)",
        ),
        (
            lambda: tile_linear.pack_tiles(W, KEEP, TILES.float()),
            "tile_is_sparse: expected torch.bool .* got torch.float32",
        ),
        (
            lambda: tile_linear.pack_tiles(W, KEEP.to("meta"), TILES),
            "keep: expected .* on cpu, got .* on meta",
        ),
        (
            lambda: tile_linear.unpack_tiles(torch.zeros(1, dtype=torch.uint8), TILES, (130, 132), torch.float32),
            "dtype float16 or bfloat16, got torch.float32",
        ),
        (
            lambda: tile_linear.unpack_tiles(torch.zeros(1, dtype=torch.uint8), TILES, (130, 300), torch.half),
            r"unpack_tiles, tile_is_sparse: expected torch.bool .*\(2, 3\)",
        ),
        (
            lambda: tile_linear.unpack_tiles(torch.zeros(1, dtype=torch.uint8), TILES, (130, 132), torch.half),
            r"unpack_tiles, payload: expected contiguous torch.uint8 \(\d+,\) on cpu, got torch.uint8 \(1,\)",
        ),
        (
            lambda: tile_linear.unpack_tiles(
                torch.zeros(4 * 32768, dtype=torch.uint8), torch.zeros_like(TILES), (130, 132), torch.half, TILES
            ),
            r"unpack_tiles, schedule: expected contiguous torch.int32 \(\d+,\) on cpu, got torch.bool .*make_schedule",
        ),
        (
            lambda: tile_linear.unpack_tiles(torch.zeros(1, dtype=torch.uint8), TILES, 130, torch.half),
            r"unpack_tiles, shape: expected two integers >= 1, got 130",
        ),
        (lambda: tile_linear.make_schedule(TILES.int()), "make_schedule, tile_is_sparse: expected torch.bool or torch"),
        (lambda: TiledLinear(0, 5), r"weight shape \(N, K\): expected two integers >= 1, got \(5, 0\)"),
        (lambda: TiledLinear(128, 128, dtype=torch.float32), "dtype float16 or bfloat16, got torch.float32"),
        (lambda: TiledLinear(128, 128, payload_bytes=7), "payload_bytes between 18432 .* and 32768 .* got 7"),
        (lambda: TiledLinear(128, 128)(torch.zeros(2, 128)), "x: expected torch.bfloat16 .*got torch.float32"),
        (lambda: TiledLinear(128, 128)(torch.zeros(2, 64).bfloat16()), r"\(\.\.\., 128\), got .*\(2, 64\)"),
        (lambda: TiledLinear(128, 128)(None), r"TiledLinear, x: expected torch.bfloat16 \(\.\.\., 128\), got NoneType"),
        (lambda: TiledLinear(128, 128)(torch.zeros(()).bfloat16()), r"\(\.\.\., 128\), got torch.bfloat16 \(\)"),
        # In the wrong dtype, or with a K of as many tiles, the op would read other numbers.
        (lambda: TILED.matmul(W.bfloat16()), r"matmul, x: expected torch.float16 \(\.\.\., 132\), got torch.bfloat16"),
        (
            lambda: TILED.matmul(W[:, :131]),
            r"x: expected torch.float16 \(\.\.\., 132\), got torch.float16 \(130, 131\)",
        ),
        (lambda: TILED.matmul(None), "x: expected torch.float16 .*, got NoneType. Convert it, or pack the weight"),
        (
            lambda: tile_linear.tile_linear(None, TILED.payload, FLAGS, 130, None),
            "tile_linear, x: expected a tensor, got No",
        ),
        (
            lambda: tile_linear.tile_linear(W, TILED.payload, FLAGS, 130, 1.0),
            "tile_linear, bias: .* tensor, got float. Pass",
        ),
        (lambda: TILED.matmul(W, 1.0), r"bias: expected torch.float16 \(130,\), got float"),
        (
            lambda: TILED.matmul(W, W[:, 0].float()),
            r"bias: expected torch.float16 \(130,\), got torch.float32 \(130,\)",
        ),
        (
            lambda: dataclasses.replace(TILED, schedule=torch.zeros(3)).matmul(W),
            r"schedule: expected torch.int32 \(36,\), got torch.float32 \(3,\)",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((W, torch.zeros(7, dtype=torch.uint8), FLAGS, None, 130, None, False), "payload has 7 bytes"),
        (
            (W.float(), torch.zeros(7, dtype=torch.uint8), FLAGS, None, 130, None, False),
            "x must be float16",
        ),
        ((W, torch.zeros(7), FLAGS, None, 130, None, False), "1-D uint8"),
        ((W, torch.zeros(7, dtype=torch.uint8), TILES, None, 130, None, False), "contiguous uint8 of shape"),
        (
            (W, torch.zeros(7, dtype=torch.uint8), FLAGS, None, 900, None, False),
            "contiguous uint8 of shape",
        ),
        ((W, torch.zeros(7, dtype=torch.uint8), FLAGS, None, 130, W[0], False), "bias must have"),
    ],
)
def test_the_op_itself_keeps_memory_safe(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.patch_kernels.tile_linear(*arguments)


def test_forward_mode_is_refused():
    layer, x = TiledLinear(128, 128, dtype=torch.float16), torch.ones(2, 128).half()
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative, .* Use reverse mode, or unpack"):
        torch.func.jvp(layer, (x,), (x,))
