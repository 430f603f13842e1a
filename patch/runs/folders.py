"""The folder of a training run: what belongs to one, and which folders a run may be put into."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from patch.runs.checkpoints import RESULT
from patch.runs.metrics import METRICS
from patch.settings import RESOLVED_NAME

IDENTITY = "run.json"
# What says that there was a run, and what one leaves beside it: TensorBoard's files, parts of interrupted writes.
_OF_A_RUN = (RESULT, METRICS, "checkpoint-*")
_BESIDE_IT = (RESOLVED_NAME, IDENTITY, "runs", "damaged-checkpoint-*", "removed-checkpoint-*", "*.tmp-*", "*.old-*")


def earlier_run(folder: Path) -> list[str]:
    """Names in a folder that say that there was a run in it."""
    return [name for pattern in _OF_A_RUN for name in _names(folder) if fnmatchcase(name, pattern)]


def require_run_folder(place: str, folder: Path) -> None:
    """Refuse to put a run into a folder that holds other things and no earlier run; `place` names it in the message."""
    require_nothing_else(place, folder, () if earlier_run(folder) else _BESIDE_IT)


def require_nothing_else(place: str, folder: Path, known: tuple[str, ...]) -> None:
    """Refuse a folder with names that fit none of the patterns in `known`; () knows everything."""
    others = [name for name in _names(folder) if known and not _is_one_of(name, known)]
    if others:
        got = f"{folder} holds other files ({', '.join(others[:4])}{', ...' if len(others) > 4 else ''})"
        raise ValueError(f"{place}: expected a new folder or one of an earlier run, {got}. Choose another folder.")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
