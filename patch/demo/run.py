"""The main job on a small model: train it, prune it one-shot and by learning, reconstruct, compare, pack, generate.

Every stage's result is a folder under the output folder. A stage whose settings and inputs are unchanged is not
run again, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patch import __version__
from patch.artifacts.artifact import load_artifact
from patch.data.tokens import pack_blocks, tokenize
from patch.demo import corpus as corpus_module
from patch.demo import model as demo_model
from patch.demo import packing, report
from patch.demo.methods import DENSE, ONE_SHOT, Bench, Outcome, hybrid_name, learned_name, reconstructed_name
from patch.demo.settings import DemoSettings, ModelSettings
from patch.files.atomic import write_text_atomic
from patch.files.folder import write_folder
from patch.files.strict_json import dump_json, read_json
from patch.models.structure import maskable_linears
from patch.runs.folders import require_nothing_else
from patch.runs.stages import STAGE_FILE, digest, finished
from patch.settings import RESOLVED_NAME
from patch_kernels.checks import require_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASELINE, MASKLLM = "baseline", "maskllm"
TEXT, HELDOUT = "text.txt", "heldout.txt"
# What a demo leaves in its folder.
_FILES = (
    *(RESOLVED_NAME, TEXT, HELDOUT, *report.FILES, DENSE, BASELINE, *ONE_SHOT, MASKLLM),
    *("hybrid-*", "patch-*", "*-reconstructed", packing.PACKED, packing.PRUNED, "*.tmp-*", "*.old-*"),
)


def run_demo(
    out: str | os.PathLike,
    settings: DemoSettings | None = None,
    *,
    text: str | os.PathLike | None = None,
    everything: bool = False,
    echo: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run all stages and return the rows of the table that results.csv holds.

    out         folder for the stages, results.csv and the plots
    text        folder of .py files to use instead of the standard library
    everything  also MaskLLM, and hybrid and learned masks at settings.more_targets
    echo        receives each line of output
    """
    return Demo(out, settings, text=text, everything=everything, echo=echo).run()


class Demo:
    """State of one run, arguments as `run_demo`: the folder, the text, and the results so far.

    Making one reads the text and checks the folder; only `run` writes.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        settings: DemoSettings | None = None,
        *,
        text: str | os.PathLike | None = None,
        everything: bool = False,
        echo: Callable[[str], None] = print,
    ) -> None:
        self.out, self.settings, self.echo = Path(out), settings or DemoSettings(), echo
        settings = self.settings
        is_ours = (self.out / DENSE / STAGE_FILE).is_file()
        require_nothing_else("--out", self.out, () if is_ours else _FILES)
        self.clock = demo_model.Stopwatch()
        self.corpus = corpus_module.load_corpus(Path(text) if text else None, max_characters=settings.max_characters)
        self.everything = everything
        self.targets = settings.targets + (settings.more_targets if everything else ())
        self.key: Any = {"text": self.corpus.sha256, "version": __version__, "torch": torch.__version__}
        self.rows: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        settings = self.settings
        self.say(f"text: {self.corpus.describe()} (SHA-256 {self.corpus.sha256[:12]})")
        self._say_plan()
        self.out.mkdir(parents=True, exist_ok=True)
        for name, documents in ((TEXT, self.corpus.learn), (HELDOUT, self.corpus.heldout)):
            write_text_atomic(self.out / name, "\n\n".join(documents))
        self.stage(DENSE, dataclasses.asdict(settings.model), self._make_dense)
        bench = self._prepare_text()
        self.key = {
            "dense": self.stage_key(DENSE),
            "evaluation": [settings.heldout_tokens, settings.model.block_size],
        }
        self.row("dense", self.stage(BASELINE, {}, bench.baseline), 0.0, 0)
        self.key |= {"calibration": settings.calibration_blocks, "tile": settings.tile}
        calibration_tokens = bench.calibration.numel()
        for method, label in ONE_SHOT.items():
            tokens = 0 if method == "magnitude" else calibration_tokens
            self._pruned(bench, method, label, 0.5, tokens, {}, functools.partial(bench.one_shot, method))
        hybrids, learned = [], []
        for target in self.targets:
            name, label = hybrid_name(target), f"hybrid {target:.0%}"
            make = functools.partial(bench.hybrid, target)
            hybrids.append(self._pruned(bench, name, label, target, calibration_tokens, {"target": target}, make))
        if self.everything:
            self._learned(bench, MASKLLM, "MaskLLM 2:4", "maskllm", 0.5, "sparsegpt")
        for target in self.targets:
            label = f"PATCH joint {target:.0%}"
            learned.append(self._learned(bench, learned_name(target), label, "joint", target, hybrid_name(target)))
        self._show(bench, hybrids, learned)
        self._pack(bench, hybrids)
        return self.rows

    def _say_plan(self) -> None:
        settings, block = self.settings, self.settings.model.block_size
        dense = settings.model.steps * settings.model.batch_size
        learn = settings.learn.steps * settings.learn.batch_size
        shares = ", ".join(f"{target:.0%}" for target in self.targets)
        hybrids = f"hybrids with {shares}" if len(self.targets) > 1 else f"a hybrid with {shares}"
        runs = len(self.targets) + self.everything
        masks, each = (f"{runs} masks", " each") if runs > 1 else ("1 mask", "")
        self.say(
            f"plan: train a model for {settings.model.steps} steps ({dense * block:,} tokens), prune it to 2:4 by "
            f"{len(ONE_SHOT)} methods and to {hybrids} zeros, learn {masks} for {settings.learn.steps} steps{each} "
            f"({learn * block:,} tokens), reconstruct, compare, pack. By default that takes "
            f"{'9 to 11 minutes' if self.everything else '5 to 6 minutes'} on 2 cores"
        )

    # -- stages ---

    def stage(self, name: str, settings: Mapping[str, Any], make: Callable[[], Outcome]) -> dict[str, Any]:
        """Result of a stage: read if its folder was made with the same settings and inputs, else made now."""
        key = digest({"stage": name, "settings": settings, "inputs": self.key})
        folder = self.out / name
        found = finished(folder, key)
        if found is not None:
            self.say(f"{name}: done before, reused")
            return found
        self.say(f"{name}: running")
        result, save = make()
        save(folder, dump_json({"key": key, "result": result}))
        return result

    def stage_key(self, name: str) -> str:
        """Identity of a finished stage, for the stages that use it."""
        return read_json(self.out / name / STAGE_FILE)["key"]

    def say(self, text: str) -> None:
        self.echo(f"[{self.clock.seconds:6.1f} s] {text}")

    def _make_dense(self) -> Outcome:
        """Tokenizer and dense model, trained on the part `train`."""
        model, tokenizer, numbers = make_dense(self.corpus, self.settings.model, self.say)

        def save(folder: Path, stage: bytes) -> None:
            def write(directory: Path) -> None:
                model.save_pretrained(directory)
                tokenizer.save_pretrained(directory)
                (directory / STAGE_FILE).write_bytes(stage)

            write_folder(folder, write)

        return numbers, save

    def _prepare_text(self) -> Bench:
        """Tokens for evaluation, and the shuffled blocks that calibration and mask learning both take."""
        from transformers import AutoTokenizer

        settings = self.settings
        self.tokenizer = AutoTokenizer.from_pretrained(self.out / DENSE)
        heldout = pack_blocks(tokenize(self.tokenizer, self.corpus.heldout), settings.model.block_size).reshape(-1)
        blocks = pack_blocks(tokenize(self.tokenizer, self.corpus.learn), settings.model.block_size)
        needed = max(settings.calibration_blocks, settings.learn.steps * settings.learn.batch_size)
        wanted, advice = settings.calibration_blocks, "Use fewer or give more text."
        require_at_least("blocks of the part 'learn'", len(blocks), wanted, advice, named="calibration_blocks = ")
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(settings.model.seed))
        passes = -(-needed // len(blocks))
        learn_blocks = blocks[order].repeat(passes, 1)[:needed]
        return Bench(self.out, settings, heldout[: settings.heldout_tokens], learn_blocks, self.say)

    def _pruned(
        self,
        bench: Bench,
        name: str,
        label: str,
        target: float,
        tokens: int,
        settings: Mapping[str, Any],
        make: Callable[[], Outcome],
    ) -> dict[str, Any]:
        """Row of a stage that makes masks, and of their reconstruction, which is a stage of its own."""
        result = self.stage(name, settings, make)
        rebuilding = {"masks": self.stage_key(name), "blocks": dataclasses.asdict(self.settings.blocks)}
        rebuild = functools.partial(bench.reconstructed, name)
        reconstructed = self.stage(reconstructed_name(name), rebuilding, rebuild)
        return self.row(label, result, target, tokens, reconstructed["perplexity"])

    def _learned(self, bench: Bench, name: str, label: str, mode: str, target: float, prior: str) -> dict[str, Any]:
        learn = self.settings.learn
        tokens = learn.steps * learn.batch_size * self.settings.model.block_size
        settings = {"target": target, "prior": self.stage_key(prior), "learn": dataclasses.asdict(learn)}
        make = functools.partial(bench.learned, mode, target, prior)
        return self._pruned(bench, name, label, target, tokens, settings, make)

    def row(
        self, label: str, result: Mapping[str, Any], target: float, tokens: int, reconstructed: float | None = None
    ) -> dict[str, Any]:
        """Add a row to the table and say its perplexity."""
        row = report.table_row(label, result, target, tokens, reconstructed)
        self.rows.append(row)
        for line in report.row_lines(row, len(self.tokenizer)):
            self.say(f"  {line}")
        return row

    # -- results ---

    def _show(self, bench: Bench, hybrids: list[dict[str, Any]], learned: list[dict[str, Any]]) -> None:
        others = {row["method"]: [row] for row in self.rows[1:] if row not in hybrids and row not in learned}
        stages = [*map(hybrid_name, self.targets), *map(learned_name, self.targets)]
        grids = {
            row["method"]: load_artifact(self.out / stage).tile_is_sparse
            for row, stage in zip(hybrids + learned, stages, strict=True)
        }
        report.write_results(self.out, self.rows, {"hybrid": hybrids, "PATCH joint": learned} | others, grids)
        self.echo("\n" + report.table(self.rows))
        samples, window = bench.calibration.shape
        epochs = self.settings.blocks.epochs
        passes = "one pass" if epochs == 1 else f"{epochs} passes"
        self.echo(report.NOTES.format(tokens=bench.heldout.numel(), window=window, samples=samples, passes=passes))
        self.say(f"wrote {', '.join(str(self.out / name) for name in report.FILES)}")

    def _pack(self, bench: Bench, hybrids: list[dict[str, Any]]) -> None:
        """Pack the sparsest hybrid."""
        target, row = max(zip(self.targets, hybrids, strict=True), key=lambda pair: pair[0])
        name = reconstructed_name(hybrid_name(target))
        packing.pack_and_generate(bench, self.tokenizer, name, (self.rows[0], row), self.echo)
        self.say(f"done; everything is in {self.out}")


def make_dense(
    corpus: corpus_module.Corpus, settings: ModelSettings, say: Callable[[str], None]
) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """The dense model trained on the part `train` of the corpus, its tokenizer, and numbers about both."""
    tokenizer = demo_model.train_tokenizer(corpus.train, settings.vocab_size)
    blocks = pack_blocks(tokenize(tokenizer, corpus.train), settings.block_size)
    model = demo_model.build_model(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        layers=settings.layers,
        heads=settings.heads,
        seed=settings.seed,
        architecture=settings.architecture,
        experts=settings.experts,
    )
    elems = sum(linear.weight.numel() for linear in maskable_linears(model).values())
    tokens = settings.steps * settings.batch_size * settings.block_size
    say(
        f"  {elems / 1e6:.1f} M weights in linear layers, trained on {tokens / 1e6:.1f} M tokens (a pass is "
        f"{blocks.numel() / 1e6:.1f} M)"
    )
    every = max(1, settings.steps // 6)

    def on_step(step: int, loss: float) -> None:
        if (step + 1) % every == 0:
            say(f"  step {step + 1}/{settings.steps}: loss {loss:.3f}")

    demo_model.train_dense(
        model,
        blocks,
        steps=settings.steps,
        batch_size=settings.batch_size,
        matrix_lr=settings.matrix_lr,
        vector_lr=settings.vector_lr,
        seed=settings.seed,
        on_step=on_step,
    )
    return model, tokenizer, {"weights": elems, "tokens": tokens, "sha256": corpus.sha256}
