"""transformers' TrainingArguments as every training run here has them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments


def world_size() -> int:
    """Number of processes that train together, as torchrun says it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among them; the first one, 0, writes what they share."""
    return int(os.environ.get("RANK", "0"))


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
