"""How a masked model is compressed further: the settings of SLiM under their published names."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from patch.slim.quantize import check_bits, check_block, check_groups


@dataclass(frozen=True)
class CompressOptions:
    """Settings of quantisation and low-rank adapters; checked when made, defaults as published.

    quantize_weight            quantise the kept weights (simulated: they are stored dequantised)
    bitwidth                   2 to 8 bits, of weights and of quantised adapters
    slim_quant                 one scale per matrix by SLiM-Quant; False: by the largest weight
    weight_tiled_quantization  one scale per group of weight_tile_size by its largest weight; wins over slim_quant
    column_wise_grouping       groups are 1 x weight_tile_size (along a row); False: weight_tile_size x 1
    scale_important_weights    round the 1 % of columns that matter most more finely
    lora_rank                  rank of the adapters as a share of min(N, K), 0 (none) to 1
    slim_lora                  weigh the error by the energy of the inputs; False: all inputs alike
    prune_lora                 2:4 sparse left adapters
    quantize_lora              quantise both adapters, in groups of lora_tile_size x 1
    lora_tile_size             group size of quantised adapters; their rank is rounded up to a multiple of it
    pad_lora                   round the rank up in the same way without quantising
    separate_lora              True. Merged adapters would fill what the mask prunes, so False is refused.
    """

    quantize_weight: bool = False
    bitwidth: int = 4
    slim_quant: bool = True
    weight_tiled_quantization: bool = False
    weight_tile_size: int = 256
    column_wise_grouping: bool = False
    scale_important_weights: bool = False
    lora_rank: float = 0.0
    slim_lora: bool = True
    prune_lora: bool = False
    quantize_lora: bool = False
    lora_tile_size: int = 256
    separate_lora: bool = True
    pad_lora: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise TypeError(f"{field.name}: expected True or False, got {value!r}. Pass a bool.")
        check_bits(self.bitwidth)
        check_block(self.weight_tile_size, "weight_tile_size")
        check_block(self.lora_tile_size, "lora_tile_size")
        rank = self.lora_rank
        if (
            isinstance(rank, bool)
            or not isinstance(rank, (int, float))
            or not math.isfinite(rank)
            or not 0 <= rank <= 1
        ):
            raise ValueError(
                f"lora_rank: expected a share of the layer's smaller size, 0 to 1, got {rank!r}. The usual one is 0.1."
            )
        if not self.separate_lora:
            raise ValueError(
                "separate_lora: expected True, got False. Adapters that are merged into the weight fill what the "
                "mask prunes, so the model would be dense again; leave it out."
            )
        self._check_unused()

    def _check_unused(self) -> None:
        """A setting without effect is a mistake that would go unnoticed."""
        needs = {
            "scale_important_weights": ("quantize_weight", self.quantize_weight),
            "weight_tiled_quantization": ("quantize_weight", self.quantize_weight),
            "column_wise_grouping": ("weight_tiled_quantization", self.weight_tiled_quantization),
            "prune_lora": ("lora_rank", self.lora_rank > 0),
            "quantize_lora": ("lora_rank", self.lora_rank > 0),
            "pad_lora": ("lora_rank", self.lora_rank > 0),
        }
        for name, (needed, is_set) in needs.items():
            if getattr(self, name) and not is_set:
                raise ValueError(
                    f"{name}: expected {needed} to be set as well, got {getattr(self, needed)!r}. Set both."
                )

    @property
    def is_active(self) -> bool:
        """Whether there is anything to do."""
        return self.quantize_weight or self.lora_rank > 0

    @property
    def needs_calibration(self) -> bool:
        """Whether the energies of the layers' inputs are read."""
        return (self.lora_rank > 0 and self.slim_lora) or (self.quantize_weight and self.scale_important_weights)

    def rank(self, shape: tuple[int, int]) -> int:
        """Rank of the adapters of a weight (N, K); at least 1 where adapters are asked for."""
        if self.lora_rank == 0:
            return 0
        rank = max(1, int(self.lora_rank * min(shape)))
        multiple = self.lora_tile_size if self.quantize_lora or self.pad_lora else 1
        return -(-rank // multiple) * multiple

    def check_shape(self, shape: tuple[int, int], label: str) -> None:
        """Refuse a weight (N, K) that does not fit these settings; `label` names it in the message."""
        if self.quantize_weight and self.weight_tiled_quantization:
            check_groups(shape, self.weight_tile_size, self.column_wise_grouping, label)
        if self.quantize_lora:
            check_groups((shape[1], self.rank(shape)), self.lora_tile_size, False, f"{label}, left adapter")
        if self.prune_lora and shape[1] % 4:
            raise ValueError(
                f"{label}: expected in_features divisible by 4 to prune its left adapter 2:4, got {shape[1]}. Leave "
                "prune_lora out."
            )

    def as_dict(self) -> dict[str, Any]:
        """Values that JSON can hold; `CompressOptions(**values)` is the way back."""
        return asdict(self)
