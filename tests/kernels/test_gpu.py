"""The CUDA paths against the CPU definition. Deselected by default; `pytest -m gpu` runs it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch
from support import ROOT
from support.adamw import adamw_state, random_gradient, same_bits
from support.experts_case import experts_case, some_experts
from support.families import FAMILIES, build
from support.integer_case import integer_case
from support.masked_weight import MODES, NOISE, make_case, run
from support.models import build_tiny_model
from support.strategies import SHAPES, hybrid_mask

from patch.learn.config import LearnConfig
from patch.learn.memory import learning_memory
from patch.learn.run import learn
from patch.models.structure import maskable_linears
from patch.packed.convert import pack_model
from patch.packed.swap import cast_model
from patch.pruning import COMPENSATIONS, METHODS, ProxSparseConfig, compensate, prune_model
from patch_kernels import TiledLinear, TiledWeight, adamw_step, mask_sampling, masked_weight, reference
from patch_kernels._library import gemm_status
from patch_kernels.ops import LIBRARY_PATH, tile_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_equals_cpu(shape, dtype):
    keep, tiles = hybrid_mask(*shape, 0.5, torch.Generator().manual_seed(0))
    tiled = TiledWeight.pack(torch.randn(shape).to(dtype), keep, tiles)
    for schedule in (None, tiled.schedule.cuda()):
        on_gpu = tile_linear.unpack_tiles(tiled.payload.cuda(), tiles.cuda(), shape, dtype, schedule)
        assert torch.equal(on_gpu.cpu().view(torch.int16), tiled.unpack().view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 17, 33, 64, 65, 130, 700])
@pytest.mark.parametrize("shape", [*SHAPES, (512, 2048), (640, 1000)])
def test_linear_is_exact_on_integers(shape, tokens, dtype):
    weight, keep, tiles, x, bias = integer_case(*shape, tokens, 0.5, dtype, seed=1)
    tiled = TiledWeight.pack(weight.cuda(), keep.cuda(), tiles.cuda())
    expected = reference.tile_linear(x, torch.where(keep, weight, 0), bias)
    for batch_invariant in (False, True):
        y = tiled.matmul(x.cuda(), bias.cuda(), batch_invariant=batch_invariant)
        assert torch.equal(y.cpu(), expected)


def test_a_group_is_its_weights_one_by_one():
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).half().cuda()
    weights = []
    for seed, rows in enumerate((256, 130, 64)):
        weight, keep, tiles, _, bias = integer_case(rows, 300, 1, 0.5, torch.float16, seed)
        tiled = TiledWeight.pack(weight.cuda(), keep.cuda(), tiles.cuda())
        weights.append((tiled.payload, tile_linear.tile_flags(tiles.cuda()), tiled.schedule, rows, bias.cuda()))
    for batch_invariant in (False, True):
        results = tile_linear.tile_linear_group(x, [value for w in weights for value in w], batch_invariant)
        for y, weight in zip(results, weights, strict=True):
            assert torch.equal(y, torch.ops.patch_kernels.tile_linear(x, *weight, batch_invariant))


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("experts", "parts", "shape"), [(20, 2, (256, 512)), (5, 1, (130, 1000)), (8, 2, (768, 2048))])
def test_experts_are_exact_on_integers(experts, parts, shape, batch_invariant):
    case = experts_case(experts, parts, shape)
    expected_of, generator = case.dense.double(), torch.Generator().manual_seed(0)
    module = case.packed.cuda()
    module.batch_invariant = batch_invariant
    for tokens, fan in ((1, 1), (1, 4), (7, 2), (40, 1), (300, 2)):
        x = torch.randint(-2, 3, (tokens, shape[1]), generator=generator).bfloat16()
        chosen = torch.randint(0, experts, (tokens * fan,), generator=generator)
        rows = x.double().repeat_interleave(fan, 0)
        for expert in chosen.unique().tolist():
            at = (chosen == expert).nonzero()[:, 0]
            y = (rows[at] @ expected_of[expert].T + case.bias[expert].double()).bfloat16()
            assert torch.equal(module(x.cuda(), chosen.cuda())[at.cuda()].cpu(), y)


def test_experts_are_not_captured():
    case = experts_case(4, 1, (128, 128))
    module, x, chosen = case.packed.cuda(), torch.ones(2, 128).bfloat16().cuda(), torch.tensor([0, 3]).cuda()
    module(x, chosen)
    with (
        pytest.raises(RuntimeError, match="expected a stream that is not captured, got one that is"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        module(x, chosen)


def test_gradients_of_experts_are_those_of_the_cpu():
    case = experts_case(4, 1, (256, 384))
    x, experts = torch.randn(6, 384, generator=torch.Generator().manual_seed(0)).bfloat16(), some_experts(12, 4, 0)
    grads = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        case.packed.to(device)(leaf, experts.to(device)).sum().backward()
        grads.append(leaf.grad.cpu().float())
    torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-3)


def test_packed_experts_have_the_logits_of_the_cpu():
    model = build(FAMILIES["Mixtral"])
    cast_model(model, torch.bfloat16)
    prune_model(model, "magnitude", progress=False)
    pack_model(model)
    ids = torch.arange(3, 51).reshape(2, 24)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.float()
        found = model.cuda()(ids.cuda(), use_cache=False).logits.float().cpu()
    assert (found - expected).abs().median() < 0.02 * expected.std()


def test_sparse_kernels_passed_their_self_check():
    """Else the tests above looked at unpack + cuBLAS."""
    if torch.cuda.get_device_capability() not in [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)]:
        pytest.skip("this GPU has no sparse kernel")
    status = gemm_status(LIBRARY_PATH, torch.cuda.current_device())
    assert (status["state"], status["reason"]) == ("works", "")


def test_unaligned_and_strided_x():
    """x that does not start at 16 bytes, has K not a multiple of 8, or is a slice of something larger."""
    for cols in (384, 300):
        weight, keep, tiles, x, bias = integer_case(256, cols, 20, 0.5, torch.bfloat16, seed=3)
        tiled = TiledWeight.pack(weight.cuda(), keep.cuda(), tiles.cuda())
        expected = reference.tile_linear(x, torch.where(keep, weight, 0), bias)
        flat = torch.full((20 * cols + 1,), torch.nan, dtype=torch.bfloat16, device="cuda")
        flat[1:] = x.cuda().flatten()
        wide = torch.full((20, cols + 24), torch.nan, dtype=torch.bfloat16, device="cuda")
        wide[:, 8 : 8 + cols] = x.cuda()
        for view in (flat[1:].reshape(20, cols), wide[:, 8 : 8 + cols], x.cuda().T.contiguous().T):
            assert torch.equal(tiled.matmul(view, bias.cuda()).cpu(), expected)


def test_rows_do_not_depend_on_their_number():
    generator = torch.Generator().manual_seed(4)
    keep, tiles = hybrid_mask(1024, 2048, 0.7, generator)
    tiled = TiledWeight.pack(torch.randn(1024, 2048).bfloat16().cuda(), keep.cuda(), tiles.cuda())
    x = torch.randn(1030, 2048, generator=generator).bfloat16().cuda()
    whole = tiled.matmul(x, batch_invariant=True)
    for tokens in (1, 8, 16, 33, 64, 200, 512):
        assert torch.equal(tiled.matmul(x[:tokens], batch_invariant=True), whole[:tokens])


def test_two_streams_at_once():
    weight, keep, tiles, x, _ = integer_case(1024, 4096, 16, 0.5, torch.bfloat16, seed=5)
    tiled = TiledWeight.pack(weight.cuda(), keep.cuda(), tiles.cuda())
    x = x.cuda()
    expected = tiled.matmul(x)
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                results.append(tiled.matmul(x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)


# The kernels for tiles of 128 columns with 16-bit weights: whole, cut on both sides, few rows. Then the general ones:
# another tile, rows that do not start at 16 bytes, wide dtypes.
MASK_CASES = [
    ((256, 384), (128, 128), torch.bfloat16, torch.float32),
    ((256, 384), (128, 128), torch.float16, torch.float32),
    ((300, 400), (128, 128), torch.bfloat16, torch.bfloat16),
    ((77, 2056), (128, 128), torch.bfloat16, torch.float32),
    ((200, 256), (48, 128), torch.float16, torch.bfloat16),
    ((130, 260), (64, 128), torch.bfloat16, torch.float32),
    ((130, 260), (128, 128), torch.float16, torch.bfloat16),
    ((33, 52), (16, 12), torch.bfloat16, torch.float32),
    ((130, 260), (64, 128), torch.float32, torch.float32),
    ((130, 260), (64, 128), torch.float64, torch.float64),
]


@pytest.mark.parametrize("noise", [None, NOISE])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("shape", "tile", "dtype", "logits"), MASK_CASES)
@pytest.mark.parametrize("mode", MODES)
def test_masked_weight_equals_cpu(mode, shape, tile, dtype, logits, hard, noise):
    """To the accuracy of the card's log2 and exp2; run to run bit for bit. Where patterns are hard, two equally
    likely ones may be chosen either way: one group in 10^4 at most, and sums are not compared."""
    weight, pattern, tiles, fixed = make_case(*shape, tile, mode, dtype)
    case = (weight, None if pattern is None else pattern.to(logits), tiles, fixed)
    on_card = [None if t is None else t.cuda() for t in case]
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    kwargs = dict(tile=tile, pattern_scale=2.0, tile_scale=3.0, noise=noise, hard_pattern=hard, hard_tile=hard)
    on_cpu = run(masked_weight, case, grad, **kwargs)
    on_gpu, again = (run(masked_weight, on_card, grad.cuda(), **kwargs) for _ in range(2))
    relative = 1e-12 if dtype == torch.float64 else 1e-5
    may_flip = hard and mode != "tile"
    for got, repeated, expected in zip(on_gpu, again, on_cpu, strict=True):
        if expected is None:
            continue
        assert torch.equal(got, repeated)
        if may_flip and expected.numel() < weight.numel():
            continue
        rounding = torch.finfo(got.dtype).eps if got.dtype.itemsize == 2 else 0
        error = (got.cpu().double() - expected.double()).abs()
        far = error > (relative + rounding) * max(expected.double().abs().max(), 1)
        assert far.double().mean() <= (1e-4 if may_flip else 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "tile", "dtype", "logits"), MASK_CASES)
def test_backward_sees_the_mask_of_forward(mode, shape, tile, dtype, logits):
    weight, pattern, tiles, fixed = (None if t is None else t.cuda() for t in make_case(*shape, tile, mode, dtype))
    pattern = None if pattern is None else pattern.to(logits)
    sampling = mask_sampling(pattern_scale=2.0, noise=(5, 9), device="cuda")
    arguments = (weight, pattern, fixed, tiles, *sampling, *tile, False, False, 7)
    masked, _ = torch.ops.patch_kernels.masked_weight(*arguments)
    grads = torch.randn_like(weight), torch.ones(2, dtype=torch.float64, device="cuda")
    assert torch.equal(torch.ops.patch_kernels.masked_weight_backward(*grads, *arguments, True)[2], masked)


def test_graph_of_a_mask_reads_the_new_draw():
    weight, pattern, tiles, _ = (None if t is None else t.cuda() for t in make_case(256, 256, (128, 128), "joint"))
    weight = weight.bfloat16()
    static = mask_sampling(noise=(1, 0), device="cuda")
    call = lambda sampling: masked_weight(weight, pattern, tiles, sampling=sampling, layer=3)  # noqa: E731
    with torch.no_grad():
        call(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            masked, sums = call(static)
        for draw in (5, 6):
            new = mask_sampling(pattern_temperature=0.5 + draw, noise=(1, draw), device="cuda")
            for target, value in zip(static, new, strict=True):
                target.copy_(value)
            graph.replay()
            expected = call(new)
            torch.cuda.synchronize()
            assert torch.equal(masked, expected[0]) and torch.equal(sums, expected[1])


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elems", [0, 1, 255, 256, 4099, (1 << 24) + 9])
def test_adamw_equals_cpu(elems, dtype, moments):
    """Bit for bit; the largest takes several turns of a grid-stride loop."""
    generator = torch.Generator().manual_seed(0)
    on_cpu = adamw_state(elems, dtype, moments, generator)
    on_gpu = {name: value.cuda() for name, value in on_cpu.items()}
    for step in range(1, 4):
        grad, scale = random_gradient(elems, dtype, generator), torch.tensor([0.3])
        settings = dict(step=step, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, seed=7, stream=3)
        adamw_step(**on_cpu, grad=grad, grad_scale=scale, **settings)
        adamw_step(**on_gpu, grad=grad.cuda(), grad_scale=scale.cuda(), **settings)
        assert all(same_bits(on_gpu[name].cpu(), value) for name, value in on_cpu.items())


def test_adamw_refuses_unaligned_parameters():
    state = adamw_state(257, torch.float32, torch.float32, torch.Generator())
    state = {name: value.cuda()[1:] for name, value in state.items()}
    with pytest.raises(RuntimeError, match="must start at multiples of 16 bytes; clone them"):
        adamw_step(**state, grad=torch.ones(256).cuda(), step=1, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


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


def test_self_check_while_another_thread_captures():
    """In a process of its own: the first call on a card, while a thread captures in global mode."""
    script = """
import threading, torch
from support.integer_case import integer_case
from patch_kernels import TiledWeight, reference
from patch_kernels._library import gemm_status
from patch_kernels.ops import LIBRARY_PATH
weight, keep, tiles, x, bias = integer_case(256, 384, 16, 0.5, torch.bfloat16, seed=2)
tiled = TiledWeight.pack(weight.cuda(), keep.cuda(), tiles.cuda())
on_card, bias_on_card, static = x.cuda(), bias.cuda(), torch.zeros(8, device="cuda")
del tiles; torch.empty(1 << 22, device="cuda"); torch.empty(8, device="cuda")  # torch need not allocate later
capturing, checked = threading.Event(), threading.Event()
graph = torch.cuda.CUDAGraph()
def capture():
    with torch.cuda.graph(graph, capture_error_mode="global"):
        static.add_(1)
        capturing.set()
        checked.wait()
        static.add_(1)
thread = threading.Thread(target=capture)
thread.start()
capturing.wait()
try:
    y = tiled.matmul(on_card, bias_on_card)
finally:
    checked.set()
    thread.join()
graph.replay()
torch.cuda.synchronize()
assert (static == 2).all()
assert torch.equal(y.cpu(), reference.tile_linear(x, torch.where(keep, weight, 0), bias))
assert gemm_status(LIBRARY_PATH, 0)["state"] == "works", gemm_status(LIBRARY_PATH, 0)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_second_process_starts_no_check_of_the_card(tmp_path):
    script = (
        "import torch; from patch_kernels import card_check, self_check;"
        "self_check.check_device(torch.device('cuda', 0)); print(card_check.how(0))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    said = [
        subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True) for _ in "ab"
    ]
    assert said[0].stdout.strip() == "by another process, just now", said[0].stderr
    assert said[1].stdout.startswith("by another process, before"), said[1].stderr


@pytest.mark.parametrize("mode", ["joint", "tile", "maskllm"])
def test_memory_estimate_is_the_measured_peak(mode):
    # Large enough that cuBLAS workspaces do not count.
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "vocab_size": 32000}
    model = build_tiny_model("llama", dtype=torch.bfloat16, max_position_embeddings=2048, **sizes).cuda()
    config = LearnConfig.from_preset(mode, 0.5, global_batch_size=2, warmup_steps=0, grad_checkpoint=True)
    keep = torch.tensor([True, True, False, False])
    linears = maskable_linears(model)
    masks = {name: keep.repeat(lin.weight.numel() // 4).view(lin.weight.shape) for name, lin in linears.items()}
    expected = learning_memory(model.config, config, seqlen=2048, dtype=torch.bfloat16, with_prior=True)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    learn(model, torch.randint(0, 32000, (4, 2048)), config, prior_masks=masks, progress=False)
    assert expected.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.05)


def place(model, offload):
    """The model on the GPU, or on the CPU with the blocks moved one by one."""
    return (model, "cuda") if offload else (model.cuda(), None)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_one_shot_masks_and_weights_are_those_of_the_cpu(method, offload):
    ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    settings = {"calibration": ids, "progress": False}
    if METHODS[method].learns:
        settings["prox"] = ProxSparseConfig(steps=4, lr=1e-2)
    expected, model = (build_tiny_model("llama", dtype=torch.float64) for _ in range(2))
    masks = prune_model(expected, method, **settings)
    model, device = place(model, offload)
    for name, keep in prune_model(model, method, device=device, **settings).items():
        assert torch.equal(keep.cpu(), masks[name]), name
        weights = (other.get_submodule(name).weight.detach().cpu() for other in (model, expected))
        torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("method", COMPENSATIONS)
def test_compensated_weights_are_those_of_the_cpu(method, offload):
    ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    expected, model = (build_tiny_model("llama", dtype=torch.float64) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    masks = {
        name: torch.rand(linear.weight.shape, generator=generator) > 0.4
        for name, linear in maskable_linears(expected).items()
    }
    compensate(expected, masks, calibration=ids, method=method, progress=False)
    model, device = place(model, offload)
    compensate(model, masks, calibration=ids, method=method, device=device, progress=False)
    for name, linear in maskable_linears(model).items():
        weight = expected.get_submodule(name).weight
        torch.testing.assert_close(linear.weight.detach().cpu(), weight.detach(), rtol=1e-9, atol=1e-12)
