"""The host side of tile_linear on CUDA, on a machine without a GPU: CPU tensors, and launches that are only recorded.

csrc/check/cuda_host is the library. Loading it takes tile_linear on CPU tensors over, in this process for good.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

import patch_kernels.ops.tile_linear as tile_linear
from tools.build_backend import find_cutlass

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/cuda_host"


def missing_tool() -> str | None:
    """What building needs and this machine lacks."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    has_nvcc = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if not has_nvcc:
        return "nvcc"
    if isinstance(find_cutlass(), str):
        return "CUTLASS's headers"
    return None if shutil.which("cmake") else "cmake"


def build(folder: Path = BUILD, source: Path = ROOT) -> Path:
    """Build the library incrementally; half a minute the first time."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (folder / "CMakeCache.txt").exists() else []
    places = [f"-DPK_TORCH_DIR={Path(torch.__file__).parent}", f"-DPK_CUTLASS_INCLUDE={find_cutlass()}"]
    for command in (
        ["cmake", "-S", source / "csrc/check/cuda_host", "-B", folder, *generator, *places],
        ["cmake", "--build", folder, "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"cuda_host: {' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return folder / "libcuda_host.so"


_MAP = ("base", "cols", "rows", "stride_bytes", "box_rows", "type")
# What fake_last_launch in csrc/check/cuda_host/fake_cuda.cpp writes.
LAUNCH = (
    *("grid", "cluster", "spread", "overlaps", "x", "payload", "bias", "y", "schedule_tiles", "tokens", "rows", "cols"),
    *("x_stride", "workers", "token_ctas", "row_ctas", "splits", "layers", "units"),
    *(f"x_map_{name}" for name in _MAP),
    *(f"y_map_{name}" for name in _MAP),
)

# What fake_last_layers writes of each layer.
LAYER = (
    *("payload", "bias", "y", "schedule_tiles", "rows", "first_unit", "first_token", "tokens", "y_stride"),
    *(f"y_map_{name}" for name in _MAP[:4]),
)
MOST_LAYERS = 16  # kMaxLayers of csrc/gemm/problem.h


class CudaHost:
    """The loaded library, and what it saw."""

    def __init__(self, path: Path):
        torch.ops.load_library(str(path))
        self.path = path
        self.library = ctypes.CDLL(str(path))

    def last_launch(self) -> SimpleNamespace:
        numbers = (ctypes.c_int64 * len(LAUNCH))()
        self.library.fake_last_launch(numbers)
        return SimpleNamespace(**dict(zip(LAUNCH, numbers, strict=True)))

    def last_layers(self) -> list[SimpleNamespace]:
        numbers = (ctypes.c_int64 * (MOST_LAYERS * len(LAYER)))()
        count, width = self.library.fake_last_layers(numbers), len(LAYER)
        rows = (numbers[width * i : width * (i + 1)] for i in range(count))
        return [SimpleNamespace(**dict(zip(LAYER, row, strict=True))) for row in rows]

    def counts(self) -> dict[str, int]:
        numbers = (ctypes.c_int * 3)()
        self.library.fake_counts(numbers)
        return dict(zip(("launches", "encodes", "syncs"), numbers, strict=True))

    def status(self, device: int) -> dict[str, str]:
        self.library.patch_kernels_gemm_status.restype = ctypes.c_char_p
        return json.loads(self.library.patch_kernels_gemm_status(device))


@contextlib.contextmanager
def tensors_are_on_cuda() -> Iterator[None]:
    """What Python asks of every tensor is answered as on a GPU whose kernels are known to work."""
    torch.Tensor.is_cuda = True  # type: ignore[assignment,misc]
    tile_linear._decided.add(-1)  # the index of a CPU
    try:
        yield
    finally:
        del torch.Tensor.is_cuda
        tile_linear._decided.discard(-1)
