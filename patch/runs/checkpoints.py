"""Checkpoint folders of a training run: finding the newest that is complete, and the state of random generators."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from patch.files.folder import verify_folder

logger = logging.getLogger(__name__)
RESULT = "result"
TRAINER_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")
_REMOVED = re.compile(r"removed-checkpoint-\d{1,12}(\.\d+)?")


def newest_checkpoint(output_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that verifies, and newer ones that do not with the reasons; nothing is changed."""
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(output_dir)):
        try:
            verify_folder(path)
        except (ValueError, OSError) as error:
            damaged[path] = str(error)
        else:
            return path, damaged
    return None, damaged


def tidy_up(output_dir: Path, damaged: Mapping[Path, str]) -> None:
    """Rename damaged checkpoints to damaged-*, with a report, and remove those whose removal was interrupted."""
    import shutil

    for path, reason in damaged.items():
        aside = _free_name(path.with_name(f"damaged-{path.name}"))
        os.rename(path, aside)
        logger.warning("ignoring an unusable checkpoint (kept as %s): %s", aside.name, reason)
    for path in output_dir.iterdir():
        if _REMOVED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def load_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file, after checking names and shapes against `expected` before any is allocated."""
    with safe_open(path, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                differs = f"expected shape {wanted.get(name)} for {name}, got {found.get(name)}"
                raise ValueError(f"{path}: {differs}; resume with the same model, mode, exclude and tile")
        return {name: file.get_tensor(name) for name in expected}


def random_states(device: torch.device) -> dict[str, Tensor]:
    """State of the generators that training may use (dropout): the CPU's and the training device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(path: Path, rank: int, device: torch.device) -> None:
    with safe_open(path, framework="pt") as file:
        torch.set_rng_state(file.get_tensor("cpu")[rank])
        if device.type == "cuda" and "cuda" in file.keys():
            torch.cuda.set_rng_state(file.get_tensor("cuda")[rank], device)


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def remove_checkpoint(path: Path) -> None:
    import shutil

    # Renamed first: a kill in the middle of the removal must not leave a folder that looks like a checkpoint.
    doomed = _free_name(path.with_name(f"removed-{path.name}"))
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _free_name(path: Path) -> Path:
    number = 0
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate
