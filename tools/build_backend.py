"""The build backend: setuptools', and where CUDA kernels will be compiled also a wheel with CUTLASS's headers.

It is asked before setup.py runs. Both find the same nvcc and the same headers by these functions.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  what a backend has to offer

ROOT = Path(__file__).resolve().parents[1]
# The first with what the kernels use, and the first not tried. 3.6, 3.7, 3.8 and 4.2 make the same SASS.
CUTLASS_FLOOR, CUTLASS_CEILING = (3, 6), (4, 3)
CUTLASS = "nvidia-cutlass>={}.{},<{}.{}".format(*CUTLASS_FLOOR, *CUTLASS_CEILING)
KEPT_CUTLASS = ROOT / "build" / "cutlass"


def nvcc_path() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for candidate in (os.environ.get("CUDACXX"), shutil.which("nvcc"), f"{home}/bin/nvcc"):
        if candidate and shutil.which(candidate):
            return candidate
    return None


def cutlass_version(include: Path) -> tuple[int, ...] | None:
    """(major, minor, patch); None if the folder does not hold CUTLASS."""
    header = include / "cutlass/version.h"
    if not header.is_file() or not (include / "cute/config.hpp").is_file():
        return None
    text = header.read_text(errors="replace")
    numbers = dict(re.findall(r"#[ \t]*define[ \t]+CUTLASS_(MAJOR|MINOR|PATCH)[ \t]+(\d+)", text))
    names = ("MAJOR", "MINOR", "PATCH")
    return tuple(int(numbers[name]) for name in names) if numbers.keys() == set(names) else None


def cutlass_candidates() -> list[Path]:
    """$PATCH_CUTLASS_INCLUDE, or the wheel's: by path, so that build isolation does not hide an installed one."""
    if named := os.environ.get("PATCH_CUTLASS_INCLUDE"):
        return [Path(named)]
    wheel = "cutlass_library/source/include"
    candidates = [Path(sysconfig.get_path(key)) / wheel for key in ("platlib", "purelib")] + [KEPT_CUTLASS]
    spec = importlib.util.find_spec("cutlass_library")  # of an isolated build
    return candidates + ([Path(spec.origin).parents[1] / wheel] if spec and spec.origin else [])


def find_cutlass() -> Path | str:
    """The folder to include, or a sentence that says what is missing."""
    found = ""
    for include in cutlass_candidates():
        version = cutlass_version(include)
        if version and CUTLASS_FLOOR <= version < CUTLASS_CEILING:
            return include
        if version and not found:
            found = f"{include} holds version {'.'.join(map(str, version))}"
    named = os.environ.get("PATCH_CUTLASS_INCLUDE")
    if named and not found:
        found = f"PATCH_CUTLASS_INCLUDE={named} holds no cutlass/version.h and cute/config.hpp"
    return (
        f"patch-llm: the CUDA kernels need CUTLASS's headers, but {found or 'none were found'}. "
        f"Install them: pip install '{CUTLASS}', or set PATCH_CUTLASS_INCLUDE to CUTLASS's folder include; "
        "PATCH_KERNELS_CUDA=0 builds for the CPU alone."
    )


def cuda_requirements() -> list[str]:
    if os.environ.get("PATCH_KERNELS_CUDA") == "0" or nvcc_path() is None or isinstance(find_cutlass(), Path):
        return []
    return [CUTLASS]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + cuda_requirements()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + cuda_requirements()
