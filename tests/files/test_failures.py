"""Errors of the file system: one sentence with the path, and nothing incomplete left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from patch.files import atomic
from patch.files.failures import as_file_error, file_error_text
from patch.files.folder import write_folder
from patch.files.paths import require_place_for_folder


@contextlib.contextmanager
def small_files():
    """Writing beyond 4 KiB fails with EFBIG in the body, as a full disk does with ENOSPC.

    No fixture: pytest itself writes between a test and the end of its fixtures, perhaps to a long file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


WRITERS = {
    "safetensors": lambda folder: save_file({"a": torch.zeros(4096)}, folder / "a.safetensors"),
    "python": lambda folder: (folder / "a").write_bytes(bytes(9000)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_folder_that_does_not_fit_leaves_nothing(tmp_path, write):
    with small_files(), pytest.raises(OSError, match="File too large") as caught:
        write_folder(tmp_path / "out", write)
    text = file_error_text(as_file_error(caught.value))
    assert text == (
        f"{tmp_path / 'out'}: expected a file within the size limit, got 'File too large'. "
        "Raise the limit (ulimit -f) or choose another file system."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_fit_leaves_nothing(tmp_path):
    with small_files(), pytest.raises(OSError, match="File too large") as caught:
        atomic.write_text_atomic(tmp_path / "a.txt", "x" * 9000)
    assert caught.value.filename == str(tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="File name too long"):
        atomic.write_text_atomic(tmp_path / ("x" * 255), "text")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "f: expected room on the disk, got 'No space left on device'. Free space there or choose ano"),
        (errno.EDQUOT, "f: expected room within the disk quota, got 'Disk quota exceeded'. Free space there"),
        (errno.EACCES, "f: expected a path that may be read and written, got 'Permission denied'. Change its perm"),
        (errno.EROFS, "f: expected a file system that can be written, got 'Read-only file system'. Choose another"),
        (errno.ENOTDIR, "f: expected a folder, got 'Not a directory'. Choose another path."),
        (errno.EISDIR, "f: expected a file, got 'Is a directory'. Give the path of a file."),
        (errno.EIO, "f: expected a file system that works, got 'Input/output error'. Check the disk"),
    ],
)
def test_every_cause_has_its_advice(number, expected):
    assert file_error_text(OSError(number, os.strerror(number), "f")).startswith(expected)


def test_errors_of_other_libraries_and_of_our_own():
    found = as_file_error(RuntimeError("I/O error: No space left on device (os error 28)"), "f")
    assert (found.errno, found.filename) == (errno.ENOSPC, "f")
    assert as_file_error(RuntimeError("PytorchStreamWriter failed writing file data/0: ...")).errno == errno.EIO
    assert as_file_error(FileNotFoundError("--masks: expected a folder, found none")) is None
    assert as_file_error(RuntimeError("other")) is None
    assert file_error_text(OSError(errno.ENOSPC, "No space left on device")).startswith("expected room on the disk")


def test_a_place_below_a_file_or_without_rights_is_refused_before(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"--out: expected a folder to write to, .*file is none\. Choose another --out"
    ):
        require_place_for_folder("--out", tmp_path / "file" / "x")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match=r"--out: expected a folder to write to, .* may not be written\. Choose"):
        require_place_for_folder("--out", tmp_path / "new" / "x")
