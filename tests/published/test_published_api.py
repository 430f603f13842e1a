"""The published code's quick start, argument by argument, with a local model and local text, to a packed model."""

from __future__ import annotations

import torch
from support.published import MASK_ARGS

import patch
from patch.fine_tune_mask import learn_mask
from patch.models.keep_masks import keep_masks, measured_sparsity
from patch.packed.convert import pack_model
from patch.utils import evaluate, get_llm, prepare_pruned_model


def test_quick_start(tmp_path, tiny_model, tokenizer, text_file):
    name = str(tmp_path / "opt")
    tiny_model("opt", dtype=torch.float32).save_pretrained(name)
    tokenizer.save_pretrained(name)
    text = str(text_file)

    model, lm_eval_model = get_llm(name, local_files_only=True, seqlen=64)
    prune_args = {
        "prune_method": "wanda",
        "sparsity_type": "2:4",
        "sparsity_ratio": 0.5,
        "nsamples": 4,
        "calibration_dataset": text,
        "eval_dataset": text,
        "shift_zero_metrics": True,
        "fine_tune": False,
    }
    compressed = prepare_pruned_model(
        model,
        tokenizer,
        checkpoint_name=str(tmp_path / "checkpoints" / "opt"),
        prune_args=prune_args,
        mask_tile_size=(64, 64),
        target_sparsity_ratio=0.45,
        seed=0,
    )
    mask_args = {
        **MASK_ARGS,
        "learnable_mask": True,
        "mask_tile_size": (64, 64),
        "grad_checkpoint": False,
        "local_bs": 2,
        "fine_tuning_sequence_length": 64,
    }
    model, lm_eval_model = learn_mask(
        name,
        compressed,
        tokenizer,
        mask_args,
        local_files_only=True,
        train_data=text,
        global_batch_size=4,
        max_blocks=24,
        exact_budget=True,
        progress=False,
    )
    assert abs(measured_sparsity(keep_masks(model)) - 0.45) < 0.03
    perplexity, accuracies = evaluate(
        model, lm_eval_model, tokenizer, eval_dataset=text, eval_batch_size=2, test_lmharness=False
    )
    assert 1 < perplexity < 1e4 and accuracies == {}

    model = pack_model(model, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "packed")
    again = patch.load(tmp_path / "packed")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids).logits, model(ids).logits)
