"""The GEMM's host plan: schedules, cuts along K, dealing of items, and the choice of kernel."""

from __future__ import annotations

import heapq
import math
import random
import re
from itertools import chain

import pytest
import torch
from support import ROOT

from benchmarks import shapes
from benchmarks.ops import plan_table
from patch_kernels.ops import tile_linear

host = pytest.importorskip("patch_kernels._host", reason="built without pybind11")

DENSE, SPARSE = 32768, 18432
GRIDS = [(1, 1), (1, 9), (2, 1), (3, 4), (8, 8), (33, 32), (17, 112)]


def random_flags(rows: int, cols: int, share: float, seed: int = 0) -> list[list[bool]]:
    generator = random.Random(seed)
    return [[generator.random() < share for _ in range(cols)] for _ in range(rows)]


def nearest_cuts(column_bytes: list[int]) -> list[int]:
    """For each eighth of the bytes the column whose prefix is nearest to it; ties to the smaller column."""
    prefix = [0]
    for size in column_bytes:
        prefix.append(prefix[-1] + size)
    total = prefix[-1]
    return [min(range(len(prefix)), key=lambda i: (abs(8 * prefix[i] - c * total), i)) for c in range(9)]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("grid", GRIDS)
def test_schedule_against_plain_python(grid, share):
    rows, cols = grid
    flags = random_flags(rows, cols, share)
    words = host.make_schedule(flags)
    parts = host.read_schedule(words)
    size = [[SPARSE if flag else DENSE for flag in row] for row in flags]

    order = parts["order"]
    assert order == sorted(range(rows), key=lambda r: -sum(size[r]))
    entries, offset = [], 0
    for flag, bytes_ in zip(chain(*flags), chain(*size), strict=True):
        entries.append((offset, flag))
        offset += bytes_
    assert parts["tiles"] == list(chain(*(entries[r * cols : (r + 1) * cols] for r in order)))
    for u, row in enumerate(order):
        assert parts["row_cuts"][9 * u : 9 * u + 9] == nearest_cuts(size[row])
    for u in range(-(-rows // 2)):
        pair = [size[r] for r in order[2 * u : 2 * u + 2]]
        assert parts["pair_cuts"][9 * u : 9 * u + 9] == nearest_cuts(
            [sum(column) for column in zip(*pair, strict=True)]
        )
    assert len(words) == tile_linear.schedule_words(grid)
    assert torch.equal(tile_linear.make_schedule(torch.tensor(flags)), torch.tensor(words, dtype=torch.int32))


def test_offsets_beyond_two_gigabytes():
    """Offsets are in units of 2048 bytes with one bit for the type: 32 bits reach 4 TiB."""
    flags = [[False] * 300 for _ in range(300)]
    at, is_sparse = host.read_schedule(host.make_schedule(flags))["tiles"][-1]
    assert at == (300 * 300 - 1) * DENSE > 2**31 and not is_sparse


def test_schedule_refuses_what_it_did_not_make():
    with pytest.raises(ValueError, match="words made by make_schedule"):
        host.read_schedule([0] * 20)
    with pytest.raises(ValueError, match="rows of equal length"):
        host.make_schedule([[True], [True, False]])


@pytest.mark.parametrize("space", [(1, 1, 1, 1), (5, 3, 2, 4), (16, 7, 3, 66), (112, 32, 5, 33), (7, 10, 10, 7)])
def test_every_item_is_dealt_once(space):
    units, groups, _, workers = space
    dealt = host.items(*space)
    assert len(dealt) == workers
    assert sorted(chain(*dealt)) == [(u, g) for u in range(units) for g in range(groups)]
    counts = {len(items) for items in dealt}
    assert max(counts) - min(counts) <= 1


def test_items_refuse_empty_spaces():
    with pytest.raises(ValueError, match="four numbers >= 1"):
        host.items(1, 0, 1, 1)


def makespan_of_lpt(costs: list[float], workers: int) -> float:
    """Longest processing time first: each item to the worker that is free first."""
    loads = [0.0] * workers
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(loads, loads[0] + cost)
    return max(loads)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
@pytest.mark.parametrize(("rows", "cols", "groups", "workers"), [(32, 32, 16, 66), (172, 32, 16, 66), (224, 32, 1, 33)])
def test_snake_dealing_is_near_longest_processing_time_first(rows, cols, groups, workers, share):
    """Units come by decreasing bytes, so the snake needs no table. Sparse tiles cost 0.68 of dense ones here."""
    flags = random_flags(rows, cols, share, seed=rows)
    order = host.read_schedule(host.make_schedule(flags))["order"]
    cost = [sum(0.68 if flags[r][k] else 1.0 for k in range(cols)) for r in order]
    loads = [sum(cost[unit] for unit, _ in items) for items in host.items(rows, groups, groups, workers)]
    assert max(loads) <= 1.05 * makespan_of_lpt(cost * groups, workers)


def payload_bytes(rows, cols, sparsity=0.45):
    tiles = math.ceil(rows / 128) * math.ceil(cols / 128)
    return tiles * DENSE - round(2 * sparsity * tiles) * (DENSE - SPARSE)


def plan(rows, cols, tokens, sparsity=0.45, *, batch_invariant=False, constants=None, **limits):
    payload = payload_bytes(rows, cols, sparsity)
    return host.choose_plan(
        rows, cols, tokens, payload, batch_invariant, host.DeviceLimits(**limits), constants=constants or {}
    )


def shape_of(p):
    return tuple(p[name] for name in ("bn", "token_ctas", "row_ctas", "splits", "depth"))


SHAPES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (1024, 4096), (128, 128), (57344, 8192)]
TOKENS = [1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 200, 512, 1024, 4096, 8192]


SMEM_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376}


@pytest.mark.parametrize("capability", SMEM_BYTES)
@pytest.mark.parametrize("shape", SHAPES)
def test_plans_are_possible(shape, capability):
    smem = SMEM_BYTES[capability]
    for tokens in TOKENS:
        for sparsity in (0.0, 0.25, 0.5):
            p = plan(*shape, tokens, sparsity, compute_capability=capability, smem_bytes=smem, sm_count=100)
            assert p["family"] == ("sm90" if capability == 90 else "sm80")
            assert p["groups"] * p["bn"] * p["token_ctas"] >= tokens
            assert p["units"] == math.ceil(math.ceil(shape[0] / 128) / (2 * p["row_ctas"] if p["pairs"] else 1))
            assert p["row_ctas"] in (1, 2) and p["splits"] in (1, 2, 4, 8) and p["splits"] <= max(1, shape[1] // 128)
            assert 1 <= p["workers"] <= p["units"] * p["groups"]
            assert p["token_ctas"] * p["row_ctas"] * p["splits"] <= 8 and (p["row_ctas"] == 1 or p["splits"] == 1)
            if capability == 90:
                assert p["bn"] in ((64, 128, 160, 176, 192) if p["pairs"] else (8, 16, 32))
                assert p["splits"] == 1 or p["bn"] <= 128
                assert p["pairs"] == (tokens > 32)
                assert p["workers"] * p["token_ctas"] * p["row_ctas"] * p["splits"] <= 100
            else:
                assert p["bn"] in (16, 32, 128) and not p["pairs"] and p["token_ctas"] == 1
                assert p["depth"] in ((2, 4) if p["bn"] <= 32 else (1, 3))


def test_decode_fills_the_card():
    """Layers with few tile rows are split along K, so that most of 132 multiprocessors have work."""
    for shape in SHAPES[:4]:
        for tokens in (1, 16, 64):
            p = plan(*shape, tokens)
            assert p["workers"] * p["splits"] * p["token_ctas"] * p["row_ctas"] > 80, (shape, tokens, p)


def test_prefill_does_not_split():
    for shape in SHAPES[:4]:
        p = plan(*shape, 8192)
        assert p["splits"] == 1 and p["bn"] >= 128


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_invariant_plans_split_alike(shape, capability):
    splits = {
        plan(*shape, t, batch_invariant=True, compute_capability=capability, smem_bytes=166912)["splits"]
        for t in TOKENS
    }
    assert len(splits) == 1


def test_unknown_cards_and_sizes_take_the_dense_path():
    for capability in (70, 75, 100, 103, 110):
        assert plan(4096, 4096, 16, compute_capability=capability) == {"family": "unpack"}
    assert plan(4096, 4096, 2**31) == {"family": "unpack"}


def test_a_plan_is_the_one_of_least_time():
    for rows, cols in SHAPES:
        for tokens in TOKENS:
            payload = payload_bytes(rows, cols)
            calls = [(rows, cols, tokens, payload, *choice, 0) for choice in host.possible_choices(cols, tokens)]
            p = plan(rows, cols, tokens)
            times = host.model_times_us(calls)
            assert p["model_us"] == min(times)
            assert calls[times.index(min(times))][4:9] == shape_of(p)
            given = host.model_times_us([(rows, cols, tokens, payload, *shape_of(p), p["workers"])])
            assert given == [p["model_us"]]


# Constants of a card on which nothing takes time but what a test names: one cycle a microsecond, no fixed costs.
ENDLESS = 1e30
FREE = dict.fromkeys([name for name in host.model_constants() if name.endswith("_cycles")], 0.0) | {
    "cycles_per_us": 1.0,
    "memory_bytes_per_cycle": ENDLESS,
    "link_bytes_per_cycle": ENDLESS,
    "cluster_bytes_per_cycle": ENDLESS,
    "shared_bytes_per_cycle": ENDLESS,
    "macs_per_cycle": ENDLESS,
}


def cycles(shape, choice, *, sparsity=0.0, tokens=None, workers=1, **constants):
    tokens = choice[0] * choice[1] if tokens is None else tokens
    call = (*shape, tokens, payload_bytes(*shape, sparsity), *choice, workers)
    return host.model_times_us([call], constants=FREE | constants)[0]


@pytest.mark.parametrize(
    ("bn", "sparse_shared", "sparse_mma", "dense_shared", "dense_mma"),
    [(64, 592, 256, 832, 512), (128, 912, 512, 1152, 1024), (192, 1232, 768, 1472, 1536)],
)
def test_cycles_of_a_tile(bn, sparse_shared, sparse_mma, dense_shared, dense_mma):
    """A pair of tiles, one of each consumer. Worked out by hand for 128 tokens and a sparse tile: 8 wgmma.sp m64n128k32
    read 64 x 16 kept values and 32 columns of 128 tokens each (10240 bytes); 18432 bytes of W are written, and a half
    of the 32768 of x, which both tiles use. All at 128 bytes a cycle: 640 + 144 + 128. A wgmma.sp takes 64 cycles."""
    one_pair, choice = (256, 128), (bn, 1, 1, 1, 0)
    for sparsity, shared, mma in ((0.5, sparse_shared, sparse_mma), (0.0, dense_shared, dense_mma)):
        given = dict(sparsity=sparsity, shared_bytes_per_cycle=128.0, macs_per_cycle=2048.0)
        assert cycles(one_pair, choice, sparsity=sparsity, shared_bytes_per_cycle=128.0) == 2 * shared
        assert cycles(one_pair, choice, sparsity=sparsity, macs_per_cycle=2048.0) == 2 * mma
        assert cycles(one_pair, choice, **given) == 2 * max(shared, mma)
        writes = ((SPARSE if sparsity else DENSE) + 128 * bn) / 128  # a half of x's 128 columns x bn x 2 bytes
        assert cycles(one_pair, choice, **given, shared_write_share=0.0) == 2 * max(shared - writes, mma)
    # Decode: one tile row, to which the whole of x goes.
    assert cycles((128, 128), (8, 1, 1, 1, 0), shared_bytes_per_cycle=128.0) == 16 * (16 + 2) + 256 + 2 * 8


def test_cycles_of_copies_and_ends():
    shape = (512, 1024)  # two pairs, 16 steps
    w, x = 16384, 64 * 2 * 128
    for token_ctas, row_ctas in ((1, 1), (2, 1), (1, 2), (2, 2)):
        choice = (128, token_ctas, row_ctas, 1, 0)
        rounds = 2 // row_ctas
        link = cycles(shape, choice, link_bytes_per_cycle=26.0)
        assert link == pytest.approx(rounds * 16 * (2 * w / token_ctas + x / row_ctas) / 26)
        ends = cycles(shape, choice, item_cycles=1000.0, item_token_cycles=10.0)
        assert ends == rounds * (1000 + 1280)
        # The end of the last item comes after the last copy, those of the others beside copies.
        both = cycles(shape, choice, link_bytes_per_cycle=26.0, item_cycles=1000.0)
        assert both == pytest.approx(link + 1000)
    moved = payload_bytes(*shape) + 2 * 128 * (512 + 1024)
    one_token_tile = (128, 1, 1, 1, 0)
    assert cycles(shape, one_token_tile, sparsity=0.45, memory_bytes_per_cycle=100.0) == pytest.approx(moved / 100)
    assert cycles(shape, one_token_tile, launch_cycles=7.0) == 7
    half = cycles((256, 1024), one_token_tile, sparsity=0.25, switch_cycles=50.0)
    assert half == 16 * 2 * 0.25 * 50  # 16 steps of two rows; a step ends in a change one time out of four


@pytest.mark.parametrize(("bn", "rows", "turns"), [(8, 128, 1), (32, 128, 2), (64, 256, 2), (128, 256, 4)])
@pytest.mark.parametrize("splits", [2, 4, 8])
def test_cycles_of_an_exchange(bn, rows, turns, splits):
    shape, choice = (rows, 1024), (bn, 1, 1, splits, 0)
    sums = 4 * rows * bn
    assert cycles(shape, choice, exchange_turn_cycles=1500.0) == 1500 * turns
    sent = cycles(shape, choice, cluster_bytes_per_cycle=16.0)
    assert sent == pytest.approx(sums * (splits - 1) / splits / 16)
    assert cycles(shape, choice, exchange_output_cycles=30.0) == rows * bn / splits / 256 * 30
    assert cycles(shape, choice, item_token_cycles=10.0) < 1e-9  # y does not go through staging buffers


def test_ampere_writes_and_reads_partial_sums():
    limits = host.DeviceLimits(80, 108, 166912)
    call = (4096, 4096, 16, payload_bytes(4096, 4096), 16, 1, 1)
    rate = {"memory_bytes_per_cycle": 132.0, "sm80_macs_per_cycle": ENDLESS}
    one, two = host.model_times_us([(*call, 1, 4, 1), (*call, 2, 4, 1)], limits, FREE | rate)
    assert two - one == pytest.approx(2 * 4 * 2 * 16 * 4096 / 108)
    launch = {"sm80_macs_per_cycle": ENDLESS, "sm80_reduce_cycles": 10.0}
    assert host.model_times_us([(*call, 1, 4, 1), (*call, 2, 4, 1)], limits, FREE | launch) == pytest.approx([0, 10])


def test_every_constant_counts():
    """A lower rate or a higher cost makes some plan slower and none faster."""
    for name, value in host.model_constants().items():
        ampere = name.startswith("sm80")
        limits = host.DeviceLimits(80, 108, 166912) if ampere else host.DeviceLimits()
        calls = [
            (rows, cols, tokens, payload_bytes(rows, cols), *choice, 0)
            for rows, cols in SHAPES
            for tokens in TOKENS
            for choice in host.possible_choices(cols, tokens, limits)
        ]
        before = host.model_times_us(calls, limits)
        factor = 0.5 if name.endswith(("_per_us", "_per_cycle")) else 2
        after = host.model_times_us(calls, limits, {name: factor * value})
        changes = [b - a for a, b in zip(before, after, strict=True)]
        assert min(changes) >= 0 and max(changes) > 0, name


def test_a_slower_card_is_planned_for():
    assert plan(4096, 4096, 16)["splits"] > 1
    assert plan(4096, 4096, 16, constants={"exchange_turn_cycles": 1e6})["splits"] == 1
    with pytest.raises(ValueError, match=r"expected names of model_constants\(\), got one that is not there"):
        plan(4096, 4096, 16, constants={"exchange": 1.0})


def test_equal_times_share_most():
    """Where copies do not bound the time, the widest sharing of W and x is taken."""
    p = plan(4096, 4096, 4096, constants={"link_bytes_per_cycle": ENDLESS}, clusters=[128, 64, 32, 16])
    assert (p["token_ctas"], p["row_ctas"]) == (2, 2)


DEVICES = {
    "A100": dict(compute_capability=80, sm_count=108, smem_bytes=166912),
    "4090": dict(compute_capability=89, sm_count=128, smem_bytes=101376),
    "5090": dict(compute_capability=120, sm_count=170, smem_bytes=101376),
    "H100": dict(clusters=[132, 66, 32, 16]),
    "H100, not asked": {},
    "H100, a slice of 16 SMs": dict(sm_count=16, clusters=[16, 8, 3, 0]),
    "H100, a slice of 7 SMs without clusters": dict(sm_count=7, clusters=[7, 0, 0, 0]),
}


@pytest.mark.parametrize("device", DEVICES)
def test_the_self_check_covers_every_plan(device):
    limits = host.DeviceLimits(**DEVICES[device])
    shapes = host.launch_shapes(limits)
    assert len(set(shapes)) == len(shapes)
    for is_half in (True, False):
        *complete, full = host.self_checks(limits, is_half)
        layers = [(check["layers"], check["own_tokens"]) for check in complete]
        grouped = [(3, False), (5, True)] if DEVICES[device].get("compute_capability", 90) == 90 else []
        assert layers == [(1, False), (1, False), *grouped]
        for check in complete:
            assert [shape for shape, _ in check["launches"]] == shapes
        assert {shape for shape, _ in full["launches"]} <= set(shapes)
    random_sizes = random.Random(1)
    sizes = [(*shape, tokens) for shape in SHAPES for tokens in TOKENS]
    sizes += [tuple(int(2 ** random_sizes.uniform(0, 14)) for _ in range(3)) for _ in range(300)]
    sizes += [(128, 128 * columns, tokens) for columns in range(1, 9) for tokens in (1, 9, 17, 33, 200)]
    taken = set()
    for rows, cols, tokens in sizes:
        for sparsity in (0.0, 0.25, 0.45, 0.5):
            for batch_invariant in (False, True):
                p = plan(rows, cols, tokens, sparsity, batch_invariant=batch_invariant, **DEVICES[device])
                taken.add(shape_of(p))
        possible = host.possible_choices(cols, tokens, limits)
        assert set(possible) <= set(shapes)
    assert taken <= set(shapes)
    assert len(taken) >= len(shapes) // 3  # the sizes above are not all alike


def test_the_self_check_has_a_long_and_a_full_problem():
    for capability in (80, 90):
        clusters = [132, 66, 32, 15] if capability == 90 else None
        limits = host.DeviceLimits(capability, 132, SMEM_BYTES[capability], clusters)
        for is_half in (True, False):
            small, long, *_, full = host.self_checks(limits, is_half)
            assert math.ceil(long["cols"] / 128) >= 16
            for check in (small, long, full):
                assert check["rows"] % 128 and check["cols"] % 64 and check["tokens"] % 8
                assert check["cols"] % 8 == (5 if is_half else 0) and check["rows"] % 8 == (0 if is_half else 3)
            assert {workers for _, (_, _, _, workers) in small["launches"]} == ({1, 2} if capability == 90 else {2})
            for _, (units, groups, _, workers) in small["launches"]:
                assert units * groups >= 2 * workers
            counts = {1: 132, 2: 66, 4: 32 if capability == 90 else 33, 8: 15 if capability == 90 else 16}
            for (_, token_ctas, row_ctas, splits, _), (units, groups, _, workers) in full["launches"]:
                assert workers == counts[token_ctas * row_ctas * splits]
                assert units * groups >= 2 * workers
            sizes = {shape[1] * shape[2] * shape[3] for shape, _ in full["launches"]}
            assert sizes == {1, 2, 4, 8}


def test_clusters_that_a_slice_cannot_run_are_not_chosen():
    """A card that was asked and runs no cluster of a size is not one that was not asked."""

    def sizes(clusters):
        shapes = host.launch_shapes(host.DeviceLimits(sm_count=14, clusters=clusters))
        return {token_ctas * row_ctas * splits for _, token_ctas, row_ctas, splits, _ in shapes}

    assert sizes(None) == {1, 2, 4, 8}
    assert sizes([14, 7, 3, 1]) == {1, 2, 4, 8}
    assert sizes([14, 7, 3, 0]) == {1, 2, 4}
    assert sizes([14, 7, 0, 0]) == {1, 2}
    assert sizes([14, 0, 0, 0]) == {1}
    for batch_invariant in (False, True):
        for tokens in TOKENS:
            p = plan(4096, 4096, tokens, batch_invariant=batch_invariant, sm_count=14, clusters=[14, 7, 3, 0])
            assert p["token_ctas"] * p["row_ctas"] * p["splits"] <= 4
            assert p["workers"] <= [14, 7, 0, 3][p["token_ctas"] * p["row_ctas"] * p["splits"] - 1]


def test_a_slice_that_runs_nothing_does_not_use_the_family():
    nothing = host.DeviceLimits(sm_count=14, clusters=[0, 0, 0, 0])
    assert plan(4096, 4096, 16, sm_count=14, clusters=[0, 0, 0, 0]) == {"family": "unpack"}
    assert host.launch_shapes(nothing) == []
    assert host.family_complaint(nothing) == (
        "the card, or this slice of it, has no multiprocessor that runs a CTA with the 232448 bytes of shared memory "
        "that the wgmma kernels take"
    )
    for usable in (host.DeviceLimits(), host.DeviceLimits(clusters=[7, 0, 0, 0]), host.DeviceLimits(80, 108, 166912)):
        assert host.family_complaint(usable) == ""


def test_docs_list_every_constant():
    """Its value in csrc, a unit, a source or the word guess, and a program that measures it."""
    text = (ROOT / "docs" / "inside" / "gemm.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    assert {name: float(value) for name, value, *_ in rows} == host.model_constants()
    for name, _, unit, source, measured in rows:
        assert unit.strip() and len(source.strip()) >= 5, name
        programs = re.findall(r"`build/gpu/(\w+)`", measured)
        for program in programs:
            assert (ROOT / "benchmarks" / "micro" / f"{program}.cu").is_file(), name
        assert programs or "`--fit`" in measured, name


def test_the_table_of_plans_is_up_to_date():
    text = plan_table.TABLE.read_text(encoding="utf-8")
    assert plan_table.table(text) == text, "run python -m benchmarks.ops.plan_table"
    assert "nothing measured" in text.splitlines()[0]
    earlier = plan_table.earlier_plans(text)
    assert len(earlier) == len(plan_table.layers()) * len(shapes.TOKENS) == 121
    assert earlier[12288, 4096, 4096] == ((176, 2, 2, 1, 0), "313.80")
