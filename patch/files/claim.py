"""Claims of output paths: who writes a folder at the end of hours says so at their start."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def claimed(path: str | os.PathLike[str], what: str = "out") -> Iterator[Path]:
    """Hold a path that will be written; a second claim, of any process, is refused at once.

    The claim is a lock on the file .NAME.lock beside the path. It ends with the body or with the process, however that
    ends; a lock file that a killed process left behind holds nothing.

    what    begins the message, such as "--out"
    raises  ValueError when another one holds the path, or nothing can be written there.
    """
    target = Path(os.path.abspath(path))
    made = [folder for folder in target.parents if not os.path.lexists(folder)]
    lock = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(lock)
    except OSError as error:
        _remove_empty(made)
        got = f"got {path} ({error.strerror})"
        raise ValueError(f"{what}: expected a path that can be written, {got}. Choose another one.") from None
    if descriptor is None:
        got = f"{path} is being written by process {_holder(lock)}"
        raise ValueError(f"{what}: expected a path that no other run is writing, {got}. Choose another one, or wait.")
    try:
        yield target
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()  # while it is held: a claim on a file that is gone is taken again, see _locked
        os.close(descriptor)
        _remove_empty(made)


def _locked(lock: Path) -> int | None:
    """Descriptor of the locked file, None where another one has it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            pass  # file systems without locks go without
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                os.ftruncate(descriptor, 0)
                with contextlib.suppress(OSError):  # a full disk may still have room for what is to be written
                    os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        os.close(descriptor)  # its holder removed it after we had opened it


def _holder(lock: Path) -> str:
    with contextlib.suppress(OSError):
        return lock.read_text(encoding="ascii", errors="replace")[:20] or "unknown"
    return "unknown"


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # what has something in it stays
        for folder in folders:
            folder.rmdir()
