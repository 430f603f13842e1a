"""`learn_mask`: mask learning with the argument names of the original PATCH code."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from patch.learn import LearnConfig
from patch.models import keep_masks
from patch.trainer import learn

logger = logging.getLogger(__name__)

# mask_args key -> LearnConfig field. What a caller leaves out comes from the preset of the chosen variant.
_CONFIG_KEYS = {
    "mask_tile_size": "tile",
    "grad_checkpoint": "grad_checkpoint",
    "local_bs": "local_batch_size",
    "lr": "lr",
    "sparse_reg": "sparse_reg",
    "weight_reg": "weight_reg",
    "temp_schedule_2_4": "pattern_temperature",
    "scaler_schedule_2_4": "pattern_scale",
    "hard_2_4": "hard_pattern",
    "prior_strength_2_4": "pattern_prior_strength",
    "temp_schedule_tile": "tile_temperature",
    "scaler_schedule_tile": "tile_scale",
    "hard_tile": "hard_tile",
    "prior_strength_tile": "tile_prior_strength",
    "layer_target": "layer_target",
}
_OTHER_KEYS = (
    "learnable_mask",
    "optimizer",
    "fine_tuning_sequence_length",
    "target_sparsity_ratio",
    "joint_optim",
    "mask_llm",
)
_OPTIMIZERS = ("adamw_torch",)
_DATA_OPTIONS = ("max_blocks", "max_documents", "text_field")
_LEARN_OPTIONS = ("resume", "exclude", "progress", "callbacks")

# Training data of the paper: 512000 blocks (2000 steps of 256) from the first 3072000 documents.
DEFAULT_SPARSITY = 0.45
DEFAULT_SEQUENCE_LENGTH = 4096
DEFAULT_TRAIN_DATA = "slimpajama"
DEFAULT_BLOCKS = 512_000
DEFAULT_DOCUMENTS = 6 * DEFAULT_BLOCKS


def learn_mask(
    model_name: str | os.PathLike,
    compressed_model: nn.Module,
    tokenizer: Any,
    mask_args: Mapping[str, Any] | Any,
    local_files_only: bool = False,
    hf_token: str | None = None,
    wandb: bool = False,
    *,
    train_data: str | os.PathLike | Tensor | None = None,
    output_dir: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[nn.Module, Any]:
    """Learn a PATCH mask for a dense model, starting from a one-shot compressed copy of it.

    model_name        path or hub id of the dense model; its weights are used, only masks come from
                      compressed_model.
    compressed_model  what patch.utils.prepare_pruned_model returned: `keep_mask` and `distribution_scores` on
                      its layers.
    mask_args         dict or namespace with the keys of the original (see config_from_mask_args); missing
                      ones get the published value of the variant chosen by joint_optim and mask_llm.
    train_data        local .txt, .jsonl or .parquet file, a named set, or packed blocks (B, S) int64; default
                      SlimPajama as in the paper.
    output_dir        folder for checkpoints and metrics.jsonl.
    dtype             of the dense model; default bfloat16 on a GPU and float32 without.
    options           any LearnConfig field (global_batch_size, epochs, seed, exact_budget, ...), max_blocks,
                      max_documents, text_field, resume, exclude, progress, callbacks.
    returns           (masked model, lm-eval wrapper of it or None when lm_eval is not installed).
    raises            ValueError or TypeError before the model is loaded for bad arguments.
    """
    config_options = {key: value for key, value in options.items() if key in _config_fields()}
    known = (*_config_fields(), *_DATA_OPTIONS, *_LEARN_OPTIONS)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"learn_mask: expected known options, got {', '.join(unknown)}; valid: {', '.join(sorted(known))}"
        )
    config = config_from_mask_args(mask_args, **config_options)
    sequence_length = _sequence_length(mask_args)
    masks, scores = _read_compressed(compressed_model, config)
    if wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "wandb: expected the package to be installed, it is not; pip install wandb or pass wandb=False"
        )
    blocks = _blocks(tokenizer, train_data, sequence_length, {k: v for k, v in options.items() if k in _DATA_OPTIONS})
    config.total_steps(blocks.shape[0])

    from transformers import AutoModelForCausalLM

    if dtype is None:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        model_name, dtype=dtype, local_files_only=local_files_only, token=hf_token
    )
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


def config_from_mask_args(mask_args: Mapping[str, Any] | Any, **overrides: Any) -> LearnConfig:
    """LearnConfig of the original's mask_args (dict or namespace); overrides name LearnConfig fields and win.

    Variant: mask_llm=True is MaskLLM (2:4 everywhere, whatever target_sparsity_ratio says), else
    joint_optim=True is PATCH-Joint, else PATCH-Tile. target_sparsity_ratio defaults to 0.45. A weight_reg
    given for MaskLLM multiplies the kept share of the norm as in PATCH, not the sum of norms: the original's
    default of 10 would drown the token loss. raises ValueError or TypeError for unknown keys, both variants
    at once, an unknown optimizer, bad values.
    """
    given = _as_dict(mask_args)
    unknown = sorted(set(given) - set(_CONFIG_KEYS) - set(_OTHER_KEYS))
    if unknown:
        raise ValueError(
            f"mask_args: expected known keys, got {', '.join(unknown)}; valid: "
            f"{', '.join(sorted((*_CONFIG_KEYS, *_OTHER_KEYS)))}"
        )
    for key in ("learnable_mask", "joint_optim", "mask_llm"):
        if not isinstance(given.get(key, False), bool):
            raise ValueError(f"mask_args[{key!r}]: expected True or False, got {given[key]!r}; write a Python bool")
    if given.get("learnable_mask") is False:
        raise ValueError(
            "mask_args['learnable_mask']: expected True or no such key, got False; do not call learn_mask to "
            "keep the one-shot mask"
        )
    if given.get("mask_llm") and given.get("joint_optim"):
        raise ValueError("mask_args: expected mask_llm or joint_optim, got both True; mask_llm has no tiles, drop one")
    optimizer = given.get("optimizer", _OPTIMIZERS[0])
    if optimizer not in _OPTIMIZERS:
        raise ValueError(
            f"mask_args['optimizer']: expected one of {', '.join(_OPTIMIZERS)}, got {optimizer!r}; it is the "
            "AdamW that the paper uses"
        )
    values = {field: given[key] for key, field in _CONFIG_KEYS.items() if key in given} | overrides
    if given.get("mask_llm"):
        if "weight_reg" in values:
            values = {"weight_reg_normalized": True, "weight_reg_form": "norm"} | values
        return LearnConfig.from_preset("mask_llm", 0.5, **values)
    mode = "joint" if given.get("joint_optim", False) else "tile"
    sparsity = given.get("target_sparsity_ratio", DEFAULT_SPARSITY)
    if not isinstance(sparsity, (int, float)) or isinstance(sparsity, bool):
        raise ValueError(
            f"mask_args['target_sparsity_ratio']: expected a share of zeros from 0 to 0.5, got {sparsity!r}; write 0.45"
        )
    return LearnConfig.from_preset(mode, sparsity, **values)


def _config_fields() -> tuple[str, ...]:
    return tuple(field.name for field in fields(LearnConfig) if field.name not in ("mode", "target_sparsity"))


def _as_dict(mask_args: Mapping[str, Any] | Any) -> dict[str, Any]:
    if isinstance(mask_args, Mapping):
        return dict(mask_args)
    if hasattr(mask_args, "__dict__") and not isinstance(mask_args, (type, nn.Module)):
        return dict(vars(mask_args))
    raise TypeError(
        f"mask_args: expected a dict or a namespace, got {type(mask_args).__name__}; for example "
        "{'joint_optim': True, 'target_sparsity_ratio': 0.45}"
    )


def _sequence_length(mask_args: Mapping[str, Any] | Any) -> int:
    length = _as_dict(mask_args).get("fine_tuning_sequence_length", DEFAULT_SEQUENCE_LENGTH)
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
        raise ValueError(
            f"mask_args['fine_tuning_sequence_length']: expected an integer >= 2, got {length!r}; the paper uses 4096"
        )
    return length


def _read_compressed(compressed_model: nn.Module, config: LearnConfig) -> tuple[dict[str, Tensor], dict | None]:
    """Explicit keep masks and tile scores of the one-shot model; never read off the zeros of its weights."""
    if not isinstance(compressed_model, nn.Module):
        raise TypeError(
            f"compressed_model: expected a model, got {type(compressed_model).__name__}; pass what "
            "patch.utils.prepare_pruned_model returned"
        )
    masks = keep_masks(compressed_model)
    if not masks:
        raise ValueError(
            "compressed_model: expected keep masks on its layers, found none; pass what "
            "patch.utils.prepare_pruned_model returned"
        )
    modules = {name: compressed_model.get_submodule(name) for name in masks}
    scores = {
        name: module.distribution_scores
        for name, module in modules.items()
        if isinstance(getattr(module, "distribution_scores", None), Tensor)
    }
    if config.mode != "mask_llm" and scores and len(scores) != len(masks):
        missing = [name for name in masks if name not in scores]
        raise ValueError(
            f"compressed_model: expected distribution_scores on every pruned layer, {missing[0]} has none; "
            "prepare the model again"
        )
    return masks, {name: score.float() for name, score in scores.items()} or None


def _blocks(tokenizer: Any, train_data: Any, sequence_length: int, options: dict[str, Any]) -> Tensor:
    if isinstance(train_data, Tensor):
        if options:
            raise ValueError(
                f"{', '.join(options)}: expected only with text, got packed blocks as train_data; cut the "
                "blocks yourself"
            )
        return train_data
    from patch.data import training_blocks

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
    from patch.zero_shot import lm_eval_model

    return lm_eval_model(model, tokenizer)
