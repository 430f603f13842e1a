"""The CPU kernels of tile_linear in csrc/check/cpu_driver.cpp: exact, same bits, no access beyond their data."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT

from patch_kernels._library import build_info
from patch_kernels.ops import LIBRARY_PATH

INSTRUCTION_SETS = build_info(LIBRARY_PATH)["cpu_instruction_sets"].split()
EMULATED = "amx_emulated"  # the kernel for AMX with its registers in C++
SANITIZERS = ("thread", "address,undefined")
CROSS_COMPILER, CROSS_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def build(name: str, *options: str) -> Path:
    """The driver, built incrementally in a folder of its own under build/."""
    folder = ROOT / "build" / name
    is_configured = (folder / "CMakeCache.txt").exists()
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not is_configured else []
    for command in (
        ["cmake", "-S", ROOT / "csrc" / "check", "-B", folder, *generator, *options],
        ["cmake", "--build", folder, "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "cpu_driver"


def check(command: list, instruction_set: str, seconds: float) -> None:
    environment = {**os.environ, "PATCH_KERNELS_CPU_ISA": instruction_set}
    done = subprocess.run(
        [*command, "--seconds", str(seconds), "--seed", "1"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    if instruction_set == EMULATED and not done.stdout.startswith(EMULATED):
        pytest.skip("apart from its registers, the kernel for AMX needs a CPU with AVX-512 BF16 and VBMI2")
    assert done.stdout.startswith(f"{instruction_set}: ") and done.stdout.endswith(" passed, 0 failed\n")


@pytest.fixture(scope="session")
def driver():
    return build("cpu_driver")


def sanitized(sanitizer: str) -> Path:
    links = subprocess.run(
        [os.environ.get("CXX", "c++"), f"-fsanitize={sanitizer}", "-x", "c++", "-", "-o", os.devnull],
        input="int main() {}", capture_output=True, text=True,
    )  # fmt: skip
    if links.returncode != 0:
        pytest.skip(f"this C++ compiler does not link with -fsanitize={sanitizer}")
    name = "cpu_driver_" + sanitizer.replace(",", "_")
    return build(name, f"-DPK_DRIVER_OPTIONS=-O1;-g;-fno-sanitize-recover=all;-fsanitize={sanitizer}")


@pytest.mark.parametrize("instruction_set", [*INSTRUCTION_SETS, EMULATED])
def test_every_instruction_set(driver, instruction_set):
    check([driver], instruction_set, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", [*INSTRUCTION_SETS, EMULATED])
def test_every_instruction_set_long(driver, instruction_set):
    check([driver], instruction_set, 20)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("instruction_set", [*INSTRUCTION_SETS, EMULATED])
def test_sanitizers(sanitizer, instruction_set):
    check([sanitized(sanitizer)], instruction_set, 3)


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["generic", "neon", "neon_bf16"])
def test_arm_under_emulation(instruction_set):
    if not (shutil.which(CROSS_COMPILER) and shutil.which(CROSS_EMULATOR)):
        pytest.skip(f"needs {CROSS_COMPILER} and {CROSS_EMULATOR}")
    program = build(
        "cpu_driver_aarch64",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    check([CROSS_EMULATOR, program], instruction_set, 5)
