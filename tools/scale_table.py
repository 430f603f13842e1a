"""Writes docs/inside/scale.md: what one-shot pruning of large models will cost, by the model that its plan line uses.

python tools/scale_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.scale import DOCUMENT, document  # noqa: E402


def main() -> None:
    DOCUMENT.write_text(document(), encoding="utf-8")


if __name__ == "__main__":
    main()
