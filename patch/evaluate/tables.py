"""Tables and CSV files of results."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from patch.files.atomic import write_text_atomic


def format_table(rows: Sequence[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """Rows with the same keys as an aligned table; texts to the left, numbers as given to the right.

    markdown  with | between the columns, for a README.
    raises    ValueError when there is no row or the keys differ.
    """
    header = _columns(rows)
    cells = [[str(row[name]) for name in header] for row in rows]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    is_text = [any(not _is_number(line[i]) for line in cells) for i in range(len(header))]
    lines = [_line(header, widths, is_text, markdown)]
    if markdown:
        rule = ("-" * width if text else "-" * (width - 1) + ":" for width, text in zip(widths, is_text, strict=True))
        lines.append("| " + " | ".join(rule) + " |")
    else:
        lines.append("  ".join("-" * width for width in widths))
    lines += [_line(line, widths, is_text, markdown) for line in cells]
    return "\n".join(lines)


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys as CSV, atomically; the keys are the header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=_columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        raise ValueError("rows: expected at least one result, got none. Evaluate a model first.")
    header = list(rows[0])
    other = next((row for row in rows if list(row) != header), None)
    if other is not None:
        raise ValueError(f"rows: expected the columns {header} in all, got {list(other)}. Give all rows the same.")
    return header


def _line(cells: Sequence[str], widths: Sequence[int], is_text: Sequence[bool], markdown: bool) -> str:
    padded = [
        cell.ljust(width) if text else cell.rjust(width)
        for cell, width, text in zip(cells, widths, is_text, strict=True)
    ]
    return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()


def _is_number(text: str) -> bool:
    return text in ("", "-") or text.rstrip("%x").replace(",", "").replace(".", "", 1).lstrip("-").isdigit()
