"""transformers' TrainingArguments as every training run here has them."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from patch.files.schema import require_choice

# Packages that can take a run's metrics, by the name that transformers has for them: any one of each is enough.
_TRACKER_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


def world_size() -> int:
    """Number of processes that train together, as torchrun says it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among them; the first one, 0, writes what they share."""
    return int(os.environ.get("RANK", "0"))


def require_trackers(place: str, names: Sequence[str]) -> None:
    """Refuse trackers that transformers does not know or that are not installed; `place` names them in the message."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        require_choice(place, name, sorted(INTEGRATION_TO_CALLBACK))
        packages = _TRACKER_PACKAGES.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            advice = f"Run `pip install {packages[0]}`, or leave it out."
            raise ImportError(f"{place}: expected the package {packages[0]} to be installed, it is not. {advice}")


def trainer_arguments(
    folder: Path, steps: int, *, saves: bool, progress: bool, report_to: Sequence[str], **settings: Any
) -> TrainingArguments:
    """Arguments for `steps` optimiser steps on this process's one device.

    saves     whether checkpoints are written to folder, every save_steps
    settings  further arguments by their names in TrainingArguments
    """
    use_cpu = not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=use_cpu,
        max_steps=steps,
        save_strategy="steps" if saves else "no",
        logging_strategy="steps",
        logging_nan_inf_filter=False,
        disable_tqdm=not (progress and sys.stderr.isatty()),
        report_to=list(report_to),
        dataloader_pin_memory=not use_cpu,
        **settings,
    )
    # One process drives one device. Trainer's fallback for more, DataParallel, copies the modules on every forward
    # pass: the sums that masked layers stash, and hooks on layers, would be lost in the copies.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
