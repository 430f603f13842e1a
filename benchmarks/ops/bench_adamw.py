"""One optimizer step: adamw_step against torch's AdamW, fused and foreach.

CPU  python -m benchmarks.ops.bench_adamw --csv benchmarks/results/adamw_cpu.csv
GPU  python -m benchmarks.ops.bench_adamw --csv out.csv
--dry goes through everything on the CPU with few values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import harness
from patch.learn.config import MOMENTS
from patch.learn.optimizer import LowPrecisionAdamW

ELEMS = {"cpu": 1 << 24, "cuda": 1 << 26}  # far beyond the caches
DRY_ELEMS = 1 << 12


def stepper(make_optimizer: Callable, dtype: torch.dtype, elems: int, device: str) -> tuple[Callable[[], None], float]:
    """(one step, bytes per value of parameter and state)"""
    parameter = nn.Parameter(torch.randn(elems, device=device).to(dtype))
    parameter.grad = torch.randn(elems, device=device).to(dtype)
    optimizer = make_optimizer([parameter])
    optimizer.step()
    held = [parameter, *optimizer.state[parameter].values()]
    return optimizer.step, sum(t.numel() * t.element_size() for t in held) / elems


def steppers(elems: int, device: str) -> dict[str, tuple[str, Callable[[], None], float]]:
    """(dtype of the parameter, step, bytes per value) by method."""
    result = {}
    for kind in ("fused", "foreach"):
        step, held = stepper(lambda p, kind=kind: torch.optim.AdamW(p, **{kind: True}), torch.float32, elems, device)
        result[f"torch {kind}"] = ("float32", step, held)
    for logits, moments in itertools.product(("float32", "bfloat16"), MOMENTS):
        step, held = stepper(
            lambda p, m=moments: LowPrecisionAdamW(p, moments=m), getattr(torch, logits), elems, device
        )
        result[f"patch {moments} moments, {logits}"] = (logits, step, held)
    return result


def not_timed(name: str, error: Exception) -> None:
    raise RuntimeError(f"bench_adamw: {name} does not fit beside the others; free memory on this GPU") from error


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--dry", action="store_true", help="few values on the CPU")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() and not options.dry else "cpu"
    elems = DRY_ELEMS if options.dry else ELEMS[device]
    rivals = steppers(elems, device)
    calls = {name: step for name, (_, step, _) in rivals.items()}
    if device == "cuda":
        times = harness.interleaved_event_times(calls, options.repeats, not_timed)
    else:
        times = harness.interleaved_times(calls, options.repeats)
    rows = [
        {"method": name, "elems": elems, "param": logits, "bytes_per_value": held} | harness.summary(times[name])
        for name, (logits, _, held) in rivals.items()
    ]
    harness.show(rows, options.csv)


if __name__ == "__main__":
    main()
