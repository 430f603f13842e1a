"""What is imported when it is asked for: names of our packages, and packages that not every installation has.

Settings alone must not cost the import of torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def needed(module: str, why: str, package: str) -> Any:
    """A module of an optional package; raises ImportError with what needs it and the command that installs it."""
    try:
        importlib.import_module(module.partition(".")[0])  # also where a part of it was imported before
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(f"{why}; run: pip install {package}") from None


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that has its public names in sub-modules.

    homes  {public name: sub-module that defines it}
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *homes})
