"""One decoder block after the other: gather what its layers are called with, then give them new weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from patch.models.keep_masks import set_keep_mask
from patch.models.modes import calibration_mode, placed
from patch.models.structure import decoder_blocks
from patch.pruning.block_inputs import BlockInputs, capture_block_inputs
from patch.pruning.selection import Pruned, check_inputs

# What makes the new weight and mask of a layer: update(layer name, layer, gathered statistics).
Update = Callable[[str, nn.Linear, Any], Pruned]


def update_blocks(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    calibration: torch.Tensor,
    new_statistics: Callable[[torch.Tensor], Any],
    update: Update,
    *,
    device: torch.device | str | None,
    bar_options: Mapping[str, Any],
) -> None:
    """Update layers in place, each block from the inputs that the updated blocks before it produce.

    linears         layers to update, by name; the others of a block run as they are
    calibration     (samples, seqlen) int64 token ids, checked by the caller
    new_statistics  makes the empty statistics of a layer from its weight (N, K); all layers of a block gather
                    theirs from the block as it was. Freed layer by layer: at most one block's are held
    device          where each block is put while it is worked on; None: where it is
    raises          ValueError naming the layer when it sees no inputs or cannot be updated
    """
    _, blocks = decoder_blocks(model)
    with calibration_mode(model), tqdm(total=len(blocks), unit="block", **bar_options) as bar:
        inputs = capture_block_inputs(model, calibration, device)
        for index, block in enumerate(blocks):
            own = set(block.modules())
            members = {name: linear for name, linear in linears.items() if linear in own}
            with placed(block, device):
                if members:
                    _update_block(index, block, members, inputs, new_statistics, update)
                if index + 1 < len(blocks):
                    inputs.advance(index, block)
            bar.update()


def _update_block(
    index: int,
    block: nn.Module,
    members: Mapping[str, nn.Linear],
    inputs: BlockInputs,
    new_statistics: Callable[[torch.Tensor], Any],
    update: Update,
) -> None:
    statistics = {name: new_statistics(linear.weight) for name, linear in members.items()}
    with _observed(members, statistics):
        for _ in inputs.run(index, block):
            pass
    for name, linear in members.items():
        # Popped: a Hessian is as large as a layer and is of no use once its layer is updated.
        gathered = statistics.pop(name)
        if gathered.samples == 0:
            wanted = "expected to see calibration inputs, got none"
            raise ValueError(f"layer '{name}': {wanted}. Its block skips it; put it in exclude.")
        try:
            updated = update(name, linear, gathered)
        except ValueError as error:
            raise ValueError(f"layer '{name}': {error}") from error
        store(linear, updated)


@contextmanager
def _observed(linears: Mapping[str, nn.Linear], statistics: Mapping[str, Any]) -> Iterator[None]:
    """Feed what each layer is called with to its statistics during the body."""

    def observer(name: str) -> Callable[..., None]:
        def observe(linear: nn.Linear, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            x = x.reshape(-1, x.shape[-1])
            check_inputs(x, linear.in_features, linear.weight.device, f"layer '{name}'")
            statistics[name].add(x)

        return observe

    handles = []
    try:
        for name, linear in linears.items():
            handles.append(linear.register_forward_pre_hook(observer(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def store(linear: nn.Linear, pruned: Pruned) -> None:
    """Give the layer its pruned weight and its mask, which then moves with it between devices."""
    linear.weight.copy_(pruned.weight)
    set_keep_mask(linear, pruned.keep)
