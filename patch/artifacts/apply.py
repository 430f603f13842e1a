"""Puts an artifact on the dense model it was made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from patch.artifacts.artifact import Artifact


def apply_artifact(model: nn.Module, artifact: Artifact) -> None:
    """Put an artifact's masks (weights that its method updated, adapters) on the dense model it was made from."""
    import torch

    from patch.models.keep_masks import apply_keep_masks
    from patch.models.structure import maskable_linears
    from patch.slim.compress import restore_compression, stored_options

    options = stored_options(artifact.meta.get("compression"))  # refused before a weight changes
    left_dense = [name for name in maskable_linears(model) if name not in artifact.masks]
    with torch.no_grad():
        for name, weight in artifact.weights.items():
            model.get_submodule(name).weight.copy_(weight)
    apply_keep_masks(model, artifact.masks, exclude=left_dense)
    restore_compression(model, artifact.adapters, options)
