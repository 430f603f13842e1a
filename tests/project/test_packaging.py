"""The build driver's decisions and sentences, and rules for all source files."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from support import ROOT

import patch

SOURCE_FOLDERS = ("patch", "patch_kernels", "csrc", "tests", "benchmarks", "examples", "tools")


@pytest.fixture
def driver(monkeypatch):
    """setup.py as a module, without running setup()."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("driver", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = ("PATCH_KERNELS_CUDA", "PATCH_CUTLASS_INCLUDE", "TORCH_CUDA_ARCH_LIST")
    for name in (*settings, "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def backend(driver, monkeypatch, tmp_path):
    """tools/build_backend.py where an nvcc is found, and no CUTLASS; its site-packages are tmp_path / "site"."""
    module = sys.modules["build_backend"]
    monkeypatch.setattr(module, "nvcc_path", lambda: "/opt/nvcc")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.sysconfig, "get_path", lambda key: str(tmp_path / "site"))
    for where in (module, driver):
        monkeypatch.setattr(where, "KEPT_CUTLASS", tmp_path / "build/cutlass")
    for name in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        monkeypatch.setattr(module.build_meta, name, lambda settings: ["setuptools"])
    return module


def cutlass(folder: Path, version: str = "4.2.0") -> Path:
    """CUTLASS's folder include below `folder`, as its wheel has it."""
    include = folder / "cutlass_library/source/include"
    for name in ("cute/config.hpp", "cutlass/version.h"):
        (include / name).parent.mkdir(parents=True)
    names = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (include / "cutlass/version.h").write_text("".join(f"#define CUTLASS_{name} {n} \n" for name, n in names))
    (include / "cute/config.hpp").touch()
    return include


def test_no_torch_is_one_sentence(driver, monkeypatch, tmp_path):
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(driver.sysconfig, "get_path", lambda key: str(tmp_path))
    with pytest.raises(SystemExit, match=r"needs torch 2\.11 or newer .* pip install torch==2\.13\.0"):
        driver.torch_dir()


def test_torch_is_found_by_path_under_build_isolation(driver, monkeypatch, tmp_path):
    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(driver.sysconfig, "get_path", lambda key: str(tmp_path))
    assert driver.torch_dir() == tmp_path / "torch"


def test_cuda_modes(driver, monkeypatch):
    monkeypatch.setattr(driver, "nvcc_path", lambda: None)
    assert driver.cuda_flags() == ["-DPK_CUDA=OFF"]
    monkeypatch.setenv("PATCH_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="PATCH_KERNELS_CUDA=1 needs nvcc"):
        driver.cuda_flags()
    monkeypatch.setenv("PATCH_KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
        driver.cuda_flags()
    monkeypatch.setattr(driver, "nvcc_path", lambda: "/opt/nvcc")
    monkeypatch.setenv("PATCH_KERNELS_CUDA", "0")
    assert driver.cuda_flags() == ["-DPK_CUDA=OFF"]


def test_architecture_list(driver, monkeypatch):
    monkeypatch.setattr(driver, "nvcc_path", lambda: "/opt/nvcc")
    monkeypatch.setattr(driver, "cutlass_include", lambda: "/opt/cutlass")
    flags = ["-DPK_CUDA=ON", "-DCMAKE_CUDA_COMPILER=/opt/nvcc", "-DPK_CUTLASS_INCLUDE=/opt/cutlass"]
    assert driver.cuda_flags() == flags
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    assert driver.cuda_flags()[-1] == "-DCMAKE_CUDA_ARCHITECTURES=80-real;90a-real;120"


CUTLASS_REQUIREMENT = "nvidia-cutlass>=3.6,<4.3"


def test_no_cutlass_is_one_sentence(driver, backend, monkeypatch, tmp_path):
    install = (
        rf"\. Install them: pip install '{CUTLASS_REQUIREMENT}', or set PATCH_CUTLASS_INCLUDE to CUTLASS's folder "
        "include; PATCH_KERNELS_CUDA=0 builds for the CPU alone"
    )
    with pytest.raises(SystemExit, match="need CUTLASS's headers, but none were found" + install):
        driver.cutlass_include()
    for version in ("3.5.1", "4.3.0"):
        shutil.rmtree(tmp_path / "site", ignore_errors=True)
        include = cutlass(tmp_path / "site", version)
        with pytest.raises(SystemExit, match=rf"but {include} holds version {version}" + install):
            driver.cutlass_include()
    monkeypatch.setenv("PATCH_CUTLASS_INCLUDE", str(tmp_path))
    missing = rf"but PATCH_CUTLASS_INCLUDE={tmp_path} holds no cutlass/version\.h and cute/config\.hpp"
    with pytest.raises(SystemExit, match=missing + install):
        driver.cutlass_include()


def test_cutlass_is_found_by_path_under_build_isolation(driver, backend, monkeypatch, tmp_path):
    for version in ("3.6.0", "4.2.1"):
        shutil.rmtree(tmp_path / "site", ignore_errors=True)
        installed = cutlass(tmp_path / "site", version)
        assert driver.cutlass_include() == installed
    named = cutlass(tmp_path / "named")
    (named / "cutlass/version.h").write_text(
        "#  define CUTLASS_MAJOR  4\n#define CUTLASS_MINOR\t1\n#define CUTLASS_PATCH 0\n"
    )
    monkeypatch.setenv("PATCH_CUTLASS_INCLUDE", str(named))
    assert driver.cutlass_include() == named
    (named / "cutlass/version.h").write_text("")
    with pytest.raises(SystemExit, match=r"holds no cutlass/version\.h"):
        driver.cutlass_include()
    monkeypatch.setenv("PATCH_CUTLASS_INCLUDE", "")  # as if it were not set
    assert driver.cutlass_include() == installed


def test_cutlass_of_an_isolated_build_is_kept_for_the_next_one(driver, backend, monkeypatch, tmp_path):
    cutlass(tmp_path / "site", "3.5.1")  # passed over
    isolated = cutlass(tmp_path / "isolated")
    spec = SimpleNamespace(origin=str(tmp_path / "isolated/cutlass_library/__init__.py"))
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: spec)
    kept = driver.cutlass_include()
    assert kept == tmp_path / "build/cutlass" and backend.cutlass_version(kept) == (4, 2, 0)
    shutil.rmtree(isolated)
    assert driver.cutlass_include() == kept
    assert backend.cuda_requirements() == []


def test_cutlass_is_required_of_cuda_builds_alone(backend, monkeypatch, tmp_path):
    def requirements():
        wheel, editable = backend.get_requires_for_build_wheel(), backend.get_requires_for_build_editable()
        assert wheel == editable
        return wheel

    assert requirements() == ["setuptools", CUTLASS_REQUIREMENT]
    monkeypatch.setenv("PATCH_KERNELS_CUDA", "0")
    assert requirements() == ["setuptools"]
    monkeypatch.setenv("PATCH_KERNELS_CUDA", "auto")
    monkeypatch.setattr(backend, "nvcc_path", lambda: None)
    assert requirements() == ["setuptools"]
    monkeypatch.setattr(backend, "nvcc_path", lambda: "/opt/nvcc")
    cutlass(tmp_path / "site")
    assert requirements() == ["setuptools"]


def test_cmake_without_cutlass_is_one_sentence(tmp_path):
    torch = Path(importlib.util.find_spec("torch").origin).parent
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DPK_CUDA=ON", f"-DPK_TORCH_DIR={torch}"]
    run = subprocess.run([*command, "-DPK_CUTLASS_INCLUDE=/nowhere"], capture_output=True, text=True)
    said = " ".join(run.stderr.split())
    assert run.returncode and "no CUTLASS headers in PK_CUTLASS_INCLUDE='/nowhere'. Name the folder that holds" in said


def test_importing_patch_is_light():
    """`patch-llm --help` must not wait for torch or transformers: the parser reads every command's settings."""
    script = (
        "import sys; from patch.cli.parser import build_parser; build_parser().format_help(); "
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def sources():
    suffixes = {".py", ".h", ".cpp", ".cu"}
    return [p for folder in SOURCE_FOLDERS for p in sorted((ROOT / folder).rglob("*")) if p.suffix in suffixes]


def test_files_open_by_saying_what_they_are_for_and_are_ascii():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), path
        assert text.startswith(('"""', "//")) or path.stat().st_size == 0, path


def test_no_kernel_file_includes_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in {".h", ".cpp", ".cu"} and "bindings" not in path.parts and path.name != "schema.cpp":
            assert not re.search(r"#include <torch", path.read_text()), path


def test_kernels_do_not_know_the_learner():
    for path in (ROOT / "patch_kernels").glob("*.py"):
        assert not re.search(r"^\s*(from|import) patch[. ]", path.read_text(), re.MULTILINE), path


def test_no_test_imports_another():
    """What tests share is in tests/support."""
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    names = "|".join(path.stem for path in tests)
    for path in tests:
        assert not re.search(rf"^\s*(from|import) (\w+\.)*({names})\b", path.read_text(), re.MULTILINE), path
    assert len({path.name for path in tests}) == len(tests)  # pytest imports them by their names


def test_the_version_stands_in_one_place():
    assert re.search(r'^dynamic = \["version"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md"):
        assert f'"{patch.__version__}"' not in (ROOT / name).read_text(), name
    assert f"## {patch.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_mathematics_does_not_drown_in_checks():
    """Share of validation by tools/measure_style.py; declare and share checks instead of raising this."""
    command = [sys.executable, "tools/measure_style.py", "patch", "patch_kernels"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(re.search(r"([\d.]+)% validation", run.stdout)[1]) < 15


def test_published_functions_are_faces():
    for name in ("utils", "fine_tune_mask"):
        assert len((ROOT / f"patch/{name}.py").read_text().splitlines()) < 120
