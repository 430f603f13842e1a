"""Experts that the router sends few calibration tokens to: named before anything changes, then treated by one rule.

Statistics of a handful of tokens say little about an expert's inputs. With `few="magnitude"` such an expert is pruned
as if all its inputs were alike, which for every method is pruning by magnitude (an isotropic Hessian: no kept weight
moves). With "route" it is also called with tokens that the router sends elsewhere, those that it scores highest for the
expert first; their results go nowhere.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from patch.models.mixtures import Experts
from patch.models.stay_dense import mixtures
from patch.pruning.options import ExpertOptions

logger = logging.getLogger(__name__)

_ROUTE = "few='route' (--few-experts route) gives them more"


@dataclass(frozen=True)
class ExpertLayer:
    """Where a layer belongs: to expert `index` of the module `module` at the path `path`."""

    path: str
    index: int
    module: nn.Module


@dataclass(frozen=True)
class FewTokens:
    """What is done about the experts with few tokens.

    members  every layer of an expert, by name
    alike    names of layers that are pruned as if their inputs were all alike
    routed   {mixture: {expert: tokens that it is called with besides, for each sample}}
    """

    members: Mapping[str, ExpertLayer]
    alike: frozenset[str] = frozenset()
    routed: Mapping[Experts, Mapping[int, int]] = field(default_factory=dict)

    @contextmanager
    def routing(self, block: nn.Module) -> Iterator[None]:
        """Call the experts of a block with the tokens they lack besides, during the body."""
        with ExitStack() as undo:
            for parent in block.modules():
                for child in parent.children():
                    if isinstance(child, Experts) and (wanted := self.routed.get(child)):
                        undo.enter_context(_Forced(child, wanted, parent))
            yield


def expert_layers(model: nn.Module, names: Iterable[str]) -> dict[str, ExpertLayer]:
    """Which of the named layers belong to an expert."""
    found = mixtures(model)
    layers = {}
    for name in names:
        for path, module in found.items():
            if name.startswith(path + "."):
                index = name[len(path) + 1 :].partition(".")[0]
                layers[name] = ExpertLayer(path, int(index), module)
    return layers


def few_tokens(
    members: Mapping[str, ExpertLayer], tokens: Mapping[str, int], samples: int, options: ExpertOptions
) -> FewTokens:
    """Decide by how many tokens each layer of an expert is called with, and say it in one message.

    members  layers of experts, by name
    tokens   {layer name: tokens of the calibration text that reach it in the dense model}
    samples  of the text
    raises   ValueError naming all experts with few tokens, with few="refuse"
    """
    counts: dict[tuple[str, int], int] = {}
    for name, member in members.items():
        key = member.path, member.index
        counts[key] = max(counts.get(key, 0), tokens.get(name, 0))
    few = {key: count for key, count in counts.items() if count < options.tokens}
    if not few:
        return FewTokens(members)
    named = f"{len(few)} of {len(counts)} experts get fewer than {options.tokens} calibration tokens: {_names(few)}"
    if options.few == "refuse":
        raise ValueError(
            f"calibration: expected {options.tokens} tokens or more for every expert, but {named}. Give more text "
            f"(--nsamples, --seqlen); few='magnitude' prunes them by magnitude, {_ROUTE}, or leave them dense with "
            "exclude (--exclude)."
        )
    routed: dict[Experts, dict[int, int]] = {}
    alike = set()
    for name, member in members.items():
        key, module = (member.path, member.index), member.module
        can_route = isinstance(module, Experts) and module.form.takes == "routed"
        if key in few and options.few == "route" and can_route:
            routed.setdefault(cast(Experts, module), {})[member.index] = -(-(options.tokens - few[key]) // samples)
        elif key in few:
            alike.add(name)
    rules = []
    if alike:
        rules.append("they go by magnitude" if not routed else "the others go by magnitude")
    if routed:
        count = sum(len(experts) for experts in routed.values())
        rules.insert(0, f"{count} are called with more tokens, those that the router scores highest for them")
    more = "" if routed else f"; {_ROUTE}, as does more text"
    logger.warning("%s; %s%s", named, "; ".join(rules), more)
    return FewTokens(members, frozenset(alike), routed)


def inputs_alike(statistics: Any, weight: Tensor) -> Any:
    """Statistics of a layer (N, K) whose inputs are all alike: the identity as its one sample."""
    statistics.add(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device))
    return statistics


class _Forced:
    """Gives a mixture more rows for some experts, by the scores of the router beside it."""

    def __init__(self, experts: Experts, wanted: Mapping[int, int], parent: nn.Module):
        self._experts, self._wanted = experts, wanted
        self._routers = [child for child in parent.children() if child is not experts]
        self._hooks: list[Any] = []
        self._scores: Tensor | None = None

    def __enter__(self) -> None:
        self._hooks = [router.register_forward_hook(self._note) for router in self._routers]
        self._experts.extra_rows = self._rows

    def __exit__(self, *_: Any) -> None:
        self._experts.extra_rows = None
        for hook in self._hooks:
            hook.remove()

    def _note(self, router: nn.Module, args: Any, output: Any) -> None:
        """Of what a router returns the first matrix with a column for each expert."""
        for value in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == (self._experts.experts,):
                self._scores = value.detach().reshape(-1, value.shape[-1]).float()
                return

    def _rows(self, experts: Experts, hidden: Tensor, chosen: Tensor) -> dict[int, Tensor]:
        scores = self._scores
        if scores is None or len(scores) != len(hidden):
            scores = torch.zeros(len(hidden), experts.experts, device=hidden.device)
        rows = {}
        for index, count in self._wanted.items():
            others = (chosen != index).all(1).nonzero()[:, 0]
            best = scores[others, index].argsort(descending=True, stable=True)[:count]
            rows[index] = hidden[others[best]]
        return rows


def _names(few: Mapping[tuple[str, int], int]) -> str:
    """The experts by mixture, with their numbers of tokens."""
    of_path: dict[str, list[str]] = {}
    for (path, index), count in few.items():
        of_path.setdefault(path, []).append(f"{index} ({count})")
    return "; ".join(f"{path}: {', '.join(experts)}" for path, experts in of_path.items())
