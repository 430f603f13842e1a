"""Weights on a grid of few bits, and decoder blocks trained to make up for it.

The grid is symmetric, with one scale for `group` weights of a row, clipped where that costs least (patch.slim); it is
simulated: the weights hold what the codes stand for. Training goes through the rounding as if it were not there
(straight-through: Bengio, Leonard, Courville, arXiv 1308.3432), scales fixed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from patch.models.modes import calibration_mode
from patch.models.structure import decoder_blocks, linear_at
from patch.pruning.block_fit import fit_block
from patch.pruning.block_inputs import BlockInputs, capture_block_inputs
from patch.pruning.options import BlockOptions
from patch.slim import quantize_weight

FULL_BITS = 16  # not rounded
SCALE_BITS = 16
INDEX_BITS = 2  # of a kept weight of a 2:4 group


class RoundingGrid:
    """Where the weights of a matrix (N, K) may lie; made from its weights, then fixed."""

    def __init__(self, weight: Tensor, keep: Tensor, bits: int, group: int) -> None:
        """bits: 2 to 8; group: weights of a row that share a scale, the last of a row may be fewer."""
        short = -weight.shape[1] % group
        made = quantize_weight(
            pad(weight, (0, short)), pad(keep, (0, short)), bits=bits, block=group, along_rows=True, search=True
        )
        self._scale = made.scale.repeat_interleave(group, 1)[:, : weight.shape[1]]
        self._least, self._most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def nearest(self, weight: Tensor) -> Tensor:
        """The points of the grid nearest to weight (N, K); 0 stays 0."""
        return (weight * self._scale).round().clamp(self._least, self._most) / self._scale

    def straight_through(self, weight: Tensor) -> Tensor:
        """As nearest, with the gradient of the identity."""
        return weight + (self.nearest(weight.detach()) - weight.detach())


@torch.no_grad()
def round_to_nearest(model: nn.Module, masks: Mapping[str, Tensor], bits: int, group: int) -> None:
    """Put the weights of the layers in `masks` on their grids, in place; pruned ones are and stay 0."""
    for name, keep in masks.items():
        weight = linear_at(model, name).weight
        weight.copy_(RoundingGrid(weight, keep, bits, group).nearest(weight))


@torch.no_grad()
def fit_rounded(
    model: nn.Module,
    dense: nn.Module,
    masks: Mapping[str, Tensor],
    calibration: Tensor,
    *,
    bits: int,
    group: int,
    options: BlockOptions,
) -> None:
    """Round block by block, in place, the weights of a block trained for the dense block's output first.

    model        with its masked weights, not rounded
    dense        the model whose blocks say what should come out
    calibration  (samples, tokens) int64 token ids
    A block that training brings no nearer is rounded to nearest.
    """
    (_, blocks), (_, dense_blocks) = decoder_blocks(model), decoder_blocks(dense)
    with calibration_mode(model), calibration_mode(dense):
        inputs, wanted = capture_block_inputs(model, calibration), capture_block_inputs(dense, calibration)
        for index, (block, dense_block) in enumerate(zip(blocks, dense_blocks, strict=True)):
            wanted.advance(index, dense_block)
            own = set(block.modules())
            members = {name: linear_at(model, name) for name in masks if linear_at(model, name) in own}
            grids = {n: RoundingGrid(linear.weight, masks[n], bits, group) for n, linear in members.items()}
            nearest = {name: grids[name].nearest(linear.weight) for name, linear in members.items()}

            def effective(name: str, weight: Tensor, grids: dict[str, RoundingGrid] = grids) -> Tensor:
                return grids[name].straight_through(weight)

            fit_block(index, block, members, masks, inputs, wanted.hidden, options, effective=effective)
            _put(members, {name: grids[name].nearest(linear.weight) for name, linear in members.items()})
            trained = _error(index, block, inputs, wanted.hidden)
            fitted = {name: linear.weight.clone() for name, linear in members.items()}
            _put(members, nearest)
            if trained < _error(index, block, inputs, wanted.hidden):
                _put(members, fitted)
            inputs.advance(index, block)


def bytes_a_weight(masks: Mapping[str, Tensor], bits: int, group: int) -> float:
    """Bytes of all layers' codes, scales and 2:4 indices over the number of their weights, pruned ones included.

    masks  dense tiles keep all, the others are 2:4: so as many weights need an index as are pruned
    """
    total = 0
    for keep in masks.values():
        kept = int(keep.sum())
        total += kept * bits + (keep.numel() - kept) * INDEX_BITS
        if bits < FULL_BITS:
            total += SCALE_BITS * keep.shape[0] * -(-keep.shape[1] // group)
    return total / 8 / sum(keep.numel() for keep in masks.values())


def _put(members: Mapping[str, nn.Linear], weights: Mapping[str, Tensor]) -> None:
    for name, linear in members.items():
        linear.weight.copy_(weights[name])


def _error(index: int, block: nn.Module, inputs: BlockInputs, targets: list[Tensor]) -> float:
    """Squared error of the block's output, summed over the samples."""
    return sum(float((y - t).square().sum()) for y, t in zip(inputs.run(index, block), targets, strict=True))
