"""Every way to make a mask that the demo compares, and what is measured of each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patch.artifacts.artifact import load_artifact, save_artifact
from patch.demo.settings import DemoSettings
from patch.evaluate.cross_entropy import perplexity
from patch.files.folder import write_folder
from patch.learn.run import learn
from patch.models.coverage import coverage
from patch.models.facts import fingerprints
from patch.models.keep_masks import measured_sparsity
from patch.models.structure import linear_at, maskable_linears
from patch.packed.load import load
from patch.pruning import TileOptions, compensate, get_method, prune_model, prune_tiles
from patch.runs.progress import StepLines
from patch.runs.stages import STAGE_FILE
from patch_kernels import payload_bytes, tiles_that_are_two_of_four

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a stage gives: its numbers, and how to write its folder with the stage file in it.
Outcome = tuple[dict[str, Any], Callable[[Path, bytes], None]]

DENSE = "dense"
ONE_SHOT = {"magnitude": "magnitude 2:4", "wanda": "Wanda 2:4", "sparsegpt": "SparseGPT 2:4"}


def hybrid_name(target: float) -> str:
    """Stage of the one-shot hybrid with this share of zeros."""
    return f"hybrid-{round(100 * target)}"


def learned_name(target: float) -> str:
    """Stage of the learned PATCH mask with this share of zeros."""
    return f"patch-{round(100 * target)}"


def reconstructed_name(name: str) -> str:
    """Stage in which the kept weights of stage `name` made up for its mask."""
    return f"{name}-reconstructed"


@dataclass(frozen=True)
class Bench:
    """The dense model of a demo and the tokens that all methods share.

    out           folder of the demo
    heldout       (tokens,) int64
    learn_blocks  (blocks, block_size) int64, in the order in which they are learned from
    say           receives each line of progress
    """

    out: Path
    settings: DemoSettings
    heldout: Tensor
    learn_blocks: Tensor
    say: Callable[[str], None]

    @property
    def calibration(self) -> Tensor:
        """(samples, block_size) int64: the first of the blocks that are learned from."""
        return self.learn_blocks[: self.settings.calibration_blocks]

    def dense_model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The dense model, read again."""
        return load(self.out / DENSE, dtype=dtype).eval()

    def perplexity(self, model: nn.Module) -> float:
        """Of all held-out tokens."""
        return perplexity(model.eval(), self.heldout, self.settings.model.block_size, batch_size=32)

    def baseline(self) -> Outcome:
        """The dense model itself."""
        model = self.dense_model()
        none_sparse = {name: torch.ones_like(m.weight, dtype=torch.bool) for name, m in maskable_linears(model).items()}

        def save(folder: Path, stage: bytes) -> None:
            write_folder(folder, lambda directory: (directory / STAGE_FILE).write_bytes(stage))

        return self._measured(model, none_sparse), save

    def one_shot(self, method: str) -> Outcome:
        """2:4 everywhere by a one-shot method."""
        model = self.dense_model()
        made_from = fingerprints(model)
        masks = prune_model(model, method, calibration=self.calibration, progress=False)
        meta = self._meta(model, masks, method, "2:4", 0.5) | made_from
        weights = _weights(model, masks) if get_method(method).updates_weights else None

        def save(folder: Path, stage: bytes) -> None:
            save_artifact(folder, masks, meta=meta, weights=weights, extra={STAGE_FILE: stage})

        return self._measured(model, masks), save

    def hybrid(self, target: float) -> Outcome:
        """Dense and 2:4 tiles by SparseGPT, the dense ones chosen over the whole model by what their masks cost."""
        model = self.dense_model()
        made_from = fingerprints(model)
        tiles = TileOptions(tile=self.settings.tile)
        pruned = prune_tiles(
            model, "sparsegpt", sparsity=target, calibration=self.calibration, tiles=tiles, progress=False
        )
        meta = self._meta(model, pruned.masks, "sparsegpt", "tiles", target) | made_from
        meta |= {"tile": tiles.tile, "tiles": dataclasses.asdict(tiles)}
        weights = _weights(model, pruned.masks)

        def save(folder: Path, stage: bytes) -> None:
            save_artifact(
                folder,
                pruned.masks,
                meta=meta,
                weights=weights,
                tile_scores=pruned.tile_scores,
                tile_is_sparse=pruned.tile_is_sparse,
                extra={STAGE_FILE: stage},
            )

        return self._measured(model, pruned.masks), save

    def learned(self, mode: str, target: float, prior: str) -> Outcome:
        """A mask learned on the frozen dense weights, from the masks of the stage `prior` and its choice of tiles."""
        model, start = self.dense_model(), load_artifact(self.out / prior)
        made_from = fingerprints(model)
        config = self.settings.learn.config(mode, target, self.settings.tile, self.settings.model.seed)
        outcome = learn(
            model,
            self.learn_blocks[: self.settings.learn.steps * config.global_batch_size],
            config,
            prior_masks=start.masks,
            tile_scores=start.tile_scores or None,
            progress=False,
            callbacks=[StepLines(lambda text: self.say(f"  {text}"))],
        )
        meta = self._meta(model, outcome.masks, config.mode, "patch", target) | made_from
        meta |= {"tile": config.tile, "seed": config.seed}
        metrics = "".join(json.dumps(record) + "\n" for record in outcome.metrics)

        def save(folder: Path, stage: bytes) -> None:
            extra: dict[str, bytes | str] = {STAGE_FILE: stage, "metrics.jsonl": metrics}
            save_artifact(folder, outcome.masks, meta=meta, tile_is_sparse=outcome.tile_is_sparse, extra=extra)

        return self._measured(model, outcome.masks), save

    def reconstructed(self, name: str) -> Outcome:
        """The dense weights under the masks of the stage `name`, the kept ones trained block by block."""
        model, artifact = self.dense_model(), load_artifact(self.out / name)
        compensate(
            model,
            artifact.masks,
            calibration=self.calibration,
            method="blocks",
            blocks=self.settings.blocks,
            progress=False,
        )
        weights = _weights(model, artifact.masks)

        def save(folder: Path, stage: bytes) -> None:
            extra = {STAGE_FILE: stage}
            save_artifact(folder, artifact.masks, meta=artifact.meta, weights=weights, extra=extra)

        return {"perplexity": self.perplexity(model)}, save

    def _meta(
        self, model: nn.Module, masks: Mapping[str, Tensor], method: str, pattern: str, sparsity: float
    ) -> dict[str, Any]:
        covered = coverage(model, masks).as_dict()
        return {"model": DENSE, "method": method, "pattern": pattern, "sparsity": sparsity, "coverage": covered}

    def _measured(self, model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Any]:
        """Perplexity in fp32, true sparsity from the masks, bytes of the layers as packed and as dense bf16."""
        return {
            "perplexity": self.perplexity(model),
            "sparsity": measured_sparsity(masks),
            "packed_bytes": sum(payload_bytes(tiles_that_are_two_of_four(keep)) for keep in masks.values()),
            "dense_bytes": 2 * sum(keep.numel() for keep in masks.values()),
        }


def _weights(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: linear_at(model, name).weight.detach() for name in masks}
