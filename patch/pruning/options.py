"""How to prune: the options that all methods share."""

from __future__ import annotations

import math
from dataclasses import dataclass

GROUP = 4
PATTERNS = ("2:4", "unstructured")
PRECISIONS = ("fp32", "fp64")
DEFAULT_BLOCK_SIZE = 128


@dataclass(frozen=True)
class PruneOptions:
    """How to prune; checked when made. Fields as in `patch.pruning.prune_weight`."""

    pattern: str = "2:4"
    sparsity: float = 0.5
    block_size: int = DEFAULT_BLOCK_SIZE
    damping: float = 0.01
    shift_zero_metrics: bool = False
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(
                f"pattern: expected one of {', '.join(PATTERNS)}, got {self.pattern!r}. Choose one of them."
            )
        if not _is_number(self.sparsity) or not 0 <= self.sparsity < 1:
            raise ValueError(
                "sparsity: expected a share of zeros from 0 up to but not including 1, got "
                f"{self.sparsity!r}. Write 0.45 for 45 %."
            )
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError(
                f"sparsity: expected 0.5 for pattern 2:4, which prunes two of four, got {self.sparsity!r}. "
                "Use pattern='unstructured' for another share."
            )
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(
                f"block_size: expected a positive number of columns, got {self.block_size!r}. The usual one is 128."
            )
        if self.pattern == "2:4" and self.block_size % GROUP:
            raise ValueError(
                f"block_size: expected a multiple of {GROUP} for pattern 2:4, got {self.block_size}. The "
                "usual one is 128."
            )
        if not _is_number(self.damping) or not 0 <= self.damping < math.inf:
            raise ValueError(
                f"damping: expected a finite share of the mean diagonal, 0 or more, got {self.damping!r}. "
                "The usual one is 0.01."
            )
        if not isinstance(self.shift_zero_metrics, bool):
            raise TypeError(
                f"shift_zero_metrics: expected True or False, got {self.shift_zero_metrics!r}. Pass a bool."
            )
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}. fp32 is the usual one."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
