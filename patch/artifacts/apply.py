"""Puts an artifact on the dense model it was made from."""

from __future__ import annotations

import torch
from torch import nn

from patch.artifacts.artifact import Artifact, require_made_from
from patch.models.coverage import warn_of_dense_rest
from patch.models.keep_masks import apply_keep_masks, check_keep_masks
from patch.models.structure import linear_at, maskable_linears
from patch.slim.compress import restore_compression, stored_options


@torch.no_grad()
def apply_artifact(
    model: nn.Module, artifact: Artifact, *, every_layer: bool = False, masks_of_another_model: bool = False
) -> None:
    """Put an artifact's masks (weights that its method updated, adapters) on the dense model it was made from.

    every_layer  refuse an artifact that leaves layers dense
    masks_of_another_model  also take masks, without weights, of another model; recorded in artifact.meta
    raises       ValueError or TypeError before a weight changes.
    """
    options = stored_options(artifact.meta.get("compression"))
    left_dense = [] if every_layer else [name for name in maskable_linears(model) if name not in artifact.masks]
    check_keep_masks(model, artifact.masks, left_dense)
    has_weights = bool(artifact.weights or artifact.adapters)
    artifact.meta = require_made_from(
        model, artifact.meta, artifact.folder, has_weights=has_weights, masks_of_another_model=masks_of_another_model
    )
    for name, weight in artifact.weights.items():
        linear_at(model, name).weight.copy_(weight)
    apply_keep_masks(model, artifact.masks, exclude=left_dense)
    warn_of_dense_rest(model, artifact.masks)
    restore_compression(model, artifact.adapters, options)
