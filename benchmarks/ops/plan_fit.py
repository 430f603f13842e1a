"""Fits the planner's constants (csrc/gemm/plan.h) to the times of plans that bench_plans measured on a card. No GPU.

python -m benchmarks.ops.bench_plans --fit plans.csv
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import shapes

CHOICE = ("bn", "token_ctas", "row_ctas", "splits", "depth")
COLUMNS = ("model", "layer", "tokens", "sparsity", *CHOICE, "workers", "median_ms", "capability", "sm_count", "device")

# All other constants count its cycles: the data say nothing of its length.
HELD = ("cycles_per_us",)
LEAST_ROWS = 50
LEAST_CALLS = 20  # different ones
MOST_TOKENS = 1 << 30
MOST_SMS = 4096
WIDEST = math.log(30)  # a constant moves at most by this factor
TOLD = 0.15  # a standard error of a constant's logarithm up to here means that the data tell it
LEAST_NOISE = 0.01  # of a time's logarithm, whatever the residuals say
STARTS = 4
PRIOR = 1.0  # of a constant's logarithm around its default, as a standard deviation


@dataclass(frozen=True)
class Times:
    """Measured plans of one card.

    calls   (rows, cols, tokens, payload bytes, bn, token_ctas, row_ctas, splits, depth, workers) of each.
    us      microseconds of each.
    limits  patch_kernels._host.DeviceLimits of the card.
    """

    calls: list[tuple[int, ...]]
    us: np.ndarray
    limits: object
    device: str


@dataclass(frozen=True)
class Fit:
    """constants: all of them; errors: relative standard errors of those that the data tell; untold: names of the rest.

    residuals: log(model / measured) of each time.
    """

    constants: dict[str, float]
    errors: dict[str, float]
    untold: list[str]
    residuals: np.ndarray


def host_module():
    """patch_kernels._host; raises ValueError where it was not built."""
    try:
        from patch_kernels import _host
    except ImportError:
        raise ValueError(
            "expected patch_kernels._host, which this build leaves out. Install pybind11, then build again."
        ) from None
    return _host


def host_capabilities(host) -> list[int]:
    """Compute capabilities (90 for 9.0) that have kernels."""
    return [number for number in range(10, 200) if host.possible_choices(1024, 1, host.DeviceLimits(number, 1))]


def call_of(row: dict[str, str]) -> tuple[int, ...]:
    """A row's call; raises ValueError for a layer that benchmarks/shapes.py does not have."""
    layers = shapes.MODELS.get(row["model"], {})
    if row["layer"] not in layers:
        raise ValueError(
            f"expected a layer of benchmarks/shapes.py, got {row['model']} {row['layer']}. "
            "Measure again with this version."
        )
    if not 0 <= float(row["sparsity"]) <= 0.5:
        raise ValueError(f"expected a sparsity from 0 to 0.5, got {row['sparsity']}. Measure again.")
    if not 1 <= int(row["tokens"]) <= MOST_TOKENS or not 1 <= int(row["workers"]) <= MOST_TOKENS:
        raise ValueError(
            f"expected tokens and workers from 1 to {MOST_TOKENS}, got {row['tokens']} and {row['workers']}. "
            "Measure again."
        )
    rows, cols = layers[row["layer"]]
    payload = shapes.weight_bytes(rows, cols, float(row["sparsity"]))
    return (rows, cols, int(row["tokens"]), payload, *(int(row[name]) for name in CHOICE), int(row["workers"]))


def read_times(path: Path) -> Times:
    """The file that bench_plans --csv wrote; raises ValueError with a sentence for one that cannot be used."""
    host = host_module()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"expected a file that bench_plans --csv wrote, got {path}: {error}") from None
    missing = [name for name in COLUMNS if not rows or rows[0].get(name) is None]
    if missing:
        raise ValueError(
            f"expected rows that bench_plans --csv wrote, got none with {', '.join(missing)} in {path}. Measure again."
        )
    cards = {(row["device"], row["capability"], row["sm_count"]) for row in rows}
    if len(cards) > 1:
        raise ValueError(
            f"expected times of one card, got those of {len(cards)} in {path}: "
            f"{', '.join(sorted(str(card[0]) for card in cards))}. Keep one card a file."
        )
    if len(rows) < LEAST_ROWS:
        raise ValueError(
            f"expected {LEAST_ROWS} times or more, got {len(rows)} in {path}. Measure more layers and tokens."
        )
    try:
        calls = [call_of(row) for row in rows]
        us = np.array([1e3 * float(row["median_ms"]) for row in rows])
        ((device, *numbers),) = cards
        capability, sm_count = (int(number) for number in numbers)
        if capability not in host_capabilities(host) or not 1 <= sm_count <= MOST_SMS:
            raise ValueError(
                f"expected the capability of a card with kernels ({', '.join(map(str, host_capabilities(host)))}) and "
                f"1 to {MOST_SMS} multiprocessors, got {capability} and {sm_count}. Measure again."
            )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if len(set(calls)) < LEAST_CALLS:
        raise ValueError(
            f"expected plans of {LEAST_CALLS} different calls or more, got {len(set(calls))} in {path}. "
            "Measure more layers and tokens."
        )
    if not (np.isfinite(us).all() and (us > 0).all()):
        raise ValueError(f"expected times above zero in median_ms, got others in {path}. Measure again.")
    limits = host.DeviceLimits(capability, sm_count)
    check_choices(host, path, calls, limits)
    return Times(calls, us, limits, device)


def check_choices(host, path: Path, calls: list[tuple[int, ...]], limits) -> None:
    """Raises ValueError for a call that no kernel of this version runs."""
    possible = {}
    for _, cols, tokens, _, *choice, workers in calls:
        if (cols, tokens) not in possible:
            possible[cols, tokens] = set(host.possible_choices(cols, tokens, limits))
        if tuple(choice) not in possible[cols, tokens] or workers < 1:
            named = ", ".join(f"{name} {value}" for name, value in zip(CHOICE, choice, strict=True))
            raise ValueError(
                f"expected plans of this version, got {named}, workers {workers} for {tokens} tokens in {path}. "
                "Measure again with this version."
            )


class Model:
    """log(model / measured) of all times as a function of the logarithms of some constants."""

    def __init__(self, times: Times):
        self.host = host_module()
        self.times = times
        self.defaults = self.host.model_constants()

    def residuals(self, names: list[str], logs: np.ndarray) -> np.ndarray:
        constants = dict(zip(names, np.exp(logs).tolist(), strict=True))
        return np.log(self.host.model_times_us(self.times.calls, self.times.limits, constants)) - np.log(self.times.us)

    def jacobian(self, names: list[str], logs: np.ndarray, step: float = 0.01) -> np.ndarray:
        columns = []
        for i in range(len(names)):
            offset = np.zeros(len(names))
            offset[i] = step
            columns.append((self.residuals(names, logs + offset) - self.residuals(names, logs - offset)) / (2 * step))
        return np.stack(columns, axis=1)

    def default_logs(self, names: list[str]) -> np.ndarray:
        return np.log([self.defaults[name] for name in names])


def noise_of(residuals: np.ndarray) -> float:
    """Standard deviation of nine tenths of the times; the others may be anything."""
    return max(LEAST_NOISE, float(np.quantile(np.abs(residuals), 0.9)) / 1.645)


def huber(residuals: np.ndarray, noise: float) -> tuple[float, np.ndarray]:
    """Huber's cost and weights: beyond 1.345 standard deviations a time counts by its distance, not its square."""
    size, limit = np.abs(residuals), 1.345 * noise
    cost = np.where(size <= limit, size**2 / 2, limit * (size - limit / 2)).sum()
    return float(cost), np.minimum(1.0, limit / np.maximum(size, 1e-30))


def descend(model: Model, names: list[str], logs: np.ndarray, noise: float, iterations: int = 40) -> np.ndarray:
    """Levenberg-Marquardt on Huber's cost at a noise; returns the logarithms it ends at.

    A weak pull to the defaults keeps constants that the data hardly tell from wandering off.
    """
    center = model.default_logs(names)
    pull = (noise / PRIOR) ** 2
    residuals = model.residuals(names, logs)
    damping = 1e-2

    def whole_cost(residuals: np.ndarray, logs: np.ndarray) -> float:
        return huber(residuals, noise)[0] + pull * float(((logs - center) ** 2).sum()) / 2

    for _ in range(iterations):
        cost, (_, weights) = whole_cost(residuals, logs), huber(residuals, noise)
        jacobian = model.jacobian(names, logs)
        curvature = jacobian.T @ (weights[:, None] * jacobian) + pull * np.eye(len(names))
        slope = jacobian.T @ (weights * residuals) + pull * (logs - center)
        while damping < 1e6:
            step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), -slope)
            trial = np.clip(logs + step, center - WIDEST, center + WIDEST)
            found = model.residuals(names, trial)
            found_cost = whole_cost(found, trial)
            if found_cost < cost:
                break
            damping *= 5
        else:
            break
        damping = max(damping / 5, 1e-9)
        logs, residuals = trial, found
        if cost - found_cost < 1e-7 * cost:
            break
    return logs


def descend_from(model: Model, names: list[str], start: np.ndarray) -> tuple[float, np.ndarray]:
    """From far away all times pull; near the end those that fit nothing are let go. Mean |residual|, logarithms."""
    logs = start
    for noise in (0.3, 0.1):
        logs = descend(model, names, logs, noise)
    logs = descend(model, names, logs, noise_of(model.residuals(names, logs)))
    return float(np.abs(model.residuals(names, logs)).mean()), logs


def standard_errors(model: Model, names: list[str], logs: np.ndarray) -> np.ndarray:
    """Of the logarithms; infinite where the data do not depend on a constant."""
    residuals = model.residuals(names, logs)
    noise = noise_of(residuals)
    _, weights = huber(residuals, noise)
    jacobian = model.jacobian(names, logs)
    curvature = jacobian.T @ (weights[:, None] * jacobian)
    values, vectors = np.linalg.eigh(curvature)
    # A direction along which nothing changes has an error without bound, also if rounding leaves it some curvature.
    variances = np.where(values > 1e-9 * max(float(values.max()), 1e-30), 1 / np.maximum(values, 1e-300), math.inf)
    parts = np.where(vectors**2 > 1e-12, vectors**2, 0.0)
    with np.errstate(invalid="ignore"):
        return noise * np.sqrt(np.where(parts > 0, parts * variances, 0.0).sum(axis=1))


def fit(times: Times, seed: int = 0) -> Fit:
    """Constants of least robust error in the logarithm of time; those that the data do not tell keep their defaults."""
    model = Model(times)
    names = [name for name in model.defaults if name not in HELD]
    start = model.default_logs(names)
    told = np.abs(model.jacobian(names, start, step=1.0)).max(axis=0) > 0
    names = [name for name, is_told in zip(names, told, strict=True) if is_told]
    untold = [name for name in model.defaults if name not in names and name not in HELD]
    generator = np.random.default_rng(seed)
    logs = model.default_logs(names)
    starts = [logs, *(logs + generator.normal(0, 0.5, len(names)) for _ in range(STARTS - 1))]
    while True:
        # The maxima in the model make several valleys: the deepest of those found from several starts.
        _, logs = min((descend_from(model, names, start) for start in starts), key=lambda found: found[0])
        errors = standard_errors(model, names, logs)
        worst = int(np.argmax(errors))
        if errors[worst] <= TOLD:
            break
        untold.append(names.pop(worst))
        if not names:
            raise ValueError("expected times that tell some constant, got none. Measure other layers and tokens.")
        logs = np.delete(logs, worst)
        starts = [logs, model.default_logs(names)]
    constants = model.defaults | dict(zip(names, np.exp(logs).tolist(), strict=True))
    return Fit(constants, dict(zip(names, errors.tolist(), strict=True)), untold, model.residuals(names, logs))


def regrets(times: Times, constants: dict[str, float]) -> np.ndarray:
    """Of each call: measured time of the plan that the model takes among the measured ones, over the best one's."""
    model_us = host_module().model_times_us(times.calls, times.limits, constants)
    plans: dict[tuple[int, ...], list[tuple[float, float]]] = {}
    for call, model, measured in zip(times.calls, model_us, times.us, strict=True):
        plans.setdefault(call[:4], []).append((model, measured))
    return np.array([min(group)[1] / min(us for _, us in group) for group in plans.values()])


def spread(name: str, values: np.ndarray) -> str:
    return f"{name}: median {np.median(values):.3f}, 90 % below {np.quantile(values, 0.9):.3f}, most {values.max():.3f}"


def report(times: Times, found: Fit) -> str:
    """What was fitted, how well, and the lines to paste into ModelConstants."""
    model = Model(times)
    before = np.abs(model.residuals([], np.zeros(0)))
    counts = Counter(call[:4] for call in times.calls)
    lines = [
        f"{len(times.calls)} times of {len(counts)} calls on {times.device}",
        spread("|log(model / measured)| before", before),
        spread("|log(model / measured)| after", np.abs(found.residuals)),
        spread("measured time of the model's plan over the best before", regrets(times, model.defaults)),
        spread("measured time of the model's plan over the best after", regrets(times, found.constants)),
        "the times that fit worst",
    ]
    for at in np.argsort(-np.abs(found.residuals))[:5]:
        rows, cols, tokens, _, *choice, _ = times.calls[at]
        named = " ".join(f"{name} {value}" for name, value in zip(CHOICE, choice, strict=True))
        model_us = times.us[at] * math.exp(found.residuals[at])
        lines.append(f"  {rows}x{cols}, {tokens} tokens, {named}: {times.us[at]:.2f} us, model {model_us:.2f}")
    lines.append("fitted, with relative standard errors as if those not told below were right")
    for name, error in found.errors.items():
        lines.append(f"  {name}: {model.defaults[name]:g} -> {found.constants[name]:.4g} +- {100 * error:.1f} %")
    lines.append(f"held, for only products with the others count: {', '.join(HELD)}")
    lines.append(f"not told by these times, left as they are: {', '.join(found.untold) or 'none'}")
    lines.append("for ModelConstants in csrc/gemm/plan.h, and the table of docs/inside/gemm.md")
    lines += [f"  double {name} = {found.constants[name]:.4g};" for name in found.errors]
    return "\n".join(lines)
