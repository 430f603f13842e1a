"""Lines of progress, folders of runs, trackers: what every training run here shares."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

from patch.runs import progress
from patch.runs.arguments import require_trackers
from patch.runs.checkpoints import tidy_up
from patch.runs.folders import earlier_run, require_run_folder


def lines_of_a_run(monkeypatch, seconds_a_step, total, first=0):
    """What StepLines says of a run whose every step takes so long, its first one 10 s more."""
    clock, lines = [1000.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    callback = progress.StepLines(lines.append)
    state = SimpleNamespace(global_step=first, max_steps=total)
    callback.on_train_begin(None, state, None)
    clock[0] += 10
    for step in range(first + 1, total + 1):
        callback.on_step_begin(None, state, None)
        clock[0] += seconds_a_step
        state.global_step = step
        callback.on_step_end(None, state, None)
        callback.on_log(None, state, None, {"lm_loss": 3 - step / 100, "loss": -1.0, "hard_density": 0.6})
    callback.on_train_end(None, state, None)
    return lines


def test_lines_come_early_then_every_half_minute_with_their_own_values(monkeypatch):
    lines = lines_of_a_run(monkeypatch, 3, 40)
    assert [line.split(":")[0] for line in lines] == [f"step {n}/40" for n in (1, 2, 5, 10, 20, 30, 40)]
    assert lines[0] == "step 1/40: loss 2.990, sparsity 0.400, about 8 min left of 9 min"
    assert lines[4] == "step 20/40: loss 2.800, sparsity 0.400, about 60 s left of 2 min"
    assert lines[-1] == "step 40/40: loss 2.600, sparsity 0.400, took 2 min"


def test_a_resumed_run_counts_its_own_steps(monkeypatch):
    lines = lines_of_a_run(monkeypatch, 1, 36, first=30)
    assert [line.split(":")[0] for line in lines] == ["step 31/36", "step 32/36", "step 35/36", "step 36/36"]
    assert lines[1].endswith("about 4 s left of 16 s")


def test_lines_without_values_say_the_time():
    assert progress.shown_values({"learning_rate": 1.0}) == {}
    assert progress.shown_values({"loss": 2.0}) == {"loss": 2.0}


def test_one_process_speaks_on_stderr(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        progress.say_once(f"plan of {rank}")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "plan of 0\n")


@pytest.mark.parametrize("other", ["config.json", "notes.txt", "masks.safetensors"])
def test_folders_with_other_things_are_refused(tmp_path, other):
    require_run_folder("--out", tmp_path / "absent")
    for ours in ("config.resolved.yaml", "run.json", "removed-checkpoint-3", "result.tmp-17"):
        (tmp_path / ours).touch()
    require_run_folder("--out", tmp_path)
    (tmp_path / other).touch()
    with pytest.raises(ValueError, match=rf"--out: expected a new folder .* holds other files \({other}\). Choose"):
        require_run_folder("--out", tmp_path)
    # Notes that somebody put beside a run do no harm.
    (tmp_path / "checkpoint-2").mkdir()
    require_run_folder("--out", tmp_path)
    assert earlier_run(tmp_path) == ["checkpoint-2"]


def test_what_an_interrupted_removal_left_is_removed(tmp_path):
    for name in ("removed-checkpoint-2", "removed-checkpoint-4.1", "removed-checkpoint-notes", "checkpoint-6"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    tidy_up(tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "removed-checkpoint-notes"]


def test_trackers_are_known_and_installed(monkeypatch):
    with pytest.raises(ValueError, match=r"--report-to: expected one of .*, got 'wandbb'. Did you mean 'wandb'\?"):
        require_trackers("--report-to", ["wandbb"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "tensorboard", "trackio"):
        with pytest.raises(ImportError, match=rf"report_to: expected the package {name} .* Run `pip install {name}`"):
            require_trackers("report_to", [name])
