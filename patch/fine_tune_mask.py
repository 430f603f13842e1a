"""`learn_mask`: mask learning with the argument names of the original PATCH code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patch.published.learn_mask import learn_from


def learn_mask(
    model_name: str | os.PathLike,
    compressed_model: nn.Module,
    tokenizer: Any,
    mask_args: Mapping[str, Any] | Any,
    local_files_only: bool = False,
    hf_token: str | None = None,
    wandb: bool = False,
    *,
    train_data: str | os.PathLike | Tensor | None = None,
    output_dir: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[nn.Module, Any]:
    """Learn a PATCH mask for a dense model, starting from a one-shot compressed copy of it.

    model_name        path or hub id of the dense model; its weights are used, only masks come from
                      compressed_model.
    compressed_model  what patch.utils.prepare_pruned_model returned: `keep_mask` and `distribution_scores` on
                      its layers.
    mask_args         dict or namespace with the keys of the original (see config_from_mask_args); missing
                      ones get the published value of the variant chosen by joint_optim and mask_llm.
    train_data        local .txt, .jsonl or .parquet file, a named set, or packed blocks (B, S) int64; default
                      SlimPajama as in the paper.
    output_dir        folder for checkpoints and metrics.jsonl.
    dtype             of the dense model; default bfloat16 on a GPU and float32 without.
    options           any LearnConfig field (global_batch_size, epochs, seed, exact_budget, ...), max_blocks,
                      max_documents, text_field, resume, exclude, progress, callbacks.
    returns           (masked model, lm-eval wrapper of it or None when lm_eval is not installed).
    raises            ValueError or TypeError before the model is loaded for bad arguments.
    """
    return learn_from(
        model_name,
        compressed_model,
        tokenizer,
        mask_args,
        options,
        train_data=train_data,
        output_dir=output_dir,
        dtype=dtype,
        wandb=wandb,
        hub={"local_files_only": local_files_only, "token": hf_token},
    )
