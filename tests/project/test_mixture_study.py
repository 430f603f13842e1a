"""The study of a mixture in a miniature: its cells, what experts get, and what its tables say."""

from __future__ import annotations

import json

import pytest
import torch
from support.demo import TINY, write_sources

from benchmarks.studies import mixture, mixture_model, mixture_report, quality_inputs
from patch.artifacts.artifact import load_artifact
from patch.demo import corpus as corpus_module
from patch.demo.settings import DemoSettings
from patch.models.structure import maskable_linears
from patch.packed.load import load
from patch.pruning import ExpertOptions, prune_model
from patch.settings import load_config

MIXTURE = "model.layers.0.mlp.experts"
METHODS = ["dense", "sparsegpt", "wanda", "magnitude", "sparsegpt-attention"]
METHODS += ["sparsegpt-tiles-25", "sparsegpt-25", "joint-25-fisher-distill"]
BUDGETS = [f"sparsegpt-tiles-25-{budget}-tile32" for budget in mixture.BUDGETS]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folder with a tiny mixture, trained as the study's, and two texts."""
    folder = tmp_path_factory.mktemp("mixture-inputs")
    lines = [f"Line {i}: the {'quick' if i % 3 else 'slow'} fox {i * i} jumps." for i in range(400)]
    (folder / "train.txt").write_text("\n".join(lines[:300]))
    (folder / "held.txt").write_text("\n".join(lines[300:]))
    sizes = {"layers": 1, "hidden-size": 64, "intermediate-size": 64, "vocab-size": 270, "steps": 3}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    mixture_model.main(["--text", str(folder / "train.txt"), "--out", str(folder / "model"), *flags])
    return folder


def arguments(inputs, out, *extra):
    flags = {
        "--model": inputs / "model",
        "--train": inputs / "train.txt",
        "--heldout": inputs / "held.txt",
        "--out": out,
        "--window": 32,
        "--heldout-windows": 4,
        "--nsamples": 4,
        "--reconstruction-samples": 4,
        "--block-epochs": 1,
        "--steps": 2,
        "--batch-size": 2,
        "--tile": 32,
        "--targets": 0.25,
        "--draws": "0,1",
        "--few-samples": 2,
        "--few-tokens": "1,1000",
    }
    return [str(part) for pair in flags.items() for part in pair] + [str(part) for part in extra]


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory):
    """(folder, results) of a finished study."""
    out = tmp_path_factory.mktemp("mixture")
    return out, mixture.main(arguments(inputs, out))


def masks_of(out, cell, seed=0):
    return load_artifact(out / "cells" / f"{cell}-seed{seed}").masks


def test_every_table_has_its_cells(done, inputs, capsys):
    out, results = done
    assert [row["cell"] for row in results["methods"]] == METHODS
    assert [row["cell"] for row in results["budgets"]] == BUDGETS
    few = [(r["method"], r["few"], r["least"], r["seed"]) for r in results["few"]]
    assert few == [
        (method, rule, least, seed)
        for method in mixture.FEW_METHODS
        for rule in mixture.RULES
        for least in (1, 1000)
        for seed in (0, 1)
    ]
    for row in [*results["methods"][1:], *results["budgets"]]:
        assert min(row[name] for name in mixture_report.PERPLEXITIES if name in row) > 1, row
        assert {"compensated_least_squares", "compensated_blocks"} <= row.keys()
    assert json.loads((out / "mixture.json").read_text())["few"] == results["few"]
    mixture.main(arguments(inputs, out))  # again: nothing is made
    assert "running" not in capsys.readouterr().out


def test_attention_alone_is_two_of_four_beside_whole_experts(done):
    out, results = done
    masks = masks_of(out, "sparsegpt-attention")
    experts = [name for name in masks if name.startswith(MIXTURE)]
    assert len(masks) == 4 + 8 * 3 and len(experts) == 8 * 3
    for name, keep in masks.items():
        kept = keep.reshape(-1, 4).sum(1)
        assert (kept == (4 if name in experts else 2)).all(), name
    (row,) = (row for row in results["methods"] if row["cell"] == "sparsegpt-attention")
    assert row["sparsity"] == 2 * 64 * 64 / (28 * 64 * 64)


def test_tokens_of_experts_are_those_that_the_router_sends(inputs):
    model = load(inputs / "model", dtype=torch.float32).eval()
    windows = torch.randint(3, 200, (3, 16), generator=torch.Generator().manual_seed(0))
    router = model.model.layers[0].mlp.gate
    sent = torch.zeros(8, dtype=torch.int64)

    def see(module, args, output):
        sent.add_(output[2].reshape(-1).bincount(minlength=8))

    hook = router.register_forward_hook(see)
    counts = mixture.expert_tokens(model, windows)
    hook.remove()
    assert counts == {(MIXTURE, index): int(count) for index, count in enumerate(sent)}
    assert sum(counts.values()) == 2 * windows.numel()
    assert not any(layer._forward_pre_hooks for layer in maskable_linears(model).values())


def test_zeros_of_experts_are_those_of_the_masks(done):
    out, results = done
    assert [(row["mixture"], row["expert"]) for row in results["experts"]] == [(MIXTURE, i) for i in range(8)]
    assert sum(row["tokens"] for row in results["experts"]) == 2 * 4 * 32
    assert [row["share"] for row in results["experts"]] == [row["tokens"] / 256 for row in results["experts"]]
    for cell, budget in zip(BUDGETS, mixture.BUDGETS, strict=True):
        masks = masks_of(out, cell)
        for row in results["experts"]:
            own = [keep for name, keep in masks.items() if name.startswith(f"{MIXTURE}.{row['expert']}.")]
            assert len(own) == 3
            pruned = sum(int((~keep).sum()) for keep in own)
            assert row[f"budget {budget}"] == pytest.approx(pruned / (3 * 64 * 64), abs=1e-12)
    # Two of the four tiles of every layer: one tile is an eighth of the zeros.
    assert {row["budget layer"] for row in results["experts"]} == {0.25}


def test_few_tokens_follow_the_rule(done, inputs):
    out, _ = done
    by_magnitude = masks_of(out, "magnitude")
    for method in ("wanda", "sparsegpt"):
        few, own = masks_of(out, f"few-{method}-2-magnitude-1000"), masks_of(out, f"few-{method}-2-magnitude-1")
        experts = [name for name in few if name.startswith(MIXTURE)]
        assert all(torch.equal(few[name], by_magnitude[name]) for name in experts)
        assert any(not torch.equal(own[name], by_magnitude[name]) for name in experts)
    model = load(inputs / "model", dtype=torch.float32).eval()
    _, settings, study = opened_study(inputs, out)
    options = ExpertOptions(1000, "route")
    expected = prune_model(model, "wanda", calibration=study.calibration(1, 2), experts=options, progress=False)
    got = masks_of(out, "few-wanda-2-route-1000", seed=1)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert settings.nsamples == 4
    kept = masks_of(out, "few-least_squares-2-magnitude-1")
    assert all(torch.equal(kept[name], by_magnitude[name]) for name in by_magnitude)


def test_experts_below_a_number_of_tokens_are_counted_by_draw(done, inputs):
    out, results = done
    _, _, study = opened_study(inputs, out)
    tokens = [mixture.expert_tokens(study.dense(), study.calibration(seed, 2)) for seed in (0, 1)]
    assert results["few_counts"] == [
        {"samples": 2, "least": 1, "experts": [list(draw.values()).count(0) for draw in tokens]},
        {"samples": 2, "least": 1000, "experts": [8, 8]},
    ]


def opened_study(inputs, out):
    parsed = mixture._parser().parse_args(arguments(inputs, out))
    given = mixture.study_inputs(parsed, print)
    settings = mixture.study_settings(parsed, given[0], targets=parsed.targets)
    return given, settings, mixture.open_study(parsed, given, settings, say=print)


def test_correlation_is_of_the_two_columns():
    assert mixture_report.correlation([0.1, 0.2, 0.3], [0.5, 0.4, 0.3]) == pytest.approx(-1.0, abs=1e-12)
    assert mixture_report.correlation([0.1, 0.2, 0.3], [0.5, 0.5, 0.5]) is None


def test_the_best_number_of_tokens_is_bold_and_draws_are_averaged():
    def row(least, seed, perplexity):
        shared = {"method": "least_squares", "samples": 4, "few": "route"}
        return shared | {"least": least, "seed": seed, "perplexity": perplexity}

    rows = [row(1, 0, 10.0), row(1, 1, 12.0), row(16, 0, 10.0), row(16, 1, 10.5)]
    counts = [{"samples": 4, "least": 1, "experts": [0, 1]}, {"samples": 4, "least": 16, "experts": [2, 3]}]
    rows.append(row(16, 0, 9.0) | {"method": "wanda"})
    assert mixture_report.few_rows(rows, counts) == [
        {"method": "experts below", "samples": "4", "rule": "-", "1": "0/1", "16": "2/3"},
        {"method": "least squares", "samples": "4", "rule": "route", "1": "11.00", "16": "**10.25**"},
        {"method": "wanda", "samples": "4", "rule": "route", "1": "-", "16": "9.00"},
    ]


def test_tables_say_what_was_measured(done):
    out, results = done
    text = (out / "mixture.md").read_text()
    idle = sum(row["share"] < 0.01 for row in results["experts"])
    for title in (
        f"{idle} of 8 experts get\nless",
        "## Methods",
        "## Budgets",
        "## Experts with few tokens",
        "| budget",
        "mean over draws",
    ):
        assert title in text
    (row,) = (row for row in results["methods"] if row["cell"] == "sparsegpt-attention")
    (line,) = (line for line in text.splitlines() if "SparseGPT 2:4, attention only" in line)
    numbers = [f"{row['sparsity']:.1%}", *(f"{row[name]:.2f}" for name in mixture_report.PERPLEXITIES if name in row)]
    assert [cell.strip() for cell in line.split("|")][2:7] == numbers


def test_nothing_finished_and_unknown_cells_are_said(inputs, tmp_path):
    with pytest.raises(SystemExit, match=r"mixture: expected finished cells in .*none, found none\. Leave out --fin"):
        mixture.main(arguments(inputs, tmp_path / "none", "--finished-only"))
    with pytest.raises(SystemExit, match=r"mixture: --cells: expected names or patterns of cells, got 'joint-99'"):
        mixture.main(arguments(inputs, tmp_path, "--cells", "joint-99"))


def test_without_a_model_it_is_a_mixture_trained_on_the_demos_text(monkeypatch, tmp_path):
    write_sources(tmp_path / "sources")
    corpus = corpus_module.load_corpus(tmp_path / "sources")
    monkeypatch.setattr(corpus_module, "load_corpus", lambda: corpus)
    monkeypatch.setattr(quality_inputs, "DemoSettings", lambda: load_config(DemoSettings, overrides=TINY))
    flags = ["--window", "32", "--nsamples", "2", "--heldout-windows", "2", "--reconstruction-samples", "4"]
    results = mixture.main(["--out", str(tmp_path / "out"), "--cells", "wanda", "--block-epochs", "1", *flags])
    assert [row["cell"] for row in results["methods"]] == ["wanda"]
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"], config["intermediate_size"]) == ("mixtral", 8, 256)


def test_the_model_says_how_it_was_trained(inputs, tmp_path):
    about = json.loads((inputs / "model" / "training.json").read_text())
    assert about["settings"]["steps"] == 3 and about["settings"]["architecture"] == "mixtral"
    assert about["tokens"] == 3 * about["settings"]["batch_size"] * about["settings"]["block_size"]
    with pytest.raises(SystemExit, match=r"--text: expected a text file, got .*none\.txt\. Give a \.txt"):
        mixture_model.main(["--text", str(tmp_path / "none.txt"), "--out", str(tmp_path)])


def test_pieces_end_at_lines_and_are_the_whole_text(monkeypatch):
    monkeypatch.setattr(mixture_model, "_DOCUMENT", 5)
    text = "one\ntwo three\nfour\nfive six\nseven"
    assert mixture_model.pieces(text) == ["one\ntwo three\n", "four\nfive six\n", "seven"]
