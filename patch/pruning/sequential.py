"""One decoder block after the other: gather what its layers are called with, then give them new weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from patch.files.progress import Progress
from patch.models.keep_masks import set_keep_mask
from patch.models.modes import calibration_mode, placed
from patch.models.structure import decoder_blocks
from patch.pruning.block_inputs import BlockInputs, capture_block_inputs
from patch.pruning.experts import FewTokens, expert_layers, few_tokens, inputs_alike
from patch.pruning.options import ExpertOptions
from patch.pruning.plan import warn_of_few_tokens
from patch.pruning.selection import Pruned, check_inputs

# What makes the new weight and mask of a layer, or None to leave it: update(layer name, layer, gathered statistics).
Update = Callable[[str, nn.Linear, Any], Pruned | None]


class Refinement(Protocol):
    """What follows the update of a block's layers, with the block as a whole."""

    def restore(self, index: int, members: Mapping[str, nn.Linear]) -> bool:
        """Give the layers the result of an earlier run; False: there is none."""

    def refine(
        self,
        index: int,
        block: nn.Module,
        members: Mapping[str, nn.Linear],
        inputs: BlockInputs,
        targets: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Change the layers' weights; returns the block's outputs on `inputs` with them.

        targets  outputs of the dense block on the dense model's inputs, a sample each
        """


def update_blocks(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    calibration: torch.Tensor,
    new_statistics: Callable[[torch.Tensor], Any],
    update: Update,
    *,
    device: torch.device | str | None,
    what: str,
    progress: bool,
    refinement: Refinement | None = None,
    experts: ExpertOptions | None = None,
    few: FewTokens | None = None,
) -> FewTokens:
    """Update layers in place, each block from the inputs that the updated blocks before it produce.

    linears         layers to update, by name; the others of a block run as they are
    calibration     (samples, seqlen) int64 token ids, checked by the caller
    new_statistics  makes the empty statistics of a layer from its weight (N, K); all layers of a block gather
                    theirs from the block as it was, those that read the same tensors together. Freed layer by layer:
                    at most one block's are held
    device          where each block is put while it is worked on; None: where it is
    what            is done, for the progress
    progress        whether to show it
    refinement      what follows for each block; it needs the hidden states of the dense model besides
    experts         what is done about experts with few tokens; None: the defaults
    few             what an earlier call for these layers and tokens returned: nothing is counted and said again
    returns         what was done about experts with few tokens
    raises          ValueError naming all layers that see no inputs, before the first one changes; ValueError naming
                    the layer that cannot be updated
    """
    _, blocks = decoder_blocks(model)
    needs_rank = hasattr(new_statistics(next(iter(linears.values())).weight.detach().to("meta")), "hessian")
    if needs_rank:
        warn_of_few_tokens(dict.fromkeys(linears, calibration.numel()), linears)
    routed: dict[str, int] = {}
    with calibration_mode(model), Progress(len(blocks), what, "block", show=progress) as bar:
        inputs = capture_block_inputs(model, calibration, device)
        if few is None:
            members = expert_layers(model, linears)
            tokens = _tokens_of(blocks, linears, members, inputs, device)
            few = few_tokens(members, tokens, len(calibration), experts or ExpertOptions())
        dense = None if refinement is None else inputs.beside()
        for index, block in enumerate(blocks):
            own = set(block.modules())
            own_linears = {name: linear for name, linear in linears.items() if linear in own}
            with placed(block, device):
                if dense is not None:
                    dense.advance(index, block)
                done = bool(own_linears) and refinement is not None and refinement.restore(index, own_linears)
                if own_linears and not done:
                    routed |= _update_block(index, block, own_linears, inputs, new_statistics, update, few)
                if own_linears and not done and refinement is not None and dense is not None:
                    inputs.hidden = refinement.refine(index, block, own_linears, inputs, dense.hidden)
                elif index + 1 < len(blocks):
                    inputs.advance(index, block)
            bar.update()
    if needs_rank:
        warn_of_few_tokens({n: count for n, count in routed.items() if count < calibration.numel()}, linears)
    return few


def _tokens_of(
    blocks: nn.ModuleList,
    linears: Mapping[str, nn.Linear],
    members: Mapping[str, Any],
    inputs: BlockInputs,
    device: torch.device | str | None,
) -> dict[str, int]:
    """How many tokens reach each layer in the dense model; of layers that are not of an expert that some do.

    Layers that none reaches are refused, but for those of experts, the names of `members`. Usually the first sample
    reaches all others, and without experts that is enough.
    """
    tokens: dict[str, int] = {}

    def see(name: str, linear: nn.Linear, x: torch.Tensor) -> None:
        if x.numel():
            tokens[name] = tokens.get(name, 0) + x.numel() // x.shape[-1]

    with _observed(linears, see):
        for sample, hidden in enumerate(inputs.hidden):
            for index, block in enumerate(blocks):
                with placed(block, device):
                    hidden = inputs.output(index, block, sample, hidden)
            if not members and len(tokens) == len(linears):
                break
    if unreached := [name for name in linears if name not in tokens and name not in members]:
        _refuse_unreached(unreached)
    return tokens


def _refuse_unreached(names: list[str]) -> None:
    got = f"got none in {len(names)}: {','.join(names)}"
    advice = "Give more text (--nsamples, --seqlen), or leave these layers dense with exclude (--exclude)."
    raise ValueError(f"calibration: expected inputs in every layer to prune, {got}. {advice}")


def _update_block(
    index: int,
    block: nn.Module,
    members: Mapping[str, nn.Linear],
    inputs: BlockInputs,
    new_statistics: Callable[[torch.Tensor], Any],
    update: Update,
    few: FewTokens,
) -> dict[str, int]:
    """Update the layers of a block; returns how many tokens each was called with."""
    with_statistics = {name: linear for name, linear in members.items() if name not in few.alike}
    with few.routing(block):
        gathered = _gathered(index, block, with_statistics, inputs, new_statistics)
    # The blocks before this one have changed, so an expert may have lost the few tokens that it had.
    missing = [name for name in with_statistics if name not in gathered]
    if others := [name for name in missing if name not in few.members]:
        _refuse_unreached(others)
    tokens = {name: shared.tokens for name, shared in gathered.items()}
    for name, linear in members.items():
        # Popped: a Hessian is as large as a layer and is of no use once its layers are updated.
        found = gathered.pop(name, None)
        statistics = found.statistics if found else inputs_alike(new_statistics(linear.weight), linear.weight)
        try:
            updated = update(name, linear, statistics)
        except ValueError as error:
            raise ValueError(f"layer '{name}': {error}") from error
        if updated is not None:
            store(linear, updated)
    return tokens


class _Apart(Exception):
    """Layers whose inputs were the same tensors are called with different ones."""


@dataclass
class _Shared:
    """Statistics with the layers that share them, and those of them that have not had the latest tensor yet."""

    statistics: Any
    layers: set[str]
    waiting: set[str] = field(default_factory=set)
    inputs: int = 0
    tokens: int = 0


class _Gathering:
    """Statistics of a block's layers, one for all that are called with the very same tensors.

    Which do is seen at the first call: q, k and v of an attention, gate and up of an MLP. They share as long as a
    tensor that one of them is called with reaches all of them before the next does. Where it does not, _Apart is
    raised: everything has to be gathered again with is_shared False.
    """

    def __init__(self, new_statistics: Callable[[torch.Tensor], Any], *, is_shared: bool):
        self.of_layer: dict[str, _Shared] = {}
        self._new_statistics = new_statistics
        self._is_shared = is_shared
        # The tensor that was added last, its version then, which writing into it changes, and where it was added.
        self._latest: tuple[torch.Tensor, int, _Shared] | None = None

    def add(self, name: str, linear: nn.Linear, x: torch.Tensor) -> None:
        """Check and add what a layer is called with, unless that was done for a layer it shares with."""
        if x.numel() == 0:  # of an expert that no token was sent to
            return
        own = self.of_layer.get(name)
        same = self._added_to(x)
        if same is not None and own is None and same.inputs == 1:
            self.of_layer[name] = same
            same.layers.add(name)
            return
        if same is not None and own is same and name in same.waiting:
            same.waiting.remove(name)
            return
        rows = x.reshape(-1, x.shape[-1])
        check_inputs(rows, linear.in_features, linear.weight.device, f"layer '{name}'")
        if own is None:
            own = self.of_layer[name] = _Shared(self._new_statistics(linear.weight), {name})
        if own.waiting:
            raise _Apart
        own.statistics.add(rows)
        own.inputs += 1
        own.tokens += len(rows)
        own.waiting = own.layers - {name}
        if self._is_shared and not x.is_inference():  # an inference tensor has no version
            self._latest = x, x._version, own

    def end(self) -> None:
        """All inputs were added."""
        self._latest = None
        if any(shared.waiting for shared in self.of_layer.values()):
            raise _Apart

    def _added_to(self, x: torch.Tensor) -> _Shared | None:
        """Where this tensor was just added, as it is."""
        if self._latest is None or self._latest[0] is not x or self._latest[1] != x._version:
            return None
        return self._latest[2]


def _gathered(
    index: int,
    block: nn.Module,
    members: Mapping[str, nn.Linear],
    inputs: BlockInputs,
    new_statistics: Callable[[torch.Tensor], Any],
) -> dict[str, _Shared]:
    """Statistics of the layers of a block that were called, by name."""
    for is_shared in (True, False):
        gathering = _Gathering(new_statistics, is_shared=is_shared)
        with suppress(_Apart), _observed(members, gathering.add):
            for _ in inputs.run(index, block):
                pass
            gathering.end()
            break
    return gathering.of_layer


@contextmanager
def _observed(linears: Mapping[str, nn.Linear], see: Callable[[str, nn.Linear, torch.Tensor], None]) -> Iterator[None]:
    """Show `see` what each layer is called with during the body: its name, the layer, the tensor."""

    def observer(name: str) -> Callable[..., None]:
        return lambda linear, args, kwargs: see(name, linear, args[0] if args else kwargs["input"])

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_pre_hook(observer(name), with_kwargs=True).remove)
        yield


def store(linear: nn.Linear, pruned: Pruned) -> None:
    """Give the layer its pruned weight and its mask, which then moves with it between devices."""
    linear.weight.copy_(pruned.weight)
    set_keep_mask(linear, pruned.keep)
