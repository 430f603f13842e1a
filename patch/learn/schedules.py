"""What changes in the course of learning: temperatures and scales, and the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Straight line from start to end over `steps` optimiser steps, constant afterwards."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Schedule: expected at least 1 step, got {self.steps}; use the number of optimiser steps")

    def at(self, step: int) -> float:
        """Value at an optimiser step; the first step is 0."""
        if step < 0:
            raise ValueError(f"Schedule: expected a step >= 0, got {step}; steps count from 0")
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, min_ratio: float = 0.0) -> float:
    """Share of the peak learning rate: linear from 0 (step 0 does not move), then cosine to min_ratio."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min((step - warmup_steps) / max(1, total_steps - warmup_steps), 1.0)
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
