"""The CUDA paths against the CPU definition. Deselected by default; `pytest -m gpu` runs it."""

from __future__ import annotations

import pytest
import torch
from strategies import SHAPES, hybrid_mask
from test_masked_weight import MODES, NOISE, make_case, run
from test_tile_linear import integer_case

from patch_kernels import TiledLinear, TiledWeight, masked_weight, ops, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_equals_cpu(shape, dtype):
    keep, tiles = hybrid_mask(*shape, 0.5, torch.Generator().manual_seed(0))
    tiled = TiledWeight.pack(torch.randn(shape).to(dtype), keep, tiles)
    on_gpu = ops.unpack_tiles(tiled.payload.cuda(), tiles.cuda(), shape, dtype)
    assert torch.equal(on_gpu.cpu().view(torch.int16), tiled.unpack().view(torch.int16))


@pytest.mark.parametrize("tokens", [0, 1, 17, 130])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_exact_on_integers(shape, tokens):
    weight, keep, tiles, x, bias = integer_case(*shape, tokens, 0.5, torch.bfloat16, seed=1)
    y = TiledWeight.pack(weight.cuda(), keep.cuda(), tiles.cuda()).matmul(x.cuda(), bias.cuda())
    assert torch.equal(y.cpu(), reference.tile_linear(x, torch.where(keep, weight, 0), bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_masked_weight_equals_cpu(mode, dtype):
    case = make_case(130, 260, (64, 128), mode, dtype)
    grad = torch.randn(130, 260).to(dtype)
    kwargs = dict(tile=(64, 128), pattern_scale=2.0, tile_scale=3.0, noise=NOISE)
    on_cpu = run(masked_weight, case, grad, **kwargs)
    on_gpu = run(masked_weight, [None if t is None else t.cuda() for t in case], grad.cuda(), **kwargs)
    again = run(masked_weight, [None if t is None else t.cuda() for t in case], grad.cuda(), **kwargs)
    relative = 1e-12 if dtype == torch.float64 else 4e-6
    for got, repeated, expected in zip(on_gpu, again, on_cpu, strict=True):
        if expected is None:
            continue
        assert torch.equal(got, repeated)
        rounding = torch.finfo(got.dtype).eps if got.dtype == dtype else 0
        error = (got.cpu().double() - expected.double()).abs().max()
        assert error <= (relative + rounding) * max(expected.double().abs().max(), 1)


def test_side_stream_and_graph_replay():
    weight, keep, tiles, x, _ = integer_case(256, 384, 16, 0.5, torch.bfloat16, seed=2)
    linear = torch.nn.Linear(384, 256, bias=False, dtype=torch.bfloat16)
    linear.weight.data.copy_(weight)
    layer = TiledLinear.from_linear(linear, keep, tiles).cuda()
    expected = reference.tile_linear(x, torch.where(keep, weight, 0))
    static_x = x.cuda()
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        assert torch.equal(layer(static_x).cpu(), expected)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = layer(static_x)
    static_x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert y.abs().sum() == 0
    static_x.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y.cpu(), expected)
