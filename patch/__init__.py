"""PATCH: learn which tiles of a language model's weights stay dense and which become 2:4 sparse.

Importing this package is cheap: torch and transformers are imported by the modules that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from patch.packed import load


def __getattr__(name: str) -> Any:
    if name == "load":
        from patch.packed import load

        return load
    raise AttributeError(f"module 'patch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "load"])
