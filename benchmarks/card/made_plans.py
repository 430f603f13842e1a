"""Times of plans as bench_plans writes them, made by the planner's model with other constants: nothing is measured.

What the fit of benchmarks.ops.plan_fit is tried on where there is no card.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import shapes
from benchmarks.ops import plan_fit

DEVICE = "a model, not a card"
CLUSTERS = [132, 66, 32, 16]  # of 1, 2, 4, 8 CTAs that run at once
OTHER_CARD = {
    "memory_bytes_per_cycle": 1900.0,
    "link_bytes_per_cycle": 21.0,
    "cluster_bytes_per_cycle": 9.0,
    "shared_bytes_per_cycle": 120.0,
    "shared_write_share": 0.6,
    "macs_per_cycle": 1800.0,
    "launch_cycles": 5200.0,
    "item_cycles": 1700.0,
    "item_token_cycles": 8.0,
    "switch_cycles": 90.0,
    "exchange_turn_cycles": 2600.0,
    "exchange_output_cycles": 55.0,
}


def workers_of(choice: tuple[int, ...], rows: int, tokens: int) -> int:
    bn, token_ctas, row_ctas, splits, _ = choice
    units = math.ceil(math.ceil(rows / 128) / (2 * row_ctas if bn > 32 else 1))
    clusters = CLUSTERS[(token_ctas * row_ctas * splits).bit_length() - 1]
    return min(clusters, units * math.ceil(tokens / (bn * token_ctas)))


def made_rows(
    constants: dict[str, float],
    *,
    sparsities: Sequence[float],
    noise: float = 0.0,
    outliers: float = 0.0,
    models: Sequence[str] = ("llama-3-8b",),
    tokens: Sequence[int] = shapes.TOKENS,
) -> list[dict]:
    """Rows as bench_plans writes them: times of the model with these constants, times exp(noise), some threefold.

    raises ValueError where patch_kernels._host was not built.
    """
    host = plan_fit.host_module()
    limits = host.DeviceLimits(clusters=CLUSTERS)
    rows, calls = [], []
    for cell in shapes.cells(list(models), list(tokens)):
        for sparsity in sparsities:
            payload = shapes.weight_bytes(cell.rows, cell.cols, sparsity)
            for choice in host.possible_choices(cell.cols, cell.tokens, limits):
                workers = workers_of(choice, cell.rows, cell.tokens)
                calls.append((cell.rows, cell.cols, cell.tokens, payload, *choice, workers))
                rows.append(
                    {"model": cell.model, "layer": cell.layer, "tokens": cell.tokens, "sparsity": sparsity}
                    | dict(zip(plan_fit.CHOICE, choice, strict=True))
                    | {"workers": workers, "capability": 90, "sm_count": 132, "device": DEVICE}
                )
    generator = np.random.default_rng(1)
    us = np.array(host.model_times_us(calls, limits, constants)) * np.exp(generator.normal(0, noise, len(calls)))
    us[generator.random(len(us)) < outliers] *= 3
    return [row | {"median_ms": float(time) / 1e3} for row, time in zip(rows, us, strict=True)]


def save(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
