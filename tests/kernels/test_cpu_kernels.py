"""The CPU kernels of tile_linear behind torch: which one takes a call, threads, memory, and what the variables refuse.

Their arithmetic on every instruction set is in test_cpu_driver.py.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch
from support import ROOT
from support.integer_case import integer_case

from benchmarks import harness
from benchmarks.ops.bench_tile_linear import packed_weight
from patch_kernels import TiledWeight, _library, reference
from patch_kernels.ops import LIBRARY_PATH

TOKENS = (1, 3, 4, 5, 8, 9, 16, 17, 31, 33, 64, 65, 200)


def all_are_exact() -> bool:
    """Integer problems of ragged sizes; the last has more rows than one block of unpacked weight."""
    cases = [(130, 260, tokens) for tokens in TOKENS] + [(300, 25000, 3)]
    for dtype in (torch.bfloat16, torch.float16):
        for rows, cols, tokens in cases:
            weight, keep, tiles, x, bias = integer_case(rows, cols, tokens, 0.5, dtype, seed=tokens)
            y = TiledWeight.pack(weight, keep, tiles).matmul(x, bias)
            if not torch.equal(y, reference.tile_linear(x, torch.where(keep, weight, 0), bias)):
                return False
    return True


@pytest.mark.parametrize(("kernel", "isa"), [("few", None), ("many", None), ("torch", None), ("few", "generic")])
def test_each_kernel_takes_any_call(kernel, isa):
    """Layers and mixtures; the last is a set without a kernel for few tokens."""
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/kernels")]
    script = (
        f"import sys; sys.path[:0] = {paths!r}; import test_cpu_kernels as t; from support import experts_case as e; "
    )
    script += "print(t.all_are_exact(), e.experts_are_exact())"
    environment = dict(os.environ, PATCH_KERNELS_CPU_KERNEL=kernel) | ({"PATCH_KERNELS_CPU_ISA": isa} if isa else {})
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.stdout.split() == ["True", "True"], run.stderr


@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_bits_from_any_number_of_threads(tokens, dtype):
    tiled = packed_weight(torch.randn(640, 1024).to(dtype), 0.3)
    x = torch.randn(tokens, 1024).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(tiled.matmul(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("tokens", [5, 64, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_invariance_at_any_number_of_tokens(tokens, dtype):
    tiled = packed_weight(torch.randn(384, 640).to(dtype), 0.3)
    x = torch.randn(tokens, 640).to(dtype)
    whole = tiled.matmul(x, batch_invariant=True)
    for i in (0, tokens // 2, tokens - 1):
        assert torch.equal(tiled.matmul(x[i], batch_invariant=True), whole[i])


def long_call(rows: int, cols: int, tokens: int):
    tiled = packed_weight(torch.randn(rows, cols).bfloat16(), 0.25)
    x = torch.randn(tokens, cols).bfloat16()
    tiled.matmul(x[:32])  # threads
    return functools.partial(tiled.matmul, x)


def long_product(rows: int, cols: int, tokens: int):
    """torch's own product, which may copy x: with AMX it does."""
    weight, x = torch.randn(rows, cols).bfloat16(), torch.randn(tokens, cols).bfloat16()
    torch.nn.functional.linear(x[:32], weight)
    return functools.partial(torch.nn.functional.linear, x, weight)


def test_scratch_of_a_long_prompt_is_bounded(monkeypatch):
    rows, tokens = 512, 2048
    sizes, y = (rows, 4096, tokens), 2 * rows * tokens
    of_torch = harness.peak_bytes(functools.partial(long_product, *sizes))
    monkeypatch.setenv("PATCH_KERNELS_CPU_KERNEL", "many")
    assert harness.peak_bytes(functools.partial(long_call, *sizes)) - y < 8 << 20
    monkeypatch.setenv("PATCH_KERNELS_CPU_KERNEL", "torch")
    assert harness.peak_bytes(functools.partial(long_call, *sizes)) - y < (8 << 20) + of_torch


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "PATCH_KERNELS_CPU_ISA",
            r"PATCH_KERNELS_CPU_ISA to be one of generic.* on this machine, got 'sse9'\. Unset",
        ),
        ("PATCH_KERNELS_CPU_KERNEL", "expected PATCH_KERNELS_CPU_KERNEL to be one of few, many, torch .* got 'sse9'"),
    ],
)
def test_unknown_names_are_refused(name, message, monkeypatch):
    monkeypatch.setenv(name, "sse9")
    with pytest.raises(ImportError, match=message):
        _library.load_library()


def test_an_empty_name_is_none(monkeypatch):
    monkeypatch.setenv("PATCH_KERNELS_CPU_ISA", "")
    assert _library.load_library() == LIBRARY_PATH


def test_instruction_sets_of_this_cpu():
    info = _library.build_info(LIBRARY_PATH)
    known = info["cpu_instruction_sets"].split()
    assert known[0] == "generic" and info["cpu_instruction_set"] in known
