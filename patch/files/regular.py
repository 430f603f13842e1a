"""Reads regular files only: never a link, a device, or a FIFO that would block."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path


def file_sha256(path: Path) -> str:
    """SHA-256 of a regular file as 64 hex digits."""
    digest = hashlib.sha256()
    with open(open_regular(path), "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def open_regular(path: Path) -> int:
    """File descriptor of a regular file. Never follows a link and never blocks on a FIFO."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path}: expected a regular file, found a link; copy the file itself") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: expected a regular file, found a directory or special file; save it again")
    return descriptor


def read_regular(path: Path, limit: int) -> bytes:
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path}: expected at most {limit} bytes, found {size}; this is not a file we wrote")
        return file.read(limit)
