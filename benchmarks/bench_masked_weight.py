"""masked_weight on this machine against the same mathematics in eager PyTorch: time and peak memory.

python -m benchmarks.bench_masked_weight --csv benchmarks/results/masked_weight_cpu.csv
"""

from __future__ import annotations

import functools

import torch

from benchmarks import harness
from patch_kernels import PATTERNS, masked_weight

SETTINGS = dict(pattern_temperature=0.7, pattern_scale=200.0, tile_temperature=0.7, tile_scale=100.0)


def inputs(rows: int, cols: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator).to(dtype)
    pattern = (0.014 * torch.randn(rows * cols // 4, 6, generator=generator)).requires_grad_()
    tiles = (0.014 * torch.randn(rows // 128, cols // 128, generator=generator)).requires_grad_()
    return weight, pattern, tiles


def eager_masked_weight(weight, pattern_logits, tile_logits):
    """What a PyTorch user writes: Gumbel-softmax, expand, multiply, sum. Full-size tensors in between."""
    gumbel = -torch.empty_like(pattern_logits).exponential_().log()
    scores = pattern_logits * SETTINGS["pattern_scale"] + gumbel
    probability = torch.softmax(scores / SETTINGS["pattern_temperature"], dim=1)
    mask = (probability @ PATTERNS.to(probability.dtype)).reshape(weight.shape)
    uniform = torch.rand_like(tile_logits)
    scores = tile_logits * SETTINGS["tile_scale"] + torch.logit(uniform)
    dense = torch.sigmoid(scores / SETTINGS["tile_temperature"])
    dense = dense.repeat_interleave(128, 0).repeat_interleave(128, 1)
    mask = dense + (1 - dense) * mask
    masked = (mask * weight).to(weight.dtype)
    return masked, torch.stack([mask.sum(), masked.float().square().sum()]).double()


def fused(weight, pattern, tiles):
    return masked_weight(weight, pattern, tiles, noise=(0, 0, 0), **SETTINGS)


def forward(function, weight, pattern, tiles):
    with torch.no_grad():
        function(weight, pattern, tiles)


def forward_backward(function, weight, pattern, tiles):
    pattern.grad = tiles.grad = None
    masked, sums = function(weight, pattern, tiles)
    torch.autograd.backward([masked, sums], [torch.ones_like(masked), torch.ones(2, dtype=torch.float64)])


def prepare_memory(function, shape, dtype):
    return functools.partial(forward_backward, function, *inputs(*shape, dtype))


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    rows = []
    for shape in ((1024, 1024), (4096, 4096)):
        for dtype in (torch.float32, torch.bfloat16):
            case = inputs(*shape, dtype)
            rivals = {"fused": fused, "eager": eager_masked_weight}
            for phase in (forward, forward_backward):
                times = harness.interleaved_times(
                    {name: functools.partial(phase, f, *case) for name, f in rivals.items()}, options.repeats
                )
                eager_ms = harness.summary(times["eager"])["median_ms"]
                for name, f in rivals.items():
                    row = {"shape": f"{shape[0]}x{shape[1]}", "dtype": str(dtype)[6:], "phase": phase.__name__}
                    row |= {"method": name} | harness.summary(times[name])
                    row["speedup"] = eager_ms / row["median_ms"]
                    if phase is forward_backward:
                        prepare = functools.partial(prepare_memory, f, shape, dtype)
                        row["peak_MiB"] = harness.peak_bytes(prepare) / 2**20
                    else:
                        row["peak_MiB"] = ""
                    rows.append(row)
    harness.print_table(rows)
    if options.csv:
        harness.save_csv(options.csv, rows)


if __name__ == "__main__":
    main()
