"""`patch-llm eval` and `patch-llm report` from end to end: dense, masked and packed models, texts and local tasks."""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from support import lm_eval_tasks
from support.lm_eval_tasks import right_answers
from support.models import build_byte_tokenizer, build_tiny_model

from patch import cli
from patch.artifacts.apply import apply_artifact
from patch.artifacts.artifact import load_artifact
from patch.cli import inputs
from patch.evaluate.task_sets import TASK_SETS, expanded

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (pip install 'patch-llm[eval]')"
)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Folder with a dense bf16 model, masks of it, the packed model, a model of another tokenizer, texts and tasks."""
    folder = tmp_path_factory.mktemp("eval")
    # Large weights: with the usual small ones the blocks hardly change the logits, and masks no answer.
    model = build_tiny_model("llama", seed=1, dtype=torch.bfloat16, initializer_range=0.2)
    model.save_pretrained(folder / "model")
    build_byte_tokenizer().save_pretrained(folder / "model")
    build_tiny_model("llama", seed=1, dtype=torch.bfloat16).save_pretrained(folder / "foreign")
    tokenizer = build_byte_tokenizer()
    tokenizer.add_tokens(["probe"])
    tokenizer.save_pretrained(folder / "foreign")
    for name, words in (("held", "the quick fox"), ("other", "a slow dog")):
        (folder / f"{name}.txt").write_text("\n".join(f"Line {i}: {words} {i * i} jumps." for i in range(20)))
    lm_eval_tasks.write_task_folder(folder / "tasks")
    changes = {"brief": {"max_position_embeddings": 64}, "smaller": {"num_hidden_layers": 1}}
    changes["short"] = {"max_position_embeddings": 23}
    for name, options in changes.items():
        build_tiny_model("llama", seed=1, dtype=torch.bfloat16, **options).save_pretrained(folder / name)
        build_byte_tokenizer().save_pretrained(folder / name)
    without = build_byte_tokenizer()
    without.bos_token = None
    shutil.copytree(folder / "smaller", folder / "no_bos")
    without.save_pretrained(folder / "no_bos")
    made = [
        f"prune --model {folder}/model --method magnitude --out {folder}/masks",
        f"prune --model {folder}/smaller --method magnitude --out {folder}/other_masks",
        f"export --model {folder}/model --masks {folder}/masks --format packed --out {folder}/packed",
    ]
    for command in made:
        assert cli.main(command.split()) == 0
    return folder


@pytest.fixture(autouse=True)
def _local_tasks_only(monkeypatch, tmp_path):
    """Reading lm-eval's own 14,000 task files takes seconds and is in test_zero_shot.py."""
    if importlib.util.find_spec("lm_eval") is not None:
        import lm_eval.tasks

        quick = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", quick)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def everything(work) -> Path:
    """Result file of the dense, the masked and the packed model on two texts; on two tasks where lm-eval is there."""
    path = work / "everything.json"
    command = f"eval --model {work}/model --masks {work}/masks --compare {work}/packed --window 64 --json {path} "
    command += f"--data {work}/held.txt --data {work}/other.txt --markdown {work}/everything.md"
    assert cli.main(command.split()) == 0
    return path


def test_several_texts_in_one_file(work, everything):
    from patch.data.tokens import text_sha256

    results = json.loads(everything.read_text())
    assert [model["label"] for model in results["models"]] == ["dense", "masks", "packed"]
    tokenizer = build_byte_tokenizer()
    for model in results["models"]:
        assert list(model["perplexity"]) == ["held.txt", "other.txt"]
        for name, report in model["perplexity"].items():
            text = (work / name).read_text()
            assert report["text_sha256"] == text_sha256([text])
            assert report["tokens"] == len(tokenizer(text)["input_ids"])
            assert (report["window"], report["windows"]) == (64, report["tokens"] // 64)
            assert report["bytes"] == (report["window"] - 1) * report["windows"]  # a token a byte
            nats = report["loss"] * report["bytes"]
            assert report["bits_per_byte"] == pytest.approx(nats / 0.6931471805599453 / report["bytes"], rel=1e-12)
            assert (report["bos"], report["vocabulary"]) == ("none", 260)
            assert "uniform guess over 260 tokens" in report["warning"]  # random weights with a large spread
            assert report["perplexity"] == pytest.approx(2.718281828459045 ** report["loss"], rel=1e-12)
        assert model["zero_shot"] is None
    dense, masked, packed = results["models"]
    # That of a packed model is counted in its weights, where a dense bf16 weight of 0 would count too.
    assert [m["sparsity"] for m in results["models"]] == [0.0, 0.5, pytest.approx(0.5, abs=1e-3)]
    labels = [line.split(": ")[0] for line in results["warnings"]]
    assert labels == [
        f"{model}, {name}" for name in ("held.txt", "other.txt") for model in ("dense", "masks", "packed")
    ]
    assert dense["perplexity"]["held.txt"]["loss"] != masked["perplexity"]["held.txt"]["loss"]
    assert dense["perplexity"]["held.txt"]["loss"] != dense["perplexity"]["other.txt"]["loss"]
    for name in ("held.txt", "other.txt"):  # the same weights through another kernel, both in bf16
        assert packed["perplexity"][name]["loss"] == pytest.approx(masked["perplexity"][name]["loss"], rel=1e-3)


def test_the_file_holds_what_repeats_the_run(work, everything):
    from patch.files.folder import MANIFEST
    from patch.files.regular import file_sha256

    results = json.loads(everything.read_text())
    assert (results["format"], results["version"]) == ("patch-llm-results", 1)
    assert results["date"].endswith("+00:00")
    assert results["settings"]["data"] == [f"{work}/held.txt", f"{work}/other.txt"]
    assert results["settings"]["window"] == 64
    assert {"patch-llm", "torch", "transformers", "tokenizers", "datasets", "python"} <= set(results["versions"])
    dense, masked, packed = results["models"]
    assert dense["masks"] is None
    assert masked["masks"]["manifest_sha256"] == file_sha256(work / "masks" / MANIFEST)
    assert masked["masks"]["meta"]["method"] == masked["method"] == "magnitude"
    assert masked["model"] == dense["model"] == f"{work}/model"
    assert packed["model"] == f"{work}/packed"
    assert len({model["model_fingerprint"] for model in results["models"]}) == 3
    assert {model["dtype"] for model in results["models"]} == {"bfloat16"}
    # A run from the settings in the file gives the same numbers.
    again = {key: value for key, value in results["settings"].items() if value is not None}
    again |= {"json": str(work / "again.json"), "markdown": str(work / "again.md")}
    (work / "again.yaml").write_text(json.dumps(again))
    assert cli.main(["eval", "--config", str(work / "again.yaml")]) == 0
    repeated = json.loads((work / "again.json").read_text())
    assert repeated["models"] == results["models"]


def test_markdown_has_every_model_and_set(work, everything, capsys):
    lines = (work / "everything.md").read_text().splitlines()
    sets = "held.txt perplexity | held.txt bits/byte | other.txt perplexity | other.txt bits/byte"
    assert lines[0].split() == f"| model | sparsity | of the decoder | in masked layers | {sets} |".split()
    assert [line.split()[1] for line in lines[2:5]] == ["dense", "masks", "packed"]
    assert "0.0%" in lines[2] and "50.0%" in lines[3] and "50.0%" in lines[4]
    assert lines[6].startswith("* held.txt: ") and "text SHA-256" in lines[6]
    status, out, _ = run(
        capsys, "eval", "--model", work / "model", "--data", work / "held.txt", "--max-windows", 1, "--markdown", "-"
    )
    assert status == 0
    assert "| model | sparsity | held.txt perplexity |" in out


@needs_lm_eval
def test_tasks_of_dense_masked_and_packed_models(work, tmp_path, capsys):
    path = tmp_path / "r.json"
    status, out, _ = run(
        capsys,
        *("eval", "--model", work / "model", "--masks", work / "masks", "--compare", work / "packed", "--json", path),
        *("--tasks", "local_plain,local_group", "--task-path", work / "tasks", "--batch-size", 2),
    )
    assert status == 0
    dense, masked, packed = json.loads(path.read_text())["models"]
    assert dense["perplexity"] == {}  # no --data
    assert masked["zero_shot"] == packed["zero_shot"]
    assert masked["zero_shot"]["average"] != dense["zero_shot"]["average"]  # the masks change answers
    model, tokenizer = inputs.load_model(str(work / "model")), build_byte_tokenizer()
    expected = sum(right_answers(model, tokenizer, "local_plain")) / 24
    assert dense["zero_shot"]["tasks"]["local_plain"]["value"] == pytest.approx(expected, rel=1e-12)
    apply_artifact(model, load_artifact(work / "masks"))
    values = [sum(right_answers(model, tokenizer, task)) / size for task, size in lm_eval_tasks.SIZES.items()]
    assert masked["zero_shot"]["tasks"]["local_plain"]["value"] == pytest.approx(values[0], rel=1e-12)
    group = (9 * values[1] + 21 * values[2]) / 30
    assert masked["zero_shot"]["tasks"]["local_group"]["value"] == pytest.approx(group, rel=1e-12)
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert f"{100 * expected:.2f} +- " in rows["local_plain"]
    assert "mean of 2" in out
    assert "acc,none by lm-eval" in rows["zero-shot:"]
    assert "ONLY" not in out


def test_a_registered_set_of_tasks_stands_for_its_tasks(monkeypatch, capsys):
    monkeypatch.setitem(TASK_SETS, "toy", ("piqa", "local_plain"))
    assert expanded(["local_plain", "toy", "race"]) == ["local_plain", "piqa", "race"]
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    assert "sets of them: paper, toy" in " ".join(capsys.readouterr().out.split())


@needs_lm_eval
def test_paper_means_the_eight_tasks(work, monkeypatch, capsys):
    from patch.evaluate import zero_shot

    monkeypatch.setitem(TASK_SETS, "paper", ("local_plain", "local_group"))
    asked = []
    wrap = zero_shot.lm_eval_model
    monkeypatch.setattr(zero_shot, "lm_eval_model", lambda *a, **how: (asked.append(how), wrap(*a, **how))[1])
    flags = ("--tasks", "paper,local_plain", "--task-path", work / "tasks", "--limit", 2, "--no-bos")
    status, out, _ = run(capsys, "eval", "--model", work / "model", *flags)
    assert status == 0
    assert asked == [{"batch_size": 1, "bos": False}]
    assert "mean of 2" in out  # local_plain is in paper already
    assert "ONLY the first 2 questions of each task" in out


EVAL = ["eval", "--model", "{w}/model"]
DATA = [*EVAL, "--data", "{w}/held.txt"]
TASKS = [*EVAL, "--task-path", "{w}/tasks"]
REFUSED = [
    (EVAL, "--data, --tasks: expected at least one of them, got none"),
    ([*DATA, "--task-path", "{w}/tasks"], "--task-path: expected --tasks with it, got none"),
    ([*DATA, "--limit", "3"], "--limit: expected --tasks with it, got none. Name the tasks"),
    ([*DATA, "--no-bos"], "--no-bos: expected --tasks with it, got none. Name the tasks"),
    ([*EVAL, "--tasks", "t", "--window", "32"], "--window: expected --data with it, got none. It is about texts"),
    ([*EVAL, "--tasks", "t", "--max-windows", "3"], "--max-windows: expected --data with it, got none"),
    ([*EVAL, "--tasks", "t", "--split", "test"], "--split: expected --data with it, got none"),
    ([*EVAL, "--tasks", "t", "--text-field", "body"], "--text-field: expected --data with it, got none"),
    ([*EVAL, "--tasks", "t", "--window-bos", "every"], "--window-bos: expected --data with it, got none"),
    ([*DATA, "--window-bos", "all"], "--window-bos: expected one of tokenizer, every, got 'all'"),
    ([*DATA, "--compare", "{w}/masks"], "--compare: expected a transformers model, '{w}/masks' has no config.json"),
    (
        ["eval", "--model", "{w}/no_bos", "--data", "{w}/held.txt", "--window-bos", "every"],
        "--window-bos: expected a tokenizer with a BOS token, got one without. Leave it out",
    ),
    ([*DATA, "--data", "{w}/held.txt"], "data: expected every name once"),
    ([*DATA, "--masks", "{w}/masks,{w}/masks"], "masks: expected every name once"),
    ([*DATA, "--compare", "{w}/packed,{w}/packed"], "compare: expected every name once"),
    ([*DATA, "--json", "{w}/held.txt/r.json"], "--json: expected a folder to write to, {w}/held.txt is none"),
    ([*DATA, "--compare", "{w}/brief", "--window", "65"], "window: expected at most 64 (the context of every model)"),
    ([*DATA, "--masks", "{w}/other_masks"], "other_masks"),
    (["eval", "--model", "{w}/packed", "--data", "{w}/held.txt", "--masks", "{w}/masks"], "expected a dense model"),
    ([*DATA, "--data", "{w}/none.txt"], "--data: expected a file"),
    ([*DATA, "--json", "{w}/held.txt"], "--json: expected a new file, {w}/held.txt exists already"),
    ([*DATA, "--markdown", "{w}/held.txt"], "--markdown: expected a new file, {w}/held.txt exists already"),
    ([*DATA, "--compare", "{w}/foreign"], "--compare: expected models with the tokenizer of {w}/model, {w}/foreign"),
    (
        [*DATA, "--window", "65", "--data", "{w}/short.txt"],
        "short.txt: expected at least one window of 65 tokens, got 5",
    ),
    ([*DATA, "--window", "129"], "window: expected at most 128 (the context of every model), got 129"),
]
REFUSED_TASKS = [
    ([*EVAL, "--tasks", "local_plain", "--task-path", "{w}/absent"], "folder with lm-eval task files, found none"),
    ([*TASKS, "--tasks", "local_plane"], "got 'local_plane'; did you mean local_plain"),
    ([*TASKS, "--tasks", "no_acc"], "task no_acc: expected the metric 'acc'"),
]


def check_refused(work, capsys, monkeypatch, arguments, message):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(inputs, "load_model", load)
    (work / "short.txt").write_text("short")
    status, _, err = run(capsys, *(argument.format(w=work) for argument in arguments))
    assert status == 2
    assert message.format(w=work) in err


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused_before_a_model_is_loaded(work, capsys, monkeypatch, arguments, message):
    check_refused(work, capsys, monkeypatch, arguments, message)


@needs_lm_eval
@pytest.mark.parametrize(("arguments", "message"), REFUSED_TASKS, ids=range(len(REFUSED_TASKS)))
def test_tasks_refused_before_a_model_is_loaded(work, capsys, monkeypatch, arguments, message):
    check_refused(work, capsys, monkeypatch, arguments, message)


def test_tasks_without_lm_eval(work, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    check_refused(work, capsys, monkeypatch, [*EVAL, "--tasks", "piqa"], "run: pip install 'patch-llm[eval]'")


def test_report_of_the_command(work, everything, tmp_path, capsys):
    status, out, _ = run(capsys, "report", everything, "--labels", "Dense,Magnitude,Packed", "--out", tmp_path / "r")
    assert status == 0
    assert "| Magnitude |" in out
    folder = tmp_path / "r"
    assert (folder / "report.md").read_text().startswith("| model ")
    assert (folder / "results.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["Dense", "Magnitude", "Packed"]
    masked = json.loads(everything.read_text())["models"][1]["perplexity"]["held.txt"]
    assert float(rows[1]["held.txt perplexity"]) == masked["perplexity"]  # every digit
    status, _, err = run(capsys, "report", everything, "--out", folder)
    assert status == 2
    assert "exists already (a complete report)" in err
    assert run(capsys, "report", everything, "--out", folder, "--overwrite")[0] == 0


def test_report_refuses(work, everything, tmp_path, capsys):
    other = tmp_path / "other.json"
    flags = ("--data", work / "held.txt", "--window", 32, "--json", other)
    assert run(capsys, "eval", "--model", work / "model", *flags)[0] == 0
    damaged = tmp_path / "damaged.json"
    damaged.write_text(everything.read_text()[:-5])
    for files, message in (
        ([], "expected at least one result file, got none"),
        ([everything, tmp_path / "none.json"], "none.json: expected a result file"),
        ([everything, damaged], "damaged.json: not valid JSON"),
        ([everything, other], f"model ({other}): window of held.txt is 32, for dense ({everything}) it is 64"),
    ):
        status, _, err = run(capsys, "report", *files, "--out", tmp_path / "r")
        assert status == 2
        assert message in err
        assert not (tmp_path / "r").exists()


def test_masks_that_break_a_model_are_said(work, tmp_path, capsys):
    """A copy whose head points the other way is far worse than guessing; exit status 0, but never without a word."""
    model = inputs.load_model(str(work / "model"))
    model.lm_head.weight.data.mul_(-20)
    model.save_pretrained(tmp_path / "broken")
    flags = (
        "--compare",
        tmp_path / "broken",
        "--data",
        work / "held.txt",
        "--window",
        64,
        "--json",
        tmp_path / "r.json",
    )
    status, out, _ = run(capsys, "eval", "--model", work / "model", *flags)
    results = json.loads((tmp_path / "r.json").read_text())
    said = "worse than a uniform guess over 260 tokens: the model or its masks are broken"
    assert status == 0
    assert (
        f"WARNING: broken: perplexity {results['models'][1]['perplexity']['held.txt']['perplexity']:,.0f} is {said}"
        in out
    )
    assert results["models"][1]["perplexity"]["held.txt"]["warning"] == said
    assert [line for line in results["warnings"] if line.startswith("broken, held.txt: ")] == results["warnings"][-1:]
    status, out, _ = run(capsys, "report", tmp_path / "r.json", "--out", tmp_path / "report")
    assert status == 0 and "next:" not in out
    assert f"is {said}" in (tmp_path / "report" / "report.md").read_text()


def test_bos_in_every_window(work, tmp_path, capsys):
    found = {}
    for rule in ("tokenizer", "every"):
        flags = ("--data", work / "held.txt", "--window", 32, "--window-bos", rule, "--json", tmp_path / f"{rule}.json")
        status, out, _ = run(capsys, "eval", "--model", work / "model", *flags)
        assert status == 0
        found[rule] = json.loads((tmp_path / f"{rule}.json").read_text())["models"][0]["perplexity"]["held.txt"]
        assert ("BOS in every window" in out) == (rule == "every")
    assert (found["tokenizer"]["bos"], found["every"]["bos"]) == ("none", "every window")
    assert found["every"]["windows"] == found["every"]["tokens"] // 31
    status, _, err = run(
        capsys, "report", tmp_path / "tokenizer.json", tmp_path / "every.json", "--out", tmp_path / "r"
    )
    assert status == 2 and "cannot be compared" in err


@needs_lm_eval
def test_questions_that_do_not_fit_are_said(work, tmp_path, capsys):
    flags = ("--tasks", "local_plain", "--task-path", work / "tasks", "--json", tmp_path / "r.json")
    status, out, _ = run(capsys, "eval", "--model", work / "short", *flags)
    task = json.loads((tmp_path / "r.json").read_text())["models"][0]["zero_shot"]["tasks"]["local_plain"]
    said = (
        f"local_plain: {task['truncated']} of 24 questions are longer than the context of 23 tokens and lost their beg"
    )
    assert status == 0 and 0 < task["truncated"] < 24
    assert f"WARNING: short, {said}" in out
    assert run(capsys, "report", tmp_path / "r.json", "--out", tmp_path / "report")[0] == 0
    assert f"* **WARNING**: short, {said}" in (tmp_path / "report" / "report.md").read_text()


def test_repeated_flags_add_up(monkeypatch):
    from patch.cli.commands import eval as evaluate

    seen = []
    monkeypatch.setattr(evaluate, "run", seen.append)
    assert cli.main(["eval", "--model", "m", "--data", "a,b", "--data", "c", "--masks", "d"]) == 0
    assert (seen[0].data, seen[0].masks) == (("a", "b", "c"), ("d",))


def test_names_that_are_taken_get_a_number(work, tmp_path, monkeypatch, capsys):
    # Masks in a folder "dense" once took the row of the dense model, a second held.txt that of the first.
    monkeypatch.chdir(tmp_path)
    Path("dense").symlink_to(work / "masks")
    Path("sub").mkdir()
    Path("sub/held.txt").write_text((work / "other.txt").read_text())
    Path("held.txt").write_text((work / "held.txt").read_text())
    command = f"eval --model {work}/model --masks dense --data sub/held.txt,held.txt --window 64 --json r.json"
    status, out, _ = run(capsys, *command.split())
    assert status == 0
    models = json.loads(Path("r.json").read_text())["models"]
    assert [model["label"] for model in models] == ["dense", "dense (2)"]
    assert [list(model["perplexity"]) for model in models] == [["held.txt", "held.txt (2)"]] * 2
    for model in models:
        for report in model["perplexity"].values():
            assert f"{report['perplexity']:.4f}" in out


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("the second model failed")])
def test_finished_models_are_written_when_a_later_one_fails(work, tmp_path, capsys, monkeypatch, error):
    from patch.evaluate import protocol

    measure, calls = protocol.perplexity_report, []

    def once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return measure(*args, **kwargs)

    monkeypatch.setattr(protocol, "perplexity_report", once)
    flags = ["--model", work / "model", "--masks", work / "masks", "--data", work / "held.txt", "--window", 32]
    status = cli.main([str(part) for part in ["eval", *flags, "--json", tmp_path / "results.json"]])
    said = capsys.readouterr()
    assert [model["label"] for model in json.loads((tmp_path / "results.json").read_text())["models"]] == ["dense"]
    assert "perplexity" in said.out
    if isinstance(error, KeyboardInterrupt):
        assert status == 130 and "models that were finished are printed and in the files" in said.err
    else:
        assert status == 2 and "the second model failed" in said.err
