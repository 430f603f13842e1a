"""Errors of the file system in one sentence: which file, what was expected, what came, what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

_ROOM = "Free space there or choose another place, then run again."
_RIGHTS = "Change its permissions or choose another place."
_CAUSES = {
    errno.ENOSPC: ("room on the disk", _ROOM),
    errno.EDQUOT: ("room within the disk quota", _ROOM),
    errno.EFBIG: ("a file within the size limit", "Raise the limit (ulimit -f) or choose another file system."),
    errno.EACCES: ("a path that may be read and written", _RIGHTS),
    errno.EPERM: ("a path that may be read and written", _RIGHTS),
    errno.EROFS: ("a file system that can be written", "Choose another place."),
    errno.ENAMETOOLONG: ("a shorter name", "Choose a shorter one."),
    errno.ENOTDIR: ("a folder", "Choose another path."),
    errno.EISDIR: ("a file", "Give the path of a file."),
    errno.ENOENT: ("an existing path", "Check the path."),
    errno.ELOOP: ("a path without loops of links", "Give the path that the links should lead to."),
    errno.EMFILE: ("a free file handle", "Raise the limit (ulimit -n) and run again."),
}
_OTHERWISE = ("a file system that works", "Check the disk, its free space and the path.")


def as_file_error(error: BaseException, path: str | os.PathLike[str] | None = None) -> OSError | None:
    """The error as one of the file system that names a path; None for what is none, such as our own messages."""
    if isinstance(error, OSError):
        if error.errno is None:
            return None
        if error.filename is None and path is not None:
            error.filename = os.fspath(path)
        return error
    # safetensors and tokenizers write in Rust, torch.save in C++: their errors are of their own kinds.
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(found[1])
    elif "PytorchStreamWriter failed" in str(error):
        number = errno.EIO
    else:
        return None
    return OSError(number, os.strerror(number), None if path is None else os.fspath(path))


def file_error_text(error: OSError) -> str:
    """What to say of an error that as_file_error made or found."""
    expected, advice = _CAUSES.get(error.errno or 0, _OTHERWISE)
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}expected {expected}, got '{error.strerror}'. {advice}"


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the file system in the body, also those that a library words its own way, name the path."""
    try:
        yield
    except Exception as error:
        found = as_file_error(error, path)
        if found is None or found is error:
            raise
        raise found from error
