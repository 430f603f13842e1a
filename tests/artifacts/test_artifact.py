"""Folders survive kills and I/O errors; damaged or hostile files are refused by name and rule."""

from __future__ import annotations

import ast
import errno
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import patch
import patch_kernels
from patch.artifacts.artifact import load_artifact, save_artifact
from patch.files import folder, safetensors_header
from patch.files.folder import verify_folder, write_folder
from patch.models import facts

MANIFEST = folder.MANIFEST


def writer(text, files=3):
    def write(directory: Path) -> None:
        (directory / "sub").mkdir()
        for i in range(files):
            (directory / "sub" / f"{i}.bin").write_bytes(f"{text}-{i}".encode() * 200)
        (directory / "top.txt").write_text(text)

    return write


def content(path) -> str:
    """Which save is at path; fails when it is a mixture or damaged."""
    verify_folder(path)
    text = (Path(path) / "top.txt").read_text()
    for i in range(3):
        assert (Path(path) / "sub" / f"{i}.bin").read_bytes() == f"{text}-{i}".encode() * 200
    return text


def leftovers(path) -> list[str]:
    return sorted(p.name for p in Path(path).parent.iterdir() if p.name != Path(path).name)


# ---- protocol ----


def test_write_replace_verify(tmp_path):
    path = tmp_path / "deep" / "run"
    for text in ("one", "two"):
        write_folder(path, writer(text))
        assert content(path) == text
        assert leftovers(path) == []
    manifest = verify_folder(path)
    assert set(manifest.files) == {"top.txt", "sub/0.bin", "sub/1.bin", "sub/2.bin"}


def run_in_child(action) -> int:
    """Exit status of a forked child that runs action; a kill shows as a negative signal number."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Every call into the operating system by which a save makes progress.
STEPS = [(os, name) for name in ("mkdir", "rename", "fsync", "open", "close")] + [(folder.shutil, "rmtree")]


def kill_after(number):
    """Patches every step so that the process kills itself after the number-th one."""
    count = 0

    def wrap(function):
        def wrapped(*args, **kwargs):
            nonlocal count
            result = function(*args, **kwargs)
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for module, name in STEPS:
        setattr(module, name, wrap(getattr(module, name)))


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_after_every_step(tmp_path, replacing):
    path = tmp_path / "run"
    outcomes = set()
    for number in range(1, 200):
        if replacing:
            write_folder(path, writer("old"))
        else:
            folder.shutil.rmtree(path, ignore_errors=True)

        def action(number=number):
            kill_after(number)
            write_folder(path, writer("new"))

        status = run_in_child(action)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        try:
            outcomes.add(content(path))
        except FileNotFoundError:
            assert not replacing
            outcomes.add("nothing")
        write_folder(path, writer("next"))
        assert content(path) == "next"
        assert leftovers(path) == []
    else:
        pytest.fail("the save never finished")
    assert number > 20
    assert outcomes == ({"old", "new"} if replacing else {"nothing", "new"})


@pytest.mark.parametrize("rounds", [25, pytest.param(300, marks=pytest.mark.slow)])
def test_killed_at_random_instants(tmp_path, rounds):
    path = tmp_path / "run"
    write_folder(path, writer("0"))
    begin = time.perf_counter()
    write_folder(path, writer("0"))
    duration = time.perf_counter() - begin
    draw = random.Random(0)
    latest = "0"
    for number in range(1, rounds + 1):
        pid = os.fork()
        if pid == 0:
            write_folder(path, writer(str(number)))
            os._exit(0)
        time.sleep(draw.uniform(0, 1.5 * duration))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = content(path)
        assert found in (latest, str(number))
        latest = found
    write_folder(path, writer("end"))
    assert content(path) == "end" and leftovers(path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_error_at_every_call(tmp_path, monkeypatch, code):
    path = tmp_path / "run"
    write_folder(path, writer("old"))
    failures = 0
    for number in range(1, 200):
        count = 0

        def wrap(function, number=number):
            def wrapped(*args, **kwargs):
                nonlocal count
                count += 1
                if count == number:
                    raise OSError(code, os.strerror(code))
                return function(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as context:
            for name in ("mkdir", "rename", "fsync", "open"):
                context.setattr(os, name, wrap(getattr(os, name)))
            try:
                write_folder(path, writer("new"))
                finished = count < number
            except OSError as error:
                assert error.errno == code
                failures += 1
                finished = False
        found = content(path)
        assert found in ("old", "new")
        if finished:
            break
        write_folder(path, writer("old"))
        assert content(path) == "old" and leftovers(path) == []
    else:
        pytest.fail("the save never finished")
    assert failures > 15


def test_short_write_is_seen(tmp_path):
    path = tmp_path / "run"
    write_folder(path, writer("old"))

    def write(directory):
        writer("new")(directory)
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(path, write)
    assert content(path) == "old" and leftovers(path) == []


def test_interrupt_during_save_keeps_the_old_one(tmp_path):
    path = tmp_path / "run"
    write_folder(path, writer("old"))

    def write(directory):
        writer("new")(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(path, write)
    assert content(path) == "old" and leftovers(path) == []


def test_reader_puts_an_aside_copy_back(tmp_path):
    path = tmp_path / "run"
    write_folder(path, writer("old"))
    path.rename(tmp_path / "run.old-999999999")
    (tmp_path / "run.tmp-999999999").mkdir()
    assert content(path) == "old"
    assert path.is_dir()


def test_staging_of_a_live_process_is_left_alone(tmp_path):
    path = tmp_path / "run"
    alive, dead = tmp_path / f"run.tmp-{os.getppid()}", tmp_path / "run.tmp-999999999"
    alive.mkdir()
    dead.mkdir()
    other = tmp_path / "run2.tmp-999999999"
    other.mkdir()
    write_folder(path, writer("new"))
    assert leftovers(path) == sorted([alive.name, other.name])


def test_two_writers_race(tmp_path):
    path = tmp_path / "run"
    write_folder(path, writer("0"))
    for number in range(8):
        pids = []
        for k in range(2):
            pid = os.fork()
            if pid == 0:
                try:
                    write_folder(path, writer(f"{number}-{k}"))
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            pids.append(pid)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert statuses == [0, 0]
        assert content(path) in (f"{number}-0", f"{number}-1")
    write_folder(path, writer("end"))
    assert leftovers(path) == []


def test_one_thread_at_a_time(tmp_path):
    path = tmp_path / "run"

    def nested(directory):
        write_folder(path, writer("inner"))

    with pytest.raises(RuntimeError, match="being written by another thread"):
        write_folder(path, nested)


# ---- targets that must not be replaced ----


def test_foreign_folders_and_files_are_never_replaced(tmp_path):
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="found other files; choose another path"):
        write_folder(precious, writer("new"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="found a file or link"):
        write_folder(tmp_path / "file", writer("new"))
    (tmp_path / "link").symlink_to(precious)
    with pytest.raises(ValueError, match="found a file or link"):
        write_folder(tmp_path / "link", writer("new"))
    with pytest.raises(ValueError, match="got the root"):
        write_folder("/", writer("new"))
    ours = tmp_path / "run"
    write_folder(ours, writer("old"))
    (ours / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"found also \['notes.txt'\]; choose another path or move them away"):
        write_folder(ours, writer("new"))
    assert (precious / "thesis.tex").exists() and (ours / "notes.txt").exists()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda d: None, "at least one file"),
        (lambda d: (d / MANIFEST).write_text("{}"), "is reserved"),
        (lambda d: (d / "link").symlink_to("/etc/passwd"), "found a link or special file"),
        (lambda d: os.mkfifo(d / "fifo"), "found a link or special file"),
    ],
)
def test_what_write_makes_is_checked(tmp_path, write, message):
    with pytest.raises(ValueError, match=message):
        write_folder(tmp_path / "run", write)
    assert list(tmp_path.iterdir()) == []


# ---- damaged folders ----


def edit_manifest(change):
    def damage(path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_text())
        change(manifest)
        (path / MANIFEST).write_text(json.dumps(manifest))

    return damage


def rename_entry(new):
    def change(manifest):
        manifest["files"][new] = manifest["files"].pop("top.txt")

    return edit_manifest(change)


def replace_by_fifo(path: Path) -> None:
    (path / "top.txt").unlink()
    os.mkfifo(path / "top.txt")


def replace_by_directory(path: Path) -> None:
    (path / "top.txt").unlink()
    (path / "top.txt").mkdir()


def replace_by_link(path: Path) -> None:
    (path / "top.txt").unlink()
    (path / "top.txt").symlink_to("/etc/hostname")


def manifest_fifo(path: Path) -> None:
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)


def flip_bit(name, offset):
    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[offset] ^= 1
        (path / name).write_bytes(data)

    return damage


def set_manifest(data: bytes):
    return lambda path: (path / MANIFEST).write_bytes(data)


DAMAGES = [
    (lambda p: (p / MANIFEST).unlink(), f"{MANIFEST}: missing"),
    (manifest_fifo, f"{MANIFEST}: expected a regular file"),
    (set_manifest(b""), f"{MANIFEST}: not valid JSON"),
    (set_manifest(b"\xff\xfe"), f"{MANIFEST}: not valid JSON"),
    (set_manifest(b"[" * 100_000), f"{MANIFEST}: not valid JSON .nested too deeply"),
    (set_manifest(b'{"format": 1, "format": 2}'), "a key occurs twice"),
    (set_manifest(b'{"format": NaN}'), "NaN is not allowed"),
    (set_manifest(b'{"format": 1e999}'), "number 1e999 is too large"),
    (set_manifest(b'{"format": ' + b"9" * 5000 + b"}"), f"{MANIFEST}: not valid JSON"),
    (set_manifest(b"[]"), f"{MANIFEST}: expected values by name, got \\[\\]"),
    (
        edit_manifest(lambda m: m.update(format="os.system")),
        "format: expected 'patch-folder', got 'os.system'. This is not a folder we wrote",
    ),
    (
        edit_manifest(lambda m: m.update(version=2)),
        "version: expected version 1, got 2. It was written by another version",
    ),
    (edit_manifest(lambda m: m.update(version="1")), "expected version 1, got '1'"),
    (edit_manifest(lambda m: m.update(version=True)), "expected version 1, got True"),
    (edit_manifest(lambda m: m.update(more=1)), "expected known keys, got 'more'. Save the folder again"),
    (edit_manifest(lambda m: m.update(files={})), "files: expected 1 to 100000 files, got {}"),
    (edit_manifest(lambda m: m.update(files=[])), r"files: expected 1 to 100000 files, got \[\]"),
    (rename_entry("../top.txt"), "inside the folder, got '../top.txt'"),
    (rename_entry("/etc/passwd"), "inside the folder, got '/etc/passwd'"),
    (rename_entry("sub/../top.txt"), "inside the folder"),
    (rename_entry("./top.txt"), "inside the folder"),
    (rename_entry("a\\b"), "inside the folder"),
    (rename_entry(""), "inside the folder, got ''"),
    (rename_entry("x" * 10_000), "inside the folder"),
    (
        edit_manifest(lambda m: m["files"]["top.txt"].update(size=-1)),
        r"files.top.txt.size: expected an integer of 0 to 2\^63-1, got -1. Save the folder again",
    ),
    (edit_manifest(lambda m: m["files"]["top.txt"].update(size=2**70)), "top.txt.size: expected an integer of 0 to"),
    (edit_manifest(lambda m: m["files"]["top.txt"].update(size=3.0)), "top.txt.size: expected an integer .*, got 3.0"),
    (
        edit_manifest(lambda m: m["files"]["top.txt"].update(sha256="0" * 63)),
        "top.txt.sha256: expected a SHA-256 of 64 hex digits, got '0+'",
    ),
    (
        edit_manifest(lambda m: m["files"]["top.txt"].update(sha256="0" * 64)),
        f"top.txt: expected SHA-256 0+ by {MANIFEST}, found [^0]",
    ),
    (edit_manifest(lambda m: m["files"]["top.txt"].pop("size")), "expected files.top.txt.size, got nothing"),
    (
        edit_manifest(lambda m: m["files"].pop("top.txt")),
        f"top.txt: expected no such file by {MANIFEST}, found 3 bytes",
    ),
    (lambda p: (p / "sub" / "1.bin").unlink(), r"1.bin: expected \d+ bytes by .*, found no such file"),
    (lambda p: (p / "extra.bin").write_bytes(b""), "extra.bin: expected no such file by .*, found 0 bytes"),
    (lambda p: (p / "top.txt").write_text(""), "top.txt: expected 3 bytes by .*, found 0"),
    (lambda p: (p / "sub" / "1.bin").write_bytes((p / "sub" / "1.bin").read_bytes()[:-1]), "1.bin: expected"),
    (flip_bit("sub/2.bin", 500), "2.bin: expected SHA-256 .*, found"),
    (replace_by_fifo, "top.txt: expected a regular file, found a link or special file"),
    (replace_by_directory, "top.txt: expected 3 bytes by .*, found no such file"),
    (replace_by_link, "top.txt: expected a regular file, found a link or special file"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_folder_is_refused(tmp_path, damage, message):
    path = tmp_path / "run"
    write_folder(path, writer("old"))
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        verify_folder(path)
    assert str(tmp_path) in str(error.value)


def test_absent_or_wrong_kind_of_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder at .*run, found nothing"):
        verify_folder(tmp_path / "run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="expected a folder, found something else"):
        verify_folder(tmp_path / "file")


def test_damaged_manifest_does_not_block_the_next_save(tmp_path):
    path = tmp_path / "run"
    write_folder(path, writer("old"))
    (path / MANIFEST).write_text("{")
    write_folder(path, writer("new"))
    assert content(path) == "new"


# ---- artifacts ----


@pytest.fixture
def masks():
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.up": torch.rand(6 + i, 20, generator=generator) < 0.5 for i in range(3)}


META = {"model": "tiny", "method": "wanda", "pattern": "2:4", "sparsity": 0.5, "tile": (4, 8), "seed": 3}
MADE_FROM = {"config_fingerprint": "0" * 64, "weights_fingerprint": "1" * 64}
META |= MADE_FROM


def save(path, masks, **changes):
    options = {
        "meta": META,
        "tile_scores": {name: torch.rand(2, 3) for name in masks},
        "weights": {name: torch.randn(m.shape).bfloat16() for name, m in masks.items()},
        "tile_is_sparse": {name: torch.tensor([[True, False, True]]) for name in masks},
    }
    save_artifact(path, masks, **(options | changes))


def test_artifact_round_trip(tmp_path, masks):
    scores = {name: torch.rand(2, 3) for name in masks}
    weights = {"layers.1.up": torch.tensor([[-0.0, float("inf")]]).repeat(7, 10).half()}
    save(tmp_path / "a", masks, tile_scores=scores, weights=weights, extra={"config.yaml": "lr: 1\n"})
    artifact = load_artifact(tmp_path / "a", expect=META | {"seed": None})
    assert artifact.masks.keys() == masks.keys()
    for name, mask in masks.items():
        assert artifact.masks[name].dtype == torch.bool and torch.equal(artifact.masks[name], mask)
        assert torch.equal(artifact.tile_scores[name], scores[name])
        assert artifact.tile_is_sparse[name].tolist() == [[True, False, True]]
    assert artifact.weights["layers.1.up"].view(torch.int16).equal(weights["layers.1.up"].view(torch.int16))
    assert artifact.meta == META | {"tile": [4, 8]}
    assert (tmp_path / "a" / "config.yaml").read_text() == "lr: 1\n"


def test_masks_are_stored_as_big_endian_bits(tmp_path):
    from safetensors.torch import load_file

    save_artifact(tmp_path / "a", {"x": torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1, 1]]).bool()}, meta=META)
    assert load_file(tmp_path / "a" / "masks.safetensors")["x.keep"].tolist() == [0b10000001, 0b10000000]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "other", "expected model = 'other', the artifact was made with model = 'tiny'"),
        ("method", "sparsegpt", "expected method = 'sparsegpt', .* method = 'wanda'; use the same method"),
        ("sparsity", 0.25, "expected sparsity = 0.25, .* sparsity = 0.5"),
        ("tile", (128, 128), r"expected tile = \[128, 128\], .* tile = \[4, 8\]"),
        ("pattern", "unstructured", "expected pattern = 'unstructured'"),
        ("seed", 0, "expected seed = 0, .* seed = 3"),
        ("calibration", "c4", "expected calibration = 'c4', .* calibration = None"),
    ],
)
def test_artifact_of_something_else_is_refused(tmp_path, masks, key, value, message):
    save(tmp_path / "a", masks)
    with pytest.raises(ValueError, match=message):
        load_artifact(tmp_path / "a", expect={key: value})


def test_artifact_is_checked_against_the_model(tmp_path, tiny_model):
    model = tiny_model()
    name = "model.layers.0.mlp.up_proj"
    save_artifact(tmp_path / "a", {name: torch.ones(192, 128).bool()}, meta=META | facts.fingerprints(model))
    assert load_artifact(tmp_path / "a", model=model).masks[name].all()
    with pytest.raises(ValueError, match=r"layer \(192, 128\) at '.*up_proj' of Llama.*, found Linear \(200, 128\)"):
        load_artifact(tmp_path / "a", model=tiny_model(intermediate_size=200))
    with pytest.raises(ValueError, match=r"at 'model\.layers\.0\.mlp\.up_proj' of OPTForCausalLM, found nothing"):
        load_artifact(tmp_path / "a", model=tiny_model("opt"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"meta": {"sparsity": 0.6}},
            ValueError,
            r"meta.sparsity: expected a share of zeros from 0 to 0.5, got 0.6. 45",
        ),
        ({"meta": {"sparsity": float("nan")}}, TypeError, "meta: expected values that JSON can hold"),
        ({"meta": {"sparsity": "0.5"}}, ValueError, "meta.sparsity: expected a share .*, got '0.5'"),
        ({"meta": {"tile": (0, 4)}}, ValueError, r"meta.tile: expected two positive integers, got \[0, 4\]. Correct"),
        ({"meta": {"tile": (128,)}}, ValueError, r"meta.tile: expected two positive integers, got \[128\]"),
        (
            {"meta": {"method": ""}},
            ValueError,
            "meta.method: expected text that is not empty, got ''. Correct it or leave",
        ),
        ({"meta": {"seed": -1}}, ValueError, "meta.seed: expected an integer of 0 to .*, got -1"),
        ({"meta": {"model": object()}}, TypeError, "meta: expected values that JSON can hold"),
        ({"tile_scores": {"other": torch.ones(1, 1)}}, ValueError, r"only, got also 1 \(other.tile_scores\)"),
        (
            {"tile_scores": {"layers.0.up": torch.ones(3)}},
            ValueError,
            r"up.tile_scores: expected F32 \(1 to 6, 1 to 20\), got F32 \(3,\)",
        ),
        (
            {"weights": {"layers.0.up": torch.ones(2, 2)}},
            ValueError,
            r"up.weight: expected F16 .* \(6, 20\), got F32 \(2, 2\)",
        ),
        (
            {"tile_is_sparse": {"layers.0.up": torch.ones(7, 3)}},
            ValueError,
            r"expected U8 \(1 to 6, .*, got U8 \(7, 3\)",
        ),
        ({"weights": {"layers.0.up": torch.ones(6, 20).int()}}, ValueError, "got torch.int32"),
        ({"extra": {"../x": b""}}, ValueError, "plain file names other than"),
        ({"extra": {"artifact.json": b""}}, ValueError, "plain file names other than"),
    ],
)
def test_save_artifact_refuses(tmp_path, masks, change, error, message):
    with pytest.raises(error, match=message):
        save(tmp_path / "a", masks, **change)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({}, ValueError, "at least one layer, got none"),
        ({"a": torch.ones(2, 2)}, TypeError, r"masks\['a'\]: expected torch.bool \(N, K\), got torch.float32 \(2, 2\)"),
        ({"a": torch.ones(2).bool()}, ValueError, r"got torch.bool \(2,\)"),
        ({"a": torch.ones(0, 4).bool()}, ValueError, r"got torch.bool \(0, 4\)"),
        ({"a": [[True]]}, TypeError, "got list"),
    ],
)
def test_save_artifact_refuses_masks(tmp_path, bad, error, message):
    with pytest.raises(error, match=message):
        save_artifact(tmp_path / "a", bad, meta={})


def reseal(path: Path) -> None:
    """A new, valid manifest: as a hostile author would make, so that the inner checks are reached."""
    (path / MANIFEST).unlink()
    folder._seal(path)


def edit_description(change):
    def damage(path):
        value = json.loads((path / "artifact.json").read_text())
        change(value)
        (path / "artifact.json").write_text(json.dumps(value))

    return damage


def edit_tensors(name, change):
    def damage(path):
        from safetensors.torch import load_file

        tensors = {key: value.clone() for key, value in load_file(path / name).items()}
        change(tensors)
        save_file(tensors, path / name)

    return damage


LAYER = "layers.0.up"
ARTIFACT_DAMAGES = [
    (lambda p: (p / "artifact.json").unlink(), "artifact.json: missing"),
    (lambda p: (p / "masks.safetensors").unlink(), "masks.safetensors: missing"),
    (
        edit_description(lambda d: d.update(format="x")),
        "format: expected 'patch-artifact', got 'x'. Give a folder made",
    ),
    (
        edit_description(lambda d: d.update(version=7)),
        "version: expected version 1 or 2, got 7. It was written by another",
    ),
    (
        edit_description(lambda d: d.update(loader="os.system")),
        "expected known keys, got 'loader'. Save the artifact again",
    ),
    (edit_description(lambda d: d.update(meta=[])), r"artifact.json: meta: expected an object, got \[\]. Save"),
    (
        edit_description(lambda d: d["meta"].update(tile="64")),
        "artifact.json: meta.tile: expected two .*, got '64'. Save the artifact",
    ),
    (
        edit_description(lambda d: d["meta"].update(sparsity=0.9)),
        "artifact.json: meta.sparsity: expected a share .*, got 0.9",
    ),
    (edit_description(lambda d: d.update(layers={})), "layers: expected an object that is not empty, got {}. Save"),
    (
        edit_description(lambda d: d["layers"][LAYER].update(shape=[6])),
        rf"{LAYER}.shape: expected 2 values, each a size of 1 to 2\^31-1, got \[6\]. Save",
    ),
    (
        edit_description(lambda d: d["layers"][LAYER].update(shape=[2**40, 20])),
        r"shape: expected 2 .*, got \[1\d+, 20\]",
    ),
    (edit_description(lambda d: d["layers"][LAYER].update(shape=[6.0, 20])), r"shape: expected 2 .*, got \[6.0, 20\]"),
    (edit_description(lambda d: d["layers"][LAYER].update(shape=[-6, -20])), r"shape: expected 2 .*, got \[-6, -20\]"),
    (
        edit_description(lambda d: d["layers"][LAYER].update(shape=[20, 6000])),
        r"keep: expected U8 \(15000,\), got U8 \(15,\)",
    ),
    (edit_description(lambda d: d["layers"][LAYER].update(kept=121)), "expected kept of 0 to 120, got 121"),
    (
        edit_description(lambda d: d["layers"][LAYER].update(kept=0)),
        "expected 0 kept weights by artifact.json, got",
    ),
    (edit_description(lambda d: d["layers"].pop(LAYER)), r"only, got also 3 \(layers.0.up.keep"),
    (
        edit_description(lambda d: d["layers"].update(new=d["layers"][LAYER])),
        "new.keep: expected U8 .* got nothing",
    ),
    (edit_tensors("masks.safetensors", lambda t: t.pop(f"{LAYER}.keep")), "keep: expected U8 .* got nothing"),
    (edit_tensors("masks.safetensors", lambda t: t.update({f"{LAYER}.keep": torch.ones(15)})), "got F32"),
    (
        edit_tensors("masks.safetensors", lambda t: t.update({f"{LAYER}.tile_scores": torch.ones(3)})),
        "tile_scores: expected",
    ),
    (edit_tensors("masks.safetensors", lambda t: t.update(other=torch.ones(3))), r"only, got also 1 \(other\)"),
    (
        edit_tensors("masks.safetensors", lambda t: t["layers.1.up.keep"][-1].bitwise_or_(1)),
        "layers.1.up.keep: expected padding bits of zero",
    ),
    (
        edit_tensors("weights.safetensors", lambda t: t.update({f"{LAYER}.weight": torch.ones(2, 2)})),
        r"weight: expected F16 or .* \(6, 20\), got F32 \(2, 2\)",
    ),
    (
        edit_tensors("weights.safetensors", lambda t: t.update({"x.weight": torch.ones(2, 2)})),
        r"only, got also 1 \(x.weight\)",
    ),
    (
        edit_tensors("weights.safetensors", lambda t: t.update({f"{LAYER}.weight": torch.ones(6, 20).int()})),
        "got I32",
    ),
]


@pytest.mark.parametrize(("damage", "message"), ARTIFACT_DAMAGES)
def test_hostile_artifact_is_refused(tmp_path, masks, damage, message):
    # 7 x 19 weights leave padding bits in the last byte of layers.1.up.
    masks["layers.1.up"] = torch.ones(7, 19).bool()
    save(tmp_path / "a", masks)
    damage(tmp_path / "a")
    reseal(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        load_artifact(tmp_path / "a")


def test_no_silent_accept_of_any_flipped_bit_or_truncation(tmp_path, masks):
    path = tmp_path / "a"
    save(path, masks)
    draw = random.Random(0)
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        positions = [draw.randrange(8 * len(data)) for _ in range(40)]
        for position in positions:
            damaged = bytearray(data)
            damaged[position // 8] ^= 1 << (position % 8)
            file.write_bytes(damaged)
            with pytest.raises((ValueError, FileNotFoundError)):
                load_artifact(path)
        for length in {0, 1, 7, 8, len(data) // 2, len(data) - 1}:
            file.write_bytes(data[:length])
            with pytest.raises(ValueError):
                load_artifact(path)
        file.write_bytes(data)
    assert load_artifact(path).masks.keys() == masks.keys()


# ---- safetensors headers ----


def container(header, data=b"", length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape, begin, end, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = [
    (b"", "length field says -1"),
    (b"\x01\x00\x00", "length field says -1"),
    (container({}, length=0), "length field says 0"),
    (container({}, length=3), "length field says 3"),
    (container({}, length=2**63), "header of 2 to 100000000 bytes"),
    (container({}, length=100_000_001), "header of 2 to 100000000 bytes"),
    (container(b"\xff\xfe"), "not valid JSON"),
    (container(b"{oops}"), "not valid JSON"),
    (container(b"[" * 50_000), "nested too deeply"),
    (container(b"[]"), r"x.safetensors: expected values by name, got \[\]. Copy the file again"),
    (container(b'{"a": 1, "a": 1}'), "a key occurs twice"),
    (container({"a": 1}), "a: expected values by name, got 1. Copy the file again"),
    (container({"a": entry([2], 0, 2) | {"x": 1}}, b"12"), "expected known keys, got 'a.x'. Copy the file"),
    (container({"a": entry([2], 0, 2, "PICKLE")}, b"12"), "a.dtype: expected one of BOOL, U8, .*, got 'PICKLE'. Copy"),
    (container({"a": entry([2], 0, 2, ["U8"])}, b"12"), r"a.dtype: expected one of BOOL, .*, got \['U8'\]"),
    (container({"a": entry([-2], 0, 2)}, b"12"), r"a.shape: expected at most 8 sizes >= 0, got \[-2\]. Copy"),
    (container({"a": entry([1] * 9, 0, 1)}, b"1"), r"a.shape: expected at most 8 sizes >= 0, got \[1, 1"),
    (container({"a": entry([2.0], 0, 2)}, b"12"), r"a.shape: expected at most 8 sizes >= 0, got \[2.0\]"),
    (container({"a": entry([True], 0, 1)}, b"1"), r"a.shape: expected at most 8 sizes >= 0, got \[True\]"),
    (container({"a": entry([2], -2, 0)}, b"12"), r"a.data_offsets: expected two data offsets >= 0, got \[-2, 0\]"),
    (container({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0]}}, b"12"), r"two data offsets >= 0, got \[0\]"),
    (container({"a": entry([3], 0, 2)}, b"12"), r"a: expected .* that span 3 bytes, U8 of shape \[3\], got 2"),
    (
        container({"a": entry([2**62, 2**62], 0, 2)}, b"12"),
        "span 21267647932558653966460912964485513216 bytes",
    ),
    (container({"a": entry([2], 1, 3)}, b"123"), "expected tensor 'a' at byte 0 .*, got byte 1"),
    (container({"a": entry([2], 0, 2), "b": entry([2], 1, 3)}, b"123"), "expected tensor 'b' at byte 2 .*, got byte 1"),
    (
        container({"a": entry([2], 0, 2), "b": entry([2], 3, 5)}, b"12345"),
        "expected tensor 'b' at byte 2 .*, got byte 3",
    ),
    (container({"a": entry([2], 0, 2)}, b"1"), "expected the end of the file at byte 2 .*, got byte 1"),
    (container({"a": entry([2], 0, 2)}, b"123"), "expected the end of the file at byte 2 .*, got byte 3"),
    (container({"__metadata__": {"a": 1}}), "__metadata__.a: expected text, got 1. Copy the file again"),
]


@pytest.mark.parametrize(("data", "message"), HEADERS)
def test_bad_safetensors_header_is_refused(tmp_path, data, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        safetensors_header.read_header(path)
    assert str(path) in str(error.value)


def test_header_of_directory_fifo_link(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for name, message in (("", "found a directory"), ("fifo", "special file"), ("link", "found a link")):
        with pytest.raises(ValueError, match=message):
            safetensors_header.read_header(tmp_path / name)


def test_header_agrees_with_safetensors(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3, dtype=torch.bfloat16),
        "b": torch.zeros(0, 4),
        "c": torch.tensor(3),
        "d": torch.zeros(5, dtype=torch.uint8),
        "e": torch.zeros(2, dtype=torch.bool),
        "f": torch.zeros(3, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = safetensors_header.read_header(tmp_path / "x.safetensors")
    assert {name: info.shape for name, info in header.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert all(info.nbytes == tensors[n].numel() * tensors[n].element_size() for n, info in header.items())
    assert [header[n].dtype for n in "abcdef"] == ["BF16", "F32", "I64", "U8", "BOOL", "F8_E4M3"]


@pytest.mark.parametrize("cases", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_headers_never_crash_or_lie(tmp_path, cases):
    """Whatever our reader accepts, its sizes add up to the size of the file."""
    save_file({"a": torch.zeros(4, 4), "b": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "x")
    good = (tmp_path / "x").read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    draw = random.Random(0)
    path = tmp_path / "y"
    for _ in range(cases):
        data = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(length)] = draw.randrange(256)
        path.write_bytes(data)
        try:
            header = safetensors_header.read_header(path)
        except ValueError:
            continue
        taken = sum(info.nbytes for info in header.values())
        assert taken + 8 + int.from_bytes(data[:8], "little") == len(data)


# ---- the package as a whole ----

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load")}
# Loaders of foreign files, with the switch that keeps them from unpickling anything but plain tensors.
SAFE_LOADS = {("torch", "load", "weights_only", True), ("np", "load", "allow_pickle", False)}


def unsafe_uses(source: str) -> list[str]:
    found = []
    tree = ast.parse(source)
    safe = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and is_safe_load(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(node.func.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node not in safe:
            if (node.value.id, node.attr) in FORBIDDEN_ATTRIBUTES:
                found.append(f"{node.value.id}.{node.attr}")
        names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and (node.module, names) == ("pickle", ["UnpicklingError"]):
            continue  # an exception class, to be caught
        module = getattr(node, "module", None) or ""
        found += [n for n in [*names, module] if n.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.ImportFrom) and module == "torch" and {"load", "save"} & set(names):
            found.append("torch.load")
    return found


def is_safe_load(call: ast.Call) -> bool:
    target = call.func
    if not isinstance(target, ast.Attribute) or not isinstance(target.value, ast.Name):
        return False
    switches = {(k.arg, k.value.value) for k in call.keywords if isinstance(k.value, ast.Constant)}
    return any((target.value.id, target.attr, *switch) in SAFE_LOADS for switch in switches)


def test_the_checker_finds_unsafe_uses():
    for source in (
        "import pickle",
        "from pickle import loads",
        "from pickle import UnpicklingError, loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "load = torch.load",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "eval('1')",
        "from torch import load",
    ):
        assert unsafe_uses(source), source
    assert not unsafe_uses("model.eval()\nre.compile('x')\ntorch.compile(f)")
    assert not unsafe_uses("from pickle import UnpicklingError\ntorch.load(f, weights_only=True)")
    assert not unsafe_uses("np.load(f, allow_pickle=False)")


@pytest.mark.parametrize("package", [patch, patch_kernels])
def test_nothing_is_unpickled_or_evaluated(package):
    files = sorted(Path(package.__file__).parent.rglob("*.py"))
    assert files
    for file in files:
        assert unsafe_uses(file.read_text(encoding="utf-8")) == [], file


def test_importing_the_package_is_cheap():
    import subprocess
    import sys

    code = "import sys, patch; print(patch.__version__, sorted({'torch', 'transformers'} & set(sys.modules)))"
    root = Path(patch.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.split(maxsplit=1)[1].strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        patch.lod  # noqa: B018


def test_fingerprints(tiny_model):
    model = tiny_model()
    fingerprint, config = facts.model_fingerprint(model), facts.config_fingerprint(model.config)
    assert facts.model_fingerprint(tiny_model()) == fingerprint != facts.model_fingerprint(tiny_model(seed=1))
    model.config.use_cache = False
    model.config._name_or_path = "elsewhere"
    assert facts.config_fingerprint(model.config) == config
    assert facts.config_fingerprint(tiny_model(intermediate_size=200).config) != config
