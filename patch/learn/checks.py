"""Checks of everything `patch.learn.learn` is given, made before any work."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from patch.learn.config import LearnConfig
from patch.mask import tile_grid

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


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
        raise TypeError(
            f"config: expected a LearnConfig, got {type(config).__name__}; use LearnConfig.from_preset('joint', 0.45)"
        )
    check_model(linears)
    check_precision(config, linears)
    check_blocks(model, blocks, config)
    if config.mode == "tile" and prior_masks is None:
        raise ValueError(
            "prior_masks: expected 2:4 keep masks for mode tile, which keeps their patterns, got none; prune "
            "one-shot first or use mode joint"
        )
    if prior_masks is not None:
        _check_names("prior_masks", prior_masks, linears)
        for name, keep in prior_masks.items():
            _check_mask(name, keep, linears[name], exact=config.mode == "tile")
    if tile_scores is not None:
        _check_names("tile_scores", tile_scores, linears)
        for name, scores in tile_scores.items():
            _check_scores(name, scores, tile_grid(config.tile, tuple(linears[name].weight.shape)))


def check_model(linears: Mapping[str, nn.Linear]) -> None:
    for name, linear in linears.items():
        weight = linear.weight
        if weight.dtype not in _DTYPES:
            raise ValueError(
                f"model: expected float32, bfloat16 or float64 weights, got {weight.dtype} in {name}; load "
                "the model with dtype=torch.bfloat16"
            )
        if weight.shape[1] % 4:
            raise ValueError(
                f"model: expected in_features to be a multiple of 4, got {tuple(weight.shape)} in {name}; "
                f"leave it dense with exclude=['{name}']"
            )
        if weight.device.type == "meta":
            raise ValueError(
                f"model: expected loaded weights, got a meta tensor in {name}; load it without disk offload"
            )
        if not bool(torch.isfinite(weight.detach()).all()):
            raise ValueError(
                f"model: expected finite weights, got NaN or infinity in {name}; load the dense checkpoint again"
            )
        if getattr(linear, "keep_mask", None) is not None and not bool(linear.keep_mask.all()):
            raise ValueError(
                f"model: expected dense weights, got a pruned layer {name}; load the dense model and pass "
                "the masks as prior_masks"
            )


def check_precision(config: LearnConfig, linears: Mapping[str, nn.Linear]) -> None:
    for setting in ("moments", "logits_dtype"):
        value = getattr(config, setting)
        double = [name for name, linear in linears.items() if linear.weight.dtype == torch.float64]
        if value != "float32" and double:
            raise ValueError(
                f"{setting}: expected float32 for the float64 weights of {double[0]}, got {value}; leave it out or "
                "load the model with dtype=torch.bfloat16"
            )


def check_blocks(model: nn.Module, blocks: Tensor, config: LearnConfig) -> None:
    if not isinstance(blocks, Tensor) or blocks.dtype != torch.int64:
        got = f"a {blocks.dtype} tensor" if isinstance(blocks, Tensor) else type(blocks).__name__
        raise TypeError(f"train_blocks: expected an int64 tensor of token ids, got {got}; use patch.data.pack_blocks")
    if blocks.dim() != 2 or blocks.shape[0] < 1 or blocks.shape[1] < 2:
        raise ValueError(
            "train_blocks: expected shape (blocks, tokens) with at least 2 tokens, got "
            f"{tuple(blocks.shape)}; use patch.data.pack_blocks"
        )
    config.total_steps(blocks.shape[0])
    model_config = getattr(model, "config", None)
    vocabulary = getattr(model_config, "vocab_size", None)
    low, high = int(blocks.min()), int(blocks.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ValueError(
            f"train_blocks: expected token ids from 0 to {'?' if vocabulary is None else vocabulary - 1}, "
            f"got {low} to {high}; use the model's own tokenizer"
        )
    longest = getattr(model_config, "max_position_embeddings", None)
    # Only learned positions end abruptly; rotary ones go on, and get_llm-style callers lower this number on
    # purpose.
    learned = any(isinstance(m, nn.Embedding) and "position" in n for n, m in model.named_modules())
    if learned and longest is not None and blocks.shape[1] > longest:
        raise ValueError(
            f"train_blocks: expected at most {longest} tokens per block, the model's learned positions, got "
            f"{blocks.shape[1]}; pack shorter blocks"
        )


def _check_names(what: str, tensors: Mapping[str, Tensor], linears: Mapping[str, nn.Linear]) -> None:
    missing = [name for name in linears if name not in tensors]
    extra = [name for name in tensors if name not in linears]
    if missing or extra:
        raise ValueError(
            f"{what}: expected one entry for each of the {len(linears)} masked layers, got {len(tensors)}: "
            f"missing {missing[:3]}, not masked {extra[:3]}; use the masks of this model and the same exclude"
        )


def _check_mask(name: str, keep: Tensor, linear: nn.Linear, *, exact: bool) -> None:
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        got = f"a {keep.dtype} tensor" if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"prior_masks: expected a bool keep mask for {name}, got {got}; masks are explicit booleans")
    if keep.shape != linear.weight.shape:
        raise ValueError(
            f"prior_masks: expected shape {tuple(linear.weight.shape)} for {name}, got {tuple(keep.shape)}; "
            "the mask belongs to another layer"
        )
    if exact:
        wrong = keep.reshape(-1, 4).sum(1) != 2
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0]) * 4
            raise ValueError(
                "prior_masks: expected exactly 2 of 4 kept in every group for mode tile, got "
                f"{int(wrong.sum())} other groups in {name}, the first at row {first // keep.shape[1]}, "
                f"column {first % keep.shape[1]}; prune with pattern 2:4"
            )


def _check_scores(name: str, scores: Tensor, grid: tuple[int, int]) -> None:
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or tuple(scores.shape) != grid:
        got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"tile_scores: expected floating point scores of shape {grid} for {name}, got {got}; compute "
            "them with patch.priors.tile_scores and the same tile"
        )
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"tile_scores: expected finite scores for {name}, got NaN or infinity; compute them again")
