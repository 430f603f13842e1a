"""Mask learning on frozen weights: PATCH-Joint, PATCH-Tile and MaskLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patch.files.lazy import lazy_names

if TYPE_CHECKING:
    from patch.learn.config import LearnConfig
    from patch.learn.objective import density, weight_norm_ratio
    from patch.learn.run import LearnResult, learn
    from patch.learn.schedules import Schedule

__all__ = ["LearnConfig", "LearnResult", "Schedule", "density", "learn", "weight_norm_ratio"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "LearnConfig": "config",
        "LearnResult": "run",
        "Schedule": "schedules",
        "density": "objective",
        "learn": "run",
        "weight_norm_ratio": "objective",
    },
)
