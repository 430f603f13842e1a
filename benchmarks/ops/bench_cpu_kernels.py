"""What a tile costs each CPU kernel of tile_linear, on one thread: the numbers of csrc/cpu/costs.h.

python -m benchmarks.ops.bench_cpu_kernels --csv out.csv      (PATCH_KERNELS_CPU_ISA asks for a lesser instruction set)

Processor time, so that what else runs on the machine costs little; each kernel in a process of its own, since
PATCH_KERNELS_CPU_KERNEL is read once. The lines at the end are straight lines through the medians, in microseconds:
few and torch a tile and a token, many a tile and 16 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from benchmarks import harness
from benchmarks.ops.bench_tile_linear import packed_weight

SHAPE = (2048, 4096)
TILES = SHAPE[0] // 128 * (SHAPE[1] // 128)
TOKENS = {"few": (1, 2, 4, 8, 12, 16, 24, 32), "many": (16, 32, 64, 128, 256, 512), "torch": (16, 64, 256, 512)}
KINDS = {"dense": 0.0, "sparse": 0.5}  # of all tiles, by the sparsity that they have together


def tile_costs(kernel: str, kind: str, tokens: tuple[int, ...], repeats: int, dtype: torch.dtype) -> list[float]:
    """Microseconds a tile at each number of tokens, from a process with this kernel."""
    arguments = {"kind": kind, "tokens": tokens, "repeats": repeats, "dtype": str(dtype).removeprefix("torch.")}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ops.bench_cpu_kernels", "--measure", json.dumps(arguments)],
        env=dict(os.environ, PATCH_KERNELS_CPU_KERNEL=kernel, OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@torch.no_grad()
def measure(kind: str, tokens: list[int], repeats: int, dtype: str) -> list[float]:
    torch.set_num_threads(1)
    tiled = packed_weight(torch.randn(SHAPE).to(getattr(torch, dtype)), KINDS[kind])
    costs = []
    for count in tokens:
        x = torch.randn(count, SHAPE[1], dtype=tiled.dtype)
        samples = []
        for _ in range(repeats + 1):
            start = time.process_time()
            tiled.matmul(x)
            samples.append(time.process_time() - start)
        costs.append(1e6 * statistics.median(samples[1:]) / TILES)
    return costs


def main() -> None:
    flags = parser()
    options = flags.parse_args()
    harness.in_range(options, flags, [("repeats", 1, 1000)])
    if options.measure:
        print(json.dumps(measure(**json.loads(options.measure))))
        return
    rows, lines = [], []
    for kernel, tokens in TOKENS.items():
        for kind in KINDS:
            costs = tile_costs(kernel, kind, tokens, options.repeats, getattr(torch, options.dtype))
            rows += [
                {"kernel": kernel, "tiles": kind, "tokens": count, "us_a_tile": cost}
                for count, cost in zip(tokens, costs, strict=True)
            ]
            step = 16 if kernel == "many" else 1
            slope, base = statistics.linear_regression([count / step for count in tokens], costs)
            lines.append(f"{kernel:5} {kind:6} {base:.2f} + {slope:.3f} {'for 16 tokens' if step > 1 else 'a token'}")
    harness.show(rows, options.csv)
    print("\n".join(["", *lines]))


def parser() -> argparse.ArgumentParser:
    result = harness.parser(__doc__)
    result.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    result.add_argument("--measure", help=argparse.SUPPRESS)
    return result


if __name__ == "__main__":
    main()
