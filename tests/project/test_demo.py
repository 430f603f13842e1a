"""The demo in a miniature: the corpus, its stages, resuming, and what it reports."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil

import pytest
import torch
from support.demo import TINY, write_sources

from patch.artifacts.artifact import load_artifact
from patch.demo import corpus as corpus_module
from patch.demo import methods, packing, report
from patch.demo import model as demo_model
from patch.demo import run as demo_run
from patch.demo.settings import DemoSettings
from patch.models.mixtures import open_mixtures, opened
from patch.packed.load import load
from patch.packed.swap import packed_layers
from patch.settings import load_config

SETTINGS = load_config(DemoSettings, overrides=TINY)
SHORT = ["dense", "magnitude 2:4", "Wanda 2:4", "SparseGPT 2:4", "hybrid 35%", "PATCH joint 35%"]
ALL = [*SHORT[:5], "hybrid 25%", "MaskLLM 2:4", "PATCH joint 35%", "PATCH joint 25%"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory):
    """(folder, rows, printed lines) of one finished miniature demo with all rows."""
    out, lines = tmp_path_factory.mktemp("demo"), []
    rows = demo_run.run_demo(out, SETTINGS, text=sources, everything=True, echo=lines.append)
    return out, rows, lines


def reused(lines):
    return sum("done before, reused" in line for line in lines)


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


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mixtral"])
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


def test_a_mixture_trains_all_experts_and_its_loss_has_the_balance_of_the_router():
    blocks = torch.arange(64).remainder(7).view(8, 8)
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 24, "layers": 1, "heads": 2, "experts": 3}
    model, fresh = (demo_model.build_model(**sizes, seed=0, architecture="mixtral") for _ in range(2))
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (3, 48, 32)
    (first, *_) = demo_model.train_dense(model, blocks, steps=4, batch_size=8, matrix_lr=0.01, vector_lr=0.01, seed=0)
    open_mixtures(fresh)
    batch = blocks[next(demo_model.shuffled_batches(8, 8, seed=0))]
    with torch.no_grad():
        plain = fresh(input_ids=batch, labels=batch).loss
        full = fresh(input_ids=batch, labels=batch, output_router_logits=True)
    assert first == full.loss.item()
    # As even as it gets, transformers' balance is the experts of a token, 2.
    assert full.loss == plain + 0.01 * full.aux_loss and full.aux_loss >= 2
    assert not list(opened(model))
    before, after = fresh.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    for name, weight in after.items():
        changed = (weight != before[name]).flatten(1 if "experts" in name else 0).any(-1)
        assert changed.all(), name


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
    assert [row["method"] for row in rows] == ALL
    elems = 4 * 64 * 64 + 3 * 64 * 96
    assert {row["dense_linear_bytes"] for row in rows} == {2 * elems}
    # A 32x32 tile less is 512 zeros: 24 of 34 and 17 of 34 tiles are sparse.
    shares = {"35%": round(24 * 512 / elems, 6), "25%": 17 * 512 / elems, "2:4": 0.5, "dense": 0.0}
    assert [row["sparsity"] for row in rows] == [shares[row["method"].split()[-1]] for row in rows]
    # Layers smaller than a 128x128 tile are padded in the packed format, so these are larger than dense.
    assert rows[1]["linear_bytes"] == 7 * 18432
    assert [row["tokens_seen"] for row in rows] == [0, 0, *[4 * 32] * 4, *[7 * 2 * 32] * 3]
    with open(out / "results.csv", newline="") as file:
        stored = list(csv.DictReader(file))
    assert [float(row["perplexity"]) for row in stored] == [row["perplexity"] for row in rows]
    assert [row["reconstructed"] == "" for row in rows] == [True, *[False] * 8]
    said = [float(line.split("reconstructed: ")[1].split(",")[0]) for line in lines if "  reconstructed: " in line]
    assert said == [round(row["reconstructed"], 2) for row in rows[1:]]
    text = "\n".join(lines)
    assert "method" in text and "SparseGPT 2:4" in text
    assert "no comparison at equal cost" in text
    assert "one pass over\n4 calibration windows (`patch-llm compensate`)" in text
    assert (out / "perplexity.png").stat().st_size > 5000
    assert (out / "tiles.png").stat().st_size > 2000


def test_the_reconstructed_hybrid_is_packed_and_timed(finished):
    out, rows, lines = finished
    hybrid, rebuilt = (load_artifact(out / name) for name in ("hybrid-35", "hybrid-35-reconstructed"))
    assert all(torch.equal(keep, rebuilt.masks[name]) for name, keep in hybrid.masks.items())
    assert hybrid.tile_scores and hybrid.tile_is_sparse and hybrid.meta["pattern"] == "tiles"
    pruned = load(out / "pruned")
    for name, weight in rebuilt.weights.items():
        assert torch.equal(pruned.get_submodule(name).weight, weight.bfloat16())
        assert not weight[~hybrid.masks[name]].any()
    packed = load(out / "packed")
    held = sum(layer.payload.numel() for _, layer in packed_layers(packed))
    assert held == rows[4]["linear_bytes"]
    assert any(f"packed hybrid 35%, reconstructed ({held:,} bytes of weights)" in line for line in lines)
    assert any(line.endswith("saved, reloaded: logits equal") for line in lines)
    (table,) = (line for line in lines if "tokens/s" in line)
    dense, hybrid_line = (re.split(r"  +", line.strip()) for line in table.strip().splitlines()[2:])
    assert dense[:2] == ["dense", f"{rows[0]['perplexity']:.2f}"]
    assert hybrid_line[:3] == ["hybrid 35%, reconstructed, packed", f"{rows[4]['reconstructed']:.2f}", f"{held:,}"]
    assert all(int(line[-1]) > 0 for line in (dense, hybrid_line))
    assert any(line.startswith(f"\nThe packed model continues {packing.PROMPT!r}:") for line in lines)


def test_a_saved_model_with_other_logits_is_an_error(finished, sources, tmp_path, monkeypatch):
    out, _, _ = finished
    shutil.copytree(out, tmp_path / "d")
    model = load(out / "packed")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    monkeypatch.setattr(packing, "load", lambda folder: model)
    with pytest.raises(RuntimeError, match=r"expected the logits of the saved model, they differ by up to \d"):
        demo_run.run_demo(tmp_path / "d", SETTINGS, text=sources, echo=lambda line: None)


def test_the_short_demo_is_a_part_of_the_whole_one(finished, sources, tmp_path):
    out, rows, _ = finished
    shutil.copytree(out, tmp_path / "d")
    lines: list[str] = []
    short = demo_run.run_demo(tmp_path / "d", SETTINGS, text=sources, echo=lines.append)
    assert short == [row for row in rows if row["method"] in SHORT]
    assert reused(lines) == 2 + 2 * 5 and not any("running" in line for line in lines)
    assert "to a hybrid with 35% zeros, learn 1 mask for 7 steps (448 tokens)" in lines[1]


def test_learning_starts_from_the_hybrid():
    joint, maskllm = (SETTINGS.learn.config(mode, 0.5, (32, 32), 0) for mode in ("joint", "maskllm"))
    assert joint.tile_prior_budget == "model" and joint.exact_budget
    assert not maskllm.exact_budget


def test_a_mask_that_reconstruction_made_worse_is_named():
    def said(reconstructed):
        return report.row_lines(report.table_row("hybrid 45%", RESULT, 0.5, 0, reconstructed), 300)

    assert said(9.5) == ["hybrid 45%: perplexity 10.00, sparsity 50.0%", "reconstructed: 9.50"]
    assert said(10.5)[1:] == ["reconstructed: 10.50, WORSE than without"]


def test_a_perplexity_that_exploded_is_said():
    broken = "worse than a uniform guess over 300 tokens: the model or its masks are broken"
    lines = report.row_lines(report.table_row("Wanda 2:4", RESULT, 0.5, 0, 17000.0), 300)
    assert lines[-1] == f"WARNING: Wanda 2:4: perplexity 17,000 is {broken}"
    assert len(report.row_lines(report.table_row("dense", RESULT, 0.0, 0, None), 300)) == 1


RESULT = {"perplexity": 10.0, "sparsity": 0.5, "packed_bytes": 1, "dense_bytes": 2}


def test_the_plan_comes_first_and_texts_are_left_for_other_commands(finished):
    out, _, lines = finished
    assert "plan: train a model for 4 steps (256 tokens), prune it to 2:4 by 3 methods and to hybrids" in lines[1]
    assert "to hybrids with 35%, 25% zeros, learn 3 masks for 7 steps each (448 tokens)" in lines[1]
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
    again = demo_run.run_demo(out, SETTINGS, text=sources, everything=True, echo=lines.append)
    assert again == rows
    assert reused(lines) == 2 + 2 * 8
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/stage.json")}


def test_an_interrupt_loses_no_finished_stage(finished, sources, tmp_path, monkeypatch):
    _, rows, _ = finished
    with monkeypatch.context() as patched:

        def interrupt(*arguments, **keywords):
            raise KeyboardInterrupt

        patched.setattr(methods, "learn", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo_run.run_demo(tmp_path, SETTINGS, text=sources, echo=lambda line: None)
    lines: list[str] = []
    again = demo_run.run_demo(tmp_path, SETTINGS, text=sources, echo=lines.append)
    assert again == [row for row in rows if row["method"] in SHORT]
    assert reused(lines) == 2 + 2 * 4
    assert sorted(path.name for path in tmp_path.iterdir() if ".tmp-" in path.name) == []


def test_changed_settings_and_damage_are_noticed(finished, sources, tmp_path):
    out, _, _ = finished
    shutil.copytree(out, tmp_path / "d")
    learn = dataclasses.replace(SETTINGS.learn, steps=3)
    changed = dataclasses.replace(SETTINGS, learn=learn)

    def again(settings):
        lines: list[str] = []
        demo_run.run_demo(tmp_path / "d", settings, text=sources, echo=lines.append)
        return [line.split("] ")[1].removesuffix(": running") for line in lines if line.endswith(": running")]

    assert again(changed) == ["patch-35", "patch-35-reconstructed"]
    stage = json.loads((out / "wanda" / "stage.json").read_text())
    (tmp_path / "d" / "wanda" / "stage.json").write_text(json.dumps(stage).replace("5", "6"))
    assert again(changed) == ["wanda"]
    blocks = dataclasses.replace(SETTINGS.blocks, lr=0.01)
    names = ["magnitude", "wanda", "sparsegpt", "hybrid-35", "patch-35"]
    assert again(dataclasses.replace(changed, blocks=blocks)) == [f"{name}-reconstructed" for name in names]


def test_stages_of_an_older_version_are_reused_or_made_again(finished, sources, tmp_path):
    """One that compensated by least squares inside its stages, and learned from the SparseGPT masks."""
    out, rows, _ = finished
    for name in ("dense", "baseline", "magnitude", "wanda", "sparsegpt", "patch-35"):
        shutil.copytree(out / name, tmp_path / name)
    stage = json.loads((tmp_path / "patch-35" / "stage.json").read_text())
    (tmp_path / "patch-35" / "stage.json").write_text(json.dumps(stage | {"key": "older"}))
    lines: list[str] = []
    again = demo_run.run_demo(tmp_path, SETTINGS, text=sources, echo=lines.append)
    assert again == [row for row in rows if row["method"] in SHORT]
    assert reused(lines) == 5


def test_too_many_calibration_blocks_are_refused(sources, tmp_path):
    settings = dataclasses.replace(SETTINGS, calibration_blocks=10**6)
    with pytest.raises(ValueError, match="'learn': expected at least calibration_blocks = 1000000, got"):
        demo_run.run_demo(tmp_path, settings, text=sources, echo=lambda line: None)
