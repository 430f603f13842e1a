"""Generation on a CPU from end to end, dense against packed: tokens a second, first token, memory, load time.

python -m benchmarks.studies.generate --csv benchmarks/results/generate_cpu.csv --plot generate_cpu.png

Models have the shapes of published ones and random bf16 weights, equal in all blocks: speed does not depend on values.
Of each linear layer of the decoder a random share 2*sparsity of the 128x128 tiles is 2:4; embeddings and output head
stay dense. Rivals are the dense model in transformers, and, where installed (pip install gguf llama-cpp-python
openvino), in llama.cpp and OpenVINO, all in bf16 (keys and values of llama.cpp in fp16, its default) and with the same
number of threads.

Each variant lives in a process of its own. All are loaded, one works at a time: in every round each generates once,
forwards and backwards in turn. Before anything is timed, each must continue a text with the logits of the dense model
that has the same zeros; a packed model that does not ends the run, a rival that does not is named and not timed.

  decode            new tokens a second of all sequences, from the median time of a token after the prompt
  first token       of one sequence, prompt included
  load              from files in the page cache to the first token of a prompt of one token
  resident, peak    memory of the process before anything is compiled, Python and libraries included
  compile           torch.compile with a static cache; the time of compiling stands apart
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, shapes
from benchmarks.studies import generate_report, memory_table

MODELS = ("Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-2-7B")
TORCH = "benchmarks.studies.generate_torch"
PEERS = {"llama.cpp": "benchmarks.rivals.peer_llama_cpp", "OpenVINO": "benchmarks.rivals.peer_openvino"}
ROOT = Path(__file__).resolve().parents[2]
# Largest distance of logits from those expected, relative to their norm: bf16 kernels differ by 0.01, wrong ones by 1.
LOGITS_BOUND = 0.05
ANSWER_SECONDS = 900.0  # after which a process counts as hanging


class Failed(RuntimeError):
    """A variant that cannot run, with the reason in one line."""


class Process:
    """benchmarks.studies.generate_worker as a child that answers requests."""

    def __init__(self, module: str, threads: int) -> None:
        self.log = tempfile.TemporaryFile()
        command = [sys.executable, "-m", "benchmarks.studies.generate_worker", module, str(threads)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.child = subprocess.Popen(command, cwd=ROOT, **pipes)

    def ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        """The answer; raises Failed where there is none, or it is an error."""
        line = b""
        with contextlib.suppress(BrokenPipeError):  # a dead child is told by its exit code
            self.child.stdin.write(json.dumps({"call": call} | arguments).encode() + b"\n")
            self.child.stdin.flush()
            ready, _, _ = select.select([self.child.stdout], [], [], ANSWER_SECONDS)
            if not ready:
                self.child.kill()
                raise Failed(f"{call}: no answer in {ANSWER_SECONDS:.0f} seconds, stopped")
            line = self.child.stdout.readline()
        if not line:
            raise Failed(f"{call}: exit code {self.child.wait()}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no message")

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()
        self.log.close()


@dataclasses.dataclass
class Variant:
    """One way to run a model."""

    method: str
    sparsity: float
    module: str
    folder: Path
    arguments: dict[str, Any]
    worker: Any = None
    answer: dict[str, Any] = dataclasses.field(default_factory=dict)  # the newest: it has the memory

    @property
    def is_packed(self) -> bool:
        return self.module == TORCH and self.sparsity > 0


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured of all variants side by side."""

    measure: str  # "decode" or "first token"
    mode: str
    batch: int
    prompt: int

    def __str__(self) -> str:
        return f"{self.measure}, {self.mode}, batch {self.batch}, prompt {self.prompt}"


def cells(batches: list[int], prompts: list[int], compiled: bool) -> list[Cell]:
    """Most informative first. The first token of the first prompt comes with decoding."""
    first, *others = batches
    result = [Cell("decode", "eager", first, prompts[0])]
    result += [Cell("first token", "eager", 1, prompt) for prompt in prompts if first > 1 or prompt != prompts[0]]
    larger = [Cell("decode", "eager", batch, prompts[0]) for batch in others]
    # Compiling is the longest: what comes after it needs as much time to be begun.
    compiling = [Cell("decode", "compile", first, prompts[0])] if compiled else []
    return [*result, *larger[:1], *compiling, *larger[1:]]


def layers_that_fit(name: str, sparsities: list[float], peers: int, weights_gb: float) -> int:
    """Decoder layers with which the weights of all variants take at most weights_gb, at least one."""
    hidden, inner, layers, heads, kv_heads, vocabulary = shapes.CONFIGS[name]
    kv = hidden // heads * kv_heads
    linears = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    shares = [0.0] * (1 + peers) + sparsities
    layer = sum(shapes.weight_bytes(*shape, sparsity) for sparsity in shares for shape in linears)
    tied = memory_table.MODELS[name][1].get("tie_word_embeddings", False)
    rest = len(shares) * 2 * vocabulary * hidden * (1 if tied else 2)
    return max(1, min(layers, int((1e9 * weights_gb - rest) // layer)))


def distance(logits: list[list[float]], wanted: list[list[float]]) -> float:
    """Largest distance of a token's logits from those wanted, relative to their norm."""
    got, right = torch.tensor(logits, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    return float(((got - right).norm(dim=1) / right.norm(dim=1)).nan_to_num(math.inf).max())


@dataclasses.dataclass
class Study:
    """All models within a budget of seconds; rows are those of the CSV, one for each measured value."""

    models: list[str]
    layers: int | None
    batches: list[int]
    prompts: list[int]
    sparsities: list[float]
    new_tokens: int
    rounds: int
    peers: dict[str, str]
    compiled: list[float]  # sparsities that are compiled, as is the dense model; none: nothing is
    budget_seconds: float
    weights_gb: float
    threads: int
    csv: Path | None = None  # saved after every cell: a run may be stopped
    start: Callable[[str, int], Any] = Process
    rows: list[dict] = dataclasses.field(default_factory=list)

    def run(self) -> None:
        begin = time.monotonic()
        for index, name in enumerate(self.models):
            now = time.monotonic()
            share = (self.budget_seconds - (now - begin)) / (len(self.models) - index)
            with tempfile.TemporaryDirectory() as folder:
                self._model(name, Path(folder), now + share)

    def _model(self, name: str, folder: Path, deadline: float) -> None:
        total = memory_table.model_config(name).num_hidden_layers
        fitting = layers_that_fit(name, self.sparsities, len(self.peers), self.weights_gb)
        layers = min(fitting if self.layers is None else self.layers, total)
        self.place = {"model": name, "layers": f"{layers} of {total}"}
        memory_table.model_config(name, layers).save_pretrained(folder / "config")
        self._say("writing the models")
        wanted = self._prepare_models(folder)
        variants = [self._variant("dense", 0.0, TORCH, folder / "dense", packed=False)]
        for sparsity in self.sparsities:
            packed = folder / f"packed-{sparsity:g}"
            variants.append(self._variant(f"packed {sparsity:.0%}", sparsity, TORCH, packed, packed=True))
        variants += [self._variant(method, 0.0, module, folder / method) for method, module in self.peers.items()]
        try:
            variants = [variant for variant in variants if self._load(variant, wanted, folder / "dense")]
            todo = cells(self.batches, self.prompts, bool(self.compiled))
            ready = {"eager": list(variants)}

            def measure(cell: Cell) -> None:
                if cell.mode not in ready:
                    self._memory(variants)
                    chosen = [v for v in variants if v.module == TORCH and v.sparsity in (0.0, *self.compiled)]
                    ready[cell.mode] = [v for v in chosen if self._agrees(v, wanted, cell)]
                self._say(str(cell))
                self._measure(cell, ready[cell.mode])
                self._save()

            for cell in harness.run_within(todo, measure, deadline - time.monotonic()):
                self._row("cut", "", "", note=f"{cell}: no time left", mode=cell.mode)
            if len(ready) == 1:
                self._memory(variants)
            self._save()
        finally:
            for variant in variants:
                if variant.worker is not None:
                    variant.worker.close()

    def _variant(self, method: str, sparsity: float, module: str, folder: Path, **arguments: Any) -> Variant:
        return Variant(method, sparsity, module, folder, arguments)

    def _prepare_models(self, folder: Path) -> dict[str, dict]:
        with self._worker(TORCH) as maker:
            paths = {"config": str(folder / "config"), "out": str(folder)}
            wanted = maker.ask("prepare", **paths, sparsities=self.sparsities, prompt=self.prompts[0])["wanted"]
        return {float(sparsity): text for sparsity, text in wanted.items()}

    @contextlib.contextmanager
    def _worker(self, module: str) -> Iterator[Any]:
        worker = self.start(module, self.threads)
        try:
            yield worker
        finally:
            worker.close()

    def _load(self, variant: Variant, wanted: dict[float, dict], dense: Path) -> bool:
        """Whether it is there and right; if not, a row says why."""
        self._say(f"loading {variant.method}")
        try:
            if variant.module != TORCH:
                with self._worker(variant.module) as maker:
                    maker.ask("prepare", dense=str(dense), out=str(variant.folder))
            variant.worker = self.start(variant.module, self.threads)
            facts = variant.worker.ask("load", folder=str(variant.folder), **variant.arguments)
        except Failed as error:
            if variant.module == TORCH:
                raise
            self._row("missing", "", "", variant, note=str(error))
            return False
        self._row("load", facts["seconds"], "s", variant, note=facts["version"])
        for part in ("weights", "linears", "head"):
            if f"{part}_bytes" in facts:
                self._row(part, 1e-6 * facts[f"{part}_bytes"], "MB", variant)
        return self._agrees(variant, wanted, Cell("decode", "eager", 1, self.prompts[0]))

    def _agrees(self, variant: Variant, wanted: dict[float, dict], cell: Cell) -> bool:
        """Compare with the dense model that has the same zeros. In mode "compile" this is what compiles.

        raises  SystemExit for a packed model with other logits
        """
        text = wanted[variant.sparsity]
        length = self.prompts[0] + max(self.new_tokens, len(text["tokens"]) - self.prompts[0])
        request = {"tokens": text["tokens"], "prompt": self.prompts[0], "length": length, "mode": cell.mode}
        self._say(f"checking {variant.method}, {cell.mode}")
        try:
            variant.answer = variant.worker.ask("follow", **request)
        except Failed as error:
            self._row("missing", "", "", variant, mode=cell.mode, note=str(error))
            return False
        if cell.mode == "compile":  # the first step compiled
            first, *others = variant.answer["seconds"]
            self._row("compile", first - statistics.median(others), "s", variant, mode=cell.mode)
        found = distance(variant.answer["logits"], text["logits"])
        self._row("logits error", found, "of their norm", variant, mode=cell.mode)
        if found <= LOGITS_BOUND:
            return True
        wrong = f"expected logits within {LOGITS_BOUND} of the dense model with the same zeros, got {found:.3g}"
        if variant.is_packed:
            raise SystemExit(f"{self.place['model']}, {variant.method}, {cell.mode}: {wrong}. Nothing more is timed.")
        self._row("missing", "", "", variant, mode=cell.mode, note=f"wrong, not timed: {wrong}")
        return False

    def _measure(self, cell: Cell, variants: list[Variant]) -> None:
        """Rows of one cell: one generation of each variant a round, after a shorter one that warms up."""
        tokens = self.new_tokens if cell.measure == "decode" else 1
        firsts: dict[str, list[float]] = {variant.method: [] for variant in variants}
        steps: dict[str, list[float]] = {variant.method: [] for variant in variants}
        alive = list(variants)
        for index in range(-1, self.rounds):
            if index < 0 and cell.measure != "decode":  # as long as what is measured, and decoding came before
                continue
            for variant in alive[:: 1 if index % 2 else -1]:
                count = tokens if index >= 0 else min(tokens, 2)
                request = {"batch": cell.batch, "prompt": cell.prompt, "new_tokens": count, "mode": cell.mode}
                try:
                    variant.answer = variant.worker.ask("generate", **request)
                except Failed as error:
                    alive.remove(variant)
                    self._row("missing", "", "", variant, mode=cell.mode, note=f"{cell}: {error}")
                    continue
                if index >= 0:
                    firsts[variant.method].append(variant.answer["first"])
                    steps[variant.method] += variant.answer["steps"]
        for variant in alive:
            place = {"mode": cell.mode, "batch": cell.batch, "prompt": cell.prompt}
            if steps[variant.method]:
                spread = harness.summary(steps[variant.method])
                self._row("decode", cell.batch / (1e-3 * spread["median_ms"]), "tokens/s", variant, **place, **spread)
            if cell.batch == 1 and cell.mode == "eager":
                spread = harness.summary(firsts[variant.method])
                self._row("first token", spread["median_ms"], "ms", variant, **place, **spread)

    def _memory(self, variants: list[Variant]) -> None:
        for variant in variants:
            self._row("resident", 1e-6 * variant.answer["rss_bytes"], "MB", variant)
            self._row("peak", 1e-6 * variant.answer["peak_bytes"], "MB", variant)

    def _row(self, measure: str, value: Any, unit: str, variant: Variant | None = None, **more: Any) -> None:
        """A line of the CSV; every row has every column."""
        row = dict(self.place) | {"method": variant.method if variant else "", "sparsity": ""}
        if variant is not None and variant.module == TORCH:
            row["sparsity"] = variant.sparsity
        columns = ("mode", "batch", "prompt", "median_ms", "p5_ms", "p95_ms", "note")
        row |= {"measure": measure, "value": value, "unit": unit} | {name: more.get(name, "") for name in columns}
        self.rows.append(row)

    def _say(self, what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self.place['model']}: {what}", file=sys.stderr, flush=True)

    def _save(self) -> None:
        if self.csv is not None and self.rows:
            harness.save_csv(self.csv, self.rows)


def parser() -> argparse.ArgumentParser:
    result = harness.parser(__doc__, repeats=False)
    result.add_argument("--models", nargs="+", default=list(MODELS), choices=list(memory_table.MODELS), metavar="NAME")
    result.add_argument("--layers", type=int, help="decoder layers; default all, or as many as --weights-gb allows")
    result.add_argument("--weights-gb", type=float, default=16.0, help="for the weights of all variants of a model")
    result.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16], help="the first is compiled, too")
    result.add_argument("--prompts", nargs="+", type=int, default=[16, 512], help="tokens; decoding is after the first")
    result.add_argument("--sparsity", nargs="+", type=float, default=[0.25, 0.35, 0.45, 0.5])
    result.add_argument("--new-tokens", type=int, default=8)
    result.add_argument("--rounds", type=int, default=3)
    result.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help=", ".join(PEERS))
    result.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    result.add_argument("--compile-sparsity", nargs="+", type=float, default=[0.45], help="beside the dense model")
    result.add_argument("--budget-seconds", type=float, default=900.0, help="what does not fit is cut, and named")
    result.add_argument("--plot", type=harness.picture_file, help="draw tokens/s and memory here (needs matplotlib)")
    result.add_argument("--from-csv", type=Path, help="no run: tables and plot of an earlier CSV")
    return result


def checked_options(arguments: list[str] | None) -> argparse.Namespace:
    """Options in range; others end the program with one sentence."""
    flags = parser()
    options = flags.parse_args(arguments)
    ranges = [
        ("layers", 1, math.inf),
        ("batches", 1, math.inf),
        ("prompts", 1, memory_table.SEQLEN // 2),
        ("new_tokens", 2, memory_table.SEQLEN // 2),
        ("rounds", 1, math.inf),
        ("sparsity", 0.01, 0.5),
        ("compile_sparsity", 0.01, 0.5),
        ("budget_seconds", 1, math.inf),
        ("weights_gb", 1, math.inf),
    ]
    harness.in_range(options, flags, ranges)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = checked_options(arguments)
    if options.from_csv is not None:
        rows = harness.read_rows(options.from_csv)
    else:
        study = Study(
            options.models,
            options.layers,
            options.batches,
            options.prompts,
            options.sparsity,
            options.new_tokens,
            options.rounds,
            PEERS if options.peers else {},
            options.compile_sparsity if options.compile else [],
            options.budget_seconds,
            options.weights_gb,
            torch.get_num_threads(),
            options.csv,
        )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception: folders of models are removed
        try:
            study.run()
        except Failed as error:
            raise SystemExit(f"a model in transformers failed, nothing to compare with: {error}") from error
        rows = study.rows
    generate_report.print_report(rows)
    if options.plot:
        generate_report.plot(rows, options.plot)


if __name__ == "__main__":
    main()
