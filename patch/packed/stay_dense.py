"""Linear layers that a packed layer cannot stand for: the model reads their weight, or they compute something else."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from patch.models.structure import linear_at

# `self.x_proj.weight`, or `block.attention.output.weight` of a child, in a method. Its device is no reading: a packed
# layer has the same.
_READ = re.compile(r"\b(\w+)\.(\w+(?:\.\w+)*)\.weight\b(?!\.device)")
_NOT_RUN = {"__init__", "_init_weights", "reset_parameters"}


def layers_that_stay_dense(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the nn.Linear layers `names` that cannot be packed, in order."""
    read = layers_read_directly(model)
    return sorted(name for name in names if name in read or not _is_plain(linear_at(model, name)))


def layers_read_directly(model: nn.Module) -> set[str]:
    """Names of the nn.Linear layers whose weight a module's own methods read, such as Mamba's x_proj and dt_proj.

    Found in the source of the modules' classes; a class without source counts as one that reads nothing.
    """
    found = set()
    for name, module in model.named_modules():
        own, below = _weights_read_by(type(module))
        if not own | below:
            continue
        for path, layer in module.named_modules():
            is_read = path in own or any(path.endswith(f".{end}") for end in below)
            if is_read and isinstance(layer, nn.Linear):
                found.add(f"{name}.{path}" if name else path)
    return found


@torch.no_grad()
def _is_plain(linear: nn.Linear) -> bool:
    """Whether a layer computes x W^T + bias; a class with a forward of its own (a router, say) is tried out."""
    if type(linear).forward is nn.Linear.forward:
        return True
    weight = linear.weight
    x = torch.linspace(-1, 1, 2 * linear.in_features).to(weight).reshape(2, -1)
    expected = functional.linear(x, weight, linear.bias)
    try:
        y = linear(x)
    except Exception:  # whatever a class of another kind does not like about x
        return False
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, rtol=0.02, atol=0.02)


def _weights_read(cls: type) -> tuple[frozenset[str], frozenset[str]]:
    """Paths whose weight the methods of a class read: below `self`, and below other names."""
    reads: set[tuple[str, str]] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, member in vars(base).items():
            if inspect.isfunction(member) and name not in _NOT_RUN:
                try:
                    reads.update(_READ.findall(inspect.getsource(inspect.unwrap(member))))
                except (OSError, TypeError):  # made at run time
                    continue
    own, others = (frozenset(p for owner, p in reads if (owner == "self") == is_self) for is_self in (True, False))
    return own, others


_weights_read_by: Callable[[type], tuple[frozenset[str], frozenset[str]]] = functools.cache(_weights_read)
