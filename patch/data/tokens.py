"""Token data for training, calibration and evaluation: tokenizing, packing and sampling.

Everything here is a function of its arguments: the same text and seed give the same tokens on every machine,
whatever its number of cores. Sources are those of patch.data.sources.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patch.data.sources import LOCAL_JOIN, NAMED_SETS, iter_documents, load_documents, named_rows
from patch.files.schema import require_integer, require_seed

logger = logging.getLogger(__name__)

TOKENIZE_BATCH = 1000


def tokenize(tokenizer: Any, documents: Iterable[str]) -> list[list[int]]:
    """Token ids of each document, with the special tokens the tokenizer adds by default."""
    if isinstance(documents, str):
        raise TypeError("expected a list of documents, got one text; pass [text]")
    documents = list(documents)
    ids: list[list[int]] = []
    for start in range(0, len(documents), TOKENIZE_BATCH):
        # verbose=False: a document may well be longer than the model's context, it is cut into windows later.
        ids += tokenizer(documents[start : start + TOKENIZE_BATCH], verbose=False)["input_ids"]
    return ids


def pack_blocks(documents: Iterable[Sequence[Any]], block_size: int, *, max_blocks: int | None = None) -> Tensor:
    """Concatenate token id sequences and cut them into blocks; the incomplete tail is dropped.

    returns  (blocks, block_size) int64, at most max_blocks
    raises   ValueError when there are fewer tokens than one block.
    """
    require_integer("block_size", block_size)
    require_integer("max_blocks", 1 if max_blocks is None else max_blocks, advice="Leave it out to take everything.")
    wanted = None if max_blocks is None else max_blocks * block_size
    flat = array("q")  # grows in place: one copy of the tokens, not the two that joining parts would need
    for document in documents:
        if isinstance(document, str):
            raise TypeError("expected sequences of token ids, got text; tokenize the documents first")
        ids = np.asarray(document)
        if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
            raise TypeError(f"expected 1-D sequences of integer token ids, got {ids.dtype} of shape {ids.shape}")
        flat.frombytes(ids.astype(np.int64).tobytes())
        if wanted is not None and len(flat) >= wanted:
            break
    total = len(flat)
    blocks = min(total if wanted is None else wanted, total) // block_size
    if blocks == 0:
        expected = f"expected at least one block of {block_size} tokens"
        raise ValueError(f"{expected}, got {total} tokens; give more text or a smaller block")
    return torch.frombuffer(flat, dtype=torch.int64, count=blocks * block_size).reshape(blocks, block_size)


def sample_windows(
    token_ids_per_doc: Sequence[Any],
    nsamples: int,
    seqlen: int,
    seed: int,
    *,
    encode: Callable[[Any], Sequence[int]] | None = None,
) -> Tensor:
    """One random window from each of nsamples random documents that have more than seqlen tokens.

    encode   turns an entry of token_ids_per_doc into token ids (tokenizes only what is drawn)
    returns  (nsamples, seqlen) int64. The draws are those of Python's random.seed(seed) and random.randint,
             the rule of the published one-shot pruners (Wanda, SparseGPT) for C4.
    raises   ValueError when no document is long enough.
    """
    _check_sampling(nsamples, seqlen, seed)
    draw = random.Random(seed)
    too_short: set[int] = set()
    windows: list[Tensor] = []
    while len(windows) < nsamples:
        if len(too_short) == len(token_ids_per_doc):
            expected = f"expected at least one document of more than {seqlen} tokens"
            raise ValueError(f"{expected}, got {len(token_ids_per_doc)} shorter ones; use a smaller seqlen")
        index = draw.randint(0, len(token_ids_per_doc) - 1)
        if index in too_short:
            continue
        ids = token_ids_per_doc[index] if encode is None else encode(token_ids_per_doc[index])
        if len(ids) <= seqlen:
            too_short.add(index)
            continue
        start = draw.randint(0, len(ids) - seqlen - 1)
        windows.append(torch.as_tensor(ids[start : start + seqlen], dtype=torch.long))
    return torch.stack(windows)


def sample_joined(token_ids: Sequence[int], nsamples: int, seqlen: int, seed: int) -> Tensor:
    """Random windows of one long text, (nsamples, seqlen) int64: the rule of the published pruners for WikiText-2.

    Windows may overlap. When they hold more tokens than the text a warning says so.
    """
    _check_sampling(nsamples, seqlen, seed)
    if len(token_ids) <= seqlen:
        expected = f"expected a text of more than {seqlen} tokens"
        raise ValueError(f"{expected}, got {len(token_ids)}; give more text or a smaller seqlen")
    different = len(token_ids) - seqlen
    if nsamples > different:
        expected = f"expected at most {different:,} different samples of {seqlen} tokens"
        raise ValueError(f"nsamples: {expected} from {len(token_ids):,}, got {nsamples}. Ask for fewer.")
    if nsamples * seqlen > len(token_ids):
        given = f"{nsamples} samples of {seqlen} tokens are drawn from a text of {len(token_ids):,} tokens"
        logger.warning("%s, so they overlap and say less than so many: give more text", given)
    draw = random.Random(seed)
    ids = torch.as_tensor(token_ids, dtype=torch.long)
    starts = [draw.randint(0, len(ids) - seqlen - 1) for _ in range(nsamples)]
    return torch.stack([ids[start : start + seqlen] for start in starts])


def calibration_windows(
    tokenizer: Any,
    source: str | os.PathLike,
    *,
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    text_field: str | None = None,
) -> tuple[Tensor, str]:
    """Calibration samples of a source by its convention: (nsamples, seqlen) int64 and the text's SHA-256.

    c4 and slimpajama: a window of each random long document of the first training file, of which only the drawn
    documents are tokenized and none is held; everything else: windows of the joined text. The published loader
    draws slimpajama documents from the whole split (48 files); the rule is the same, the documents are not.
    raises  ValueError naming the source and what was needed when it has too little text.
    """
    _check_sampling(nsamples, seqlen, seed)
    name = os.fspath(source)
    named = NAMED_SETS.get(name)
    if named is not None and named.calibration_join is None:
        rows = named_rows(name, "train")
        with _naming(name, "calibration"):
            windows = sample_windows(
                rows, nsamples, seqlen, seed, encode=lambda row: tokenize(tokenizer, [row[named.field]])[0]
            )
        return windows, text_sha256(row[named.field] for row in rows)
    documents = load_documents(source, text_field=text_field)
    join = None if named is None else named.calibration_join
    joined = (LOCAL_JOIN if join is None else join).join(documents)
    with _naming(name, "calibration"):
        windows = sample_joined(tokenize(tokenizer, [joined])[0], nsamples, seqlen, seed)
    return windows, text_sha256(documents)


def evaluation_text(
    source: str | os.PathLike, *, split: str | None = None, text_field: str | None = None
) -> tuple[str, int | None]:
    """The text perplexity is measured on and the largest number of windows taken from it (None: all).

    wikitext2: test rows joined by a blank line; ptb: test sentences joined by a space; c4: the first 1100
    validation documents joined by a space, first 256 windows; slimpajama and local files: documents joined
    by a blank line.
    """
    named = NAMED_SETS.get(os.fspath(source))
    if named is None:
        return LOCAL_JOIN.join(load_documents(source, split, text_field)), None
    documents = load_documents(source, split or named.evaluation_split, limit=named.evaluation_documents)
    return named.evaluation_join.join(documents), named.evaluation_windows


def training_blocks(
    tokenizer: Any,
    source: str | os.PathLike,
    block_size: int,
    *,
    max_blocks: int | None = None,
    split: str | None = None,
    text_field: str | None = None,
    max_documents: int | None = None,
) -> tuple[Tensor, str]:
    """Packed training data of a source: (blocks, block_size) int64 and the SHA-256 of the text.

    max_blocks, max_documents  reading stops at whichever comes first, so that a large set is fetched only as far
                               as it is used; None: read everything
    The hash is over the documents that were read. Source: the concatenation of the published training script,
    but over all documents, where that drops the rest of every thousand and so depends on the number of workers.
    raises  ValueError naming the source when there are fewer tokens than one block.
    """
    digest = hashlib.sha256()
    documents = iter_documents(source, split, text_field, limit=max_documents)

    def token_ids() -> Iterator[list[int]]:
        while batch := list(islice(documents, TOKENIZE_BATCH)):
            for document, ids in zip(batch, tokenize(tokenizer, batch), strict=True):
                _hash_document(digest, document)
                yield ids

    with _naming(os.fspath(source), "training"):
        blocks = pack_blocks(token_ids(), block_size, max_blocks=max_blocks)
    return blocks, digest.hexdigest()


def text_sha256(documents: Iterable[str]) -> str:
    """SHA-256 over the documents, each as UTF-8 followed by one zero byte (so that borders count)."""
    digest = hashlib.sha256()
    for document in documents:
        _hash_document(digest, document)
    return digest.hexdigest()


def _hash_document(digest: Any, document: str) -> None:
    digest.update(document.encode("utf-8", "surrogatepass") + b"\0")


@contextlib.contextmanager
def _naming(source: str, use: str) -> Iterator[None]:
    """Puts the name of the source and its use before what a sampler or the packer refuses."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(source):  # from reading: it names the source, and the line
            raise
        raise ValueError(f"{use} text {source}: {error}") from None


def _check_sampling(nsamples: int, seqlen: int, seed: int) -> None:
    require_integer("nsamples", nsamples)
    require_integer("seqlen", seqlen)
    require_seed("seed", seed)
