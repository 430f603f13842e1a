"""Text to prune with and text to measure on, from one source or two; never the same tokens."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch.data.sources import DEFAULT_HELDOUT_WINDOWS, LOCAL_JOIN, NAMED_SETS, load_documents
from patch.data.tokens import calibration_windows, evaluation_text, sample_joined, text_sha256, tokenize

# Of a local text without another one beside it, at most this part of its end is held out.
_TAIL = 10
_FITTED = "The weights are fitted to that, so perplexity on it says nothing."


@dataclass(frozen=True)
class Texts:
    """Tokens to prune with, and others to measure on.

    calibration  (samples, seqlen) int64
    heldout      (windows, seqlen) int64, none of them in calibration's text
    text_sha256  of the text that calibration was drawn from
    where        of the held-out tokens, for people: "the evaluation split of wikitext2"
    """

    calibration: Tensor
    heldout: Tensor
    text_sha256: str
    where: str

    def sha256(self, name: str) -> str:
        """SHA-256 of the windows of "calibration" or "heldout": their size and their tokens."""
        tokens: Tensor = getattr(self, name)
        digest = hashlib.sha256(f"{tuple(tokens.shape)}\n".encode())
        digest.update(tokens.contiguous().numpy().data)
        return digest.hexdigest()


def require_two_texts(source: str, heldout: str | None) -> None:
    """Refuse a held-out text that is the calibration text; for a named set that name is its evaluation split."""
    same = heldout is not None and source not in NAMED_SETS and Path(heldout).resolve() == Path(source).resolve()
    if same:
        raise ValueError(
            f"heldout: expected another text than that to calibrate on, got {heldout!r} for both. {_FITTED}"
        )


def calibration_and_heldout(
    tokenizer: Any,
    source: str | os.PathLike,
    heldout: str | os.PathLike | None = None,
    *,
    nsamples: int,
    seqlen: int,
    seed: int = 0,
    text_field: str | None = None,
    max_windows: int = DEFAULT_HELDOUT_WINDOWS,
) -> Texts:
    """Calibration samples by the convention of their source, and windows to measure on.

    source       named set or local file, for calibration
    heldout      the same, to measure on. None: the evaluation split of a named set; of a local file the end, at most a
                 tenth of its tokens, which is cut off before calibration is drawn
    nsamples, seqlen, seed  as in `calibration_windows`
    max_windows  held-out windows of seqlen tokens, at most
    raises       ValueError for too little text, or one text for both
    """
    name = os.fspath(source)
    require_two_texts(name, None if heldout is None else os.fspath(heldout))
    if heldout is None and name not in NAMED_SETS:
        documents = load_documents(name, text_field=text_field)
        ids = tokenize(tokenizer, [LOCAL_JOIN.join(documents)])[0]
        windows = min(max_windows, len(ids) // _TAIL // seqlen)
        if windows == 0:
            got = f"{name} has {len(ids):,} tokens in all"
            advice = "Give more text, a smaller seqlen, or another text to measure on."
            raise ValueError(
                f"heldout: expected a window of {seqlen} tokens in the last tenth of the text, {got}. {advice}"
            )
        tail = windows * seqlen
        calibration = sample_joined(ids[:-tail], nsamples, seqlen, seed)
        cut = torch.tensor(ids[-tail:], dtype=torch.int64).reshape(windows, seqlen)
        where = f"the last {tail:,} of {len(ids):,} tokens of {name}, cut off before calibration was drawn"
        return Texts(calibration, cut, text_sha256(documents), where)
    sizes: dict[str, Any] = {"nsamples": nsamples, "seqlen": seqlen, "seed": seed, "text_field": text_field}
    calibration, digest = calibration_windows(tokenizer, name, **sizes)
    other = name if heldout is None else os.fspath(heldout)
    if name not in NAMED_SETS and other not in NAMED_SETS:
        if digest == text_sha256(load_documents(other, text_field=text_field)):
            got = f"got {other!r}, which holds the same text"
            raise ValueError(f"heldout: expected another text than that to calibrate on, {got}. {_FITTED}")
    text, most = evaluation_text(other, text_field=text_field)
    where = f"the evaluation split of {other}" if other in NAMED_SETS else other
    measured = heldout_windows(tokenizer, text, other, seqlen, min(max_windows, most or max_windows))
    return Texts(calibration, measured, digest, where)


def heldout_windows(tokenizer: Any, text: str, source: str, seqlen: int, max_windows: int) -> Tensor:
    """The first windows (windows, seqlen) int64 of a text to measure on; `source` names it where it is too short."""
    ids = torch.tensor(tokenize(tokenizer, [text])[0], dtype=torch.int64)
    windows = min(len(ids) // seqlen, max_windows)
    if windows == 0:
        advice = "Give more text or a smaller seqlen."
        raise ValueError(
            f"heldout: expected at least one window of {seqlen} tokens, {source!r} has {len(ids)} tokens. {advice}"
        )
    return ids[: windows * seqlen].reshape(windows, seqlen)
