"""How a masked model is compressed and trained further: the settings of SLiM under their published names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from patch.files.schema import Says, default_of, fields_of, record
from patch.runs.batches import accumulation_steps, total_steps
from patch.settings import AtLeastOne, NotNegative, Positive, Seed, setting

Bits = Annotated[int, Field(ge=2, le=8), Says("2 to 8 bits", "The usual number is 4.")]
Group = Annotated[int, Field(ge=1), Says("a group size of 1 or more", "The usual ones are 128 and 256.")]
RankShare = Annotated[
    float, Field(ge=0, le=1), Says("a share of the layer's smaller size, 0 to 1", "The usual one is 0.1.")
]

# A setting without effect is a mistake that would go unnoticed: what each of these needs to be set as well.
_NEEDS = {
    "scale_important_weights": "quantize_weight",
    "weight_tiled_quantization": "quantize_weight",
    "column_wise_grouping": "weight_tiled_quantization",
    "prune_lora": "lora_rank",
    "quantize_lora": "lora_rank",
    "pad_lora": "lora_rank",
}


# Likewise for settings that always have a value: what reads each of them.
_READERS = {
    "bitwidth": ("quantize_weight", "quantize_lora"),
    "weight_tile_size": ("weight_tiled_quantization",),
    "lora_tile_size": ("quantize_lora", "pad_lora"),
}


@record
class Grid:
    """How finely weights are quantised: bits of a code, and length of a group (None: one scale a matrix)."""

    bitwidth: Bits
    block: Group | None


@record
class CompressOptions:
    """Settings of quantisation and low-rank adapters; defaults as published. raises ValueError naming the setting."""

    quantize_weight: bool = setting(False, "quantise the kept weights (simulated: they are stored dequantised)")
    bitwidth: Bits = setting(4, "bits of weights and quantised adapters, 2 to 8")
    slim_quant: bool = setting(True, "one scale a matrix by SLiM-Quant; off: by the largest weight")
    weight_tiled_quantization: bool = setting(
        False, "one scale a group of --weight-tile-size by its largest weight; wins over --slim-quant"
    )
    weight_tile_size: Group = setting(256, "weights in a group")
    column_wise_grouping: bool = setting(False, "groups along a row of the weight; off: along a column")
    scale_important_weights: bool = setting(False, "round the 1 % of columns that matter most more finely")
    lora_rank: RankShare = setting(0.0, "rank of adapters as a share of the layer's smaller size (default none)")
    slim_lora: bool = setting(True, "weigh the adapters' error by the energy of the inputs (needs --data)")
    prune_lora: bool = setting(False, "2:4 sparse left adapters")
    quantize_lora: bool = setting(False, "quantise the adapters in groups of --lora-tile-size")
    lora_tile_size: Group = setting(256, "group size of adapters; their rank is rounded up to a multiple of it")
    separate_lora: Annotated[
        Literal[True],
        Says(
            "True",
            "Adapters that are merged into the weight fill what the mask prunes, so the model would be dense again; "
            "leave it out.",
        ),
    ] = True
    pad_lora: bool = setting(False, "round the rank up to a multiple of --lora-tile-size without quantising")

    @model_validator(mode="after")
    def _has_an_effect(self) -> CompressOptions:
        for name, needed in _NEEDS.items():
            got = getattr(self, needed)
            if getattr(self, name) and not got:
                raise ValueError(f"{name}: expected {needed} to be set as well, got {got!r}. Set both.")
        return self

    def refuse_unread(self) -> None:
        """Refuse settings that nothing reads. Not part of the record's own checks: published callers give them all."""
        for name, readers in _READERS.items():
            value = getattr(self, name)
            is_default = value == default_of(fields_of(CompressOptions)[name])
            if not is_default and not any(getattr(self, reader) for reader in readers):
                expected = f"expected {' or '.join(readers)} to be set as well, without which it has no effect"
                raise ValueError(f"{name}: {expected}, got {value!r} alone. Set both.")

    @property
    def is_active(self) -> bool:
        """Whether there is anything to do."""
        return self.quantize_weight or self.lora_rank > 0

    @property
    def needs_calibration(self) -> bool:
        """Whether the energies of the layers' inputs are read."""
        return (self.lora_rank > 0 and self.slim_lora) or (self.quantize_weight and self.scale_important_weights)

    def rank(self, shape: Sequence[int]) -> int:
        """Rank of the adapters of a weight (N, K); at least 1 where adapters are asked for."""
        if self.lora_rank == 0:
            return 0
        rank = max(1, int(self.lora_rank * min(shape)))
        multiple = self.lora_tile_size if self.quantize_lora or self.pad_lora else 1
        return -(-rank // multiple) * multiple

    def check_shape(self, shape: Sequence[int], label: str) -> None:
        """Refuse a weight (N, K) that does not fit these settings; `label` names it in the message."""
        if self.quantize_weight and self.weight_tiled_quantization:
            check_groups(shape, self.weight_tile_size, self.column_wise_grouping, label)
        if self.quantize_lora:
            check_groups((shape[1], self.rank(shape)), self.lora_tile_size, False, f"{label}, left adapter")
        if self.prune_lora:
            from patch_kernels.checks import require_multiple

            require_multiple(f"{label}, in_features for prune_lora", shape[1], 4, "Leave prune_lora out.")

    def as_dict(self) -> dict[str, Any]:
        """Values that JSON can hold; `CompressOptions(**values)` is the way back."""
        return asdict(self)


def check_groups(shape: Sequence[int], block: int, along_rows: bool, label: str) -> None:
    """Refuse a matrix (N, K) that groups of `block` do not divide; `label` names it in the message."""
    from patch_kernels.checks import require_multiple

    size, axis = (shape[1], "columns") if along_rows else (shape[0], "rows")
    advice = "Use a group size that divides it, the other grouping direction, or one scale per matrix."
    require_multiple(f"{label}, {axis}", size, block, advice, named="the group size ")


# Data of the published code: 30,000 blocks of 1024 tokens of SlimPajama.
DEFAULT_DATA, DEFAULT_BLOCK_SIZE, DEFAULT_BLOCKS = "slimpajama", 1024, 30_000


@record
class FineTuneOptions:
    """Settings of `fine_tune`, as published where they are known. raises ValueError naming the setting."""

    lr: Positive = setting(1e-5, "peak learning rate; linear warm-up and linear decay to 0", metavar="LR")
    weight_decay: NotNegative = setting(1e-2, "of AdamW")
    warmup_steps: Annotated[int, Field(ge=0)] = setting(5, "steps of linear warm-up")
    max_grad_norm: NotNegative = setting(1.0, "gradients are clipped together to this norm")
    batch_size: AtLeastOne = setting(64, "blocks per optimiser step")
    local_batch_size: AtLeastOne = setting(1, "blocks per forward pass; divides the batch size")
    epochs: AtLeastOne = setting(1, "passes over the blocks")
    seed: Seed = setting(42, "seed of the order of blocks")
    grad_checkpoint: bool = setting(False, "recompute activations to save memory")
    save_steps: AtLeastOne = setting(500, "a checkpoint every so many steps")
    save_total_limit: AtLeastOne = setting(2, "checkpoints that are kept")
    log_steps: AtLeastOne = setting(10, "a logged loss every so many steps")

    @model_validator(mode="after")
    def _batches_divide(self) -> FineTuneOptions:
        self.accumulation_steps()
        return self

    def accumulation_steps(self, processes: int = 1) -> int:
        """Forward passes per optimiser step. raises ValueError when the batch cannot be split."""
        return accumulation_steps("batch_size", self.batch_size, self.local_batch_size, processes)

    def total_steps(self, blocks: int) -> int:
        """Optimiser steps for a number of blocks; what does not fill a batch is left out."""
        return total_steps("blocks", blocks, "batch_size", self.batch_size, self.epochs)
