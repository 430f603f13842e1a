"""Perplexity on a text together with everything that is needed to repeat it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from patch.data.sources import NAMED_SETS
from patch.data.tokens import evaluation_text, text_sha256, tokenize
from patch.evaluate.cross_entropy import DEFAULT_WINDOW, _exp, mean_cross_entropy, require_windows
from patch.evaluate.results import (
    EVERY_WINDOW,
    FIRST_WINDOW,
    NO_WINDOW,
    bos_line,
    broken_perplexity,
    perplexity_warnings,
    require_comparable,
)
from patch.files.schema import require_choice, require_integer
from patch.models.checks import require_known_tokens
from patch.models.facts import context_length, model_fingerprint, model_name, versions, within_context
from patch.models.structure import vocabulary_size

WindowBos = Literal["tokenizer", "every"]


@dataclass(frozen=True)
class EvaluationSet:
    """A tokenized evaluation text; read once for all models that are compared on it.

    token_ids    int64 (tokens,)
    byte_ends    int64 (tokens,): bytes (UTF-8) of the text up to the end of each token, a character that several
                 tokens share counting with the first of them; None for a tokenizer that does not tell its offsets
    max_windows  most windows that its convention takes from it, None: all
    facts        JSON values that identify it: source, dataset (id, config, split, files on the hub), split,
                 text_field, text_sha256, tokens
    bos          id of the BOS token that the tokenizer put at the start, None: it puts none
    """

    token_ids: Tensor
    byte_ends: Tensor | None
    max_windows: int | None
    facts: dict[str, Any]
    bos: int | None


def evaluation_set(
    tokenizer: Any, source: str | os.PathLike, *, split: str | None = None, text_field: str | None = None
) -> EvaluationSet:
    """Read and tokenize a named set or a local file by its convention (patch.data.evaluation_text)."""
    name = os.fspath(source)
    named = NAMED_SETS.get(name)
    text, max_windows = evaluation_text(name, split=split, text_field=text_field)
    ids, byte_ends = _tokenized(tokenizer, text)
    bos = getattr(tokenizer, "bos_token_id", None)
    facts: dict[str, Any] = {"source": name, "dataset": None, "split": split, "text_field": text_field}
    if named is not None:
        facts["split"] = split or named.evaluation_split
        facts["dataset"] = {"id": named.hub_id, "config": named.config, **named.splits[facts["split"]]}
    facts |= {"text_sha256": text_sha256([text]), "tokens": len(ids)}
    return EvaluationSet(ids, byte_ends, max_windows, facts, bos if len(ids) and ids[0] == bos else None)


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
    window_bos: WindowBos = "tokenizer",
    progress: bool = False,
) -> dict[str, Any]:
    """Perplexity on a source together with everything needed to repeat it.

    source       named set or local file, or what evaluation_set made of it (split and text_field are then its)
    window       default min(4096, the model's context length)
    max_windows  use only the first windows; default all, or 256 for c4
    window_bos   "tokenizer": as the tokenizer puts BOS, at most once at the start of the text; "every": before every
                 window, which then holds window - 1 tokens of the text, all predicted
    returns      dict of JSON values: perplexity, loss (nats), bytes, bits_per_byte, bos, vocabulary, warning, the
                 facts of the set, windows, window, batch_size, dtype, device, model, model_fingerprint, versions.

    bytes is the part of the text (UTF-8) that the predicted tokens stand for: of each window from the end of its first
    token (a BOS that was put before it ends at 0) to the end of its last. bits_per_byte is the cross-entropy of all
    predictions in bits over these bytes, and may be compared between tokenizers. Both are None for tokenizers without
    offsets. warning is a text where the perplexity is worse than a uniform guess over the vocabulary, else None.
    """
    require_choice("window_bos", window_bos, ("tokenizer", "every"))
    if window is None:
        window = within_context(model, DEFAULT_WINDOW)
    if max_windows is not None:
        require_integer("max_windows", max_windows, advice="Leave it out to use the whole text.")
    if isinstance(source, EvaluationSet):
        text = source
    else:
        text = evaluation_set(tokenizer, source, split=split, text_field=text_field)
    wanted = min((n for n in (max_windows, text.max_windows) if n is not None), default=None)
    bos = None if window_bos == "tokenizer" else require_bos(tokenizer)
    # Windows of the text itself: where each gets a BOS, the one that the tokenizer put at the start is left out.
    start, before = (0, 0) if bos is None else (int(text.bos is not None), 1)
    require_windows(window, context_length(model), {text.facts["source"]: len(text.token_ids) - start + before})
    own = window - before
    windows = (len(text.token_ids) - start) // own
    windows = windows if wanted is None else min(wanted, windows)
    used = text.token_ids[start : start + windows * own]
    vocabulary = vocabulary_size(model)
    require_known_tokens(used, vocabulary, text.facts["source"], tokenizer)
    loss = mean_cross_entropy(model, used, window, batch_size=batch_size, bos=bos, progress=progress)
    size = _predicted_bytes(text.byte_ends, start, own, windows, bos is not None)
    parameter = next(model.parameters())
    return {
        "perplexity": _exp(loss),
        "loss": loss,
        "bytes": size,
        "bits_per_byte": loss * windows * (window - 1) / (math.log(2) * size) if size else None,
        "bos": EVERY_WINDOW if bos is not None else NO_WINDOW if text.bos is None else FIRST_WINDOW,
        "vocabulary": vocabulary,
        "warning": broken_perplexity(_exp(loss), vocabulary),
        **text.facts,
        "windows": windows,
        "window": window,
        "batch_size": batch_size,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "model": model_name(model),
        "model_fingerprint": model_fingerprint(model),
        "versions": versions(),
    }


def format_reports(reports: Mapping[str, Mapping[str, Any]], *, dense: str = "dense") -> str:
    """Table of perplexity reports with the dense model first, then the protocol they share.

    reports  {label: perplexity_report(...)}; must hold the dense model under the label `dense`
    raises   ValueError when the dense model is missing or the reports do not share text, window and tokens.
    """
    if dense not in reports:
        got = f"got {sorted(reports)}; evaluate the dense model too"
        raise ValueError(f"expected the dense model's report under {dense!r}, {got}")
    base = reports[dense]
    for label, report in reports.items():
        require_comparable(label, report, dense, base)
    width = max(map(len, reports))
    lines = [f"{'model':<{width}}  perplexity  bits/byte  dtype"]
    for label in sorted(reports, key=lambda name: name != dense):  # stable: the others keep their order
        report = reports[label]
        bits = "-" if report["bits_per_byte"] is None else f"{report['bits_per_byte']:.4f}"
        lines.append(f"{label:<{width}}  {report['perplexity']:10.4f}  {bits:>9}  {report['dtype']}")
    used = ", ".join(f"{name} {version}" for name, version in base["versions"].items())
    split = f" ({base['split']})" if base.get("split") else ""
    lines += [
        f"text: {base['source']}{split}, SHA-256 {base['text_sha256']}",
        f"protocol: {base['windows']} non-overlapping windows of {base['window']} tokens out of "
        f"{base['tokens']}, "
        f"exp of the mean cross-entropy; {bos_line(base)}",
        f"versions: {used}",
    ]
    lines += [f"WARNING: {label}: {said}" for label, said in perplexity_warnings(reports, dense)]
    return "\n".join(lines)


def require_bos(tokenizer: Any, what: str = "window_bos") -> int:
    """The tokenizer's BOS token; refuses a tokenizer without one."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise ValueError(f"{what}: expected a tokenizer with a BOS token, got one without. Leave it out.")
    return int(bos)


def _tokenized(tokenizer: Any, text: str) -> tuple[Tensor, Tensor | None]:
    """Token ids of a text with the special tokens that the tokenizer adds, and EvaluationSet.byte_ends."""
    if not getattr(tokenizer, "is_fast", False):
        return torch.tensor(tokenize(tokenizer, [text])[0], dtype=torch.long), None
    # verbose=False: a text may well be longer than the model's context, it is cut into windows later.
    encoded = tokenizer(text, verbose=False, return_offsets_mapping=True)
    ends = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 1]
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = 1 + (codes >= 1 << 7) + (codes >= 1 << 11) + (codes >= 1 << 16)
    bytes_before = np.concatenate([[0], np.cumsum(sizes)])
    # Special tokens have the offsets (0, 0), also at the end.
    byte_ends = bytes_before[np.maximum.accumulate(ends)]
    return torch.tensor(encoded["input_ids"], dtype=torch.long), torch.from_numpy(byte_ends)


def _predicted_bytes(byte_ends: Tensor | None, start: int, own: int, windows: int, after_bos: bool) -> int | None:
    """Bytes of the text that the predicted tokens of all windows stand for; see perplexity_report."""
    if byte_ends is None:
        return None
    ends = torch.cat([byte_ends.new_zeros(1), byte_ends])
    firsts = torch.arange(windows) * own + start
    return int((ends[firsts + own] - ends[firsts if after_bos else firsts + 1]).sum())
