"""Builds the compiled ops by CMake (CMakeLists.txt holds all sources and flags) and nothing else.

PATCH_KERNELS_CUDA=auto|0|1   CUDA kernels: if nvcc is found (default), never, or fail without nvcc
PATCH_CUTLASS_INCLUDE         CUTLASS's folder include, for CUDA; default that of the nvidia-cutlass wheel
TORCH_CUDA_ARCH_LIST          for example "8.0;9.0a"; default all of CMakeLists.txt
MAX_JOBS                      parallel compilations; default the number of cores
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))  # where pip finds the backend too
from build_backend import KEPT_CUTLASS, find_cutlass, nvcc_path  # noqa: E402

PYBIND11 = importlib.util.find_spec("pybind11")  # optional: patch_kernels._host is for tests and tools


def torch_dir() -> Path:
    """Folder of the torch to build against; found by path, so that pip's build isolation does not hide it."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    for candidate in candidates:
        if (candidate / "include/torch/csrc/stable/library.h").is_file():
            return candidate
    sys.exit(
        "patch-llm: building needs torch 2.11 or newer in this environment, but none was found. "
        "Install it first: pip install torch==2.13.0, then repeat this command."
    )


def cutlass_include() -> Path:
    """Folder of CUTLASS's headers."""
    include = find_cutlass()
    if isinstance(include, str):
        sys.exit(include)
    site = [Path(sysconfig.get_path(key)) for key in ("platlib", "purelib")]
    if os.environ.get("PATCH_CUTLASS_INCLUDE") or include == KEPT_CUTLASS or set(site) & set(include.parents):
        return include
    # Of an isolated environment, which is gone after this build: kept, so that the next one compiles only what changed.
    shutil.rmtree(KEPT_CUTLASS, ignore_errors=True)
    copy = shutil.copytree(include, KEPT_CUTLASS.with_suffix(".part"), dirs_exist_ok=True)
    return copy.rename(KEPT_CUTLASS)


def cuda_flags() -> list[str]:
    mode = os.environ.get("PATCH_KERNELS_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"patch-llm: PATCH_KERNELS_CUDA must be auto, 0 or 1, got {mode!r}. Unset it for auto.")
    nvcc = nvcc_path() if mode != "0" else None
    if mode == "1" and nvcc is None:
        sys.exit("patch-llm: PATCH_KERNELS_CUDA=1 needs nvcc, but none was found. Set CUDA_HOME or CUDACXX.")
    if nvcc is None:
        return ["-DPK_CUDA=OFF"]
    flags = ["-DPK_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DPK_CUTLASS_INCLUDE={cutlass_include()}"]
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    names = []
    for arch in filter(None, archs):
        number = arch.removesuffix("+PTX").replace(".", "")
        names.append(number if arch.endswith("+PTX") else f"{number}-real")
    return flags + ([f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(names)}"] if names else [])


def build_id() -> str:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return described.stdout.strip() or "unknown"


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("libpatch_kernels_ops"):
            return fullname.replace(".", os.sep) + ".so"  # no Python tag: it does not depend on Python
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        # One CMake build makes every extension.
        self.build_extension(self.extensions[0])

    def build_extension(self, ext: Extension) -> None:
        output = (ROOT / self.get_ext_fullpath(ext.name)).parent.resolve()
        cuda = cuda_flags()
        build = ROOT / "build" / f"{'cuda' if 'PK_CUDA=ON' in cuda[0] else 'cpu'}-{sysconfig.get_platform()}"
        environment = dict(os.environ)
        environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment.get("PATH", "")])
        cmake = shutil.which("cmake", path=environment["PATH"]) or "cmake"
        ninja = shutil.which("ninja", path=environment["PATH"]) or ""
        launcher = shutil.which("ccache") or shutil.which("sccache")
        configure = [
            cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",  # a warm cache may name the ninja of a deleted isolated environment
            f"-DCMAKE_BUILD_TYPE={os.environ.get('CMAKE_BUILD_TYPE', 'Release')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPK_TORCH_DIR={torch_dir()}",
            f"-DPK_BUILD_ID={build_id()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *cuda,
        ]  # fmt: skip
        if launcher:
            configure += [f"-DCMAKE_{lang}_COMPILER_LAUNCHER={launcher}" for lang in ("CXX", "CUDA")]
        if PYBIND11:
            configure += ["-DPK_HOST_MODULE=ON", f"-Dpybind11_DIR={Path(PYBIND11.origin).parent}/share/cmake/pybind11"]
        subprocess.run(configure, check=True, env=environment)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "-j", jobs], check=True, env=environment)


modules = ["libpatch_kernels_ops", *(["_host"] if PYBIND11 else [])]
setup(
    ext_modules=[Extension(f"patch_kernels.{name}", sources=[]) for name in modules],
    cmdclass={"build_ext": CMakeBuild},
)
