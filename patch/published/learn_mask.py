"""Mask learning by the argument names of the original PATCH code."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patch.data.tokens import training_blocks
from patch.evaluate.zero_shot import lm_eval_model
from patch.files.paths import require_model_path
from patch.learn.config import LearnConfig
from patch.learn.run import learn
from patch.models.keep_masks import keep_masks
from patch.packed.load import load
from patch.published.arguments import path_of, require_dtype, require_tokenizer
from patch.published.mask_args import config_fields, config_from_mask_args, read_mask_args

logger = logging.getLogger(__name__)

_DATA_OPTIONS = ("max_blocks", "max_documents", "text_field")
_LEARN_OPTIONS = ("resume", "exclude", "progress", "callbacks")
DEFAULT_TRAIN_DATA = "slimpajama"
DEFAULT_BLOCKS = 512_000
DEFAULT_DOCUMENTS = 6 * DEFAULT_BLOCKS


def learn_from(
    model_name: str | os.PathLike,
    compressed_model: nn.Module,
    tokenizer: Any,
    mask_args: Mapping[str, Any] | Any,
    options: Mapping[str, Any],
    *,
    train_data: str | os.PathLike | Tensor | None,
    output_dir: str | os.PathLike | None,
    dtype: torch.dtype | None,
    wandb: bool,
    hub: Mapping[str, Any],
) -> tuple[nn.Module, Any]:
    """The work of patch.fine_tune_mask.learn_mask, see there; hub goes to from_pretrained."""
    name = require_model_path(path_of(model_name, "model_name"))
    if dtype is not None:
        require_dtype(dtype)
    config_options = {key: value for key, value in options.items() if key in config_fields()}
    known = (*config_fields(), *_DATA_OPTIONS, *_LEARN_OPTIONS)
    unknown = sorted(set(options) - set(known))
    if unknown:
        valid = ", ".join(sorted(known))
        raise TypeError(f"learn_mask: expected known options, got {', '.join(unknown)}; valid: {valid}")
    config = config_from_mask_args(mask_args, **config_options)
    sequence_length = read_mask_args(mask_args)[0].fine_tuning_sequence_length
    masks, scores = _read_compressed(compressed_model, config)
    if wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb: expected the package to be installed, it is not; pip install wandb or pass False")
    if not isinstance(train_data, Tensor):
        require_tokenizer(tokenizer)
    blocks = _blocks(tokenizer, train_data, sequence_length, {k: v for k, v in options.items() if k in _DATA_OPTIONS})
    config.total_steps(blocks.shape[0])

    if dtype is None:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = load(name, dtype=dtype, **hub)
    result = learn(
        model,
        blocks,
        config,
        prior_masks=masks,
        tile_scores=scores,
        output_dir=output_dir,
        report_to=("wandb",) if wandb else (),
        **{key: value for key, value in options.items() if key in _LEARN_OPTIONS},
    )
    model.eval()
    logger.info("learned mask: sparsity %.4f of the masked layers", 1 - result.hard_density)
    return model, _lm_eval_model(model, tokenizer)


def _read_compressed(compressed_model: nn.Module, config: LearnConfig) -> tuple[dict[str, Tensor], dict | None]:
    """Explicit keep masks and tile scores of the one-shot model; never read off the zeros of its weights."""
    advice = "pass what patch.utils.prepare_pruned_model returned"
    if not isinstance(compressed_model, nn.Module):
        raise TypeError(f"compressed_model: expected a model, got {type(compressed_model).__name__}; {advice}")
    masks = keep_masks(compressed_model)
    if not masks:
        raise ValueError(f"compressed_model: expected keep masks on its layers, found none; {advice}")
    modules = {name: compressed_model.get_submodule(name) for name in masks}
    scores = {
        name: module.distribution_scores
        for name, module in modules.items()
        if isinstance(getattr(module, "distribution_scores", None), Tensor)
    }
    missing = next((name for name in masks if name not in scores), None)
    if config.mode != "maskllm" and scores and missing is not None:
        expected = "expected distribution_scores on every pruned layer"
        raise ValueError(f"compressed_model: {expected}, {missing} has none; prepare the model again")
    return masks, {name: score.float() for name, score in scores.items()} or None


def _blocks(tokenizer: Any, train_data: Any, sequence_length: int, options: dict[str, Any]) -> Tensor:
    if isinstance(train_data, Tensor):
        if options:
            got = "got packed blocks as train_data; cut the blocks yourself"
            raise ValueError(f"{', '.join(options)}: expected only with text, {got}")
        return train_data
    limit = getattr(tokenizer, "model_max_length", None)
    if isinstance(limit, int) and limit < sequence_length:
        logger.warning("fine_tuning_sequence_length %d cut to the tokenizer's limit %d", sequence_length, limit)
        sequence_length = limit
    if train_data is None:
        train_data = DEFAULT_TRAIN_DATA
        options = {"max_blocks": DEFAULT_BLOCKS, "max_documents": DEFAULT_DOCUMENTS} | options
    blocks, digest = training_blocks(tokenizer, train_data, sequence_length, **options)
    logger.info("training data: %d blocks of %d tokens, text SHA-256 %s", *blocks.shape, digest)
    return blocks


def _lm_eval_model(model: nn.Module, tokenizer: Any) -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        return None
    return lm_eval_model(model, tokenizer)
