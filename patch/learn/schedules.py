"""What changes in the course of learning: temperatures and scales, and the learning rate."""

from __future__ import annotations

import math

from patch.files.schema import record
from patch.settings import AtLeastOne
from patch_kernels.checks import require_number


@record
class Schedule:
    """Straight line from start to end over `steps` optimiser steps, constant afterwards."""

    start: float
    end: float
    steps: AtLeastOne

    def at(self, step: int) -> float:
        """Value at an optimiser step; the first step is 0."""
        require_number("Schedule, step", step, ge=0, advice="Steps count from 0.")
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, min_ratio: float = 0.0) -> float:
    """Share of the peak learning rate: linear from 0 (step 0 does not move), then cosine to min_ratio."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min((step - warmup_steps) / max(1, total_steps - warmup_steps), 1.0)
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
