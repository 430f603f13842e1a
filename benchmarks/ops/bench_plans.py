"""Every plan that tile_linear could take for a call, timed beside the one it takes: where the planner's model is wrong.

python -m benchmarks.ops.bench_plans --csv plans.csv --budget-seconds 300     needs a GPU
python -m benchmarks.ops.bench_plans --fit plans.csv                          the model's constants from these times
"""

from __future__ import annotations

import ctypes
import dataclasses
import time
from pathlib import Path

import torch

from benchmarks import harness, shapes
from benchmarks.ops import plan_fit
from benchmarks.ops.bench_tile_linear import fallback_reason, packed_weight
from benchmarks.ops.plan_fit import CHOICE
from patch_kernels import ops

CAPACITY = 256
LAUNCHES = 20


class Plans:
    """The library's hooks for choosing a plan by hand."""

    def __init__(self):
        self._library = ctypes.CDLL(str(ops.LIBRARY_PATH))
        self._library.patch_kernels_plan_choices.argtypes = [
            ctypes.c_int,
            *[ctypes.c_int64] * 4,
            ctypes.c_void_p,
            ctypes.c_int,
        ]

    def choices(self, rows: int, cols: int, tokens: int, payload_bytes: int) -> dict[tuple[int, ...], int]:
        """All choices of a call, the library's own first, and the workers of each."""
        width = len(CHOICE) + 1
        out = (ctypes.c_int * (width * CAPACITY))()
        device = torch.cuda.current_device()
        count = self._library.patch_kernels_plan_choices(device, rows, cols, tokens, payload_bytes, out, CAPACITY)
        if count < 0:
            raise RuntimeError(f"bench_plans: the library does not know CUDA device {device}")
        found = [tuple(out[width * i : width * (i + 1)]) for i in range(count)]
        return {numbers[:-1]: numbers[-1] for numbers in found}

    def force(self, choice: tuple[int, ...] | None) -> None:
        self._library.patch_kernels_force_plan((ctypes.c_int * len(CHOICE))(*choice) if choice else None)


def measure(cell: shapes.Cell, sparsity: float, plans: Plans, samples: int) -> list[dict]:
    weight = torch.randn(cell.rows, cell.cols, device="cuda").bfloat16()
    tiled = [packed_weight(weight, sparsity)]
    card = torch.cuda.get_device_properties(weight.device)
    copies = harness.copies_to_exceed_l2(tiled[0].nbytes, card.L2_cache_size, 8 << 30)
    tiled += [dataclasses.replace(tiled[0], payload=tiled[0].payload.clone()) for _ in range(copies - 1)]
    x = torch.randn(cell.tokens, cell.cols, device="cuda").bfloat16()
    choices = plans.choices(cell.rows, cell.cols, cell.tokens, tiled[0].payload.numel())
    graphs = {}
    try:
        for choice in choices:
            plans.force(choice)
            graphs[str(choice)] = (harness.capture([lambda t=t: t.matmul(x) for t in tiled], LAUNCHES), LAUNCHES)
    finally:
        plans.force(None)
    times = {name: harness.summary(t) for name, t in harness.interleaved_graph_times(graphs, samples).items()}
    best = min(summary["median_ms"] for summary in times.values())
    facts = {"model": cell.model, "layer": cell.layer, "tokens": cell.tokens, "sparsity": sparsity}
    facts |= {"capability": 10 * card.major + card.minor, "sm_count": card.multi_processor_count}
    return [
        facts
        | dict(zip(CHOICE, choice, strict=True))
        | {"workers": workers, "chosen": index == 0}
        | times[str(choice)]
        | {"over_best": times[str(choice)]["median_ms"] / best}
        for index, (choice, workers) in enumerate(choices.items())
    ]


def without_choice() -> str | None:
    """Why there is no plan to choose on this GPU, found out by a call; None where its kernels run."""
    small = packed_weight(torch.randn(128, 128, device="cuda").bfloat16(), 0.5)
    small.matmul(torch.zeros(1, 128, device="cuda").bfloat16())
    reason = fallback_reason()
    return f"there is no plan to choose here: {reason}" if reason else None


def sweep(
    calls: list[tuple[shapes.Cell, float]], samples: int, budget_seconds: float, csv: Path | None
) -> tuple[list[dict], list[tuple[shapes.Cell, float]]]:
    """Rows of as many (cell, sparsity) as fit the budget, saved after each, and the calls that were not run."""
    plans, rows = Plans(), []

    def run(call: tuple[shapes.Cell, float]) -> None:
        rows.extend(measure(*call, plans, samples))
        if csv:
            harness.save_csv(csv, rows)

    return rows, harness.run_within(calls, run, budget_seconds)


def print_fit(path: Path, parser) -> None:
    """Constants from the times of an earlier --csv; ends the program with a sentence for one that cannot be used."""
    try:
        times = plan_fit.read_times(path)
        print(plan_fit.report(times, plan_fit.fit(times)))
    except ValueError as error:
        parser.exit(2, f"bench_plans: --fit: {error}\n")


def main() -> None:
    parser = harness.parser(__doc__, repeats=False)
    parser.add_argument("--models", nargs="+", default=["llama-2-7b", "llama-3-8b"], choices=list(shapes.MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(shapes.TOKENS))
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.45, 0.0], help="one alone tells a fit less")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--budget-seconds", type=float, default=500)
    parser.add_argument("--fit", type=Path, metavar="CSV", help="measure nothing; fit the planner's constants to these")
    options = parser.parse_args()
    if options.fit:
        print_fit(options.fit, parser)
        return
    if not torch.cuda.is_available():
        parser.exit(2, "bench_plans: needs an NVIDIA GPU that torch can use, found none.\n")
    if reason := without_choice():
        parser.exit(2, f"bench_plans: {reason}\n")
    start = time.monotonic()
    calls = [(cell, s) for cell in shapes.cells(options.models, options.tokens) for s in options.sparsity]
    rows, left = sweep(calls, options.samples, options.budget_seconds, options.csv)
    chosen = [row for row in rows if row["chosen"]]
    best = [row for row in rows if row["over_best"] == 1]
    print("the plans that tile_linear takes, and their time over the best plan's")
    harness.print_table(chosen)
    print("the best plans")
    harness.print_table(best)
    print(f"{len(chosen)} calls in {time.monotonic() - start:.0f} s; {len(left)} not run for want of time")


if __name__ == "__main__":
    main()
