"""tile_linear on a GPU against its rivals: every shape, wins and losses. bench_tile_linear_cpu has those of a CPU.

python -m benchmarks.ops.bench_tile_linear --csv out.csv --plot out.png --peer build/gpu/libcutlass_sparse_gemm.so
    layers of Llama-2-7B, Llama-3-8B and 70B; rivals F.linear (cuBLAS), cuSPARSELt and CUTLASS where all tiles are 2:4
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import harness, shapes
from benchmarks.rivals import peer_cutlass
from patch_kernels import PATTERNS, TiledWeight, ops, reference
from patch_kernels._library import gemm_status

BASELINE = "F.linear"
CHECKED_TOKENS = 64  # rows of y compared with fp64: the first and the last 32


def random_keep(
    shape: tuple[int, int], sparsity: float, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep mask (N, K) with the given share of zeros, and its 2:4 tiles: a random share 2*sparsity of all, bool."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = shape
    tiles = torch.zeros(rows // 128 * (cols // 128), dtype=torch.bool)
    tiles[torch.randperm(tiles.numel(), generator=generator)[: shapes.sparse_tiles(rows, cols, sparsity)]] = True
    tiles = tiles.reshape(rows // 128, cols // 128).to(device)
    chosen = torch.randint(0, 6, (rows * cols // 4,), generator=generator, dtype=torch.int32).to(device)
    pattern = PATTERNS.to(device)[chosen].reshape(shape)
    return pattern | ~reference.expand_tiles(tiles, (128, 128), shape), tiles


def packed_weight(weight: torch.Tensor, sparsity: float) -> TiledWeight:
    """Random hybrid weight with the given share of zeros: share 2*sparsity of its tiles is 2:4."""
    return TiledWeight.pack(weight, *random_keep((weight.shape[0], weight.shape[1]), sparsity, weight.device))


def fallback_reason() -> str | None:
    """Why the calls so far did not run the sparse kernels of this GPU, or None: a fall-back is right, and slow."""
    status = gemm_status(ops.LIBRARY_PATH, torch.cuda.current_device())
    if status["state"] == "works" and not status["reason"]:
        return None
    return f"{status['family']} kernels {status['state']}: {status['reason'] or 'no reason given'}"


@dataclasses.dataclass
class Rival:
    """One way to multiply by one weight."""

    sparsity: float
    dense: torch.Tensor | None  # the weight it must reproduce; None: that of tiles_of
    tiles_of: TiledWeight | None
    call: Callable[[object, torch.Tensor], torch.Tensor]  # (weight copy, x) -> y
    weight: object
    clone: Callable[[object], object]
    nbytes: int

    def reference_weight(self) -> torch.Tensor:
        return self.tiles_of.unpack() if self.dense is None else self.dense


def _cusparselt(tiled: TiledWeight):
    """The weight as torch.sparse.to_sparse_semi_structured makes it, but by cuSPARSELt or not at all."""
    return torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(tiled.unpack())


def rivals_of(weight: torch.Tensor, sparsities: list[float], peer) -> tuple[dict[str, Rival], dict[str, str]]:
    """Everything that can run this weight, and why the others cannot."""
    missing = {}
    nbytes = 2 * weight.numel()
    rivals = {BASELINE: Rival(0.0, weight, None, lambda w, x: F.linear(x, w), weight, torch.clone, nbytes)}
    all_sparse = None
    for sparsity in sparsities:
        tiled = packed_weight(weight, sparsity)
        all_sparse = tiled if sparsity == 0.5 else all_sparse
        rivals[f"tiles {sparsity:.0%}"] = Rival(
            sparsity,
            None,
            tiled,
            lambda w, x: w.matmul(x),
            tiled,
            lambda w: dataclasses.replace(w, payload=w.payload.clone()),
            tiled.nbytes,
        )
    if all_sparse is None:
        return rivals, missing
    try:
        semi = _cusparselt(all_sparse)
        rivals["cuSPARSELt"] = Rival(
            0.5,
            None,
            all_sparse,
            lambda w, x: F.linear(x, w),
            semi,
            lambda w: _cusparselt(all_sparse),
            shapes.weight_bytes(*weight.shape, 0.5),
        )
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        missing["cuSPARSELt"] = str(error).splitlines()[0]
    if peer is not None:
        try:
            compressed = peer_cutlass.CutlassSparse(peer, all_sparse.unpack())
            rivals["CUTLASS"] = Rival(
                0.5,
                None,
                all_sparse,
                lambda w, x: w.matmul(x),
                compressed,
                lambda w: w.clone(),
                compressed.nbytes,
            )
        except RuntimeError as error:
            missing["CUTLASS"] = str(error)
    return rivals, missing


def within_two_times(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Largest error against fp64 at most twice that of F.linear on the same weight, and nothing infinite."""
    tokens = x.shape[0]
    half = CHECKED_TOKENS // 2
    picked = torch.arange(tokens, device=x.device)
    if tokens > CHECKED_TOKENS:
        picked = torch.cat([picked[:half], picked[-half:]])
    exact = x[picked].double() @ weight.double().T
    base = (F.linear(x, weight)[picked].double() - exact).abs().max()
    error = (y[picked].double() - exact).abs().max()
    return bool(error <= 2 * base + torch.finfo(x.dtype).tiny) and bool(y.isfinite().all())


def gpu_cell(
    cell: shapes.Cell, rivals: dict[str, Rival], samples: int, l2_bytes: int, tbps: float, device: str
) -> tuple[list[dict], list[str]]:
    """Rows of one cell, and what failed or gave a wrong result; that is not timed."""
    x = torch.randn(cell.tokens, cell.cols, device=device).bfloat16()
    wrong, graphs, copies_kept = [], {}, []
    for name, rival in rivals.items():
        place = f"{cell.model} {cell.layer} M={cell.tokens}: {name}"
        count = harness.copies_to_exceed_l2(rival.nbytes, l2_bytes, harness.ROTATION_BYTES)
        floor = shapes.roofline_seconds(cell, rival.sparsity, tbps)
        launches = harness.launches_of_sample(count, floor)
        try:
            y = rival.call(rival.weight, x)
            if not within_two_times(y, x, rival.reference_weight()):
                wrong.append(f"{place} misses the two-times rule")
                continue
            copies = [rival.weight] + [rival.clone(rival.weight) for _ in range(count - 1)]
            calls = [functools.partial(rival.call, copy, x) for copy in copies]
            graphs[name] = (harness.capture(calls, launches), launches)
        except RuntimeError as error:  # a rival that cannot run this shape must not cost the others their numbers
            wrong.append(f"{place}: {str(error).splitlines()[0]}")
            continue
        copies_kept.append(copies)  # a graph holds addresses, not tensors
    if BASELINE not in graphs:
        return [], wrong
    times = harness.interleaved_graph_times(graphs, samples)
    baseline = harness.summary(times[BASELINE])["median_ms"]
    rows = []
    for name in graphs:
        sparsity = rivals[name].sparsity
        row = {"model": cell.model, "layer": cell.layer, "shape": f"{cell.rows}x{cell.cols}", "tokens": cell.tokens}
        row |= {"method": name, "sparsity": sparsity} | harness.summary(times[name])
        seconds = 1e-3 * row["median_ms"]
        row["vs_bf16"] = baseline / row["median_ms"]
        row["weight_MB"] = rivals[name].nbytes / 1e6
        row["GB_per_s"] = 1e-9 * (rivals[name].nbytes + 2 * cell.tokens * (cell.rows + cell.cols)) / seconds
        row["TFLOPs_effective"] = 1e-12 * shapes.effective_flops(cell) / seconds
        row["TFLOPs_executed"] = 1e-12 * shapes.executed_flops(cell, sparsity) / seconds
        row["roofline_share"] = shapes.roofline_seconds(cell, sparsity, tbps) / seconds
        rows.append(row)
    return rows, wrong


@dataclasses.dataclass
class GpuRun:
    """All cells within a budget of seconds."""

    models: list[str]
    tokens: list[int]
    sparsities: list[float]
    budget_seconds: float
    samples: int
    tbps: float
    l2_bytes: int
    peer: object = None
    csv: Path | None = None  # saved after every cell: a run may be stopped
    device: str = "cuda"
    rows: list[dict] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    not_run: list[shapes.Cell] = dataclasses.field(default_factory=list)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)

    def run(self) -> None:
        layers: dict[tuple[int, int], dict[str, Rival]] = {}

        def measure(cell: shapes.Cell) -> None:
            shape = (cell.rows, cell.cols)
            if shape not in layers:
                weight = torch.randn(shape, device=self.device).bfloat16()
                layers[shape], missing = rivals_of(weight, self.sparsities, self.peer)
                self.missing |= missing
            rows, wrong = gpu_cell(cell, layers[shape], self.samples, self.l2_bytes, self.tbps, self.device)
            self.rows += rows
            self.wrong += wrong
            if self.csv is not None and self.rows:
                harness.save_csv(self.csv, self.rows)

        cells = shapes.cells(self.models, self.tokens)
        self.not_run = harness.run_within(cells, measure, self.budget_seconds)


def layer_sums(rows: list[dict]) -> list[dict]:
    """For each model, M and method: time of the four projections, and F.linear's over it. None if one is missing."""
    sums: dict[tuple, dict[str, float]] = {}
    for row in rows:
        key = (row["model"], int(row["tokens"]), row["method"])
        sums.setdefault(key, {})[row["layer"]] = float(row["median_ms"])
    result = []
    for (model, tokens, method), layers in sums.items():
        baseline = sums.get((model, tokens, BASELINE), {})
        if len(layers) < len(shapes.MODELS[model]) or len(baseline) < len(layers):
            continue
        speedup = sum(baseline.values()) / sum(layers.values())
        row = {"model": model, "tokens": tokens, "method": method, "sum_us": 1e3 * sum(layers.values())}
        result.append(row | {"speedup": speedup, "note": "loss" if speedup < 1 else ""})
    return result


def plot(rows: list[dict], path: Path) -> None:
    """Speed-up of the summed projections over F.linear against M, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sums = layer_sums(rows)
    models = list(dict.fromkeys(row["model"] for row in sums))
    if not models:
        print("plot: no model has all four projections; nothing to draw.")
        return
    figure, axes = pyplot.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False, sharey=True)
    for axis, model in zip(axes[0], models, strict=True):
        mine = [row for row in sums if row["model"] == model and row["method"] != BASELINE]
        for method in dict.fromkeys(row["method"] for row in mine):
            points = sorted((row["tokens"], row["speedup"]) for row in mine if row["method"] == method)
            axis.plot(*zip(*points, strict=True), marker="o", label=method)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="tokens", title=model)
    axes[0][0].set_ylabel("speed-up over F.linear")
    axes[0][-1].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parser() -> argparse.ArgumentParser:
    result = harness.parser(__doc__)
    result.add_argument("--models", nargs="+", default=list(shapes.MODELS), choices=list(shapes.MODELS))
    result.add_argument("--tokens", nargs="+", type=int, default=list(shapes.TOKENS))
    result.add_argument("--sparsity", nargs="+", type=float, default=list(shapes.SPARSITIES))
    result.add_argument("--budget-seconds", type=float, default=math.inf)
    result.add_argument("--bandwidth", type=float, help="rated TB/s of the card; default by its name")
    result.add_argument("--peer", type=Path, help="libcutlass_sparse_gemm.so of benchmarks.card.build --peer")
    result.add_argument("--plot", type=Path, help="draw the speed-ups here (needs matplotlib)")
    result.add_argument("--from-csv", type=Path, help="no run: tables and plot of an earlier CSV")
    return result


def main() -> None:
    flags = parser()
    options = flags.parse_args()
    if options.from_csv is None and not torch.cuda.is_available():
        flags.exit(
            2,
            "bench_tile_linear: needs an NVIDIA GPU that torch can use, found none. "
            "python -m benchmarks.ops.bench_tile_linear_cpu measures the CPU.\n",
        )
    wrong: list[str] = []
    if options.from_csv is not None:
        rows = harness.read_rows(options.from_csv)
    else:
        peer = peer_cutlass.load(options.peer) if options.peer else None
        tbps = options.bandwidth or shapes.bandwidth_tbps(torch.cuda.get_device_name())
        samples = max(options.repeats, 20)
        run = GpuRun(
            options.models,
            options.tokens,
            options.sparsity,
            options.budget_seconds,
            samples,
            tbps,
            torch.cuda.get_device_properties(0).L2_cache_size,
            peer,
            options.csv,
        )
        with torch.no_grad():
            run.run()
        rows, wrong = run.rows, run.wrong
        if rows:
            harness.print_table(rows)
        for name, reason in run.missing.items():
            print(f"{name} was not measured: {reason}")
        for cell in run.not_run:
            print(f"not run for lack of time: {cell.model} {cell.layer} M={cell.tokens}")
    sums = layer_sums(rows)
    if sums:
        print("\nfour projections of a layer, F.linear's time over the method's:")
        harness.print_table(sums)
    if options.plot:
        plot(rows, options.plot)
    if wrong:
        raise SystemExit("failed or wrong, not timed: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
