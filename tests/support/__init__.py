"""What several tests share. No test imports another test; this package may be imported by all."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
