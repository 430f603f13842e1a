"""Reads and checks the header of a safetensors file before any tensor is allocated.

A safetensors file is an 8-byte little-endian header length, a JSON header and the tensor bytes. All figures
in the header are checked against each other and against the size of the file, so the cost of a hostile file
is bounded by its own size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch.files.regular import open_regular
from patch.files.strict_json import is_count, parse_json

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8

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


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor: dtype as safetensors writes it ("U8", "BF16", ...), shape, "
    "bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: str | os.PathLike) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of the tensors of a safetensors file.

    raises  FileNotFoundError, or ValueError naming the file, the tensor and the broken rule.
    """
    path = Path(path)
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path}: expected a safetensors header of 2 to {MAX_HEADER_BYTES} bytes inside a file of "
                f"{size} "
                f"bytes, its length field says {length}; the file was truncated or is another kind"
            )
        data = file.read(length)
    try:
        header = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: safetensors header is not valid JSON ({error}); copy the file again") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: expected a JSON object as safetensors header; copy the file again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: expected __metadata__ to map text to text; copy the file again")
    return _check_tensors(path, header, size - 8 - length)


def _check_tensors(path: Path, header: dict[str, Any], data_bytes: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        tensors[name], begin, end = _check_tensor(path, name, entry)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(
                f"{path}: tensor {name!r} starts at byte {begin}, expected {position} (no gap, no overlap); "
                "copy the file again"
            )
        position = end
    if position != data_bytes:
        raise ValueError(
            f"{path}: the header describes {position} bytes of tensors, the file holds {data_bytes}; it was "
            "truncated or extended, copy it again"
        )
    return tensors


def _check_tensor(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: expected dtype, shape and data_offsets; copy the file again")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{where}: unknown dtype {str(dtype)[:40]!r}, expected one of {sorted(ITEM_BYTES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(is_count, shape)):
        raise ValueError(f"{where}: expected a shape of at most {MAX_DIMENSIONS} sizes >= 0, got {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise ValueError(f"{where}: expected two data offsets >= 0, got {str(offsets)[:80]}")
    nbytes = ITEM_BYTES[dtype]
    for length in shape:
        nbytes *= length  # Python integers: no overflow
    begin, end = offsets
    if end - begin != nbytes:
        raise ValueError(
            f"{where}: {dtype} of shape {str(shape)[:80]} takes {nbytes} bytes, its offsets span "
            f"{end - begin}; "
            "copy the file again"
        )
    return TensorInfo(dtype, tuple(shape), nbytes), begin, end
