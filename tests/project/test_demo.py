"""The demo in a miniature: the corpus, its stages, resuming, and what it reports."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from support.demo import TINY, write_sources

from patch.demo import corpus as corpus_module
from patch.demo import model as demo_model
from patch.demo import run as demo_run
from patch.demo.settings import DemoSettings
from patch.settings import load_config

SETTINGS = load_config(DemoSettings, overrides=TINY)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory):
    """(folder, rows, printed lines) of one finished miniature demo."""
    out, lines = tmp_path_factory.mktemp("demo"), []
    rows = demo_run.run_demo(out, SETTINGS, text=sources, echo=lines.append)
    return out, rows, lines


def test_standard_library_is_split_by_file():
    corpus = corpus_module.load_corpus(max_characters=60_000)
    parts = [set(documents) for _, documents in corpus.parts()]
    assert all(parts)
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert corpus.sha256 == corpus_module.load_corpus(max_characters=60_000).sha256


def test_tests_and_installed_packages_are_left_out(tmp_path):
    write_sources(tmp_path)
    kept = corpus_module.stdlib_files(tmp_path)
    for name in ("test", "site-packages", "config-3.11-x86"):
        write_sources(tmp_path / name, 2)
    (tmp_path / "tiny.py").write_text("x = 1")
    assert corpus_module.stdlib_files(tmp_path) == kept
    names = [path.relative_to(tmp_path).as_posix() for path in kept]
    assert names == sorted(names)
    assert len(names) == 48


def test_folders_without_enough_text_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected Python sources .* found none"):
        corpus_module.load_corpus(tmp_path)
    write_sources(tmp_path, 1)
    with pytest.raises(ValueError, match="at least one file in each of the parts"):
        corpus_module.load_corpus(tmp_path)


def test_batches_visit_every_block_once_per_pass():
    batches = demo_model.shuffled_batches(6, 2, seed=0)
    passes = [torch.cat([next(batches) for _ in range(3)]) for _ in range(2)]
    assert all(sorted(order.tolist()) == list(range(6)) for order in passes)
    assert passes[0].tolist() != passes[1].tolist()
    with pytest.raises(ValueError, match="blocks of text: expected at least batch_size = 8, got 6"):
        next(demo_model.shuffled_batches(6, 8, seed=0))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_training_lowers_the_loss_and_is_deterministic(architecture):
    blocks = torch.arange(64).remainder(7).view(8, 8)
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "layers": 1, "heads": 2}
    finals = []
    for _ in range(2):
        model = demo_model.build_model(**sizes, seed=0, architecture=architecture)
        assert model.config.model_type == architecture
        losses = demo_model.train_dense(model, blocks, steps=12, batch_size=4, matrix_lr=0.01, vector_lr=0.01, seed=0)
        finals.append(losses)
    assert finals[0] == finals[1]
    assert finals[0][-1] < 0.8 * finals[0][0]


def test_a_loss_that_is_not_finite_stops_training():
    model = demo_model.build_model(vocab_size=16, hidden_size=32, intermediate_size=32, layers=1, heads=2, seed=0)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="expected a finite loss, got nan in step 0"):
        demo_model.train_dense(
            model,
            torch.ones(4, 8, dtype=torch.long),
            steps=2,
            batch_size=2,
            matrix_lr=1.0,
            vector_lr=1.0,
            seed=0,
        )


def test_tokenizer_round_trips_text():
    tokenizer = demo_model.train_tokenizer(["def f(x):\n\treturn x\n" * 50], 280)
    text = "def g(\u00e9):\n\treturn '\u4e2d'  "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 280


def test_table_holds_every_method_with_true_sparsity_and_bytes(finished):
    out, rows, lines = finished
    assert [row["method"] for row in rows] == [
        "dense",
        "magnitude 2:4",
        "Wanda 2:4",
        "SparseGPT 2:4",
        "MaskLLM 2:4",
        "PATCH joint 35%",
    ]
    elems = 4 * 64 * 64 + 3 * 64 * 96
    assert {row["dense_linear_bytes"] for row in rows} == {2 * elems}
    assert [row["sparsity"] for row in rows[:5]] == [0.0, 0.5, 0.5, 0.5, 0.5]
    assert 0 <= rows[5]["sparsity"] <= 0.5
    # Layers smaller than a 128x128 tile are padded in the packed format, so these are larger than dense.
    assert rows[1]["linear_bytes"] == 7 * 18432
    assert [row["tokens_seen"] for row in rows] == [0, 0, 4 * 32, 4 * 32, 7 * 2 * 32, 7 * 2 * 32]
    with open(out / "results.csv", newline="") as file:
        stored = list(csv.DictReader(file))
    assert [float(row["perplexity"]) for row in stored] == [row["perplexity"] for row in rows]
    assert [row["compensated"] == "" for row in rows] == [True, *[False] * 5]
    said = [float(line.split("compensated: ")[1].split(",")[0]) for line in lines if "  compensated: " in line]
    assert said == [round(row["compensated"], 2) for row in rows[1:]]
    text = "\n".join(lines)
    assert "method" in text and "SparseGPT 2:4" in text
    assert "no comparison at equal cost" in text
    assert "logits equal" in text
    assert (out / "perplexity.png").stat().st_size > 5000
    assert (out / "tiles.png").stat().st_size > 2000


def test_a_mask_that_compensation_made_worse_is_named():
    assert demo_run._compared(10.0, 9.5) == "compensated: 9.50"
    assert demo_run._compared(10.0, 10.5) == "compensated: 10.50, WORSE than without"


def test_a_perplexity_that_exploded_is_said(finished):
    lines: list[str] = []
    demo = demo_run.Demo.__new__(demo_run.Demo)
    demo.rows, demo.tokenizer, demo.say = [], range(300), lines.append
    result = {"perplexity": 290.0, "compensated": 17000.0, "sparsity": 0.5, "packed_bytes": 1, "dense_bytes": 2}
    demo.row("Wanda 2:4", result, 0.5, 0)
    said = "worse than a uniform guess over 300 tokens: the model or its masks are broken"
    assert lines[-1] == f"  WARNING: Wanda 2:4: perplexity 17,000 is {said}"
    demo.row("dense", result | {"compensated": None}, None, 0)
    assert len(lines) == 4 and "WARNING" not in lines[-1]


def test_the_plan_comes_first_and_texts_are_left_for_other_commands(finished):
    out, _, lines = finished
    assert "plan: train a model for" in lines[1] and "learn 2 masks for" in lines[1]
    assert any("step 1/" in line and "left of" in line for line in lines)
    assert all((out / name).stat().st_size > 0 for name in ("text.txt", "heldout.txt"))


def test_folders_of_something_else_are_refused(sources, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--out: expected a new folder .* holds other files \(config.json\)"):
        demo_run.run_demo(tmp_path, SETTINGS, text=sources)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_second_run_reuses_every_stage(finished, sources):
    out, rows, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/stage.json")}
    lines = []
    again = demo_run.run_demo(out, SETTINGS, text=sources, echo=lines.append)
    assert again == rows
    assert sum("done before, reused" in line for line in lines) == 7
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/stage.json")}


def test_an_interrupt_loses_no_finished_stage(finished, sources, tmp_path, monkeypatch):
    _, rows, _ = finished
    with monkeypatch.context() as patched:

        def interrupt(*arguments, **keywords):
            raise KeyboardInterrupt

        patched.setattr(demo_run, "learn", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo_run.run_demo(tmp_path, SETTINGS, text=sources, echo=lambda line: None)
    lines = []
    assert demo_run.run_demo(tmp_path, SETTINGS, text=sources, echo=lines.append) == rows
    assert sum("done before, reused" in line for line in lines) == 5
    assert sorted(path.name for path in tmp_path.iterdir() if ".tmp-" in path.name) == []


def test_changed_settings_and_damage_are_noticed(finished, sources, tmp_path):
    import dataclasses
    import shutil

    out, _, _ = finished
    shutil.copytree(out, tmp_path / "d")
    lines = []
    learn = dataclasses.replace(SETTINGS.learn, steps=3)
    demo_run.run_demo(tmp_path / "d", dataclasses.replace(SETTINGS, learn=learn), text=sources, echo=lines.append)
    assert sum("done before, reused" in line for line in lines) == 5
    assert any("patch-35: running" in line for line in lines)
    stage = json.loads((out / "wanda" / "stage.json").read_text())
    (tmp_path / "d" / "wanda" / "stage.json").write_text(json.dumps(stage).replace("5", "6"))
    lines = []
    demo_run.run_demo(tmp_path / "d", dataclasses.replace(SETTINGS, learn=learn), text=sources, echo=lines.append)
    assert any("wanda: running" in line for line in lines)


def test_too_many_calibration_blocks_are_refused(sources, tmp_path):
    import dataclasses

    settings = dataclasses.replace(SETTINGS, calibration_blocks=10**6)
    with pytest.raises(ValueError, match="'learn': expected at least calibration_blocks = 1000000, got"):
        demo_run.run_demo(tmp_path, settings, text=sources, echo=lambda line: None)
