"""Host time of one TiledLinear call on a GPU beside nn.Linear's, on a machine without a GPU (needs nvcc and cmake).

python -m benchmarks.ops.bench_host_cost --csv benchmarks/results/host_cost.csv

Ours is csrc/bindings/cuda.cpp and the launchers, for CPU tensors (csrc/check/cuda_host). Every check, the plan and the
attributes of the launch are real; the launch itself returns at once, and the driver's encoding of a tensor map is a
stand-in that fills the map. torch's part is real: module, dispatcher, the memory of y. nn.Linear is torch's on a CPU
with a weight of 8x8, so that its product takes little time: with 64 tokens still 1 us in fp32, far more in bf16, so
that every ratio is to one token.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import harness
from benchmarks.ops import cuda_host
from patch_kernels import TiledLinear
from tools.build_backend import find_cutlass

TOKENS = (1, 64)
SIZE = 4096  # of the packed layer
CALLS = 200  # of a sample
TORCH = "nn.Linear"
MODES: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
}


def calls() -> dict[tuple[str, int], tuple[nn.Module, torch.Tensor]]:
    """(module, x) by method and number of tokens."""
    dense = nn.Linear(8, 8, dtype=torch.bfloat16).requires_grad_(False)
    tiled = TiledLinear(SIZE, SIZE)
    tiled.refresh_schedule()
    result: dict[tuple[str, int], tuple[nn.Module, torch.Tensor]] = {
        (TORCH, 1): (dense, torch.zeros(1, 8, dtype=torch.bfloat16))
    }
    for tokens in TOKENS:
        x = torch.zeros(tokens, SIZE, dtype=torch.bfloat16)
        result |= {("TiledLinear", tokens): (tiled, x), ("TiledLinear, 3-D x", tokens): (tiled, x[None])}
    return result


def sample(module: nn.Module, x: torch.Tensor) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        module(x)
    return (time.perf_counter() - begin) / CALLS


def measure(repeats: int) -> list[dict]:
    """Rows of medians over interleaved samples."""
    prepared = calls()
    rows = []
    for mode, context in MODES.items():
        times: dict[tuple[str, int], list[float]] = {case: [] for case in prepared}
        with context(), cuda_host.tensors_are_on_cuda():
            for round_index in range(repeats + 1):
                for case, (module, x) in prepared.items():
                    seconds = sample(module, x)
                    if round_index > 0:
                        times[case].append(seconds)
        of_torch = statistics.median(times[TORCH, 1])
        for (method, tokens), samples in times.items():
            median = statistics.median(samples)
            row = {"mode": mode, "method": method, "tokens": tokens, "us": f"{median * 1e6:.2f}"}
            rows.append(row | {"of_nn_linear": f"{median / of_torch:.2f}"})
    return rows


def main(arguments: list[str] | None = None) -> None:
    options = harness.parser(__doc__).parse_args(arguments)
    if (tool := cuda_host.missing_tool()) is not None:
        found = find_cutlass()
        advice = f" {found}" if tool.startswith("CUTLASS") and isinstance(found, str) else " Put it on PATH."
        sys.exit(f"bench_host_cost: needs {tool}, but none was found.{advice}")
    torch.set_num_threads(1)
    cuda_host.CudaHost(cuda_host.build())
    gc.disable()
    harness.show(measure(options.repeats), options.csv)


if __name__ == "__main__":
    main()
