"""patch.fine_tune_mask: the original's argument names, and learn_mask end to end, offline."""

from __future__ import annotations

import importlib.util
from argparse import Namespace

import pytest
import torch
from support.published import MASK_ARGS
from torch import nn

from patch.fine_tune_mask import learn_mask
from patch.learn.config import LearnConfig
from patch.models.keep_masks import apply_keep_masks, keep_masks
from patch.models.structure import maskable_linears
from patch.priors import tile_scores
from patch.pruning import prune_weight
from patch.published import mask_args
from patch.published.mask_args import config_from_mask_args

EXAMPLE = {  # the example of the original's README, sizes reduced
    **MASK_ARGS,
    "mask_tile_size": (32, 32),
    "grad_checkpoint": True,
    "local_bs": 2,
    "fine_tuning_sequence_length": 32,
}


@pytest.fixture
def local_model(tiny_model, tmp_path):
    path = tmp_path / "dense"
    tiny_model().save_pretrained(path)
    return path


def compressed(model, *, with_scores=True):
    masks = {
        name: prune_weight(linear.weight.detach(), "magnitude").keep for name, linear in maskable_linears(model).items()
    }
    apply_keep_masks(model, masks)
    for name, keep in masks.items() if with_scores else ():
        model.get_submodule(name).register_buffer("distribution_scores", tile_scores(keep, (32, 32)))
    return model


def test_every_key_reaches_the_config():
    changed = {
        "mask_tile_size": (64, 64),
        "grad_checkpoint": True,
        "local_bs": 4,
        "lr": 0.5,
        "sparse_reg": 1.5,
        "weight_reg": 2.5,
        "temp_schedule_2_4": [3, 1],
        "scaler_schedule_2_4": [11, 12],
        "hard_2_4": True,
        "prior_strength_2_4": 1.0,
        "temp_schedule_tile": [5, 2],
        "scaler_schedule_tile": [13, 14],
        "hard_tile": True,
        "prior_strength_tile": 2.0,
        "layer_target": True,
    }
    config = config_from_mask_args({"joint_optim": True, "target_sparsity_ratio": 0.25} | changed)
    assert (config.mode, config.target_sparsity) == ("joint", 0.25)
    default = LearnConfig.from_preset("joint", 0.25)
    for key, field in mask_args._CONFIG_KEYS.items():
        value = changed[key]
        assert getattr(config, field) == (tuple(value) if isinstance(value, list) else value)
        assert getattr(config, field) != getattr(default, field)
    assert set(changed) == set(mask_args._CONFIG_KEYS)


def test_missing_keys_take_the_preset_of_the_variant():
    assert config_from_mask_args({}) == LearnConfig.from_preset("tile", 0.45)
    assert config_from_mask_args({"joint_optim": True}) == LearnConfig.from_preset("joint", 0.45)
    given = {"mask_llm": True, "target_sparsity_ratio": 0.25, "learnable_mask": True}
    assert config_from_mask_args(given) == LearnConfig.from_preset("maskllm")
    assert config_from_mask_args(Namespace(lr=0.1)).lr == 0.1
    assert config_from_mask_args({"lr": 0.1}, lr=0.2, epochs=2).lr == 0.2


def test_hard_tile_and_hard_2_4_are_not_mixed_up_in_tile_mode():
    config = config_from_mask_args({"hard_tile": True})
    assert (config.hard_tile, config.hard_pattern) == (True, False)


def test_default_weight_reg_does_not_drown_the_loss_with_mask_llm():
    """The original multiplies its default of 10 by a sum of norms there."""
    config = config_from_mask_args({"mask_llm": True, "weight_reg": 10.0})
    assert (config.weight_reg, config.weight_reg_normalized, config.weight_reg_form) == (10.0, True, "norm")


@pytest.mark.parametrize("variant", [{}, {"joint_optim": False}, {"joint_optim": False, "mask_llm": True}])
def test_example_end_to_end(local_model, tiny_model, tokenizer, text_file, tmp_path, variant):
    prepared = compressed(tiny_model())
    model, wrapper = learn_mask(
        str(local_model),
        prepared,
        tokenizer,
        EXAMPLE | variant,
        True,
        None,
        False,
        train_data=text_file,
        output_dir=tmp_path / "run",
        max_blocks=24,
        global_batch_size=4,
    )
    assert (wrapper is None) == (importlib.util.find_spec("lm_eval") is None)
    if wrapper is not None:
        assert wrapper.model is model
        assert wrapper.max_length == model.config.max_position_embeddings
    masks = keep_masks(model)
    dense = tiny_model()
    for name, keep in masks.items():
        weight = dense.get_submodule(name).weight
        assert torch.equal(model.get_submodule(name).weight, torch.where(keep, weight, 0))
    if variant.get("joint_optim") is False and not variant.get("mask_llm"):
        assert all((masks[name] | ~keep).all() for name, keep in keep_masks(prepared).items())
    if variant.get("mask_llm"):
        assert all((keep.reshape(-1, 4).sum(1) == 2).all() for keep in masks.values())
    assert not model.training
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6


def test_blocks_may_be_given_and_scores_may_be_missing(local_model, tiny_model, tokenizer):
    blocks = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    model, _ = learn_mask(
        local_model,
        compressed(tiny_model(), with_scores=False),
        tokenizer,
        EXAMPLE,
        train_data=blocks,
        global_batch_size=4,
        exact_budget=True,
        dtype=torch.bfloat16,
    )
    total = sum(keep.numel() for keep in keep_masks(model).values())
    nonzeros = sum(int(keep.sum()) for keep in keep_masks(model).values())
    assert 0 <= 0.55 * total - nonzeros < 32 * 32 + 1
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer": "adamw_apex"}, ValueError, "expected one of adamw_torch, got 'adamw_apex'"),
        (
            {"learning_rate": 1},
            ValueError,
            "mask_args: expected a known setting, got 'learning_rate'. Settings are: .*, lr, ",
        ),
        ({"mask_llm": True, "joint_optim": True}, ValueError, "got both True"),
        (
            {"joint_optim": "yes"},
            ValueError,
            "mask_args: joint_optim: expected true or false, got 'yes'",
        ),
        ({"learnable_mask": False}, ValueError, "learnable_mask.*expected True or no such key, got False"),
        ({"target_sparsity_ratio": 0.6}, ValueError, "from 0 to 0.5, got 0.6"),
        ({"target_sparsity_ratio": "45%"}, ValueError, "share of zeros from 0 to 0.5, got '45%'"),
        (
            {"mask_tile_size": "128,128"},
            ValueError,
            r"tile: expected 2 values, each an integer, got '128,128'. .*\(128, 128\)",
        ),
        ({"temp_schedule_tile": [4, 0]}, ValueError, r"tile_temperature: expected .* > 0, got \[4, 0\]"),
        ({"local_bs": 3}, ValueError, "multiple of local_batch_size"),
        ("joint", TypeError, "expected a dict or a namespace, got str"),
        (None, TypeError, "expected a dict or a namespace, got NoneType"),
    ],
)
def test_bad_mask_args_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        config_from_mask_args(arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"option": 1}, TypeError, "expected known options, got option; valid: "),
        ({"mask_args": {"fine_tuning_sequence_length": 1}}, ValueError, "expected an integer >= 2, got 1"),
        ({"compressed_model": "folder"}, TypeError, "compressed_model: expected a model, got str"),
        ({"compressed_model": nn.Linear(4, 4)}, ValueError, "expected keep masks on its layers, found none"),
        ({"max_blocks": 3}, ValueError, "expected only with text, got packed blocks"),
        ({"train_data": "/no/such/file.txt"}, FileNotFoundError, "file.txt"),
        ({"global_batch_size": 64}, ValueError, "at least global_batch_size = 64, got 8"),
        ({"model_name": "./no-model"}, FileNotFoundError, "expected a folder with a model at ./no-model, found none"),
        ({"model_name": 3}, TypeError, "model_name: expected a name or path, got int"),
        ({"dtype": "bf16"}, ValueError, "dtype: expected a floating torch.dtype or 'auto', got 'bf16'"),
        ({"dtype": torch.int8}, ValueError, "dtype: expected a floating torch.dtype or 'auto', got torch.int8"),
        ({"tokenizer": None, "train_data": "text.txt"}, TypeError, "tokenizer: expected the model's .* got NoneType"),
    ],
)
def test_bad_calls_are_refused_before_the_model_is_loaded(tiny_model, tokenizer, change, error, message):
    arguments = {
        "model_name": "no/model",  # may be one of the hub, so that only loading it would tell
        "tokenizer": tokenizer,
        "compressed_model": compressed(tiny_model()),
        "mask_args": EXAMPLE,
        "train_data": torch.zeros(8, 16, dtype=torch.int64),
        "global_batch_size": 4,
    } | change
    with pytest.raises(error, match=message):
        learn_mask(**arguments)


def test_half_prepared_model_and_missing_wandb_are_refused(tiny_model, tokenizer, monkeypatch):
    model = compressed(tiny_model())
    blocks = torch.zeros(8, 16, dtype=torch.int64)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb: expected the package to be installed"):
        learn_mask("no/model", model, tokenizer, EXAMPLE, wandb=True, train_data=blocks, global_batch_size=4)
    del model.model.layers[1].mlp.up_proj.distribution_scores
    with pytest.raises(ValueError, match=r"distribution_scores on every pruned layer, .*up_proj has none"):
        learn_mask("no/model", model, tokenizer, EXAMPLE, train_data=blocks, global_batch_size=4)
