"""The main job on a small model: train it, prune it one-shot, learn masks, compare, pack, save, load, generate.

Every stage's result is a folder under the output folder. A stage whose settings and inputs are unchanged is not
run again, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patch import __version__
from patch.artifacts.artifact import Artifact, load_artifact, save_artifact
from patch.data.tokens import pack_blocks, tokenize
from patch.demo import corpus as corpus_module
from patch.demo import model as demo_model
from patch.demo.settings import DemoSettings, ModelSettings
from patch.evaluate import plots, tables
from patch.evaluate.cross_entropy import perplexity
from patch.evaluate.results import broken_perplexity
from patch.files.atomic import write_text_atomic
from patch.files.folder import write_folder
from patch.files.strict_json import dump_json, read_json
from patch.learn.config import LearnConfig
from patch.learn.run import learn
from patch.models.coverage import coverage
from patch.models.facts import fingerprints
from patch.models.keep_masks import apply_keep_masks, measured_sparsity
from patch.models.structure import maskable_linears
from patch.packed.convert import pack_model
from patch.packed.load import load
from patch.packed.save import save_dense, save_packed
from patch.packed.swap import packed_layers
from patch.pruning import compensate, get_method, prune_model
from patch.pruning.tile_scores import reference_tile_scores
from patch.runs.folders import require_nothing_else
from patch.runs.progress import StepLines
from patch.runs.stages import STAGE_FILE, digest, finished
from patch.settings import RESOLVED_NAME
from patch_kernels import payload_bytes, tiles_that_are_two_of_four
from patch_kernels.checks import require_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a stage gives: its numbers, and how to write its folder with the stage file in it.
Outcome = tuple[dict[str, Any], Callable[[Path, bytes], None]]

ONE_SHOT = {"magnitude": "magnitude 2:4", "wanda": "Wanda 2:4", "sparsegpt": "SparseGPT 2:4"}
TEXT, HELDOUT = "text.txt", "heldout.txt"
# What a demo leaves in its folder.
_FILES = (
    *(RESOLVED_NAME, TEXT, HELDOUT, "results.csv", "perplexity.png", "tiles.png"),
    *("dense", "baseline", *ONE_SHOT, "maskllm", "patch-*", "packed", "pruned", "*.tmp-*", "*.old-*"),
)
PROMPT = "def __init__(self"
NOTES = """
Perplexity: {tokens} held-out tokens of files that neither training nor pruning saw, windows of {window}, fp32.
Linear bytes: the linear layers in bf16, dense or packed.
Tokens: the text a method sees, all from the same part. The one-shot methods need little by design; mask learning
sees more (and takes longer), so this is no comparison at equal cost. SparseGPT also changes the weights it keeps,
the learned masks do not.
Compensated: the dense weights under the same mask, the kept ones then updated by `patch-llm compensate` on {samples}
calibration windows."""


def run_demo(
    out: str | os.PathLike,
    settings: DemoSettings | None = None,
    *,
    text: str | os.PathLike | None = None,
    echo: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run all stages and return the rows of the table that results.csv holds.

    out   folder for the stages, results.csv and the plots
    text  folder of .py files to use instead of the standard library
    echo  receives each line of output
    """
    return Demo(out, settings, text=text, echo=echo).run()


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
        echo: Callable[[str], None] = print,
    ) -> None:
        self.out, self.settings, self.echo = Path(out), settings or DemoSettings(), echo
        settings = self.settings
        is_ours = (self.out / "dense" / STAGE_FILE).is_file()
        require_nothing_else("--out", self.out, () if is_ours else _FILES)
        self.clock = demo_model.Stopwatch()
        self.corpus = corpus_module.load_corpus(Path(text) if text else None, max_characters=settings.max_characters)
        self.key: Any = {"text": self.corpus.sha256, "version": __version__, "torch": torch.__version__}
        self.rows: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        settings = self.settings
        self.say(f"text: {self.corpus.describe()} (SHA-256 {self.corpus.sha256[:12]})")
        self._say_plan()
        self.out.mkdir(parents=True, exist_ok=True)
        for name, documents in ((TEXT, self.corpus.learn), (HELDOUT, self.corpus.heldout)):
            write_text_atomic(self.out / name, "\n\n".join(documents))
        self.stage("dense", dataclasses.asdict(settings.model), self._make_dense)
        self._prepare_text()
        self.key = {
            "dense": self.stage_key("dense"),
            "evaluation": [settings.heldout_tokens, settings.model.block_size],
        }
        self.row("dense", self.stage("baseline", {}, self._make_baseline), None, 0)
        self.key |= {"calibration": settings.calibration_blocks, "tile": settings.tile}
        one_shot_tokens = settings.calibration_blocks * settings.model.block_size
        for method, label in ONE_SHOT.items():
            result = self.stage(method, {}, functools.partial(self._make_one_shot, method))
            self.row(label, result, 0.5, 0 if method == "magnitude" else one_shot_tokens)
        self.key |= {"prior": self.stage_key("sparsegpt"), "learn": dataclasses.asdict(settings.learn)}
        learn_tokens = settings.learn.steps * settings.learn.batch_size * settings.model.block_size
        self.row("MaskLLM 2:4", self._learned("maskllm", "maskllm", 0.5), 0.5, learn_tokens)
        for target in settings.targets:
            result = self._learned(f"patch-{round(100 * target)}", "joint", target)
            self.row(f"PATCH joint {target:.0%}", result, target, learn_tokens)
        self._show()
        self._packed()
        return self.rows

    def _say_plan(self) -> None:
        settings, block = self.settings, self.settings.model.block_size
        dense, learn = (
            settings.model.steps * settings.model.batch_size,
            settings.learn.steps * settings.learn.batch_size,
        )
        runs = 1 + len(settings.targets)
        self.say(
            f"plan: train a model for {settings.model.steps} steps ({dense * block:,} tokens), prune it by "
            f"{len(ONE_SHOT)} methods, learn {runs} masks for {settings.learn.steps} steps each ({learn * block:,} "
            "tokens), compensate, compare, pack. By default that takes 7 to 10 minutes on 2 cores"
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

    def _prepare_text(self) -> None:
        """Tokens for evaluation, and the shuffled blocks that calibration and mask learning both take."""
        from transformers import AutoTokenizer

        settings = self.settings
        self.tokenizer = AutoTokenizer.from_pretrained(self.out / "dense")
        heldout = pack_blocks(tokenize(self.tokenizer, self.corpus.heldout), settings.model.block_size).reshape(-1)
        self.heldout = heldout[: settings.heldout_tokens]
        blocks = pack_blocks(tokenize(self.tokenizer, self.corpus.learn), settings.model.block_size)
        needed = max(settings.calibration_blocks, settings.learn.steps * settings.learn.batch_size)
        wanted, advice = settings.calibration_blocks, "Use fewer or give more text."
        require_at_least("blocks of the part 'learn'", len(blocks), wanted, advice, named="calibration_blocks = ")
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(settings.model.seed))
        passes = -(-needed // len(blocks))
        self.learn_blocks = blocks[order].repeat(passes, 1)[:needed]
        self.calibration = self.learn_blocks[: settings.calibration_blocks]

    def _make_baseline(self) -> Outcome:
        model = self._dense_model()
        none_sparse = {name: torch.ones_like(m.weight, dtype=torch.bool) for name, m in maskable_linears(model).items()}

        def save(folder: Path, stage: bytes) -> None:
            write_folder(folder, lambda directory: (directory / STAGE_FILE).write_bytes(stage))

        return self._measure(model, none_sparse), save

    def _make_one_shot(self, method: str) -> Outcome:
        model = self._dense_model()
        made_from = fingerprints(model)
        masks = prune_model(model, method, calibration=self.calibration, progress=False)
        covered = {"coverage": coverage(model, masks).as_dict()}
        result = self._measure(model, masks)
        weights = {name: linear.weight for name, linear in maskable_linears(model).items()}

        def save(folder: Path, stage: bytes) -> None:
            save_artifact(
                folder,
                masks,
                meta={"model": "dense", "method": method, "pattern": "2:4", "sparsity": 0.5} | made_from | covered,
                weights=weights if get_method(method).updates_weights else None,
                extra={STAGE_FILE: stage},
            )

        return result, save

    def _learned(self, name: str, mode: str, target: float) -> dict[str, Any]:
        settings = self.settings
        config = settings.learn.config(mode, target, settings.tile, settings.model.seed)
        return self.stage(name, {"target": target}, lambda: self._make_learned(config))

    def _make_learned(self, config: LearnConfig) -> Outcome:
        model = self._dense_model()
        made_from = fingerprints(model)
        prior = load_artifact(self.out / "sparsegpt").masks
        outcome = learn(
            model,
            self.learn_blocks[: self.settings.learn.steps * config.global_batch_size],
            config,
            prior_masks=prior,
            tile_scores=None if config.mode == "maskllm" else self._tile_scores(config),
            progress=False,
            callbacks=[StepLines(lambda text: self.say(f"  {text}"))],
        )
        meta: dict[str, Any] = {
            "model": "dense",
            "method": config.mode,
            "pattern": "patch",
            "sparsity": config.target_sparsity,
            "tile": config.tile,
            "seed": config.seed,
        }
        meta |= made_from | {"coverage": coverage(model, outcome.masks).as_dict()}
        metrics = "".join(json.dumps(record) + "\n" for record in outcome.metrics)

        def save(folder: Path, stage: bytes) -> None:
            extra: dict[str, bytes | str] = {STAGE_FILE: stage, "metrics.jsonl": metrics}
            save_artifact(folder, outcome.masks, meta=meta, tile_is_sparse=outcome.tile_is_sparse, extra=extra)

        return self._measure(model, outcome.masks), save

    def _tile_scores(self, config: LearnConfig) -> dict[str, Tensor]:
        """Tile scores of the SparseGPT reference pruned unstructured to the target."""
        model = self._dense_model()
        calibration = {"calibration": self.calibration, "progress": False}
        return reference_tile_scores(model, "sparsegpt", config.target_sparsity, config.tile, **calibration)

    # -- measurements ---

    def _dense_model(self) -> PreTrainedModel:
        return load(self.out / "dense", dtype=torch.float32).eval()

    def _perplexity(self, model: nn.Module) -> float:
        return perplexity(model.eval(), self.heldout, self.settings.model.block_size, batch_size=32)

    def _measure(self, model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Any]:
        """Perplexity in fp32, true sparsity from the masks, bytes of the layers as packed and as dense bf16."""
        packed = sum(payload_bytes(tiles_that_are_two_of_four(keep)) for keep in masks.values())
        return {
            "perplexity": self._perplexity(model),
            "compensated": self._compensated(masks),
            "sparsity": measured_sparsity(masks),
            "packed_bytes": packed,
            "dense_bytes": 2 * sum(keep.numel() for keep in masks.values()),
        }

    def _compensated(self, masks: Mapping[str, Tensor]) -> float | None:
        """Perplexity once the kept weights made up for the mask; None where nothing is pruned."""
        if all(bool(keep.all()) for keep in masks.values()):
            return None
        model = self._dense_model()
        compensate(model, masks, calibration=self.calibration, progress=False)
        return self._perplexity(model)

    def row(self, label: str, result: Mapping[str, Any], target: float | None, tokens: int) -> None:
        """Add a row to the table and say its perplexity."""
        is_dense = target is None
        self.rows.append(
            {
                "method": label,
                "target_sparsity": 0.0 if is_dense else target,
                "sparsity": round(result["sparsity"], 6),
                "perplexity": round(result["perplexity"], 4),
                "compensated": "" if result["compensated"] is None else round(result["compensated"], 4),
                "linear_bytes": result["dense_bytes"] if is_dense else result["packed_bytes"],
                "dense_linear_bytes": result["dense_bytes"],
                "tokens_seen": tokens,
            }
        )
        self.say(f"  {label}: perplexity {result['perplexity']:.2f}, sparsity {result['sparsity']:.1%}")
        if result["compensated"] is not None:
            self.say("  " + _compared(result["perplexity"], result["compensated"]))
        highest = max(result["perplexity"], result["compensated"] or 0.0)
        if broken := broken_perplexity(highest, len(self.tokenizer)):
            self.say(f"  WARNING: {label}: perplexity {highest:,.0f} is {broken}")

    # -- results ---

    def _show(self) -> None:
        tables.write_csv(self.out / "results.csv", self.rows)
        self.echo("\n" + tables.format_table([_shown(row) for row in self.rows]))
        window = self.settings.model.block_size
        self.echo(NOTES.format(tokens=self.heldout.numel(), window=window, samples=len(self.calibration)))
        one_shot = [row for row in self.rows if row["method"] in ONE_SHOT.values()]
        learned = [row for row in self.rows if row["method"].startswith("PATCH")]
        maskllm = [row for row in self.rows if row["method"].startswith("MaskLLM")]
        plots.plot_perplexity(
            self.out / "perplexity.png",
            {
                "PATCH (joint)": [(row["sparsity"], row["perplexity"]) for row in learned],
                "MaskLLM 2:4": [(row["sparsity"], row["perplexity"]) for row in maskllm],
                **{row["method"]: [(row["sparsity"], row["perplexity"])] for row in one_shot},
            },
            dense=self.rows[0]["perplexity"],
            title="Held-out perplexity against sparsity",
        )
        maps = {}
        for row, target in zip(learned, self.settings.targets, strict=True):
            label = f"{row['method']}: {row['sparsity']:.1%} zeros"
            maps[label] = self._artifact(target).tile_is_sparse
        plots.plot_tile_maps(self.out / "tiles.png", maps)
        self.say(f"wrote {self.out / 'results.csv'}, perplexity.png and tiles.png")

    def _artifact(self, target: float) -> Artifact:
        return load_artifact(self.out / f"patch-{round(100 * target)}")

    def _packed(self) -> None:
        """Pack the sparsest PATCH model, save it, load it, compare, generate."""
        target = max(self.settings.targets)
        model = self._dense_model()
        apply_keep_masks(model, self._artifact(target).masks)
        pack_model(model, dtype=torch.bfloat16)
        save_packed(model, self.tokenizer, self.out / "packed")
        save_dense(model, self.tokenizer, self.out / "pruned")
        loaded: Any = load(self.out / "packed").eval()
        window = self.heldout[: self.settings.model.block_size][None]
        with torch.inference_mode():
            expected, got = model(input_ids=window).logits, loaded(input_ids=window).logits
        if not torch.equal(expected, got):
            differ = f"they differ by up to {(expected - got).abs().max().item()}. Please report this"
            raise RuntimeError(f"expected the logits of the saved model, {differ} with `patch-llm info --json`.")
        held = sum(layer.payload.numel() for _, layer in packed_layers(loaded))
        self.say(f"packed the {target:.0%} model ({held:,} bytes of weights), saved, reloaded: logits equal")
        ids = self.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            output = loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.settings.new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        self.echo(f"\nThe packed model continues {PROMPT!r}:\n{self.tokenizer.decode(output[0])}\n")
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


def _compared(perplexity: float, compensated: float) -> str:
    return f"compensated: {compensated:.2f}{', WORSE than without' if compensated > perplexity else ''}"


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of results.csv as the printed table shows it."""
    return {
        "method": row["method"],
        "perplexity": f"{row['perplexity']:.2f}",
        "compensated": "-" if row["compensated"] == "" else f"{row['compensated']:.2f}",
        "sparsity": f"{row['sparsity']:.1%}",
        "linear bytes": f"{row['linear_bytes']:,}",
        "of dense": f"{row['linear_bytes'] / row['dense_linear_bytes']:.2f}x",
        "tokens": f"{row['tokens_seen']:,}",
    }
