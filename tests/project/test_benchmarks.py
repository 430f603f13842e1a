"""The benchmarks and the GPU runner, as far as a CPU can run them: arithmetic, order, control flow, messages."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
import transformers
from support import ROOT

import patch_kernels.ops.masked_weight
from benchmarks import harness, shapes
from benchmarks.card import build as card_build
from benchmarks.card import checks as card_checks
from benchmarks.card import made_plans, mask_checks, stages
from benchmarks.card import run as card_run
from benchmarks.ops import (
    bench_adamw,
    bench_learn_step,
    bench_masked_weight,
    bench_plans,
    bench_tile_experts,
    bench_tile_linear,
    bench_tile_linear_cpu,
)
from benchmarks.rivals import eager_masks, peer_ggml, peer_llama_cpp
from benchmarks.studies import generate, generate_report, generate_worker, memory_table, mixture_decode
from patch.learn.masked_linear import MaskedLinear
from patch_kernels import TiledLinear, masked_weight, payload_bytes
from patch_kernels.ops import tile_linear

HAVE_HOST = importlib.util.find_spec("patch_kernels._host") is not None

# 12288 x 4096 is 96 x 32 = 3072 tiles.
QKV_16 = shapes.Cell("llama-2-7b", "qkv", 12288, 4096, 16)


def test_bytes_and_flops_by_hand():
    assert shapes.sparse_tiles(12288, 4096, 0.25) == 1536
    assert shapes.weight_bytes(12288, 4096, 0.0) == 2 * 12288 * 4096
    assert shapes.weight_bytes(12288, 4096, 0.25) == 1536 * 18432 + 1536 * 32768
    assert shapes.weight_bytes(12288, 4096, 0.5) == 2 * 12288 * 4096 * 9 // 16
    assert shapes.call_bytes(QKV_16, 0.0) == 2 * 12288 * 4096 + 2 * 16 * (12288 + 4096)
    assert shapes.effective_flops(QKV_16) == 2 * 16 * 12288 * 4096
    assert shapes.executed_flops(QKV_16, 0.0) == shapes.effective_flops(QKV_16)
    assert shapes.executed_flops(QKV_16, 0.25) == 0.75 * shapes.effective_flops(QKV_16)
    assert shapes.executed_flops(QKV_16, 0.5) == 0.5 * shapes.effective_flops(QKV_16)


def test_weight_bytes_is_what_packing_makes():
    tiled = bench_tile_linear.packed_weight(torch.randn(256, 640).bfloat16(), 0.35)
    assert tiled.payload.numel() == shapes.weight_bytes(256, 640, 0.35) == payload_bytes(tiled.tile_is_sparse)
    assert int(tiled.tile_is_sparse.sum()) == shapes.sparse_tiles(256, 640, 0.35) == 7


# By hand for an H200: bytes over its bandwidth at M=1 and 64, FLOP over its peak at M=4096.
@pytest.mark.parametrize(
    ("tokens", "sparsity", "microseconds"), [(1, 0.0, 21.0), (1, 0.5, 11.8), (64, 0.0, 21.4), (4096, 0.0, 417)]
)
def test_roofline_of_the_design(tokens, sparsity, microseconds):
    cell = shapes.Cell("llama-2-7b", "qkv", 12288, 4096, tokens)
    assert 1e6 * shapes.roofline_seconds(cell, sparsity, 4.8) == pytest.approx(microseconds, rel=0.01)


def test_rated_bandwidth_by_card():
    assert shapes.bandwidth_tbps("NVIDIA H200") == 4.8
    assert shapes.bandwidth_tbps("NVIDIA H100 80GB HBM3") == 3.35
    assert shapes.bandwidth_tbps("NVIDIA H100 PCIe") == 2.0
    assert shapes.bandwidth_tbps("NVIDIA GH200 480GB") == 4.0
    with pytest.raises(ValueError, match=r"expected one of H200, .* got 'NVIDIA A10'. Pass --bandwidth TB/s"):
        shapes.bandwidth_tbps("NVIDIA A10")


def test_mask_bytes_by_hand():
    # A group: weight 8 + masked 8 + logits 24 or 12 or half a byte; backward the gradients of the logits besides.
    for mode in ("joint", "maskllm"):
        assert shapes.mask_forward_bytes(4, 8, mode) == 8 * (8 + 8 + 24)
        assert shapes.mask_forward_bytes(4, 8, mode, logit_bytes=2) == 8 * (8 + 8 + 12)
        assert shapes.mask_forward_bytes(4, 8, mode, weight_bytes=4) == 8 * (16 + 16 + 24)
        assert shapes.mask_backward_bytes(4, 8, mode) == 8 * (8 + 8 + 24 + 24)
        assert shapes.mask_backward_bytes(4, 8, mode, logit_bytes=2) == 8 * (8 + 8 + 12 + 12)
        assert shapes.mask_backward_bytes(4, 8, mode, writes_masked=True) == 8 * (8 + 8 + 24 + 24 + 8)
    assert shapes.mask_forward_bytes(4, 8, "tile") == 8 * (8 + 8 + 0.5)
    assert shapes.mask_backward_bytes(4, 8, "tile") == 8 * (8 + 8 + 0.5)
    # numbers of one 8192x8192 layer on an H200: 140 us and 224 us
    assert 1e6 * shapes.mask_forward_bytes(8192, 8192, "joint") / 4.8e12 == pytest.approx(139.8, rel=1e-3)
    assert 1e6 * shapes.mask_backward_bytes(8192, 8192, "joint") / 4.8e12 == pytest.approx(223.7, rel=1e-3)
    assert bench_learn_step.logit_state_bytes(1000, 4) == 24_000


def test_cells_put_the_most_informative_first():
    cells = shapes.cells(list(shapes.MODELS), list(shapes.TOKENS))
    assert len(cells) == len(set(cells)) == 3 * 11 * 4
    assert [(c.layer, c.tokens) for c in cells[:4]] == [("qkv", 16), ("o", 16), ("gate_up", 16), ("down", 16)]
    assert [(c.model, c.tokens) for c in cells[:12:4]] == [("llama-2-7b", 16), ("llama-2-7b", 4096), ("llama-2-7b", 1)]
    assert cells.index(shapes.Cell("llama-3-8b", "qkv", 6144, 4096, 16)) == 16
    assert [c.tokens for c in shapes.cells(["llama-3-8b"], [3, 512])][::4] == [512, 3]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_budget_stops_before_a_cell_that_may_not_fit():
    clock, done = Clock(), []

    def measure(seconds):
        done.append(seconds)
        clock.now += seconds

    # 3 + 4 = 7; the longest took 4, so at 7 of 10 the next is not begun.
    assert harness.run_within([3, 4, 1, 1], measure, 10, clock) == [1, 1]
    assert done == [3, 4]
    clock.now = 0.0
    assert harness.run_within([3, 4], measure, float("inf"), clock) == []


def test_layer_sums_mark_losses_and_leave_out_what_is_incomplete():
    def row(method, layer, ms, tokens=16):
        return dict(model="llama-2-7b", tokens=tokens, method=method, layer=layer, median_ms=ms)

    rows = [row("F.linear", layer, 1.0) for layer in shapes.MODELS["llama-2-7b"]]
    rows += [row("tiles 45%", layer, 0.5) for layer in shapes.MODELS["llama-2-7b"]]
    rows += [row("cuSPARSELt", layer, 2.0) for layer in shapes.MODELS["llama-2-7b"]]
    rows += [row("CUTLASS", "qkv", 0.1), row("F.linear", "qkv", 1.0, 64), row("tiles 45%", "qkv", 1.0, 64)]
    sums = {line["method"]: line for line in bench_tile_linear.layer_sums(rows)}
    assert set(sums) == {"F.linear", "tiles 45%", "cuSPARSELt"}
    assert (sums["tiles 45%"]["sum_us"], sums["tiles 45%"]["speedup"], sums["tiles 45%"]["note"]) == (2000, 2, "")
    assert (sums["cuSPARSELt"]["speedup"], sums["cuSPARSELt"]["note"]) == (0.5, "loss")


def gpu_run_on_cpu(monkeypatch, tmp_path, **changes):
    """GpuRun with graphs replaced by lists of calls, on a model of one small layer twice."""
    monkeypatch.setitem(shapes.MODELS, "tiny", {"up": (256, 384), "down": (384, 256)})
    counted = {}

    def capture(calls, launches):
        counted[len(counted)] = (len(calls), launches)
        return calls

    def times(graphs, samples):
        assert all(torch.isfinite(call()).all() for calls, _ in graphs.values() for call in calls)
        return {name: [2e-6 if name == "F.linear" else 1e-6] * samples for name in graphs}

    monkeypatch.setattr(harness, "capture", capture)
    monkeypatch.setattr(harness, "interleaved_graph_times", times)
    settings = dict(models=["tiny"], tokens=[16], sparsities=[0.0, 0.5], budget_seconds=1e9, samples=3, tbps=4.8)
    run = bench_tile_linear.GpuRun(**settings | changes, l2_bytes=400_000, device="cpu", csv=tmp_path / "r.csv")
    run.run()
    return run, counted


def test_gpu_rows_by_hand(monkeypatch, tmp_path):
    run, counted = gpu_run_on_cpu(monkeypatch, tmp_path)
    assert run.wrong == [] and run.not_run == [] and "cuSPARSELt" in run.missing
    assert [row["method"] for row in run.rows] == ["F.linear", "tiles 0%", "tiles 50%"] * 2
    row = run.rows[2]
    moved = 6 * 18432 + 6 + 2 * 16 * (256 + 384)  # six tiles, their flags, x and y
    assert row["vs_bf16"] == pytest.approx(2) and row["median_ms"] == pytest.approx(1e-3)
    assert row["GB_per_s"] == pytest.approx(moved / 1e-6 * 1e-9)
    assert row["TFLOPs_effective"] == pytest.approx(2 * 16 * 256 * 384 / 1e-6 * 1e-12)
    assert row["TFLOPs_executed"] == pytest.approx(row["TFLOPs_effective"] / 2)
    assert row["roofline_share"] == pytest.approx((moved - 6) / 4.8e12 / 1e-6)
    # 800 kB of L2 to exceed by copies of 196608, 196614 and 110598 bytes; the launches are whole sweeps of them.
    assert [counted[i] for i in range(3)] == [(5, 200), (5, 200), (8, 200)]
    assert len(list(csv.DictReader((tmp_path / "r.csv").open()))) == 6
    assert {row["speedup"] for row in bench_tile_linear.layer_sums(run.rows)} == {1.0, 2.0}


def test_a_wrong_rival_is_named_and_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_tile_linear.TiledWeight, "matmul", lambda self, x: x @ self.unpack().T + 1)
    run, _ = gpu_run_on_cpu(monkeypatch, tmp_path)
    assert {row["method"] for row in run.rows} == {"F.linear"}
    assert run.wrong[0] == "tiny up M=16: tiles 0% misses the two-times rule"


def test_plot_and_tables_from_a_saved_csv(tmp_path, monkeypatch, capsys):
    rows = []
    for layer in shapes.MODELS["llama-3-8b"]:
        for method, ms in (("F.linear", 1.0), ("tiles 25%", 0.8)):
            rows += [dict(model="llama-3-8b", layer=layer, tokens=t, method=method, median_ms=ms) for t in (1, 16)]
    harness.save_csv(tmp_path / "a.csv", rows)
    monkeypatch.setattr(sys, "argv", ["b", "--from-csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.png")])
    bench_tile_linear.main()
    assert "1.25" in capsys.readouterr().out
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_copies_exceed_twice_l2_within_memory():
    assert harness.copies_to_exceed_l2(34_000_000, 60_000_000, 1 << 40) == 4  # 136 MB > 120 MB, three are 102 MB
    assert harness.copies_to_exceed_l2(60_000_000, 60_000_000, 1 << 40) == 3
    assert harness.copies_to_exceed_l2(470_000_000, 60_000_000, 1 << 40) == 1
    assert harness.copies_to_exceed_l2(34_000_000, 60_000_000, 70_000_000) == 2
    assert harness.copies_to_exceed_l2(34_000_000, 60_000_000, 0) == 1


NO_LLAMA = "needs the package llama-cpp-python, found none; pip install llama-cpp-python."
TINY_CPU_RUN = ["--shapes", "128x256", "--tokens", "2", "--sparsity", "0.5", "--repeats", "1", "--l3-mib", "1"]


@pytest.fixture
def no_llama(monkeypatch):
    monkeypatch.setattr(peer_ggml.importlib.util, "find_spec", lambda name: None)


def cpu_run(**changes):
    settings = dict(shapes=[(256, 384)], tokens=[2], sparsities=(0.0, 0.5), repeats=1, l3_bytes=1 << 17)
    run = bench_tile_linear_cpu.CpuRun(**settings | changes)
    run.run()
    return run


@pytest.mark.usefixtures("no_llama")
def test_cpu_rows_by_hand(tmp_path):
    run = cpu_run(shapes=[(256, 384), (128, 128)], csv=tmp_path / "t.csv")
    assert run.missing == {"llama.cpp": NO_LLAMA} and run.wrong == [] and run.not_run == []
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["tiles 0%", "tiles 50%", "F.linear", "F.linear fp32", "read"] * 2
    packed, dense, wide, read = rows[1:5]
    # 524288 bytes of 4x L3 to exceed by copies of 6 * 18432 + 6, 196608 and 393216 bytes.
    assert [row["copies"] for row in rows[1:5]] == ["5", "3", "2", "1"]
    assert float(packed["weight_MB"]) == pytest.approx(6 * 18432e-6 + 6e-6)
    assert float(dense["over_torch"]) == 1 and dense["over_llama_cpp"] == ""
    for row, item in ((packed, 2), (dense, 2), (wide, 4)):
        moved = 1e6 * float(row["weight_MB"]) + item * 2 * (256 + 384)
        assert float(row["GB_per_s"]) == pytest.approx(1e-6 * moved / float(row["median_ms"]))
        assert float(row["of_read"]) == pytest.approx(float(row["GB_per_s"]) / float(read["GB_per_s"]))
    assert float(read["GB_per_s"]) == pytest.approx(1e-6 * (8 << 17) / float(read["median_ms"]))


@pytest.mark.usefixtures("no_llama")
def test_cpu_run_without_llama_and_compiler_says_so_and_goes_on(monkeypatch, tmp_path, capsys):
    def fails(*_):
        raise RuntimeError("\nNo working C++ compiler found\nmore")

    monkeypatch.setattr(bench_tile_linear_cpu, "compiled_calls", fails)
    drawn = tmp_path / "a.png"
    bench_tile_linear_cpu.main([*TINY_CPU_RUN, "--compiled-tokens", "2", "--plot", str(drawn)])
    lines = capsys.readouterr().out.splitlines()
    assert f"llama.cpp is not measured: {NO_LLAMA}" in lines
    assert "torch.compile was not measured: No working C++ compiler found" in lines
    assert any(line.startswith("over_torch below 1 in ") for line in lines)
    assert drawn.stat().st_size > 1000


@pytest.mark.usefixtures("no_llama")
def test_cpu_run_names_what_is_wrong_and_does_not_time_it(monkeypatch):
    monkeypatch.setattr(bench_tile_linear.TiledWeight, "matmul", lambda self, x: x @ self.unpack().T + 1)
    with pytest.raises(SystemExit, match=r"^wrong, not timed: 128x256 M=2: tiles 50% misses the two-times rule$"):
        bench_tile_linear_cpu.main([*TINY_CPU_RUN, "--compiled-tokens"])


@pytest.mark.usefixtures("no_llama")
def test_cpu_run_ends_with_its_budget():
    run = cpu_run(tokens=[1, 2], budget_seconds=0)
    assert run.rows == [] and [str(cell) for cell in run.not_run] == ["256x384 M=1", "256x384 M=2"]


@pytest.mark.usefixtures("no_llama")
def test_scratch_is_what_a_call_takes_besides_y(monkeypatch):
    monkeypatch.setattr(bench_tile_linear_cpu, "SCRATCH_SHAPE", (256, 384))
    monkeypatch.setattr(bench_tile_linear_cpu, "SCRATCH_TOKENS", (2,))
    monkeypatch.setattr(harness, "peak_bytes", lambda prepare: 1_000_000 + prepare()().nbytes)
    scratch = {row["method"]: row["scratch_MB"] for row in cpu_run().rows}
    assert scratch == {"tiles 0%": 1.0, "tiles 50%": "", "F.linear": 1.0, "F.linear fp32": 1.0, "read": ""}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_rival_is_measured(capfd):
    run = cpu_run(compiled_tokens=[2])
    (row,) = [row for row in run.rows if row["method"] == "torch.compile"]
    assert "torch.compile" not in run.missing and run.wrong == [] and row["copies"] == 2
    assert "AUTOTUNE" not in capfd.readouterr().err


TINY_EXPERTS = bench_tile_experts.layers_of("tiny", 4, 2, 256, 128)


def test_experts_rows_by_hand(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench_tile_experts.MODELS, "tiny", TINY_EXPERTS)
    flags = ["--models", "tiny", "--tokens", "1", "3", "--sparsity", "0", "0.5", "--repeats", "1", "--l3-mib", "0.1"]
    bench_tile_experts.main([*flags, "--csv", str(tmp_path / "e.csv")])
    assert "slower than the faster rival in " in capsys.readouterr().out
    with (tmp_path / "e.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["tiles 0%", "tiles 50%", "grouped_mm", "F.linear loop"] * 4
    assert [(row["layer"], row["tokens"]) for row in rows[::4]] == [
        (layer, tokens) for layer in ("gate_up", "down") for tokens in ("1", "3")
    ]
    assert {row["experts_hit"] for row in rows if row["tokens"] == "1"} == {"2"}
    dense, packed = rows[2], rows[1]
    # Two experts of gate and up, 128 x 256, or two tiles of 18432 bytes each; one row of x, two of y with 256 values.
    for row, weights in ((dense, 2 * 2 * 2 * 128 * 256), (packed, 2 * 2 * 2 * 18432)):
        moved = weights + 2 * (256 + 2 * 256)
        assert float(row["GB_per_s"]) == pytest.approx(1e-6 * moved / float(row["median_ms"]))
    fastest = min(float(row["median_ms"]) for row in rows[2:4])
    assert float(packed["over_torch"]) == pytest.approx(fastest / float(packed["median_ms"]))


def test_experts_run_names_what_is_wrong_and_what_is_lost(monkeypatch):
    monkeypatch.setitem(bench_tile_experts.MODELS, "tiny", TINY_EXPERTS)
    right = bench_tile_experts.TiledExperts.forward
    monkeypatch.setattr(bench_tile_experts.TiledExperts, "forward", lambda *a: right(*a).flip(0))
    with pytest.raises(SystemExit, match=r"^wrong, not timed: tiny gate_up M=1: tiles 45% misses the two-times rule; "):
        bench_tile_experts.main(
            ["--models", "tiny", "--tokens", "1", "--sparsity", "0.45", "--repeats", "1", "--l3-mib", "0.1"]
        )
    rows = [dict(model="a", layer="down", tokens=8, method=m, over_torch=r) for m, r in (("tiles 0%", 0.9), ("x", 0.5))]
    assert bench_tile_experts.losses([*rows, dict(rows[0], over_torch=1.1)]) == ["a down M=8 tiles 0%: 0.90"]


def test_experts_on_a_gpu_need_one(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_tile_experts.main(["--device", "cuda"])
    assert "--device cuda: expected a GPU that torch sees, got none. Measure the CPU" in capsys.readouterr().err


def test_experts_on_a_gpu_are_waited_for(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    run = bench_tile_experts.ExpertsRun(TINY_EXPERTS[:1], [1], [0.5], 2, 100_000)
    run.run()
    assert waits == [] and len(run.rows) == 3
    cell, methods = bench_tile_experts.Cell(TINY_EXPERTS[0], 1), bench_tile_experts.methods_of(TINY_EXPERTS[0], [0.5])
    run.device = "cuda"
    run._cell(cell, methods, bench_tile_experts.Reader(100_000))
    assert len(waits) == 3 * (3 + 1)  # a warm-up round and two more of the methods and the read


def test_experts_run_ends_with_its_budget(capsys):
    bench_tile_experts.main(["--models", "Mixtral-8x7B", "--tokens", "1", "--budget-seconds", "0", "--l3-mib", "0.1"])
    assert capsys.readouterr().out.splitlines() == [
        f"not run for lack of time: Mixtral-8x7B {layer} M=1" for layer in ("gate_up", "down")
    ]


def test_cpu_tables_by_hand(tmp_path, capsys):
    rows = [
        dict(shape=shape, tokens=tokens, method=method, dtype="bfloat16", over_torch=torch_ratio, over_llama_cpp=ratio)
        for shape, tokens, method, torch_ratio, ratio in (
            ("a", 16, "tiles 45%", 2.0, 0.5),
            ("b", 16, "tiles 45%", 0.5, ""),
            ("a", 1, "tiles 45%", 3.0, 1.5),
            ("a", 1, "llama.cpp", 0.9, 1.0),
        )
    ]
    one, sixteen = bench_tile_linear_cpu.over_shapes(rows)
    assert (one["tokens"], one["shapes"], one["worst_over_torch"]) == (1, 1, "3.00 a")
    assert sixteen["over_torch"] == pytest.approx(1) and sixteen["worst_over_torch"] == "0.50 b"
    assert sixteen["over_llama_cpp"] == pytest.approx(0.5) and sixteen["worst_over_llama_cpp"] == "0.50 a"
    harness.save_csv(tmp_path / "a.csv", rows)
    bench_tile_linear_cpu.main(["--from-csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.png")])
    out = capsys.readouterr().out
    assert "over_torch below 1 in 1 of 3 cells:\n  b M=16 tiles 45%: 0.50\n" in out
    assert "over_llama_cpp below 1 in 1 of 2 cells:\n  a M=16 tiles 45%: 0.50\n" in out
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_plot_of_nothing_says_so(tmp_path, capsys):
    bench_tile_linear_cpu.plot([dict(method="tiles 0%", over_torch="")], tmp_path / "a.png")
    assert capsys.readouterr().out == "plot: no row has a ratio over F.linear; nothing to draw.\n"


@pytest.mark.parametrize("shape", ["4096", "128x", "0x128", "100x128"])
def test_shapes_of_the_cpu_run_are_whole_tiles(shape, capsys):
    with pytest.raises(SystemExit):
        bench_tile_linear_cpu.main(["--shapes", shape])
    assert f"expected NxK, both multiples of 128, got '{shape}'; pass 4096x4096 or alike" in capsys.readouterr().err


def test_llama_cpp_says_what_it_cannot_use(monkeypatch, tmp_path):
    package = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(peer_ggml.importlib.util, "find_spec", lambda name: package)
    with pytest.raises(RuntimeError, match=r"needs ggml as .* builds it, in .*lib got: .*; reinstall llama-cpp-python"):
        peer_ggml.load()
    x = torch.zeros(2, 256)
    with pytest.raises(ValueError, match=r"from a multiple of 64 bytes on, got strides \(256, 1\) at 0x.* Use clone"):
        peer_ggml.MatMul(None, x.bfloat16(), x[:, 1:])
    with pytest.raises(ValueError, match=r"expected x in float32, got torch.bfloat16. Use x.float\(\)."):
        peer_ggml.MatMul(None, x.bfloat16(), x.bfloat16())


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_llama_cpp_multiplies(dtype):
    weight, x = torch.randn(128, 256).to(dtype), torch.randn(3, 256).to(dtype)
    call = peer_ggml.MatMul(peer_ggml.load(), weight, x.float())
    for _ in range(2):
        torch.testing.assert_close(call(), x.float() @ weight.float().T, rtol=1e-4, atol=1e-4)


def test_rotation_takes_copies_in_turn_and_ends_in_time():
    clock, done = Clock(), []

    def call(name, seconds):
        done.append(name)
        clock.now += seconds

    calls = {"a": [functools.partial(call, f"a{i}", 1) for i in range(2)], "b": [functools.partial(call, "b", 2)]}
    times = harness.rotating_times(calls, 2, float("inf"), clock)
    assert done == ["b", "a0", "a1", "b", "b", "a0"] and times == {"a": [1, 1], "b": [2, 2]}
    assert len(harness.rotating_times(calls, 100, 15, clock)["a"]) == 5  # 18 s after the warm-up and five rounds
    assert len(harness.rotating_times(calls, 100, 0, clock)["a"]) == harness.LEAST_ROUNDS


def test_last_level_caches_are_added_up(tmp_path):
    for cpu, index, level, size, shared in (
        (0, 2, 2, "1024K", "0"),
        (0, 3, 3, "32768K", "0-1"),
        (1, 3, 3, "32768K", "0-1"),
        (2, 3, 3, "16384K", "2"),
    ):
        folder = tmp_path / f"cpu{cpu}/cache/index{index}"
        folder.mkdir(parents=True)
        for name, value in (("level", level), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(f"{value}\n")
    assert harness.l3_bytes(tmp_path) == 48 << 20
    with pytest.raises(OSError, match=r"expected the sizes of caches in .*none, found none. Pass --l3-mib."):
        harness.l3_bytes(tmp_path / "none")


def test_two_times_rule_catches_errors_and_nan():
    x, weight = torch.randn(100, 256).bfloat16(), torch.randn(128, 256).bfloat16()
    y = torch.nn.functional.linear(x, weight)
    assert bench_tile_linear.within_two_times(y, x, weight)
    for row in (0, 99):
        wrong = y.clone()
        wrong[row, 5] += 3
        assert not bench_tile_linear.within_two_times(wrong, x, weight)
    wrong = y.clone()
    wrong[50, 5] = float("nan")  # not among the rows that are compared with fp64
    assert not bench_tile_linear.within_two_times(wrong, x, weight)


@pytest.mark.parametrize("cols", [128, 129, 130, 131])
@pytest.mark.parametrize("kind", card_checks.TYPE_MAPS)
def test_exact_cases_pass_on_the_cpu(kind, cols):
    tiled, dense = card_checks.integer_weight(200, cols, kind, torch.bfloat16, torch.Generator().manual_seed(0))
    assert torch.equal(tiled.unpack(), dense)
    x = torch.randint(-4, 5, (5, cols)).bfloat16()
    assert torch.equal(tiled.matmul(x), card_checks.exact_y(x, dense, None))


def test_exact_cases_count_what_differs(monkeypatch):
    monkeypatch.setattr(card_checks, "poisoned_matmul", lambda w, x, b: card_checks.exact_y(x, w.unpack(), b) + 1)
    cases = list(card_checks.exact_cases("cpu", [(128, 128)], [1, 2, 3]))
    assert len(cases) == 30 and all(different > 0 for _, different in cases)
    assert stages.tally(cases)["failed"]


def options(tmp_path, **changes):
    values = dict(out=tmp_path, minutes=10, stages=None, bin=None, dry_run=True, stage_seconds=60.0) | changes
    return argparse.Namespace(**values)


def writes(status, out, calls):
    def child(stage, seconds, _):
        calls.append(stage)
        card_run.write_json(out / f"{stage}.json", {"stage": stage, "status": status, "seconds": 1.0, "reason": "done"})
        return ""

    return child


def test_dry_run_end_to_end(tmp_path):
    command = [sys.executable, "-m", "benchmarks.card.run", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    written = {f"{stage}.json" for stage in card_run.STAGES} | ({"plans.csv"} if HAVE_HOST else set())
    assert {p.name for p in tmp_path.iterdir()} == written
    results = {stage: json.loads((tmp_path / f"{stage}.json").read_text()) for stage in card_run.STAGES}
    assert results["masks"]["data"]["cases"] == 115 and results["masks"]["data"]["bad"] == []
    assert results["mask_timing"]["data"]["rows"] and results["learn_step"]["data"]["rows"]
    skipped = {"selector", "micro", "sanitizer", "ncu"} | (set() if HAVE_HOST else {"plans"})
    assert {stage for stage in results if results[stage]["status"] == "skipped"} == skipped
    assert results["micro"]["reason"] == results["selector"]["reason"] == "micro programs run on a GPU only"
    assert results["facts"]["data"]["device"] == "cpu"
    assert results["exact"]["data"]["cases"] == 60 + 18 + 12 and results["exact"]["data"]["bad"] == []
    assert results["timing"]["data"]["rows"]
    table = done.stdout.splitlines()[-len(card_run.STAGES) - 1 :]
    assert table[0].split() == ["stage", "status", "seconds", "result"]
    assert [line.split()[0] for line in table[1:]] == list(card_run.STAGES)


def test_finished_stages_are_not_run_again(tmp_path):
    calls = []
    card_run.run_stages(["facts", "exact"], options(tmp_path), writes("ok", tmp_path, calls))
    card_run.run_stages(["facts", "exact"], options(tmp_path), writes("ok", tmp_path, calls))
    assert calls == ["facts", "exact"]
    card_run.run_stages(["exact"], options(tmp_path, stages=["exact"]), writes("ok", tmp_path, calls))
    assert calls == ["facts", "exact", "exact"]
    (tmp_path / "facts.json").write_text('{"stage": "fac')  # a half file, and a failed stage, are run again
    card_run.write_json(tmp_path / "exact.json", {"stage": "exact", "status": "failed", "seconds": 1})
    card_run.run_stages(["facts", "exact"], options(tmp_path), writes("ok", tmp_path, calls))
    assert calls[3:] == ["facts", "exact"]


def test_a_failing_stage_does_not_stop_the_others(tmp_path):
    calls = []

    def child(stage, seconds, _):
        if stage == "exact":
            return "exit code -11: segmentation fault"  # and no file
        return writes("ok", tmp_path, calls)(stage, seconds, _)

    results = card_run.run_stages(["facts", "exact", "timing"], options(tmp_path), child)
    assert [r["status"] for r in results] == ["ok", "failed", "ok"]
    assert results[1]["reason"] == "exit code -11: segmentation fault"


def test_an_exception_in_a_stage_is_its_result(tmp_path, monkeypatch):
    def broken(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(stages.FUNCTIONS, "exact", broken)
    card_run.run_child("exact", options(tmp_path))
    result = json.loads((tmp_path / "exact.json").read_text())
    assert result["status"] == "failed"
    assert result["reason"] == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_no_time_left_is_said_and_made_up_for_later(tmp_path):
    calls = []
    child = writes("ok", tmp_path, calls)
    results = card_run.run_stages(["facts", "timing", "ncu"], options(tmp_path, minutes=0.2), child)
    # 12 seconds: enough for facts and ncu, but not for half of timing.
    assert [r["status"] for r in results] == ["ok", "not run", "ok"]
    assert results[1]["reason"] == "no time left"
    card_run.run_stages(["facts", "timing", "ncu"], options(tmp_path), child)
    assert calls == ["facts", "ncu", "timing"]


GPU_LIST = (ROOT / "benchmarks/card/GPU.md").read_text(encoding="utf-8")


def test_the_list_for_a_gpu_is_what_the_runner_runs():
    """Stages and seconds in GPU.md are those of STAGES in order; the ones marked * fit the first call together."""
    rows = re.findall(r"^\| (\d+) ([*+]?) ?\| [^|]+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", GPU_LIST, re.MULTILINE)
    found, first = {}, []
    for _, mark, command, _, _ in rows:
        if stage := re.match(r"`(\w+)`, (\d+)", command):
            found[stage[1]] = int(stage[2])
            first += [stage[1]] if mark == "*" else []
    assert list(found.items()) == list(card_run.STAGES.items()) and list(card_run.STAGES) == list(stages.FUNCTIONS)
    assert first == list(card_run.STAGES)[: len(first)] and first[-1] == "timing"
    seconds = sum(card_run.STAGES[stage] for stage in first)
    assert seconds == 60 * card_run.FIRST_CALL_MINUTES <= 600 and f"({seconds} together)" in GPU_LIST
    for name in stages.SELECTOR + stages.MICRO:
        assert f"`build/gpu/{name}`" in GPU_LIST
    numbers = [int(number) for number, *_ in rows]
    assert numbers == list(range(1, len(rows) + 1))
    decided = re.findall(r"^(\d+)\. \S", GPU_LIST.split("## What each decides")[1], re.MULTILINE)
    assert [int(number) for number in decided] == numbers
    assert max(map(len, GPU_LIST.splitlines())) <= 160


def test_every_micro_program_is_run_once():
    programs = [source.stem for source in card_build.micro_sources()]
    assert sorted(stages.SELECTOR + stages.MICRO) == programs


def test_a_stage_of_many_cells_waits_for_half_of_its_time(tmp_path):
    calls = []
    child = writes("ok", tmp_path, calls)
    results = card_run.run_stages(["mask_timing", "ncu"], options(tmp_path, minutes=1.9), child)  # 114 s of 240 s
    assert [r["status"] for r in results] == ["not run", "ok"]
    card_run.run_stages(["mask_timing", "ncu"], options(tmp_path, minutes=2.1), child)
    assert calls == ["ncu", "mask_timing"]


def test_without_cuda_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert card_run.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == card_run.NO_GPU + "\n"
    assert list(tmp_path.iterdir()) == []


def test_unknown_stage_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        card_run.main(["--out", str(tmp_path), "--stages", "facts,fast"])
    assert f"expected stages of {','.join(card_run.STAGES)}, got fast" in capsys.readouterr().err


def program(path, line, code=0):
    path.write_text(f"#!/bin/sh\necho '{line}'\necho '{{cut'\nexit {code}\n")
    path.chmod(0o755)


def test_micro_stages_read_programs_and_report_the_broken(tmp_path):
    line = '{"experiment": "selector", "case": "m64n8k32 selector 1", "value": 3, "unit": "mismatches"}'
    program(tmp_path / "selector", line)
    program(tmp_path / "issue_rate", "Expected a GPU of compute capability 9.0, found none.", 2)
    on_gpu = options(tmp_path, dry_run=False, bin=tmp_path)
    data = stages.selector(on_gpu)
    assert data["results"] == data["wrong"] == [json.loads(line)] and data["problems"] == [] and data["failed"]
    program(tmp_path / "selector", line.replace("m64n8k32 selector 1", "overwritten in flight"))
    data = stages.selector(on_gpu)
    assert data["results"][0]["value"] == 3 and data["wrong"] == [] and not data["failed"]  # an answer, no fault
    data = stages.micro(on_gpu)
    assert "issue_rate: exit code 2: Expected a GPU of compute capability 9.0, found none.\n{cut" in data["problems"]
    assert f"contention: not in {tmp_path}" in data["problems"] and len(data["problems"]) == len(stages.MICRO)
    on_gpu.stage_seconds = 1
    assert stages.selector(on_gpu)["problems"] == ["selector: not run: no time left"]


def test_a_wrong_layer_of_a_group_is_counted(monkeypatch):
    groups = {"two": (128, (128, 64))}
    assert stages.tally(card_checks.group_cases("cpu", groups, [1, 3]))["summary"] == "4 cases, 0 differ"
    right = tile_linear.tile_linear_group

    def off_by_one(x, weights, batch_invariant):  # in one value, batch-invariant calls alone
        first, second = right(x, weights, batch_invariant)
        second[-1, -1] += batch_invariant
        return first, second

    monkeypatch.setattr(tile_linear, "tile_linear_group", off_by_one)
    data = stages.tally(card_checks.group_cases("cpu", groups, [3]))
    # From the exact value, and from a call of this layer alone.
    assert data["failed"] and data["bad"] == [{"case": "two M=3 batch invariant", "different": 2}]


def test_wrong_experts_are_counted(monkeypatch):
    mixtures, calls = {"two": (5, 2, 130, 72)}, [(1, 1), (6, 2)]
    assert stages.tally(card_checks.expert_cases("cpu", mixtures, calls))["summary"] == "4 cases, 0 differ"
    right = card_checks.TiledExperts.forward

    def depends_on_rows(module, x, experts):  # batch-invariant calls of six rows alone, in one value
        y = right(module, x, experts)
        y[0, 0] += module.batch_invariant and len(x) == 6
        return y

    monkeypatch.setattr(card_checks.TiledExperts, "forward", depends_on_rows)
    data = stages.tally(card_checks.expert_cases("cpu", mixtures, calls))
    # From the exact value, and from a call of the first rows alone.
    assert data["failed"] and data["bad"] == [{"case": "two M=6x2 batch invariant", "different": 2}]


def test_what_the_sanitizer_watches_is_exact(monkeypatch):
    card_checks.sanitizer_cases("cpu")
    forward = card_checks.TiledExperts.forward
    with monkeypatch.context() as wrong:
        wrong.setattr(card_checks.TiledExperts, "forward", lambda *args: forward(*args) + 1)
        with pytest.raises(AssertionError, match=r"^wrong result of experts M=8x2$"):
            card_checks.sanitizer_cases("cpu")
    right = tile_linear.tile_linear_group
    monkeypatch.setattr(tile_linear, "tile_linear_group", lambda *args: [y + 1 for y in right(*args)])
    with pytest.raises(AssertionError, match=r"^wrong result of a group at M=8$"):
        card_checks.sanitizer_cases("cpu")


def test_a_sweep_of_plans_ends_with_its_budget(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_plans, "Plans", lambda: None)
    monkeypatch.setattr(bench_plans, "measure", lambda cell, sparsity, plans, samples: [{"tokens": cell.tokens}])
    calls = stages.plan_calls()[:3]
    rows, left = bench_plans.sweep(calls, 10, 1e9, tmp_path / "plans.csv")
    assert left == [] and [row["tokens"] for row in rows] == [cell.tokens for cell, _ in calls]
    with (tmp_path / "plans.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    assert bench_plans.sweep(calls, 10, -1.0, None) == ([], calls)


@pytest.mark.skipif(not HAVE_HOST, reason="built without pybind11")
def test_groups_on_a_card_go_together_and_apart():
    """By the planner for an H100: layers of a launch, and such that their own splits keep apart."""
    from patch_kernels import _host

    limits = _host.DeviceLimits(compute_capability=90, sm_count=132, smem_bytes=232448, clusters=[132, 66, 32, 16])
    for batch_invariant in (False, True):
        splits = {name: set() for name in card_checks.GROUPS}
        for name, (cols, row_counts) in card_checks.GROUPS.items():
            for tokens in card_checks.GROUP_TOKENS:
                plans = [
                    _host.choose_plan(rows, cols, tokens, rows * cols * 3 // 2, batch_invariant, limits=limits)
                    for rows in row_counts
                ]
                splits[name].add(tuple(plan["splits"] for plan in plans))
        assert any(len(set(each)) > 1 for each in splits["q, k, v of Llama-3-8B"])
        assert any(each[0] == each[1] > 1 for each in splits["gate, up of Llama-3.2-1B"])


def test_cases_beyond_a_stage_s_time_are_left_out():
    cases = ((f"case {i}", i) for i in range(3))
    data = stages.tally(cases, seconds=-1.0)
    assert (data["cases"], data["cut"], data["failed"]) == (1, True, False) and len(list(cases)) == 2
    assert data["summary"] == "1 cases, 0 differ; the rest not run after -1 s"


def made_sweep(calls, samples, budget_seconds, path):
    """bench_plans.sweep on a card that has the model's times; two calls find no time."""
    rows = made_plans.made_rows(made_plans.OTHER_CARD, sparsities=(0.45, 0.0), tokens=(64, 256), noise=0.01)
    harness.save_csv(path, rows)
    return rows, calls[-2:]


@pytest.mark.skipif(not HAVE_HOST, reason="built without pybind11")
def test_plans_stage_fits_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_plans, "without_choice", lambda: None)
    monkeypatch.setattr(bench_plans, "sweep", made_sweep)
    monkeypatch.setattr(made_plans, "DEVICE", "overwritten by that of the run")
    data = stages.plans(options(tmp_path, dry_run=False))
    assert data["not_run"] == ["llama-3-8b gate_up M=512 0%", "llama-3-8b down M=512 0%"]
    assert data["device"] == harness.environment()["device"] and not data.get("failed")
    assert data["constants"]["link_bytes_per_cycle"] == pytest.approx(21, rel=0.05)
    assert (
        "  double link_bytes_per_cycle = 2" in data["fit"] and "for ModelConstants in csrc/gemm/plan.h" in data["fit"]
    )
    assert data["summary"].endswith("; 2 calls without time")
    monkeypatch.setattr(bench_plans, "sweep", lambda calls, samples, budget_seconds, path: ([], calls))
    data = stages.plans(options(tmp_path, dry_run=False))  # no time for any: the file before is no result of this run
    assert data["failed"] and data["summary"].startswith("no fit: expected a file that bench_plans --csv wrote, got")
    monkeypatch.setattr(bench_plans, "without_choice", lambda: "there is no plan to choose here: none kernels disabled")
    data = stages.plans(options(tmp_path, dry_run=False))
    assert data == {"failed": True, "summary": "there is no plan to choose here: none kernels disabled"}


def test_plans_are_timed_once_a_shape_and_with_zeros_first():
    calls = stages.plan_calls()
    shapes_of = [(cell.rows, cell.cols, cell.tokens, sparsity) for cell, sparsity in calls]
    assert len(calls) == len(set(shapes_of)) == 2 * 7 * len(stages.PLANS_TOKENS)  # o is the same in both models
    assert [sparsity for _, sparsity in calls] == [0.45] * 35 + [0.0] * 35
    assert {64, 128, 256, 512} < {cell.tokens for cell, _ in calls}


def test_stages_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(stages.shutil, "which", lambda _: None)
    on_gpu = options(tmp_path, dry_run=False)
    for stage, reason in (
        (stages.micro, "no --bin: build them by python -m benchmarks.card.build"),
        (stages.sanitizer, "compute-sanitizer is not installed"),
        (stages.ncu, "ncu is not installed"),
    ):
        with pytest.raises(stages.Skip, match=reason):
            stage(on_gpu)


def test_a_tool_that_takes_too_long_keeps_its_output():
    done = stages.run_tool([sys.executable, "-u", "-c", "import time; print('begun'); time.sleep(60)"], 1.5)
    assert done["rc"] is None and "begun" in done["output"] and "stopped after" in done["output"]


def test_build_refuses_serialized_wgmma_and_spills():
    log = "ptxas info    : 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    assert card_build.complaints(log) == []
    assert len(card_build.complaints(log + "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads")) == 1
    assert len(card_build.complaints("ptxas info : (C7512) Potential Performance Loss: wgmma serialized")) == 1


def test_build_names_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"expected include/cutlass/cutlass.h in --cutlass .*Unpack the wheel"):
        card_build.cutlass_includes(tmp_path)
    monkeypatch.setattr(card_build, "nvcc_path", lambda: None)
    monkeypatch.setattr(sys, "argv", ["build", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"needs nvcc 12\.8 or newer, but none was found. Set CUDA_HOME"):
        card_build.main()


def scaled_masked_weight(*args, **kwargs):
    masked, sums = masked_weight(*args, **kwargs)
    return 1.01 * masked, sums


def test_masked_weight_dry_run(tmp_path, capsys):
    bench_masked_weight.main(["--dry", "--check", "--csv", str(tmp_path / "m.csv")])
    with (tmp_path / "m.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:6] == ["shape", "mode", "dtype", "logits", "hard", "phase"]
    assert {"method", *bench_masked_weight.MEASURES, "note", "commit", "device"} <= set(rows[0])
    timed = [row for row in rows if row["logits"] == "float32"]
    assert {row["method"] for row in timed} == {"ours", "eager", "limit"} and len(timed) == 2 * 3 * 3 * 3
    short = [row for row in rows if row["logits"] == "bfloat16"]
    assert {row["mode"] for row in short} == {"joint", "maskllm"} and len(short) == 2 * 3 * 3
    assert all(float(row["median_ms"]) > 0 for row in rows if row["phase"] != "backward")
    assert all((row["p5_ms"] == "") == (row["phase"] == "backward") for row in rows if row["method"] != "limit")
    limit = next(row for row in timed if row["method"] == "limit" and row["mode"] == "joint")
    assert float(limit["median_ms"]) == pytest.approx(256 * 384 / 4 * 40 / 0.01e12 * 1e3)
    assert "256x384" in capsys.readouterr().out


def test_wrong_masked_weight_is_named_and_not_timed(monkeypatch):
    monkeypatch.setattr(bench_masked_weight, "masked_weight", scaled_masked_weight)
    run = bench_masked_weight.Run("cpu", 1, 0.01, checks=True, compiled=lambda case: False, peaks=False)
    run.run(bench_masked_weight.cases([(128, 128)], [(torch.bfloat16, torch.float32)])[:1])
    assert run.rows == []
    assert run.wrong[0].startswith("128x128 joint bfloat16 float32: masked: ")
    assert run.wrong[0].endswith("values differ from the reference")


MASK_CASE = bench_masked_weight.Case(128, 128, "joint", torch.bfloat16, torch.float32)


def test_a_captured_mask_makes_nothing_on_the_host(monkeypatch):
    """Copies from the host cannot be captured. The capture is played by plain calls."""

    def refused(**kwargs):
        raise RuntimeError("mask_sampling while capturing")

    def capture(calls, launches):
        with monkeypatch.context() as during:
            during.setattr(patch_kernels.ops.masked_weight, "mask_sampling", refused)
            for call in calls:
                call()
        return calls

    monkeypatch.setattr(harness, "capture", capture)
    monkeypatch.setattr(harness, "interleaved_graph_times", lambda graphs, samples: {name: [1e-3] for name in graphs})
    monkeypatch.setattr(bench_masked_weight, "cuda_peak_mib", lambda call: 1.0)
    run, missing = bench_masked_weight.Run("cpu", 1, 0.01, l2_bytes=100_000), {}
    data, rivals = bench_masked_weight.inputs(MASK_CASE), bench_masked_weight.rivals_of(False)
    times, peaks = run._on_gpu(MASK_CASE, data, rivals, missing)
    assert missing == {} and set(times["forward"]) == set(times["forward+backward"]) == set(peaks) == {"ours", "eager"}


def test_ours_missing_fails_the_stage(monkeypatch):
    def broken(data, options):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(bench_masked_weight, "ours", broken)
    run = bench_masked_weight.Run("cpu", 1, 0.01, compiled=lambda case: False, peaks=False)
    run.run([MASK_CASE])
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert [row["note"] for row in run.rows if row["method"] == "ours"] == 3 * [reason]
    assert run.wrong == [f"128x128 joint bfloat16 float32: ours was not timed: {reason}"]
    assert stages.mask_rows(run, bench_masked_weight.place)["failed"]
    monkeypatch.undo()
    run = bench_masked_weight.Run("cpu", 1, 0.01, compiled=lambda case: False, peaks=False)
    run.run([MASK_CASE])
    assert run.wrong == [] and not stages.mask_rows(run, bench_masked_weight.place)["failed"]


def test_mask_cases_begin_with_joint_at_every_size():
    pairs = [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
    cases = bench_masked_weight.cases([(8, 16), (32, 64)], pairs)
    assert [(c.rows, c.mode, c.logits) for c in cases[:2]] == [
        (8, "joint", torch.float32),
        (32, "joint", torch.float32),
    ]
    assert all(c.logits == torch.float32 for c in cases if c.mode == "tile")
    assert len(cases) == 2 * 3 + 2 * 2 + 3 and all(c.hard for c in cases[-3:]) and not any(c.hard for c in cases[:-3])


def test_slow_cases_are_repeated_less(monkeypatch):
    repeats = []
    monkeypatch.setattr(harness, "interleaved_times", lambda calls, count: repeats.append(count) or {})
    run = bench_masked_weight.Run("cpu", 10, 0.01, peaks=False)
    for rows in (1024, 4096):
        run._on_cpu(bench_masked_weight.Case(rows, 4096, "joint", torch.bfloat16, torch.float32), None, {}, {})
    assert repeats == [5, 5]
    run._on_cpu(bench_masked_weight.Case(1024, 1024, "joint", torch.bfloat16, torch.float32), None, {}, {})
    assert repeats[2:] == [10]


def mask_outcome(dtype=torch.float32, **changed):
    """100000 weights of ones, with changed values as {name: (how many, by how much)}."""
    sizes = {"masked": 100_000, "sums": 2, "pattern gradient": 150_000, "tile gradient": 7}
    outcome = {name: torch.ones(size, dtype=dtype) for name, size in sizes.items()}
    for name, (count, change) in changed.items():
        outcome[name.replace("_", " ")][:count] += change
    return outcome


def test_differences_by_hand():
    differences, plain = bench_masked_weight.differences, mask_outcome()
    assert differences(mask_outcome(masked=(3, 9e-6)), plain, False) == {}
    assert differences(mask_outcome(masked=(3, 2e-5)), plain, False) == {"masked": 3}
    assert differences(mask_outcome(tile_gradient=(2, torch.nan)), plain, False) == {"tile gradient": 2}
    short = torch.bfloat16
    assert differences(mask_outcome(short, masked=(3, 2**-7)), mask_outcome(short), False) == {}
    assert differences(mask_outcome(short, masked=(3, 2**-6)), mask_outcome(short), False) == {"masked": 3}
    exact = torch.float64
    assert differences(mask_outcome(exact, sums=(1, 2e-12)), mask_outcome(exact), False) == {"sums": 1}
    # Hard patterns: 10 of 100000 values may flip, and sums are not compared.
    flipped = mask_outcome(masked=(10, 1), sums=(2, 1), pattern_gradient=(15, 1), tile_gradient=(7, 1))
    assert differences(flipped, plain, True) == {}
    assert differences(flipped, plain, False) == {
        "masked": 10,
        "sums": 2,
        "pattern gradient": 15,
        "tile gradient": 7,
    }
    assert differences(mask_outcome(masked=(11, 1)), plain, True) == {"masked": 11}


def test_mask_rows_show_losses_and_what_was_missing():
    times = {
        "forward": {"ours": [1e-3, 1e-3], "eager": [4e-3, 4e-3]},
        "forward+backward": {"ours": [6e-3, 6e-3], "eager": [5e-3, 5e-3]},
    }
    rows = bench_masked_weight.rows_of(
        MASK_CASE, times, {"ours": 1.0}, {"torch.compile": "CppCompileError: no g++"}, 1.0
    )
    assert [row["method"] for row in rows] == ["ours", "eager", "torch.compile", "limit"] * 3
    found = {(row["phase"], row["method"]): row for row in rows}
    assert found["forward", "ours"]["eager_over_this"] == 4 and found["forward", "ours"]["note"] == ""
    assert found["backward", "ours"]["median_ms"] == pytest.approx(5) and found["backward", "ours"]["p5_ms"] == ""
    assert found["backward", "ours"]["note"] == found["forward+backward", "ours"]["note"] == "loss"
    assert found["forward", "torch.compile"]["note"] == "CppCompileError: no g++"
    assert found["forward", "ours"]["limit_share"] == pytest.approx(4096 * 40 / 1e12 / 1e-3)
    assert found["forward+backward", "ours"]["peak_MiB"] == 1.0


def test_learn_step_rows_show_losses_and_what_did_not_fit():
    case = bench_learn_step.Case("dry", torch.float32, "joint", 64, 16)
    times = {"dense": [1e-3], "dense, no dW": [5e-4], "ours": [2e-3], "eager": [1e-3]}
    rows = {row["method"]: row for row in bench_learn_step.rows_of(case, times, {"ours": 3.0}, {})}
    assert (rows["ours"]["over_dense"], rows["ours"]["eager_over_this"], rows["ours"]["note"]) == (2, 0.5, "loss")
    assert rows["ours"]["tokens_per_s"] == pytest.approx(32000) and rows["ours"]["peak_MiB"] == 3.0
    del times["eager"]
    rows = {r["method"]: r for r in bench_learn_step.rows_of(case, times, {}, {"eager": "out of memory"})}
    assert rows["eager"]["note"] == "out of memory" and rows["eager"]["median_ms"] == ""
    assert rows["ours"]["eager_over_this"] == "" and rows["ours"]["note"] == ""


def test_rivals_that_do_not_fit_side_by_side_are_timed_alone(monkeypatch):
    timed = []

    def event_times(steps, repeats, failed):
        timed.append(list(steps))
        for name in ("ours", "eager") if len(steps) > 1 else [n for n in steps if n == "eager"]:
            del steps[name]
            failed(name, torch.OutOfMemoryError())
        return {name: [2e-3 if name == "ours" else 1e-3] for name in steps}

    build = bench_learn_step.build_model
    monkeypatch.setattr(bench_learn_step, "build_model", lambda size, dtype, device: build(size, dtype, "cpu"))
    monkeypatch.setattr(bench_learn_step, "why_too_large", lambda name, model, case: "")
    monkeypatch.setattr(bench_learn_step, "cuda_peak_mib", lambda name, model, case, notes: 1.0)
    monkeypatch.setattr(bench_learn_step, "make_step", lambda name, model, case, device: lambda: None)
    monkeypatch.setattr(harness, "interleaved_event_times", event_times)
    run = bench_learn_step.Run("cuda", 1)
    run.run([bench_learn_step.Case("dry", torch.float32, "tile", 32, 16)])
    assert timed == [["dense", "dense, no dW", "ours", "eager"], ["ours"], ["eager"]]
    notes = {row["method"]: row["note"] for row in run.rows}
    alone = "timed alone: does not fit beside the others"
    assert notes == {"dense": "", "dense, no dW": "", "ours": alone, "eager": "out of memory"}
    times = {"ours": [2e-3], "eager": [1e-3]}
    rows = bench_learn_step.rows_of(
        bench_learn_step.Case("dry", torch.float32, "tile", 32, 16), times, {}, {"ours": alone}
    )
    assert {row["method"]: row["note"] for row in rows}["ours"] == f"loss; {alone}"


def test_learn_cases_begin_with_every_mode_and_length_of_a_model():
    cases = bench_learn_step.cases(["cpu 512x4", "cpu 1024x2"], [torch.float32, torch.bfloat16], [256, 512], 256, 1)
    assert [(c.tokens, c.mode) for c in cases[:6]] == [(t, m) for t in (256, 512) for m in ("joint", "tile", "maskllm")]
    assert {(c.size, c.dtype) for c in cases[:6]} == {("cpu 512x4", torch.float32)}
    assert {(c.size, c.dtype) for c in cases[6:12]} == {("cpu 512x4", torch.bfloat16)}
    assert {c.size for c in cases[12:]} == {"cpu 1024x2"}


def test_long_learn_cases_are_repeated_less(monkeypatch):
    repeats = []
    monkeypatch.setattr(harness, "interleaved_times", lambda steps, count: repeats.append(count) or {})
    monkeypatch.setattr(bench_learn_step, "make_step", lambda name, model, case, device: None)
    run = bench_learn_step.Run("cpu", 9, peaks=lambda case: False)
    run.run([bench_learn_step.Case("dry", torch.float32, "joint", tokens, 256) for tokens in (512, 1024)])
    assert repeats == [9, 5]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("mode", ["joint", "tile", "maskllm"])
def test_ours_and_eager_agree(mode, checkpoint):
    assert bench_learn_step.check(mode, checkpoint=checkpoint) == []


def test_eager_with_checkpointing_draws_the_same_mask_again_and_keeps_none():
    case = bench_learn_step.Case("dry", torch.float64, "joint", 32, 16)
    base = bench_learn_step.build_model(case.size, case.dtype, "cpu")
    (ids,) = case.batches("cpu")
    given = {parameter.data_ptr() for parameter in base.parameters()}
    kept, gradients = {False: 0, True: 0}, []
    with bench_learn_step.frozen(base, case):
        for checkpoint in kept:
            model = bench_learn_step.own_copy(base, dataclasses.replace(case, checkpoint=checkpoint))
            layers = bench_learn_step.masked_layers(model, case).layers
            masks = eager_masks.EagerMasks(model, layers, case.config())
            masks.settings = bench_masked_weight.SETTINGS
            shapes_of_weights = {layer.shape for layer in layers.values()}

            def saved(tensor, checkpoint=checkpoint, shapes_of_weights=shapes_of_weights):
                kept[checkpoint] += tuple(tensor.shape) in shapes_of_weights and tensor.data_ptr() not in given
                return tensor

            torch.manual_seed(0)
            with torch.autograd.graph.saved_tensors_hooks(
                saved, lambda tensor: tensor
            ):  # not called while checkpointed
                loss = bench_learn_step.eager_loss(model, masks, ids, torch.tensor(30), 1.0, 0.0)
            sums = [layer.sums for layer in masks.layers.values()]
            loss.backward()
            assert all(layer.sums is first for layer, first in zip(masks.layers.values(), sums, strict=True))
            gradients.append([logits.grad for logits in masks.parameters()])
    assert kept[False] >= len(layers) and kept[True] == 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_learn_step_check_fails_when_ours_is_wrong(monkeypatch):
    forward = MaskedLinear.forward
    monkeypatch.setattr(MaskedLinear, "forward", lambda self, x: 1.01 * forward(self, x))
    with pytest.raises(SystemExit, match=r"ours and eager disagree, nothing was timed: joint: loss .* of ours"):
        bench_learn_step.main(["--dry", "--check"])


def test_learn_step_stage_times_nothing_when_ours_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_learn_step, "check", lambda mode, device: [f"{mode}: loss 1 of ours, 2 of eager"])
    monkeypatch.setattr(bench_learn_step, "dry_run", None)
    data = stages.learn_step(options(tmp_path))
    assert data["failed"] and data["rows"] == [] and len(data["wrong"]) == 3
    assert data["summary"] == "ours and eager disagree, nothing was timed: joint: loss 1 of ours, 2 of eager"


def test_adamw_dry_run(tmp_path):
    bench_adamw.main(["--dry", "--repeats", "1", "--csv", str(tmp_path / "a.csv")])
    with (tmp_path / "a.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert len(rows) == 2 + 2 * 3 and all(float(row["median_ms"]) > 0 for row in rows.values())
    # parameter, two moments and the step's 4 bytes; a scale of 4 bytes for 256 values of each 8-bit moment
    assert float(rows["torch fused"]["bytes_per_value"]) == pytest.approx(12 + 4 / 4096)
    assert float(rows["patch int8 moments, bfloat16"]["bytes_per_value"]) == pytest.approx(4 + 2 * 4 / 256 + 4 / 4096)


def test_adamw_says_what_does_not_fit():
    with pytest.raises(RuntimeError, match="torch foreach does not fit beside the others; free memory on this GPU"):
        bench_adamw.not_timed("torch foreach", torch.OutOfMemoryError())


def test_copies_of_a_model_share_weights_and_nothing_else():
    model = bench_learn_step.build_model("dry", torch.float32, "cpu")
    copy = bench_learn_step.shared_copy(model)
    for mine, theirs in zip(model.parameters(), copy.parameters(), strict=True):
        assert mine is not theirs and mine.data_ptr() == theirs.data_ptr() and not theirs.requires_grad
    assert copy.lm_head.weight is copy.model.embed_tokens.weight


def test_mask_checks_notice_another_mask(monkeypatch):
    draws = iter(range(10))

    def redraws(*args, noise, **kwargs):  # forward and backward with noise of their own
        weight, pattern, tiles = args
        value, _ = masked_weight(weight, pattern, tiles, noise=(1, 2, 100 + next(draws)), **kwargs)
        gradient, sums = masked_weight(*args, noise=noise, **kwargs)
        return value.detach() + gradient - gradient.detach(), sums

    monkeypatch.setattr(mask_checks, "masked_weight", redraws)
    assert stages.tally(mask_checks.same_mask_cases("cpu", 2))["failed"]
    repeated = mask_checks.both_passes
    monkeypatch.setattr(
        mask_checks,
        "both_passes",
        lambda f, data, tile, noise, **kwargs: repeated(f, data, tile, noise=(*noise[:2], next(draws)), **kwargs),
    )
    monkeypatch.setattr(mask_checks, "masked_weight", masked_weight)
    assert stages.tally(mask_checks.repeat_cases("cpu", 2, [(128, 128)]))["bad"][0]["different"] == 1


def test_mask_equality_counts_what_differs(monkeypatch):
    monkeypatch.setattr(mask_checks, "masked_weight", scaled_masked_weight)
    assert all(count > 0 for _, count in mask_checks.equality_cases("cpu", mask_checks.DRY_CASES[2:]))


@pytest.mark.slow
@pytest.mark.skipif(card_build.nvcc_path() is None, reason="needs nvcc")
@pytest.mark.parametrize("source", card_build.micro_sources(), ids=lambda source: source.stem)
def test_micro_programs_compile_clean(source, tmp_path):
    assert card_build.build(card_build.compile_command(card_build.nvcc_path(), source, tmp_path / "program")) is None
    if not torch.cuda.is_available():
        done = subprocess.run([tmp_path / "program"], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("Expected a GPU of compute capability 9.0, found none")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("bench_plans", ""),
        ("bench_tile_linear", " python -m benchmarks.ops.bench_tile_linear_cpu measures the CPU."),
    ],
)
def test_benchmarks_that_need_a_gpu_say_so(name, advice):
    run = subprocess.run([sys.executable, "-m", f"benchmarks.ops.{name}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == f"{name}: needs an NVIDIA GPU that torch can use, found none.{advice}\n"


def test_memory_table(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_table, "RUNS", (("tile", {}),))
    memory_table.main(["--models", "Qwen2.5-0.5B", "--csv", str(tmp_path / "table.csv")])
    with open(tmp_path / "table.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["model"], line["mode"], line["fits_141_GB"]) == ("Qwen2.5-0.5B", "tile", "yes")
    # 24 blocks: q and o 896 x 896, k and v 128 x 896, gate, up and down 896 x 4864; the embedding is the output head.
    assert line["masked_weights_GB"] == f"{24 * (2 * 896 * (896 + 128) + 3 * 896 * 4864) * 2 / 1e9:.2f}"


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen2.5-0.5B", 0.494), ("Llama-3.2-1B", 1.236), ("Llama-2-7B", 6.738), ("Llama-3.1-8B", 8.030)],
)
def test_memory_table_has_the_published_sizes(name, billions):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(memory_table.model_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=6e-4)


class Local:
    """generate.Process without a process."""

    def __init__(self, module, threads):
        self.server = generate_worker.Server(module, threads)

    def ask(self, call, **arguments):
        answer = json.loads(json.dumps(self.server.answer(json.loads(json.dumps({"call": call} | arguments)))))
        if "error" in answer:
            raise generate.Failed(answer["error"])
        return answer

    def close(self):
        pass


@pytest.fixture
def generation(monkeypatch, tmp_path):
    """A study of a Llama of two layers; torch.compile leaves it as it is, which would take half a minute."""
    monkeypatch.setitem(shapes.CONFIGS, "tiny", (256, 512, 4, 4, 2, 512))
    monkeypatch.setitem(memory_table.MODELS, "tiny", (transformers.LlamaConfig, {"tie_word_embeddings": True}))
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)

    def study(**changes):
        settings = dict(models=["tiny"], layers=2, batches=[1, 2], prompts=[8, 12], sparsities=[0.25, 0.5])
        settings |= dict(new_tokens=5, rounds=2, peers={}, compiled=[0.5], budget_seconds=1e9, weights_gb=1.0)
        settings |= dict(threads=torch.get_num_threads(), csv=tmp_path / "g.csv", start=Local)
        return generate.Study(**settings | changes)

    return study


def test_generation_study_end_to_end(generation, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    study = generation(peers={"llama.cpp": generate.PEERS["llama.cpp"]})
    study.run()
    rows = study.rows
    assert {(row["model"], row["layers"]) for row in rows} == {("tiny", "2 of 4")}
    of = {name: generate_report.matching(rows, measure=name) for name in {row["measure"] for row in rows}}
    methods = ["dense", "packed 25%", "packed 50%"]
    assert [row["method"] for row in of["load"]] == [row["method"] for row in of["resident"]] == methods
    eager, compiled = (generate_report.matching(of["decode"], mode=mode) for mode in ("eager", "compile"))
    assert [(row["method"], row["batch"]) for row in eager] == [(name, batch) for batch in (1, 2) for name in methods]
    assert [row["method"] for row in compiled] == [row["method"] for row in of["compile"]] == ["dense", "packed 50%"]
    assert all(row["value"] == pytest.approx(1e3 * row["batch"] / row["median_ms"]) for row in of["decode"])
    assert [(row["prompt"], row["method"]) for row in of["first token"]] == [(p, m) for p in (8, 12) for m in methods]
    assert len(of["logits error"]) == 5 and all(row["value"] < 0.03 for row in of["logits error"])
    # A layer: q and o of 2x2 tiles, k and v of 1x2, gate and up of 4x2, down of 2x4.
    linears = [1e6 * row["value"] for row in of["linears"]]
    tiles = 2 * (2 * 4 + 2 * 2 + 3 * 8)
    assert linears[0] == pytest.approx(32768 * tiles)
    assert 18432 * tiles < linears[2] < 18432 * tiles + 10_000  # and flags, and schedules for a GPU
    missing = of["missing"][0]["note"]
    assert "llama.cpp" == of["missing"][0]["method"] and missing.endswith("Install them, or pass --no-peers.")
    assert "expected the packages gguf, llama-cpp-python and safetensors, got: " in missing
    generate.main(["--from-csv", str(tmp_path / "g.csv"), "--plot", str(tmp_path / "g.png")])
    printed = capsys.readouterr().out
    assert "(1.00x)" in printed and "not measured: tiny llama.cpp : RuntimeError: expected the packages" in printed
    assert (tmp_path / "g.png").stat().st_size > 10_000


def test_generation_names_what_was_cut(generation, capsys):
    study = generation(budget_seconds=0.0, sparsities=[0.5])
    study.run()
    generate_report.print_report(study.rows)
    printed = capsys.readouterr().out
    assert "cut: tiny (2 of 4 layers): first token, eager, batch 1, prompt 12: no time left" in printed
    assert printed.count("cut: ") == len(generate.cells([1, 2], [8, 12], True)) == 4


def test_a_wrong_packed_model_ends_the_study(generation, monkeypatch):
    right = TiledLinear.forward
    monkeypatch.setattr(TiledLinear, "forward", lambda layer, x: -right(layer, x))
    wrong = r"tiny, packed 50%, eager: expected logits within 0.05 of the dense model with the same zeros, got"
    with pytest.raises(SystemExit, match=wrong):
        generation(sparsities=[0.5]).run()


def test_a_generating_process_that_fails_or_dies_is_one_line():
    process = generate.Process("benchmarks.rivals.no_such_peer", 1)
    with pytest.raises(
        generate.Failed, match=r"^ModuleNotFoundError: No module named 'benchmarks.rivals.no_such_peer'$"
    ):
        process.ask("load", folder="nowhere")
    with pytest.raises(
        generate.Failed, match=r"^RuntimeError: expected a loaded engine, got none. Send a load request"
    ):
        process.ask("generate", batch=1, prompt=1, new_tokens=2, mode="eager")
    process.child.kill()
    with pytest.raises(generate.Failed, match=r"^load: exit code -9: no message$"):
        process.ask("load", folder="nowhere")
    process.close()


@pytest.mark.parametrize(
    ("flag", "wrong", "expected"),
    [("--sparsity", "0", "0.01 to 0.5"), ("--new-tokens", "1", "2 to 2048"), ("--rounds", "0", "1 or more")],
)
def test_generation_refuses_numbers_out_of_range(flag, wrong, expected, capsys):
    with pytest.raises(SystemExit):
        generate.main([flag, wrong])
    assert f"{flag}: expected numbers of {expected}, got {wrong}" in capsys.readouterr().err


def test_generation_cells_in_order_of_interest():
    names = [str(cell).replace(", ", " ") for cell in generate.cells([1, 4, 16], [16, 512], True)]
    assert names[0] == "decode eager batch 1 prompt 16" and names[1] == "first token eager batch 1 prompt 512"
    assert [name.split(" prompt")[0] for name in names[2:]] == [
        "decode eager batch 4",
        "decode compile batch 1",
        "decode eager batch 16",
    ]
    assert len(generate.cells([4], [16], False)) == 2  # the first token is that of one sequence


def test_layers_that_fit_by_hand():
    # 7B: a layer has 202 M weights, embedding and head 262 M.
    assert generate.layers_that_fit("Llama-2-7B", [], 0, 1.4) == 2
    assert generate.layers_that_fit("Llama-2-7B", [], 1, 1.4) == 1
    assert generate.layers_that_fit("Llama-2-7B", [0.5], 0, 2.32) == 2  # 0.56 of a layer, and another head
    assert generate.layers_that_fit("Llama-2-7B", [], 0, 100.0) == 32


def test_gguf_names_and_order_of_rotary_rows():
    assert peer_llama_cpp.gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert peer_llama_cpp.gguf_name("model.layers.11.self_attn.q_proj.bias") == "blk.11.attn_q.bias"
    assert peer_llama_cpp.gguf_name("model.layers.0.post_attention_layernorm.weight") == "blk.0.ffn_norm.weight"
    rows = torch.arange(8)[:, None].numpy()  # two heads of four rows: 0 turns with 2, 1 with 3
    assert peer_llama_cpp.interleaved_halves(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (bench_tile_linear_cpu.main, ["--tokens", "0"], "--tokens: expected numbers of 1 or more, got 0"),
        (bench_tile_linear_cpu.main, ["--sparsity", "45"], "--sparsity: expected numbers of 0 to 0.5, got 45.0"),
        (bench_tile_linear_cpu.main, ["--sparsity", "nan"], "--sparsity: expected numbers of 0 to 0.5, got nan"),
        (bench_tile_linear_cpu.main, ["--repeats", "0"], "--repeats: expected numbers of 1 or more, got 0"),
        (bench_tile_experts.main, ["--tokens", "0"], "--tokens: expected numbers of 1 or more, got 0"),
        (bench_tile_linear_cpu.main, ["--csv", "."], "argument --csv: expected the path of a file to write, got ."),
        (bench_tile_linear_cpu.main, ["--plot", "a.xyz"], "argument --plot: expected a name that ends in .png"),
        (generate.main, ["--weights-gb", "0"], "--weights-gb: expected numbers of 1 or more, got 0.0"),
        (generate.main, ["--plot", "README.md/a.png"], "expected the path of a file to write, got README.md/a.png"),
    ],
)
def test_bad_options_are_refused_before_any_work(main, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "", "a,b\n1,2\n"])
def test_an_earlier_csv_must_be_one(text, tmp_path):
    path = tmp_path / "rows.csv"
    if text is not None:
        path.write_text(text)
    for main in (bench_tile_linear_cpu.main, generate.main):
        with pytest.raises(SystemExit, match=r"--from-csv: expected (a file|rows) that --csv wrote, got"):
            main(["--from-csv", str(path)])


TINY_MIXTURE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_decoding_of_a_mixture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mixture_decode, "MODELS", {"tiny": ("MixtralConfig", TINY_MIXTURE, 2)})
    flags = ["--batches", "1", "3", "--prompts", "5", "--rounds", "2", "--csv", str(tmp_path / "m.csv")]
    mixture_decode.main(flags)
    rows = harness.read_rows(tmp_path / "m.csv")
    cells = {(row["measure"], row["batch"], row["tokens"]) for row in rows}
    assert cells == {("decode", "1", "1"), ("decode", "3", "1"), ("prompt", "1", "5")}
    for row in rows:
        assert float(row["tokens_per_s"]) == pytest.approx(
            1e3 * int(row["batch"]) * int(row["tokens"]) / float(row["median_ms"]), rel=0.02, abs=0.1
        )
    dense, packed = (next(r for r in rows if r["method"] == name) for name in ("dense, grouped_mm", "packed"))
    assert packed["sparsity"] == "0.45" and int(packed["weight_bytes"]) < int(dense["weight_bytes"])
    methods = {row["method"] for row in rows if row["batch"] == "1" and row["measure"] == "decode"}
    assert methods == {"dense, eager", "dense, grouped_mm", "dense, batched_mm", "packed"}
    assert "tiny: 2 layers" in capsys.readouterr().out


def test_a_mixture_that_is_packed_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(mixture_decode, "MODELS", {"tiny": ("MixtralConfig", TINY_MIXTURE, 1)})
    right = mixture_decode.packed_copy

    def wrong(dense, sparsity):
        packed = right(dense, sparsity)
        packed.model.layers[0].mlp.experts.down.weight.bitwise_xor_(8)
        return packed

    monkeypatch.setattr(mixture_decode, "packed_copy", wrong)
    with pytest.raises(SystemExit, match=r"expected the logits of the dense model with the same zeros, got others"):
        mixture_decode.main(["--batches", "1", "--prompts", "--rounds", "2"])
    with pytest.raises(SystemExit):
        mixture_decode.main(["--sparsity", "0.6"])
