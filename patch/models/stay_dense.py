"""Which nn.Linear layers of a decoder are never masked, found by structure: routers, layers whose model reads their
weight itself, and layers that compute something else than x @ weight.T + bias."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType

from torch import nn

from patch.models.mixtures import Experts

# What code may ask of a weight without computing with it.
_FACTS = {"device", "dim", "dtype", "is_meta", "ndim", "numel", "requires_grad", "shape", "size"}


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes x @ weight.T + bias, so that a masked or packed layer may take its place.

    A subclass of nn.Linear with a constructor and a forward of its own (a router that returns several tensors, a
    grouped product) does something else; one with only a forward writes the same in other words (Falcon).
    """
    kind = type(module)
    own = kind.__init__ is not nn.Linear.__init__ and kind.forward is not nn.Linear.forward
    return isinstance(module, nn.Linear) and (not own or hasattr(module, "lora_left"))


def router_linears(root: nn.Module) -> set[str]:
    """Names, from `root` on, of the layers that choose experts.

    They have one output per expert, beside a list of experts or their 3-D tensors. Pruned, they send tokens to other
    experts, which costs far more than the few weights they have.
    """
    names = set()
    for path, module in root.named_modules():
        counts = {count for child in module.children() if (count := _expert_count(child))}
        for key, child in module.named_children():
            linears = {name: m for name, m in child.named_modules(prefix=key) if isinstance(m, nn.Linear)}
            if linears and all(linear.out_features in counts for linear in linears.values()):
                names |= {f"{path}.{name}" if path else name for name in linears}
    return names


def mixtures(root: nn.Module) -> dict[str, nn.Module]:
    """{name from `root` on: module} of lists of experts beside a router, and of opened mixtures."""
    return {name: module for name, module in _experts(root).items() if isinstance(module, (Experts, nn.ModuleList))}


def unknown_experts(root: nn.Module) -> set[str]:
    """Names, from `root` on, of modules that hold experts as 3-D parameters in a form that cannot be opened."""
    return {name for name, module in _experts(root).items() if not isinstance(module, (Experts, nn.ModuleList))}


def _experts(root: nn.Module) -> dict[str, nn.Module]:
    """Modules with experts: beside each is one with a matrix of as many rows, which chooses them."""
    found: dict[str, nn.Module] = {}
    for path, module in root.named_modules():
        if isinstance(module, Experts):
            found[path] = module
        for key, child in module.named_children():
            count = _expert_count(child)
            others = (other for name, other in module.named_children() if name != key)
            if count > 1 and any(_chooses(other, count) for other in others):
                found[f"{path}.{key}" if path else key] = child
    return found


def _chooses(module: nn.Module, count: int) -> bool:
    """Whether a module has a matrix of `count` rows, and no list of experts."""
    return any(own.dim() == 2 and own.shape[0] == count for own in module.parameters()) and not _expert_count(module)


def directly_read_linears(root: nn.Module) -> set[str]:
    """Names, from `root` on, of the layers past which code computes with their weight or bias (Mamba's dt_proj).

    A mask learned in the layer has no effect there, hooks see no inputs, and a packed layer has no such weight. Read
    from the source of the methods of all modules, where there is one. What only a setting of the module turns on, as
    `if self.training:` with a fused kernel, does not count: there the run itself tells.
    """
    names = set()
    for path, module in root.named_modules():
        reads = [read for method in _methods(type(module)) for read in _reads_of(method)]
        own = {name for owner, name in reads if owner == "self"}
        below = tuple(f".{name}" for owner, name in reads if owner != "self")
        for name, layer in module.named_modules() if reads else ():
            if isinstance(layer, nn.Linear) and (name in own or name.endswith(below)):
                names.add(f"{path}.{name}" if path else name)
    return names


def _expert_count(module: nn.Module) -> int:
    """Number of experts in a list of equal modules with weights, or in a module with their weights as 3-D tensors."""
    if isinstance(module, Experts):
        return module.experts
    if isinstance(module, nn.ModuleList):
        kinds = {type(expert) for expert in module}
        has_weights = len(kinds) == 1 and any(True for _ in module[0].parameters())
        return len(module) if has_weights and len(module) > 1 else 0
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return 0
    sizes = {weight.shape[0] for weight in module.parameters(recurse=False) if weight.dim() == 3}
    return sizes.pop() if len(sizes) == 1 else 0


def _methods(kind: type[nn.Module]) -> tuple[FunctionType, ...]:
    """The methods of a class that run when it computes."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    members = ((name, member) for base in bases for name, member in vars(base).items() if "init" not in name)
    return tuple(inspect.unwrap(member) for _, member in members if inspect.isfunction(member))


@functools.cache
def _reads_of(method: FunctionType) -> tuple[tuple[str, str], ...]:
    """(owner, name) of what a function reads as owner.name.weight or owner.name.bias; none without its source."""
    try:
        return tuple(_reads(ast.parse(textwrap.dedent(inspect.getsource(method)))))
    except (OSError, TypeError, SyntaxError):  # made at run time, or the source is not installed
        return ()


def _reads(node: ast.AST) -> Iterator[tuple[str, str]]:
    match node:
        case ast.If(test=test) if any(isinstance(part, ast.Name) and part.id == "self" for part in ast.walk(test)):
            parts: Iterator[ast.AST] = iter(node.orelse)
        case ast.Attribute(attr=fact) if fact in _FACTS:
            return
        case ast.Attribute(attr="weight" | "bias", value=ast.Attribute() as layer):
            owner, _, name = ast.unparse(layer).partition(".")
            yield owner, name
            return
        case _:
            parts = ast.iter_child_nodes(node)
    for part in parts:
        yield from _reads(part)
