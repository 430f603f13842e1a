"""Pruning to dense and 2:4 tiles: which tiles stay dense is chosen for the whole model, before any is pruned."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patch.files.progress import tracked
from patch.mask import expand_tiles, tile_areas, tile_counts, tile_sums
from patch.models.facts import weights_fingerprint
from patch.models.keep_masks import keep_mask_of
from patch.models.modes import placed
from patch.models.structure import decoder_blocks, linear_at
from patch.priors import tile_scores
from patch.pruning.experts import FewTokens
from patch.pruning.fisher import tile_losses
from patch.pruning.options import ExpertOptions, PruneOptions, TileOptions
from patch.pruning.registry import METHODS, Method
from patch.pruning.selection import Pruned, keep_two_of_four, zeros_first
from patch.pruning.sequential import store, update_blocks
from patch.pruning.tiles import choose_dense_tiles
from patch.runs.identity import data_fingerprint, tensors_fingerprint
from patch.runs.stages import digest


@dataclass(frozen=True)
class Hybrid:
    """What a model was pruned to; every dict is keyed by layer name.

    masks           keep (N, K) bool: all of a dense tile, two of every four elsewhere
    tile_is_sparse  (rows, cols) bool
    tile_scores     (rows, cols) float64: what tiles were chosen by, more for a tile that costs more to mask
    """

    masks: dict[str, Tensor]
    tile_is_sparse: dict[str, Tensor]
    tile_scores: dict[str, Tensor]


@dataclass(frozen=True)
class TilePruning:
    """A pruning to tiles that passed every check (`patch.pruning.model`), and has changed nothing yet.

    name         of the method in the registry
    options      pattern "tiles" and the share of zeros
    linears      layers to prune, by name
    calibration  (samples, tokens) int64; None: neither the method nor the choice of tiles reads any
    experts      what is done about experts with few tokens; None: the defaults
    stages       folder in which a long choice of tiles keeps what it has: the same pruning again goes on there
    """

    model: nn.Module
    name: str
    method: Method
    options: PruneOptions
    tiles: TileOptions
    linears: Mapping[str, nn.Linear]
    calibration: Tensor | None
    experts: ExpertOptions | None = None
    stages: Path | None = None
    device: torch.device | str | None = None
    progress: bool = True
    # Of the first pass over the text; experts are counted and named once.
    _few: list[FewTokens] = field(default_factory=list)

    def run(self) -> Hybrid:
        """Choose the tiles of the dense model, then prune in place what is not in them."""
        self._few.clear()
        masks, errors = self._two_of_four()
        if self.tiles.by == "fisher":
            scores = self._losses(masks)
        elif self.tiles.by == "share":
            scores = self._shares(masks)
        else:
            scores = errors
        dense = choose_dense_tiles(scores, masks, self.options.sparsity, self.tiles.tile, self._groups())
        self._prune(dense)
        kept = {name: keep_mask_of(linear) for name, linear in self.linears.items()}
        return Hybrid(kept, {name: ~grid for name, grid in dense.items()}, scores)

    def new_statistics(self, weight: Tensor) -> Any:
        """Empty statistics of the pruning itself; None for a method without."""
        return self.method.new_statistics(weight, self.options) if self.method.reads_inputs else None

    def _two_of_four(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """2:4 masks of the dense model, and the share of its layer's cost that each tile then adds.

        By the method's own costs; by Wanda's where only the masks are needed.
        """
        scorer = METHODS["wanda"] if self.method.reads_inputs and self.tiles.by != "error" else self.method
        masks: dict[str, Tensor] = {}
        errors: dict[str, Tensor] = {}

        def note(name: str, linear: nn.Linear, statistics: Any) -> None:
            costs = scorer.costs(linear.weight, statistics, self.options)
            keep, errors[name] = tile_errors(linear.weight, costs, self.tiles.tile)
            masks[name] = keep.cpu()

        self._for_each(scorer, note, "2:4 masks, to choose tiles")
        return masks, errors

    def _losses(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self.calibration is not None
        samples = self.calibration[: self.tiles.samples]
        key = ""
        if self.stages is not None:
            made_of = [weights_fingerprint(self.model), tensors_fingerprint({"masks": masks}), asdict(self.tiles)]
            key = digest([*made_of, data_fingerprint(samples)])
        return tile_losses(
            self.model,
            masks,
            samples,
            self.tiles.tile,
            device=self.device,
            stages=self.stages,
            key=key,
            progress=self.progress,
        )

    def _shares(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Share of a tile that the method's unstructured mask keeps, times what the tile gains: so the share ranks."""
        twin = copy.deepcopy(self.model)
        linears = {name: linear_at(twin, name) for name in self.linears}
        other = replace(self, model=twin, linears=linears, _few=[])
        options, tile = replace(self.options, pattern="unstructured"), self.tiles.tile
        scores: dict[str, Tensor] = {}

        def update(name: str, linear: nn.Linear, statistics: Any) -> Pruned:
            pruned = self.method.prune(linear.weight, statistics, options)
            gains = tile_areas(tile, _shape(masks[name])) - tile_counts(masks[name], tile)
            scores[name] = tile_scores(pruned.keep, tile).cpu().double() * gains
            return pruned

        other._for_each(self.method, update, f"unstructured reference ({self.name})")
        return scores

    def _groups(self) -> dict[str, object] | None:
        """What shares a budget, by layer."""
        if self.tiles.budget == "model":
            return None
        if self.tiles.budget == "layer":
            return {name: name for name in self.linears}
        _, blocks = decoder_blocks(self.model)
        block_of = {module: index for index, block in enumerate(blocks) for module in block.modules()}
        return {name: block_of.get(linear) for name, linear in self.linears.items()}

    def _prune(self, dense: Mapping[str, Tensor]) -> None:
        options, tile = two_of_four(self.options), self.tiles.tile

        def update(name: str, linear: nn.Linear, statistics: Any) -> Pruned:
            stays = expand_tiles(dense[name], tile, _shape(linear.weight)).to(linear.weight.device)
            return self.method.prune(linear.weight, statistics, options, stays)

        self._for_each(self.method, update, f"pruning ({self.name})")

    def _for_each(self, method: Method, update: Any, what: str) -> None:
        """Call update(name, layer, statistics as `method` gathers them) for every layer, and store what it returns."""
        if method.reads_inputs:
            assert self.calibration is not None
            new_statistics = partial(method.new_statistics, options=self.options)
            few = update_blocks(
                self.model,
                self.linears,
                self.calibration,
                new_statistics,
                update,
                device=self.device,
                what=what,
                progress=self.progress,
                experts=self.experts,
                few=self._few[0] if self._few else None,
            )
            self._few[:] = [few]
            return
        for name, linear in tracked(self.linears.items(), what, "layer", show=self.progress):
            with placed(linear, self.device), torch.no_grad():
                pruned = update(name, linear, None)
                if pruned is not None:
                    store(linear, pruned)


def two_of_four(options: PruneOptions) -> PruneOptions:
    """The options of pattern "tiles" for what is in no dense tile."""
    return replace(options, pattern="2:4", sparsity=0.5)


def tile_errors(weight: Tensor, costs: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The 2:4 mask (N, K) of least cost, and the share of all costs that it loses in each tile, (rows, cols) float64.

    costs  (N, K): what pruning a weight costs
    """
    keep = keep_two_of_four(zeros_first(costs, weight == 0))
    lost = tile_sums(costs.masked_fill(keep, 0), tile).cpu()
    return keep, lost / costs.sum(dtype=torch.float64).cpu().clamp(min=torch.finfo(torch.float64).tiny)


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]
