"""JSON without the leniencies of Python's parser: no duplicate keys, no NaN, bounded size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patch.files.regular import read_regular

MAX_JSON_BYTES = 64 << 20


def read_json(path: Path) -> Any:
    """Strict JSON: regular file, bounded size, UTF-8, no duplicate keys, no NaN or Infinity."""
    data = read_regular(path, MAX_JSON_BYTES)
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file was damaged, save it again") from None


def parse_json(data: bytes) -> Any:
    """json.loads without its leniencies; every failure is a ValueError."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not allowed")

    def finite(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"number {text} is too large")
        return value

    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=no_duplicates,
            parse_constant=no_constant,
            parse_float=finite,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def dump_json(value: Any) -> bytes:
    """JSON text of `value`; raises ValueError for NaN and TypeError for what JSON cannot hold."""
    # No line end after it: then a file cut by one byte is no longer valid JSON.
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode("utf-8")
