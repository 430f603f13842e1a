"""The check of a card's kernels by another process: whatever the child does, the parent goes on, and remembers."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from patch_kernels import _library, card_check
from patch_kernels.card_check import Card, Outcome, Verdict
from patch_kernels.ops import tile_linear

CARD = Card("a card", "9.0", 132, "580.65.06", "0" * 64)
BEGIN = "import os, signal, sys, time; print('card_check: checking', flush=True);"
PASSED = 'print(\'card_check: \' + \'{"ran": "yes", "complaint": ""}\');'


def child(script):
    return [sys.executable, "-c", script]


@pytest.mark.parametrize(
    ("script", "works", "reason"),
    [
        (BEGIN + PASSED, True, ""),
        ("print('a library says hello');" + BEGIN + PASSED + "print('and goodbye')", True, ""),
        (
            BEGIN + PASSED.replace('": "",', '": "yes"').replace('"complaint": ""', '"complaint": "y is 2"'),
            False,
            "y is 2",
        ),
        (BEGIN + "time.sleep(60)", False, "no end after 0.5 s"),
        (BEGIN + "os.kill(os.getpid(), signal.SIGSEGV)", False, r"ended by signal 11 \(Segmentation fault\)"),
        (BEGIN + "os.abort()", False, r"ended by signal 6 \(Aborted\)"),
        (BEGIN + "print('01001')", False, "ended with status 0 and without a result"),
        (BEGIN + "print('card_check: {}')", False, "ended with status 0 and without a result"),
        (BEGIN + "sys.exit('no such thing')", False, "ended with status 1 and without a result: no such thing"),
        (BEGIN + PASSED + "sys.exit(3)", False, "ended with status 3"),
        (BEGIN + "os.kill(os.getpid(), signal.SIGKILL)", None, "ended by signal 9"),
        (BEGIN + "os.kill(os.getpid(), signal.SIGTERM)", None, "ended by signal 15"),
        (BEGIN + PASSED.replace("yes", "no"), None, r"another process cannot use the card"),
        ("import no_such_module", None, "ended with status 1 before it began: ModuleNotFoundError: No module named"),
        (PASSED, None, "ended with status 0 before it began"),
    ],
)
def test_whatever_a_child_does(script, works, reason):
    outcome = card_check.run_child(child(script), 0.5 if "sleep" in script else 60)
    assert outcome.works is works
    assert bool(outcome.reason) == bool(reason)
    assert re.search(reason, outcome.reason)


def test_a_child_that_never_begins(monkeypatch):
    monkeypatch.setattr(card_check, "_START_SECONDS", 0.3)
    begin = time.monotonic()
    assert card_check.run_child(child("import time; time.sleep(60)"), 60) == Outcome(
        None, "the process that checks the card gave no sign in 0.3 s before it began"
    )
    assert time.monotonic() - begin < 20


def test_a_program_that_cannot_be_started():
    outcome = card_check.run_child(["/no/such/python"], 1)
    assert outcome.works is None and "did not start" in outcome.reason


def test_the_child_itself_on_a_machine_without_a_card():
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    outcome = card_check.run_child([*child("from patch_kernels.card_check import main; main()"), *ARGUMENTS], 60)
    if _library.cuda_function(card_check.LIBRARY_PATH, "check_card") is None:
        assert "this build has no CUDA kernels" in outcome.reason
    else:
        assert "another process cannot use the card" in outcome.reason
    assert outcome.works is None


ARGUMENTS = ["--device", "0", "--family", "sm90", "--uuid", "this"]


@pytest.mark.parametrize(
    ("uuid", "result"),
    [
        ("this", {"ran": "yes", "complaint": "0 sm90"}),
        ("that", {"ran": "no", "complaint": "expected the card this, got that"}),
    ],
)
def test_the_child_checks_the_card_that_is_meant(uuid, result, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    checked = lambda device, family: {"ran": "yes", "complaint": f"{device} {family.decode()}"}  # noqa: E731
    monkeypatch.setattr(card_check, "cuda_function", lambda path, name: checked)
    monkeypatch.setattr(sys, "argv", ["card_check", *ARGUMENTS])
    card_check.main()
    assert card_check._result(capsys.readouterr().out.splitlines()) == result


def failing(*families):
    """check for find_family: these fail."""
    return lambda family: Outcome(family not in families, f"{family} is wrong" if family in families else "")


def test_families_are_tried_from_the_best_on():
    assert card_check.find_family("sm90", failing()) == (Verdict("sm90", ""), "")
    verdict, undecided = card_check.find_family("sm90", failing("sm90"))
    assert verdict.family == "sm80" and not undecided
    assert verdict.reason == "the sm90 kernels failed their check by another process: sm90 is wrong"
    assert card_check.find_family("sm80", failing("sm90")) == (Verdict("sm80", ""), "")
    verdict, _ = card_check.find_family("sm90", failing("sm90", "sm80"))
    assert verdict.family == "none" and "sm90 is wrong" in verdict.reason and "sm80 is wrong" in verdict.reason


def test_a_family_that_failed_is_not_tried_again_where_the_next_cannot_be():
    outcomes = {"sm90": Outcome(False, "no end"), "sm80": Outcome(None, "no memory")}
    verdict, undecided = card_check.find_family("sm90", outcomes.get)
    assert verdict.family == "sm80" and "no end" in verdict.reason and undecided == "no memory"
    assert card_check.find_family("sm90", lambda family: Outcome(None, "taken")) == (Verdict("sm90", ""), "taken")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a card of sm90: its children do what scripts says, limits holds what was decided."""
    machine = SimpleNamespace(
        scripts={"sm90": BEGIN + PASSED, "sm80": BEGIN + PASSED}, started=[], limits=[], card=CARD
    )

    def limit_family(device, family, reason):
        machine.limits.append((device, family.decode(), reason.decode()))
        return {"refused": ""}

    def command(device, family):
        machine.started.append(family)
        return child(machine.scripts[family])

    functions = {"best_family": lambda capability: {"family": "sm90"}, "limit_family": limit_family}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PATCH_KERNELS_CARD_CHECK_SECONDS", raising=False)
    monkeypatch.setattr(card_check, "cuda_function", lambda path, name: functions[name])
    monkeypatch.setattr(card_check, "gemm_status", lambda path, device: {"state": "unchecked"})
    monkeypatch.setattr(card_check, "child_command", command)
    monkeypatch.setattr(card_check, "card_of", lambda device: machine.card)
    monkeypatch.setattr(card_check, "_how", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    machine.next_process = card_check._how.clear
    return machine


def test_only_the_first_process_starts_a_child(machine):
    for _ in range(3):
        card_check.ensure(0)
    assert machine.started == ["sm90"] and not machine.limits
    assert card_check.how(0) == "by another process, just now" and card_check.how(1) == "not yet"
    machine.next_process()
    card_check.ensure(0)
    assert machine.started == ["sm90"] and "before; delete" in card_check.how(0)


def test_a_family_that_fails_is_remembered_with_its_reason(machine):
    machine.scripts["sm90"] = BEGIN + "os.abort()"
    for _ in range(2):
        card_check.ensure(0)
        machine.next_process()
    assert machine.started == ["sm90", "sm80"]
    reason = "the sm90 kernels failed their check by another process: ended by signal 6 (Aborted)"
    assert machine.limits == [(0, "sm80", reason)] * 2


def test_a_hang_costs_the_seconds_of_the_environment(machine, monkeypatch):
    monkeypatch.setenv("PATCH_KERNELS_CARD_CHECK_SECONDS", "0.3")
    machine.scripts = dict.fromkeys(machine.scripts, BEGIN + "time.sleep(60)")
    begin = time.monotonic()
    card_check.ensure(0)
    assert time.monotonic() - begin < 20
    assert [(device, family) for device, family, _ in machine.limits] == [(0, "none")]
    assert machine.limits[0][2].count("no end after 0.3 s") == 2


def test_zero_seconds_start_no_child(machine, monkeypatch):
    monkeypatch.setenv("PATCH_KERNELS_CARD_CHECK_SECONDS", "0")
    card_check.ensure(0)
    assert not machine.started and "PATCH_KERNELS_CARD_CHECK_SECONDS is 0" in card_check.how(0)


def test_a_program_with_python_inside_is_not_started_again(machine, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/usr/bin/blender")
    card_check.ensure(0)
    assert not machine.started and "sys.executable is no Python interpreter but '/usr/bin/blender'" in card_check.how(0)


def test_a_card_that_no_other_process_can_use_is_checked_by_this_one(machine):
    machine.scripts["sm90"] = BEGIN + PASSED.replace("yes", "no").replace('"complaint": ""', '"complaint": "busy"')
    for _ in range(2):
        card_check.ensure(0)
        assert card_check.how(0) == "in this process: another process cannot use the card (busy)"
        machine.next_process()
    assert machine.started == ["sm90"] * 2 and not machine.limits  # nothing to remember


@pytest.mark.parametrize("change", [{"driver": "590"}, {"name": "other"}, {"library": "1"}, {"multiprocessors": 16}])
def test_another_kind_of_card_driver_or_build_is_checked_anew(machine, change):
    card_check.ensure(0)
    machine.next_process()
    machine.card = dataclasses.replace(CARD, **change)
    card_check.ensure(0)
    assert machine.started == ["sm90"] * 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"family": "sm90"}', '{"card": 1, "family": "sm90", "reason": ""}', "[" * 100_000]
)
def test_a_spoilt_file_is_checked_anew(machine, text):
    path = card_check.remembered_path(CARD)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    card_check.ensure(0)
    assert machine.started == ["sm90"]
    assert json.loads(path.read_text())["family"] == "sm90" and [f.name for f in path.parent.iterdir()] == [path.name]


def test_a_cache_folder_that_cannot_be_written_is_no_error(machine, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        card_check.ensure(0)
        machine.next_process()
    assert machine.started == ["sm90"] * 2


def test_no_home_is_no_error(machine, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(card_check.Path, "expanduser", no_home)
    card_check.ensure(0)
    assert machine.started == ["sm90"] and card_check.remembered_path(CARD) is None


def test_readers_see_whole_files_while_others_write(tmp_path):
    path, seen, stop = tmp_path / "folder" / "card.json", [], threading.Event()
    verdicts = [Verdict("sm90", ""), Verdict("sm80", "x" * 100_000)]
    card_check.remember(path, CARD, verdicts[0])

    def write(verdict):
        while not stop.is_set():
            card_check.remember(path, CARD, verdict)

    writers = [threading.Thread(target=write, args=(verdict,)) for verdict in verdicts]
    for writer in writers:
        writer.start()
    for _ in range(300):
        seen.append(card_check.remembered(path, CARD))
    stop.set()
    for writer in writers:
        writer.join()
    assert all(verdict in verdicts for verdict in seen)


@pytest.mark.parametrize("value", ["soon", "-1", "inf", "nan"])
def test_seconds_that_are_none(value, monkeypatch):
    monkeypatch.setenv("PATCH_KERNELS_CARD_CHECK_SECONDS", value)
    with pytest.raises(ImportError, match=rf"expected PATCH_KERNELS_CARD_CHECK_SECONDS to be .* got '{value}'\. Unset"):
        _library.load_library()


def test_the_first_call_on_a_device_asks_for_the_check(monkeypatch):
    """Before the op, never while a graph is captured, and until the device is decided."""
    done, state = [], {"state": "unchecked"}
    monkeypatch.setattr(tile_linear, "_decided", set())
    monkeypatch.setattr(tile_linear, "_say_if_dense", lambda index: done.append("said"))
    monkeypatch.setattr(tile_linear, "gemm_status", lambda path, index: state)
    monkeypatch.setattr(card_check, "ensure", lambda index: done.append("checked"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x = torch.zeros(1)
    tile_linear._first_calls(lambda x: done.append("op"), x)
    assert done == ["op", "said"] and not tile_linear._decided
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    state["state"] = "works"
    tile_linear._first_calls(lambda x: done.append("op"), x)
    assert done[2:] == ["checked", "op", "said"] and tile_linear._decided == {-1}
