"""The mask_args of the original PATCH code as a LearnConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from patch.files.schema import Says, fields_of, record
from patch.learn.config import LearnConfig
from patch.published.arguments import record_of, values_of
from patch.settings import Share

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


@record(kw_only=True)
class MaskArgs:
    """The mask_args that are no setting of LearnConfig, under their published names."""

    learnable_mask: Annotated[
        Literal[True], Says("True or no such key", "Do not call learn_mask to keep the one-shot mask.")
    ] = True
    optimizer: Annotated[Literal["adamw_torch"], Says("one of adamw_torch", "It is the AdamW that the paper uses.")] = (
        "adamw_torch"
    )
    fine_tuning_sequence_length: Annotated[int, Field(ge=2), Says("an integer >= 2", "The paper uses 4096.")] = 4096
    target_sparsity_ratio: Share = 0.45
    joint_optim: bool = False
    mask_llm: bool = False

    @model_validator(mode="after")
    def _one_variant(self) -> MaskArgs:
        if self.mask_llm and self.joint_optim:
            raise ValueError("expected mask_llm or joint_optim, got both True. mask_llm has no tiles, drop one.")
        return self


def read_mask_args(mask_args: Mapping[str, Any] | Any) -> tuple[MaskArgs, dict[str, Any]]:
    """(mask_args that are no setting of LearnConfig, the others by the names of LearnConfig)."""
    given = values_of(mask_args, "mask_args")
    own = {key: value for key, value in given.items() if key not in _CONFIG_KEYS}
    args = record_of(MaskArgs, own, "mask_args", _CONFIG_KEYS)
    return args, {field: given[key] for key, field in _CONFIG_KEYS.items() if key in given}


def config_from_mask_args(mask_args: Mapping[str, Any] | Any, **overrides: Any) -> LearnConfig:
    """LearnConfig of the original's mask_args (dict or namespace); overrides name LearnConfig fields and win.

    Variant: mask_llm=True is MaskLLM (2:4 everywhere, whatever target_sparsity_ratio says), else joint_optim=True is
    PATCH-Joint, else PATCH-Tile. target_sparsity_ratio defaults to 0.45. A weight_reg given for MaskLLM multiplies the
    kept share of the norm as in PATCH, not the sum of norms: the original's default of 10 would drown the token loss.
    raises ValueError or TypeError for unknown keys, both variants at once, an unknown optimizer, bad values.
    """
    args, values = read_mask_args(mask_args)
    values |= overrides
    if args.mask_llm:
        if "weight_reg" in values:
            values = {"weight_reg_normalized": True, "weight_reg_form": "norm"} | values
        return LearnConfig.from_preset("maskllm", 0.5, **values)
    return LearnConfig.from_preset("joint" if args.joint_optim else "tile", args.target_sparsity_ratio, **values)


def config_fields() -> tuple[str, ...]:
    """Settings of LearnConfig that a caller of learn_mask may override."""
    return tuple(name for name in fields_of(LearnConfig) if name not in ("mode", "target_sparsity"))
