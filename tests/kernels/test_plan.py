"""The GEMM's host plan: schedules, cuts along K, dealing of items, and the choice of kernel."""

from __future__ import annotations

import heapq
import math
import random
from itertools import chain

import pytest
import torch

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


def plan(rows, cols, tokens, sparsity=0.45, **kwargs):
    tiles = -(-rows // 128) * -(-cols // 128)
    payload = tiles * DENSE - round(2 * sparsity * tiles) * (DENSE - SPARSE)
    return host.choose_plan(rows, cols, tokens, payload, **kwargs)


SHAPES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (1024, 4096), (128, 128), (57344, 8192)]
TOKENS = [1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 200, 512, 1024, 4096, 8192]


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("shape", SHAPES)
def test_plans_are_possible(shape, capability):
    smem = {80: 166912, 90: 232448}.get(capability, 101376)
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
    """Layers with few tile rows are split along K, so that most multiprocessors have work."""
    for shape in SHAPES[:4]:
        for tokens in (1, 16, 64):
            p = plan(*shape, tokens)
            assert p["workers"] * p["splits"] * p["token_ctas"] * p["row_ctas"] >= 96, (shape, tokens, p)


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
