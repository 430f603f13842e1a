"""Reorder the channels of a dense model so that 2:4 patterns cost less, without changing what it computes.

2:4 keeps two of every four neighbouring columns, so it matters which columns are neighbours. A layer's columns can be
reordered where the layers that write them are reordered alike:
- inner channels of an MLP: columns of down_proj, rows of gate_proj and up_proj;
- channels of a value head: columns of o_proj, rows of v_proj. They stay in their head, in one order for all query heads
  that read it;
- channels of the residual stream, in one order for the whole model: columns of the layers that read it (q, k, v, gate,
  up), rows of those that write it, embeddings, norms and the output head.
The model stays an ordinary dense model, and nothing is left to do when it runs. Sources: Pool and Yu, "Channel
Permutations for N:M Sparsity", 2021; PermLLM (arXiv 2510.10136).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from patch.models.checks import check_device, require_finite_model, require_tokens
from patch.models.keep_masks import keep_masks
from patch.models.modes import block_device, calibration_mode
from patch.models.structure import decoder_blocks, decoder_of, input_embeddings, linear_at, maskable_linears
from patch.pruning.channel_search import DEFAULT_STEPS, best_order
from patch.pruning.fisher import tile_losses
from patch.pruning.hessian import Statistics, removal_costs
from patch.pruning.options import DEFAULT_DAMPING, GROUP
from patch.pruning.selection import working_dtype
from patch.pruning.sequential import update_blocks

logger = logging.getLogger(__name__)

# Siblings whose rows are the columns of another one, by the names that transformers gives them.
_MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("up_proj",), "down_proj"), (("fc1",), "fc2"), (("c_fc",), "c_proj"))
_ATTENTIONS = ((("v_proj",), "o_proj"), (("v_proj",), "out_proj"))
_OTHER_MODEL = "Use the orders of this model."
# Rows that an order of the residual stream is found from: 128 MiB for a hidden size of 4096.
_STREAM_ROWS = 8192
# Calibration samples whose gradients say what a layer is worth.
_SAMPLES = 16


@dataclass(frozen=True)
class ChannelOrders:
    """Orders of channels, int64 on the CPU: the new channel j is the old channel order[j].

    inner   {layer whose columns they are: (channels,)}, of an MLP, or of the value heads that an attention has
    hidden  (hidden size,) of the residual stream; None: as it was
    """

    inner: dict[str, Tensor]
    hidden: Tensor | None = None

    @property
    def inverse(self) -> ChannelOrders:
        """What `apply_orders` undoes these with."""
        inner = {name: order.argsort() for name, order in self.inner.items()}
        return ChannelOrders(inner, None if self.hidden is None else self.hidden.argsort())


@dataclass(frozen=True)
class _Fold:
    """Layers that write the columns of another one: `heads` of their rows, each read by `queries` heads of columns."""

    writers: tuple[str, ...]
    heads: int = 1
    queries: int = 1

    def columns(self, order: Tensor) -> Tensor:
        """Order of the columns that goes with an order of the writers' rows."""
        width = len(order) // self.heads
        inside = (order.reshape(self.heads, 1, width) % width).expand(-1, self.queries, -1)
        return (inside + width * torch.arange(self.heads * self.queries).reshape(self.heads, self.queries, 1)).flatten()

    def by_row(self, costs: Tensor) -> Tensor:
        """Costs (N, K) of the columns as (N * queries, rows of the writers)."""
        heads = costs.reshape(len(costs), self.heads, self.queries, -1)
        return heads.transpose(1, 2).reshape(len(costs) * self.queries, -1)


def permute_channels(
    model: nn.Module,
    calibration: Tensor,
    *,
    hidden: bool = True,
    steps: int = DEFAULT_STEPS,
    damping: float = DEFAULT_DAMPING,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> ChannelOrders:
    """Reorder the channels of a dense causal language model in place, for 2:4 patterns that cost less.

    calibration  (samples, seqlen) int64 token ids
    hidden       reorder the residual stream too: embeddings, norms and the output head then change as well
    steps        of the search; each exchanges one channel of every group
    damping      share of the mean diagonal added to the Hessian of a layer's inputs
    seed         of the order in which the search goes through the channels
    device       where each block is put while it is worked on; None: where it is
    progress     say on stderr how far it is
    returns      the orders that were applied; `apply_orders` gives another copy of the model the same ones
    raises       ValueError or TypeError before any work; for a model in which nothing can be reordered too

    Masks and artifacts made from the model before do not fit it afterwards. Channels that the model reads in a way that
    is not known here stay where they are: a warning says which. Without hidden, and where the stream stays as it is,
    layers that read it keep the order of their columns.
    """
    require_tokens(model, calibration, "calibration")
    decoder_blocks(model)
    check_device(device)
    linears = maskable_linears(model)
    require_finite_model(model)
    if keep_masks(model):
        raise ValueError("model: expected a dense one, got one with masks. Permute before pruning.")
    folds = _folds(model, linears)
    if not folds:
        raise ValueError(
            f"model: expected an MLP of gate_proj, up_proj and down_proj, or an attention with v_proj and o_proj, got "
            f"{type(model).__name__} with {', '.join(sorted({name.rpartition('.')[2] for name in linears}))}. "
            "Prune it without permuting."
        )
    stream = _stream(model, folds) if hidden else {}
    # Those that write the inner channels read the stream, with the queries and keys beside them.
    readers = [name for name in linears if stream.get(f"{name}.weight") == 1]
    losses = _layer_losses(model, readers, calibration, device, progress)
    generator = torch.Generator().manual_seed(seed)
    inner: dict[str, Tensor] = {}
    of_stream: list[Tensor] = []

    def weigh(name: str, linear: nn.Linear, statistics: Statistics) -> None:
        costs = removal_costs(linear.weight, statistics.hessian, damping)
        if name in readers:
            rows = torch.randperm(len(costs), generator=generator)[: max(1, _STREAM_ROWS // len(readers))]
            # Layers differ in scale, and their outputs with them: all are brought to the loss of the model.
            of_stream.append((costs[rows.to(costs.device)] * (losses[name] / costs.sum())).cpu())
        if name in folds:
            fold = folds[name]
            inner[name] = best_order(fold.by_row(costs), fold.heads, steps, generator)

    update_blocks(
        model,
        {name: linear for name, linear in linears.items() if name in folds or name in readers},
        calibration,
        lambda weight: Statistics(weight.shape[1], dtype=working_dtype(weight), device=weight.device),
        weigh,
        device=device,
        what="permuting channels",
        progress=progress,
    )
    order = best_order(torch.cat(of_stream), 1, steps, generator) if of_stream else None
    return _apply_checked(model, ChannelOrders(inner, order), calibration[:1])


def _layer_losses(
    model: nn.Module, names: Sequence[str], calibration: Tensor, device: torch.device | str | None, progress: bool
) -> dict[str, float]:
    """What the weights of a layer are worth to the model: the loss that all of them add when they are pruned."""
    masks = {name: torch.zeros_like(linear_at(model, name).weight, dtype=torch.bool, device="cpu") for name in names}
    if not masks:
        return {}
    whole = max(max(keep.shape) for keep in masks.values())
    samples = calibration[:_SAMPLES]
    found = tile_losses(model, masks, samples, (whole, whole), device=device, progress=progress)
    return {name: float(loss.sum()) for name, loss in found.items()}


def can_permute(model: nn.Module) -> bool:
    """Whether `permute_channels` knows channels of this model that can be reordered."""
    return bool(_folds(model, maskable_linears(model)))


@torch.no_grad()
def apply_orders(model: nn.Module, orders: ChannelOrders) -> None:
    """Reorder the channels of a dense model in place; raises ValueError, before any work, for orders of another."""
    linears = maskable_linears(model)
    folds = _folds(model, linears)
    moves: list[tuple[str, int, Tensor]] = []
    for name, order in orders.inner.items():
        if name not in folds:
            raise ValueError(f"orders: expected layers of {type(model).__name__}, got '{name}'. {_OTHER_MODEL}")
        fold = folds[name]
        rows = linear_at(model, fold.writers[0]).out_features
        _check_order(order, rows, fold.heads, name)
        moves.append((f"{name}.weight", 1, fold.columns(order)))
        moves += [(f"{writer}.{kind}", 0, order) for writer in fold.writers for kind in ("weight", "bias")]
    if orders.hidden is not None:
        stream = _stream(model, folds)
        if not stream:
            raise ValueError(f"orders: expected none of the residual stream for this model, got one. {_OTHER_MODEL}")
        _check_order(orders.hidden, input_embeddings(model).weight.shape[1], 1, "hidden")
        moves += [(name, dim, orders.hidden) for name, dim in stream.items()]
    parameters = dict(model.named_parameters())
    for name, dim, order in moves:
        if name in parameters:  # not every layer has a bias
            parameter = parameters[name]
            parameter.copy_(parameter.index_select(dim, order.to(parameter.device)))


def _check_order(order: Tensor, size: int, heads: int, what: str) -> None:
    """Refuse what does not reorder `size` channels inside their heads."""
    width = size // heads
    whole = order.shape == (size,) and torch.equal(order.sort().values, torch.arange(size))
    if not whole or not torch.equal(order // width, torch.arange(size) // width):
        inside = f" inside their {heads} heads" if heads > 1 else ""
        raise ValueError(f"orders, '{what}': expected an order of {size} channels{inside}, got another. {_OTHER_MODEL}")


def _apply_checked(model: nn.Module, orders: ChannelOrders, ids: Tensor) -> ChannelOrders:
    """Apply orders kind by kind, and take back a kind that changes what the model computes; returns those that stay."""
    ids = ids.to(block_device(cast(nn.Module, input_embeddings(model))))
    before = _logits(model, ids)
    # Norms compute in fp32 whatever the model's dtype. Half the digits: a wrong order leaves none of them.
    rounding = max(torch.finfo(before.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    attentions = {name for name in orders.inner if name.endswith(tuple(output for _, output in _ATTENTIONS))}
    kept = ChannelOrders({})
    for what, kind in (
        ("inner channels of the MLPs", ChannelOrders(_without(orders.inner, attentions))),
        ("channels of the value heads", ChannelOrders(_without(orders.inner, orders.inner.keys() - attentions))),
        ("channels of the residual stream", ChannelOrders({}, orders.hidden)),
    ):
        apply_orders(model, kind)
        if torch.dist(_logits(model, ids), before) <= rounding * before.norm():
            kept = replace(kept, inner=kept.inner | kind.inner, hidden=kind.hidden)
        else:
            apply_orders(model, kind.inverse)
            logger.warning("%s stay as they are: %s reads their order", what, type(model).__name__)
    return kept


def _without(inner: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    return {name: order for name, order in inner.items() if name not in names}


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Without what they have in common: it says nothing about the model, and may be most of their norm."""
    with calibration_mode(model):
        logits = cast(Any, model)(ids).logits
    return logits - logits.mean(-1, keepdim=True)


def _folds(model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, _Fold]:
    """{layer whose columns can be reordered: the layers that write them}."""
    folds: dict[str, _Fold] = {}
    for name, reader in linears.items():
        parent, _, leaf = name.rpartition(".")
        for leaves, output in (*_MLPS, *_ATTENTIONS):
            writers = tuple(f"{parent}.{writer}" for writer in leaves)
            if leaf != output or name in folds or not linears.keys() >= set(writers):
                continue
            rows = {linears[writer].out_features for writer in writers}
            width = getattr(model.get_submodule(parent), "head_dim", 0) if leaves == ("v_proj",) else min(rows)
            fits = len(rows) == 1 and width and width % GROUP == 0 and min(rows) % width == 0
            if fits and reader.in_features % min(rows) == 0:
                folds[name] = _Fold(writers, min(rows) // width, reader.in_features // min(rows))
    return folds


def _stream(model: nn.Module, folds: Mapping[str, _Fold]) -> dict[str, int]:
    """{parameter: its dimension that runs over the residual stream}; {} where a parameter's part is not known."""
    _, blocks = decoder_blocks(model)
    size = input_embeddings(model).weight.shape[1]
    head = cast(Any, model).get_output_embeddings()
    homes = {decoder_of(model), *blocks}
    readers = {writer for fold in folds.values() for writer in fold.writers}
    beside = {name.rpartition(".")[0] for name in readers if name.endswith("v_proj")}
    readers |= {f"{attention}.{leaf}" for attention in beside for leaf in ("q_proj", "k_proj")}
    stream: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        is_norm, parent = type(module).__name__.endswith("Norm"), owner.rpartition(".")[0]
        reads = module is head or owner in readers
        if (reads and kind == "bias") or (is_norm and parent in beside):  # over its outputs; of the queries or keys
            continue
        if owner in folds or (is_norm and model.get_submodule(parent) in homes):
            dim = 0
        else:
            dim = 1 if reads or isinstance(module, nn.Embedding) else -1
        if dim < 0 or parameter.shape[dim] != size or size % GROUP:
            logger.warning("the residual stream stays as it is: what '%s' reads of it is not known", name)
            return {}
        stream[name] = dim
    return stream
