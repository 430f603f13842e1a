"""Long training commands: their plan, warnings and progress, what they refuse before they touch anything."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from support import ROOT
from support.commands import run

from patch.artifacts.artifact import load_artifact
from patch.cli import plans

LEARN = "learn --model {w}/model --data {w}/train.txt --sparsity 0.35 --tile 64 --seqlen 32 --global-batch-size 4"
TUNE = "fine-tune --model {w}/model --masks {w}/prior --data {w}/train.txt --seqlen 32 --batch-size 4"


def call(capsys, work, command, *more):
    return run(capsys, *command.format(w=work).split(), *more)


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_learning_says_its_plan_progress_and_sizes(work, tmp_path, capsys, caplog):
    status, out, err = call(capsys, work, LEARN, "--steps", 3, "--out", tmp_path / "o", "--exclude", "*.k_proj")
    assert status == 0
    assert "plan: 3 optimiser steps of 4 blocks of 32 tokens: 384 tokens, about 3% of the text" in err
    assert "plan: masks for 12 linear layers with 0.23 M weights, target sparsity 0.35" in err
    assert "MB of tensors at the peak; a checkpoint every 500 steps in" in err
    assert "at sparsity 0.35 on 64x64 tiles, packing will take about" in err
    assert "3 optimiser steps are too few to learn from: 100 or more are usual. Give --steps 200" in caplog.text
    assert "step 1/3: loss " in err and "step 3/3: loss " in err and ", took " in err
    assert "packed: " in out
    missed = "the target sparsity 0.3500 was missed: the masks have"
    assert (missed in caplog.text) == (abs(float(out.split("\nsparsity ")[1][:6]) - 0.35) > 0.02)


def test_learning_from_a_pruned_model_says_so(work, tmp_path, capsys, caplog):
    dense = "export --model {w}/model --masks {w}/prior --format dense --out"
    assert call(capsys, work, dense, tmp_path / "pruned")[0] == 0
    command = LEARN.replace("{w}/model", str(tmp_path / "pruned"))
    status, out, _ = call(capsys, work, command, "--steps", 2, "--out", tmp_path / "o")
    assert status == 0
    assert "% of the weights to mask are zero already" in caplog.text and "Give --model the dense model" in caplog.text
    assert re.search(r"sparsity 0\.\d+ by the masks, but 0\.[56]\d+ of the weights in these layers are 0", out)


@pytest.mark.parametrize(
    ("budget", "flags", "used"),
    [
        ("model", [], "model"),
        ("block", [], "model"),
        ("layer", [], "layer"),
        ("model", ["--set", "learn.tile_prior_budget=layer"], "layer"),
        ("model", ["--preset", "tile"], "model"),
    ],
)
def test_learning_from_chosen_tiles_spends_the_budget_that_chose_them(
    work, tmp_path, capsys, caplog, budget, flags, used
):
    prune = "prune --model {w}/model --method magnitude --data {w}/train.txt --seqlen 32 --nsamples 4 --tile 64,64"
    prune += f" --pattern tiles --sparsity 0.4 --budget {budget} --out"
    assert call(capsys, work, prune, tmp_path / "tiles")[0] == 0
    arguments = ["--prior", tmp_path / "tiles", "--steps", 2, "--exact-budget", "--out", tmp_path / "o", *flags]
    status, _, err = call(capsys, work, LEARN, *arguments)
    assert status == 0, err
    assert "the prior's tile scores are for sparsity" not in caplog.text
    resolved = yaml.safe_load((tmp_path / "o" / "config.resolved.yaml").read_text())
    assert resolved["learn"]["tile_prior_budget"] == used


def test_short_plans_name_the_flags_that_help(caplog):
    plans.warn_of_few_steps(100, ("--batch-size", 8), ("--epochs ", 1))
    assert not caplog.text
    plans.warn_of_few_steps(10, ("--global-batch-size", 256), ("--set learn.epochs=", 2))
    assert "10 optimiser steps are too few to learn from" in caplog.text
    assert "Give --global-batch-size 25, a smaller --seqlen, or --set learn.epochs=20 for more passes" in caplog.text


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        (LEARN, ["--out", "{w}/model"], "--out: expected a new folder or one of an earlier run, {w}/model holds other"),
        (TUNE, ["--out", "{w}/model"], "--out: expected a new folder or one of an earlier run, {w}/model holds other"),
        (
            "demo",
            ["--out", "{w}/model"],
            "--out: expected a new folder or one of an earlier run, {w}/model holds other",
        ),
        ("demo", ["--out", "{t}/o", "--text", "{w}/prior"], "expected Python sources (*.py)"),
        (
            LEARN,
            ["--out", "{t}/o", "--prior", "{w}/prior", "--exclude", "*.k_proj"],
            "not maskable layers of the model",
        ),
        (LEARN, ["--out", "{t}/o", "--seed", "5000000000"], "seed: expected"),
        (LEARN, ["--out", "{t}/o", "--report-to", "wandbb"], "--report-to: expected one of"),
        (TUNE, ["--out", "{t}/o", "--seed", "5000000000"], "seed: expected"),
        (TUNE, ["--out", "{t}/o", "--blocks", "3"], "blocks: expected at least"),
        (TUNE, ["--out", "{t}/o", "--batch-size", "100000", "--blocks", "100000"], "blocks: expected at least"),
        (TUNE, ["--out", "{t}/o", "--report-to", "wandbb"], "--report-to: expected one of"),
    ],
)
def test_what_is_refused_leaves_nothing(work, tmp_path, capsys, command, more, message):
    before = tree(work)
    status, _, err = call(capsys, work, command, *(part.format(w=work, t=tmp_path) for part in more))
    assert status == 2
    assert message.format(w=work) in err
    assert tree(work) == before
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_refused_resume_leaves_the_run_as_it_was(work, tmp_path, capsys, is_finished):
    shutil.copytree(work / "learned", tmp_path / "run")
    if not is_finished:
        shutil.rmtree(tmp_path / "run" / "result")
    before = tree(tmp_path)
    config = ["learn", "--config", tmp_path / "run" / "config.resolved.yaml", "--out", tmp_path / "run", "--resume"]
    status, _, err = run(capsys, *config, "--lr", "0.5")
    assert status == 2
    assert "expected lr of the run that wrote it" in err
    assert tree(tmp_path) == before
    assert run(capsys, *config)[0] == 0


def test_metrics_reach_tensorboard(work, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    status, _, _ = call(capsys, work, LEARN, "--steps", 2, "--out", tmp_path / "o", "--report-to", "tensorboard")
    assert status == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (tmp_path / "o" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/loss", "train/lm_loss", "train/soft_density", "train/hard_density"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/lm_loss")] == [1, 2]


@pytest.mark.slow
def test_two_processes_speak_once_and_learn_what_one_learns(work, tmp_path, capsys):
    command = [*LEARN.format(w=work).split(), "--steps", "2", "--exact-budget", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "patch"]
    done = subprocess.run([*torchrun, *command, str(tmp_path / "two")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("learned 14 layers") == done.stdout.count("wrote masks") == 1
    assert done.stderr.count("plan: 2 optimiser steps") == done.stderr.count("step 2/2") == 1
    assert run(capsys, *command, tmp_path / "one")[0] == 0
    one, two = (load_artifact(tmp_path / name / "result").masks for name in ("one", "two"))
    assert sum(int((one[name] != two[name]).sum()) for name in one) <= 0.001 * sum(map(torch.numel, one.values()))
