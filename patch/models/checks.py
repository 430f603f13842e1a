"""Checks of what every job takes: token ids that a model can read, and a device that is there."""

from __future__ import annotations

import torch
from torch import nn

from patch.models.structure import decoder_of


def check_calibration(model: nn.Module, token_ids: torch.Tensor) -> None:
    """Refuse calibration data the model cannot read: it must be (samples, seqlen) int64 token ids."""
    advice = "Pass token windows, for example patch.data.sample_windows(...)."
    if not isinstance(token_ids, torch.Tensor) or token_ids.dtype != torch.int64:
        kind = f"a {token_ids.dtype} tensor" if isinstance(token_ids, torch.Tensor) else type(token_ids).__name__
        raise TypeError(f"expected calibration as an int64 tensor of token ids, got {kind}. {advice}")
    if token_ids.dim() != 2 or token_ids.numel() == 0:
        raise ValueError(
            f"expected calibration of shape (samples, seqlen), both at least 1, got {tuple(token_ids.shape)}. {advice}"
        )
    config = getattr(decoder_of(model), "config", None)
    vocab_size = getattr(config, "vocab_size", None)
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        limit = "" if vocab_size is None else f" below the vocabulary size {vocab_size}"
        raise ValueError(
            f"expected calibration token ids from 0{limit}, got {low} to {high}. Use the model's own tokenizer."
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and token_ids.shape[1] > longest:
        raise ValueError(
            f"expected calibration samples of at most {longest} tokens (max_position_embeddings), got "
            f"{token_ids.shape[1]}. Cut shorter windows."
        )


def check_device(device: torch.device | str | None) -> None:
    """Refuse a device that does not exist here, before the first block is moved to it."""
    try:
        kind = None if device is None else torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device: expected a torch device such as 'cuda' or 'cpu', got {device!r}. Pass None to prune "
            "where the model is."
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: expected a device of this machine, got {device!r} but torch sees no GPU. Pass None to "
            "prune where the model is."
        )
