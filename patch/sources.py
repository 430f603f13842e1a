"""Where text comes from: a local file, or one of the named sets c4, wikitext2, ptb, slimpajama.

A .txt file is one document, taken verbatim; a .jsonl or .parquet file has one document a row. The named sets
come from the Hugging Face hub through the `datasets` package; NAMED_SETS holds the conventions of the
literature for each: which split and how its rows are joined.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class NamedSet:
    """Where a named set lives and by which convention of the literature it is joined."""

    hub_id: str
    config: str | None
    field: str
    splits: dict[str, dict[str, Any]]  # split -> further arguments of datasets.load_dataset
    calibration_join: str | None  # None: one window per random document that is long enough
    evaluation_join: str
    evaluation_split: str
    evaluation_documents: int | None = None
    evaluation_windows: int | None = None


def _files(**names: str) -> dict[str, dict[str, Any]]:
    return {split: {"data_files": {split: name}, "split": split} for split, name in names.items()}


def _splits(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": name} for name in names}


NAMED_SETS = {
    "c4": NamedSet(
        "allenai/c4",
        None,
        "text",
        _files(
            train="en/c4-train.00000-of-01024.json.gz",
            validation="en/c4-validation.00000-of-00008.json.gz",
        ),
        calibration_join=None,
        evaluation_join=" ",
        evaluation_split="validation",
        evaluation_documents=1100,
        evaluation_windows=256,
    ),
    "wikitext2": NamedSet(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "text",
        _splits("train", "validation", "test"),
        calibration_join=" ",
        evaluation_join="\n\n",
        evaluation_split="test",
    ),
    "ptb": NamedSet(
        "ptb-text-only/ptb_text_only",
        None,
        "sentence",
        # The set itself is a script, which datasets >= 4 does not run; the hub keeps a converted copy.
        {
            split: {
                "data_files": {split: f"penn_treebank/{split}/0000.parquet"},
                "revision": "refs/convert/parquet",
                "split": split,
            }
            for split in ("train", "validation", "test")
        },
        calibration_join=" ",
        evaluation_join=" ",
        evaluation_split="test",
    ),
    "slimpajama": NamedSet(
        "DKYoon/SlimPajama-6B",
        None,
        "text",
        _splits("train", "validation", "test"),
        calibration_join=None,
        evaluation_join="\n\n",
        evaluation_split="test",
    ),
}

LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet")
LOCAL_JOIN = "\n\n"


def load_documents(
    source: str | os.PathLike,
    split: str | None = None,
    text_field: str | None = None,
    *,
    limit: int | None = None,
) -> list[str]:
    """Documents of a local file or of a named set, at most `limit` of them.

    split       named sets only; default "train"
    text_field  column of a .jsonl or .parquet file; default "text"
    raises      FileNotFoundError for an unknown source, ValueError for a file without usable text,
                ConnectionError when a named set cannot be fetched.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"expected limit >= 1, got {limit}; leave it out to read everything")
    name = os.fspath(source)
    if name in NAMED_SETS:
        documents = _load_named(name, split or "train", limit)
    else:
        if split is not None:
            raise ValueError(f"expected no split for the local file {name}, got {split!r}; give the file of that split")
        documents = _load_local(Path(name), text_field or "text", limit)
    if not any(document.strip() for document in documents):
        raise ValueError(f"{name}: expected text, found only empty documents; check the file and its text field")
    return documents


def _load_local(path: Path, text_field: str, limit: int | None) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a text file ({', '.join(LOCAL_SUFFIXES)}) or one of {sorted(NAMED_SETS)}, got "
            f"{str(path)!r}, "
            "which is no file; check the path"
        )
    if path.suffix not in LOCAL_SUFFIXES:
        raise ValueError(f"{path}: expected a file ending in {', '.join(LOCAL_SUFFIXES)}; rename or convert it")
    if path.suffix == ".parquet":
        return _load_parquet(path, text_field, limit)
    try:
        # newline="": line ends are part of the text, so that its hash and tokens are those of the file.
        with open(path, encoding="utf-8", newline="") as file:
            if path.suffix == ".txt":
                return [file.read()]
            return _load_jsonl(path, file, text_field, limit)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text ({error.reason} at byte {error.start}); convert the file"
        ) from None


def _load_jsonl(path: Path, lines: Iterable[str], text_field: str, limit: int | None) -> list[str]:
    documents: list[str] = []
    for number, line in enumerate(lines, 1):
        if limit is not None and len(documents) == limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not valid JSON ({error}); fix or remove it") from None
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            fields = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"{path}: line {number}: expected text in the field {text_field!r}, got {str(fields)[:200]}; "
                "set text_field"
            )
        documents.append(row[text_field])
    return documents


def _load_parquet(path: Path, text_field: str, limit: int | None) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path}: reading parquet needs pyarrow; run: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = file.schema_arrow
        if text_field not in columns.names or not _is_text(columns.field(text_field).type):
            raise ValueError(
                f"{path}: expected text in the column {text_field!r}, got the columns {columns.names[:20]}; "
                "set text_field"
            )
        documents: list[str] = []
        for batch in file.iter_batches(columns=[text_field]):
            documents += [text for text in batch.column(0).to_pylist() if text is not None]
            if limit is not None and len(documents) >= limit:
                break
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}); copy it again") from None
    return documents[:limit]


def _is_text(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _load_named(name: str, split: str, limit: int | None) -> list[str]:
    named = NAMED_SETS[name]
    if split not in named.splits:
        raise ValueError(f"{name}: expected one of the splits {sorted(named.splits)}, got {split!r}")
    try:
        import datasets
    except ImportError:
        raise ImportError(f"the named set {name!r} needs the datasets package; run: pip install datasets") from None
    try:
        rows = datasets.load_dataset(named.hub_id, named.config, **named.splits[split])
    except Exception as error:
        # datasets raises many kinds for one cause: the set is neither cached nor reachable.
        raise ConnectionError(
            f"expected to load {named.hub_id!r} for the named set {name!r}, got {type(error).__name__}: "
            f"{error}; connect "
            "to the Hugging Face hub once (and unset HF_HUB_OFFLINE), or pass a local "
            f"{', '.join(LOCAL_SUFFIXES)} file"
        ) from error
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    return list(rows[named.field])
