"""One optimizer step on this machine: adamw_step against torch's AdamW, fused and foreach.

python -m benchmarks.bench_adamw --csv benchmarks/results/adamw_cpu.csv
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import harness
from patch.learn import MOMENTS
from patch.optimizer import LowPrecisionAdamW

ELEMS = 1 << 24


def stepper(make_optimizer: Callable, dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """(one step, bytes per value of parameter and state)"""
    parameter = nn.Parameter(torch.randn(ELEMS).to(dtype))
    parameter.grad = torch.randn(ELEMS).to(dtype)
    optimizer = make_optimizer([parameter])
    optimizer.step()
    held = [parameter, *optimizer.state[parameter].values()]
    return optimizer.step, sum(t.numel() * t.element_size() for t in held) / ELEMS


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    steppers = {
        f"torch {kind}": ("float32", *stepper(lambda p, kind=kind: torch.optim.AdamW(p, **{kind: True}), torch.float32))
        for kind in ("fused", "foreach")
    }
    for logits, moments in itertools.product(("float32", "bfloat16"), MOMENTS):
        step, held = stepper(lambda p, m=moments: LowPrecisionAdamW(p, moments=m), getattr(torch, logits))
        steppers[f"patch {moments} moments, {logits}"] = (logits, step, held)
    times = harness.interleaved_times({name: step for name, (_, step, _) in steppers.items()}, options.repeats)
    rows = [
        {"method": name, "elems": ELEMS, "param": logits, "bytes_per_value": held} | harness.summary(times[name])
        for name, (logits, _, held) in steppers.items()
    ]
    harness.print_table(rows)
    if options.csv:
        harness.save_csv(options.csv, rows)


if __name__ == "__main__":
    main()
