"""The command line from end to end on tiny random models; refused input is in test_cli_errors.py."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.commands import run
from support.models import build_tiny_model

from patch import cli
from patch.artifacts.apply import apply_artifact
from patch.artifacts.artifact import load_artifact
from patch.cli import inputs, parser
from patch.cli.commands import generate as generate_command
from patch.cli.commands import learn as learn_command


def test_prune_writes_masks_scores_and_configuration(work):

    artifact = load_artifact(work / "prior", model=build_tiny_model("llama"))
    assert all(torch.equal(k.view(-1, 4).sum(1), torch.full((k.numel() // 4,), 2)) for k in artifact.masks.values())
    assert artifact.tile_scores.keys() == artifact.masks.keys()
    assert artifact.meta["target_sparsity"] == 0.35
    assert artifact.meta["tile"] == [64, 64]
    assert artifact.meta["seqlen"] == 32
    assert len(artifact.meta["text_sha256"]) == 64
    resolved = yaml.safe_load((work / "prior" / "config.resolved.yaml").read_text())
    assert resolved["nsamples"] == 4
    assert resolved["method"] == "wanda"


def test_prune_from_its_resolved_configuration_gives_the_same_masks(work, tmp_path, capsys):

    status, _, _ = run(
        capsys, "prune", "--config", work / "prior" / "config.resolved.yaml", "--out", tmp_path / "again"
    )
    assert status == 0
    first, second = (load_artifact(path).masks for path in (work / "prior", tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["sparsegpt", "thanos"])
def test_prune_keeps_updated_weights(work, tmp_path, method):
    out = tmp_path / "gpt"
    flags = [
        "--model",
        str(work / "model"),
        "--data",
        str(work / "train.txt"),
        "--nsamples",
        "4",
        "--seqlen",
        "32",
    ]
    assert cli.main(["prune", *flags, "--method", method, "--out", str(out)]) == 0
    model = inputs.load_model(str(work / "model"))
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    artifact = load_artifact(out)
    apply_artifact(model, artifact)
    name, keep = next(iter(artifact.masks.items()))
    weight = model.get_submodule(name).weight
    assert not weight[~keep].any()
    assert not torch.equal(weight[keep], dense[f"{name}.weight"][keep])


def test_pruning_flags_reach_the_method(work, tmp_path):
    from patch.data.tokens import calibration_windows
    from patch.priors import tile_scores
    from patch.pruning import prune_model

    out = tmp_path / "thanos"
    flags = f"--model {work}/model --data {work}/train.txt --nsamples 4 --seqlen 32 --tile 64,64 --method thanos"
    flags += f" --target-sparsity 0.35 --precision fp64 --damping 0.3 --block-size 32 --device cpu --out {out}"
    assert cli.main(["prune", *flags.split()]) == 0
    artifact = load_artifact(out)
    options = {"precision": "fp64", "damping": 0.3, "block_size": 32}
    assert {key: artifact.meta[key] for key in options} == options
    calibration, _ = calibration_windows(
        inputs.load_tokenizer(str(work / "model")), str(work / "train.txt"), nsamples=4, seqlen=32, seed=0
    )
    for pattern, sparsity in (("unstructured", 0.35), ("2:4", 0.5)):
        model = inputs.load_model(str(work / "model"), device="cpu")
        masks = prune_model(model, "thanos", pattern=pattern, sparsity=sparsity, calibration=calibration, **options)
        for name, keep in masks.items():
            if pattern == "unstructured":
                assert torch.equal(artifact.tile_scores[name], tile_scores(keep, (64, 64)))
            else:
                assert torch.equal(artifact.masks[name], keep)
                assert torch.equal(artifact.weights[name], model.get_submodule(name).weight)


def test_prune_says_what_it_will_do_and_what_packing_will_take(work, tmp_path, capsys):
    flags = ["--model", work / "model", "--method", "magnitude", "--target-sparsity", 0.45, "--tile", "64,64"]
    status, out, err = run(capsys, "prune", *flags, "--out", tmp_path / "p")
    assert status == 0
    plan = [line for line in err.splitlines() if "tiles" in line or "pruning" in line]
    assert plan == [
        "first the unstructured reference that scores the tiles, then the 2:4 masks",
        "at sparsity 0.45 on 64x64 tiles, packing will take about 0.71 of dense bytes: it stores tiles of 128x128, "
        "with which it would take 0.61",
        "pruning 14 layers with magnitude, unstructured 0.45; peak memory about 0.5 GB",
        "pruning 14 layers with magnitude, 2:4; peak memory about 0.5 GB",
    ]
    assert "pruned 14 layers with magnitude\nsparsity 0.5000 in the masked layers" in out
    assert "of dense\n" in out.split("packed: ")[1]
    # The configuration that was written can be run again: it holds nothing that the method does not read.
    resolved = tmp_path / "p" / "config.resolved.yaml"
    assert run(capsys, "prune", "--config", resolved, "--out", tmp_path / "q")[0] == 0


def test_prune_to_tiles_says_when_none_stays_dense(work, tmp_path, capsys):
    flags = ["--model", work / "model", "--method", "magnitude", "--pattern", "tiles", "--tiles-by", "error"]
    said = "at a sparsity of 0.5 no tile stays dense; give --sparsity 0.45 or less for a hybrid\n"
    assert said in run(capsys, "prune", *flags, "--out", tmp_path / "p")[2]
    assert said not in run(capsys, "prune", *flags, "--sparsity", 0.45, "--out", tmp_path / "q")[2]


def test_pruning_a_pruned_export_tells_the_zeros_that_are_there(work, tmp_path, capsys):
    from patch.artifacts.artifact import load_artifact
    from patch.models.keep_masks import measured_sparsity

    export = ["export", "--model", work / "model", "--masks", work / "prior", "--format", "dense"]
    assert run(capsys, *export, "--out", tmp_path / "dense")[0] == 0
    flags = ["--pattern", "unstructured", "--sparsity", 0.25, "--seqlen", 32, "--data", work / "train.txt"]
    shares = {
        "wanda": "sparsity 0.2500 by the masks, but 0.5000 of the weights in these layers are 0",
        "sparsegpt": "sparsity 0.5000 in the masked layers",
    }
    for method, said in shares.items():
        out = tmp_path / method
        command = ["prune", "--model", tmp_path / "dense", "--method", method, "--nsamples", 8, *flags, "--out", out]
        status, printed, err = run(capsys, *command)
        assert status == 0
        assert "WARNING: 50.0 % of the weights to mask are zero already (in 14 of 14 layers, 'model.layers.0." in err
        assert f"pruned 14 layers with {method}\n" in printed and said in printed
    assert measured_sparsity(load_artifact(tmp_path / "sparsegpt").masks) == 0.5


def test_the_default_block_size_of_the_method_is_recorded(work, tmp_path):

    assert load_artifact(work / "prior").meta["block_size"] == 128
    flags = f"--model {work}/model --data {work}/train.txt --nsamples 1 --seqlen 32 --method thanos --out {tmp_path}/o"
    assert cli.main(["prune", *flags.split()]) == 0
    assert load_artifact(tmp_path / "o").meta["block_size"] == 512


def test_learn_meets_the_exact_budget_and_saves_its_configuration(work):
    from patch.models.keep_masks import measured_sparsity

    artifact = load_artifact(work / "learned" / "result")
    # 4096 of the weights of a 64x64 tile make one step of the budget.
    total = sum(keep.numel() for keep in artifact.masks.values())
    assert abs(measured_sparsity(artifact.masks) - 0.35) <= 2048 / total
    metrics = [json.loads(line) for line in (work / "learned" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == [1, 2, 3]
    resolved = yaml.safe_load((work / "learned" / "config.resolved.yaml").read_text())
    assert resolved["learn"]["tile"] == [64, 64]
    assert resolved["learn"]["tile_temperature"] == [2.0, 0.05]  # the preset's value at 35 %
    assert resolved["learn"]["warmup_steps"] == 1
    assert resolved["learn"]["global_batch_size"] == 4


def test_finished_learning_is_applied_again_with_resume(work, capsys):
    before = (work / "learned" / "metrics.jsonl").read_text()
    status, out, _ = run(capsys, "learn", "--config", work / "learned" / "config.resolved.yaml", "--resume")
    assert status == 0
    assert "learned 14 layers in 3 steps" in out
    assert (work / "learned" / "metrics.jsonl").read_text() == before


def test_learn_goes_on_after_an_interrupt(work, tmp_path, capsys, monkeypatch):
    from patch.learn.trainer import MaskTrainer

    arguments = ["learn", "--config", work / "learned" / "config.resolved.yaml", "--out", tmp_path / "run"]
    arguments += ["--set", "learn.save_steps=1"]
    begin = MaskTrainer.begin_step

    def interrupt(self):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        begin(self)

    with monkeypatch.context() as patched:
        patched.setattr(MaskTrainer, "begin_step", interrupt)
        status, _, err = run(capsys, *arguments)
    assert status == 130
    assert f"interrupted: {tmp_path / 'run' / 'checkpoint-2'} is kept; go on with the same command and --resume" in err
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "expected no earlier run" in err
    assert "--resume" in err
    assert run(capsys, *arguments, "--resume")[0] == 0
    whole, resumed = (load_artifact(path / "result").masks for path in (work / "learned", tmp_path / "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert run(capsys, *arguments, "--overwrite")[0] == 0


def test_other_presets(work, tmp_path):
    flags = [
        "--model",
        work / "model",
        "--data",
        work / "train.txt",
        "--seqlen",
        "32",
        "--steps",
        "2",
        "--tile",
        "64,64",
    ]
    flags += ["--local-batch-size", "4", "--global-batch-size", "4", "--prior", work / "prior"]
    for preset, more in (("tile", ["--sparsity", "0.35"]), ("maskllm", [])):
        arguments = ["learn", *flags, "--preset", preset, *more, "--out", tmp_path / preset]
        assert cli.main([str(argument) for argument in arguments]) == 0


def test_export_eval_and_generate(work, tmp_path, capsys):
    exported = {}
    for name, more in (("packed", []), ("dense", ["--dtype", "bf16"]), ("own", [])):
        kind = "packed" if name == "packed" else "dense"
        flags = ["--model", work / "model", "--masks", work / "learned", "--format", kind, "--out", tmp_path / name]
        status, exported[name], _ = run(capsys, "export", *flags, *more)
        assert status == 0
    assert "sparsity 0.3500 in the masked layers" in exported["packed"]
    assert "dense -> " in exported["packed"]
    assert "(1.000x)" in exported["dense"]
    # Learned at --tile 64: few of the tiles that are packed are 2:4 throughout.
    assert re.search(r"stored 2:4: \d of 20; zeros in the others .*--tile 128,128 pack smaller", exported["packed"])
    assert "stored 2:4" not in exported["dense"]
    # The model is fp32: said where it cannot stay so, kept where it can.
    assert "weights cast from float32 to bfloat16 (the packed format holds 16-bit weights)" in exported["packed"]
    assert "weights cast from float32 to bfloat16\n" in exported["dense"]
    assert "weights cast" not in exported["own"]
    assert json.loads((tmp_path / "own" / "config.json").read_text())["dtype"] == "float32"
    status, out, _ = run(
        capsys,
        *("eval", "--model", work / "model", "--masks", f"{work / 'prior'},{work / 'learned'}"),
        *(
            "--compare",
            tmp_path / "packed",
            "--data",
            work / "held.txt",
            "--window",
            "64",
            "--batch-size",
            "4",
        ),
        *("--json", tmp_path / "new" / "results.json"),
    )
    assert status == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["dense", "prior", "learned", "packed"]
    assert "SHA-256" in out
    assert "prior: sparsity 0.5000 in the masked layers" in out
    models = json.loads((tmp_path / "new" / "results.json").read_text())["models"]
    results = {model["label"]: model["perplexity"]["held.txt"] for model in models}
    assert [model["dtype"] for model in models] == ["float32", "float32", "float32", "bfloat16"]
    assert results["packed"]["perplexity"] == pytest.approx(results["learned"]["perplexity"], rel=0.02)
    texts = [
        run(capsys, "generate", "--model", tmp_path / kind, "--prompt", "Line 7", "--max-new-tokens", 8)[1]
        for kind in ("packed", "dense")
    ]
    assert texts[0].startswith("Line 7")
    assert texts[0] == texts[1]


def test_generate_samples_by_seed(work):
    model, tokenizer = inputs.load_model(str(work / "model")), inputs.load_tokenizer(str(work / "model"))
    options = [
        generate_command.Options(model="m", prompt="Line", max_new_tokens=16, temperature=1.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    texts = [generate_command.continuation(model, tokenizer, "Line", option) for option in options]
    assert texts[0] == texts[1] != texts[2]


def test_eval_of_one_model(work, capsys):
    status, out, _ = run(capsys, "eval", "--model", work / "model", "--data", work / "held.txt", "--max-windows", "2")
    assert status == 0
    assert out.splitlines()[1].startswith("model ")
    assert "2 non-overlapping windows of 128 tokens" in out


def test_info(capsys):
    status, out, _ = run(capsys, "info", "--json")
    assert status == 0
    assert all(check["ok"] for check in json.loads(out)["checks"])
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert "tile_linear" in out
    assert "works" in out


def test_info_says_what_to_do(monkeypatch):
    from patch.cli.commands.info import as_text

    failed = {
        "op": "tile_linear",
        "device": "cuda:0",
        "ok": False,
        "error": "no kernel",
        "advice": "Rebuild.",
    }
    gemm = {"cuda:0": {"family": "sm90", "state": "disabled", "reason": "y[token 0][row 1] is 2", "checked": "here"}}
    report = {"python": "3", "torch_cuda": None, "build": {"build_id": "x"}, "gpus": [], "sparse_gemm": gemm}
    shown = as_text(report | {"checks": [failed]})
    assert "sparse GEMM on cuda:0: sm90 disabled (y[token 0][row 1] is 2), checked here" in shown
    assert "torch cuda: none" in shown
    assert "FAILS" in shown
    assert "what to do: Rebuild." in shown


def test_flags_win_over_set_over_file(work, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(generate_command, "run", seen.append)
    file = tmp_path / "c.yaml"
    file.write_text("model: from-file\nprompt: from-file\nmax_new_tokens: 1\ntemperature: 0.1\n")
    arguments = ["--set", "max_new_tokens=2", "--set", "prompt=from-set", "--max-new-tokens", "3"]
    assert cli.main(["generate", "--config", str(file), *arguments]) == 0
    assert seen == [generate_command.Options(model="from-file", prompt="from-set", max_new_tokens=3, temperature=0.1)]


def test_learn_flags_reach_the_hyper_parameters():
    base = {"model": "m", "data": "d", "out": Path("o")}
    options = learn_command.Options(**base, learn={"target_sparsity": "0.25", "lr": 1, "tile": "32,16"})
    config = learn_command.learning_config(options)
    assert (config.target_sparsity, config.lr, config.tile) == (0.25, 1.0, (32, 16))
    assert config.sparse_reg == 7.0
    tile = learn_command.learning_config(learn_command.Options(**base, preset="tile", learn={"target_sparsity": 0.25}))
    assert (tile.mode, tile.lr, tile.sparse_reg) == ("tile", 1e-4, 3.0)


def test_help_is_fast_and_shows_examples():
    """The help must not import torch: `patch-llm --help` is the first thing people type."""
    code = "import sys; from patch.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
    for command in parser.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "9"}, {"KMP_BLOCKTIME": "9"}])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(chosen):
    """Spinning threads make everything ten times slower beside another process; OpenMP reads this once, with torch."""
    code = "import os, sys; from patch import cli; cli.main('prune --model ./nope --out x'.split()); "
    code += "print('torch' in sys.modules, os.environ.get('OMP_WAIT_POLICY'))"
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in names} | chosen
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    expected = chosen.get("OMP_WAIT_POLICY") if chosen else "passive"
    assert result.stdout.split() == ["False", str(expected)]


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_help_fits_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("  patch-llm ")) <= min(columns, 110)
    assert "  patch-llm export --model ./llama --masks learned --format packed --out packed" in lines  # not wrapped


def test_python_dash_m_and_version():
    result = subprocess.run([sys.executable, "-m", "patch", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("patch-llm ")


def test_overwrite_replaces_a_result(work, tmp_path, capsys):
    flags = ["prune", "--model", work / "model", "--method", "magnitude", "--out", tmp_path / "p"]
    assert run(capsys, *flags)[0] == 0
    assert run(capsys, *flags)[0] == 2
    assert run(capsys, *flags, "--overwrite")[0] == 0


def test_demo_command(tmp_path, capsys):
    """The whole demo in a miniature; its details are in test_demo.py."""
    from support.demo import TINY, write_sources

    write_sources(tmp_path / "src")
    flags = [part for setting in TINY for part in ("--set", f"settings.{setting}")]
    status, out, _ = run(capsys, "demo", "--text", tmp_path / "src", "--out", tmp_path / "d", *flags)
    assert status == 0
    assert "PATCH joint 35%" in out
    with open(tmp_path / "d" / "results.csv", newline="") as file:
        assert next(row["method"] for row in csv.DictReader(file)) == "dense"
    assert yaml.safe_load((tmp_path / "d" / "config.resolved.yaml").read_text())["settings"]["tile"] == [
        32,
        32,
    ]
    # The stages are artifacts for the other commands.
    flags = [
        "--model",
        tmp_path / "d" / "dense",
        "--masks",
        tmp_path / "d" / "hybrid-35-reconstructed",
        "--out",
        tmp_path / "packed",
    ]
    assert run(capsys, "export", *flags)[0] == 0
