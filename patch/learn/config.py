"""Hyper-parameters of mask learning with the published presets."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from patch.files.schema import Says, record, require_choice
from patch.runs.batches import accumulation_steps, total_steps
from patch.settings import AtLeastOne, NotNegative, Positive, Seed, Share, Tile, check_keys, parts, setting

Mode = Literal["joint", "tile", "maskllm"]
Moments = Literal["float32", "bfloat16", "int8"]
Objective = Literal["tokens", "distill"]
MOMENTS: tuple[Moments, ...] = get_args(Moments)
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[
    tuple[Beta, Beta],
    BeforeValidator(parts),
    Says("two numbers from 0 up to but not including 1", "The paper uses 0.9,0.95."),
]
StartEnd = Annotated[
    tuple[Positive, Positive],
    BeforeValidator(parts),
    Says("(start, end), two numbers > 0", "Write for example 4.0,0.05."),
]
MODES: tuple[Mode, ...] = get_args(Mode)


@record
class LearnConfig:
    """All hyper-parameters of mask learning; `LearnConfig.from_preset` gives the published ones.

    A joint run holds 1.5 logits per weight: logits and moments take 18 bytes per weight by default, 12 with bfloat16
    moments, 9 with int8 moments or with both in bfloat16, 6 with bfloat16 logits and int8 moments; gradients add 6, or
    3 with bfloat16 logits. What is stored below float32 is rounded stochastically, a function of seed, step and
    position. A float64 model takes neither.
    raises  ValueError naming the setting, what was expected and what came.
    """

    mode: Mode = setting("joint", "joint: 2:4 patterns and tiles; tile: tiles, patterns fixed; maskllm: patterns only")
    target_sparsity: Share = setting(
        0.45, "target share of zeros, required but for maskllm, where it is 0.5 (default: none)", metavar="SHARE"
    )
    tile: Tile = setting((128, 128), "rows,columns of a tile", metavar="R,C")
    objective: Objective = setting(
        "tokens", "tokens: the loss of predicting the text; distill: the divergence from the dense model's predictions"
    )
    lr: Positive = setting(1e-3, "learning rate of AdamW (default of the preset)", metavar="LR")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = setting(0.0, "cosine decay ends at lr * min_lr_ratio")
    betas: Betas = setting((0.9, 0.95), "of AdamW")
    eps: Positive = setting(1e-8, "of AdamW")
    weight_decay: NotNegative = setting(0.0, "of AdamW")
    warmup_steps: Annotated[int, Field(ge=0)] = setting(5, "steps of linear warm-up")
    max_grad_norm: NotNegative = setting(1.0, "gradients are clipped together to this norm; 0: not at all")
    moments: Moments = setting("float32", "what AdamW's moments are stored in")
    logits_dtype: Literal["float32", "bfloat16"] = setting("float32", "of the 2:4 logits; tile logits are float32")
    sparse_reg: NotNegative = setting(7.0, "factor of |density - target|")
    weight_reg: NotNegative = setting(10.0, "factor of the kept norm's reward, which decays linearly to 0; 0: none")
    weight_reg_form: Literal["norm", "squared"] = setting(
        "norm", "norm as the published code, squared as the papers' equations"
    )
    weight_reg_normalized: bool = setting(
        True, "divide by the dense norm; MaskLLM's own is not, and needs a weight_reg of 1e-5 to 1e-2"
    )
    pattern_temperature: StartEnd = setting((4.0, 0.05), "of the 2:4 choice, start,end")
    pattern_scale: StartEnd = setting((100.0, 500.0), "factor of the 2:4 logits, start,end")
    tile_temperature: StartEnd = setting((4.0, 0.05), "of the tile choice, start,end")
    tile_scale: StartEnd = setting((25.0, 350.0), "factor of the tile logits, start,end")
    hard_pattern: bool = setting(False, "straight-through samples of patterns")
    hard_tile: bool = setting(False, "straight-through samples of tiles")
    pattern_prior_strength: NotNegative = setting(3.0, "in standard deviations of the initial logits; 0: no prior")
    tile_prior_strength: NotNegative = setting(3.0, "as pattern_prior_strength, of the tiles")
    tile_prior_budget: Literal["layer", "model"] = setting(
        "layer",
        "whose best-scored tiles the prior favours: every layer's own, as published, or the whole model's",
    )
    prior_mode: Literal["add", "overwrite"] = setting("add", "see patch.priors.pattern_prior")
    init_std: Positive = setting(0.014, "standard deviation of the initial logits")
    layer_target: bool = setting(False, "a density target per decoder block instead of one for the model")
    layer_target_reduction: Literal["mean", "sum"] = setting(
        "mean", "of the blocks' penalties; sum as published, which acts as sparse_reg * blocks"
    )
    exact_budget: bool = setting(
        False, "choose the dense tiles by rank, so that the target is met exactly, not in expectation"
    )
    local_batch_size: AtLeastOne = setting(1, "blocks per forward pass")
    global_batch_size: AtLeastOne = setting(256, "blocks per optimiser step over all processes")
    epochs: AtLeastOne = setting(1, "passes over the blocks")
    seed: Seed = setting(42, "seed of initial logits, noise and data order")
    grad_checkpoint: bool = setting(False, "recompute activations in the backward pass")
    save_steps: AtLeastOne = setting(500, "a checkpoint every so many steps")
    save_total_limit: AtLeastOne = setting(2, "checkpoints that are kept")
    log_steps: AtLeastOne = setting(1, "a line of metrics every so many steps")

    @model_validator(mode="after")
    def _fits_together(self) -> LearnConfig:
        if self.mode == "maskllm" and self.target_sparsity != 0.5:
            wanted = f"expected 0.5 with mode maskllm (2:4 everywhere), got {self.target_sparsity}"
            raise ValueError(f"target_sparsity: {wanted}. Use mode joint or tile for less.")
        self.accumulation_steps()
        return self

    @classmethod
    def from_preset(cls, name: str, sparsity: float | None = None, **overrides: Any) -> LearnConfig:
        """Published hyper-parameters of "joint", "tile" (PATCH) or "maskllm" (MaskLLM), with overrides by
        name.

        sparsity  target, needed for joint and tile; for maskllm it is 0.5 and may be left out.
        raises    ValueError for an unknown preset, a missing or impossible sparsity, unknown overrides.
        """
        require_choice("preset", name, MODES, "Use 'joint' for best quality.")
        check_keys(cls, overrides, "LearnConfig")
        if also := [key for key in ("mode", "target_sparsity") if key in overrides]:
            expected = "expected the mode as the preset's name and the target as sparsity"
            raise ValueError(f"preset {name}: {expected}, got {', '.join(also)} besides. Leave it out.")
        if sparsity is None:
            if name != "maskllm":
                raise ValueError(f"preset {name}: expected a target sparsity of 0 to 0.5, got none. 0.45 is common.")
            sparsity = 0.5
        values: dict[str, Any] = {"mode": name, "target_sparsity": sparsity} | _PRESETS[name]
        if name == "joint":
            # The paper starts hotter at 45 % than at 25 % and 35 %.
            values["tile_temperature"] = (4.0 if sparsity > 0.4 else 2.0, 0.05)
        return cls(**(values | overrides))

    def accumulation_steps(self, world_size: int = 1) -> int:
        """Micro-batches per optimiser step. raises ValueError when the global batch cannot be split."""
        return accumulation_steps("global_batch_size", self.global_batch_size, self.local_batch_size, world_size)

    def total_steps(self, blocks: int) -> int:
        """Optimiser steps for a number of blocks. raises ValueError when they do not fill one batch."""
        return total_steps("training blocks", blocks, "global_batch_size", self.global_batch_size, self.epochs)


# PATCH: appendix of Hourri, Mozaffari, Mehri Dehnavi 2025. MaskLLM: its released training code (Fang et al. 2024).
_PRESETS: dict[str, dict[str, Any]] = {
    "joint": {"lr": 1e-3, "sparse_reg": 7.0, "weight_reg": 10.0, "tile_scale": (25.0, 350.0)},
    "tile": {
        "lr": 1e-4,
        "sparse_reg": 3.0,
        "weight_reg": 0.1,
        "tile_scale": (100.0, 500.0),
        "tile_temperature": (2.0, 0.05),
    },
    "maskllm": {
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
