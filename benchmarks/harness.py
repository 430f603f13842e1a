"""Timing, peak memory and result files shared by all benchmarks.

Every measured function runs interleaved with its rivals, so that a busy or throttled machine hurts all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import math
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

GRAPH_SECONDS = 0.002  # of one sample
LEAST_ROUNDS = 5  # of rotating_times
ROTATION_BYTES = 16 << 30  # most that the copies of one weight may take


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown CPU"


def environment() -> dict[str, str]:
    """What a number means nothing without."""
    try:
        described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
        commit = described.stdout.strip()
    except FileNotFoundError:  # a machine without git
        commit = ""
    return {
        "date": date.today().isoformat(),
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
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


def rotating_times(
    calls: dict[str, Sequence[Callable[[], object]]], repeats: int, seconds: float, clock=time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call; calls holds one for each copy of a method's weight, and a round takes the next copy.

    Rounds run the methods forwards and backwards in turn, after a warm-up round; they end after `repeats`, or after
    LEAST_ROUNDS once `seconds` have passed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    begin = clock()
    for round_index in range(repeats + 1):
        if round_index > LEAST_ROUNDS and clock() - begin > seconds:
            break
        for name in order if round_index % 2 else order[::-1]:
            call = calls[name][round_index % len(calls[name])]
            start = clock()
            call()
            if round_index > 0:
                times[name].append(clock() - start)
    return times


def l3_bytes(caches: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of all last-level caches of this machine; raises OSError where Linux does not say."""
    levels: dict[int, dict[str, int]] = {}
    for index in caches.glob("cpu[0-9]*/cache/index*"):
        size, level, shared = ((index / name).read_text().strip() for name in ("size", "level", "shared_cpu_list"))
        levels.setdefault(int(level), {})[shared] = int(size.removesuffix("K")) << 10
    if not levels:
        raise OSError(f"expected the sizes of caches in {caches}, found none. Pass --l3-mib.")
    return sum(levels[max(levels)].values())


def copies_to_exceed_l2(nbytes: int, l2_bytes: int, memory_bytes: int) -> int:
    """Copies of a weight of nbytes that together exceed 2x L2, as far as memory_bytes allow; at least one.

    A launch that takes the next copy each time then finds nothing of it in L2.
    """
    return max(1, min(2 * l2_bytes // nbytes + 1, memory_bytes // nbytes))


def launches_of_sample(copies: int, least_seconds: float) -> int:
    """Launches of a graph that takes the copies in turn: whole sweeps, GRAPH_SECONDS if each takes least_seconds."""
    return copies * math.ceil(min(max(GRAPH_SECONDS / least_seconds, 2), 200) / copies)


def interleaved_event_times(
    functions: dict[str, Callable[[], object]], repeats: int, failed: Callable[[str, Exception], None]
) -> dict[str, list[float]]:
    """Seconds of each call on the GPU, rounds as in interleaved_graph_times; for calls that no graph can hold.

    A function that runs out of memory is taken out of `functions`, reported to `failed` and left out of the result.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for round_index in range(repeats + 1):
        for name in list(times)[:: 1 if round_index % 2 else -1]:
            try:
                begin.record()
                functions[name]()
                end.record()
                end.synchronize()
            except torch.OutOfMemoryError as error:
                del times[name], functions[name]  # and what the function holds
                failed(name, error)
                continue
            if round_index > 0:
                times[name].append(1e-3 * begin.elapsed_time(end))
    return times


def capture(calls: Sequence[Callable[[], object]], launches: int) -> torch.cuda.CUDAGraph:
    """CUDA graph of `launches` calls, taking calls in turn. Each is called once before, outside of the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            calls[index % len(calls)]()
    return graph


def interleaved_graph_times(
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], samples: int
) -> dict[str, list[float]]:
    """Seconds of one launch, a sample per replay; graphs holds (graph, launches in it).

    Rounds run the rivals forwards and backwards in turn (A B C, C B A), after a warm-up round, so that a clock that
    drifts hurts all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in graphs}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    order = list(graphs)
    for round_index in range(samples + 1):
        for name in order if round_index % 2 else order[::-1]:
            graph, launches = graphs[name]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if round_index > 0:
                times[name].append(1e-3 * begin.elapsed_time(end) / launches)
    return times


def _status_bytes(field: str) -> int:
    """A size from /proc/self/status, for example VmHWM, the peak resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"expected {field} in /proc/self/status; peak memory is measured on Linux only")


@dataclass
class Peak:
    """Growth of the resident memory in a `with resident_peak()`, known at its end; None where Linux does not say."""

    grown_bytes: int | None = None


@contextlib.contextmanager
def resident_peak() -> Iterator[Peak]:
    """Measure how far the resident memory of this process rises above what it is at the beginning."""
    peak = Peak()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve the body unseen
        # getrusage would report the peak of the parent process, which exec inherits; this resets our own.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):  # another system, or a sandbox
        yield peak
        return
    yield peak
    peak.grown_bytes = _status_bytes("VmHWM") - before


def _measure_memory(function: Callable[[], Callable[[], object]], connection) -> None:
    step = function()
    with resident_peak() as peak:
        step()
    connection.send(peak.grown_bytes)


def peak_bytes(prepare: Callable[[], Callable[[], object]]) -> int:
    """Growth of the peak resident memory by one call of the function that prepare() returns, in its own process.

    raises  OSError where Linux does not say.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(prepare, sender))
    process.start()
    sender.close()  # so that a process that dies ends the wait
    grown = receiver.recv()
    process.join()
    if grown is None:
        raise OSError("expected /proc/self/status and clear_refs; peak memory is measured on Linux only")
    return grown


def cuda_peak_mib(call: Callable[[], object]) -> float:
    """Most memory on the GPU that a call takes above what is allocated before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def profiled(call: Callable[[], object]) -> None:
    """One call between cudaProfilerStart and Stop, for ncu; nothing of its inputs is in L2."""
    torch.empty(256 << 20, dtype=torch.uint8, device="cuda").fill_(1)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def run_within(cells: list, measure: Callable, budget_seconds: float, clock=time.monotonic) -> list:
    """Measure cells in order while the longest so far still fits in the budget; returns those not run."""
    begin = clock()
    longest = 0.0
    for index, cell in enumerate(cells):
        start = clock()
        if start - begin + longest > budget_seconds:
            return cells[index:]
        measure(cell)
        longest = max(longest, clock() - start)
    return []


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


def show(rows: list[dict], path: Path | None) -> None:
    """Print the table and save it if there is a path; nothing for no rows."""
    if rows:
        print_table(rows)
        if path is not None:
            save_csv(path, rows)


def output_file(text: str) -> Path:
    """A path of --csv and --plot; refused before anything is measured where no file can be there."""
    path = Path(text)
    if path.is_dir() or any(parent.exists() and not parent.is_dir() for parent in path.parents):
        raise argparse.ArgumentTypeError(
            f"expected the path of a file to write, got {text}: a folder, or below a file."
        )
    return path


def picture_file(text: str) -> Path:
    """An output_file that matplotlib draws as PNG."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, got {text}.")
    return output_file(text)


def in_range(options: argparse.Namespace, flags: argparse.ArgumentParser, ranges: Sequence[tuple]) -> None:
    """End the program with one sentence for a number, or one of several, outside (name, least, most)."""
    for name, least, most in ranges:
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not least <= number <= most:
                limit = "or more" if most == math.inf else f"to {most}"
                flags.error(f"--{name.replace('_', '-')}: expected numbers of {least} {limit}, got {number}.")


def read_rows(path: Path, flag: str = "--from-csv") -> list[dict[str, str]]:
    """Rows of an earlier --csv, given by a flag; ends the program with one sentence where there are none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{flag}: expected a file that --csv wrote, got {path}: {error}") from None
    if not rows or "method" not in rows[0]:
        raise SystemExit(f"{flag}: expected rows that --csv wrote, got none in {path}.")
    return rows


def parser(description: str, *, repeats: bool = True) -> argparse.ArgumentParser:
    """With the flags that the benchmarks share; without --repeats for those that repeat nothing."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats:
        result.add_argument("--repeats", type=int, default=10)
    result.add_argument("--csv", type=output_file, help="save the table here")
    return result
