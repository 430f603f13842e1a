"""Folders that are written completely or not at all, and verified before they are read.

Writing: everything goes into `NAME.tmp-<pid>` beside the target, every file is fsynced, a manifest with the
size and SHA-256 of every file is written last, then the folder is renamed into place. A target that exists is
renamed to `NAME.old-<pid>` first and removed last; a process killed between the two renames leaves only the
aside copy, which the next reader or writer puts back. At every instant a complete folder, old or new, can be
found.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from patch.files.failures import naming
from patch.files.regular import file_sha256
from patch.files.schema import Count, Says, Sha256, parse, record
from patch.files.strict_json import dump_json, read_json

logger = logging.getLogger(__name__)
MANIFEST = "patch_manifest.json"
FORMAT: Literal["patch-folder"] = "patch-folder"
VERSION = 1
MAX_FILES = 100_000
_ADVICE = "Copy the whole folder again, or save it again."


def _inside(files: dict[str, Entry]) -> dict[str, Entry]:
    for name in files:
        pure = PurePosixPath(name)
        unsafe = pure.is_absolute() or str(pure) != name or ".." in pure.parts or "\\" in name or "\0" in name
        if unsafe or name in ("", ".", MANIFEST) or len(name) > 1024:
            raise ValueError(f"expected file paths inside the folder, got {name[:200]!r}; do not load it")
    return files


@record
class Entry:
    """What the manifest says of a file."""

    size: Count
    sha256: Sha256


@record
class Manifest:
    """Contents of the manifest: every file by its relative path."""

    format: Annotated[Literal["patch-folder"], Says(repr(FORMAT), "This is not a folder we wrote.")]
    version: Annotated[
        int,
        Field(ge=VERSION, le=VERSION),
        Says(f"version {VERSION}", "It was written by another version, install that version or save again."),
    ]
    files: Annotated[
        dict[str, Entry],
        Field(min_length=1, max_length=MAX_FILES),
        AfterValidator(_inside),
        Says(f"1 to {MAX_FILES} files"),
    ]


_writing: set[Path] = set()
_writing_lock = threading.Lock()


def write_folder(path: str | os.PathLike, write: Callable[[Path], object], *, replace: bool = True) -> Path:
    """Make the folder `path` hold exactly what `write(directory)` puts into an empty directory.

    replace  True: an earlier folder written by this function is replaced; any other folder that has files in it is
             refused. False: nothing is replaced or refused; where something is at the path by then, the folder gets
             the next free name (NAME-2), so that the work of hours is not lost
    returns  the path of the folder that was written
    raises   ValueError for a target that must not be replaced or for links and special files made by `write`;
             OSError from the file system. After any error or kill the earlier folder is still readable.
    """
    target = Path(os.path.abspath(path))
    if not target.name:
        raise ValueError(f"expected a path for a new folder, got the root {target}; choose a folder inside it")
    with naming(target), _only_writer(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        resolve_folder(target, must_exist=False)
        if replace and (foreign := foreign_files(target)):
            expected = "expected a new or empty folder or one written before"
            raise ValueError(f"{target}: {expected}, found {foreign}; choose another path or move them away")
        _remove_stale(target)
        staging = target.with_name(f"{target.name}.tmp-{os.getpid()}")
        os.mkdir(staging)
        try:
            with _lock(staging):  # tells other hosts' and containers' writers that this one is alive
                write(staging)
                _seal(staging)
            if replace:
                _swap_in(staging, target)
                return Path(path)
            return Path(path).with_name(_move_to_free_name(staging, target).name)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def resolve_folder(path: str | os.PathLike, *, must_exist: bool = True) -> Path:
    """The folder at `path`, after putting back an aside copy that an interrupted replacement left behind."""
    target = Path(os.path.abspath(path))
    if os.path.lexists(target):
        return target
    if target.parent.is_dir():
        with _lock(target.parent):
            asides = [] if os.path.lexists(target) else _siblings(target, "old")
            for aside, _ in sorted(asides, key=lambda item: item[0].stat().st_mtime, reverse=True):
                if not (aside / MANIFEST).is_file():
                    continue
                logger.warning("%s was being replaced when its writer stopped; using the earlier copy", target)
                try:
                    os.rename(aside, target)
                except OSError:
                    return aside  # read-only parent: readable all the same
                break
    if must_exist and not os.path.lexists(target):
        raise FileNotFoundError(f"expected a folder at {target}, found nothing; check the path")
    return target


def verify_folder(path: str | os.PathLike[str]) -> Manifest:
    """Check every file of a folder made by write_folder against its manifest.

    returns the manifest.
    raises  FileNotFoundError when there is no such folder, ValueError naming the file and the broken rule.
    """
    folder = resolve_folder(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found something else; give the folder that was saved")
    manifest = _read_manifest(folder)
    sizes = {name: os.lstat(folder / name).st_size for name in _walk(folder) if name != MANIFEST}
    expected = {name: entry.size for name, entry in manifest.files.items()}
    for name in sorted(sizes.keys() | expected.keys()):
        if sizes.get(name) != expected.get(name):
            wanted, got = (f"{x[name]} bytes" if name in x else "no such file" for x in (expected, sizes))
            raise ValueError(f"{folder / name}: expected {wanted} by {MANIFEST}, found {got}. {_ADVICE}")
    for name, entry in manifest.files.items():
        if (found := file_sha256(folder / name)) != entry.sha256:
            raise ValueError(
                f"{folder / name}: expected SHA-256 {entry.sha256} by {MANIFEST}, found {found}. {_ADVICE}"
            )
    return manifest


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise ValueError(f"{path}: missing, so the folder is incomplete or not one of ours; save it again")
    return parse(Manifest, read_json(path), f"{path}: ", "Save the folder again.")


def _walk(folder: Path) -> Iterator[str]:
    """Relative POSIX paths of all regular files; anything else in the folder is an error."""
    for directory, subdirectories, names in os.walk(folder, followlinks=False):
        for name in (*subdirectories, *names):
            path = Path(directory, name)
            mode = os.lstat(path).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise ValueError(f"{path}: expected a regular file, found a link or special file; remove it")
            if stat.S_ISREG(mode):
                yield path.relative_to(folder).as_posix()


def foreign_files(target: Path) -> str:
    """What is at a path that this module did not write, so that it must never be deleted; "" for nothing."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        return "a file or link"
    if not target.exists() or not os.listdir(target):
        return ""
    if not (target / MANIFEST).is_file():
        return "other files"
    try:
        foreign = set(_walk(target)) - _read_manifest(target).files.keys() - {MANIFEST}
    except ValueError:
        return ""  # ours but damaged: may be replaced
    return f"also {sorted(foreign)[:5]}" if foreign else ""


def _siblings(target: Path, kind: str) -> list[tuple[Path, int]]:
    """(path, pid) of the directories NAME.<kind>-<pid> beside the target."""
    pattern = re.compile(re.escape(f"{target.name}.{kind}-") + r"(\d{1,10})")
    found = ((target.parent / name, pattern.fullmatch(name)) for name in os.listdir(target.parent))
    return [(path, int(match[1])) for path, match in found if match and path.is_dir() and not path.is_symlink()]


def _remove_stale(target: Path) -> None:
    """Remove what dead writers of this target left. Only called once a readable target is in place or none "
    "exists."""
    for kind in ("tmp", "old") if os.path.lexists(target) else ("tmp",):
        for path, pid in _siblings(target, kind):
            if (pid == os.getpid() or not _is_alive(pid)) and not _is_locked(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_locked(directory: Path) -> bool:
    """A process id says nothing about other containers; a lock held there does."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _seal(staging: Path) -> None:
    """Flush every file and directory to the disk, the manifest last."""
    files: dict[str, dict[str, Any]] = {}
    for name in sorted(_walk(staging)):
        if name == MANIFEST:
            raise ValueError(f"the name {MANIFEST} is reserved; let write() use another one")
        _fsync(staging / name)
        files[name] = {"size": os.lstat(staging / name).st_size, "sha256": file_sha256(staging / name)}
    if not files:
        raise ValueError(f"expected write() to make at least one file for {staging}, it made none")
    content = dump_json({"format": FORMAT, "version": VERSION, "files": files})
    with open(staging / MANIFEST, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    for directory, _, _ in os.walk(staging, topdown=False):
        _fsync(Path(directory))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_to_free_name(staging: Path, target: Path) -> Path:
    for place in (target, *(target.with_name(f"{target.name}-{number}") for number in range(2, 1000))):
        # A rename takes the place of an empty folder only, so nothing can be lost to what appears at this instant.
        try:
            os.rename(staging, place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            continue
        _fsync(target.parent)
        if place != target:
            logger.warning("%s was made by something else meanwhile and is kept; this result is in %s", target, place)
        return place
    raise FileExistsError(f"expected a free name like {target}, found none; give another one")


def _swap_in(staging: Path, target: Path) -> None:
    aside = target.with_name(f"{target.name}.old-{os.getpid()}")
    with _lock(target.parent):
        replaced = os.path.lexists(target)
        if replaced:
            os.rename(target, aside)
        try:
            os.rename(staging, target)
        except BaseException:
            if replaced:
                os.rename(aside, target)
            raise
        _fsync(target.parent)
    if replaced:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Advisory lock on a directory. File systems without flock go without."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _only_writer(target: Path) -> Iterator[None]:
    """Two threads writing the same folder would share one staging directory."""
    with _writing_lock:
        if target in _writing:
            raise RuntimeError(f"{target} is being written by another thread; write it once at a time")
        _writing.add(target)
    try:
        yield
    finally:
        with _writing_lock:
            _writing.discard(target)
