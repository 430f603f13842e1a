"""Perplexity with its protocol.

The text is tokenized once and cut into non-overlapping windows (the tail is dropped, no special
token per window); each window gives the mean cross-entropy of its window-1 predictions, and the result is exp
of the mean over windows. This is the protocol of the pruning literature.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from patch.data import NAMED_SETS, evaluation_text, text_sha256, tokenize

DEFAULT_WINDOW = 4096
# Positions whose logits are turned to fp32 at a time: bounds the copy at 1024 x vocabulary.
_LOSS_CHUNK = 1024


@dataclass(frozen=True)
class EvaluationSet:
    """A tokenized evaluation text; read once for all models that are compared on it.

    token_ids    int64 (tokens,)
    max_windows  most windows that its convention takes from it, None: all
    facts        JSON values that identify it: source, dataset (id, config, split, files on the hub), split,
                 text_field, text_sha256, tokens
    """

    token_ids: Tensor
    max_windows: int | None
    facts: dict[str, Any]


def evaluation_set(
    tokenizer: Any, source: str | os.PathLike, *, split: str | None = None, text_field: str | None = None
) -> EvaluationSet:
    """Read and tokenize a named set or a local file by its convention (patch.data.evaluation_text)."""
    name = os.fspath(source)
    named = NAMED_SETS.get(name)
    text, max_windows = evaluation_text(name, split=split, text_field=text_field)
    ids = torch.tensor(tokenize(tokenizer, [text])[0], dtype=torch.long)
    facts: dict[str, Any] = {"source": name, "dataset": None, "split": split, "text_field": text_field}
    if named is not None:
        facts["split"] = split or named.evaluation_split
        facts["dataset"] = {"id": named.hub_id, "config": named.config, **named.splits[facts["split"]]}
    return EvaluationSet(ids, max_windows, facts | {"text_sha256": text_sha256([text]), "tokens": len(ids)})


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
                    raise ValueError(
                        f"expected finite logits, window {start + row} has a cross-entropy of {loss}; use "
                        "bf16 or "
                        "fp32 instead of fp16, or check the weights"
                    )
                losses.append(loss)
            bar.update(len(batch))
    return math.fsum(losses) / len(losses)


def perplexity_report(
    model: nn.Module,
    tokenizer: Any,
    source: Any,
    *,
    window: int | None = None,
    split: str | None = None,
    text_field: str | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Perplexity on a source together with everything needed to repeat it.

    source       named set or local file, or what evaluation_set made of it (split and text_field are then its)
    window       default min(4096, the model's context length)
    max_windows  use only the first windows; default all, or 256 for c4
    returns      dict of JSON values: perplexity, loss (nats), the facts of the set, windows, window, batch_size,
                 dtype, device, model, model_fingerprint, versions.
    """
    from patch.checkpoint import model_fingerprint

    limit = context_length(model)
    if window is None:
        window = min(DEFAULT_WINDOW, limit or DEFAULT_WINDOW)
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"expected max_windows >= 1, got {max_windows}; leave it out to use the whole text")
    if isinstance(source, EvaluationSet):
        text = source
    else:
        text = evaluation_set(tokenizer, source, split=split, text_field=text_field)
    wanted = min((n for n in (max_windows, text.max_windows) if n is not None), default=None)
    used = text.token_ids if wanted is None else text.token_ids[: wanted * window]
    loss = mean_cross_entropy(model, used, window, batch_size=batch_size, progress=progress)
    parameter = next(model.parameters())
    return {
        "perplexity": _exp(loss),
        "loss": loss,
        **text.facts,
        "windows": len(used) // window,
        "window": window,
        "batch_size": batch_size,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "model": str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__),
        "model_fingerprint": model_fingerprint(model),
        "versions": versions(),
    }


def format_reports(reports: Mapping[str, Mapping[str, Any]], *, dense: str = "dense") -> str:
    """Table of perplexity reports with the dense model first, then the protocol they share.

    reports  {label: perplexity_report(...)}; must hold the dense model under the label `dense`
    raises   ValueError when the dense model is missing or the reports do not share text, window and tokens.
    """
    if dense not in reports:
        raise ValueError(
            f"expected the dense model's report under {dense!r}, got {sorted(reports)}; evaluate the dense model too"
        )
    base = reports[dense]
    for label, report in reports.items():
        for key in ("text_sha256", "window", "windows", "tokens"):
            if report[key] != base[key]:
                raise ValueError(
                    f"{label}: {key} is {report[key]}, for {dense} it is {base[key]}: the perplexities "
                    "cannot be "
                    "compared; evaluate both on the same text, tokenizer and window"
                )
    width = max(map(len, reports))
    lines = [f"{'model':<{width}}  perplexity  dtype"]
    for label in sorted(reports, key=lambda name: name != dense):  # stable: the others keep their order
        report = reports[label]
        lines.append(f"{label:<{width}}  {report['perplexity']:10.4f}  {report['dtype']}")
    used = ", ".join(f"{name} {version}" for name, version in base["versions"].items())
    split = f" ({base['split']})" if base.get("split") else ""
    lines += [
        f"text: {base['source']}{split}, SHA-256 {base['text_sha256']}",
        f"protocol: {base['windows']} non-overlapping windows of {base['window']} tokens out of "
        f"{base['tokens']}, "
        "exp of the mean cross-entropy",
        f"versions: {used}",
    ]
    return "\n".join(lines)


def context_length(model: Any) -> int | None:
    """Largest number of positions that a model or a configuration allows, None when it names none."""
    config = getattr(model, "config", model)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import version

    import transformers

    from patch import __version__

    return {
        "patch-llm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": version("tokenizers"),
        "datasets": version("datasets"),
        "python": platform.python_version(),
    }


def _windows(model: nn.Module, token_ids: Any, window: int, batch_size: int) -> Tensor:
    """Checked (windows, window) int64 view of the token ids."""
    ids = torch.as_tensor(token_ids)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"expected integer token ids, got {ids.dtype}; tokenize the text first")
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"expected token ids of shape (tokens,) or (1, tokens), got {tuple(ids.shape)}; join them")
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ValueError(f"expected a window of at least 2 tokens, got {window!r}; the paper uses {DEFAULT_WINDOW}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size!r}; use 1 when memory is short")
    limit = context_length(model)
    if limit is not None and window > limit:
        raise ValueError(f"expected a window of at most {limit} (the model's context), got {window}; use {limit}")
    if len(ids) < window:
        raise ValueError(
            f"expected at least one window of {window} tokens, got {len(ids)} tokens; give more text or a "
            "smaller window"
        )
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    vocabulary = getattr(embeddings, "num_embeddings", None)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ValueError(
            f"expected token ids of 0 to {vocabulary if vocabulary is None else vocabulary - 1}, got {low} "
            f"to {high}; "
            "use the tokenizer of this model"
        )
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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has the training flag it came with."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: what a model caches must stay usable in training
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def _progress(total: int, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="perplexity", unit="window", disable=None if show else True)
