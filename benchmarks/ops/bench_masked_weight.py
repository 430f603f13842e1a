"""masked_weight against the same mathematics in eager PyTorch and compiled by torch.compile, and the bandwidth limit.

CPU  python -m benchmarks.ops.bench_masked_weight --csv benchmarks/results/masked_weight_cpu.csv
GPU  python -m benchmarks.ops.bench_masked_weight --csv out.csv --check
Both passes with time and peak memory, wins and losses. --check compares ours with patch_kernels.reference before it is
timed; --dry goes through everything on the CPU with tiny sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import harness, shapes
from benchmarks.rivals.eager_masks import sample_mask
from patch.learn.config import MODES
from patch_kernels import PATTERNS, mask_sampling, masked_weight, pack_keep, reference, tile_grid

TILE = (128, 128)
NOISE = (1, 2, 3)  # seed, layer, draw
SETTINGS = dict(pattern_temperature=0.7, pattern_scale=200.0, tile_temperature=0.7, tile_scale=100.0)
CPU_SHAPES = [(1024, 1024), (4096, 4096)]
GPU_SHAPES = [(4096, 4096), (8192, 8192), (14336, 4096), (11008, 4096), (28672, 8192)]
DRY_SHAPES = [(256, 384)]
CHECKED_ROWS = 256  # compared with the reference: a group's noise and result do not depend on what comes after it
# Equal to those of tests/kernels/test_gpu.py::test_masked_weight_equals_cpu, which has its own: change both.
RELATIVE, RELATIVE_FP64 = 1e-5, 1e-12  # the accuracy of a card's log2 and exp2
FLIPS = 1e-4  # share of values where a hard choice between two equally likely patterns may be the other one
SLOW_ELEMS, SLOW_SAMPLES = 1 << 22, 5  # from this size on, a round of eager takes seconds on a CPU
COPY_BYTES = 256 << 20
OURS, EAGER, COMPILED, LIMIT = "ours", "eager", "torch.compile", "limit"
MEASURES = ("median_ms", "p5_ms", "p95_ms", "eager_over_this", "limit_share", "peak_MiB")
PHASES = ("forward", "backward", "forward+backward")
Outcome = dict[str, torch.Tensor]  # what both passes give, by name


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of masked_weight."""

    rows: int
    cols: int
    mode: str
    dtype: torch.dtype
    logits: torch.dtype
    hard: bool = False

    def bytes(self, phase: str) -> float:
        """Least bytes through memory."""
        sizes = self.rows, self.cols, self.mode, self.dtype.itemsize, self.logits.itemsize
        forward, backward = shapes.mask_forward_bytes(*sizes), shapes.mask_backward_bytes(*sizes)
        return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[phase]

    def columns(self) -> dict:
        return {
            "shape": f"{self.rows}x{self.cols}",
            "mode": self.mode,
            "dtype": str(self.dtype)[6:],
            "logits": str(self.logits)[6:],
            "hard": self.hard,
        }


def cases(sizes: list[tuple[int, int]], pairs: list[tuple[torch.dtype, torch.dtype]]) -> list[Case]:
    """All cases, each mode at every size in turn, hard samples last; pairs are dtypes of weight and pattern logits.

    Mode tile has no pattern logits, so that it comes with fp32 alone.
    """
    result = [Case(*size, mode, *pair) for pair in pairs for mode in MODES for size in sizes]
    result = [case for case in result if case.mode != "tile" or case.logits == torch.float32]
    return result + [Case(*sizes[0], mode, *pairs[0], True) for mode in MODES]


@dataclasses.dataclass
class Inputs:
    """Tensors of a case; `grad` is what comes back from the matrix multiplication.

    Everything that comes from the host is made here: a CUDA graph cannot capture such a copy.
    """

    weight: torch.Tensor
    pattern: torch.Tensor | None
    tiles: torch.Tensor | None
    keep: torch.Tensor | None
    grad: torch.Tensor

    def __post_init__(self) -> None:
        self.patterns = PATTERNS.to(self.weight.device, (self.tiles if self.pattern is None else self.pattern).dtype)
        self.fixed = None if self.keep is None else pack_keep(self.keep.bool())
        self.sampling = mask_sampling(**SETTINGS, noise=(NOISE[0], NOISE[2]), device=self.weight.device)

    def leaves(self) -> list[torch.Tensor]:
        return [t for t in (self.pattern, self.tiles) if t is not None]

    def band(self, rows: int) -> Inputs:
        """The same inputs of the first rows alone."""
        groups = rows * self.weight.shape[1] // 4
        return Inputs(
            self.weight[:rows],
            None if self.pattern is None else self.pattern.detach()[:groups].requires_grad_(),
            None if self.tiles is None else self.tiles.detach()[: tile_grid((rows, 1))[0]].requires_grad_(),
            None if self.keep is None else self.keep[:rows],
            self.grad[:rows],
        )


def random_inputs(
    shape: tuple[int, int],
    tile: tuple[int, int],
    mode: str,
    dtype: torch.dtype,
    logits: torch.dtype,
    scale: float,
    device: str,
) -> Inputs:
    """Normal weights of `dtype`; logits of deviation `scale`, those of patterns and a fixed mask of dtype `logits`."""
    generator = torch.Generator(device).manual_seed(0)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    groups = shape[0] * shape[1] // 4

    def random(*size):
        return torch.randn(size, generator=generator, device=device, dtype=real)

    pattern = tiles = keep = None
    if mode == "tile":
        chosen = torch.randint(0, 6, (groups,), generator=generator, device=device)
        keep = PATTERNS.to(device)[chosen].reshape(shape).to(logits)
    else:
        pattern = (scale * random(groups, 6)).to(logits).requires_grad_()
    if mode != "maskllm":
        tiles = (scale * random(*tile_grid(shape, tile))).requires_grad_()
    return Inputs(random(*shape).to(dtype), pattern, tiles, keep, random(*shape).to(dtype))


def inputs(case: Case, device: str = "cpu") -> Inputs:
    return random_inputs((case.rows, case.cols), TILE, case.mode, case.dtype, case.logits, 0.014, device)


def settings(case: Case) -> dict:
    return SETTINGS | {"hard_pattern": case.hard, "hard_tile": case.hard}


def ours(data: Inputs, options: dict):
    return masked_weight(
        data.weight,
        data.pattern,
        data.tiles,
        tile=TILE,
        fixed_pattern=data.fixed,
        hard_pattern=options["hard_pattern"],
        hard_tile=options["hard_tile"],
        sampling=data.sampling,
        layer=NOISE[1],
    )


def eager(data: Inputs, options: dict):
    """What a PyTorch user writes, with full-size tensors in between."""
    shape = tuple(data.weight.shape)
    mask = sample_mask(data.pattern, data.tiles, data.keep, data.patterns, shape, TILE, options)
    masked = (mask * data.weight).to(data.weight.dtype)
    norm = torch.linalg.vector_norm(masked, dtype=torch.float32)
    return masked, torch.stack([mask.sum(dtype=torch.float32), norm.square()]).double()


def forward(function: Callable, data: Inputs, options: dict, slot: list) -> None:
    """The pass as learning does it, with what backward needs kept; slot holds the result until its next turn."""
    slot[:] = [function(data, options)[0].detach()]


def forward_backward(function: Callable, data: Inputs, options: dict, slot: list) -> None:
    masked, sums = function(data, options)
    gradients = torch.autograd.grad([masked, sums], data.leaves(), [data.grad, torch.ones_like(sums)])
    slot[:] = [masked.detach(), *gradients]


def differing(got: torch.Tensor, expected: torch.Tensor, relative: float = RELATIVE) -> int:
    """Values that differ by more than `relative` of the largest and one rounding of a 16-bit result."""
    relative += torch.finfo(got.dtype).eps if got.dtype.itemsize == 2 else 0
    expected = expected.to(got.device).double()
    return int(((got.double() - expected).abs() <= relative * expected.abs().max().clamp_min(1)).logical_not().sum())


def differences(got: Outcome, expected: Outcome, hard_patterns: bool) -> dict[str, int]:
    """Names with the number of their values that differ, without those that do not.

    Hard patterns may flip where two are equally likely but for rounding: FLIPS of the values are let through there, and
    sums over many groups are not compared.
    """
    elems = expected["masked"].numel()
    relative = RELATIVE_FP64 if expected["masked"].dtype == torch.float64 else RELATIVE
    names = [name for name in expected if not hard_patterns or expected[name].numel() >= elems]
    counts = {name: differing(got[name], expected[name], relative) for name in names}
    share = FLIPS if hard_patterns else 0
    return {name: count for name, count in counts.items() if count > share * expected[name].numel()}


def both_passes(function: Callable, data: Inputs, tile: tuple[int, int], **options) -> Outcome:
    """Everything that both passes give."""
    masked, sums = function(data.weight, data.pattern, data.tiles, tile=tile, fixed_pattern=data.fixed, **options)
    weights = torch.tensor([0.3, 0.01], dtype=sums.dtype, device=sums.device)
    gradients = torch.autograd.grad([masked, sums], data.leaves(), [data.grad, weights])
    names = [n for n, t in (("pattern gradient", data.pattern), ("tile gradient", data.tiles)) if t is not None]
    return {"masked": masked.detach(), "sums": sums.detach()} | dict(zip(names, gradients, strict=True))


def check(case: Case, data: Inputs) -> list[str]:
    """What of ours differs from patch_kernels.reference in the first rows: values, sums and gradients."""
    rows = min(CHECKED_ROWS, case.rows)
    band = data.band(rows)
    got, expected = (
        both_passes(function, band, TILE, noise=NOISE, **settings(case))
        for function in (masked_weight, reference.masked_weight)
    )
    wrong = [
        f"{place(case)}: {name}: {count} of {expected[name].numel()} values differ from the reference"
        for name, count in differences(got, expected, case.hard and case.mode != "tile").items()
    ]
    with torch.no_grad():
        whole = ours(data, settings(case))[0][:rows]
    if not torch.equal(whole, got["masked"]):
        wrong.append(f"{place(case)}: the first {rows} rows depend on those after them")
    return wrong


def place(case: Case) -> str:
    return " ".join(str(value) for value in case.columns().values() if value is not False).replace("True", "hard")


def rivals_of(compiled: bool) -> dict[str, Callable]:
    """Functions by name. Compiled anew for every case: a second shape would make the sizes symbolic."""
    rivals: dict[str, Callable] = {OURS: ours, EAGER: eager}
    if compiled:
        torch.compiler.reset()
        rivals[COMPILED] = torch.compile(eager, dynamic=False)
    return rivals


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def rows_of(
    case: Case, times: dict[str, dict[str, list[float]]], peaks: dict[str, float], missing: dict[str, str], tbps: float
) -> list[dict]:
    """Rows of a case from seconds by phase and rival; "backward" is the difference of medians, without percentiles."""
    found = {
        phase: {name: harness.summary(samples) for name, samples in by_name.items()} for phase, by_name in times.items()
    }
    found["backward"] = {
        name: {"median_ms": both["median_ms"] - found["forward"][name]["median_ms"]}
        for name, both in found["forward+backward"].items()
    }
    rows = []
    for phase in PHASES:
        limit_ms = 1e-9 * case.bytes(phase) / tbps
        medians = {name: summary["median_ms"] for name, summary in found[phase].items()}
        for name in [*medians, *missing, LIMIT]:
            row = case.columns() | {"phase": phase, "method": name}
            row |= dict.fromkeys(MEASURES, "")
            row["note"] = missing.get(name, "")
            if name in medians:
                row |= found[phase][name]
                row["limit_share"] = limit_ms / medians[name]
                row["peak_MiB"] = peaks.get(name, "") if phase == "forward+backward" else ""
                if name == OURS and medians[OURS] > min(medians.values()):
                    row["note"] = "loss"
            elif name == LIMIT:
                row |= {"median_ms": limit_ms, "limit_share": 1.0, "note": f"{tbps:.3f} TB/s"}
            if row["median_ms"] != "" and EAGER in medians:
                row["eager_over_this"] = medians[EAGER] / row["median_ms"]
            rows.append(row)
    return rows


def prepared_step(name: str, case: Case) -> Callable[[], None]:
    """Both passes of a rival, run once already: compilation and first allocations are not its memory."""
    call = functools.partial(forward_backward, rivals_of(name == COMPILED)[name], inputs(case), settings(case))
    call([])
    return functools.partial(call, [])


def copy_tbps() -> float:
    """TB/s that a large copy reaches on this CPU, read and write counted."""
    source, target = torch.zeros(2, COPY_BYTES, dtype=torch.uint8)
    seconds = harness.interleaved_times({"copy": lambda: target.copy_(source)}, 5)["copy"]
    return 2e-12 * COPY_BYTES / min(seconds)


@dataclasses.dataclass
class Run:
    """All cases within a budget of seconds."""

    device: str
    samples: int
    tbps: float
    checks: bool = False
    compiled: Callable[[Case], bool] = lambda case: True
    peaks: bool = True
    l2_bytes: int = 0
    csv: Path | None = None  # saved after every case: a run may be stopped
    rows: list[dict] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    not_run: list[Case] = dataclasses.field(default_factory=list)

    def run(self, todo: list[Case], budget_seconds: float = math.inf) -> None:
        self.not_run = harness.run_within(todo, self.measure, budget_seconds)

    def measure(self, case: Case) -> None:
        data = inputs(case, self.device)
        wrong = check(case, data) if self.checks else []
        self.wrong += wrong
        if not wrong:  # a wrong result is not timed
            rivals, missing = rivals_of(self.compiled(case)), {}
            measure = self._on_gpu if self.device == "cuda" else self._on_cpu
            times, peaks = measure(case, data, rivals, missing)
            self.rows += rows_of(case, times, peaks, missing, self.tbps)
            if OURS in missing:
                self.wrong.append(f"{place(case)}: ours was not timed: {missing[OURS]}")
        if self.csv is not None and self.rows:
            harness.save_csv(self.csv, self.rows)

    def _on_cpu(self, case: Case, data: Inputs, rivals: dict[str, Callable], missing: dict[str, str]):
        calls, peaks = {}, {}
        samples = self.samples if case.rows * case.cols < SLOW_ELEMS else min(self.samples, SLOW_SAMPLES)
        for name, function in rivals.items():
            both = functools.partial(forward_backward, function, data, settings(case), [])
            try:
                both()
                if self.peaks:
                    peaks[name] = harness.peak_bytes(functools.partial(prepared_step, name, case)) / 2**20
            except Exception as error:  # a rival that this machine cannot compile must not cost the others their rows
                missing[name] = reason_of(error)
                continue
            calls[name, "forward"] = functools.partial(forward, function, data, settings(case), [])
            calls[name, "forward+backward"] = both
        return by_phase(harness.interleaved_times(calls, samples)), peaks

    def _on_gpu(self, case: Case, data: Inputs, rivals: dict[str, Callable], missing: dict[str, str]):
        # The copies in turn, each with a result of its own, together exceed L2 twice: nothing is found there.
        count = harness.copies_to_exceed_l2(int(case.bytes("forward")), self.l2_bytes, harness.ROTATION_BYTES)
        copies = [data, *(inputs(case, self.device) for _ in range(count - 1))]
        graphs, peaks = {}, {}
        for name, function in rivals.items():
            made = {}
            try:
                peaks[name] = cuda_peak_mib(functools.partial(forward_backward, function, data, settings(case)))
                for phase, step in (("forward", forward), ("forward+backward", forward_backward)):
                    calls = [functools.partial(step, function, copy, settings(case), []) for copy in copies]
                    floor = case.bytes(phase) / (1e12 * self.tbps)
                    launches = harness.launches_of_sample(count, floor)
                    made[name, phase] = (harness.capture(calls, launches), launches)
            except Exception as error:  # the same; out of memory too
                missing[name] = reason_of(error)
                continue
            finally:
                torch.cuda.empty_cache()
            graphs |= made
        return by_phase(harness.interleaved_graph_times(graphs, self.samples)), peaks


def by_phase(times: dict[tuple[str, str], list[float]]) -> dict[str, dict[str, list[float]]]:
    result: dict[str, dict[str, list[float]]] = {"forward": {}, "forward+backward": {}}
    for (name, phase), samples in times.items():
        result[phase][name] = samples
    return result


def cuda_peak_mib(call: Callable[[list], None]) -> float:
    """Most memory that a second call takes, what it leaves behind included."""
    call([])
    return harness.cuda_peak_mib(functools.partial(call, []))


def parser() -> argparse.ArgumentParser:
    result = harness.parser(__doc__)
    result.add_argument("--budget-seconds", type=float, default=math.inf)
    result.add_argument("--bandwidth", type=float, help="rated TB/s; default by the GPU's name, on a CPU measured")
    result.add_argument("--check", action="store_true", help="compare ours with the reference before timing")
    result.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, eager alone as rival, no memory")
    return result


def compiled_on_cpu(case: Case) -> bool:
    """Where torch.compile is a rival on a CPU: each compilation takes as long as the rest of its case."""
    return case.mode == "joint" and case.dtype == torch.bfloat16 and not case.hard


def dry_run(checks: bool = True) -> Run:
    """Everything that a CPU can try in a second."""
    run = Run("cpu", 1, 0.01, checks, compiled=lambda case: False, peaks=False)
    run.run(cases(DRY_SHAPES, [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]))
    return run


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.dry:
        run = dry_run(options.check)
    elif torch.cuda.is_available():
        tbps = options.bandwidth or shapes.bandwidth_tbps(torch.cuda.get_device_name())
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        run = Run("cuda", max(options.repeats, 20), tbps, options.check, l2_bytes=l2_bytes, csv=options.csv)
        pairs = [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
        run.run(cases(GPU_SHAPES, pairs), options.budget_seconds)
    else:
        tbps = options.bandwidth or copy_tbps()
        run = Run("cpu", options.repeats, tbps, options.check, compiled=compiled_on_cpu, csv=options.csv)
        pairs = [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]
        run.run(cases(CPU_SHAPES, pairs), options.budget_seconds)
    harness.show(run.rows, options.csv)
    for case in run.not_run:
        print(f"not run for lack of time: {place(case)}")
    if run.wrong:
        raise SystemExit("wrong, not timed: " + "; ".join(run.wrong))


if __name__ == "__main__":
    main()
