"""Settings of the demo: sizes that pass through all stages in a few minutes on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patch.learn.config import LearnConfig


@dataclass(frozen=True)
class ModelSettings:
    """The dense model and its training."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 2
    heads: int = 4
    block_size: int = 128
    steps: int = 1000
    batch_size: int = 8
    matrix_lr: float = 5e-3
    vector_lr: float = 3e-3
    seed: int = 0


@dataclass(frozen=True)
class LearnSettings:
    """Mask learning: the published presets but for the number of steps, the batch and the learning rate.

    At 500 steps of 1024 tokens 5e-4 gave a lower perplexity than 1e-3 and 2e-3 (2 threads, November 2026).
    """

    steps: int = 500
    batch_size: int = 8
    lr: float = 5e-4

    def config(self, mode: str, target: float, tile: tuple[int, int], seed: int) -> LearnConfig:
        """The published preset of `mode` with the settings of this short run."""
        from patch.learn.config import LearnConfig

        return LearnConfig.from_preset(
            mode,
            target,
            tile=tile,
            lr=self.lr,
            local_batch_size=self.batch_size,
            global_batch_size=self.batch_size,
            seed=seed,
        )


@dataclass(frozen=True)
class DemoSettings:
    """All settings of `patch-llm demo`."""

    model: ModelSettings = field(default_factory=ModelSettings)
    learn: LearnSettings = field(default_factory=LearnSettings)
    tile: tuple[int, int] = (128, 128)
    targets: tuple[float, ...] = (0.45, 0.35, 0.25)
    calibration_blocks: int = 128
    heldout_tokens: int = 65536
    new_tokens: int = 48
    max_characters: int | None = None

    def __post_init__(self) -> None:
        if not self.targets or not all(0 < target < 0.5 for target in self.targets):
            raise ValueError(f"targets: expected shares of zeros between 0 and 0.5, got {self.targets}. Use 0.45.")
        if self.heldout_tokens < self.model.block_size:
            raise ValueError(
                f"heldout_tokens: expected at least one window of {self.model.block_size}, got {self.heldout_tokens}. "
                "Use 65536."
            )
