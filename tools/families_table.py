"""Writes docs/reference/families.md: every step of every model family of tests/support/families.py, run now.

python tools/families_table.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.families import DOCUMENT, FAMILIES, document, lines, outcomes  # noqa: E402


def main() -> None:
    rows = []
    for family in FAMILIES.values():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(lines(family, outcomes(family, Path(folder))))
        print(rows[-1][0])
    DOCUMENT.write_text(document(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
