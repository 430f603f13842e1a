"""Hyper-parameters of mask learning with the published presets."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from patch.priors import PRIOR_MODES

MODES = ("joint", "tile", "mask_llm")
WEIGHT_REG_FORMS = ("norm", "squared")
REDUCTIONS = ("mean", "sum")
MOMENTS = ("float32", "bfloat16", "int8")
LOGITS_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class LearnConfig:
    """All hyper-parameters of mask learning; `LearnConfig.from_preset` gives the published ones.

    mode             "joint": 2:4 patterns and tiles; "tile": tiles, patterns fixed; "mask_llm": patterns
                     only.
    target_sparsity  share of zeros, 0..0.5 (mask_llm: always 0.5).
    tile             (rows, columns) of a tile; columns a multiple of 4.
    lr ... max_grad_norm  AdamW with warm-up and cosine decay to lr * min_lr_ratio, gradients clipped
                          together.
    moments          what AdamW's moments are stored in: "float32", "bfloat16" or "int8" (8-bit floating-point
                     codes with a scale for 256 values). Below float32 the rounding is stochastic, a function
                     of seed, step and position.
    logits_dtype     "float32", or "bfloat16" with stochastic rounding for the 2:4 logits (tile logits are few
                     and stay float32). A joint run holds 1.5 logits per weight: logits and moments take 18
                     bytes per weight by default, 12 with bfloat16 moments, 9 with int8 moments or with both
                     in bfloat16, 6 with bfloat16 logits and int8 moments; gradients add 6, or 3 with bfloat16
                     logits. A float64 model takes neither.
    sparse_reg       factor of |density - target|.
    weight_reg       factor of the kept weight norm's reward, which decays linearly to 0; 0 switches it off.
    weight_reg_form  "norm" (published code) or "squared" (the papers' equations).
    weight_reg_normalized  divide by the dense model's norm; MaskLLM's own term is not divided and then needs
                           a
                     weight_reg of 1e-5 to 1e-2, because it is hundreds to thousands large.
    pattern_*, tile_*  (start, end) of temperature and logit scale; hard_* straight-through samples;
                     *_prior_strength in standard deviations of the initial logits, 0 = none.
    prior_mode       "add" or "overwrite", see patch.priors.pattern_prior.
    layer_target     a density target per decoder block instead of one for the model; layer_target_reduction
                     says whether the blocks' penalties are averaged or summed (published; acts as sparse_reg
                     * blocks).
    exact_budget     at the end choose the dense tiles by rank so that the target is met exactly, not in
                     expectation.
    local_batch_size, global_batch_size  blocks per forward pass / per optimiser step over all processes.
    """

    mode: str = "joint"
    target_sparsity: float = 0.45
    tile: tuple[int, int] = (128, 128)
    lr: float = 1e-3
    min_lr_ratio: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 5
    max_grad_norm: float = 1.0
    moments: str = "float32"
    logits_dtype: str = "float32"
    sparse_reg: float = 7.0
    weight_reg: float = 10.0
    weight_reg_form: str = "norm"
    weight_reg_normalized: bool = True
    pattern_temperature: tuple[float, float] = (4.0, 0.05)
    pattern_scale: tuple[float, float] = (100.0, 500.0)
    tile_temperature: tuple[float, float] = (4.0, 0.05)
    tile_scale: tuple[float, float] = (25.0, 350.0)
    hard_pattern: bool = False
    hard_tile: bool = False
    pattern_prior_strength: float = 3.0
    tile_prior_strength: float = 3.0
    prior_mode: str = "add"
    init_std: float = 0.014
    layer_target: bool = False
    layer_target_reduction: str = "mean"
    exact_budget: bool = False
    local_batch_size: int = 1
    global_batch_size: int = 256
    epochs: int = 1
    seed: int = 42
    grad_checkpoint: bool = False
    save_steps: int = 500
    save_total_limit: int = 2
    log_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("tile", "betas", *_SCHEDULES):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or len(value) != 2:
                raise ValueError(f"{name}: expected two values, got {value!r}; for example {_default(name)}")
            object.__setattr__(self, name, tuple(value))  # files give lists; a frozen config must stay hashable
        self._check_types()
        self._check_choices()
        self._check_numbers()
        self._check_batches()

    @classmethod
    def from_preset(cls, name: str, sparsity: float | None = None, **overrides: Any) -> LearnConfig:
        """Published hyper-parameters of "joint", "tile" (PATCH) or "mask_llm" (MaskLLM), with overrides by
        name.

        sparsity  target, needed for joint and tile; for mask_llm it is 0.5 and may be left out.
        raises    ValueError for an unknown preset, a missing or impossible sparsity, unknown overrides.
        """
        if name not in MODES:
            raise ValueError(f"preset: expected one of {', '.join(MODES)}, got {name!r}; use 'joint' for best quality")
        unknown = sorted(set(overrides) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"LearnConfig: expected known settings, got {', '.join(unknown)}; valid: "
                f"{', '.join(field.name for field in fields(cls))}"
            )
        if sparsity is None:
            if name != "mask_llm":
                raise ValueError(f"preset {name}: expected a target sparsity of 0 to 0.5, got none; 0.45 is common")
            sparsity = 0.5
        values: dict[str, Any] = {"mode": name, "target_sparsity": sparsity} | _PRESETS[name]
        if name == "joint":
            # The paper starts hotter at 45 % than at 25 % and 35 %.
            values["tile_temperature"] = (4.0 if sparsity > 0.4 else 2.0, 0.05)
        return cls(**(values | overrides))

    def accumulation_steps(self, world_size: int = 1) -> int:
        """Micro-batches per optimiser step. raises ValueError when the global batch cannot be split."""
        per_pass = self.local_batch_size * world_size
        if self.global_batch_size % per_pass:
            raise ValueError(
                "global_batch_size: expected a multiple of local_batch_size * processes = "
                f"{self.local_batch_size} * {world_size} = {per_pass}, got {self.global_batch_size}; change "
                "one of them"
            )
        return self.global_batch_size // per_pass

    def total_steps(self, blocks: int) -> int:
        """Optimiser steps for a number of blocks. raises ValueError when they do not fill one batch."""
        if blocks < self.global_batch_size:
            raise ValueError(
                f"training blocks: expected at least global_batch_size = {self.global_batch_size}, got "
                f"{blocks}; give more text, shorter blocks or a smaller global_batch_size"
            )
        return blocks // self.global_batch_size * self.epochs

    def _check_types(self) -> None:
        for field in fields(self):
            value, expected = getattr(self, field.name), type(field.default)
            values = value if expected is tuple else (value,)
            kind = type(field.default[0]) if expected is tuple else expected
            if kind is float:
                good = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
                good = good and all(math.isfinite(v) for v in values)
            elif kind is int:
                good = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
            else:
                good = isinstance(value, kind)
            if not good:
                raise ValueError(
                    f"{field.name}: expected {'two of ' if expected is tuple else ''}{kind.__name__} "
                    f"(finite), got {value!r}; the default is {field.default!r}"
                )

    def _check_choices(self) -> None:
        choices = {
            "mode": MODES,
            "moments": MOMENTS,
            "logits_dtype": LOGITS_DTYPES,
            "prior_mode": PRIOR_MODES,
            "weight_reg_form": WEIGHT_REG_FORMS,
            "layer_target_reduction": REDUCTIONS,
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: expected one of {', '.join(valid)}, got {getattr(self, name)!r}; choose one")
        if self.mode == "mask_llm" and self.target_sparsity != 0.5:
            raise ValueError(
                "target_sparsity: expected 0.5 with mode mask_llm (2:4 everywhere), got "
                f"{self.target_sparsity}; use mode joint or tile for less"
            )

    def _check_numbers(self) -> None:
        if not 0 <= self.target_sparsity <= 0.5:
            raise ValueError(
                f"target_sparsity: expected a share of zeros from 0 to 0.5, got {self.target_sparsity}; "
                "write 0.45 for 45 percent"
            )
        if min(self.tile) < 1 or self.tile[1] % 4:
            raise ValueError(
                f"tile: expected positive (rows, columns) with columns a multiple of 4, got {self.tile}; a "
                "group of 4 must not straddle two tiles, use (128, 128)"
            )
        for name in ("lr", "eps", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}; try {_default(name)}")
        for name in (*_NOT_NEGATIVE, "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}; 0 switches it off")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}; the paper uses (0.9, 0.95)")
        if self.min_lr_ratio > 1:
            raise ValueError(f"min_lr_ratio: expected 0 to 1, got {self.min_lr_ratio}; 0 decays to nothing")
        for name in _SCHEDULES:
            if min(getattr(self, name)) <= 0:
                raise ValueError(
                    f"{name}: expected (start, end) values > 0, got {getattr(self, name)}; for example {_default(name)}"
                )

    def _check_batches(self) -> None:
        for name in (
            "local_batch_size",
            "global_batch_size",
            "epochs",
            "save_steps",
            "save_total_limit",
            "log_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)}; try {_default(name)}")
        self.accumulation_steps()


_SCHEDULES = ("pattern_temperature", "pattern_scale", "tile_temperature", "tile_scale")

_NOT_NEGATIVE = (
    "weight_decay",
    "warmup_steps",
    "max_grad_norm",
    "sparse_reg",
    "weight_reg",
    "min_lr_ratio",
    "pattern_prior_strength",
    "tile_prior_strength",
)
# PATCH: appendix of Hourri, Mozaffari, Mehri Dehnavi 2025. MaskLLM: its released training code (Fang et al.
# 2024).
_PRESETS: dict[str, dict[str, Any]] = {
    "joint": {"lr": 1e-3, "sparse_reg": 7.0, "weight_reg": 10.0, "tile_scale": (25.0, 350.0)},
    "tile": {
        "lr": 1e-4,
        "sparse_reg": 3.0,
        "weight_reg": 0.1,
        "tile_scale": (100.0, 500.0),
        "tile_temperature": (2.0, 0.05),
    },
    "mask_llm": {
        "lr": 5e-4,
        "min_lr_ratio": 0.1,
        "warmup_steps": 0,
        "eps": 1e-5,
        "weight_decay": 0.1,
        "weight_reg": 1e-5,
        "weight_reg_form": "squared",
        "weight_reg_normalized": False,
    },
}


def _default(name: str) -> Any:
    return LearnConfig.__dataclass_fields__[name].default
