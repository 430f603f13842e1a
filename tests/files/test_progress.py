"""Progress of long work: a bar on a terminal, lines now and then without one, nothing when it is silenced."""

from __future__ import annotations

import sys

import pytest

from patch.files import progress
from patch.files.progress import Progress, duration, say, tracked


class Clock:
    """Stands in for the module `time`: it moves when the work says so."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def work(clock, seconds, parts=6, **options):
    with Progress(parts, "pruning (wanda)", "block", **options) as bar:
        for index in range(parts):
            clock.now += seconds
            bar.update(note=f"loss {index}")


def test_lines_without_a_terminal(clock, capsys):
    work(clock, 20)
    out, err = capsys.readouterr()
    assert out == ""
    # The first after the first part, then one when 30 s are over: after parts 3 and 5; none at the end.
    assert err.splitlines() == [
        "pruning (wanda): 1 of 6 blocks, about 2 min left (loss 0)",
        "pruning (wanda): 3 of 6 blocks, about 60 s left (loss 2)",
        "pruning (wanda): 5 of 6 blocks, about 20 s left (loss 4)",
    ]


def test_short_work_prints_nothing(clock, capsys):
    work(clock, 1.5)
    assert capsys.readouterr() == ("", "")


def test_slow_parts_after_fast_ones_are_told(clock, capsys):
    with Progress(3, "pruning", "layer") as bar:
        clock.now += 0.1
        bar.update()
        clock.now += 40
        bar.update()
    assert capsys.readouterr().err == "pruning: 2 of 3 layers, about 20 s left\n"


def test_silence(clock, capsys):
    work(clock, 100, show=False)
    say("nothing", show=False)
    assert list(tracked([1, 2], "pruning", "layer", show=False)) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(tracked(["a", "b"], "pruning (magnitude)", "layer")) == ["a", "b"]
    err = capsys.readouterr().err
    assert "pruning (magnitude): 100%" in err and "2/2" in err and "layer" in err


def test_durations():
    assert [duration(s) for s in (0.4, 89, 90, 5399, 5400, 90000)] == [
        "0 s",
        "89 s",
        "2 min",
        "90 min",
        "1.5 h",
        "25.0 h",
    ]
