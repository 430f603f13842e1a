"""The mask_args of the original PATCH code as a LearnConfig."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from patch.learn.config import LearnConfig

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
# Training data of the paper: 512000 blocks (2000 steps of 256) from the first 3072000 documents.
DEFAULT_SPARSITY = 0.45
DEFAULT_SEQUENCE_LENGTH = 4096


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
