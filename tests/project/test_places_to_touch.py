"""What docs/inside says about adding a pruning method and a set of tasks, followed with toys."""

from __future__ import annotations

import re
import sys
import types

import pytest
from support import ROOT
from support.commands import run, text

from benchmarks.studies import quality
from patch import cli
from patch.artifacts.artifact import load_artifact
from patch.pruning import METHODS, prune_model, prune_weight
from patch.pruning.magnitude import prune as by_magnitude
from patch.pruning.registry import Method
from patch.utils import prepare_pruned_model
from patch_kernels import tiles_that_are_two_of_four


@pytest.fixture
def toy(monkeypatch):
    """A method that keeps the small weights, as add_a_method.md asks for: a module and a row."""

    def prune(weight, statistics, options, stays=None):
        return by_magnitude(1 / weight, statistics, options, stays)

    module = types.ModuleType("toy_method", "Keeps the small weights.")
    module.prune = prune
    module.costs = lambda weight, statistics, options: 1 / weight.detach().abs()
    monkeypatch.setitem(sys.modules, "toy_method", module)
    monkeypatch.setitem(METHODS, "toy", Method("Toy", "toy_method"))


def small_ones_kept(weight, masks):
    kept = weight.abs()[masks]
    return kept.numel() and kept.mean() < weight.abs()[~masks].mean()


@pytest.mark.usefixtures("toy")
def test_a_registered_method_prunes_a_weight_and_a_model(tiny_model):
    model = tiny_model("llama")
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    weight = dense["model.layers.0.mlp.up_proj.weight"]
    pruned = prune_weight(weight, "toy", pattern="2:4", sparsity=0.5)
    assert small_ones_kept(weight, pruned.keep)
    tiles = prune_weight(weight, "toy", pattern="tiles", sparsity=0.25, tile=(32, 32))
    assert int(tiles.keep.sum()) == 0.75 * weight.numel()
    masks = prune_model(model, "toy", pattern="2:4", sparsity=0.5, progress=False)
    for name, keep in masks.items():
        assert tiles_that_are_two_of_four(keep).all() and small_ones_kept(dense[f"{name}.weight"], keep)


@pytest.mark.usefixtures("toy")
def test_a_registered_method_is_a_choice_of_the_command(tiny_model, tokenizer, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["prune", "--help"])
    assert "thanos, prox_sparse, toy" in " ".join(capsys.readouterr().out.split())
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    status, _, err = run(
        capsys, "prune", "--model", tmp_path / "model", "--method", "toy", "--out", tmp_path / "pruned"
    )
    assert status == 0, err
    artifact = load_artifact(tmp_path / "pruned")
    assert artifact.meta["method"] == "toy" and len(artifact.masks) == 14
    status, _, err = run(capsys, "prune", "--model", tmp_path / "model", "--method", "toi", "--out", tmp_path / "other")
    assert status == 2 and "prox_sparse, toy, got 'toi'. Did you mean 'toy'?" in err


@pytest.mark.usefixtures("toy")
def test_a_registered_method_is_known_to_the_published_function(tiny_model, tokenizer, tmp_path):
    arguments = {"prune_method": "toy", "calibration_dataset": "c4"}
    model = prepare_pruned_model(tiny_model("llama"), tokenizer, tmp_path / "toy", arguments, (32, 32), 0.45)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.distribution_scores.shape == (6, 4)


@pytest.mark.usefixtures("toy")
def test_a_registered_method_has_cells_in_the_study(tiny_model, tokenizer, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name in ("train", "held"):
        (tmp_path / f"{name}.txt").write_text(text(200))
    flags = {
        "--model": tmp_path / "model",
        "--train": tmp_path / "train.txt",
        "--heldout": tmp_path / "held.txt",
        "--out": tmp_path / "study",
        "--window": 32,
        "--heldout-windows": 4,
        "--tile": 32,
        "--targets": 0.35,
        "--seeds": "0",
        "--cells": "toy,toy-35",
    }
    rows = quality.main([str(part) for pair in flags.items() for part in pair])
    assert [row["cell"] for row in rows] == ["toy", "toy-35"]


def documented_methods():
    """{name: (reads text, changes kept weights, patterns)} of the table in the guide."""
    guide = (ROOT / "docs/guide/prune.md").read_text(encoding="utf-8")
    return {m[1]: (m[2], m[3], m[4]) for m in re.finditer(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", guide, re.M)}


def test_the_guide_has_every_method_with_what_its_row_says():
    yes = {True: "yes", False: "no"}
    rows = {
        name: (
            "yes, trains" if row.learns else yes[row.needs_calibration],
            yes[row.updates_weights],
            ", ".join(row.patterns),
        )
        for name, row in METHODS.items()
    }
    assert documented_methods() == rows


def paths_in(document):
    """What a recipe names in backquotes that looks like a path of the repository."""
    found = re.findall(r"`([\w./]+/[\w./]*)`", document.read_text(encoding="utf-8"))
    return [path for path in found if "NAME" not in path]


@pytest.mark.parametrize("name", ["rooms", "add_a_method", "add_an_op", "add_a_task_set"])
def test_the_places_that_a_recipe_names_exist(name):
    missing = [path for path in paths_in(ROOT / f"docs/inside/{name}.md") if not (ROOT / path).exists()]
    assert missing == []
