"""Checks of everything `patch.learn.learn` is given, made before any work."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from patch.learn.config import LearnConfig
from patch.learn.masked_linear import two_of_four
from patch.models.checks import (
    require_finite_model,
    require_layers,
    require_mask,
    require_tokens,
    require_trained_dtype,
)
from patch.pruning.options import PruneOptions
from patch.pruning.selection import check_weight
from patch_kernels import tile_grid
from patch_kernels.checks import FLOATS, require_finite, require_tensor
from patch_kernels.ops.tile_linear import require_two_of_four


def check_inputs(
    model: nn.Module,
    blocks: Tensor,
    config: LearnConfig,
    linears: Mapping[str, nn.Linear],
    prior_masks: Mapping[str, Tensor] | None,
    tile_scores: Mapping[str, Tensor] | None,
) -> None:
    """raises TypeError or ValueError with what was expected, what came and what to do."""
    if not isinstance(config, LearnConfig):
        raise TypeError(f"config: expected a LearnConfig, got {type(config).__name__}. Use LearnConfig.from_preset.")
    check_model(linears)
    require_finite_model(model)
    check_precision(config, linears)
    check_blocks(model, blocks, config)
    if config.mode == "tile" and prior_masks is None:
        advice = "Prune one-shot first, or use mode joint."
        raise ValueError(f"prior_masks: expected 2:4 keep masks for mode tile, which keeps them, got none. {advice}")
    if prior_masks is not None:
        require_layers(prior_masks, linears, "prior_masks")
        for name, keep in prior_masks.items():
            what = f"prior_masks['{name}']"
            require_mask(keep, linears[name].weight.shape, what)
            if config.mode == "tile":
                all_sparse = torch.ones(tile_grid(tuple(keep.shape)), dtype=torch.bool)
                advice = "Mode tile keeps them; prune with pattern 2:4 or tiles."
                require_two_of_four(what, two_of_four(keep, linears[name].weight), all_sparse, advice)
        _require_patterns(prior_masks)
    if tile_scores is not None:
        require_layers(tile_scores, linears, "tile_scores")
        for name, scores in tile_scores.items():
            what, advice = f"tile_scores['{name}']", "Compute them with the tile of the configuration."
            grid = tile_grid(tuple(linears[name].weight.shape), config.tile)
            require_tensor(what, scores, dtypes=FLOATS, shape=grid, advice=advice)
            require_finite(what, scores, advice)


def _require_patterns(prior_masks: Mapping[str, Tensor]) -> None:
    """Refuse priors that say nothing about 2:4 patterns. Dense tiles may keep all, so not every group has 2 of 4."""
    advice = "Prune one-shot with pattern 2:4, or leave prior_masks out."
    for name, keep in prior_masks.items():
        if not keep.any():
            expected = "expected a 2:4 keep mask, True where a weight stays"
            raise ValueError(f"prior_masks['{name}']: {expected}, got one that keeps nothing. {advice}")
    if not any((keep.reshape(-1, 4).sum(1, dtype=torch.uint8) == 2).any() for keep in prior_masks.values()):
        raise ValueError(f"prior_masks: expected 2:4 keep masks, got none with 2 of 4 in any group. {advice}")


def check_model(linears: Mapping[str, nn.Linear]) -> None:
    """Refuse layers that cannot be learned: not 2:4, in another dtype, without values, not finite, pruned already."""
    for name, linear in linears.items():
        check_weight(linear.weight, PruneOptions(), f"layer '{name}'")
        require_trained_dtype(linear.weight, f"layer '{name}'")
        keep = getattr(linear, "keep_mask", None)
        if keep is not None and not keep.all():
            advice = "Load the dense model and pass the masks as prior_masks."
            raise ValueError(f"layer '{name}': expected dense weights, got a pruned layer. {advice}")


def check_precision(config: LearnConfig, linears: Mapping[str, nn.Linear]) -> None:
    double = [name for name, linear in linears.items() if linear.weight.dtype == torch.float64]
    for setting in ("moments", "logits_dtype"):
        if double and (value := getattr(config, setting)) != "float32":
            wanted = f"expected float32 for the float64 weights of {double[0]}, got {value}"
            raise ValueError(f"{setting}: {wanted}. Leave it out, or load the model with dtype=torch.bfloat16.")


def check_blocks(model: nn.Module, blocks: Tensor, config: LearnConfig) -> None:
    """Refuse training blocks that the model cannot read, or that are fewer than a step takes."""
    require_tokens(model, blocks, "train_blocks", least=2, positions="learned")
    config.total_steps(blocks.shape[0])
