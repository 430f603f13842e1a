"""Mask learning on frozen weights: PATCH-Joint, PATCH-Tile and MaskLLM."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patch.learn.config import LearnConfig
    from patch.learn.objective import density, weight_norm_ratio
    from patch.learn.run import LearnResult, learn
    from patch.learn.schedules import Schedule

__all__ = ["LearnConfig", "LearnResult", "Schedule", "density", "learn", "weight_norm_ratio"]

# Imported when asked for: the settings alone need neither torch nor transformers' Trainer, which takes seconds.
_HOMES = {
    "LearnConfig": "config",
    "LearnResult": "run",
    "Schedule": "schedules",
    "density": "objective",
    "learn": "run",
    "weight_norm_ratio": "objective",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"patch.learn.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'patch.learn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
