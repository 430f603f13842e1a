"""Cross-entropy and perplexity of a causal language model on tokens.

The tokens are cut into non-overlapping windows (the tail is dropped, no special token per window unless one is asked
for); each window gives the mean cross-entropy of its window-1 predictions, and perplexity is exp of the mean over
windows. This is the protocol of the pruning literature."""

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
from patch.models.structure import vocabulary_size

DEFAULT_WINDOW = 4096
# Positions whose logits are turned to fp32 at a time: bounds the copy at 1024 x vocabulary.
_LOSS_CHUNK = 1024


def perplexity(
    model: nn.Module,
    token_ids: Any,
    window: int,
    *,
    batch_size: int = 1,
    bos: int | None = None,
    progress: bool = False,
) -> float:
    """Perplexity of a causal language model over non-overlapping windows: exp of mean_cross_entropy.

    Arguments and errors are those of mean_cross_entropy; inf where exp overflows.
    """
    loss = mean_cross_entropy(model, token_ids, window, batch_size=batch_size, bos=bos, progress=progress)
    return _exp(loss)


def mean_cross_entropy(
    model: nn.Module,
    token_ids: Any,
    window: int,
    *,
    batch_size: int = 1,
    bos: int | None = None,
    progress: bool = False,
) -> float:
    """Mean over non-overlapping windows of the mean cross-entropy of a window's predictions, in nats.

    token_ids   integers, (tokens,) or (1, tokens); the incomplete last window is dropped
    window      2 .. the model's context length
    batch_size  windows per forward pass; changes speed and rounding only
    bos         id of a token to put before every window, which then holds window - 1 of token_ids, all predicted
    returns     computed in fp32 or better
    raises      ValueError before the first forward pass for bad sizes or ids; ValueError for NaN logits, naming the
                first layer that gives NaN or infinity.
    """
    windows = _windows(model, token_ids, window, batch_size, bos)
    device = next(model.parameters()).device
    losses: list[float] = []
    with evaluating(model), _progress(len(windows), progress) as bar:
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size].to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for row, (row_logits, ids) in enumerate(zip(logits, batch, strict=True)):
                loss = _mean_loss(row_logits, ids)
                if not math.isfinite(loss):
                    got = f"window {start + row} has a cross-entropy of {loss}{_first_not_finite(model, ids)}"
                    raise ValueError(f"expected finite logits, {got}; use bf16 instead of fp16, or check the weights")
                losses.append(loss)
            bar.update(len(batch))
    return math.fsum(losses) / len(losses)


def require_windows(window: int, limit: int | None, tokens: Mapping[str, int], of: str = "the model") -> None:
    """Refuse a window of one token, or longer than the models' context `limit` (None: endless) or a {text: tokens}."""
    require_integer("window", window, 2, f"The paper uses {DEFAULT_WINDOW}.", kind=int)
    if limit is not None and window > limit:
        raise ValueError(f"window: expected at most {limit} (the context of {of}), got {window}; use {limit}")
    for what, count in tokens.items():
        if count < window:
            got = f"got {count} tokens; give more text or a smaller window"
            raise ValueError(f"{what}: expected at least one window of {window} tokens, {got}")


def _windows(model: nn.Module, token_ids: Any, window: int, batch_size: int, bos: int | None) -> Tensor:
    """Checked (windows, window) int64 token ids: a view, or where each begins with `bos` a copy."""
    ids = torch.as_tensor(token_ids)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"expected integer token ids, got {ids.dtype}; tokenize the text first")
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"expected token ids of shape (tokens,) or (1, tokens), got {tuple(ids.shape)}; join them")
    require_integer("batch_size", batch_size, advice="Use 1 when memory is short.", kind=int)
    before = 0 if bos is None else 1
    require_windows(window, context_length(model), {"token_ids": len(ids) + before})
    own = window - before
    vocabulary = vocabulary_size(model)
    low, high = (int(value) for value in ids.aminmax())
    low, high = (low, high) if bos is None else (min(low, bos), max(high, bos))
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        expected = f"expected token ids of 0 below the vocabulary size {vocabulary}"
        raise ValueError(f"{expected}, got {low} to {high}; use the tokenizer of this model")
    count = len(ids) // own
    windows = ids[: count * own].long().reshape(count, own)
    return windows if bos is None else functional.pad(windows, (1, 0), value=bos)


def _first_not_finite(model: nn.Module, ids: Tensor) -> str:
    """The first layer whose output on one window has NaN or infinity, as a part of a sentence; "" where none has."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        is_number = isinstance(output, Tensor) and output.is_floating_point()
        if not found and is_number and not output.isfinite().all():
            found.append(name)

    handles = [
        # A module is done after the modules in it: the first to be found is the innermost.
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        model(input_ids=ids[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return f" (the first layer with NaN or infinity in its output is {found[0]})" if found else ""


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
