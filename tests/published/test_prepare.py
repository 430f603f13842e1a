"""The original code's functions, with its traps fixed."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from patch import utils
from patch.artifacts.artifact import load_artifact
from patch.data.tokens import calibration_windows
from patch.models.keep_masks import keep_masks
from patch.models.structure import maskable_linears
from patch.priors import tile_scores
from patch.pruning import get_method, prune_model
from patch.published import llm
from patch.utils import evaluate, get_llm, load_compressed_model, prepare_pruned_model

TILE = (64, 32)


@pytest.fixture
def arguments(text_file):
    return {"prune_method": "wanda", "nsamples": 4, "calibration_dataset": str(text_file)}


@pytest.fixture
def model(tiny_model):
    model = tiny_model()
    model.seqlen = 32
    return model


def weights(model):
    return {name: linear.weight.detach().clone() for name, linear in maskable_linears(model).items()}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "thanos"])
def test_prune_save_and_load_again(tmp_path, model, tiny_model, tokenizer, arguments, method):
    dense = weights(model)
    arguments |= {"prune_method": method}
    path = tmp_path / "deep" / "checkpoint"
    pruned = prepare_pruned_model(model, tokenizer, path, arguments, TILE, 0.35)
    assert pruned is model
    expected, masks = weights(model), keep_masks(model)
    assert masks.keys() == dense.keys()
    for name, keep in masks.items():
        assert torch.equal(
            keep.reshape(keep.shape[0], -1, 4).sum(2), torch.full((keep.shape[0], keep.shape[1] // 4), 2)
        )
        assert not expected[name][~keep].any()
        assert get_method(method).updates_weights or torch.equal(expected[name], dense[name].masked_fill(~keep, 0))
    scores = {name: model.get_submodule(name).distribution_scores for name in masks}

    # The trap of the original: a second call returned the dense model.
    again = tiny_model()
    again.seqlen = 32
    prepare_pruned_model(again, tokenizer, path, argparse.Namespace(**arguments), TILE, 0.35)
    third = load_compressed_model(tiny_model(), TILE, path)
    for other in (again, third):
        assert all(torch.equal(weight, expected[name]) for name, weight in weights(other).items())
        assert all(torch.equal(keep, masks[name]) for name, keep in keep_masks(other).items())
        assert all(torch.equal(other.get_submodule(name).distribution_scores, s) for name, s in scores.items())
    assert not [name for name in model.state_dict() if "scores" in name or "keep" in name]


def test_pruning_options_reach_the_method(tmp_path, model, tiny_model, tokenizer, arguments, text_file):
    options = {"precision": "fp64", "damping": 0.3, "block_size": 32}
    arguments |= {"prune_method": "thanos"} | options
    prepare_pruned_model(model, tokenizer, tmp_path / "c", arguments, TILE, 0.35)
    calibration, _ = calibration_windows(tokenizer, str(text_file), nsamples=4, seqlen=32, seed=0)
    options["calibration"] = calibration
    reference = prune_model(tiny_model(), "thanos", pattern="unstructured", sparsity=0.35, **options)
    for name, keep in reference.items():
        assert torch.equal(model.get_submodule(name).distribution_scores, tile_scores(keep, TILE))
    expected = tiny_model()
    prune_model(expected, "thanos", **options)
    assert all(torch.equal(weight, weights(expected)[name]) for name, weight in weights(model).items())

    fresh = tiny_model()
    fresh.seqlen = 32
    for key, other, message in (("damping", 0.01, "damping = 0.01"), ("block_size", None, "block_size = 512")):
        with pytest.raises(ValueError, match=f"expected {message}, the artifact was made with {key} = "):
            prepare_pruned_model(fresh, tokenizer, tmp_path / "c", arguments | {key: other}, TILE, 0.35)


def test_scores_are_those_of_the_unstructured_reference(tmp_path, model, tiny_model, tokenizer):
    prepare_pruned_model(model, tokenizer, tmp_path / "c", {"prune_method": "magnitude"}, TILE, 0.25)
    reference = prune_model(tiny_model(), "magnitude", pattern="unstructured", sparsity=0.25)
    for name, keep in reference.items():
        assert torch.equal(model.get_submodule(name).distribution_scores, tile_scores(keep, TILE))


def test_zeros_of_the_dense_weight_are_not_taken_for_pruned(tmp_path, model, tokenizer):
    for linear in maskable_linears(model).values():
        linear.weight.data.zero_()
    prepare_pruned_model(model, tokenizer, tmp_path / "c", {"prune_method": "magnitude"}, TILE, 0.25)
    assert all(keep.double().mean() == 0.5 for keep in keep_masks(model).values())


@pytest.mark.parametrize(
    ("args", "tile", "ratio", "seed", "message"),
    [
        ({"prune_method": "sparsegpt"}, TILE, 0.35, 0, "expected method = 'sparsegpt', .* method = 'wanda'"),
        ({}, (128, 128), 0.35, 0, r"expected tile = \[128, 128\]"),
        ({}, TILE, 0.45, 0, "expected target_sparsity = 0.45"),
        ({"sparsity_type": "unstructured"}, TILE, 0.35, 0, "expected pattern = 'unstructured'"),
        ({"nsamples": 5}, TILE, 0.35, 0, "expected nsamples = 5"),
        ({}, TILE, 0.35, 1, "expected seed = 1"),
        ({"shift_zero_metrics": True}, TILE, 0.35, 0, "expected shift_zero_metrics = True"),
        ({"precision": "fp64"}, TILE, 0.35, 0, "expected precision = 'fp64'"),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    tmp_path, model, tiny_model, tokenizer, arguments, args, tile, ratio, seed, message
):
    prepare_pruned_model(model, tokenizer, tmp_path / "c", arguments, TILE, 0.35)
    other = tiny_model()
    other.seqlen = 32
    before = weights(other)
    with pytest.raises(ValueError, match=message):
        prepare_pruned_model(other, tokenizer, tmp_path / "c", arguments | args, tile, ratio, seed)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(other).items())


def test_checkpoint_of_another_model_or_text_is_refused(tmp_path, model, tiny_model, tokenizer, arguments, text_file):
    prepare_pruned_model(model, tokenizer, tmp_path / "c", arguments, TILE, 0.35)
    for other, message in (
        (tiny_model(seed=1), "expected weights_fingerprint"),
        (tiny_model(intermediate_size=200), "expected config_fingerprint"),
    ):
        other.seqlen = 32
        with pytest.raises(ValueError, match=message):
            prepare_pruned_model(other, tokenizer, tmp_path / "c", arguments, TILE, 0.35)
    with pytest.raises(ValueError, match="expected config_fingerprint"):
        load_compressed_model(tiny_model(intermediate_size=200), TILE, tmp_path / "c")
    with pytest.raises(ValueError, match=r"expected tile = \[32, 32\]"):
        load_compressed_model(tiny_model(), (32, 32), tmp_path / "c")
    text_file.write_text("other text " * 200)
    fresh = tiny_model()
    fresh.seqlen = 32
    with pytest.raises(ValueError, match="expected calibration = "):
        prepare_pruned_model(fresh, tokenizer, tmp_path / "c", arguments, TILE, 0.35)


def test_damaged_or_foreign_checkpoint_is_refused(tmp_path, model, tiny_model, tokenizer, arguments):
    prepare_pruned_model(model, tokenizer, tmp_path / "c", arguments, TILE, 0.35)
    assert load_artifact(tmp_path / "c").meta["versions"]["torch"] == torch.__version__
    (tmp_path / "c" / "masks.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"masks\.safetensors: expected .* bytes"):
        load_compressed_model(tiny_model(), TILE, tmp_path / "c")
    (tmp_path / "old.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"checkpoint_name: expected a folder, .*old\.pt is a file\. Choose another"):
        prepare_pruned_model(model, tokenizer, tmp_path / "old.pt", arguments, TILE, 0.35)
    with pytest.raises(FileNotFoundError, match="found nothing; check the path"):
        load_compressed_model(tiny_model(), TILE, tmp_path / "missing")


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"prune_method": "maskllm"}, ValueError, "maskllm_checkpoint together, got 'maskllm' and None"),
        ({"maskllm_checkpoint": "x.npz"}, ValueError, "maskllm_checkpoint together, got 'wanda' and 'x.npz'"),
        (
            {"prune_method": "maskllm", "maskllm_checkpoint": "x.npz"},
            FileNotFoundError,
            "expected a mask file .*'x.npz'",
        ),
        (
            {"prune_method": "maskllm", "maskllm_checkpoint": 3},
            ValueError,
            "prune_args: maskllm_checkpoint: expected a name or path, got 3",
        ),
        (
            {"prune_method": "maskllm", "maskllm_checkpoint": "x.npz", "sparsity_type": "unstructured"},
            ValueError,
            "sparsity_type: expected '2:4' with prune_method 'maskllm', got 'unstructured'",
        ),
        ({"sparsity_type": "4:8"}, ValueError, "sparsity_type: expected one of 2:4, tiles, unstructured, got '4:8'"),
        ({"sparsity_ratio": 0.0}, ValueError, "prune_args: sparsity_ratio: expected 0.5 for .*2:4.*, got 0.0"),
        ({"sparsity_ratio": 0.7}, ValueError, "sparsity_ratio: expected a share of zeros from 0 to 0.5, got 0.7"),
        ({"sparsity_ratio": "0.5"}, ValueError, "sparsity_ratio: expected a share of zeros from 0 to 0.5, got '0.5'"),
        ({"nsamples": 0}, ValueError, "nsamples: expected an integer >= 1, got 0"),
        ({"optimizer_FT_pruning": "adamw_apex"}, ValueError, "'adamw_torch', got 'adamw_apex'"),
        ({"precision": "fp16"}, ValueError, "prune_args: precision: expected one of fp32, fp64, got 'fp16'"),
        ({"damping": -1}, ValueError, "prune_args: damping: expected a finite share .* got -1"),
        ({"block_size": 6}, ValueError, "prune_args: block_size: expected a multiple of 4, got 6"),
        ({"shift_zero_metrics": 1}, ValueError, "shift_zero_metrics: expected true or false, got 1"),
        (
            {"calibration_dataset": "openwebtext"},
            FileNotFoundError,
            "calibration_dataset: expected a file .* or one of .*, got 'openwebtext'",
        ),
        ({"calibration_dataset": None}, ValueError, "calibration_dataset: expected a name or path, got None"),
        ({"eval_dataset": "nope"}, FileNotFoundError, "eval_dataset: expected a file .* or one of .*, got 'nope'"),
        ({"slim_quants": True}, ValueError, "expected a known setting, got 'slim_quants'. Did you mean 'slim_quant'"),
    ],
)
def test_prune_args_are_checked(tmp_path, model, tokenizer, arguments, args, error, message):
    with pytest.raises(error, match=message):
        prepare_pruned_model(model, tokenizer, tmp_path / "c", arguments | args, TILE, 0.35)
    assert not keep_masks(model) and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("args", "tile", "ratio", "error", "message"),
    [
        (
            {},
            (0, 4),
            0.3,
            ValueError,
            r"mask_tile_size: expected positive rows,columns with .*, got \(0, 4\)",
        ),
        ({}, 128, 0.3, ValueError, r"mask_tile_size: expected 2 values, .*, got 128. .*\(128, 128\)"),
        ({}, "128,128", 0.3, ValueError, r"mask_tile_size: expected 2 values, .*, got '128,128'. .*\(128, 128\)"),
        ({}, (8, 6), 0.3, ValueError, r"mask_tile_size: .* columns a multiple of 4, got \(8, 6\)"),
        (
            {},
            TILE,
            45,
            ValueError,
            "target_sparsity_ratio: expected a share of zeros from 0 to 0.5, got 45. 45 percent is 0.45",
        ),
        ({}, TILE, -0.1, ValueError, "target_sparsity_ratio: expected .*, got -0.1"),
        ({}, TILE, float("nan"), ValueError, "target_sparsity_ratio: expected .*, got nan"),
        (None, TILE, 0.3, TypeError, "prune_args: expected a dict or a namespace, got NoneType"),
    ],
)
def test_other_arguments_are_checked(tmp_path, model, tokenizer, args, tile, ratio, error, message):
    with pytest.raises(error, match=message):
        prepare_pruned_model(model, tokenizer, tmp_path / "c", args, tile, ratio)


def test_calibration_text_must_be_long_enough(tmp_path, model, tokenizer, arguments, text_file):
    text_file.write_text("short")
    with pytest.raises(ValueError, match="a text of more than 32 tokens, got 5"):
        prepare_pruned_model(model, tokenizer, tmp_path / "c", arguments, TILE, 0.35)
    text_file.write_text("")
    with pytest.raises(ValueError, match="found only empty documents"):
        prepare_pruned_model(model, tokenizer, tmp_path / "c", arguments, TILE, 0.35)


def test_evaluate_skips_what_is_switched_off(model, tokenizer, text_file, monkeypatch):
    assert evaluate(model, None, tokenizer, False, test_lmharness=False) == (0.0, {})
    text_file.write_text(text_file.read_text()[:1000])
    value, results = evaluate(model, None, tokenizer, eval_dataset=text_file, test_lmharness=False)
    assert 200 < value < 400 and results == {}
    calls = []
    monkeypatch.setattr(utils, "zero_shot", lambda *a, **k: calls.append((a, k)) or {"average": 0.5})
    assert evaluate(model, "wrapped", tokenizer, False) == (0.0, {"average": 0.5})
    assert calls[0][0][2] == utils.ZERO_SHOT_TASKS and calls[0][1] == {"wrapped": "wrapped"}


def test_get_llm_keeps_the_dtype_of_the_checkpoint(tmp_path, tiny_model, tokenizer, monkeypatch):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    monkeypatch.setattr(llm, "lm_eval_model", lambda model, tokenizer: "wrapped")
    model, wrapped = get_llm(tmp_path / "m", local_files_only=True)
    assert wrapped == "wrapped" and model.seqlen == 128 and model.dtype == torch.bfloat16 and not model.training
    assert json.loads((tmp_path / "m" / "config.json").read_text())["max_position_embeddings"] == 128

    def missing(model, tokenizer):
        raise ImportError

    monkeypatch.setattr(llm, "lm_eval_model", missing)
    model, wrapped = get_llm(str(tmp_path / "m"), seqlen=16)
    assert wrapped is None and model.seqlen == 16
    for bad in (0, True, "2048"):
        with pytest.raises(ValueError, match="seqlen: expected an integer >= 1, got"):
            get_llm(tmp_path / "m", seqlen=bad)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "./llama"}, TypeError, "expected a torch.nn.Module, got str. Load the model first"),
        ({"tokenizer": None}, TypeError, "tokenizer: expected the model's tokenizer, got NoneType"),
        ({"tokenizer": "./llama"}, TypeError, "tokenizer: expected the model's tokenizer, got str"),
        ({"checkpoint_name": None}, TypeError, "checkpoint_name: expected a name or path, got NoneType"),
    ],
)
def test_what_is_no_model_tokenizer_or_path_is_refused(tmp_path, model, tokenizer, arguments, change, error, message):
    given = {"model": model, "tokenizer": tokenizer, "checkpoint_name": tmp_path / "c", "prune_args": arguments}
    with pytest.raises(error, match=message):
        prepare_pruned_model(**given | {"mask_tile_size": TILE, "target_sparsity_ratio": 0.35} | change)
    assert keep_masks(model) == {} and not (tmp_path / "c").exists()


def test_get_llm_and_load_compressed_model_refuse_what_cannot_be_loaded(tmp_path):
    for name, dtype, error, message in (
        ("./no-model", "auto", FileNotFoundError, "expected a folder with a model at ./no-model, found none"),
        (None, "auto", TypeError, "model_name: expected a name or path, got NoneType"),
        ("./no-model", "bf16", ValueError, "dtype: expected a floating torch.dtype or 'auto', got 'bf16'"),
    ):
        with pytest.raises(error, match=message):
            get_llm(name, dtype=dtype)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got str"):
        load_compressed_model("./llama", TILE, tmp_path)
