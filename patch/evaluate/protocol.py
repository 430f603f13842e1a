"""Perplexity on a text together with everything that is needed to repeat it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patch.data.sources import NAMED_SETS
from patch.data.tokens import evaluation_text, text_sha256, tokenize
from patch.evaluate.cross_entropy import DEFAULT_WINDOW, _exp, mean_cross_entropy
from patch.evaluate.results import SAME_TEXT, require_same
from patch.files.schema import require_integer
from patch.models.facts import model_fingerprint, model_name, versions, within_context


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
    if window is None:
        window = within_context(model, DEFAULT_WINDOW)
    if max_windows is not None:
        require_integer("max_windows", max_windows, advice="Leave it out to use the whole text.")
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
        require_same(label, report, dense, base, SAME_TEXT)
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
