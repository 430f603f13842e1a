"""ABI gate: the ops library must load into every torch from 2.11 on, with or without CUDA.

python tools/check_abi.py patch_kernels/libpatch_kernels_ops.so
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

MINIMUM_TORCH = (2, 11)
WEAK_ALLOWED = {"aoti_torch_get_current_cuda_stream"}
# Of our library nothing but this may be visible: everything else is registered with torch at load time.
EXPORTS_ALLOWED = {
    "patch_kernels_build_info",
    "patch_kernels_gemm_status",
    "patch_kernels_driver_complaint",
    "patch_kernels_best_family",
    "patch_kernels_check_card",
    "patch_kernels_limit_family",
    "patch_kernels_force_plan",
    "patch_kernels_plan_choices",
}


def symbols(library: Path, *options: str) -> list[tuple[str, str]]:
    listing = subprocess.run(["nm", "-D", *options, str(library)], check=True, capture_output=True, text=True).stdout
    return [(fields[-2], fields[-1].split("@")[0]) for fields in map(str.split, listing.splitlines())]


def torch_symbols() -> set[str]:
    import torch

    folder = Path(torch.__file__).parent / "lib"
    return {name for _, name in symbols(folder / "libtorch_cpu.so", "--defined-only")}


def problems(library: Path) -> list[str]:
    found = []
    undefined = [(kind, name) for kind, name in symbols(library, "--undefined-only") if "torch" in name]
    available = torch_symbols()
    for kind, name in undefined:
        if name in WEAK_ALLOWED:
            if kind.lower() != "w":
                found.append(f"{name} must be weak, or the library does not load into a CPU torch")
        elif name.startswith("_Z"):
            found.append(f"{name} is a C++ symbol of torch, which is not stable between versions")
        elif name not in available:
            found.append(f"{name} is not in libtorch_cpu, so the library does not load into a CPU torch")
    exported = {name for _, name in symbols(library, "--defined-only") if not name.startswith("_")}
    found += [f"{name} is exported; hide it" for name in sorted(exported - EXPORTS_ALLOWED)]
    needed = subprocess.run(["objdump", "-p", str(library)], check=True, capture_output=True, text=True).stdout
    if "libtorch.so" not in needed:
        found.append("libtorch.so is not a needed library, so the CUDA stream symbol would stay unbound")
    found += [f"{line.strip()}: CUDA must be linked statically" for line in needed.splitlines() if "libcuda" in line]
    audit = subprocess.run(
        [Path(sys.executable).with_name("torch-abi-audit"), "--json", str(library.resolve())],
        check=True,
        capture_output=True,
        text=True,
    )
    return found + audit_problems(json.loads(audit.stdout))


def audit_problems(report: dict) -> list[str]:
    """Findings of torch-abi-audit: unstable symbols, or a minimum torch above the promised one."""
    facts = report["bundled_libs"][0]["torch"]
    found = [f"{name} is not a stable symbol" for name in facts["unstable_symbols"]]
    minimum = tuple(int(part) for part in facts["min_torch_version"].split(".")[:2])
    if not facts["stable"] or minimum > MINIMUM_TORCH:
        found.append(f"expected the stable ABI of torch 2.11 at most, got {facts}")
    return found


def main() -> int:
    library = Path(sys.argv[1])
    found = problems(library)
    for problem in found:
        print(f"{library}: {problem}", file=sys.stderr)
    if not found:
        print(f"{library}: loads into torch >= 2.11, with or without CUDA")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
