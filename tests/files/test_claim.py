"""Two runs into one path: the second is refused at its start, and nothing that is there is lost at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from patch.files import claim as claim_module
from patch.files.claim import claimed
from patch.files.folder import verify_folder, write_folder

HOLD = """
import sys, time
from patch.files.claim import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def write(text):
    return lambda directory: (directory / "text").write_text(text)


def test_a_second_claim_is_refused_and_names_the_process(tmp_path):
    path = tmp_path / "new" / "parents" / "out"
    with claimed(path, "--out") as held:
        assert held == path
        message = (
            rf"--out: expected a path that no other run is writing, .*out is being written by process {os.getpid()}. "
            r"Choose another one, or wait\."
        )
        with pytest.raises(ValueError, match=message), claimed(path, "--out"):
            raise AssertionError
        with claimed(tmp_path / "new" / "parents" / "other"):  # another path beside it
            write_folder(path, write("a"))
    with claimed(path):
        pass
    assert sorted(p.name for p in path.parent.iterdir()) == ["out"]


def test_a_claim_leaves_no_folders_behind(tmp_path):
    with claimed(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["file/out", "x" * 255, "file/a/b"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, path):
    (tmp_path / "file").write_text("")
    message = r"--out: expected a path that can be written, got .*\((Not a dir|File name too|File ex).*\)\. Choose"
    with pytest.raises(ValueError, match=message), claimed(tmp_path / path, "--out"):
        raise AssertionError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_claim_of_a_killed_process_ends_with_it(tmp_path):
    path = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"is being written by process {process.pid}"), claimed(path):
            raise AssertionError
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / ".out.lock").exists()  # what a kill leaves holds nothing
    with claimed(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_its_holder_removes_is_made_again(tmp_path, monkeypatch):
    """The lock of a file that is gone holds nothing: a third process would make and lock a new one."""
    lock, flock, calls = tmp_path / ".out.lock", claim_module.fcntl.flock, []

    def remove_first(descriptor, operation):
        if not calls:
            lock.unlink()
        calls.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(claim_module.fcntl, "flock", remove_first)
    with claimed(tmp_path / "out"):
        assert lock.read_text() == str(os.getpid())
    assert len(calls) == 2


def test_a_file_system_without_locks_goes_without(tmp_path, monkeypatch):
    def fail(descriptor, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(claim_module.fcntl, "flock", fail)
    with claimed(tmp_path / "out"), claimed(tmp_path / "out"):
        pass


def test_what_appears_meanwhile_is_kept(tmp_path, caplog):
    path = tmp_path / "out"

    def slow(directory):
        (directory / "text").write_text("mine")
        os.rename(write_folder(tmp_path / "of-another-writer", write("first")), path)

    written = write_folder(path, slow, replace=False)
    assert (path / "text").read_text() == "first"
    assert written == tmp_path / "out-2"
    assert (written / "text").read_text() == "mine"
    assert f"is kept; this result is in {written}" in caplog.text
    verify_folder(path)
    verify_folder(written)
    (tmp_path / "file").write_text("mine")
    assert write_folder(tmp_path / "file", write("new"), replace=False).name == "file-2"
    (tmp_path / "empty").mkdir()
    assert write_folder(tmp_path / "empty", write("new"), replace=False).name == "empty"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "file-2", "out", "out-2"]
