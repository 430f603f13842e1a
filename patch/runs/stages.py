"""Stages of a long job: each leaves a folder with its result and a key of what it was made from.

A stage whose folder holds the same key is not run again, so an interrupted job goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch.files.folder import verify_folder, write_folder
from patch.files.strict_json import dump_json, read_json

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

STAGE_FILE = "stage.json"


def finished(folder: Path, key: str) -> dict[str, Any] | None:
    """Result of a complete stage folder with this key; None for none, another, or a damaged one."""
    if not (folder / STAGE_FILE).is_file():
        return None
    try:
        verify_folder(folder)
        content = read_json(folder / STAGE_FILE)
    except (ValueError, OSError) as error:
        logger.warning("making stage %s again: %s", folder.name, error)
        return None
    return content["result"] if content["key"] == key else None


def write_tensors(folder: Path, key: str, result: Mapping[str, Any], file: str, tensors: Mapping[str, Tensor]) -> None:
    """Make a stage folder with this key and result, and its tensors in a safetensors file."""
    from safetensors.torch import save_file

    from patch.runs.identity import plain  # brings torch, which help must not wait for

    def write(directory: Path) -> None:
        save_file({name: plain(tensor) for name, tensor in tensors.items()}, directory / file)
        (directory / STAGE_FILE).write_bytes(dump_json({"key": key, "result": dict(result)}))

    write_folder(folder, write)


def stages_folder(out: Path) -> Path:
    """Where a job keeps what it has done of a result `out` while it is under way."""
    return out.with_name(f"{out.name}.stages")


def remove_stages(folder: Path) -> None:
    """Remove finished stages, and their folder if nothing else is in it."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if (path / STAGE_FILE).is_file():
            shutil.rmtree(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value: the key of a stage with these settings and inputs."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
