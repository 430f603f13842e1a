"""A driver older than the library's CUDA runtime: one sentence, and torch serves the packed weight's ops alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from support.integer_case import integer_case
from support.strategies import SHAPES, hybrid_mask

from patch_kernels import TiledWeight, by_torch, reference
from patch_kernels._library import build_info, driver_complaint, gemm_status
from patch_kernels.ops import LIBRARY_PATH, tile_linear

needs_cuda_build = pytest.mark.skipif(
    build_info(LIBRARY_PATH)["cuda_architectures"] == "none", reason="this build has no CUDA kernels"
)
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@needs_cuda_build
@pytest.mark.parametrize(
    ("driver", "runtime", "words"),
    [
        (13000, 13000, ""),
        (13000, 13020, ""),  # minor versions of one major version work together
        (14010, 13000, ""),
        (12080, 12080, ""),
        (12090, 13000, "runtime is 13.0, got one for CUDA 12.9. Update the driver, or rebuild"),
        (11080, 12080, "driver for CUDA 12 or newer, as this build's runtime is 12.8, got one for CUDA 11.8"),
        (0, 13000, "driver for CUDA 13 or newer, as this build's runtime is 13.0, got none. Install one"),
    ],
)
def test_versions(driver, runtime, words):
    complaint = driver_complaint(LIBRARY_PATH, driver, runtime)
    assert words in complaint and bool(words) == bool(complaint)


@pytest.fixture(scope="module")
def old_driver(tmp_path_factory):
    """Environment with a libcuda of CUDA 11.8, which must not be initialised when the library is loaded."""
    folder = tmp_path_factory.mktemp("driver")
    source = (
        "#include <stdio.h>\nint cuDriverGetVersion(int *v) { *v = 11080; return 0; }\n"
        'int cuInit(unsigned f) { puts("cuInit"); fflush(stdout); return 100; }\n'
    )
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", folder / "libcuda.so.1"]
    subprocess.run(command, input=source, text=True, check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


def output(script: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@needs_cuda_build
@needs_compiler
def test_an_old_driver_is_told_and_not_initialised(old_driver):
    script = (
        "from patch_kernels._library import driver_complaint, gemm_status; from patch_kernels.ops import LIBRARY_PATH;"
        "print(driver_complaint(LIBRARY_PATH)); print(gemm_status(LIBRARY_PATH, 0))"
    )
    complaint, status = output(script, old_driver).splitlines()
    assert "got one for CUDA 11.8. Update the driver" in complaint
    assert "'state': 'disabled'" in status and "got one for CUDA 11.8" in status


@needs_cuda_build
@needs_compiler
def test_torch_takes_over_where_it_has_cuda_and_the_driver_is_old(old_driver):
    script = (
        "import torch; torch.version.cuda = '11.8'; import patch_kernels.ops;"
        "print(*('by_torch.py' in torch._C._dispatch_dump('patch_kernels::' + op) for op in ('unpack_tiles',"
        " 'tile_linear', 'tile_linear_train', 'tile_linear_group2', 'tile_linear_group4', 'masked_weight')))"
    )
    assert output(script, old_driver).split() == ["True"] * 5 + ["False"]


def test_no_driver_is_no_error_on_a_torch_without_cuda():
    """`patch-llm info` on such a machine says it; importing does not."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    assert "by_torch.py" not in torch._C._dispatch_dump("patch_kernels::tile_linear")
    assert gemm_status(LIBRARY_PATH, 0)["state"] == "disabled"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparse_share", [0.0, 0.5, 1.0])
def test_unpacking_by_torch_gives_every_bit(sparse_share, dtype, monkeypatch):
    monkeypatch.setattr(by_torch, "_CHUNK", 1 << 15)  # several steps
    for shape in (*SHAPES, (640, 1000), (1025, 130)):
        keep, tiles = hybrid_mask(*shape, sparse_share, torch.Generator().manual_seed(0))
        tiled = TiledWeight.pack(torch.randn(shape).to(dtype), keep, tiles)
        unpacked = by_torch.unpack_tiles(tiled.payload, tiles.to(torch.uint8), *shape, dtype)
        assert torch.equal(unpacked.view(torch.int16), tiled.unpack().view(torch.int16))


@pytest.fixture
def served_by_torch():
    library = by_torch.serve("CPU")
    yield
    library._destroy()


def test_every_op_of_a_packed_weight_is_served(served_by_torch):
    weights, results = [], []
    for seed, rows in enumerate((256, 130, 64)):
        weight, keep, tiles, x, bias = integer_case(rows, 300, 5, 0.5, torch.float16, seed=seed)
        tiled = TiledWeight.pack(weight, keep, tiles)
        x = (torch.arange(1500) % 5 - 2).half().reshape(5, 300)
        dense = torch.where(keep, weight, 0)
        assert torch.equal(tiled.unpack(), dense)
        expected = reference.tile_linear(x, dense, bias)
        assert torch.equal(tiled.matmul(x, bias), expected)
        trained = x.clone().requires_grad_()
        tiled.matmul(trained).sum().backward()
        assert torch.equal(trained.grad, dense.sum(0).expand(5, 300))
        weights += tiled.payload, tile_linear.tile_flags(tiles), None, rows, bias
        results.append(expected)
    assert all(map(torch.equal, tile_linear.tile_linear_group(x, weights), results))
    assert tiled.matmul(x[:0]).shape == (0, 64)


def test_the_compiled_ops_are_back_afterwards():
    assert "by_torch.py" not in torch._C._dispatch_dump("patch_kernels::tile_linear")
