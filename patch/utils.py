"""The functions of the original PATCH code under their names and arguments, on top of this package.

    model, lm_eval_model = get_llm("Qwen/Qwen2.5-0.5B")
    model = prepare_pruned_model(model, tokenizer, "checkpoints/qwen-wanda", prune_args, (128, 128), 0.45)
    ppl, accuracy = evaluate(model, lm_eval_model, tokenizer)

Differences on purpose: an existing checkpoint is loaded and verified (it used to be ignored and the dense
model returned), missing prune_args have defaults, unknown ones are refused, sets without data are an error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from patch.artifacts.artifact import load_artifact
from patch.evaluate.protocol import perplexity_report
from patch.evaluate.zero_shot import ZERO_SHOT_TASKS, zero_shot
from patch.models.facts import config_fingerprint
from patch.models.structure import decoder_of
from patch.pruning.options import DEFAULT_SEQLEN
from patch.published.arguments import path_of
from patch.published.llm import load_llm
from patch.published.prepare import load_prepared, prepare
from patch.published.prune_args import read_target

logger = logging.getLogger(__name__)


def prepare_pruned_model(
    model: nn.Module,
    tokenizer: Any,
    checkpoint_name: str | os.PathLike,
    prune_args: Mapping[str, Any] | Any,
    mask_tile_size: tuple[int, int],
    target_sparsity_ratio: float,
    seed: int = 0,
) -> nn.Module:
    """One-shot prune the model in place, or load an earlier result; returns the model.

    checkpoint_name        folder of the result. If it exists it is loaded, after checking that it was made
                           from this model, method, ratio, tile size, calibration set and seed.
    prune_args             dict or namespace with fields of patch.published.prune_args.PruneArgs; "prox_sparse" takes
                           a dict with fields of patch.pruning.ProxSparseConfig
    mask_tile_size         (rows, cols) of the tiles that will be learned
    target_sparsity_ratio  0..0.5, of the unstructured reference model that gives the tile scores
    prune_method "maskllm" takes the masks of maskllm_checkpoint: a MaskLLM or PATCH file (patch.artifacts.foreign; a
    .pt too), a folder with one, or a Hugging Face repository. Its reference model is pruned by Wanda.
    Every pruned layer gets its keep mask (patch.models.keep_masks) and a buffer `distribution_scores`
    (rows, cols), the share of weights that the reference keeps in each tile. The reference of prox_sparse, which
    knows no unstructured masks, is pruned by wanda.
    With quantize_weight or lora_rank it is then compressed (patch.slim), with fine_tune its kept weights and
    adapters are trained; neither changes a mask.
    raises  ValueError or TypeError before any work.
    """
    return prepare(model, tokenizer, checkpoint_name, prune_args, mask_tile_size, target_sparsity_ratio, seed)


def load_compressed_model(
    model: nn.Module, mask_tile_size: tuple[int, int], checkpoint_name: str | os.PathLike
) -> nn.Module:
    """Put the result of prepare_pruned_model on the dense model it was made from, in place.

    raises  FileNotFoundError; ValueError when the tile size, the config, the weights, a layer or a shape differs.
    """
    tile = read_target(mask_tile_size, 0.5).mask_tile_size
    decoder_of(model)  # refuses what is no model
    expect = {"tile": list(tile), "config_fingerprint": config_fingerprint(model.config)}
    return load_prepared(model, load_artifact(path_of(checkpoint_name, "checkpoint_name"), expect=expect))


def evaluate(
    model: nn.Module,
    lm_eval_model: Any,
    tokenizer: Any,
    evaluate_perplexity: bool = True,
    eval_dataset: str | os.PathLike = "wikitext2",
    eval_batch_size: int = 1,
    test_lmharness: bool = True,
) -> tuple[float, dict[str, float]]:
    """(perplexity, zero-shot accuracies with their mean under "average").

    lm_eval_model   the model's HFLM from get_llm or learn_mask; None: made here
    eval_dataset    named set or local file; windows of 4096 tokens or of the model's context, if shorter
    What is switched off is returned as 0.0 and {}.
    """
    value, results = 0.0, {}
    if evaluate_perplexity:
        report = perplexity_report(model, tokenizer, eval_dataset, batch_size=eval_batch_size)
        logger.info("perplexity %.4f (%s)", report["perplexity"], report)
        if report["warning"] is not None:
            logger.warning("perplexity %.4f is %s", report["perplexity"], report["warning"])
        value = report["perplexity"]
    if test_lmharness:
        results = zero_shot(model, tokenizer, ZERO_SHOT_TASKS, wrapped=lm_eval_model)
    return value, results


def get_llm(
    model_name: str | os.PathLike,
    local_files_only: bool = False,
    hf_token: str | None = None,
    seqlen: int = DEFAULT_SEQLEN,
    *,
    dtype: torch.dtype | str = "auto",
) -> tuple[nn.Module, Any]:
    """(causal language model on the CPU, its lm-eval wrapper or None when lm-eval is not installed).

    seqlen  length of calibration samples, cut to the model's context; kept as model.seqlen
    dtype   "auto": that of the checkpoint, so that no small weight is rounded to zero
    """
    return load_llm(model_name, local_files_only, hf_token, seqlen, dtype)
