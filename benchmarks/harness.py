"""Timing, peak memory and result files shared by all benchmarks.

Every measured function runs interleaved with its rivals, so that a busy or throttled machine hurts all alike.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown CPU"


def environment() -> dict[str, str]:
    """What a number means nothing without."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "device": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def interleaved_times(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one of each function per round, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_index in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_index > 0:
                times[name].append(time.perf_counter() - start)
    return times


def _status_bytes(field: str) -> int:
    """A size from /proc/self/status, for example VmHWM, the peak resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"expected {field} in /proc/self/status; peak memory is measured on Linux only")


def _measure_memory(function: Callable[[], Callable[[], object]], connection) -> None:
    step = function()
    # getrusage would report the peak of the parent process, which exec inherits; this resets our own.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    step()
    connection.send(_status_bytes("VmHWM") - before)


def peak_bytes(prepare: Callable[[], Callable[[], object]]) -> int:
    """Growth of the peak resident memory by one call of the function that prepare() returns, in its own process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(prepare, sender))
    process.start()
    grown = receiver.recv()
    process.join()
    return grown


def summary(samples: list[float]) -> dict[str, float]:
    """Median, 5th and 95th percentile in milliseconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "median_ms": 1e3 * statistics.median(ordered),
        "p5_ms": 1e3 * ordered[round(0.05 * last)],
        "p95_ms": 1e3 * ordered[round(0.95 * last)],
    }


def print_table(rows: list[dict]) -> None:
    columns = list(rows[0])
    text = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in text)) for i, c in enumerate(columns)]
    print("  ".join(c.ljust(w) for c, w in zip(columns, widths, strict=True)))
    for line in text:
        print("  ".join(v.rjust(w) for v, w in zip(line, widths, strict=True)))


def save_csv(path: Path, rows: list[dict]) -> None:
    """One row per measurement, each with the environment it was made in."""
    facts = environment()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows(row | facts for row in rows)


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--repeats", type=int, default=10)
    result.add_argument("--csv", type=Path, help="save the table here")
    return result
