"""Compile the micro programs, and with --peer the CUTLASS rival, for sm_90a on a machine without a GPU.

python -m benchmarks.card.build --out build/gpu --peer --cutlass /path/of/cutlass

The binaries hold the CUDA runtime and need only a driver. A warning of ptxas about wgmma (C75xx: instructions
serialized) or a register spill fails the build: such a binary would measure something else.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ["-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-cudart", "static", "-Xptxas", "-v"]


def nvcc_path() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def micro_sources() -> list[Path]:
    return sorted((ROOT / "benchmarks/micro").glob("*.cu"))


def complaints(ptxas_log: str) -> list[str]:
    """Lines of a ptxas -v log that disqualify a binary."""
    spills = re.compile(r"[1-9]\d* bytes spill")
    return [line for line in ptxas_log.splitlines() if "(C75" in line or spills.search(line)]


def cutlass_includes(folder: Path) -> list[str]:
    """Include flags of a CUTLASS tree: a checkout, or an unpacked nvidia-cutlass wheel."""
    for base in (folder, folder / "cutlass_library/source"):
        if (base / "include/cutlass/cutlass.h").is_file():
            return [f"-I{base / 'include'}", f"-I{base / 'tools/util/include'}"]
    sys.exit(
        f"build: expected include/cutlass/cutlass.h in --cutlass {folder}, found none. Unpack the wheel "
        "nvidia-cutlass 4.2 (python -m zipfile -e WHEEL FOLDER) and name its folder."
    )


def compile_command(nvcc: str, source: Path, target: Path) -> list[str]:
    return [nvcc, *TARGET, f"-I{ROOT / 'csrc'}", "-o", str(target), str(source)]


def peer_command(nvcc: str, cutlass: Path, target: Path) -> list[str]:
    flags = ["--expt-relaxed-constexpr", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", *cutlass_includes(cutlass)]
    return [nvcc, *TARGET, *flags, "-o", str(target), str(ROOT / "benchmarks/rivals/cutlass_sparse_gemm.cu")]


def build(command: list[str]) -> str | None:
    """Run one compilation; the reason if its result must not be used."""
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    if done.returncode:
        return log.strip()[-2000:]
    return "\n".join(complaints(log)) or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time; one takes up to 2 GB")
    parser.add_argument("--only", nargs="*", help="names of micro programs; default all")
    parser.add_argument("--peer", action="store_true", help="also the CUTLASS rival; needs --cutlass")
    parser.add_argument("--cutlass", type=Path, help="folder of CUTLASS, or of the unpacked nvidia-cutlass wheel")
    options = parser.parse_args()
    nvcc = nvcc_path()
    if nvcc is None:
        sys.exit("build: needs nvcc 12.8 or newer, but none was found. Set CUDA_HOME.")
    if options.peer and options.cutlass is None:
        sys.exit("build: --peer needs --cutlass FOLDER, the headers of CUTLASS 4.2 (wheel nvidia-cutlass).")
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = {
        source.stem: compile_command(nvcc, source, options.out / source.stem)
        for source in micro_sources()
        if options.only is None or source.stem in options.only
    }
    if options.peer:
        jobs["libcutlass_sparse_gemm.so"] = peer_command(
            nvcc, options.cutlass, options.out / "libcutlass_sparse_gemm.so"
        )
    failed = False
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, reason in zip(jobs, pool.map(build, jobs.values()), strict=True):
            print(f"{name}: {'ok' if reason is None else reason}", flush=True)
            if reason is not None:
                failed = True
                (options.out / name).unlink(missing_ok=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
