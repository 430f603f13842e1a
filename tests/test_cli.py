"""The command line from end to end on tiny random models, and the message of every refused input."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build_byte_tokenizer, build_tiny_model

from patch import cli
from patch.commands import common
from patch.commands import generate as generate_command
from patch.commands import learn as learn_command
from patch.commands import prune as prune_command


def text(lines: int) -> str:
    return "\n".join(f"Line {i}: the {'quick' if i % 3 else 'slow'} fox {i * i} jumps." for i in range(lines))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Folder with a tiny dense model, two texts, and the results of prune and learn made by the commands."""
    folder = tmp_path_factory.mktemp("cli")
    model = build_tiny_model("llama")
    model.save_pretrained(folder / "model")
    build_byte_tokenizer().save_pretrained(folder / "model")
    build_tiny_model("llama", intermediate_size=256).save_pretrained(folder / "other")
    build_byte_tokenizer().save_pretrained(folder / "other")
    (folder / "train.txt").write_text(text(400))
    (folder / "held.txt").write_text(text(60))
    (folder / "short.txt").write_text("too short")
    common_flags = ["--model", str(folder / "model"), "--data", str(folder / "train.txt")]
    status = cli.main(
        ["prune", *common_flags, "--method", "wanda", "--nsamples", "4", "--seqlen", "32", "--tile", "64,64"]
        + ["--target-sparsity", "0.35", "--out", str(folder / "prior")]
    )
    assert status == 0
    status = cli.main(
        ["learn", *common_flags, "--prior", str(folder / "prior"), "--sparsity", "0.35", "--tile", "64"]
        + ["--seqlen", "32", "--steps", "3", "--local-batch-size", "2", "--global-batch-size", "4"]
        + ["--exact-budget", "--set", "learn.warmup_steps=1", "--out", str(folder / "learned")]
    )
    assert status == 0
    return folder


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# -- what works -----------------------------------------------------------------------------------------------------------


def test_prune_writes_masks_scores_and_configuration(work):
    from patch.checkpoint import load_artifact

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
    from patch.checkpoint import load_artifact

    status, _, _ = run(capsys, "prune", "--config", work / "prior" / "config.resolved.yaml", "--out", tmp_path / "again")
    assert status == 0
    first, second = (load_artifact(path).masks for path in (work / "prior", tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sparsegpt_keeps_its_updated_weights(work, tmp_path):
    out = tmp_path / "gpt"
    flags = ["--model", str(work / "model"), "--data", str(work / "train.txt"), "--nsamples", "4", "--seqlen", "32"]
    assert cli.main(["prune", *flags, "--method", "sparsegpt", "--out", str(out)]) == 0
    model = common.load_model(str(work / "model"))
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    artifact = common.load_masks(out, model)
    common.apply_artifact(model, artifact)
    name, keep = next(iter(artifact.masks.items()))
    weight = model.get_submodule(name).weight
    assert not weight[~keep].any()
    assert not torch.equal(weight[keep], dense[f"{name}.weight"][keep])


def test_learn_meets_the_exact_budget_and_saves_its_configuration(work):
    from patch.checkpoint import load_artifact
    from patch.models import measured_sparsity

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
    from patch.checkpoint import load_artifact
    from patch.trainer import MaskTrainer

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
    assert "expected no earlier learning run" in err
    assert "--resume" in err
    assert run(capsys, *arguments, "--resume")[0] == 0
    whole, resumed = (load_artifact(path / "result").masks for path in (work / "learned", tmp_path / "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert run(capsys, *arguments, "--overwrite")[0] == 0


def test_other_presets(work, tmp_path):
    flags = ["--model", work / "model", "--data", work / "train.txt", "--seqlen", "32", "--steps", "2", "--tile", "64,64"]
    flags += ["--local-batch-size", "4", "--global-batch-size", "4", "--prior", work / "prior"]
    for preset, more in (("tile", ["--sparsity", "0.35"]), ("mask_llm", [])):
        arguments = ["learn", *flags, "--preset", preset, *more, "--out", tmp_path / preset]
        assert cli.main([str(argument) for argument in arguments]) == 0


def test_export_eval_and_generate(work, tmp_path, capsys):
    exported = {}
    for kind in ("packed", "dense"):
        status, out, _ = run(
            capsys, "export", "--model", work / "model", "--masks", work / "learned", "--format", kind, "--out", tmp_path / kind
        )
        assert status == 0
        exported[kind] = out
    assert "sparsity: 0.35" in exported["packed"]
    assert "dense -> " in exported["packed"]
    assert "(1.000x)" in exported["dense"]
    status, out, _ = run(
        capsys,
        *("eval", "--model", work / "model", "--masks", f"{work / 'prior'},{work / 'learned'}"),
        *("--compare", tmp_path / "packed", "--data", work / "held.txt", "--window", "64", "--batch-size", "4"),
        *("--json", tmp_path / "new" / "results.json"),
    )
    assert status == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["dense", "prior", "learned", "packed"]
    assert "SHA-256" in out
    assert "sparsity of prior: 0.5000" in out
    results = json.loads((tmp_path / "new" / "results.json").read_text())["perplexity"]
    assert results["packed"]["dtype"] == "bfloat16"
    assert results["packed"]["perplexity"] == pytest.approx(results["learned"]["perplexity"], rel=0.02)
    texts = [
        run(capsys, "generate", "--model", tmp_path / kind, "--prompt", "Line 7", "--max-new-tokens", 8)[1]
        for kind in ("packed", "dense")
    ]
    assert texts[0].startswith("Line 7")
    assert texts[0] == texts[1]


def test_generate_samples_by_seed(work):
    model, tokenizer = common.load_model(str(work / "model")), common.load_tokenizer(str(work / "model"))
    options = [generate_command.Options("m", "Line", 16, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
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
    from patch.commands.info import as_text

    failed = {"op": "tile_linear", "device": "cuda:0", "ok": False, "error": "no kernel", "advice": "Rebuild."}
    shown = as_text({"python": "3", "torch_cuda": None, "build": {"build_id": "x"}, "gpus": [], "checks": [failed]})
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
    assert seen == [generate_command.Options("from-file", "from-set", 3, temperature=0.1)]


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
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0


def test_python_dash_m_and_version():
    result = subprocess.run([sys.executable, "-m", "patch", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("patch-llm ")


# -- what is refused ------------------------------------------------------------------------------------------------------

PRUNE = ["prune", "--model", "{w}/model", "--data", "{w}/train.txt", "--out", "{t}/o"]
LEARN = ["learn", "--model", "{w}/model", "--data", "{w}/train.txt", "--seqlen", "32", "--sparsity", "0.35"]
LEARN += ["--global-batch-size", "4", "--out", "{t}/o"]
EXPORT = ["export", "--model", "{w}/model", "--masks", "{w}/prior", "--out", "{t}/o"]
EVAL = ["eval", "--model", "{w}/model", "--data", "{w}/held.txt"]
GENERATE = ["generate", "--model", "{w}/model", "--prompt", "Line"]

REFUSED = [
    (["prune", "--out", "x"], "expected --model, got nothing. Give it as a flag"),
    ([*PRUNE, "--set", "method=5"], "expected one of magnitude, wanda, sparsegpt"),
    ([*PRUNE, "--method", "thanos"], "thanos"),
    ([*PRUNE, "--pattern", "4:8"], "pattern: expected one of 2:4, unstructured, got '4:8'"),
    ([*PRUNE, "--sparsity", "0.45"], "sparsity: expected 0.5 with pattern 2:4, got 0.45. Use --pattern unstructured"),
    ([*PRUNE, "--sparsity", "45", "--pattern", "unstructured"], "sparsity: expected a share of zeros from 0 to 0.5, got 45.0"),
    ([*PRUNE, "--target-sparsity", "0.6"], "target_sparsity: expected a share of zeros from 0 to 0.5"),
    ([*PRUNE, "--tile", "64,6"], "tile: expected rows,columns > 0 with columns a multiple of 4, got (64, 6)"),
    ([*PRUNE, "--nsamples", "0"], "nsamples: expected an integer >= 1, got 0"),
    ([*PRUNE, "--nsamples", "many"], "nsamples: expected an integer, got 'many'"),
    ([*PRUNE, "--seed", "-1"], "seed: expected an integer >= 0, got -1"),
    ([*PRUNE, "--data", "{w}/absent.txt"], "--data: expected a file (.txt, .jsonl, .parquet) or one of c4"),
    (["prune", "--model", "{w}/model", "--out", "{t}/o"], "--data: expected a text, got none"),
    ([*PRUNE, "--data", "{w}/short.txt"], "expected a text of more than"),
    ([*PRUNE, "--model", "{w}/absent"], "--model: expected a model folder, found none"),
    ([*PRUNE, "--model", "{w}/prior"], "has no config.json. Give the folder of the dense model"),
    ([*PRUNE, "--model", "no-such-model-anywhere"], "--model: expected a model folder or a Hugging Face id"),
    ([*PRUNE, "--out", "{w}/prior"], "exists already (a complete result). Choose another --out, or replace it with --overwrite"),
    ([*PRUNE, "--out", "{w}/other", "--overwrite"], "holds other files. Choose another --out"),
    ([*PRUNE, "--out", "{w}/train.txt"], "--out: expected a folder"),
    ([*PRUNE, "--dtype", "int8"], "--dtype: expected one of auto, float32, bfloat16, float16"),
    ([*PRUNE, "--device", "cuda:99"], "--device: expected a GPU that is there, got 'cuda:99'"),
    ([*PRUNE, "--device", "abacus"], "--device: expected cpu, cuda or cuda:N, got 'abacus'"),
    ([*PRUNE, "--exclude", "*.nothing"], "got '*.nothing' which matches none"),
    ([*PRUNE, "--set", "nsample=4"], "got 'nsample'. Did you mean 'nsamples'?"),
    ([*LEARN, "--set", "learn.learning_rate=1"], "got 'learn.learning_rate'. Did you mean 'learn."),
    ([*LEARN, "--set", "lr=1"], "got 'lr'"),
    ([*LEARN, "--lr", "-1"], "lr: expected a number > 0, got -1.0"),
    ([*LEARN, "--sparsity", "0.7"], "target_sparsity: expected a share of zeros from 0 to 0.5, got 0.7"),
    (LEARN[:7] + LEARN[9:], "--sparsity: expected a target with preset joint, got none"),
    ([*LEARN, "--preset", "both"], "preset: expected one of joint, tile, mask_llm, got 'both'"),
    ([*LEARN, "--preset", "mask_llm"], "target_sparsity: expected 0.5 with mode mask_llm"),
    ([*LEARN, "--preset", "tile"], "--prior: expected a folder with 2:4 masks for preset tile, got none"),
    ([*LEARN, "--set", "learn.mode=tile"], "learn.mode: expected the mode of preset joint"),
    ([*LEARN, "--steps", "2", "--blocks", "8"], "--steps and --blocks: expected one of them, got both"),
    ([*LEARN, "--steps", "0"], "steps: expected an integer >= 1, got 0"),
    ([*LEARN, "--steps", "100000"], "--data: expected text for 400000 blocks of 32 tokens, got"),
    ([*LEARN, "--steps", "3", "--set", "learn.epochs=2"], "--steps: expected a multiple of learn.epochs = 2, got 3"),
    ([*LEARN, "--local-batch-size", "3"], "global_batch_size: expected a multiple of local_batch_size"),
    ([*LEARN, "--prior", "{w}/absent"], "--prior: expected a folder made by prune or learn, found none"),
    ([*LEARN, "--prior", "{w}/prior"], "--tile: expected the tile of the prior's scores, (64, 64), got (128, 128)"),
    ([*LEARN, "--out", "{w}/learned"], "has result, metrics.jsonl"),
    ([*LEARN, "--out", "{w}/held.txt"], "--out: expected a folder"),
    ([*LEARN, "--resume", "--overwrite"], "--resume and --overwrite: expected one of them"),
    ([*LEARN, "--dtype", "fp16"], "expected float32, bfloat16 or float64 weights"),
    ([*LEARN, "--model", "{w}/other", "--prior", "{w}/prior"], "has shape"),
    ([*EXPORT, "--format", "zip"], "format: expected one of packed, dense, got 'zip'"),
    ([*EXPORT, "--dtype", "fp32"], "--dtype: expected bf16 or fp16 with --format packed"),
    ([*EXPORT, "--masks", "{w}/absent"], "--masks: expected a folder made by prune or learn, found none"),
    ([*EXPORT, "--masks", "{w}/model"], "{w}/model"),
    ([*EXPORT, "--model", "{w}/other"], "has shape"),
    ([*EVAL, "--window", "1"], "window: expected an integer >= 2, got 1"),
    ([*EVAL, "--window", "4096"], "4096"),
    ([*EVAL, "--batch-size", "0"], "batch_size: expected an integer >= 1, got 0"),
    ([*EVAL, "--data", "wikitext3"], "--data: expected a file"),
    ([*EVAL, "--split", "test"], "expected no split for the local file"),
    ([*EVAL, "--masks", "{w}/absent"], "--masks: expected a folder made by prune or learn"),
    ([*GENERATE, "--prompt", ""], "--prompt: expected text, got nothing"),
    ([*GENERATE, "--max-new-tokens", "0"], "max_new_tokens: expected an integer >= 1, got 0"),
    ([*GENERATE, "--max-new-tokens", "500"], "expected prompt and new tokens within the model's 128 positions"),
    ([*GENERATE, "--temperature", "-1"], "temperature: expected a number >= 0, got -1.0"),
    ([*GENERATE, "--config", "{w}/none.yaml"], "expected a configuration file, found none"),
    (["demo", "--out", "{w}/train.txt"], "--out: expected a folder"),
    (["demo", "--text", "{w}/absent", "--out", "{t}/o"], "--text: expected a folder of .py files"),
    (["demo", "--set", "settings.targets=[0.6]", "--out", "{t}/o"], "targets: expected shares of zeros between 0 and 0.5"),
    (["demo", "--set", "settings.heldout_tokens=5", "--out", "{t}/o"], "heldout_tokens: expected at least one window"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused_in_one_line(work, tmp_path, capsys, arguments, message):
    filled = [argument.format(w=work, t=tmp_path) for argument in arguments]
    status, _, err = run(capsys, *filled)
    lines = [line for line in err.splitlines() if line.startswith("patch-llm: error: ")]
    assert status == 2
    assert len(lines) == 1
    assert message.format(w=work) in lines[0]
    assert "Traceback" not in err
    assert not (tmp_path / "o" / "result").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "--modell", "x"], "unrecognized arguments: --modell x. See `patch-llm --help`."),
        (["polish"], "invalid choice: 'polish'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("patch-llm: error: ")
    assert message in error


def test_a_damaged_artifact_is_refused(work, tmp_path, capsys):
    import shutil

    shutil.copytree(work / "prior", tmp_path / "prior")
    masks = tmp_path / "prior" / "masks.safetensors"
    data = bytearray(masks.read_bytes())
    data[-1] ^= 1
    masks.write_bytes(data)
    status, _, err = run(capsys, "export", "--model", work / "model", "--masks", tmp_path / "prior", "--out", tmp_path / "o")
    assert status == 2
    assert "masks.safetensors: SHA-256 differs" in err


def test_an_unfinished_run_is_refused_as_masks(work, tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    status, _, err = run(capsys, "export", "--model", work / "model", "--masks", tmp_path / "run", "--out", tmp_path / "o")
    assert status == 2
    assert "expected a finished learning run" in err


def test_masks_of_a_model_with_another_configuration_are_refused(work, tmp_path, capsys):
    model = build_tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    model.save_pretrained(tmp_path / "m")
    status, _, err = run(capsys, *"export --format dense".split(), "--model", tmp_path / "m", "--masks", work / "prior")
    assert status == 2
    assert "--out" in err  # missing first
    build_byte_tokenizer().save_pretrained(tmp_path / "m")
    flags = ["--model", tmp_path / "m", "--masks", work / "prior", "--out", tmp_path / "o"]
    status, _, err = run(capsys, "export", *flags)
    assert status == 2
    assert "expected masks of this model" in err


def test_unstructured_prior_is_refused(work, tmp_path, capsys):
    flags = ["--model", work / "model", "--out", tmp_path / "p", "--method", "magnitude", "--pattern", "unstructured"]
    assert run(capsys, "prune", *flags)[0] == 0
    arguments = [argument.format(w=work, t=tmp_path) for argument in LEARN]
    status, _, err = run(capsys, *arguments, "--prior", tmp_path / "p")
    assert status == 2
    assert "was pruned unstructured" in err


def test_overwrite_replaces_a_result(work, tmp_path, capsys):
    flags = ["prune", "--model", work / "model", "--method", "magnitude", "--out", tmp_path / "p"]
    assert run(capsys, *flags)[0] == 0
    assert run(capsys, *flags)[0] == 2
    assert run(capsys, *flags, "--overwrite")[0] == 0


def test_errors_of_the_program_and_debug(capsys, monkeypatch):
    def fail(options):
        raise RuntimeError("broken\ninside")

    monkeypatch.setattr(generate_command, "run", fail)
    arguments = ["generate", "--model", "m", "--prompt", "p"]
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert err == "patch-llm: error: unexpected RuntimeError: broken inside (run again with --debug for the traceback)\n"
    with pytest.raises(RuntimeError, match="broken"):
        cli.main([*arguments, "--debug"])
    with pytest.raises(ValueError, match="max_new_tokens"):
        cli.main([*arguments, "--debug", "--max-new-tokens", "0"])


def test_interrupt_says_what_is_kept(tmp_path, capsys, monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_command, "run", interrupt)
    status, _, err = run(capsys, "prune", "--model", "m", "--out", tmp_path / "o")
    assert status == 130
    assert f"interrupted: nothing was written to {tmp_path / 'o'}; run the same command again" in err
    options = learn_command.Options("m", "d", tmp_path)
    assert "no checkpoint was complete yet" in learn_command.on_interrupt(options)


def test_demo_command(tmp_path, capsys):
    """The whole demo in a miniature; its details are in test_demo.py."""
    from test_demo import TINY, write_sources

    write_sources(tmp_path / "src")
    flags = [part for setting in TINY for part in ("--set", f"settings.{setting}")]
    status, out, _ = run(capsys, "demo", "--text", tmp_path / "src", "--out", tmp_path / "d", *flags)
    assert status == 0
    assert "PATCH joint 35%" in out
    with open(tmp_path / "d" / "results.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)][0] == "dense"
    assert yaml.safe_load((tmp_path / "d" / "config.resolved.yaml").read_text())["settings"]["tile"] == [32, 32]
    # The stages are artifacts for the other commands.
    flags = ["--model", tmp_path / "d" / "dense", "--masks", tmp_path / "d" / "patch-35", "--out", tmp_path / "packed"]
    assert run(capsys, "export", *flags)[0] == 0
