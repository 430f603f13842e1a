"""What must be at a path before anything is read or written; `what` begins the message, such as "--text"."""

from __future__ import annotations

import os
from pathlib import Path

from patch.files.folder import resolve_folder


def require_file(what: str, path: str | os.PathLike[str], wanted: str, advice: str = "Check the path.") -> Path:
    """The path of a file that is there; raises FileNotFoundError for none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what}: expected {wanted}, found none at {path}. {advice}")
    return Path(path)


def require_folder(what: str, path: str | os.PathLike[str], wanted: str, advice: str = "Check the path.") -> Path:
    """The path of a folder that is there; raises FileNotFoundError for none."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{what}: expected {wanted}, found none at {path}. {advice}")
    return Path(path)


def require_place_for_folder(what: str, path: str | os.PathLike[str], advice: str = "Choose another --out.") -> Path:
    """The path of a folder, or of nothing where one can be made; raises ValueError for a file or a broken link."""
    if os.path.lexists(path) and not Path(path).is_dir():
        raise ValueError(f"{what}: expected a folder, {path} is a file. {advice}")
    require_writable(what, path, advice)
    return Path(path)


def require_new(
    what: str, path: str | os.PathLike[str], kind: str = "file", advice: str = "Choose another name."
) -> Path:
    """The path of a file or folder that can be made; raises ValueError where something is, or nothing can be."""
    if os.path.lexists(path):
        raise ValueError(f"{what}: expected a new {kind}, {path} exists already. {advice}")
    require_writable(what, path, advice)
    return Path(path)


def require_writable(what: str, path: str | os.PathLike[str], advice: str) -> None:
    """raises ValueError where the path, or the nearest folder above it that is there, takes no new files."""
    place = Path(os.path.abspath(path))
    place = next(folder for folder in (place, *place.parents) if os.path.lexists(folder))
    if not place.is_dir():
        raise ValueError(f"{what}: expected a folder to write to, {place} is none. {advice}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{what}: expected a folder to write to, {place} may not be written. {advice}")


def require_model_path(path: str | os.PathLike[str]) -> str:
    """The folder of a model as text, put back where a replacement of it was cut short; a hub id as it is.

    raises  FileNotFoundError for what is no folder and can be no hub id.
    """
    name = os.fspath(path)
    folder = resolve_folder(name, must_exist=False)
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "/", "~")) or os.path.lexists(name) or name.count("/") > 1:
        raise FileNotFoundError(f"expected a folder with a model at {name}, found none; check the path")
    return name
