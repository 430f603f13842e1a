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
    return Path(path)


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
