"""Loads libpatch_kernels_ops.so once and says in one sentence what is wrong if it cannot."""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

_MINIMUM_TORCH = (2, 11)
# Of the ops' arguments and meaning; PK_INTERFACE of csrc/bindings/cpu.cpp.
_INTERFACE = "3"
_BUILD_COMMAND = "pip install --no-build-isolation -e ."


def library_path() -> Path:
    """The library in use: $PATCH_KERNELS_LIBRARY, or the one built into this package."""
    override = os.environ.get("PATCH_KERNELS_LIBRARY")
    return Path(override) if override else Path(__file__).parent / "libpatch_kernels_ops.so"


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def load_library() -> Path:
    """Register the ops with torch. raises ImportError saying what was expected, what is there and what to do."""
    path = library_path()
    if _torch_version() < _MINIMUM_TORCH:
        got = torch.__version__
        raise ImportError(f"patch_kernels: expected torch 2.11 or newer, got {got}. pip install 'torch>=2.11' first.")
    if not path.is_file():
        raise ImportError(
            f"patch_kernels: expected the compiled ops at {path}, got no such file. "
            f"Build them: {_BUILD_COMMAND} (or unset PATCH_KERNELS_LIBRARY if it points elsewhere)."
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"patch_kernels: {path} does not load into torch {torch.__version__}: {error}. It was probably built for "
            f"another system; rebuild it here: {_BUILD_COMMAND}."
        ) from error
    info = build_info(path)
    if (interface := info.get("interface", "none")) != _INTERFACE:
        raise ImportError(
            f"patch_kernels: expected compiled ops with interface {_INTERFACE}, got {interface} at {path}: they are of "
            f"another version than these Python files. Rebuild them: {_BUILD_COMMAND}."
        )
    _check_environment(info["cpu_instruction_sets"].split())
    card_check_seconds()
    return path


def _check_environment(instruction_sets: list[str]) -> None:
    """Refuse what csrc/cpu/dispatch.cpp and csrc/cuda/tile_linear.cu would overlook."""
    for name, known in (
        ("PATCH_KERNELS_CPU_ISA", instruction_sets),
        ("PATCH_KERNELS_CPU_KERNEL", ["few", "many", "torch"]),
        ("PATCH_KERNELS_SPARSE_GEMM", ["0", "1"]),
    ):
        if (value := os.environ.get(name)) and value not in known:
            raise ImportError(
                f"patch_kernels: expected {name} to be one of {', '.join(known)} on this machine, got {value!r}. "
                "Unset it."
            )


def card_check_seconds() -> float:
    """Seconds that the check of a card's kernels by another process may take; 0: there is none (card_check.py)."""
    value = os.environ.get("PATCH_KERNELS_CARD_CHECK_SECONDS") or "60"
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ImportError(
            f"patch_kernels: expected PATCH_KERNELS_CARD_CHECK_SECONDS to be a number of seconds, 0 for no check by "
            f"another process, got {value!r}. Unset it for 60."
        )
    return seconds


def build_info(path: Path) -> dict[str, str]:
    """What the library was built from and for: build_id, cuda_architectures, cuda_version, cpu_instruction_set (in use)
    and cpu_instruction_sets (all that this CPU has, least first).
    """
    function = ctypes.CDLL(str(path)).patch_kernels_build_info
    function.restype = ctypes.c_char_p
    return json.loads(function())


def gemm_status(path: Path, device_index: int) -> dict[str, str]:
    """The sparse GEMM of a device: family (sm90, sm80, none), state (unchecked, works, disabled) and reason."""
    function = cuda_function(path, "gemm_status")
    if function is None:
        return {"family": "none", "state": "disabled", "reason": "this build has no CUDA kernels"}
    return function(device_index)


def driver_complaint(path: Path, driver_version: int = 0, runtime_version: int = 0) -> str:
    """Why this machine's driver does not serve the CUDA kernels of this build, "" if it does. Does not initialise CUDA.

    With versions as CUDA gives them (12040 for 12.4): why such a driver does not serve such a runtime.
    """
    function = cuda_function(path, "driver_complaint")
    return "" if function is None else function(driver_version, runtime_version)["complaint"]


def cuda_function(path: Path, name: str) -> Callable[..., dict[str, str]] | None:
    """patch_kernels_<name> of the library, which returns JSON; None where the build has no CUDA kernels."""
    library = ctypes.CDLL(str(path))
    if not hasattr(library, f"patch_kernels_{name}"):
        return None
    function = getattr(library, f"patch_kernels_{name}")
    function.restype = ctypes.c_char_p
    return lambda *args: json.loads(function(*args))
