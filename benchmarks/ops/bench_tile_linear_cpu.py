"""tile_linear on a CPU against its rivals, side by side in one run: every shape, wins and losses.

python -m benchmarks.ops.bench_tile_linear_cpu --csv benchmarks/results/tile_linear_cpu.csv --plot tile_linear_cpu.png
    rivals F.linear (the weight's dtype and fp32), torch.compile, llama.cpp (pip install -e ".[bench]"), all with
    torch's number of threads; every call takes the next copy of its weight, so that nothing of it is in L3

GB_per_s counts weight, x and y once; of_read is its share of what reading a large buffer reaches in the same rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import harness, shapes
from benchmarks.ops.bench_tile_linear import BASELINE, packed_weight, within_two_times
from benchmarks.rivals import peer_ggml

# (N, K) of Llama-2-7B (q; gate; down), Llama-3.2-1B and Qwen2.5-0.5B (gate; down).
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 2048), (2048, 8192), (4864, 896), (896, 4864))
TOKENS = (1, 2, 4, 8, 16, 64, 512, 2048)
COMPILED_TOKENS = (1, 8, 64)  # "max-autotune" tries kernels for 5 to 60 s a cell
COMPILED_COPIES = 2  # each is compiled; READ between two calls of one puts it out of L3 as well
SCRATCH_SHAPE, SCRATCH_TOKENS, SCRATCH_SPARSITIES = (4096, 4096), (512, 2048), (0.0, 0.45)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILED, LLAMA, READ = "torch.compile", "llama.cpp", "read"
RATIOS = ("over_torch", "over_llama_cpp")  # columns: a rival's time over the method's
RANGES = [
    ("repeats", 1, math.inf),
    ("tokens", 1, math.inf),
    ("compiled_tokens", 1, math.inf),
    ("sparsity", 0, 0.5),
    ("cell_seconds", 0, math.inf),
    ("budget_seconds", 1, math.inf),
    ("l3_mib", 0.001, math.inf),
]
CHECKED_ROWS = 256  # rows of the weight whose results are compared with fp64


@dataclasses.dataclass(frozen=True)
class Cell:
    """One layer (N, K) at one number of tokens; every rival runs it side by side."""

    shape: tuple[int, int]
    tokens: int

    def __str__(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]} M={self.tokens}"


@dataclasses.dataclass
class Method:
    """One way to multiply by one weight, which is here in several copies."""

    sparsity: float
    expected: torch.Tensor  # (CHECKED_ROWS or fewer, K) rows of the weight it must reproduce
    copies: list
    prepare: Callable[[object, torch.Tensor], Callable[[], torch.Tensor]]  # (copy, x) -> the call that is timed
    nbytes: int  # of one copy
    x_dtype: torch.dtype

    def calls(self, x: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
        x = x.to(self.x_dtype)
        return [self.prepare(copy, x) for copy in self.copies]


def checked_rows(rows: int) -> torch.Tensor:
    return torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS)).long()


def linear_call(weight: torch.Tensor, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    return functools.partial(F.linear, x, weight)


def methods_of(
    shape: tuple[int, int], sparsities: Sequence[float], dtype: torch.dtype, l3_bytes: int, ggml
) -> dict[str, Method]:
    """Everything that multiplies by a random weight, in enough copies to exceed 4x L3; ggml None: no llama.cpp."""

    def copies_of(weight, nbytes: int, clone: Callable) -> list:
        count = max(2, harness.copies_to_exceed_l2(nbytes, 2 * l3_bytes, harness.ROTATION_BYTES))
        return [weight] + [clone(weight) for _ in range(count - 1)]

    weight = torch.randn(shape).to(dtype)
    rows = checked_rows(shape[0])
    methods = {}
    for sparsity in sparsities:
        packed = packed_weight(weight, sparsity)
        copies = copies_of(packed, packed.nbytes, lambda w: dataclasses.replace(w, payload=w.payload.clone()))
        methods[f"tiles {sparsity:.0%}"] = Method(
            sparsity, packed.unpack()[rows], copies, lambda w, x: functools.partial(w.matmul, x), packed.nbytes, dtype
        )
    copies = copies_of(weight, weight.nbytes, torch.clone)
    wide = weight.float()
    methods[BASELINE] = Method(0.0, weight[rows], copies, linear_call, weight.nbytes, dtype)
    methods["F.linear fp32"] = dataclasses.replace(
        methods[BASELINE],
        copies=copies_of(wide, wide.nbytes, torch.clone),
        nbytes=wide.nbytes,
        x_dtype=torch.float32,
    )
    if ggml is not None:
        prepare = functools.partial(peer_ggml.MatMul, ggml)
        methods[LLAMA] = dataclasses.replace(methods[BASELINE], prepare=prepare, x_dtype=torch.float32)
    return methods


def compiled_calls(baseline: Method, x: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    """F.linear through torch.compile; freezing lets it pack the weight, without it eager's kernel is all it has."""
    import torch._dynamo  # here: these take seconds
    import torch._inductor.config

    torch._dynamo.reset()  # or the copies of earlier cells fill its cache
    calls = []
    for weight in baseline.copies[:COMPILED_COPIES]:
        layer = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta").requires_grad_(False).eval()
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        call = functools.partial(torch.compile(layer, mode="max-autotune", dynamic=False), x)
        # It prints what it tries.
        with torch._inductor.config.patch(freezing=True), contextlib.redirect_stderr(io.StringIO()):
            call()
        calls.append(call)
    return calls


def is_right(y: torch.Tensor, x: torch.Tensor, expected: torch.Tensor, rows: int) -> bool:
    """The two-times rule on some rows of the weight (all of `rows`) and some tokens; nothing infinite anywhere."""
    return bool(y.isfinite().all()) and within_two_times(y[:, checked_rows(rows)], x, expected)


class Reader:
    """Reads a buffer of 8x L3, the fastest of several ways: they reach the memory's limit, within a few percent."""

    def __init__(self, l3_bytes: int):
        whole = torch.ones(8 * l3_bytes // 32768 * 4096, dtype=torch.int64)
        single = whole.view(torch.float32)
        self.nbytes = whole.nbytes
        ways = {
            "largest of rows, int64": functools.partial(torch.amax, whole.view(-1, 4096), 1),
            "largest of rows, fp32": functools.partial(torch.amax, single.view(-1, 4096), 1),
            "sum, int64": whole.sum,
            "sum, fp32": single.sum,
            "sums of rows, fp32": functools.partial(torch.sum, single.view(-1, 4096), 1),
        }
        times = {name: statistics.median(t) for name, t in harness.interleaved_times(ways, 5).items()}
        self.name = min(times, key=times.__getitem__)
        self.call = ways[self.name]
        self.gb_per_s = {name: 1e-9 * self.nbytes / seconds for name, seconds in times.items()}


def prepared_call(name: str, cell: Cell, sparsities: Sequence[float], dtype: torch.dtype) -> Callable[[], object]:
    """One call of a method in a fresh process, for harness.peak_bytes; libraries have set themselves up before it."""
    with torch.no_grad():
        ggml = peer_ggml.load() if name == LLAMA else None
        method = methods_of(cell.shape, sparsities, dtype, 1, ggml)[name]
        x = torch.randn(cell.tokens, cell.shape[1]).to(dtype)
        method.calls(x[:1].clone())[0]()
        return method.calls(x)[0]


def scratch_mb(name: str, cell: Cell, method: Method, dtype: torch.dtype) -> float:
    """Most memory that one call takes besides weight, x and y."""
    sparsities = [method.sparsity] if name.startswith("tiles") else []
    peak = harness.peak_bytes(functools.partial(prepared_call, name, cell, sparsities, dtype))
    return (peak - cell.tokens * cell.shape[0] * method.x_dtype.itemsize) / 1e6


@dataclasses.dataclass
class CpuRun:
    """All cells within a budget of seconds."""

    shapes: Sequence[tuple[int, int]]
    tokens: Sequence[int]
    sparsities: Sequence[float]
    repeats: int
    l3_bytes: int
    cell_seconds: float = math.inf
    budget_seconds: float = math.inf
    compiled_tokens: Sequence[int] = ()
    dtype: torch.dtype = torch.bfloat16
    csv: Path | None = None  # saved after every cell: a run may be stopped
    rows: list[dict] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    not_run: list[Cell] = dataclasses.field(default_factory=list)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.reader = Reader(self.l3_bytes)
        self.ggml = None
        try:
            self.ggml = peer_ggml.load()
        except RuntimeError as error:
            self.missing[LLAMA] = str(error)

    @torch.no_grad()
    def run(self) -> None:
        layers: dict[tuple[int, int], dict[str, Method]] = {}

        def measure(cell: Cell) -> None:
            if cell.shape not in layers:
                layers.clear()  # the copies of one layer take 2 GB and more
                layers[cell.shape] = methods_of(cell.shape, self.sparsities, self.dtype, self.l3_bytes, self.ggml)
            self.rows += self._cell(cell, layers[cell.shape])
            if self.csv is not None and self.rows:
                harness.save_csv(self.csv, self.rows)

        cells = [Cell(shape, tokens) for shape in self.shapes for tokens in self.tokens]
        self.not_run = harness.run_within(cells, measure, self.budget_seconds)

    def _compiled(self, cell: Cell, methods: dict[str, Method], x: torch.Tensor) -> list[Callable] | None:
        if cell.tokens not in self.compiled_tokens or COMPILED in self.missing:
            return None
        try:
            return compiled_calls(methods[BASELINE], x)
        except RuntimeError as error:  # no C++ compiler, for one
            self.missing[COMPILED] = next(line for line in str(error).splitlines() if line.strip())
            return None

    def _cell(self, cell: Cell, methods: dict[str, Method]) -> list[dict]:
        """Rows of one cell; what gives a wrong result is not timed."""
        x = torch.randn(cell.tokens, cell.shape[1]).to(self.dtype)
        calls = {name: method.calls(x) for name, method in methods.items()}
        if compiled := self._compiled(cell, methods, x):
            calls[COMPILED] = compiled
            methods = methods | {COMPILED: methods[BASELINE]}
        for name in list(calls):
            if not is_right(calls[name][0](), x, methods[name].expected, cell.shape[0]):
                self.wrong.append(f"{cell}: {name} misses the two-times rule")
                del calls[name]
        times = harness.rotating_times(calls | {READ: [self.reader.call]}, self.repeats, self.cell_seconds)
        medians = {name: statistics.median(samples) for name, samples in times.items()}
        read_speed = self.reader.nbytes / medians[READ]
        rows = []
        for name, samples in times.items():
            method = methods.get(name)
            moved = self.reader.nbytes
            if method is not None:
                moved = method.nbytes + method.x_dtype.itemsize * cell.tokens * sum(cell.shape)
            row = {"shape": f"{cell.shape[0]}x{cell.shape[1]}", "tokens": cell.tokens, "method": name}
            row |= {"dtype": str(self.dtype).removeprefix("torch."), "sparsity": method.sparsity if method else ""}
            row |= harness.summary(samples) | {"samples": len(samples)}
            for column, rival in zip(RATIOS, (BASELINE, LLAMA), strict=True):
                row[column] = medians[rival] / medians[name] if method and rival in medians else ""
            row["weight_MB"] = method.nbytes / 1e6 if method else ""
            row["copies"] = len(calls[name]) if method else 1
            row["GB_per_s"] = 1e-9 * moved / medians[name]
            row["of_read"] = moved / medians[name] / read_speed
            row["scratch_MB"] = self._scratch(name, cell, method)
            rows.append(row)
        return rows

    def _scratch(self, name: str, cell: Cell, method: Method | None) -> float | str:
        if cell.shape != SCRATCH_SHAPE or cell.tokens not in SCRATCH_TOKENS or method is None or name == COMPILED:
            return ""
        if name.startswith("tiles") and method.sparsity not in SCRATCH_SPARSITIES:
            return ""
        return scratch_mb(name, cell, method, self.dtype)


def tile_rows(rows: list[dict]) -> list[dict]:
    """Those of packed weights, if F.linear was measured beside them."""
    return [row for row in rows if row["method"].startswith("tiles") and row["over_torch"] != ""]


def over_shapes(rows: list[dict]) -> list[dict]:
    """For each M and sparsity: geometric mean and worst, over the shapes, of a rival's time over the method's."""
    groups: dict[tuple[int, str], list[dict]] = {}
    for row in tile_rows(rows):
        groups.setdefault((int(row["tokens"]), row["method"]), []).append(row)
    table = []
    for (tokens, method), mine in sorted(groups.items()):
        line = {"tokens": tokens, "method": method, "shapes": len(mine)}
        for column in RATIOS:
            ratios = {row["shape"]: float(row[column]) for row in mine if row[column] != ""}
            worst = min(ratios, key=ratios.__getitem__, default="")
            line[column] = statistics.geometric_mean(ratios.values()) if ratios else ""
            line[f"worst_{column}"] = f"{ratios[worst]:.2f} {worst}" if ratios else ""
        table.append(line)
    return table


def losses(rows: list[dict], column: str) -> list[str]:
    """Every cell in which a packed weight is slower than the rival of this column."""
    lost = [row for row in tile_rows(rows) if row[column] != "" and float(row[column]) < 1]
    return [f"{row['shape']} M={row['tokens']} {row['method']}: {float(row[column]):.2f}" for row in lost]


def report(rows: list[dict]) -> None:
    """The tables below the rows: means over shapes, and what is slower than a rival."""
    print("\nover the shapes, geometric mean and worst of the rival's time over ours:")
    harness.print_table(over_shapes(rows))
    for column in RATIOS:
        measured = [row for row in tile_rows(rows) if row[column] != ""]
        lost = losses(rows, column)
        print(f"\n{column} below 1 in {len(lost)} of {len(measured)} cells" + (":" if lost else ""))
        for line in lost:
            print(f"  {line}")


def plot(rows: list[dict], path: Path) -> None:
    """F.linear's time over the method's against M: a panel a shape, and one of their geometric means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    ratios: dict[str, dict[str, dict[int, float]]] = {}  # shape, method, tokens
    for row in rows:
        if (row["method"].startswith("tiles") or row["method"] == LLAMA) and row["over_torch"] != "":
            methods = ratios.setdefault(row["shape"], {})
            methods.setdefault(row["method"], {})[int(row["tokens"])] = float(row["over_torch"])
    if not ratios:
        print("plot: no row has a ratio over F.linear; nothing to draw.")
        return
    means: dict[str, dict[int, float]] = {}
    for method in dict.fromkeys(method for methods in ratios.values() for method in methods):
        of_shapes = [methods.get(method, {}) for methods in ratios.values()]
        for count in sorted({count for points in of_shapes for count in points}):
            values = [points[count] for points in of_shapes if count in points]
            means.setdefault(method, {})[count] = statistics.geometric_mean(values)
    panels = ratios | {"geometric mean of the shapes": means}
    tiles = sorted(method for method in means if method != LLAMA)
    colours = dict(
        zip(tiles, matplotlib.colormaps["viridis"](torch.linspace(0.85, 0, len(tiles)).tolist()), strict=True)
    )
    ticks = sorted({count for points in means.values() for count in points})
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (3.6 * columns, 3 * lines + 0.7)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, (title, methods) in zip(axes.flat, panels.items(), strict=False):
        for method, points in sorted(methods.items()):
            style = {"color": "tab:red", "linestyle": "--"} if method == LLAMA else {"color": colours[method]}
            axis.plot(*zip(*sorted(points.items()), strict=True), marker=".", label=method, **style)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(count) for count in ticks], fontsize=8)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_locator(ticker.LogLocator(2, subs=(1, 1.5), numticks=20))
        axis.yaxis.set_major_formatter("{x:.3g}")
        axis.minorticks_off()
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("tokens M", fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    facts = harness.environment() | rows[0]
    figure.supylabel("F.linear's time over the method's", fontsize=10)
    figure.suptitle(
        f"tile_linear, {facts['dtype']}, over torch's F.linear: {facts['device']}, {facts['threads']} threads, "
        f"torch {facts['torch']}, {facts['date']}",
        fontsize=11,
    )
    handles, labels = axes.flat[len(panels) - 1].get_legend_handles_labels()  # the means have every method
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def shape_of(text: str) -> tuple[int, int]:
    """(N, K) of "4096x4096"."""
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdigit() and int(size) % 128 == 0 and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"expected NxK, both multiples of 128, got {text!r}; pass 4096x4096 or alike")
    return int(sizes[0]), int(sizes[1])


def parser() -> argparse.ArgumentParser:
    result = harness.parser(__doc__)
    result.set_defaults(repeats=30)
    result.add_argument("--shapes", nargs="+", type=shape_of, default=list(SHAPES), metavar="NxK")
    result.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    result.add_argument("--sparsity", nargs="+", type=float, default=list(shapes.SPARSITIES))
    result.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the weight and of x")
    result.add_argument("--compiled-tokens", nargs="*", type=int, default=list(COMPILED_TOKENS))
    result.add_argument("--cell-seconds", type=float, default=6, help="no more rounds after that, but a few")
    result.add_argument("--budget-seconds", type=float, default=math.inf)
    result.add_argument("--l3-mib", type=float, help="size of the last-level caches; default what Linux says")
    result.add_argument("--plot", type=harness.picture_file, help="draw the ratios over F.linear here")
    result.add_argument("--from-csv", type=Path, help="no run: tables and plot of an earlier CSV")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parser()
    options = flags.parse_args(arguments)
    harness.in_range(options, flags, RANGES)
    if options.from_csv is not None:
        rows, wrong = harness.read_rows(options.from_csv), []
    else:
        run = CpuRun(
            options.shapes,
            options.tokens,
            options.sparsity,
            options.repeats,
            int(options.l3_mib * 2**20) if options.l3_mib else harness.l3_bytes(),
            options.cell_seconds,
            options.budget_seconds,
            options.compiled_tokens,
            DTYPES[options.dtype],
            options.csv,
        )
        speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in run.reader.gb_per_s.items())
        print(f"reading {run.reader.nbytes / 1e6:.0f} MB, GB/s: {speeds}; taken: {run.reader.name}")
        for name, reason in run.missing.items():
            print(f"{name} is not measured: {reason}")
        known = set(run.missing)
        run.run()
        rows, wrong = run.rows, run.wrong
        if rows:
            harness.print_table(rows)
        for name in run.missing.keys() - known:
            print(f"{name} was not measured: {run.missing[name]}")
        for cell in run.not_run:
            print(f"not run for lack of time: {cell}")
    if tile_rows(rows):
        report(rows)
    if options.plot:
        plot(rows, options.plot)
    if wrong:
        raise SystemExit("wrong, not timed: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
