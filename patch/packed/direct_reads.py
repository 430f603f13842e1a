"""Linear layers whose weight is read by the module around them instead of by calling the layer."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable

from torch import nn

# `self.x_proj.weight` in a method; where it is and in which device does not matter to a packed layer.
_READ = re.compile(r"\bself\.(\w+(?:\.\w+)*)\.weight\b(?!\.device)")
_NOT_RUN = {"__init__", "_init_weights", "reset_parameters"}


def layers_read_directly(model: nn.Module) -> set[str]:
    """Names of the nn.Linear layers whose weight a module's own methods read, such as Mamba's x_proj and dt_proj.

    Found in the source of the modules' classes; a class without source counts as one that reads nothing.
    """
    found = set()
    for name, module in model.named_modules():
        for path in _weights_read_by(type(module)):
            try:
                layer = module.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(layer, nn.Linear):
                found.add(f"{name}.{path}" if name else path)
    return found


def _weights_read(cls: type) -> frozenset[str]:
    """Paths below `self` whose weight the methods of a class read."""
    paths: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, member in vars(base).items():
            if inspect.isfunction(member) and name not in _NOT_RUN:
                try:
                    paths.update(_READ.findall(inspect.getsource(inspect.unwrap(member))))
                except (OSError, TypeError):  # made at run time
                    continue
    return frozenset(paths)


_weights_read_by: Callable[[type], frozenset[str]] = functools.cache(_weights_read)
