"""Reconstruction of a model block by block: the trained blocks of an earlier run, errors before and after, refusals."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from patch.pruning.block_fit import fit_block
from patch.pruning.block_inputs import BlockInputs
from patch.pruning.options import BlockOptions
from patch.pruning.selection import Pruned
from patch.pruning.sequential import store
from patch.runs.checkpoints import load_tensors
from patch.runs.stages import finished, write_tensors

logger = logging.getLogger(__name__)
_WEIGHTS = "weights.safetensors"


class Reconstruction:
    """Fits every block to the dense block's outputs; a `patch.pruning.sequential.Refinement`.

    errors  {index of a block: (before, after)}: squared error of its outputs on the calibration text over the squared
            outputs, before and after the fit; a block whose error did not fall has the weights from before
    """

    def __init__(
        self, masks: Mapping[str, Tensor], options: BlockOptions, stages: Path | None = None, key: str = ""
    ) -> None:
        """stages: folder in which every finished block is kept, None for nowhere; key: of all that they depend on."""
        self.errors: dict[int, tuple[float, float]] = {}
        self._masks, self._options, self._stages, self._key = masks, options, stages, key

    def restore(self, index: int, members: Mapping[str, nn.Linear]) -> bool:
        """Give a block's layers what an earlier run with the same key found."""
        if self._stages is None or (done := finished(self._folder(index), self._key)) is None:
            return False
        self.errors[index] = tuple(done["error"])
        expected = {name: linear.weight for name, linear in members.items()}
        for name, weight in load_tensors(self._folder(index) / _WEIGHTS, expected).items():
            store(members[name], Pruned(weight, self._masks[name]))
        return True

    def refine(
        self,
        index: int,
        block: nn.Module,
        members: Mapping[str, nn.Linear],
        inputs: BlockInputs,
        targets: list[Tensor],
    ) -> list[Tensor]:
        """Fit a block; returns its outputs."""
        outputs = list(inputs.run(index, block))
        before = relative_error(outputs, targets)
        weights = {name: linear.weight.detach().clone() for name, linear in members.items()}
        try:
            fit_block(index, block, members, self._masks, inputs, targets, self._options)
        except torch.OutOfMemoryError as error:
            raise MemoryError(self._too_large(index, len(targets), targets[0].shape[-2])) from error
        fitted = list(inputs.run(index, block))
        after = relative_error(fitted, targets)
        if after < before:
            outputs = fitted
        else:
            logger.warning("block %d keeps its weights: its error went from %.4g to %.4g", index, before, after)
            for name, linear in members.items():
                linear.weight.copy_(weights[name])
            after = before
        self.errors[index] = before, after
        self._keep(index, members)
        return outputs

    def _too_large(self, index: int, nsamples: int, seqlen: int) -> str:
        size = self._options.samples_a_step(nsamples)
        fewer = f"batch_size={size // 2}, " if size > 1 else ""
        got = f"got too little for {size} of {seqlen} tokens"
        advice = f"Give {fewer}shorter ones such as seqlen={max(1, seqlen // 2)}, or method='least_squares'"
        return f"batch_size: expected memory to fit block {index} to so many samples a step, {got}. {advice}."

    def _folder(self, index: int) -> Path:
        assert self._stages is not None
        return self._stages / f"block-{index:04d}"

    def _keep(self, index: int, members: Mapping[str, nn.Linear]) -> None:
        if self._stages is None:
            return
        weights = {name: linear.weight for name, linear in members.items()}
        write_tensors(self._folder(index), self._key, {"error": self.errors[index]}, _WEIGHTS, weights)


def relative_error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Squared error of the outputs over the squared targets, 0 when both are 0."""
    pairs = [(out.to(target.device).double(), target.double()) for out, target in zip(outputs, targets, strict=True)]
    error = sum(float((out - target).square().sum()) for out, target in pairs)
    norm = sum(float(target.square().sum()) for _, target in pairs)
    return error / norm if norm > 0 else 0.0
