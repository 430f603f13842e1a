"""Where text comes from: a local file, or one of the named sets c4, wikitext2, ptb, slimpajama.

A .txt file is one document, taken verbatim; a .jsonl or .parquet file has one document a row. The named sets
come from the Hugging Face hub through the `datasets` package; NAMED_SETS holds the conventions of the
literature for each: which files, which split and how its rows are joined.

Nothing here needs a whole large set: calibration and evaluation fetch one file of it, training streams it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from patch.files.lazy import needed
from patch.files.schema import require_choice, require_integer, shown


@dataclass(frozen=True)
class NamedSet:
    """Where a named set lives and by which convention of the literature it is joined.

    splits   fetched once, kept in the cache of `datasets` and mapped from disk: small sets as a whole, of
             large ones the first file
    streams  training data of a large set, read front to back over the network and only as far as needed;
             None for small sets, which train on their splits
    """

    hub_id: str
    config: str | None
    field: str
    splits: dict[str, dict[str, Any]]  # split -> further arguments of datasets.load_dataset
    calibration_join: str | None  # None: one window per random document that is long enough
    evaluation_join: str
    evaluation_split: str
    evaluation_documents: int | None = None
    evaluation_windows: int | None = None
    streams: dict[str, dict[str, Any]] | None = None


def _files(**names: str) -> dict[str, dict[str, Any]]:
    return {split: {"data_files": {split: name}, "split": split} for split, name in names.items()}


def _streams(**names: str) -> dict[str, dict[str, Any]]:
    return {split: arguments | {"streaming": True} for split, arguments in _files(**names).items()}


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
        streams=_streams(
            train="en/c4-train.*-of-01024.json.gz",
            validation="en/c4-validation.*-of-00008.json.gz",
        ),
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
        _files(
            train="data/train-00000-of-00048-*.parquet",
            validation="data/validation-*.parquet",
            test="data/test-*.parquet",
        ),
        calibration_join=None,
        evaluation_join="\n\n",
        evaluation_split="test",
        streams=_streams(
            train="data/train-*.parquet",
            validation="data/validation-*.parquet",
            test="data/test-*.parquet",
        ),
    ),
}

LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet")
LOCAL_JOIN = "\n\n"
DEFAULT_HELDOUT_WINDOWS = 64
CONNECT = "connect to the Hugging Face hub once (and unset HF_HUB_OFFLINE)"  # advice of messages


def require_source(what: str, name: str) -> str:
    """A named set, or a local file that is there; `what` begins the message."""
    if name not in NAMED_SETS and not Path(name).is_file():
        expected = f"expected a file ({', '.join(LOCAL_SUFFIXES)}) or one of {', '.join(NAMED_SETS)}"
        raise FileNotFoundError(f"{what}: {expected}, got {name!r}, which is no file. Check the path.")
    return name


def load_documents(
    source: str | os.PathLike,
    split: str | None = None,
    text_field: str | None = None,
    *,
    limit: int | None = None,
) -> list[str]:
    """Documents of a local file or of a named set, at most `limit` of them.

    split       named sets only; default "train". Of c4 and slimpajama this is the first file of the split.
    text_field  column of a .jsonl or .parquet file; default "text"
    raises      FileNotFoundError for an unknown source, ValueError for a file without usable text,
                ConnectionError when a named set cannot be fetched.
    """
    _check_limit(limit)
    name = os.fspath(source)
    if name in NAMED_SETS:
        rows = named_rows(name, split or "train")
        if limit is not None:
            rows = rows.select(range(min(limit, len(rows))))
        documents = list(rows[NAMED_SETS[name].field])
    else:
        documents = list(islice(_read_local(name, split, text_field), limit))
    if not any(document.strip() for document in documents):
        raise _no_text(name)
    return documents


def iter_documents(
    source: str | os.PathLike,
    split: str | None = None,
    text_field: str | None = None,
    *,
    limit: int | None = None,
) -> Iterator[str]:
    """Documents of a source one after the other, in the order of its files, at most `limit` of them.

    c4 and slimpajama are streamed over all files of the split, .jsonl and .parquet files are read in pieces:
    what is not asked for is neither fetched nor held. Arguments and errors as in `load_documents`; arguments
    are checked here, a damaged row or a source without any text is reported when the iteration gets there.
    """
    _check_limit(limit)
    name = os.fspath(source)
    if name in NAMED_SETS:
        documents = _read_named(name, split or "train")
    else:
        documents = _read_local(name, split, text_field)
    return _refuse_empty(name, islice(documents, limit))


def named_rows(name: str, split: str) -> Any:
    """Rows of a split of a named set (datasets.Dataset), mapped from disk: random access without holding the text.

    raises  ValueError for an unknown split, ConnectionError when the set cannot be fetched.
    """
    return _load_dataset(name, split, NAMED_SETS[name].splits)


def _check_limit(limit: int | None) -> None:
    if limit is not None:
        require_integer("limit", limit, advice="Leave it out to read everything.")


def _no_text(name: str) -> ValueError:
    return ValueError(f"{name}: expected text, found only empty documents; check the file and text_field")


def _refuse_empty(name: str, documents: Iterator[str]) -> Iterator[str]:
    """The documents; raises at the end when none of them had text."""
    is_empty = True
    for document in documents:
        is_empty = is_empty and not document.strip()
        yield document
    if is_empty:
        raise _no_text(name)


def _read_local(name: str, split: str | None, text_field: str | None) -> Iterator[str]:
    """Documents of a local file; its path and kind are checked now, its content while it is read."""
    path = Path(name)
    if split is not None:
        raise ValueError(f"expected no split for the local file {name}, got {split!r}; give the file of that split")
    require_source("source", name)
    if path.suffix not in LOCAL_SUFFIXES:
        raise ValueError(f"{path}: expected a file ending in {', '.join(LOCAL_SUFFIXES)}; rename or convert it")
    return _READERS[path.suffix](path, text_field or "text")


def _read_text(path: Path, text_field: str) -> Iterator[str]:
    with _utf8_file(path) as file:
        text = file.read()
    if (place := text.find("\0")) >= 0:
        got = f"found a NUL at character {place}, as UTF-16 and binary files have"
        raise ValueError(f"{path}: expected UTF-8 text, {got}; convert it")
    yield text


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    with _utf8_file(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = _text_of(line, text_field)
            except (ValueError, RecursionError) as error:
                expected = f"expected JSON with text in the field {text_field!r}"
                got = f"got {line.strip()[:80]!r} ({error})"
                raise ValueError(f"{path}: line {number}: {expected}, {got}; correct it or set text_field") from None
            yield text


def _text_of(line: str, text_field: str) -> str:
    """Text of a row; ValueError says what is wrong with it."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("no fields by name")
    if text_field not in row:
        raise ValueError(f"its fields are {', '.join(row)[:80]}")
    text = row[text_field]
    if not isinstance(text, str):
        raise ValueError(f"the field holds {shown(text)}, no text")
    text.encode()  # fails for half of a UTF-16 pair, which JSON can write and no tokenizer takes
    return text


@contextlib.contextmanager
def _utf8_file(path: Path) -> Iterator[TextIO]:
    try:
        # newline="": line ends are part of the text, so that its hash and tokens are those of the file.
        with open(path, encoding="utf-8", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error.reason} at byte {error.start}); convert it") from None


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    why = f"{path}: reading parquet needs pyarrow"
    pyarrow, parquet = needed("pyarrow", why, "pyarrow"), needed("pyarrow.parquet", why, "pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow
            if text_field not in columns.names or not _is_text(columns.field(text_field).type):
                got = f"got the columns {columns.names[:20]}"
                raise ValueError(f"{path}: expected text in the column {text_field!r}, {got}; set text_field")
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}); copy it again") from None


_PARQUET_ROWS = 1024
_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _is_text(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _read_named(name: str, split: str) -> Iterator[str]:
    """Documents of a named set: streamed if it is large, from the cache otherwise."""
    named = NAMED_SETS[name]
    rows = _load_dataset(name, split, named.streams or named.splits)

    def documents() -> Iterator[str]:
        try:
            for row in rows:
                yield row[named.field]
        except Exception as error:  # a stream meets the network only while it is read
            raise _unreachable(name, error) from error

    return documents()


def _load_dataset(name: str, split: str, arguments: dict[str, dict[str, Any]]) -> Any:
    named = NAMED_SETS[name]
    require_choice(f"{name}, split", split, arguments)
    datasets = needed("datasets", f"the named set {name!r} needs the datasets package", "datasets")
    try:
        return datasets.load_dataset(named.hub_id, named.config, **arguments[split])
    except Exception as error:
        # datasets raises many kinds for one cause: the set is neither cached nor reachable.
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"expected to load {NAMED_SETS[name].hub_id!r} for the named set {name!r}, got {type(error).__name__}: "
        f"{error}; {CONNECT}, or pass a local {', '.join(LOCAL_SUFFIXES)} file"
    )
