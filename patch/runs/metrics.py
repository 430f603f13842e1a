"""metrics.jsonl: one JSON object per logged step, kept in line with the checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from patch.files.atomic import write_text_atomic

METRICS = "metrics.jsonl"


class MetricsLog:
    """metrics.jsonl of a run. `lines` holds every record, from before a resume too.

    Records after the step that the run resumes from, and a half-written last line, are dropped on opening, so
    the file of a resumed run has the lines of an uninterrupted one, each once.
    """

    def __init__(self, path: Path | None, resume_step: int = 0) -> None:
        self.lines: list[dict[str, Any]] = []
        self._path, self._file = path, None
        if path is None:
            return
        if path.exists():
            self.lines = [record for record in read_metrics(path) if record["step"] <= resume_step]
            text = "".join(json.dumps(record) + "\n" for record in self.lines)
            write_text_atomic(path, text)
        self._file = open(path, "a", encoding="ascii")

    def write(self, record: dict[str, Any]) -> None:
        self.lines.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Force the lines to the disk; done before a checkpoint that relies on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl. A damaged last line (killed while writing) is dropped, another refused."""
    lines = path.read_text(encoding="ascii", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            # Complete lines end in a newline, so what follows the last one is unfinished or empty.
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is not JSON; move the file away to resume without it") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}: line {number} has no step; move the file away to resume without it")
        records.append(record)
    return records
