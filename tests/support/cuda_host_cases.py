"""Cases of tests/kernels/test_cuda_host.py, which runs them in a process of their own.

The library takes tile_linear on CPU tensors over, so no other test may run there.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import threading
import traceback
import warnings
from pathlib import Path

import torch
from torch import nn

import patch_kernels.ops.tile_linear as tile_linear
from benchmarks.ops.cuda_host import CudaHost, tensors_are_on_cuda
from patch_kernels import TiledExperts, TiledLinear
from patch_kernels.ops import tile_experts
from support.strategies import hybrid_mask

OP = torch.ops.patch_kernels.tile_linear.default
GLOBAL_MODE = 0  # cudaStreamCaptureModeGlobal, in which a thread starts
MEMORY_ERROR = 2  # cudaErrorMemoryAllocation
LAUNCH_ERROR = 719  # cudaErrorLaunchFailure


def layer(rows, cols, seed=0, share=0.5):
    torch.manual_seed(seed)
    linear = nn.Linear(cols, rows, dtype=torch.bfloat16)
    return TiledLinear.from_linear(linear, *hybrid_mask(rows, cols, share, torch.default_generator))


def inputs(tokens, cols):
    return torch.zeros(tokens, cols, dtype=torch.bfloat16)


@torch.no_grad()
def call(module, x):
    with tensors_are_on_cuda():
        return module(x)


def words_at(pointer, count):
    return list((ctypes.c_int32 * count).from_address(pointer))


def own_choice(host, device, module, tokens):
    """bn, token_ctas, row_ctas, splits and depth of choose_plan, which this export calls without any cache."""
    choice = (ctypes.c_int * 6)()  # and the workers
    sizes = [ctypes.c_int64(n) for n in (module.out_features, module.in_features, tokens, module.weight.numel())]
    assert host.library.patch_kernels_plan_choices(device, *sizes, choice, 1) == 1
    return list(choice)[:5]


def check_launch(host, module, x, y, device=0):
    """The last launch is that of module(x) = y, with the plan of its sizes."""
    launch = host.last_launch()
    tokens = x.numel() // module.in_features
    assert (launch.payload, launch.y) == (module.weight.data_ptr(), y.data_ptr())
    assert launch.bias == (0 if module.bias is None else module.bias.data_ptr())
    assert (launch.tokens, launch.rows, launch.cols) == (tokens, module.out_features, module.in_features)
    words = tile_linear.make_schedule(module.tile_is_sparse)
    assert words_at(launch.schedule_tiles - 12, words.numel()) == words.tolist()
    bn, token_ctas, row_ctas, splits, _ = own_choice(host, device, module, tokens)
    assert (launch.token_ctas, launch.row_ctas, launch.splits) == (token_ctas, row_ctas, splits)
    if module.in_features % 8 == 0:
        assert (launch.x, launch.x_stride) == (x.data_ptr(), module.in_features)
    if host.status(device)["family"] != "sm90":
        return
    ctas = token_ctas * row_ctas * splits
    assert launch.grid == ctas * launch.workers
    assert (launch.x_map_base, launch.x_map_rows, launch.x_map_cols) == (launch.x, tokens, module.in_features)
    assert (launch.x_map_stride_bytes, launch.x_map_box_rows) == (2 * launch.x_stride, bn)
    if bn > 32 and module.out_features % 8 == 0:
        assert (launch.y_map_base, launch.y_map_rows, launch.y_map_cols) == (launch.y, tokens, module.out_features)
        assert launch.y_map_stride_bytes == 2 * module.out_features
    assert launch.cluster == (ctas if ctas > 1 else 0)
    assert launch.spread == (ctas > 1 and bn <= 32)


def every_launch_is_that_of_its_call(host):
    """Many layers, numbers of tokens and devices in random order, with memory that is freed and used again."""
    random.seed(1)
    layers = [layer(*sizes, seed) for seed, sizes in enumerate([(256, 384), (130, 260), (1024, 2048), (512, 4096)])]
    layers.append(layer(256, 384, seed=9))  # the sizes of the first, other tiles
    for _ in range(400):
        device, module = random.choice([0, 0, 1, 2]), random.choice(layers)
        host.library.fake_set_device(device)
        tokens = random.choice([1, 2, 7, 16, 33, 64, 65, 200, 1000, 4096])
        x = inputs(tokens, module.in_features)
        y = call(module, x)
        check_launch(host, module, x, y, device)
    host.library.fake_set_device(0)


def maps_are_kept_for_equal_memory_alone(host):
    module = layer(256, 384)
    memory = torch.zeros(2 * 64 * 384, dtype=torch.bfloat16)
    x = memory[: 64 * 384].view(64, 384)
    call(module, x)
    before = host.counts()["encodes"]
    for _ in range(5):
        call(module, x)
    assert host.counts()["encodes"] - before <= 5  # y may lie anywhere, x is where it was
    for tokens, start in ((63, 0), (64, 8), (128, 0), (1, 0), (64, 0)):
        part = memory[start : start + tokens * 384].view(tokens, 384)
        check_launch(host, module, part, call(module, part))
    half = memory[: 64 * 384].view(torch.float16).view(64, 384)
    types = {host.last_launch().x_map_type}
    torch.ops.patch_kernels.tile_linear(half, module.weight, module.tile_is_sparse, module.schedule, 256, None, False)
    types.add(host.last_launch().x_map_type)
    assert len(types) == 2


def plans_are_kept_for_equal_calls_alone(host):
    """Each call differs from the one before in one thing that a plan follows from; each thing changes some plan."""
    different = {"zeros": 0, "device": 0, "rows": 0, "batch_invariant": 0}
    for sizes in ((128, 128), (128, 384), (128, 512), (1024, 2048)):
        dense, sparse, taller = layer(*sizes, share=0), layer(*sizes, share=1), layer(2 * sizes[0], sizes[1], share=0)
        for tokens in (1, 16, 33, 65, 200, 500, 2000, 4096):
            x = inputs(tokens, sizes[1])
            plans = {}
            for name, module, device in (
                ("first", dense, 0), ("zeros", sparse, 0), ("device", sparse, 1), ("rows", taller, 0)
            ):  # fmt: skip
                host.library.fake_set_device(device)
                check_launch(host, module, x, call(module, x), device)
                plans[name] = own_choice(host, device, module, tokens)
            host.library.fake_set_device(0)
            for taller.batch_invariant in (True, False):
                y = call(taller, x)
                split = host.last_launch().splits
                different["batch_invariant"] += split != plans["rows"][3]
            check_launch(host, taller, x, y)
            different["zeros"] += plans["first"] != plans["zeros"]
            different["device"] += plans["zeros"] != plans["device"]
            different["rows"] += plans["first"] != plans["rows"]
    assert all(different.values()), different


def new_state_is_used_at_once(host):
    module, other = layer(256, 384, seed=1), layer(256, 384, seed=2)
    other = next(
        candidate for candidate in (layer(256, 384, seed=seed) for seed in range(2, 99))
        if candidate.weight.numel() == module.weight.numel()
        and not torch.equal(candidate.tile_is_sparse, module.tile_is_sparse)
    )  # fmt: skip
    x = inputs(40, 384)

    def check():
        check_launch(host, module, x, call(module, x))

    check()
    module.load_state_dict(other.state_dict())
    check()
    module.tile_is_sparse = 1 - module.tile_is_sparse
    module.weight = torch.zeros(tile_linear.payload_bytes(module.tile_is_sparse), dtype=torch.uint8)
    check()
    module.tile_is_sparse.fill_(0)
    module.weight = torch.zeros(6 * tile_linear.DENSE_TILE_BYTES, dtype=torch.uint8)
    module.refresh_schedule()
    check()
    module.bias.data = torch.ones(256, dtype=torch.bfloat16)  # as nn.Module.to does
    check()
    module._buffers["weight"] = module.weight.clone()  # as offloading does
    check()
    module.bias = None
    check()
    module.state_dict()["tile_is_sparse"].fill_(1)  # as a loader does that copies into what is there
    module._buffers["weight"] = torch.zeros(6 * tile_linear.SPARSE_TILE_BYTES, dtype=torch.uint8)
    check()
    of_call = {"tile_is_sparse": other.tile_is_sparse, "weight": other.weight}
    with torch.no_grad(), tensors_are_on_cuda():
        torch.func.functional_call(module, of_call, (x,))
    launch, words = host.last_launch(), tile_linear.make_schedule(other.tile_is_sparse)
    assert launch.payload == other.weight.data_ptr()
    assert words_at(launch.schedule_tiles - 12, words.numel()) == words.tolist()
    check()


def a_payload_of_another_size_is_refused(host):
    """A GPU would read beyond it. On a CPU the op refuses it."""
    module, x, launches = layer(256, 384), inputs(40, 384), host.counts()["launches"]
    module.weight = module.weight[: -tile_linear.SPARSE_TILE_BYTES].clone()
    try:
        call(module, x)
    except ValueError as error:
        assert "as its tile flags say, got" in str(error)
    else:
        raise AssertionError("a short payload was taken")
    fresh = TiledLinear(384, 256, payload_bytes=6 * tile_linear.SPARSE_TILE_BYTES)  # all-dense flags, not loaded yet
    try:
        call(fresh, x)
    except ValueError as error:
        assert f"expected {6 * tile_linear.DENSE_TILE_BYTES} bytes" in str(error)
    else:
        raise AssertionError("an empty layer was taken")
    assert host.counts()["launches"] == launches


def shapes_of_x(host):
    module = layer(256, 384)
    for shape in ((384,), (1, 384), (2, 3, 384), (1, 1, 5, 384)):
        x = torch.zeros(shape, dtype=torch.bfloat16)
        y = call(module, x)
        assert y.shape == (*shape[:-1], 256) and y.is_contiguous()
        check_launch(host, module, x, y)
    before = host.counts()["launches"]
    assert call(module, inputs(0, 384)).shape == (0, 256)
    assert host.counts()["launches"] == before
    for x in (inputs(384, 7).T, inputs(7, 400)[:, :384], inputs(1, 7 * 384 + 1)[0, 1:].view(7, 384)):
        call(module, x)  # copied to rows that start at multiples of 16 bytes
        launch = host.last_launch()
        assert (launch.tokens, launch.x_stride) == (7, 384) and launch.x % 16 == 0
    ragged = layer(130, 260)
    call(ragged, inputs(7, 260))
    assert (host.last_launch().x_stride, host.last_launch().x_map_stride_bytes) == (264, 528)


def training_does_not_overlap_what_is_before(host):
    module = layer(256, 384)
    call(module, inputs(1, 384))
    assert host.last_launch().overlaps == 1
    with tensors_are_on_cuda():
        module(inputs(1, 384).requires_grad_())
    assert host.last_launch().overlaps == 0


def group_call(layers, x, batch_invariant=False):
    weights = [(m.weight, m.tile_is_sparse, m.schedule, m.out_features, m.bias) for m in layers]
    return tile_linear.tile_linear_group(x, [value for weight in weights for value in weight], batch_invariant)


def check_group(host, layers, x, batch_invariant=False):
    """Layers whose own plans have as many splits are computed by one launch, with that split and their own tiles."""
    split_of = {}
    for module in layers:
        module.batch_invariant = batch_invariant
        call(module, x)
        split_of[id(module)] = host.last_launch().splits
    before = host.counts()["launches"]
    results = group_call(layers, x, batch_invariant)
    assert host.counts()["launches"] == before + len(set(split_of.values()))
    last = host.last_launch()
    together = [i for i, m in enumerate(layers) if split_of[id(m)] == last.splits]
    assert last.splits == max(split_of.values()) and last.layers == len(together)
    units = 0
    for i, got in zip(together, host.last_layers(), strict=True):
        module = layers[i]
        bias = 0 if module.bias is None else module.bias.data_ptr()
        assert (got.payload, got.bias, got.y) == (module.weight.data_ptr(), bias, results[i].data_ptr())
        words = tile_linear.make_schedule(module.tile_is_sparse)
        assert words_at(got.schedule_tiles - 12, words.numel()) == words.tolist()
        assert (got.rows, got.first_unit) == (module.out_features, units)
        rows_per_unit = 2 * last.row_ctas if last.tokens > 32 else 1
        units += -(-module.tile_is_sparse.shape[0] // rows_per_unit)
        if last.tokens > 32 and module.out_features % 8 == 0:
            assert (got.y_map_base, got.y_map_cols) == (got.y, got.rows)
    assert last.units == units and 1 <= last.workers <= units * -(-last.tokens // last.x_map_box_rows)
    return len(together)


def a_group_is_one_launch_for_each_split(host):
    alike = [layer(256, 384, seed=seed) for seed in range(4)]
    query = [layer(rows, 2048, seed=rows) for rows in (2048, 256, 130)]
    fused = 0
    for layers in (alike, alike[:2], query):
        for tokens in (1, 3, 32, 33, 64, 300):
            x = inputs(tokens, layers[0].in_features)
            for batch_invariant in (False, True):
                count = check_group(host, layers, x, batch_invariant)
                assert layers is query or count == len(layers)
                fused += count > 1
    assert fused > 10
    assert group_call(alike, inputs(0, 384))[3].shape == (0, 256)
    host.library.fake_set_device(2)  # an A100: a launch for each
    before = host.counts()["launches"]
    results = group_call(alike, inputs(3, 384))
    assert host.counts()["launches"] >= before + 4
    assert host.last_launch().y == results[-1].data_ptr()


def experts_module(experts, parts, rows, cols, bias, seed=0):
    """Matrices of small whole numbers, some of their tiles sparse."""
    generator = torch.Generator().manual_seed(seed)
    masks = [hybrid_mask(rows, cols, 0.5, generator) for _ in range(experts * parts)]
    weights = [torch.randint(-3, 4, (rows, cols), generator=generator).bfloat16() for _ in masks]
    biases = torch.randint(-3, 4, (experts, parts * rows), generator=generator).bfloat16() if bias else None
    keeps, flags = zip(*masks, strict=True)
    module = TiledExperts.pack(weights, keeps, flags, biases, parts=parts)
    dense = [torch.where(keep, weight, 0) for weight, keep in zip(weights, keeps, strict=True)]
    return module, torch.stack(dense).double().reshape(experts, parts * rows, cols)


def by_hand(module, dense, x, experts):
    """y of TiledExperts, every sum in float64."""
    rows = x.double()[torch.arange(len(experts)) // (len(experts) // len(x))]
    y = torch.einsum("pk,pnk->pn", rows, dense[experts])
    return (y if module.bias is None else y + module.bias[experts]).bfloat16()


def experts_get_their_tokens(host):
    """The launches compute here, in plain loops: every row of y is that of its token and expert, on every card."""
    generator = torch.Generator().manual_seed(0)
    host.library.fake_computes(True)
    for device in (0, 2):
        host.library.fake_set_device(device)
        for experts, parts, rows, cols, bias in (
            (6, 2, 136, 264, True),
            (12, 1, 130, 260, False),
            (3, 2, 128, 128, True),
        ):
            module, dense = experts_module(experts, parts, rows, cols, bias, seed=rows)
            for tokens, fan in ((1, 1), (1, 3), (5, 2), (40, 1), (70, 2)):
                x = torch.randint(-2, 3, (tokens, cols), generator=generator).bfloat16()
                chosen = torch.randint(0, experts, (tokens * fan,), generator=generator)
                expected = by_hand(module, dense, x, chosen)
                for module.batch_invariant in (False, True):
                    y = call_experts(module, x, chosen)
                    assert torch.equal(y, expected), (device, experts, tokens, fan)
                begins = tile_experts.matrix_begins(module.tile_is_sparse)
                args = module.weight, module.tile_is_sparse, None, begins, rows, parts, module.bias, False
                assert torch.equal(torch.ops.patch_kernels.tile_experts(x, chosen, *args), expected)  # unpacked
    host.library.fake_computes(False)
    host.library.fake_set_device(0)


@torch.no_grad()
def call_experts(module, x, chosen):
    with tensors_are_on_cuda():
        return module(x, chosen)


def check_experts_launch(host, module, experts_of):
    """The last launch is that of these (expert, first row of the sorted x, rows)."""
    launch, layers = host.last_launch(), host.last_layers()
    begins = tile_experts.matrix_begins(module.tile_is_sparse).tolist()
    rows, parts = module.out_features, module.parts
    expected = {
        module.weight.data_ptr() + begins[parts * expert + part]: (expert, part, begin, count)
        for expert, begin, count in experts_of
        for part in range(parts)
    }
    y = min(got.y - 2 * parts * rows * got.first_token for got in layers)
    units = 0
    for got in layers:
        expert, part, begin, count = expected.pop(got.payload)
        assert (got.first_token, got.tokens, got.rows, got.y_stride) == (begin, count, rows, parts * rows)
        assert got.y == y + 2 * (begin * parts + part) * rows
        bias = 0 if module.bias is None else module.bias.data_ptr() + 2 * (expert * parts + part) * rows
        assert got.bias == bias
        words = tile_linear.make_schedule(module.tile_is_sparse[parts * expert + part])
        assert words_at(got.schedule_tiles - 12, words.numel()) == words.tolist()
        assert got.first_unit == units
        is_prefill = launch.x_map_box_rows > 32
        units += -(-module.tile_is_sparse.shape[1] // (2 * launch.row_ctas if is_prefill else 1))
        if is_prefill and rows % 8 == 0:
            y_map = got.y_map_base, got.y_map_cols, got.y_map_rows, got.y_map_stride_bytes
            assert y_map == (got.y, rows, count, 2 * parts * rows)
    assert not expected and launch.units == units


def experts_are_launched_in_groups(host):
    """Sixteen matrices a launch, each with its own rows of one x, its place in y, its bytes, bias and schedule."""
    module, _ = experts_module(40, 2, 136, 264, True)
    chosen = torch.tensor([7, 3, 7, 39, 0, 3, 7, 0])
    x = inputs(8, 264)
    syncs, launches = host.counts()["syncs"], host.counts()["launches"]
    call_experts(module, x, chosen)
    assert host.counts()["launches"] == launches + 1 and host.counts()["syncs"] == syncs + 1
    launch = host.last_launch()
    assert (launch.layers, launch.tokens, launch.x_map_rows, launch.overlaps) == (8, 8, 8, 1)
    check_experts_launch(host, module, [(0, 0, 2), (3, 2, 2), (7, 4, 3), (39, 7, 1)])
    many = torch.cat([torch.full((50,), 9), torch.full((130,), 2)])  # of the sorted x expert 2 comes first
    call_experts(module, inputs(180, 264), many)
    assert host.last_launch().x_map_box_rows > 32
    check_experts_launch(host, module, [(2, 0, 130), (9, 130, 50)])
    for experts, per_launch in ((8, 16), (9, 9), (24, 16), (25, 13)):
        launches = host.counts()["launches"]
        call_experts(module, inputs(experts, 264), torch.arange(experts))
        assert host.counts()["launches"] == launches + -(-2 * experts // 16)
        assert host.last_launch().layers == per_launch
    few_last = torch.cat([torch.arange(8).repeat_interleave(40), torch.arange(8, 16)])
    call_experts(module, inputs(328, 264), few_last)  # those with like numbers of tokens are launched together
    check_experts_launch(host, module, [(expert, 40 * expert, 40) for expert in range(8)])
    with tensors_are_on_cuda():
        module(x.requires_grad_(), chosen)
    assert host.last_launch().overlaps == 0


def experts_are_launched_alone_elsewhere(host):
    """On an A100 a launch for each matrix, which is told the rows of x and the place in y that are its own."""
    module, _ = experts_module(40, 2, 136, 264, True)
    host.library.fake_set_device(2)
    launches = host.counts()["launches"]
    call_experts(module, inputs(8, 264), torch.tensor([7, 3, 7, 39, 0, 3, 7, 0]))
    launch, (got,) = host.last_launch(), host.last_layers()
    # With a split each is followed by one that adds the sums.
    assert host.counts()["launches"] == launches + 8 * (2 if launch.splits > 1 else 1)
    begins = tile_experts.matrix_begins(module.tile_is_sparse).tolist()
    assert got.payload == module.weight.data_ptr() + begins[2 * 7 + 1]  # has most tokens, so is the last
    assert (launch.tokens, got.first_token, got.tokens, got.y_stride) == (3, 0, 3, 272)
    host.library.fake_set_device(0)


def experts_are_split_by_their_launch(host):
    """As many splits as the planner has for the sum of the matrices; those of batch_invariant follow from the layer."""
    module, _ = experts_module(16, 1, 128, 2048, False)
    average = module.weight.numel() // 16
    seen = set()
    for experts in (1, 2, 3, 5, 8, 16):
        for tokens in (1, 5, 40, 300):
            x, chosen = inputs(experts * tokens, 2048), torch.arange(experts).repeat_interleave(tokens)
            choice = (ctypes.c_int * 6)()
            sizes = [ctypes.c_int64(n) for n in (128 * experts, 2048, tokens, average * experts)]
            assert host.library.patch_kernels_plan_choices(0, *sizes, choice, 1) == 1
            module.batch_invariant = False
            call_experts(module, x, chosen)
            launch = host.last_launch()
            assert (launch.x_map_box_rows, launch.token_ctas, launch.row_ctas, launch.splits) == tuple(choice)[:4]
            module.batch_invariant = True
            call_experts(module, x, chosen)
            seen.add((launch.splits, host.last_launch().splits))
    assert len({free for free, _ in seen}) > 1 and len({fixed for _, fixed in seen}) == 1


def experts_that_do_not_fit_are_refused(host):
    module, _ = experts_module(4, 1, 128, 128, False)
    x, chosen = inputs(2, 128), torch.tensor([0, 3])
    schedule, begins = (
        tile_experts.make_schedules(module.tile_is_sparse),
        tile_experts.matrix_begins(module.tile_is_sparse),
    )
    good = [module.weight, module.tile_is_sparse, schedule, begins]
    unaligned = torch.zeros(module.weight.numel() + 1, dtype=torch.uint8)[1:]
    for index, other, message in (
        (0, module.weight[:-128].clone(), f"payload has {module.weight.numel() - 128} bytes, but its tile flags need"),
        (0, unaligned, "payload must start at a multiple of 16 bytes; clone it"),
        (2, schedule[:, 1:].contiguous(), "schedule must be make_schedules(tile_is_sparse)"),
        (3, None, "begins must be matrix_begins(tile_is_sparse), on the CPU"),
        (3, begins[1:], "begins must be matrix_begins(tile_is_sparse), on the CPU"),
    ):
        args = [*good[:index], other, *good[index + 1 :]]
        try:
            torch.ops.patch_kernels.tile_experts(x, chosen, *args, 128, 1, None, False)
        except RuntimeError as error:
            assert f"tile_experts: {message}" in str(error)
        else:
            raise AssertionError(message)


def experts_are_not_captured(host):
    module, _ = experts_module(4, 1, 128, 128, False)
    call_experts(module, inputs(2, 128), torch.tensor([0, 3]))
    host.library.fake_capturing(True)
    try:
        call_experts(module, inputs(2, 128), torch.tensor([0, 3]))
    except RuntimeError as error:
        assert "expected a stream that is not captured, got one that is: the experts of the tokens are read" in str(
            error
        )
    else:
        raise AssertionError("a captured call was taken")
    finally:
        host.library.fake_capturing(False)
    for chosen in ([0, 4], [-1, 0]):
        try:
            call_experts(module, inputs(2, 128), torch.tensor(chosen))
        except RuntimeError as error:
            assert "tile_experts: experts must be 0 to 3, got" in str(error)
        else:
            raise AssertionError("an expert that is not there was taken")


def refused(host, module, x):
    """Whether the call took the way without our kernels, which ends here in this error."""
    try:
        call(module, x)
    except RuntimeError as error:
        return "unpacked" in str(error)
    return False


def a_check_that_finds_no_memory_is_repeated(host):
    module, x = layer(256, 384), inputs(1, 384)
    host.library.fake_set_device(3)
    host.library.fake_checks_card(True)
    host.library.fake_failure(b"cudaMalloc", MEMORY_ERROR)
    assert refused(host, module, x)
    status = host.status(3)
    assert status["state"] == "unchecked" and "could not run and is tried again" in status["reason"]
    assert host.library.fake_capture_mode() == GLOBAL_MODE
    host.library.fake_failure(b"", 0)
    host.library.fake_checks_card(False)
    check_launch(host, module, x, call(module, x), 3)
    assert host.status(3) == {"family": "sm90", "state": "works", "reason": ""}


def a_check_works_while_another_thread_captures(host):
    """Allocating, waiting and freeing fail in fake_cuda.cpp in any other mode than the relaxed one.

    Nothing is launched, so all families are wrong, and found so.
    """
    host.library.fake_set_device(4)
    host.library.fake_checks_card(True)
    syncs = host.counts()["syncs"]
    assert refused(host, layer(256, 384), inputs(1, 384))
    status = host.status(4)
    assert (status["family"], status["state"]) == ("none", "disabled")
    for kernels in ("wgmma", "mma"):
        assert f"the {kernels} kernels failed their self-check (fp16, " in status["reason"]
    assert "expected" in status["reason"]
    assert host.counts()["syncs"] > syncs and host.library.fake_capture_mode() == GLOBAL_MODE


def a_launch_that_fails_in_the_check_leaves_the_mode_as_it_was(host):
    host.library.fake_set_device(5)
    host.library.fake_checks_card(True)
    host.library.fake_failure(b"cudaLaunchKernelExC", LAUNCH_ERROR)
    assert refused(host, layer(256, 384), inputs(1, 384))
    assert "fake error 719" in host.status(5)["reason"]
    assert host.library.fake_capture_mode() == GLOBAL_MODE


def nothing_is_checked_while_the_stream_is_captured(host):
    module, x = layer(256, 384), inputs(1, 384)
    host.library.fake_set_device(6)
    host.library.fake_capturing(True)
    assert refused(host, module, x) and host.status(6)["state"] == "unchecked"
    host.library.fake_capturing(False)
    check_launch(host, module, x, call(module, x), 6)
    host.library.fake_capturing(True)
    check_launch(host, module, x, call(module, x), 6)


def another_process_decides_the_family(host):
    module, x = layer(256, 384), inputs(40, 384)
    limit = host.library.patch_kernels_limit_family
    limit.restype = ctypes.c_char_p
    assert json.loads(limit(7, b"sm80", b"hung")) == {"refused": ""}
    host.library.fake_set_device(7)
    check_launch(host, module, x, call(module, x), 7)
    assert host.status(7) == {"family": "sm80", "state": "works", "reason": "hung"}
    assert json.loads(limit(7, b"none", b"late")) == {"refused": "the device was checked before"}
    assert json.loads(limit(8, b"none", b"both hung")) == {"refused": ""}
    host.library.fake_set_device(8)
    assert refused(host, module, x)
    assert host.status(8) == {"family": "none", "state": "disabled", "reason": "both hung"}
    assert "got sm91" in json.loads(limit(9, b"sm91", b""))["refused"]


def threads_share_nothing(host):
    """First calls on one device from many threads, each with layers and tokens of its own."""
    host.library.fake_set_device(10)
    modules = [layer(256, 384, seed=seed) for seed in range(8)]
    wrong = []

    def work(module, tokens):
        x = inputs(tokens, 384)
        with torch.no_grad():
            for _ in range(200):
                if module(x).shape != (tokens, 256):
                    wrong.append(tokens)

    with tensors_are_on_cuda():
        threads = [threading.Thread(target=work, args=(module, 1 + 9 * i)) for i, module in enumerate(modules)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and host.status(10)["state"] == "works"


def bad_calls_are_refused(host):
    module, x = layer(256, 384), inputs(2, 384)
    good = [x, module.weight, module.tile_is_sparse, module.schedule, 256, module.bias, False]
    launches = host.counts()["launches"]
    for place, value, words in (
        (0, x.float(), "x must be float16 or bfloat16"),
        (0, torch.zeros((), dtype=torch.bfloat16), "x needs at least one dimension"),
        (0, inputs(2, 512), "tile_is_sparse must be contiguous uint8 of shape"),
        (1, module.weight.view(torch.int8), "payload must be a contiguous 1-D uint8 tensor"),
        (1, torch.zeros(module.weight.numel() + 1, dtype=torch.uint8)[1:], "multiple of 16 bytes; clone it"),
        (2, module.tile_is_sparse.bool(), "tile_is_sparse must be contiguous uint8"),
        (3, module.schedule[1:], "schedule must come from make_schedule"),
        (3, module.schedule.long(), "schedule must come from make_schedule"),
        (5, module.bias.float(), "bias must have x's dtype"),
    ):
        arguments = [*good]
        arguments[place] = value
        try:
            OP(*arguments)
        except RuntimeError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"argument {place} was taken: {words}")
    assert host.counts()["launches"] == launches
    OP(*good)
    assert host.counts()["launches"] == launches + 1


CASES = [
    every_launch_is_that_of_its_call,
    maps_are_kept_for_equal_memory_alone,
    plans_are_kept_for_equal_calls_alone,
    new_state_is_used_at_once,
    a_payload_of_another_size_is_refused,
    shapes_of_x,
    training_does_not_overlap_what_is_before,
    a_group_is_one_launch_for_each_split,
    experts_get_their_tokens,
    experts_are_launched_in_groups,
    experts_are_launched_alone_elsewhere,
    experts_are_split_by_their_launch,
    experts_that_do_not_fit_are_refused,
    experts_are_not_captured,
    a_check_that_finds_no_memory_is_repeated,
    a_check_works_while_another_thread_captures,
    a_launch_that_fails_in_the_check_leaves_the_mode_as_it_was,
    nothing_is_checked_while_the_stream_is_captured,
    another_process_decides_the_family,
    threads_share_nothing,
    bad_calls_are_refused,
]


def main() -> None:
    """Run all cases with the library that is named; print {case: "" or what went wrong} as JSON."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of the kernels that are replaced
        host = CudaHost(Path(sys.argv[1]))
    results = {}
    for case in CASES:
        try:
            case(host)
            results[case.__name__] = ""
        except Exception:
            results[case.__name__] = traceback.format_exc()
        host.library.fake_set_device(0)
        host.library.fake_checks_card(False)
        host.library.fake_capturing(False)
        host.library.fake_failure(b"", 0)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
