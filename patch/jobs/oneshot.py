"""One-shot as a job: measure, reorder, prune, reconstruct, pack, open again; every stage is kept until all are done.

Stages are folders in NAME.stages beside the packed folder NAME. Each says what it was made from, so the same job goes
on where it stopped, and one with another model, text or setting makes again what depends on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from patch.artifacts.apply import apply_artifact
from patch.artifacts.artifact import load_artifact, save_artifact
from patch.data.split import Texts
from patch.evaluate.decode import WARM_UP_TOKENS, decode_milliseconds
from patch.files.folder import foreign_files, write_folder
from patch.files.paths import require_place_for_folder
from patch.files.progress import duration, say
from patch.files.strict_json import dump_json
from patch.jobs.card import CARD, card_text
from patch.models.coverage import coverage
from patch.models.facts import context_length, fingerprints, processor, versions
from patch.models.keep_masks import keep_masks
from patch.models.modes import streamed
from patch.models.packed_size import packed_bytes
from patch.models.structure import linear_at, vocabulary_size
from patch.packed.convert import pack_model
from patch.packed.load import open_as
from patch.packed.save import save_dense, save_packed
from patch.packed.swap import cast_model
from patch.pruning.one_shot import heldout_perplexity, prune_hybrid, reconstruct, reordered, verdict
from patch.pruning.one_shot_settings import OneShotSettings
from patch.pruning.permutation import ChannelOrders, apply_orders
from patch.runs.folders import require_nothing_else
from patch.runs.stages import STAGE_FILE, digest, finished, remove_stages, stages_folder

DENSE, REORDER, PRUNE, RECONSTRUCT, PACK = STAGES = ("dense", "reorder", "prune", "reconstruct", "pack")
# The reordered dense model, which masks of kept stages belong to.
REORDERED = "reordered"
_ORDERS = "orders.safetensors"
_INNER, _HIDDEN = "inner.", "hidden"
_LEFTOVERS = ("*.parts", "*.tmp-*", "*.old-*")
_PROMPT_TOKENS = 16
DECODED_TOKENS = 32


def check_stages_folder(out: Path) -> None:
    """Refuse a place for the stages that holds other things, or cannot be written; `out` is checked by the caller."""
    folder = require_place_for_folder("--out", stages_folder(out))
    require_nothing_else("--out", folder, (*STAGES[:-1], REORDERED, *_LEFTOVERS))
    for stage in (*STAGES[:-1], REORDERED):
        if foreign := foreign_files(folder / stage):
            got = f"{folder / stage} holds {foreign}"
            raise ValueError(
                f"--out: expected stages of an earlier run, {got}. Move them away, or choose another --out."
            )


def kept_stages(out: Path) -> list[str]:
    """What is complete, whatever it was made from: names of stages, and of those of which there are parts."""
    folder = stages_folder(out)
    done = [name for name in STAGES if (folder / name / STAGE_FILE).is_file()]
    return done + [f"parts of {name}" for name in STAGES if _parts(folder, name).is_dir()]


def _parts(folder: Path, name: str) -> Path:
    """Where a stage keeps what it has, until it is complete."""
    return folder / f"{name}.parts"


@dataclass(frozen=True)
class Job:
    """What is to be done, and with what.

    out          folder of the packed model
    load         gives the dense model, as its weights are saved; called again once a stage has changed them
    tokenizer    saved beside the packed model
    texts        to prune with and to measure on
    settings     of pruning and reconstruction
    model        name of the dense model, for the card and the artifacts
    command      that makes this again, for the card
    device       where blocks are put while they are worked on; None: where the model is
    replace      whether an earlier packed folder at `out` is replaced
    keep_stages  whether the stages stay when all is done
    """

    out: Path
    load: Callable[[], PreTrainedModel]
    tokenizer: Any
    texts: Texts
    settings: OneShotSettings
    model: str
    command: str
    device: torch.device | None = None
    replace: bool = False
    keep_stages: bool = False

    def run(self) -> Outcome:
        """Do what is not done yet. raises RuntimeError when the packed folder does not give the model's logits."""
        return _Run(self).run()


@dataclass(frozen=True)
class Outcome:
    """Numbers of a finished job: the results of its stages by name, and where the packed model is."""

    out: Path
    numbers: dict[str, dict[str, Any]]
    warnings: list[str]


class _Run:
    """A job under way: its stages so far, and the dense model while nothing has changed it."""

    def __init__(self, job: Job):
        self.job, self.folder = job, stages_folder(job.out)
        self._dense: PreTrainedModel | None = job.load()
        self._orders: ChannelOrders | None = None
        self.made_from = fingerprints(self._dense)
        self.numbers: dict[str, dict[str, Any]] = {}
        self.key: dict[str, Any] = {
            "versions": {name: versions()[name] for name in ("patch-llm", "torch", "transformers")},
            "model": self.made_from,
            "dtype": str(self._dense.dtype),
            "heldout": job.texts.sha256("heldout"),
        }

    def run(self) -> Outcome:
        job = self.job
        self._stage(DENSE, {}, self._measure_dense)
        settings = dataclasses.asdict(job.settings)
        calibration = job.texts.sha256("calibration")
        if settings.pop("reorder"):
            self._stage(REORDER, {"calibration": calibration}, self._reorder)
            self._read_orders()
        rebuilding = {name: settings.pop(name) for name in ("reconstruct", "epochs", "batch_size")}
        self._stage(PRUNE, settings | {"calibration": calibration}, self._prune)
        self._stage(RECONSTRUCT, rebuilding, self._reconstruct)
        out, warnings = self._pack()
        if not job.keep_stages:
            self._remove_stages()
        elif self._orders is not None:
            save_dense(self._take(), job.tokenizer, self.folder / REORDERED)
        else:
            self._remove_reordered()
        return Outcome(out, self.numbers, warnings)

    def _stage(self, name: str, settings: Mapping[str, Any], make: Callable[[Callable[..., bytes]], None]) -> None:
        """Read a stage, or make it; its key is part of those that follow."""
        self.key = self.key | {name: settings}
        key = digest(self.key)
        found = finished(self.folder / name, key)
        if found is None:
            start = self._begin(name)

            def sealed(**result: Any) -> bytes:
                self.numbers[name] = result | {"seconds": round(time.monotonic() - start, 3)}
                return dump_json({"key": key, "result": self.numbers[name]})

            make(sealed)
        else:
            self.numbers[name] = found
            say(f"{self._heading(name)}: done before")

    def _begin(self, name: str) -> float:
        say(self._heading(name))
        return time.monotonic()

    def _heading(self, name: str) -> str:
        wanted = [stage for stage in STAGES if stage != REORDER or self.job.settings.reorder]
        return f"stage {wanted.index(name) + 1} of {len(wanted)}, {name}"

    def _model(self) -> PreTrainedModel:
        """The dense model, to read only."""
        if self._dense is None:
            self._dense = self.job.load()
            if self._orders is not None:
                apply_orders(self._dense, self._orders)
        return self._dense

    def _take(self) -> PreTrainedModel:
        """The dense model, to change."""
        model, self._dense = self._model(), None
        return model

    def _perplexity(self, model: PreTrainedModel) -> float:
        return heldout_perplexity(model, self.job.texts.heldout, device=self.job.device)

    # -- stages ---

    def _measure_dense(self, sealed: Callable[..., bytes]) -> None:
        content = sealed(perplexity=self._perplexity(self._model()))
        write_folder(self.folder / DENSE, lambda directory: (directory / STAGE_FILE).write_bytes(content))

    def _reorder(self, sealed: Callable[..., bytes]) -> None:
        orders = reordered(self._take(), self.job.texts.calibration, device=self.job.device)
        tensors: dict[str, Tensor] = {}
        if orders is not None:
            tensors = {f"{_INNER}{name}": order for name, order in orders.inner.items()}
            tensors |= {} if orders.hidden is None else {_HIDDEN: orders.hidden}
        content = sealed(layers=0 if orders is None else len(orders.inner), residual=_HIDDEN in tensors)

        def write(directory: Path) -> None:
            save_file(tensors, directory / _ORDERS)
            (directory / STAGE_FILE).write_bytes(content)

        write_folder(self.folder / REORDER, write)

    def _read_orders(self) -> None:
        """From here on the dense model is the reordered one."""
        tensors = load_file(self.folder / REORDER / _ORDERS)
        if tensors:
            inner = {name.removeprefix(_INNER): order for name, order in tensors.items() if name != _HIDDEN}
            self._orders = ChannelOrders(inner, tensors.get(_HIDDEN))
            self._dense = None
            self.made_from = fingerprints(self._model())

    def _prune(self, sealed: Callable[..., bytes]) -> None:
        job, model = self.job, self._take()
        parts = _parts(self.folder, PRUNE)
        hybrid = prune_hybrid(model, job.texts.calibration, job.settings, stages=parts, device=job.device)
        result = {"perplexity": self._perplexity(model), "coverage": coverage(model, hybrid.masks).as_dict()}
        save_artifact(
            self.folder / PRUNE,
            hybrid.masks,
            meta=self._meta(),
            tile_scores=hybrid.tile_scores,
            tile_is_sparse=hybrid.tile_is_sparse,
            extra={STAGE_FILE: sealed(**result)},
        )
        remove_stages(parts)

    def _reconstruct(self, sealed: Callable[..., bytes]) -> None:
        job, model = self.job, self._take()
        masks = load_artifact(self.folder / PRUNE).masks
        parts = _parts(self.folder, RECONSTRUCT)
        done = reconstruct(model, masks, job.texts.calibration, job.settings, stages=parts, device=job.device)
        errors = done.block_errors or done.layer_errors
        before, after = (sum(pair[i] for pair in errors.values()) / max(1, len(errors)) for i in (0, 1))
        result = {"perplexity": self._perplexity(model), "error_before": before, "error_after": after}
        weights = {name: linear_at(model, name).weight.detach() for name in masks}
        extra = {STAGE_FILE: sealed(**result)}
        save_artifact(self.folder / RECONSTRUCT, masks, meta=self._meta(), weights=weights, extra=extra)
        remove_stages(parts)

    def _pack(self) -> tuple[Path, list[str]]:
        """Pack what the stages made, open it again, measure it, write its card; where it is, and what to warn of."""
        job, start, model = self.job, self._begin(PACK), self._take()
        apply_artifact(model, load_artifact(self.folder / RECONSTRUCT))
        vocabulary = vocabulary_size(model)
        packed, plain = packed_bytes(keep_masks(model))
        if model.dtype not in (torch.float16, torch.bfloat16):
            cast_model(model, torch.bfloat16)
        # With zeros where it is pruned, which makes a dense layer neither slower nor faster.
        dense_ms = self._decode(model)
        pack_model(model)
        warnings: list[str] = []

        def finish(directory: Path) -> None:
            again = open_as(type(model), str(directory)).to(model.device).eval()  # type: ignore[arg-type]
            self._require_same_logits(model, again)
            perplexity = self._perplexity(again)
            self.numbers[PACK] = {
                "perplexity": perplexity,
                "dtype": str(again.dtype).removeprefix("torch."),
                "bytes": packed,
                "dense_bytes": plain,
                "dense_ms": dense_ms,
                "packed_ms": self._decode(again),
                "seconds": round(time.monotonic() - start, 3),
            }
            dense, pruned = (self.numbers[name]["perplexity"] for name in (DENSE, PRUNE))
            sizes = {"packed_bytes": packed, "dense_bytes": plain}
            warnings.extend(verdict(dense, perplexity, vocabulary, pruned, **sizes))
            (directory / CARD).write_text(self._card(model, warnings), encoding="utf-8")

        return save_packed(model, job.tokenizer, job.out, replace=job.replace, finish=finish), warnings

    def _require_same_logits(self, model: PreTrainedModel, again: PreTrainedModel) -> None:
        window, logits = self.job.texts.heldout[:1], []
        for part in (model.eval(), again):
            with streamed(part, self.job.device), torch.no_grad():
                logits.append(part(input_ids=window.to(part.device)).logits.cpu())
        expected, got = logits
        if not torch.equal(expected, got):
            differ = f"they differ by up to {(expected - got).abs().max().item()}. Please report this"
            raise RuntimeError(f"expected the logits of the saved model, {differ} with `patch-llm info --json`.")

    def _decode(self, model: PreTrainedModel) -> float | None:
        """Milliseconds for a new token; None where the context is too short for some, or the model is offloaded."""
        prompt, limit = self.job.texts.heldout[0, :_PROMPT_TOKENS], context_length(model)
        is_short = limit is not None and limit < len(prompt) + WARM_UP_TOKENS + DECODED_TOKENS
        if is_short or self.job.device is not None:
            return None
        return decode_milliseconds(model, prompt, DECODED_TOKENS)

    def _card(self, model: PreTrainedModel, warnings: list[str]) -> str:
        job = self.job
        facts = {
            "model": job.model,
            "folder": job.out.name,
            "command": job.command,
            "text": job.texts,
            "settings": job.settings,
            "machine": _machine(model.device),
            "versions": versions(),
        }
        return card_text(facts, self.numbers, warnings)

    def _meta(self) -> dict[str, Any]:
        job = self.job
        meta: dict[str, Any] = {"model": job.model, "method": job.settings.method, "pattern": "tiles"}
        meta |= {"sparsity": job.settings.sparsity, "tile": job.settings.tile, "versions": versions()}
        return meta | self.made_from | {"text_sha256": job.texts.text_sha256}

    def _remove_reordered(self) -> None:
        """Of an earlier job that kept its stages."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder / REORDERED)

    def _remove_stages(self) -> None:
        self._remove_reordered()
        for name in STAGES:
            remove_stages(_parts(self.folder, name))
        remove_stages(self.folder)


def _machine(device: torch.device) -> str:
    """What a model runs on, for people."""
    return processor(device) if device.type == "cuda" else f"{processor(device)}, {torch.get_num_threads()} threads"


def summary(outcome: Outcome) -> list[str]:
    """Lines for people: perplexity after every stage, bytes, time of a token."""
    numbers = outcome.numbers
    dense = numbers[DENSE]["perplexity"]
    lines = ["held-out perplexity, lower is better:"]
    for name, label in LABELS.items():
        value = numbers[name]["perplexity"]
        took = duration(numbers[name]["seconds"])
        lines.append(f"  {label:<14}{value:12.4f}   {value / dense:6.3f}x   took {took}")
    packed = numbers[PACK]
    share = packed["bytes"] / packed["dense_bytes"]
    lines.append(
        f"bytes of the masked layers: {packed['dense_bytes']:,} dense -> {packed['bytes']:,} packed ({share:.3f}x)"
    )
    if packed["dense_ms"] is not None:
        lines.append(f"a new token: {packed['dense_ms']:.2f} ms dense -> {packed['packed_ms']:.2f} ms packed")
    return lines


LABELS = {DENSE: "dense", PRUNE: "pruned", RECONSTRUCT: "reconstructed", PACK: "packed"}
