"""Reads and checks the header of a safetensors file before any tensor is allocated.

A safetensors file is an 8-byte little-endian header length, a JSON header and the tensor bytes. All figures
in the header are checked against each other and against the size of the file, so the cost of a hostile file
is bounded by its own size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from patch.files.regular import open_regular
from patch.files.schema import Count, Says, listed, parse, record
from patch.files.strict_json import parse_json

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
_ADVICE = "Copy the file again."

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}


@record
class Entry:
    """A tensor in the header."""

    dtype: Annotated[str, Field(pattern=f"^({'|'.join(ITEM_BYTES)})$"), Says(f"one of {', '.join(ITEM_BYTES)}")]
    shape: Annotated[list[Count], Field(max_length=MAX_DIMENSIONS), Says(f"at most {MAX_DIMENSIONS} sizes >= 0")]
    data_offsets: Annotated[tuple[Count, Count], Says("two data offsets >= 0")]

    @property
    def nbytes(self) -> int:
        """Bytes that dtype and shape take."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)  # Python integers: no overflow

    @model_validator(mode="after")
    def _spans_its_bytes(self) -> Entry:
        span = self.data_offsets[1] - self.data_offsets[0]
        if span != self.nbytes:
            what = f"{self.dtype} of shape {str(self.shape)[:80]}"
            raise ValueError(f"expected offsets that span {self.nbytes} bytes, {what}, got {span}. {_ADVICE}")
        return self


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor: dtype as safetensors writes it ("U8", "BF16", ...), shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class TensorRule:
    """What a tensor of a file has to be: of one of these dtypes, and of this shape.

    shape     sizes; a range stands for the sizes in it, a name for any size >= 1
    optional  the tensor may be missing
    """

    dtypes: tuple[str, ...]
    shape: tuple[int | range | str, ...]
    optional: bool = False

    def fits(self, info: TensorInfo | None) -> bool:
        """Whether a tensor is as it has to be; None: it is missing."""
        if info is None:
            return self.optional
        if info.dtype not in self.dtypes or len(info.shape) != len(self.shape):
            return False
        return all(
            size >= 1 if isinstance(wanted, str) else size in (wanted if isinstance(wanted, range) else (wanted,))
            for size, wanted in zip(info.shape, self.shape, strict=True)
        )

    def __str__(self) -> str:
        sizes = [f"{n.start} to {n.stop - 1}" if isinstance(n, range) else str(n) for n in self.shape]
        return f"{' or '.join(self.dtypes)} ({', '.join(sizes)}{',' * (len(sizes) == 1)})"


def require_tensors(
    where: str | os.PathLike[str],
    header: Mapping[str, TensorInfo],
    rules: Mapping[str, TensorRule | str],
    advice: str,
    *,
    others: bool = False,
) -> None:
    """Refuse tensors that are missing or not as they have to be, and those without a rule unless `others` are allowed.

    rules   {name: what the tensor has to be, or, where there must be none of that name, the words for that}
    """
    for name, rule in rules.items():
        info = header.get(name)
        if not (info is None if isinstance(rule, str) else rule.fits(info)):
            raise ValueError(f"{where}: {name}: expected {rule}, got {info or 'nothing'}. {advice}")
    if not others and (unknown := sorted(header.keys() - rules.keys())):
        raise ValueError(f"{where}: expected tensors of its layers only, got also {listed(unknown)}. {advice}")


def read_header(path: str | os.PathLike) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of the tensors of a safetensors file.

    raises  FileNotFoundError, or ValueError naming the file, the tensor and the broken rule.
    """
    path = Path(path)
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            limits = f"a safetensors header of 2 to {MAX_HEADER_BYTES} bytes inside a file of {size} bytes"
            raise ValueError(f"{path}: expected {limits}, its length field says {length}. {_ADVICE}")
        data = file.read(length)
    try:
        header = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: safetensors header is not valid JSON ({error}). {_ADVICE}") from None
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
    parse(dict[str, str], metadata, f"{path}: __metadata__.", _ADVICE)
    entries = parse(dict[str, Entry], header, f"{path}: ", _ADVICE)
    _refuse_gaps(path, entries, size - 8 - length)
    return {name: TensorInfo(entry.dtype, tuple(entry.shape), entry.nbytes) for name, entry in entries.items()}


def _refuse_gaps(path: Path, entries: Mapping[str, Entry], data_bytes: int) -> None:
    spans = sorted((*entry.data_offsets, f"tensor {name[:200]!r}") for name, entry in entries.items())
    position = 0
    for begin, end, what in [*spans, (data_bytes, data_bytes, "the end of the file")]:
        if begin != position:
            raise ValueError(
                f"{path}: expected {what} at byte {position} (no gap, no overlap), got byte {begin}. {_ADVICE}"
            )
        position = end
