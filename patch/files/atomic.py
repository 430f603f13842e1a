"""Single files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from patch.files.failures import naming


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], place: Callable[[Path, Path], Any] = os.replace) -> Iterator[IO[bytes]]:
    """A binary file to write, which becomes `path` when the body ends without an error; nothing is left otherwise.

    place  puts the finished file, given first, at its path; by default an earlier file there is replaced
    A reader or a crash sees the earlier or the new content, never a part.
    """
    path = Path(path)
    staging = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with naming(path), open(staging, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        place(staging, path)
    finally:
        with contextlib.suppress(OSError):
            staging.unlink()


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write or replace a UTF-8 text file; see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def write_new_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a file that is not there yet; returns the path that was written.

    When the file appeared since it was looked for, the text goes to the next free name (results-2.json): an
    evaluation of hours is neither lost nor does it replace another one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with replacing(path, lambda staging, _: written.append(_place_at_free_name(staging, path))) as file:
        file.write(text.encode())
    return written[0]


def _place_at_free_name(staging: Path, path: Path) -> Path:
    for target in (path, *(path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(2, 1000))):
        try:
            # Takes the name, where a rename would replace; not a hard link, which many shares do not have.
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            continue
        os.replace(staging, target)
        return target
    raise FileExistsError(f"expected a free name like {path}, found none; give another one")
