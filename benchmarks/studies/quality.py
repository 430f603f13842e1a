"""The quality study: what every method does to a model's perplexity, in one table, CSV and plot.

    python -m benchmarks.studies.quality --out build/quality                                  the demo's model and text
    python -m benchmarks.studies.quality --model DIR_OR_HUB_ID --train TEXT --heldout TEXT --out DIR

Dense; five one-shot 2:4 methods; MaskLLM; PATCH joint and tile at 45, 35 and 25 %; one-shot unstructured pruning at the
same shares; each with its own weights, with the dense weights under its mask, and with the kept weights compensated.
--ablations adds tile sizes, a target per decoder block, and other priors. TEXT is a .txt, .jsonl or .parquet file or a
named set.

One result is a cell: a method and a seed, in a folder of its own. A cell made with the same settings is not run again,
so an interrupted study goes on where it stopped, and processes with different --seeds or --cells may share --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.studies import quality_report
from patch import __version__
from patch.artifacts.artifact import load_artifact, save_artifact
from patch.data.tokens import calibration_windows, evaluation_text, text_sha256, tokenize, training_blocks
from patch.demo import corpus as corpus_module
from patch.demo import model as demo_model
from patch.demo import run as demo_run
from patch.demo.settings import DemoSettings
from patch.evaluate.cross_entropy import perplexity
from patch.files.folder import write_folder
from patch.files.strict_json import dump_json
from patch.learn.config import LearnConfig
from patch.learn.run import learn
from patch.models.facts import context_length, fingerprints, model_fingerprint
from patch.models.keep_masks import measured_sparsity
from patch.models.structure import maskable_linears
from patch.packed.load import load
from patch.priors import tile_scores
from patch.pruning import COMPENSATIONS, METHODS, ProxSparseConfig, compensate, get_method, prune_model
from patch.runs.stages import STAGE_FILE, digest, finished
from patch_kernels import payload_bytes, tiles_that_are_two_of_four

DEFAULT_WINDOW = 2048
PRIOR = "sparsegpt"
ABLATIONS = ("tile", "layer", "prior")
ABLATION_TILES = (64, 32, 16)


@dataclass(frozen=True)
class Settings:
    """What all cells share. `window` tokens are a calibration sample, a training block and a held-out window."""

    window: int
    nsamples: int = 128
    heldout_windows: int | None = None
    steps: int = 500
    batch_size: int = 8
    lr: float = 5e-4
    prox: ProxSparseConfig = field(default_factory=ProxSparseConfig)
    prox_samples: int = 400
    tile: tuple[int, int] = (128, 128)
    targets: tuple[float, ...] = (0.45, 0.35, 0.25)


@dataclass(frozen=True)
class Cell:
    """One method at one sparsity; with a seed it is a result.

    name    folder name without the seed
    group   curve of the plot
    own     settings that no other cell shares; part of the key, as those of the study are
    needs   cells whose masks it starts from
    make    (study, seed, {needed cell: its masks}) -> Made
    """

    name: str
    label: str
    group: str
    target: float
    make: Callable[[Study, int, dict[str, dict[str, Tensor]]], Made]
    own: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@dataclass
class Made:
    """A pruned model: its masks, the tokens its method saw, and whether it changed the weights it kept."""

    model: nn.Module
    masks: dict[str, Tensor]
    tokens: int
    updates_weights: bool = False
    tile_is_sparse: dict[str, Tensor] | None = None


class Study:
    """A model, its texts and the folder of the cells."""

    def __init__(self, out: Path, model: str, train: str, heldout: str, settings: Settings, **options: Any) -> None:
        """options: text_field, dtype, device, compensations and say, as the flags of the same names."""
        from transformers import AutoTokenizer

        self.out, self.model, self.train, self.settings = out, model, train, settings
        self.text_field = options.get("text_field")
        self.dtype, self.device = options.get("dtype", torch.float32), options.get("device")
        self.compensations: tuple[str, ...] = tuple(options.get("compensations", ("least_squares",)))
        self.say: Callable[[str], None] = options.get("say", print)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        text, most = evaluation_text(heldout, text_field=self.text_field)
        limits = [n for n in (most, settings.heldout_windows) if n is not None]
        ids = torch.tensor(tokenize(self.tokenizer, [text])[0], dtype=torch.int64)
        windows = min([len(ids) // settings.window, *limits])
        if windows < 1:
            raise ValueError(
                f"--heldout: expected at least one window of {settings.window} tokens, got {len(ids)} tokens. Give "
                "more text or a smaller --window."
            )
        self.heldout = ids[: windows * settings.window].reshape(windows, settings.window)
        dense = self.dense()
        self.made_from = fingerprints(dense)
        self.identity = {
            "model": model_fingerprint(dense),
            "dtype": str(self.dtype),
            "heldout": [text_sha256([text]), windows],
            "train": self._sampled(0, settings.nsamples)[1],
            "versions": [__version__, torch.__version__],
            "settings": [settings.window, settings.nsamples],
        }
        self._keys: dict[tuple[str, int], str] = {}

    def dense(self) -> nn.Module:
        """A fresh copy of the dense model."""
        return load(self.model, dtype=self.dtype).to(self.device or "cpu").eval()

    def calibration(self, seed: int, nsamples: int | None = None) -> Tensor:
        """Calibration samples of a seed, (samples, window)."""
        return self._sampled(seed, nsamples or self.settings.nsamples)[0]

    @functools.lru_cache(maxsize=4)  # noqa: B019 -- a study lives as long as the process
    def _sampled(self, seed: int, nsamples: int) -> tuple[Tensor, str]:
        return calibration_windows(
            self.tokenizer,
            self.train,
            nsamples=nsamples,
            seqlen=self.settings.window,
            seed=seed,
            text_field=self.text_field,
        )

    @functools.cached_property
    def blocks(self) -> Tensor:
        """Training blocks of mask learning, repeated when the text is shorter than the steps ask for."""
        wanted = self.settings.steps * self.settings.batch_size
        blocks, _ = training_blocks(
            self.tokenizer, self.train, self.settings.window, max_blocks=wanted, text_field=self.text_field
        )
        return blocks.repeat(-(-wanted // len(blocks)), 1)[:wanted]

    def perplexity(self, model: nn.Module) -> float:
        """Held-out perplexity."""
        return perplexity(model, self.heldout.reshape(-1), self.settings.window)

    # -- cells ---

    def folder(self, cell: Cell, seed: int) -> Path:
        """Where a cell's result is."""
        return self.out / "cells" / f"{cell.name}-seed{seed}"

    def result(
        self, cell: Cell, seed: int, cells: dict[str, Cell], *, finished_only: bool = False
    ) -> dict[str, Any] | None:
        """Numbers of a cell: read if it was made with the same settings and inputs, else made now.

        finished_only  None for what would have to be made
        """
        needed = {name: self.result(cells[name], seed, cells, finished_only=finished_only) for name in cell.needs}
        key = digest(
            {
                "cell": [cell.name, cell.target, seed],
                "own": cell.own,
                "study": self.identity,
                "compensations": self.compensations,
                "needs": [self._keys[name, seed] for name in needed],
            }
        )
        self._keys[cell.name, seed] = key
        folder = self.folder(cell, seed)
        found = finished(folder, key)
        if found is not None or finished_only:
            return found
        self.say(f"{cell.name}, seed {seed}: running")
        begin = time.perf_counter()
        masks = {name: load_artifact(self.folder(cells[name], seed)).masks for name in needed}
        made = cell.make(self, seed, masks)
        result = self._measure(made, time.perf_counter() - begin, seed)
        stage = dump_json({"key": key, "result": result})
        if made.masks:
            meta = {"method": cell.label, "sparsity": cell.target, "seed": seed, "model": self.model}
            meta |= self.made_from
            save_artifact(folder, made.masks, meta=meta, tile_is_sparse=made.tile_is_sparse, extra={STAGE_FILE: stage})
        else:
            write_folder(folder, lambda directory: (directory / STAGE_FILE).write_bytes(stage))
        shown = ", ".join(f"{name} {result[name]:.3f}" for name in quality_report.PERPLEXITIES if name in result)
        self.say(f"{cell.name}, seed {seed}: {shown} ({time.perf_counter() - begin:.0f} s)")
        return result

    def _measure(self, made: Made, seconds: float, seed: int) -> dict[str, Any]:
        """Perplexity as the method leaves the model, of the dense weights under its masks, and compensated."""
        dense_bytes = 2 * sum(linear.weight.numel() for linear in maskable_linears(self.dense()).values())
        result: dict[str, Any] = {
            "sparsity": measured_sparsity(made.masks) if made.masks else 0.0,
            "tokens": made.tokens,
            "seconds": round(seconds, 1),
            "linear_bytes": dense_bytes,
            "dense_linear_bytes": dense_bytes,
        }
        if made.updates_weights or not made.masks or not self.compensations:
            result["perplexity"] = self.perplexity(made.model)
        if not made.masks:
            return result
        result["linear_bytes"] = sum(payload_bytes(tiles_that_are_two_of_four(keep)) for keep in made.masks.values())
        made.model.to("meta")  # freed before the next model is loaded
        for method in self.compensations:
            model = self.dense()
            outcome = compensate(
                model,
                made.masks,
                calibration=self.calibration(seed),
                heldout=self.heldout,
                method=method,
                progress=False,
            )
            result["masks_alone"] = outcome.perplexity_before
            result[f"compensated_{method}"] = outcome.perplexity_after
        # The same model where the method leaves the weights as they are: measured once.
        result.setdefault("perplexity", result.get("masks_alone"))
        return result


def all_cells(settings: Settings, ablations: Sequence[str] = ()) -> dict[str, Cell]:
    """Every cell of the study by name, what a cell needs before it."""
    cells = [Cell("dense", "dense", "dense", 0.0, _dense)]
    for method, row in METHODS.items():
        if "2:4" in row.patterns:
            cells.append(_one_shot(settings, method, row.label, "2:4", 0.5))
    for method, row in METHODS.items():
        if "unstructured" in row.patterns:
            cells += [_one_shot(settings, method, row.label, "unstructured", t) for t in settings.targets]
    cells.append(_learned(settings, "maskllm", "MaskLLM 2:4", "MaskLLM 2:4", "maskllm", 0.5))
    for target in settings.targets:
        cells.append(
            _learned(settings, f"joint-{_percent(target)}", f"PATCH joint {target:.0%}", "PATCH joint", "joint", target)
        )
    for target in settings.targets:
        name, label = f"tile-{_percent(target)}", f"PATCH tile {target:.0%}"
        # As published: the fixed patterns of PATCH-Tile are MaskLLM's.
        cells.append(_learned(settings, name, label, "PATCH tile", "tile", target, patterns="maskllm"))
    for ablation in ablations:
        cells += _ablation(settings, ablation)
    return {cell.name: cell for cell in cells}


def _dense(study: Study, seed: int, needed: dict[str, dict[str, Tensor]]) -> Made:
    return Made(study.dense(), {}, 0)


def _one_shot(settings: Settings, method: str, label: str, pattern: str, target: float) -> Cell:
    learns = get_method(method).learns
    nsamples = settings.prox_samples if learns else settings.nsamples

    def make(study: Study, seed: int, needed: dict[str, dict[str, Tensor]]) -> Made:
        model = study.dense()
        masks = prune_model(
            model,
            method,
            pattern=pattern,
            sparsity=target,
            calibration=study.calibration(seed, nsamples) if get_method(method).needs_calibration else None,
            prox=dataclasses.replace(settings.prox, seed=seed) if learns else None,
            progress=False,
        )
        samples = settings.prox.steps * settings.prox.batch_size if learns else nsamples
        tokens = samples * settings.window if get_method(method).needs_calibration else 0
        return Made(model, masks, tokens, get_method(method).updates_weights)

    if pattern == "2:4":
        own = {"prox": dataclasses.asdict(settings.prox), "samples": nsamples} if learns else {}
        return Cell(method, f"{label} 2:4", f"{label} 2:4", target, make, own)
    return Cell(f"{method}-{_percent(target)}", f"{label} {target:.0%}", f"{label} unstructured", target, make)


def _learned(
    settings: Settings,
    name: str,
    label: str,
    group: str,
    mode: str,
    target: float,
    *,
    prior: str | None = PRIOR,
    patterns: str | None = None,
    **fields: Any,
) -> Cell:
    """A cell that learns: patterns from `patterns` or else `prior` in 2:4, tile scores from `prior` unstructured."""
    config = LearnConfig.from_preset(
        mode,
        target,
        **{
            "tile": settings.tile,
            "lr": settings.lr,
            "local_batch_size": settings.batch_size,
            "global_batch_size": settings.batch_size,
            # Every result has the zeros that its name says.
            "exact_budget": mode != "maskllm",
        }
        | fields,
    )
    start = patterns or prior
    reference = None if mode == "maskllm" or prior is None else f"{prior}-{_percent(target)}"

    def make(study: Study, seed: int, needed: dict[str, dict[str, Tensor]]) -> Made:
        model = study.dense()
        scores = None
        if reference is not None:
            scores = {name: tile_scores(keep, config.tile) for name, keep in needed[reference].items()}
        outcome = learn(
            model,
            study.blocks,
            dataclasses.replace(config, seed=seed),
            prior_masks=None if start is None else needed[start],
            tile_scores=scores,
            progress=False,
        )
        return Made(model, outcome.masks, study.blocks.numel(), tile_is_sparse=outcome.tile_is_sparse)

    own = {"learn": dataclasses.asdict(config), "steps": settings.steps}
    needs = tuple(cell for cell in (start, reference) if cell is not None)
    return Cell(name, label, group, target, make, own, needs)


def _ablation(settings: Settings, ablation: str) -> list[Cell]:
    """PATCH joint at the first target with one setting changed at a time."""
    target = settings.targets[0]
    base = f"joint-{_percent(target)}"
    make = functools.partial(_learned, settings, group="ablation", mode="joint", target=target)
    if ablation == "tile":
        sizes = [size for size in ABLATION_TILES if size < settings.tile[0]]
        return [
            make(f"{base}-tile{size}", label=f"PATCH joint {target:.0%}, tile {size}x{size}", tile=(size, size))
            for size in sizes
        ]
    if ablation == "layer":
        return [make(f"{base}-layer", label=f"PATCH joint {target:.0%}, target per block", layer_target=True)]
    return [
        make(f"{base}-prior-{prior or 'none'}", label=f"PATCH joint {target:.0%}, prior {prior or 'none'}", prior=prior)
        for prior in (None, "magnitude", "wanda")
    ]


def _percent(target: float) -> str:
    return f"{100 * target:g}"


def demo_inputs(out: Path, say: Callable[[str], None]) -> tuple[str, str, str]:
    """Folder of the demo's dense model, trained if it is not there, and files of its texts."""
    settings = DemoSettings().model
    corpus = corpus_module.load_corpus()
    folder, key = out / "model", digest([dataclasses.asdict(settings), corpus.sha256, __version__, torch.__version__])
    if finished(folder, key) is None:
        model, tokenizer, numbers = demo_run.make_dense(corpus, settings, say)

        def write(directory: Path) -> None:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            for part in ("learn", "heldout"):
                # The one-shot rule for local text samples a joined text, as it will be here.
                (directory / f"{part}.jsonl").write_text(
                    "".join(json.dumps({"text": document}) + "\n" for document in getattr(corpus, part))
                )
            (directory / STAGE_FILE).write_bytes(dump_json({"key": key, "result": numbers}))

        write_folder(folder, write)
    return str(folder), str(folder / "learn.jsonl"), str(folder / "heldout.jsonl")


def chosen_cells(cells: dict[str, Cell], patterns: Sequence[str]) -> list[Cell]:
    """Cells whose names match one of the patterns; raises ValueError for a pattern that matches none."""
    for pattern in patterns:
        if not fnmatch.filter(cells, pattern):
            raise ValueError(
                f"--cells: expected names or patterns of cells, got {pattern!r}. Known: {', '.join(cells)}."
            )
    return [cell for cell in cells.values() if any(fnmatch.fnmatch(cell.name, p) for p in patterns)]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the study and write quality.md, quality.csv, quality_cells.csv and quality.png; returns the cells' rows."""
    arguments = _parser().parse_args(argv)
    if (arguments.model is None) != (arguments.train is None) or (arguments.model is None) != (
        arguments.heldout is None
    ):
        raise SystemExit("quality: expected --model, --train and --heldout together, or none of them for the demo's.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    clock = demo_model.Stopwatch()

    def say(text: str) -> None:
        print(f"[{clock.seconds:7.1f} s] {text}", flush=True)

    inputs = (arguments.model, arguments.train, arguments.heldout)
    if arguments.model is None:
        inputs = demo_inputs(out, say)
    from transformers import AutoConfig

    limit = context_length(AutoConfig.from_pretrained(inputs[0])) or DEFAULT_WINDOW
    settings = Settings(
        window=arguments.window or min(DEFAULT_WINDOW, limit),
        nsamples=arguments.nsamples,
        heldout_windows=arguments.heldout_windows,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        prox=ProxSparseConfig(lam=arguments.prox_lambda, lr=arguments.prox_lr, steps=arguments.prox_steps),
        prox_samples=arguments.prox_steps,
        tile=(arguments.tile, arguments.tile),
        targets=arguments.targets,
    )
    try:
        cells = all_cells(settings, arguments.ablations)
        chosen = chosen_cells(cells, arguments.cells)
        study = Study(
            out,
            *inputs,
            settings,
            text_field=arguments.text_field,
            dtype=getattr(torch, arguments.dtype),
            device=arguments.device,
            compensations=arguments.compensations,
            say=say,
        )
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"quality: {error}") from None
    rows = []
    for seed in arguments.seeds:
        for cell in chosen:
            result = study.result(cell, seed, cells, finished_only=arguments.finished_only)
            if result is not None:
                shown = {"cell": cell.name, "method": cell.label, "group": cell.group, "target": cell.target}
                rows.append(shown | {"seed": seed} | result)
    if not rows:
        raise SystemExit(f"quality: expected finished cells in {out}, found none. Run it without --finished-only.")
    about = {
        "command": "python -m benchmarks.studies.quality " + shlex.join(sys.argv[1:] if argv is None else argv),
        "model": inputs[0],
        "training text": inputs[1],
        "held-out text": f"{inputs[2]}, {len(study.heldout)} windows of {settings.window} tokens",
        "mask learning": f"{settings.steps} steps of {settings.batch_size} x {settings.window}, lr {settings.lr:g}",
        **harness.environment(),
    }
    quality_report.write(out, rows, about)
    say(f"wrote {out / 'quality.md'}, quality.csv, quality_cells.csv and quality.png")
    return rows


def _parser() -> argparse.ArgumentParser:
    def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple]:
        return lambda text: tuple(kind(part) for part in text.split(",") if part)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells and results")
    parser.add_argument("--model", help="dense model: folder or Hugging Face id (default: the demo's)")
    parser.add_argument("--train", help="text for calibration and mask learning")
    parser.add_argument("--heldout", help="text to measure on")
    parser.add_argument("--text-field", help="column of a .jsonl or .parquet file")
    parser.add_argument("--window", type=int, help="tokens of a sample, block and window (default 2048 or the limit)")
    parser.add_argument("--heldout-windows", type=int, help="use only the first windows (default all)")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration samples (default 128)")
    parser.add_argument("--steps", type=int, default=500, help="steps of mask learning (default 500)")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks a step (default 8)")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate of the masks (default 5e-4)")
    parser.add_argument("--prox-lambda", type=float, default=0.1, help="ProxSparse: regulariser (default 0.1)")
    parser.add_argument("--prox-lr", type=float, default=1e-4, help="ProxSparse: learning rate (default 1e-4)")
    parser.add_argument("--prox-steps", type=int, default=400, help="ProxSparse: steps and samples (default 400)")
    parser.add_argument("--tile", type=int, default=128, help="rows and columns of a tile (default 128)")
    parser.add_argument("--targets", type=listed(float), default=(0.45, 0.35, 0.25), help="shares of zeros")
    parser.add_argument("--seeds", type=listed(int), default=(0, 1, 2), help="default 0,1,2")
    parser.add_argument("--cells", type=listed(str), default=("*",), help="names or patterns (default all)")
    parser.add_argument("--finished-only", action="store_true", help="run nothing: write what is there so far")
    parser.add_argument("--ablations", type=listed(_ablation_name), default=(), help=", ".join(ABLATIONS))
    parser.add_argument(
        "--compensations",
        type=listed(_compensation),
        default=("least_squares",),
        help="least_squares (default), sparsegpt",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--device", help="cpu or cuda (default cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default torch's)")
    return parser


def _ablation_name(text: str) -> str:
    return _one_of(ABLATIONS, text)


def _compensation(text: str) -> str:
    return _one_of(COMPENSATIONS, text)


def _one_of(known: Sequence[str], text: str) -> str:
    if text not in known:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {text!r}")
    return text


if __name__ == "__main__":
    main()
