"""Cross-entropy and perplexity of a causal language model on tokens.

The tokens are cut into non-overlapping windows (the tail is dropped, no special token per window); each window gives
the mean cross-entropy of its window-1 predictions, and perplexity is exp of the mean over windows. This is the
protocol of the pruning literature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from patch.files.schema import require_integer
from patch.models.facts import context_length
from patch.models.modes import evaluating
from patch.models.structure import input_embeddings

DEFAULT_WINDOW = 4096
# Positions whose logits are turned to fp32 at a time: bounds the copy at 1024 x vocabulary.
_LOSS_CHUNK = 1024


def perplexity(model: nn.Module, token_ids: Any, window: int, *, batch_size: int = 1, progress: bool = False) -> float:
    """Perplexity of a causal language model over non-overlapping windows: exp of mean_cross_entropy.

    Arguments and errors are those of mean_cross_entropy; inf where exp overflows.
    """
    return _exp(mean_cross_entropy(model, token_ids, window, batch_size=batch_size, progress=progress))


def mean_cross_entropy(
    model: nn.Module, token_ids: Any, window: int, *, batch_size: int = 1, progress: bool = False
) -> float:
    """Mean over non-overlapping windows of the mean cross-entropy of a window's predictions, in nats.

    token_ids   integers, (tokens,) or (1, tokens); the incomplete last window is dropped
    window      2 .. the model's context length
    batch_size  windows per forward pass; changes speed and rounding only
    returns     computed in fp32 or better
    raises      ValueError before the first forward pass for bad sizes or ids; ValueError for NaN logits.
    """
    windows = _windows(model, token_ids, window, batch_size)
    device = next(model.parameters()).device
    losses: list[float] = []
    with evaluating(model), _progress(len(windows), progress) as bar:
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size].to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for row, (row_logits, ids) in enumerate(zip(logits, batch, strict=True)):
                loss = _mean_loss(row_logits, ids)
                if not math.isfinite(loss):
                    got = f"window {start + row} has a cross-entropy of {loss}"
                    raise ValueError(f"expected finite logits, {got}; use bf16 instead of fp16, or check the weights")
                losses.append(loss)
            bar.update(len(batch))
    return math.fsum(losses) / len(losses)


def require_windows(window: int, limit: int | None, tokens: Mapping[str, int], of: str = "the model") -> None:
    """Refuse a window longer than the context `limit` of the models (None: endless) or than a text, {name: tokens}."""
    if limit is not None and window > limit:
        raise ValueError(f"window: expected at most {limit} (the context of {of}), got {window}; use {limit}")
    for what, count in tokens.items():
        if count < window:
            got = f"got {count} tokens; give more text or a smaller window"
            raise ValueError(f"{what}: expected at least one window of {window} tokens, {got}")


def _windows(model: nn.Module, token_ids: Any, window: int, batch_size: int) -> Tensor:
    """Checked (windows, window) int64 view of the token ids."""
    ids = torch.as_tensor(token_ids)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"expected integer token ids, got {ids.dtype}; tokenize the text first")
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"expected token ids of shape (tokens,) or (1, tokens), got {tuple(ids.shape)}; join them")
    require_integer("window", window, 2, f"The paper uses {DEFAULT_WINDOW}.", kind=int)
    require_integer("batch_size", batch_size, advice="Use 1 when memory is short.", kind=int)
    require_windows(window, context_length(model), {"token_ids": len(ids)})
    embeddings = input_embeddings(model) if hasattr(model, "get_input_embeddings") else None
    vocabulary = getattr(embeddings, "num_embeddings", None)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        expected = f"expected token ids of 0 below the vocabulary size {vocabulary}"
        raise ValueError(f"{expected}, got {low} to {high}; use the tokenizer of this model")
    count = len(ids) // window
    return ids[: count * window].long().reshape(count, window)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _mean_loss(logits: Tensor, ids: Tensor) -> float:
    """Mean cross-entropy of the predictions of ids[1:]; log-softmax in fp32, sum in fp64."""
    total = 0.0
    for start in range(0, len(ids) - 1, _LOSS_CHUNK):
        stop = min(start + _LOSS_CHUNK, len(ids) - 1)
        part = logits[start:stop]
        part = part if part.dtype == torch.float64 else part.float()
        losses = functional.cross_entropy(part, ids[start + 1 : stop + 1], reduction="none")
        total += float(losses.double().sum())
    return total / (len(ids) - 1)


def _progress(total: int, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="perplexity", unit="window", disable=None if show else True)
