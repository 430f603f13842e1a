"""What the command line refuses, with the text of every message."""

from __future__ import annotations

import shutil

import pytest
from support.commands import run
from support.models import build_byte_tokenizer, build_tiny_model

from patch import cli
from patch.cli import inputs
from patch.cli.commands import generate as generate_command
from patch.cli.commands import learn as learn_command
from patch.cli.commands import prune as prune_command
from patch.files.claim import claimed

PRUNE = ["prune", "--model", "{w}/model", "--data", "{w}/train.txt", "--out", "{t}/o"]
LEARN = ["learn", "--model", "{w}/model", "--data", "{w}/train.txt", "--seqlen", "32", "--sparsity", "0.35"]
LEARN += ["--global-batch-size", "4", "--out", "{t}/o"]
EXPORT = ["export", "--model", "{w}/model", "--masks", "{w}/prior", "--out", "{t}/o"]
EVAL = ["eval", "--model", "{w}/model", "--data", "{w}/held.txt"]
GENERATE = ["generate", "--model", "{w}/model", "--prompt", "Line"]

REFUSED = [
    (["prune", "--out", "x"], "expected --model, got nothing. Give it as a flag"),
    ([*PRUNE, "--set", "method=5"], "expected one of magnitude, wanda, sparsegpt, thanos"),
    ([*PRUNE, "--precision", "fp16"], "--precision: expected one of fp32, fp64, got 'fp16'. Choices are: fp32, fp64."),
    ([*PRUNE, "--seed", "99999999999"], "--seed: expected an integer from 0 to 4294967295, got 99999999999"),
    ([*PRUNE, "--out", ""], "--out: expected a path, got ''. Write for example ./folder."),
    ([*PRUNE, "--out", "{w}/train.txt/x"], "--out: expected a folder to write to, {w}/train.txt is none"),
    ([*PRUNE, "--out", "/proc/x"], "--out: expected a "),
    ([*LEARN, "--out", "{w}/train.txt/x"], "--out: expected a folder to write to, {w}/train.txt is none"),
    (["demo", "--out", "{w}/train.txt/x"], "--out: expected a folder to write to, {w}/train.txt is none"),
    ([*PRUNE, "--damping", "-1"], "damping: expected a finite share of the mean diagonal, 0 or more, got -1"),
    ([*PRUNE, "--block-size", "0"], "--block-size: expected an integer >= 1, got 0"),
    ([*PRUNE, "--block-size", "6"], "--block-size: expected a multiple of 4, got 6. Pattern 2:4"),
    ([*PRUNE, "--pattern", "4:8"], "pattern: expected one of 2:4, tiles, unstructured, got '4:8'"),
    (
        [*PRUNE, "--sparsity", "0.45"],
        "--sparsity: expected 0.5 for pattern 2:4, got 0.45. Use --pattern tiles",
    ),
    (
        [*PRUNE, "--sparsity", "45", "--pattern", "unstructured"],
        "sparsity: expected a share of zeros from 0 to 0.5, got 45",
    ),
    ([*PRUNE, "--target-sparsity", "0.6"], "--target-sparsity: expected a share of zeros from 0 to 0.5"),
    ([*PRUNE, "--tile", "64,6"], "tile: expected positive rows,columns with columns a multiple of 4, got (64, 6)"),
    ([*PRUNE, "--nsamples", "0"], "nsamples: expected an integer >= 1, got 0"),
    ([*PRUNE, "--nsamples", "many"], "nsamples: expected an integer >= 1, got 'many'"),
    ([*PRUNE, "--seed", "-1"], "seed: expected an integer from 0 to 4294967295, got -1"),
    ([*PRUNE, "--data", "{w}/absent.txt"], "--data: expected a file (.txt, .jsonl, .parquet) or one of c4"),
    (["prune", "--model", "{w}/model", "--out", "{t}/o"], "--data: expected a text, got none"),
    ([*PRUNE, "--data", "{w}/short.txt"], "expected a text of more than"),
    ([*PRUNE, "--model", "{w}/absent"], "--model: expected a model folder, found none"),
    ([*PRUNE, "--model", "{w}/prior"], "has no config.json. Give the folder of the dense model"),
    ([*PRUNE, "--model", "no-such-model-anywhere"], "--model: expected a model folder or a Hugging Face id"),
    (
        [*PRUNE, "--out", "{w}/prior"],
        "exists already (a complete result). Choose another --out, or replace it with --overwrite",
    ),
    ([*PRUNE, "--out", "{w}/other", "--overwrite"], "holds other files. Choose another --out"),
    ([*PRUNE, "--out", "{w}/train.txt"], "--out: expected a folder"),
    (
        [*PRUNE, "--dtype", "int8"],
        "dtype: expected one of auto, float32, bfloat16, float16, bf16, fp16, fp32, got 'int8'",
    ),
    (
        [*PRUNE, "--damping", "0.1"],
        "damping: expected none with method wanda, got 0.1. Leave it out, or use --method sparsegpt, thanos.",
    ),
    (
        [*PRUNE, "--method", "sparsegpt", "--shift-zero-metrics"],
        "expected none with method sparsegpt, got True. Leave it out, or use --method wanda.",
    ),
    ([*PRUNE, "--method", "magnitude"], "data: expected none with method magnitude, got '"),
    (
        ["prune", "--model", "{w}/model", "--method", "magnitude", "--nsamples", "8", "--out", "{t}/o"],
        "nsamples: expected none with method magnitude, got 8. Leave it out.",
    ),
    (
        [*PRUNE, "--method", "prox_sparse", "--precision", "fp64"],
        "precision: expected none with method prox_sparse, got 'fp64'. Leave it out",
    ),
    ([*PRUNE, "--device", "meta"], "--device: expected cpu, cuda or cuda:N, got 'meta'. Use --device cpu."),
    ([*PRUNE, "--device", "cuda:99"], "--device: expected a GPU that is there, got 'cuda:99'"),
    ([*PRUNE, "--device", "abacus"], "--device: expected cpu, cuda or cuda:N, got 'abacus'"),
    ([*PRUNE, "--exclude", "*.nothing"], "got '*.nothing' which matches none"),
    ([*PRUNE, "--set", "nsample=4"], "got 'nsample'. Did you mean 'nsamples'?"),
    ([*LEARN, "--set", "learn.learning_rate=1"], "got 'learn.learning_rate'. Did you mean 'learn."),
    ([*LEARN, "--set", "lr=1"], "got 'lr'. Did you mean 'learn.lr'?"),
    ([*LEARN, "--set", "learn=joint"], "expected 'learn' to hold settings by name, got 'joint'. Write learn.NAME ="),
    ([*LEARN, "--lr", "-1"], "--lr: expected a number > 0, got -1"),
    ([*LEARN, "--sparsity", "0.7"], "--sparsity: expected a share of zeros from 0 to 0.5, got 0.7"),
    (LEARN[:7] + LEARN[9:], "--sparsity: expected a target with preset joint, got none"),
    ([*LEARN, "--preset", "both"], "preset: expected one of joint, tile, maskllm, got 'both'"),
    ([*LEARN, "--preset", "maskllm"], "--sparsity: expected 0.5 with mode maskllm"),
    ([*LEARN, "--preset", "tile"], "--prior: expected a folder with 2:4 masks for preset tile, got none"),
    ([*LEARN, "--set", "learn.mode=tile"], "learn.mode: expected the mode of preset joint"),
    ([*LEARN, "--steps", "2", "--blocks", "8"], "--steps and --blocks: expected one of them, got both"),
    ([*LEARN, "--steps", "0"], "steps: expected an integer >= 1, got 0"),
    ([*LEARN, "--steps", "100000"], "--data: expected text for 400000 blocks of 32 tokens, got"),
    (
        [*LEARN, "--steps", "3", "--set", "learn.epochs=2"],
        "--steps: expected a multiple of learn.epochs = 2, got 3",
    ),
    ([*LEARN, "--local-batch-size", "3"], "--global-batch-size: expected a multiple of --local-batch-size"),
    ([*LEARN, "--prior", "{w}/absent"], "--prior: expected a folder made by prune or learn, found none"),
    (
        [*LEARN, "--prior", "{w}/prior"],
        "--tile: expected the tile of the prior's scores, (64, 64), got (128, 128)",
    ),
    ([*LEARN, "--out", "{w}/learned"], "has result, metrics.jsonl"),
    ([*LEARN, "--out", "{w}/held.txt"], "--out: expected a folder"),
    ([*LEARN, "--resume", "--overwrite"], "--resume and --overwrite: expected one of them"),
    ([*LEARN, "--dtype", "fp16"], "expected float32, bfloat16 or float64 weights"),
    ([*LEARN, "--model", "{w}/other", "--prior", "{w}/prior"], "of LlamaForCausalLM, found Linear ("),
    ([*EXPORT, "--format", "zip"], "format: expected one of packed, dense, got 'zip'"),
    ([*EXPORT, "--dtype", "fp32"], "--dtype: expected bf16 or fp16 with --format packed"),
    ([*EXPORT, "--masks", "{w}/absent"], "--masks: expected a folder made by prune or learn, found none"),
    ([*EXPORT, "--masks", "{w}/model"], "{w}/model"),
    (
        [*EXPORT, "--model", "{w}/other"],
        ": expected torch.bool (128, 256), got torch.bool (128, 192). Pass",
    ),
    ([*EVAL, "--window", "1"], "window: expected an integer >= 2, got 1"),
    ([*EVAL, "--window", "4096"], "4096"),
    ([*EVAL, "--batch-size", "0"], "--batch-size: expected an integer >= 1, got 0"),
    ([*EVAL, "--data", "wikitext3"], "--data: expected a file"),
    ([*EVAL, "--split", "test"], "expected no split for the local file"),
    ([*EVAL, "--masks", "{w}/absent"], "--masks: expected a folder made by prune or learn"),
    ([*EVAL, "--compare", "{w}/prior"], "--compare: expected a transformers model, '{w}/prior' has no config.json"),
    ([*EVAL, "--compare", "{w}/absent"], "--compare: expected a model folder, found none"),
    ([*EVAL, "--compare", "no-such-model-anywhere"], "--compare: expected a model folder or a Hugging Face id"),
    ([*GENERATE, "--seed", "1e23"], "seed: expected an integer from 0 to 4294967295, got 1e+23"),
    ([*GENERATE, "--seed", "1" * 30], "seed: expected an integer from 0 to 4294967295, got 1111"),
    (
        [*GENERATE, "--max-new-tokens", "1" * 30],
        "--max-new-tokens: expected an integer >= 1 and < 2147483648",
    ),
    ([*GENERATE, "--prompt", ""], "prompt: expected text, got ''. Give at least one word"),
    ([*GENERATE, "--max-new-tokens", "0"], "--max-new-tokens: expected an integer >= 1 and < 2147483648, got 0"),
    (
        [*GENERATE, "--max-new-tokens", "500"],
        "expected prompt and new tokens within the model's 128 positions",
    ),
    ([*GENERATE, "--temperature", "-1"], "temperature: expected a number >= 0, got -1"),
    ([*GENERATE, "--config", "{w}/none.yaml"], "expected a configuration file, found none"),
    (["demo", "--out", "{w}/train.txt"], "--out: expected a folder"),
    (["demo", "--text", "{w}/absent", "--out", "{t}/o"], "--text: expected a folder of .py files"),
    (
        ["demo", "--set", "settings.targets=[0.6]", "--out", "{t}/o"],
        "targets: expected shares of zeros between 0 and 0.5",
    ),
    (
        ["demo", "--set", "settings.heldout_tokens=5", "--out", "{t}/o"],
        "heldout_tokens: expected at least one window",
    ),
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
    shutil.copytree(work / "prior", tmp_path / "prior")
    masks = tmp_path / "prior" / "masks.safetensors"
    data = bytearray(masks.read_bytes())
    data[-1] ^= 1
    masks.write_bytes(data)
    status, _, err = run(
        capsys, "export", "--model", work / "model", "--masks", tmp_path / "prior", "--out", tmp_path / "o"
    )
    assert status == 2
    assert "masks.safetensors: expected SHA-256 " in err


def test_an_unfinished_run_is_refused_as_masks(work, tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    status, _, err = run(
        capsys, "export", "--model", work / "model", "--masks", tmp_path / "run", "--out", tmp_path / "o"
    )
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
    assert "/prior: expected an artifact made from" in err and "settings in config.json differ" in err


def test_unstructured_prior_is_refused(work, tmp_path, capsys):
    flags = [
        "--model",
        work / "model",
        "--out",
        tmp_path / "p",
        "--method",
        "magnitude",
        "--pattern",
        "unstructured",
    ]
    assert run(capsys, "prune", *flags)[0] == 0
    arguments = [argument.format(w=work, t=tmp_path) for argument in LEARN]
    status, _, err = run(capsys, *arguments, "--prior", tmp_path / "p")
    assert status == 2
    assert "was pruned unstructured" in err


@pytest.mark.parametrize("arguments", [PRUNE, LEARN, EXPORT, ["demo", "--out", "{t}/o"]])
def test_a_folder_that_another_run_is_writing_is_refused(work, tmp_path, capsys, arguments):
    filled = [argument.format(w=work, t=tmp_path) for argument in arguments]
    with claimed(tmp_path / "o"):
        status, _, err = run(capsys, *filled)
    assert status == 2
    assert f"--out: expected a path that no other run is writing, {tmp_path / 'o'} is being written by process " in err
    assert list(tmp_path.iterdir()) == []


def test_what_appears_while_a_command_works_is_kept(work, tmp_path, capsys, monkeypatch):
    """As when the other run is on a host whose locks are not seen here."""
    flags = ["prune", "--model", work / "model", "--method", "magnitude", "--out", tmp_path / "p"]
    load = inputs.load_model

    def and_another_run_ends(*arguments, **settings):
        shutil.copytree(work / "prior", tmp_path / "p")
        return load(*arguments, **settings)

    monkeypatch.setattr(inputs, "load_model", and_another_run_ends)
    status, out, _ = run(capsys, *flags)
    assert status == 0
    assert f"wrote masks to {tmp_path / 'p-2'}" in out
    assert (tmp_path / "p" / "masks.safetensors").read_bytes() == (work / "prior" / "masks.safetensors").read_bytes()


def test_errors_of_the_file_system_say_what_to_do(work, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patch.files.folder._seal", full)
    flags = ["prune", "--model", work / "model", "--method", "magnitude", "--out", tmp_path / "p"]
    status, _, err = run(capsys, *flags)
    assert status == 2
    assert err.splitlines(keepends=True)[-1] == (
        f"patch-llm: error: {tmp_path / 'p'}: expected room on the disk, got 'No space left on device'. "
        "Free space there or choose another place, then run again.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_program_and_debug(capsys, monkeypatch):
    def fail(options):
        raise RuntimeError("broken\ninside")

    monkeypatch.setattr(generate_command, "run", fail)
    arguments = ["generate", "--model", "m", "--prompt", "p"]
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert (
        err == "patch-llm: error: unexpected RuntimeError: broken inside (run again with --debug for the traceback)\n"
    )
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
    options = learn_command.Options(model="m", data="d", out=tmp_path)
    assert "no checkpoint was complete yet" in learn_command.on_interrupt(options)
    monkeypatch.setattr(learn_command, "run", interrupt)
    status, _, err = run(capsys, "learn", "--model", "m", "--sparsity", "0.45", "--dry-run")
    assert status == 130
    assert "interrupted: nothing was started" in err
