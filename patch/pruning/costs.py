"""What one-shot pruning of a model will cost, step by step: operations counted by patch.pruning.counts, and bytes.

A model, not a measurement: seconds are operations over assumed (or briefly measured) rates, one step after the other,
nothing overlapping. `patch-llm oneshot` says these numbers before it starts, docs/inside/scale.md has them for large
models.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from patch.files.progress import duration
from patch.pruning.channel_search import DEFAULT_STEPS, SEARCHED_ROWS, WINDOW
from patch.pruning.counts import Counts
from patch.pruning.fisher import DEFAULT_CHUNK
from patch.pruning.one_shot_settings import REORDER_SAMPLES, OneShotSettings, block_options
from patch.pruning.options import DEFAULT_NSAMPLES, TileOptions
from patch.pruning.plan import FIT_BYTES, PROCESS_BYTES, WORK_BYTES, WORK_STATISTICS
from patch.pruning.registry import get_method

# Where the model is while a block is worked on: all of it where the block is, or the others in host memory.
Placement = Literal["cpu", "gpu", "offload"]
GB = 10**9
# What packing saves of a layer's bytes, times its share of zeros: values halve, and a half has 2 bits of places each.
SAVED_SHARE = 0.875
CARDS_GB = (24, 80, 141)
_FP32 = 4
# Kernels that a GPU starts for a column of SparseGPT's sweep, and what a step of it reads and writes of a weight.
_SWEEP_LAUNCHES = 10
_SWEEP_COLUMNS = 128
# Of a weight and sample in the Fisher pass: gradient, weight, product, square, sums.
_FISHER_BYTES = 30
# Of a weight and step of Adam: master weight, gradient, two moments, all read and written.
_ADAM_BYTES = 40


@dataclass(frozen=True)
class Rates:
    """How fast a machine is: floating point operations, bytes and kernel starts a second that are reached, not peaks.

    model   products in the model's dtype
    fit     products of the block fit, float32 on a CPU, the model's dtype on a GPU
    fp32    products in float32
    solve   factorizations and solutions of linear systems in float32
    memory  bytes read or written
    link    bytes between host and device
    starts  kernels
    """

    name: str
    model: float
    fit: float
    fp32: float
    solve: float
    memory: float
    link: float
    starts: float


H100 = Rates("one H100 (80 GB)", 400e12, 250e12, 40e12, 5e12, 2.5e12, 10e9, 200e3)
RTX_4090 = Rates("one 24 GB card (RTX 4090)", 120e12, 80e12, 40e12, 4e12, 0.8e12, 10e9, 200e3)
CPU_BOX = Rates("64 GB CPU box (16 cores, AVX-512 BF16)", 1.5e12, 0.8e12, 0.8e12, 0.3e12, 80e9, 1e12, 1e6)


@dataclass(frozen=True)
class Work:
    """Operations and bytes, by the rate of `Rates` that they go at."""

    model: float = 0
    fit: float = 0
    fp32: float = 0
    solve: float = 0
    memory: float = 0
    link: float = 0
    starts: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def seconds(self, rates: Rates) -> float:
        """Time of all of it, one after the other."""
        return sum(amount / getattr(rates, name) for name, amount in dataclasses.asdict(self).items())


@dataclass(frozen=True)
class Step:
    """A step of a stage of `patch-llm oneshot`.

    device_bytes  beside the model, where blocks are worked on
    host_bytes    beside the model, in host memory
    """

    stage: str
    name: str
    work: Work
    device_bytes: int
    host_bytes: int = 0


@dataclass(frozen=True)
class Costs:
    """Steps of a run, and where the model is meanwhile."""

    counts: Counts
    placement: Placement
    steps: tuple[Step, ...]

    def seconds(self, rates: Rates, stage: str | None = None) -> float:
        """Time of a stage, None: of all."""
        return sum(step.work.seconds(rates) for step in self.steps if stage in (None, step.stage))

    def memory(self, step: Step) -> tuple[int, int]:
        """Bytes at a step's peak: (on the GPU, in host memory)."""
        counts = self.counts
        weights, masks = counts.elems * counts.itemsize, counts.masked_elems
        if self.placement == "cpu":
            return 0, PROCESS_BYTES + weights + masks + step.device_bytes + step.host_bytes
        if self.placement == "gpu":
            return weights + masks + step.device_bytes, PROCESS_BYTES + step.host_bytes
        block = max(block.elems for block in counts.blocks)
        around = counts.around_elems * counts.itemsize + block * (counts.itemsize + 1)
        return around + step.device_bytes, PROCESS_BYTES + weights + masks + step.host_bytes

    @property
    def peaks(self) -> tuple[int, int]:
        """The highest of `memory`, each with its own step."""
        found = [self.memory(step) for step in self.steps]
        return max(device for device, _ in found), max(host for _, host in found)


def oneshot_costs(
    counts: Counts, settings: OneShotSettings, *, nsamples: int, windows: int, placement: Placement
) -> Costs:
    """Costs of `patch-llm oneshot`.

    counts    of the model on one calibration sample
    nsamples  calibration samples
    windows   held-out windows, as long as a sample
    """
    parts = _Parts(counts, settings, nsamples, is_offloaded=placement == "offload")
    dense = counts.elems * counts.itemsize
    packed = dense - round(SAVED_SHARE * settings.sparsity * counts.masked_elems * counts.itemsize)
    steps = [Step("dense", "perplexity", parts.forward(windows), parts.forward_bytes)]
    if settings.reorder:
        few = _Parts(counts, settings, min(nsamples, REORDER_SAMPLES), is_offloaded=placement == "offload")
        steps += few.reorder()
    steps += _Parts(counts, settings, min(nsamples, DEFAULT_NSAMPLES), is_offloaded=placement == "offload").prune()
    steps.append(Step("prune", "perplexity", parts.forward(windows), parts.forward_bytes))
    steps += parts.reconstruct()
    steps.append(Step("reconstruct", "perplexity", parts.forward(windows), parts.forward_bytes))
    # Layer by layer, a few readings of all weights; what was written is opened again beside the packed model.
    work = parts.forward(windows) + Work(memory=10 * dense)
    again = max(0, 2 * packed - dense)
    on_device, on_host = (0, again) if placement == "offload" else (again, 0)
    masked = counts.masked_elems * counts.itemsize
    steps.append(Step("pack", "read the reconstructed weights", Work(memory=3 * masked), 0, masked))
    steps.append(Step("pack", "pack, open again, perplexity", work, parts.forward_bytes + on_device, on_host))
    return Costs(counts, placement, tuple(steps))


class _Parts:
    """Steps that stages are made of."""

    def __init__(self, counts: Counts, settings: OneShotSettings, nsamples: int, *, is_offloaded: bool):
        self.counts, self.settings, self.nsamples, self.is_offloaded = counts, settings, nsamples, is_offloaded
        self.has_hessian = get_method(settings.method).updates_weights
        self.hidden = nsamples * counts.hidden_elems * counts.itemsize
        # Logits once as they are and once as float32, and the hidden states of a sample.
        self.forward_bytes = counts.logits_elems * (counts.itemsize + _FP32) + self._activations()

    def forward(self, samples: int) -> Work:
        """Of whole forward passes, for which every block is fetched and put back for every sample."""
        flops = sum(block.flops for block in self.counts.blocks) + self.counts.around_flops
        return Work(model=samples * flops) + self._moved(samples)

    def reorder(self) -> list[Step]:
        """Without the loss of layers, a Fisher pass of few samples."""
        return [Step("reorder", "order of the channels", *self._pass(self._search, True))]

    def prune(self) -> list[Step]:
        if self.settings.sparsity == 0:
            return []
        by = self.settings.tiles_by
        steps = self._tokens_of_experts("prune")
        if by == "error":
            steps.append(Step("prune", "errors of tiles", *self._pass(self._inverse, self.has_hessian)))
        else:
            # By Wanda, whose statistics are vectors.
            steps.append(Step("prune", "provisional patterns", *self._pass(self._inverse, False)))
        if by == "fisher":
            steps.append(Step("prune", "Fisher information", self._fisher(), self._fisher_bytes(), self._boundaries()))
        elif by == "share":
            work, size = self._pass(self._sweep, self.has_hessian)
            copied = self.counts.elems * self.counts.itemsize
            steps.append(Step("prune", "unstructured reference", work, size + copied))
        return [*steps, Step("prune", "sweep", *self._pass(self._sweep, self.has_hessian))]

    def _tokens_of_experts(self, stage: str) -> list[Step]:
        """A pass of the dense model that counts which experts the text reaches."""
        if not self.counts.has_experts:
            return []
        return [Step(stage, "tokens of experts", self.forward(self.nsamples), self.forward_bytes)]

    def reconstruct(self) -> list[Step]:
        return self._tokens_of_experts("reconstruct") + self._reconstruct()

    def _reconstruct(self) -> list[Step]:
        if self.settings.reconstruct == "sparsegpt":
            return [Step("reconstruct", "sweep", *self._pass(self._sweep, True))]
        work, size = self._pass(self._least_squares, True)
        if self.settings.reconstruct == "least_squares":
            return [Step("reconstruct", "least squares", work, size)]
        # The second set of hidden states is the dense model's.
        return [Step("reconstruct", "least squares", work, size + self.hidden), self._fit()]

    # -- passes over the blocks ---

    def _pass(self, of_layer: Callable[[int, int], Work], has_hessian: bool) -> tuple[Work, int]:
        """Every block on all samples twice, once to gather statistics and once for the next block's inputs; and bytes.

        of_layer  work on a layer (N, K) where the statistics are Hessians
        """
        total = self._moved(1)
        for block in self.counts.blocks:
            total += Work(model=2 * self.nsamples * block.flops)
            if has_hessian:
                tokens = self.nsamples * self.counts.seqlen
                total += Work(fp32=sum(2 * tokens * size**2 for size in block.inputs))
                for rows, cols in block.layers:
                    total += of_layer(rows, cols)
        work = max(rows * cols for block in self.counts.blocks for rows, cols in block.layers) * WORK_BYTES
        statistics = 0
        if has_hessian:
            sizes = [[_FP32 * size**2 for size in block.inputs] for block in self.counts.blocks]
            statistics = max(map(sum, sizes))
            work += WORK_STATISTICS * max(map(max, sizes))
        return total, statistics + self.hidden + max(work, self._activations())

    def _inverse(self, rows: int, cols: int) -> Work:
        return Work(solve=cols**3, memory=8 * rows * cols)

    def _search(self, rows: int, cols: int) -> Work:
        """As if every layer's columns were moved: half of them are, the others share one order."""
        compared = DEFAULT_STEPS * cols * WINDOW * min(rows, SEARCHED_ROWS)
        return self._inverse(rows, cols) + Work(memory=2 * compared)

    def _sweep(self, rows: int, cols: int) -> Work:
        """Three factorizations, the columns of a block one by one, the rest of the row by a product."""
        steps = Work(memory=_FP32 * rows * cols * _SWEEP_COLUMNS, starts=_SWEEP_LAUNCHES * cols)
        return Work(solve=4 * cols**3 / 3, fp32=rows * cols**2) + steps

    def _least_squares(self, rows: int, cols: int) -> Work:
        """A system for every row of what it lost; at most half a row, in a share 2s of the rows."""
        lost, share = cols / 2, 2 * self.settings.sparsity
        systems = Work(solve=share * rows * lost**3 / 3, memory=3 * _FP32 * share * rows * lost**2)
        return Work(solve=cols**3, fp32=2 * rows * cols**2) + systems

    def _fisher(self) -> Work:
        """A forward pass, blocks again, and backward passes, twice a forward pass for blocks and once for the head."""
        blocks = sum(block.flops for block in self.counts.blocks)
        samples = min(self.nsamples, TileOptions().samples)
        flops = samples * (4 * blocks + 2 * self.counts.around_flops)
        chunks = -(-samples // DEFAULT_CHUNK)
        moved = self._moved(samples + chunks)
        return Work(model=flops, memory=_FISHER_BYTES * samples * self.counts.masked_elems) + moved

    def _fit(self) -> Step:
        options, work = block_options(self.settings), Work()
        size = options.samples_a_step(self.nsamples)
        for block in self.counts.blocks:
            # The error before and after; forward and backward passes.
            work += Work(model=2 * self.nsamples * block.flops, fit=3 * options.epochs * self.nsamples * block.flops)
            steps = options.epochs * -(-self.nsamples // size)
            work += Work(memory=steps * _ADAM_BYTES * block.elems)
        largest = max(self.counts.blocks, key=lambda block: block.elems)
        trained = FIT_BYTES * largest.elems + min(size, self.nsamples) * largest.saved_bytes
        # Inputs, targets, outputs before and after.
        return Step("reconstruct", "block fit", work, trained + 4 * self.hidden)

    # -- bytes ---

    def _moved(self, passes: int) -> Work:
        if not self.is_offloaded:
            return Work()
        return Work(link=2 * passes * sum(block.elems for block in self.counts.blocks) * self.counts.itemsize)

    def _activations(self) -> int:
        """Of a forward pass of one sample through a block, nothing kept: no more than a backward pass would need."""
        return max(block.saved_bytes for block in self.counts.blocks) * self.counts.itemsize // _FP32

    def _fisher_bytes(self) -> int:
        """Gradients of a block, its activations, those of the head with the logits in float32 and their gradient."""
        block = max(self.counts.blocks, key=lambda block: block.elems)
        gradients = block.elems * self.counts.itemsize + 3 * _FP32 * max(rows * cols for rows, cols in block.layers)
        logits = self.counts.logits_elems * (2 * self.counts.itemsize + 2 * _FP32)
        return max(gradients + self._activations(), logits)

    def _boundaries(self) -> int:
        chunk = min(DEFAULT_CHUNK, self.nsamples)
        return chunk * (len(self.counts.blocks) + 1) * self.counts.hidden_elems * self.counts.itemsize


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of a device, from some tenths of a second of each kind of work; host and device talk at an assumed rate."""
    size = 1024 if device.type == "cpu" else 4096
    square = torch.randn(size, size, device=device)
    low = square.to(dtype)
    systems = square[:256, :256] @ square[:256, :256].T + 512 * torch.eye(256, device=device)
    stacked = systems.expand(8, 256, 256).contiguous()
    model = 2 * size**3 / _best_seconds(lambda: low @ low, device)
    fp32 = 2 * size**3 / _best_seconds(lambda: square @ square, device)
    solve = 8 * 256**3 / 3 / _best_seconds(lambda: torch.linalg.cholesky_ex(stacked), device)
    memory = 2 * square.nbytes / _best_seconds(square.clone, device)
    is_cpu = device.type == "cpu"
    return Rates("this machine", model, fp32 if is_cpu else model, fp32, solve, memory, 1e12 if is_cpu else 10e9, 200e3)


def _best_seconds(function: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def table(costs: Costs, rates: Rates) -> list[dict[str, str]]:
    """A row for every step: stage, step, time at these rates, bytes on the device and in host memory."""
    rows = []
    for step in costs.steps:
        device, host = costs.memory(step)
        row = {"stage": step.stage, "step": step.name, "time": duration(step.work.seconds(rates))}
        if costs.placement != "cpu":
            row["GPU"] = f"{device / GB:.1f} GB"
        rows.append(row | {"host": f"{host / GB:.1f} GB"})
    return rows


def peaks_text(costs: Costs) -> str:
    """The memory of a run in a few words."""
    device, host = (f"about {size / GB:.1f} GB" for size in costs.peaks)
    return f"{host}" if costs.placement == "cpu" else f"{device} on the GPU, {host} in host memory"


def fits_text(whole: Costs, offloaded: Costs, cards_gb: Sequence[int] = CARDS_GB) -> list[str]:
    """Lines that say which GPUs a run fits, with the whole model on them or with one block at a time."""
    lines = []
    for size in cards_gb:
        said = [f"the whole model {_room(whole, size)}", f"with --offload it {_room(offloaded, size)}"]
        lines.append(f"a GPU of {size} GB: {'; '.join(said)}")
    lines.append(f"--offload needs {offloaded.peaks[1] / GB:.1f} GB of host memory")
    lines.append("note: not in these figures: CUDA context (0.5 to 1 GB), fragmentation of torch's allocator")
    return lines


def _room(costs: Costs, size: int) -> str:
    left = size - costs.peaks[0] / GB
    return f"fits, {left:.1f} GB left" if left >= 0 else f"does not fit, {-left:.1f} GB too much"
