"""What commands write: new folders and files, and what is said about them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_new_folder(path: str | os.PathLike, *, overwrite: bool, what: str) -> Path:
    """An output folder that may be written, as a path; nothing is changed.

    raises  ValueError when it exists with content and overwrite is off, or holds files that are not ours.
    """
    from patch.files.folder import MANIFEST

    folder = Path(path)
    if not os.path.lexists(folder):
        return folder
    if not folder.is_dir():
        raise ValueError(f"--out: expected a folder, {folder} is a file. Choose another --out.")
    if not any(folder.iterdir()):
        return folder
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"--out: expected a new folder, {folder} holds other files. Choose another --out; files that this "
            "program did not write are never replaced."
        )
    if not overwrite:
        raise ValueError(
            f"--out: expected a new folder, {folder} exists already (a complete {what}). Choose another --out, or "
            "replace it with --overwrite."
        )
    return folder


def check_new_file(path: Path | None, flag: str) -> None:
    """Refuse an output file that is there already or cannot be made; None and - (standard output) pass."""
    if path is None or str(path) == "-":
        return
    if os.path.lexists(path):
        raise ValueError(
            f"{flag}: expected a new file, {path} exists already. Choose another name; nothing is replaced."
        )
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{flag}: expected a folder to write to, {parent} is none. Choose another place.")


def refuse_resume_and_overwrite(options: Any) -> None:
    """Refuse options that ask to go on with a run and to replace it."""
    if options.resume and options.overwrite:
        raise ValueError("--resume and --overwrite: expected one of them, got both. Keep the run or replace it.")


def check_input_stays(path: Path, out: Path, flag: str = "--masks") -> None:
    """Refuse an --out that --overwrite would empty of what the command reads."""
    if path.resolve().is_relative_to(out.resolve()):
        raise ValueError(
            f"--out: expected another folder than that of {flag}, {path} is in {out}, which --overwrite replaces. "
            "Choose another --out."
        )


def clear_learning_run(folder: Path) -> None:
    """Remove what an earlier learning run wrote into `folder`, and nothing else."""
    for name in ("metrics.jsonl", "config.resolved.yaml"):
        (folder / name).unlink(missing_ok=True)
    for path in (folder / "result", *folder.glob("checkpoint-*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def provenance(source: str | None, text_sha256: str | None, **values: Any) -> Mapping[str, Any]:
    """Values every artifact carries about its making."""
    from patch.models.facts import versions

    return {"data": source, "text_sha256": text_sha256, "versions": versions(), **values}


def print_written(path: Path, what: str, next_step: str) -> None:
    """Last lines of a command: what was written and what one usually does with it."""
    print(f"wrote {what} to {path}")
    print(f"next: {next_step}")
