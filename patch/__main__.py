"""`python -m patch` is the command `patch-llm`."""

from __future__ import annotations

import sys

from patch.cli import main

if __name__ == "__main__":
    sys.exit(main())
