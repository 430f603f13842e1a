"""tile_experts against torch on dense weights, side by side in one run: every cell, wins and losses.

python -m benchmarks.ops.bench_tile_experts --csv benchmarks/results/tile_experts_cpu.csv
    rivals: torch's grouped_mm on dense bf16 weights (E, N, K) with rows sorted by expert and put back, as transformers
    calls it, and a loop of F.linear over the experts that were hit, its default

On a GPU (--device cuda) a call ends when the GPU has: tile_experts waits for it anyhow, to read the experts.

Routing is random, another one every round, so that little of the weights that a call needs is in L3. GB_per_s counts
the weights of the experts that were hit, x and y once; of_read is its share of what reading a large buffer reaches in
the same rounds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.ops.bench_tile_linear import packed_weight
from benchmarks.ops.bench_tile_linear_cpu import READ, Reader
from patch_kernels import TiledExperts
from patch_kernels.ops.tile_linear import tile_flags

GROUPED, LOOP = "grouped_mm", "F.linear loop"
TOKENS = (1, 8, 64, 512)
SPARSITIES = (0.0, 0.45, 0.5)
ROUTINGS = 16
DISTINCT = 3  # random matrices of a layer, taken in turn; every expert has its own copy in memory
CHECKED_ROWS = 8  # of y
RANGES = [
    ("repeats", 1, math.inf),
    ("tokens", 1, math.inf),
    ("sparsity", 0, 0.5),
    ("cell_seconds", 0, math.inf),
    ("budget_seconds", 0, math.inf),
    ("l3_mib", 0.001, math.inf),
]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A projection: E experts of `parts` matrices (N, K); a row of x has `fan` of the top_k experts of a token."""

    model: str
    name: str
    experts: int
    top_k: int
    parts: int
    rows: int
    cols: int

    @property
    def fan(self) -> int:
        return self.top_k if self.name == "gate_up" else 1


@dataclasses.dataclass(frozen=True)
class Cell:
    layer: Layer
    tokens: int

    def __str__(self) -> str:
        return f"{self.layer.model} {self.layer.name} M={self.tokens}"


def layers_of(model: str, experts: int, top_k: int, hidden: int, inner: int) -> tuple[Layer, Layer]:
    sizes = model, experts, top_k
    return (
        Layer(model, "gate_up", *sizes[1:], 2, inner, hidden),
        Layer(model, "down", *sizes[1:], 1, hidden, inner),
    )


MODELS = {
    "Qwen3-30B-A3B": layers_of("Qwen3-30B-A3B", 128, 8, 2048, 768),
    "Mixtral-8x7B": layers_of("Mixtral-8x7B", 8, 2, 4096, 14336),
}


def grouped_mm(x: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows sorted by expert, torch's grouped product, rows in their order."""
    fan = len(experts) // len(x)
    order = experts.argsort()
    ends = torch.bincount(experts, minlength=len(weight)).cumsum(0, dtype=torch.int32)
    sorted_y = F.grouped_mm(x[order // fan], weight.mT, offs=ends)
    y = torch.empty_like(sorted_y)
    y[order] = sorted_y
    return y


def linear_loop(x: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.linear for one expert that was hit after another."""
    fan = len(experts) // len(x)
    y = x.new_empty(len(experts), weight.shape[1])
    for expert in experts.unique().tolist():
        at = (experts == expert).nonzero()[:, 0]
        y[at] = F.linear(x[at // fan], weight[expert])
    return y


@dataclasses.dataclass
class Method:
    """One way to multiply by the weights of a layer."""

    sparsity: float
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, experts) -> y
    matrix: Callable[[int], torch.Tensor]  # (expert) -> (parts * N, K), which it must reproduce
    nbytes: float  # of an expert


def packed_method(layer: Layer, weights: Sequence[torch.Tensor], sparsity: float) -> Method:
    tiled = [packed_weight(weight, sparsity) for weight in weights]
    matrices = [tiled[i % DISTINCT] for i in range(layer.experts * layer.parts)]
    module = TiledExperts(layer.experts, layer.parts, layer.cols, layer.rows, False, payload_bytes=None, device="meta")
    module.weight = torch.cat([matrix.payload for matrix in matrices])
    module.tile_is_sparse = torch.stack([tile_flags(matrix.tile_is_sparse) for matrix in matrices])

    def matrix(expert: int) -> torch.Tensor:
        return torch.cat([module.tiled_weight(expert, part).unpack() for part in range(layer.parts)])

    return Method(sparsity, module, matrix, module.weight.numel() / layer.experts)


def ended(call: Callable[[], object]) -> None:
    call()
    torch.cuda.synchronize()


def methods_of(layer: Layer, sparsities: Sequence[float]) -> dict[str, Method]:
    weights = [torch.randn(layer.rows, layer.cols).bfloat16() for _ in range(DISTINCT)]
    methods = {f"tiles {sparsity:.0%}": packed_method(layer, weights, sparsity) for sparsity in sparsities}
    dense = torch.cat([weights[i % DISTINCT] for i in range(layer.experts * layer.parts)])
    dense = dense.view(layer.experts, layer.parts * layer.rows, layer.cols)
    for name, function in ((GROUPED, grouped_mm), (LOOP, linear_loop)):
        call = functools.partial(function, weight=dense)
        methods[name] = Method(0.0, call, dense.__getitem__, dense.nbytes / layer.experts)
    return methods


def routings(layer: Layer, tokens: int) -> list[torch.Tensor]:
    """Random experts of the rows of y, top_k different ones for a token."""
    return [torch.rand(tokens, layer.experts).topk(layer.top_k).indices.flatten() for _ in range(ROUTINGS)]


def is_right(y: torch.Tensor, x: torch.Tensor, experts: torch.Tensor, method: Method) -> bool:
    """The two-times rule on some rows; nothing infinite anywhere."""
    fan = len(experts) // len(x)
    error = of_torch = 0.0
    for p in torch.linspace(0, len(experts) - 1, min(len(experts), CHECKED_ROWS)).long().tolist():
        row, weight = x[p // fan], method.matrix(int(experts[p]))
        exact = weight.double() @ row.double()
        error = max(error, float((y[p].double() - exact).abs().max()))
        of_torch = max(of_torch, float((F.linear(row, weight).double() - exact).abs().max()))
    return error <= 2 * of_torch and bool(y.isfinite().all())


@dataclasses.dataclass
class ExpertsRun:
    """All cells within a budget of seconds."""

    layers: Sequence[Layer]
    tokens: Sequence[int]
    sparsities: Sequence[float]
    repeats: int
    l3_bytes: int  # or L2 of a GPU
    device: str = "cpu"
    cell_seconds: float = math.inf
    budget_seconds: float = math.inf
    csv: Path | None = None  # saved after every cell: a run may be stopped
    rows: list[dict] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    not_run: list[Cell] = dataclasses.field(default_factory=list)

    @torch.no_grad()
    def run(self) -> None:
        with torch.device(self.device):
            self._run()

    def _run(self) -> None:
        reader = Reader(self.l3_bytes)
        made: dict[Layer, dict[str, Method]] = {}

        def measure(cell: Cell) -> None:
            if cell.layer not in made:
                made.clear()  # the weights of one layer take gigabytes
                made[cell.layer] = methods_of(cell.layer, self.sparsities)
            self.rows += self._cell(cell, made[cell.layer], reader)
            if self.csv is not None and self.rows:
                harness.save_csv(self.csv, self.rows)

        cells = [Cell(layer, tokens) for layer in self.layers for tokens in self.tokens]
        self.not_run = harness.run_within(cells, measure, self.budget_seconds)

    def _cell(self, cell: Cell, methods: dict[str, Method], reader: Reader) -> list[dict]:
        """Rows of one cell; what gives a wrong result is not timed."""
        layer = cell.layer
        chosen = routings(layer, cell.tokens)
        x = torch.randn(len(chosen[0]) // layer.fan, layer.cols).bfloat16()
        calls: dict[str, list[Callable]] = {}
        for name, method in methods.items():
            if is_right(method.call(x, chosen[0]), x, chosen[0], method):
                calls[name] = [functools.partial(method.call, x, experts) for experts in chosen]
            else:
                self.wrong.append(f"{cell}: {name} misses the two-times rule")
        calls[READ] = [reader.call]
        if self.device == "cuda":
            calls = {name: [functools.partial(ended, call) for call in of_name] for name, of_name in calls.items()}
        times = harness.rotating_times(calls, self.repeats, self.cell_seconds)
        medians = {name: statistics.median(samples) for name, samples in times.items()}
        read_speed = reader.nbytes / medians.pop(READ)
        rivals = [medians[name] for name in (GROUPED, LOOP) if name in medians]
        hit = statistics.mean(len(experts.unique()) for experts in chosen)
        rows = []
        for name, median in medians.items():
            moved = hit * methods[name].nbytes + 2 * (x.numel() + len(chosen[0]) * layer.parts * layer.rows)
            row = {"model": layer.model, "layer": layer.name, "experts": layer.experts, "top_k": layer.top_k}
            row |= {"parts": layer.parts, "shape": f"{layer.rows}x{layer.cols}", "tokens": cell.tokens}
            row |= {"experts_hit": hit, "method": name, "sparsity": methods[name].sparsity}
            row |= harness.summary(times[name]) | {"samples": len(times[name])}
            row["over_torch"] = min(rivals) / median if rivals else ""
            row |= {"GB_per_s": 1e-9 * moved / median, "of_read": moved / median / read_speed}
            rows.append(row)
        return rows


def cache_bytes(device: str) -> int:
    """Of the last level before memory."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else harness.l3_bytes()


def losses(rows: list[dict]) -> list[str]:
    """Every cell in which packed weights are slower than the faster rival."""
    return [
        f"{row['model']} {row['layer']} M={row['tokens']} {row['method']}: {row['over_torch']:.2f}"
        for row in rows
        if row["method"].startswith("tiles") and row["over_torch"] != "" and row["over_torch"] < 1
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    flags = harness.parser(__doc__)
    flags.set_defaults(repeats=30)
    flags.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    flags.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    flags.add_argument("--sparsity", nargs="+", type=float, default=list(SPARSITIES))
    flags.add_argument("--cell-seconds", type=float, default=10, help="no more rounds after that, but a few")
    flags.add_argument("--budget-seconds", type=float, default=math.inf)
    flags.add_argument("--l3-mib", type=float, help="size of the last-level caches; default what Linux or the GPU says")
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = flags.parse_args(arguments)
    harness.in_range(options, flags, RANGES)
    if options.device == "cuda" and not torch.cuda.is_available():
        flags.error(
            "--device cuda: expected a GPU that torch sees, got none. Measure the CPU, or install a CUDA torch."
        )
    run = ExpertsRun(
        [layer for model in options.models for layer in MODELS[model]],
        options.tokens,
        options.sparsity,
        options.repeats,
        int(options.l3_mib * 2**20) if options.l3_mib else cache_bytes(options.device),
        options.device,
        options.cell_seconds,
        options.budget_seconds,
        options.csv,
    )
    run.run()
    if run.rows:
        harness.print_table(run.rows)
        lost = losses(run.rows)
        print(f"\nslower than the faster rival in {len(lost)} cells" + (":" if lost else ""))
        for line in lost:
            print(f"  {line}")
    for cell in run.not_run:
        print(f"not run for lack of time: {cell}")
    if run.wrong:
        raise SystemExit("wrong, not timed: " + "; ".join(run.wrong))


if __name__ == "__main__":
    main()
