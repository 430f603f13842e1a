"""Scores of a model's tiles from an unstructured reference: where mask learning starts from."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from patch.priors import tile_scores
from patch.pruning.model import prune_model
from patch.pruning.registry import reference_method


def reference_tile_scores(
    model: nn.Module, method: str, sparsity: float, tile: tuple[int, int], **options: Any
) -> dict[str, Tensor]:
    """Share of weights that the unstructured reference of a method keeps in each tile, {layer: (rows, cols) float32}.

    model     with its dense weights; not changed, a copy of it is pruned
    sparsity  share of zeros of the reference
    options   of prune_model: calibration, exclude, damping, ...
    A method that knows only 2:4 has Wanda as its reference.
    """
    masks = prune_model(
        copy.deepcopy(model), reference_method(method), pattern="unstructured", sparsity=sparsity, **options
    )
    return {name: tile_scores(keep, tile) for name, keep in masks.items()}
