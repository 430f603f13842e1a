"""What the quality study works on: a model, its texts, and a folder of results that are not made twice.

A cell is a method at one sparsity; with a seed it has a folder of masks and numbers. What compensation makes of these
masks is a result of its own, so a study can be extended by compensations without pruning anything again.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from patch.evaluate.cross_entropy import perplexity
from patch.files.folder import write_folder
from patch.files.strict_json import dump_json
from patch.models.facts import fingerprints, model_fingerprint
from patch.models.keep_masks import apply_keep_masks, measured_sparsity
from patch.models.structure import maskable_linears
from patch.packed.load import load
from patch.pruning import ProxSparseConfig, compensate
from patch.pruning.options import BlockOptions
from patch.runs.stages import STAGE_FILE, digest, finished
from patch_kernels import payload_bytes, tiles_that_are_two_of_four


@dataclass(frozen=True)
class Settings:
    """What all cells share. `window` tokens are a calibration sample, a training block and a held-out window.

    nsamples               samples of pruning and of compensation layer by layer
    reconstruction_samples samples of reconstruction by blocks; the first nsamples are those of pruning
    """

    window: int
    nsamples: int = 128
    reconstruction_samples: int = 512
    blocks: BlockOptions = field(default_factory=BlockOptions)
    heldout_windows: int | None = None
    steps: int = 500
    batch_size: int = 8
    lr: float = 5e-4
    prox: ProxSparseConfig = field(default_factory=ProxSparseConfig)
    prox_samples: int = 400
    tile: tuple[int, int] = (128, 128)
    targets: tuple[float, ...] = (0.45, 0.35, 0.25, 0.125)


@dataclass(frozen=True)
class Cell:
    """One method at one sparsity; with a seed it is a result.

    name    folder name without the seed
    group   curve of the plot
    own     settings that no other cell shares; part of the key, as those of the study are
    needs   cells whose masks it starts from
    learns  whether it reads the training blocks
    make    (study, seed, {needed cell: its masks}) -> Made
    """

    name: str
    label: str
    group: str
    target: float
    make: Callable[[Study, int, dict[str, dict[str, Tensor]]], Made]
    own: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    learns: bool = False


@dataclass
class Made:
    """A pruned model: its masks, the tokens its method saw, and whether it changed the weights it kept."""

    model: nn.Module
    masks: dict[str, Tensor]
    tokens: int
    updates_weights: bool = False
    tile_is_sparse: dict[str, Tensor] | None = None


@dataclass
class Cost:
    """What a part of a cell took; the memory is None where it cannot be measured."""

    seconds: float = 0.0
    peak_mb: float | None = None

    def columns(self, suffix: str = "") -> dict[str, Any]:
        """As columns of a row, without a column for what is not known."""
        shown: dict[str, Any] = {f"seconds{suffix}": round(self.seconds, 1)}
        return shown if self.peak_mb is None else shown | {f"peak_mb{suffix}": round(self.peak_mb, 1)}


@contextmanager
def measured_cost() -> Iterator[Cost]:
    """Seconds, and growth of the peak resident memory, of the body."""
    cost = Cost()
    with harness.resident_peak() as peak:
        begin = time.perf_counter()
        yield cost
        cost.seconds = time.perf_counter() - begin
    if peak.grown_bytes is not None:
        cost.peak_mb = 1e-6 * peak.grown_bytes


class Study:
    """A model, its texts and the folder of the cells."""

    def __init__(self, out: Path, model: str, train: str, heldout: str, settings: Settings, **options: Any) -> None:
        """options: text_field, dtype, device, compensations and say, as the flags of the same names."""
        from transformers import AutoTokenizer

        self.out, self.model, self.train, self.settings = out, model, train, settings
        self.text_field = options.get("text_field")
        self.dtype, self.device = options.get("dtype", torch.float32), options.get("device")
        self.compensations: tuple[str, ...] = tuple(options.get("compensations", ("least_squares", "blocks")))
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
            "train": self._sampled(0)[1],
            "versions": [__version__, torch.__version__],
            "settings": [settings.window, settings.nsamples],
        }
        self._keys: dict[tuple[str, int], str] = {}

    def dense(self) -> nn.Module:
        """A fresh copy of the dense model."""
        return load(self.model, dtype=self.dtype).to(self.device or "cpu").eval()

    def calibration(self, seed: int, nsamples: int | None = None) -> Tensor:
        """The first calibration samples of a seed, (samples, window)."""
        return self._sampled(seed)[0][: nsamples or self.settings.nsamples]

    @functools.lru_cache(maxsize=4)  # noqa: B019 -- a study lives as long as the process
    def _sampled(self, seed: int) -> tuple[Tensor, str]:
        """As many samples as any cell takes: they are drawn one after the other, so fewer are the first of more."""
        settings = self.settings
        return calibration_windows(
            self.tokenizer,
            self.train,
            nsamples=max(settings.nsamples, settings.reconstruction_samples, settings.prox_samples),
            seqlen=settings.window,
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
        """Where a cell's masks and numbers are."""
        return self.out / "cells" / f"{cell.name}-seed{seed}"

    def key_of(self, cell: Cell, seed: int) -> str:
        """What the result of a cell was made from, once `result` was called for it."""
        return self._keys[cell.name, seed]

    def row(
        self, cell: Cell, seed: int, cells: dict[str, Cell], *, finished_only: bool = False
    ) -> dict[str, Any] | None:
        """Numbers of a cell and of its compensations: read where they were made with the same settings, else made now.

        finished_only  make nothing; None for a cell that would have to be made
        """
        result = self.result(cell, seed, cells, finished_only=finished_only)
        if result is None or not result["sparsity"]:
            return result
        for method in self.compensations:
            result = result | (self.compensated(cell, seed, method, finished_only=finished_only) or {})
        return result

    def result(
        self, cell: Cell, seed: int, cells: dict[str, Cell], *, finished_only: bool = False
    ) -> dict[str, Any] | None:
        """Numbers of a cell before any compensation, as in `row`; the masks of a finished one are in its folder."""
        needed = {name: self.result(cells[name], seed, cells, finished_only=finished_only) for name in cell.needs}
        key = digest(
            {
                "cell": [cell.name, cell.target, seed],
                "own": cell.own,
                "study": self.identity,
                "needs": [self._keys[name, seed] for name in needed],
            }
        )
        self._keys[cell.name, seed] = key
        folder = self.folder(cell, seed)
        found = finished(folder, key)
        if found is not None or finished_only:
            return found
        self.say(f"{cell.name}, seed {seed}: running")
        masks = {name: load_artifact(self.folder(cells[name], seed)).masks for name in needed}
        self.calibration(seed)  # read before its time and memory are measured, as the training text is
        if cell.learns:
            _ = self.blocks
        with measured_cost() as cost:
            made = cell.make(self, seed, masks)
        result = self._measure(made) | cost.columns()
        stage = dump_json({"key": key, "result": result})
        if made.masks:
            meta = {"method": cell.label, "sparsity": cell.target, "seed": seed, "model": self.model}
            meta |= self.made_from
            save_artifact(folder, made.masks, meta=meta, tile_is_sparse=made.tile_is_sparse, extra={STAGE_FILE: stage})
        else:
            write_stage(folder, stage)
        self._say_result(f"{cell.name}, seed {seed}", result)
        return result

    def compensated(self, cell: Cell, seed: int, method: str, *, finished_only: bool = False) -> dict[str, Any] | None:
        """Numbers of the dense weights under a finished cell's masks once `method` made up for them."""
        nsamples, own = self.compensation_settings(method)
        key = digest({"cell": self._keys[cell.name, seed], "method": method, "own": own})
        folder = self.out / "compensated" / f"{cell.name}-seed{seed}-{method}"
        found = finished(folder, key)
        if found is not None or finished_only:
            return found
        self.say(f"{cell.name}, seed {seed}: compensating ({method})")
        masks = load_artifact(self.folder(cell, seed)).masks
        self.calibration(seed, nsamples)
        with measured_cost() as cost:
            model = self.reconstructed(masks, seed, method)
        result = {f"compensated_{method}": self.perplexity(model), f"tokens_{method}": nsamples * self.settings.window}
        result |= cost.columns(f"_{method}")
        write_stage(folder, dump_json({"key": key, "result": result}))
        self._say_result(f"{cell.name}, seed {seed}, {method}", result)
        return result

    def reconstructed(self, masks: dict[str, Tensor], seed: int, method: str, stages: Path | None = None) -> nn.Module:
        """The dense model under the masks, its kept weights updated by a compensation with the study's settings.

        stages  with "blocks": folder that keeps the blocks, from which the same call takes them again
        """
        model = self.dense()
        nsamples, _ = self.compensation_settings(method)
        blocks: dict[str, Any] = {}
        if method == "blocks":
            blocks = {"blocks": dataclasses.replace(self.settings.blocks, seed=seed), "stages": stages}
        compensate(
            model,
            masks,
            calibration=self.calibration(seed, nsamples),
            method=method,
            progress=False,
            device=self.device,
            **blocks,
        )
        return model

    def compensation_settings(self, method: str) -> tuple[int, dict[str, Any]]:
        """(samples that a compensation sees, settings that are part of its key)."""
        if method != "blocks":
            return self.settings.nsamples, {}
        nsamples = self.settings.reconstruction_samples
        return nsamples, {"samples": nsamples} | dataclasses.asdict(self.settings.blocks.for_samples(nsamples))

    def _measure(self, made: Made) -> dict[str, Any]:
        """Perplexity as the method leaves the model and of the dense weights under its masks; bytes and tokens."""
        dense = self.dense()
        dense_bytes = 2 * sum(linear.weight.numel() for linear in maskable_linears(dense).values())
        result: dict[str, Any] = {
            "sparsity": measured_sparsity(made.masks) if made.masks else 0.0,
            "tokens": made.tokens,
            "linear_bytes": dense_bytes,
            "dense_linear_bytes": dense_bytes,
        }
        if made.updates_weights or not made.masks:
            result["perplexity"] = self.perplexity(made.model)
        if made.masks:
            result["linear_bytes"] = sum(
                payload_bytes(tiles_that_are_two_of_four(keep)) for keep in made.masks.values()
            )
            apply_keep_masks(dense, made.masks)
            result["masks_alone"] = self.perplexity(dense)
            # The same model where the method leaves the weights as they are.
            result.setdefault("perplexity", result["masks_alone"])
        return result

    def _say_result(self, what: str, result: dict[str, Any]) -> None:
        shown = [f"{name} {result[name]:.3f}" for name in quality_report.PERPLEXITIES if name in result]
        seconds = [f"{value:.0f} s" for name, value in result.items() if name.startswith("seconds")]
        self.say(f"{what}: {', '.join(shown + seconds)}")


def write_stage(folder: Path, stage: bytes) -> None:
    """A folder of numbers alone, as `patch.runs.stages.finished` reads it."""
    write_folder(folder, lambda directory: (directory / STAGE_FILE).write_bytes(stage))
