"""tile_linear on the CPU against F.linear in the same dtype and in fp32: all shapes, wins and losses.

python -m benchmarks.bench_tile_linear --csv benchmarks/results/tile_linear_cpu.csv
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from benchmarks import harness
from patch_kernels import PATTERNS, TiledWeight, reference

SHAPES = [(4096, 4096), (11008, 4096)]
TOKENS = [1, 16, 64, 512]
SPARSITIES = [0.0, 0.25, 0.35, 0.45, 0.5]


def packed_weight(weight: torch.Tensor, sparsity: float) -> TiledWeight:
    """Random hybrid weight with the given share of zeros: share 2*sparsity of its tiles is 2:4."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = weight.shape
    tiles = torch.zeros(rows // 128 * (cols // 128), dtype=torch.bool)
    tiles[torch.randperm(tiles.numel(), generator=generator)[: round(2 * sparsity * tiles.numel())]] = True
    tiles = tiles.reshape(rows // 128, cols // 128)
    pattern = PATTERNS[torch.randint(0, 6, (rows * cols // 4,), generator=generator)].reshape(rows, cols)
    keep = pattern | ~reference.expand_tiles(tiles, (128, 128), (rows, cols))
    return TiledWeight.pack(weight, keep, tiles)


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    rows = []
    for shape in SHAPES:
        weight = torch.randn(shape).bfloat16()
        packed = {f"tiles {s:.0%}": packed_weight(weight, s) for s in SPARSITIES}
        weight_fp32 = weight.float()
        for tokens in TOKENS:
            x = torch.randn(tokens, shape[1]).bfloat16()
            x_fp32 = x.float()
            functions = {name: functools.partial(t.matmul, x) for name, t in packed.items()}
            functions["F.linear bf16"] = functools.partial(F.linear, x, weight)
            functions["F.linear fp32"] = functools.partial(F.linear, x_fp32, weight_fp32)
            times = harness.interleaved_times(functions, options.repeats)
            baseline = harness.summary(times["F.linear bf16"])["median_ms"]
            for name in functions:
                row = {"shape": f"{shape[0]}x{shape[1]}", "tokens": tokens, "method": name}
                row |= harness.summary(times[name])
                row["vs_bf16"] = baseline / row["median_ms"]
                row["weight_MB"] = packed[name].nbytes / 1e6 if name in packed else 2e-6 * weight.numel()
                rows.append(row)
    harness.print_table(rows)
    if options.csv:
        harness.save_csv(options.csv, rows)


if __name__ == "__main__":
    main()
