"""How much loss each tile adds when its 2:4 mask is applied, by the Fisher information of the whole model.

A weight w that is pruned adds about F w^2 / 2 to the loss, F = E[(dL/dw)^2] (Hassibi and Stork, "Optimal Brain
Surgeon", 1992, with the empirical Fisher information for the Hessian's diagonal). A tile adds the sum over what its
mask prunes. All of it is in units of the loss, so tiles of different layers compare.

The backward pass goes block by block: a forward pass without gradients leaves the hidden states between the blocks,
then each block, from the last to the first, runs again with gradients. Memory therefore holds one block's activations
and gradients, whatever the depth, and only one block has to be on the accelerator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from patch.files.progress import Progress
from patch.mask import tile_sums
from patch.models.mixtures import open_mixtures
from patch.models.modes import block_device, calibration_mode, placed, streamed
from patch.models.structure import decoder_blocks, input_embeddings, linear_at
from patch.pruning.block_inputs import BlockCall, hidden_of, moved, split_call
from patch.pruning.selection import working_dtype
from patch.runs.checkpoints import load_tensors
from patch.runs.stages import finished, write_tensors
from patch_kernels import tile_grid

DEFAULT_CHUNK = 8
_STAGE = "losses"
_SUMS = "sums.safetensors"


def tile_losses(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    calibration: Tensor,
    tile: tuple[int, int],
    *,
    device: torch.device | str | None = None,
    chunk: int = DEFAULT_CHUNK,
    stages: Path | None = None,
    key: str = "",
    progress: bool = True,
) -> dict[str, Tensor]:
    """Loss that masking a tile adds, {layer: (rows, cols) float64 on the CPU}; no weight of the model changes.

    masks        {layer name: keep (N, K) bool}: what would be pruned if no tile were dense
    calibration  (samples, tokens) int64 token ids; the gradient is that of a sample's loss, its mean over the tokens
    tile         rows, columns of a tile
    device       where each block, and what is around the blocks, is put while it runs; None: where it is
    chunk        samples whose hidden states between the blocks are held at once, where the blocks are
    stages       folder that keeps the sums after each chunk: the same call again goes on there; None: nowhere
    key          of all that the sums depend on
    progress     say how far it is
    The value of a tile is the mean over samples of the sum over its pruned weights of (dL/dw * w)^2.
    """
    _, blocks = decoder_blocks(model)
    open_mixtures(model)
    linears = {name: linear_at(model, name) for name in masks}
    members = [_members(block, linears) for block in blocks]
    losses = {name: torch.zeros(tile_grid(keep.shape, tile), dtype=torch.float64) for name, keep in masks.items()}
    first = next(index for index, own in enumerate(members) if own)
    homes = [block_device(block) for block in blocks]
    done = _restore(losses, stages, key)
    total = (len(calibration) - done) * (len(blocks) - first)
    with (
        calibration_mode(model),
        _no_trained_parameters(model),
        Progress(total, "gradients of the loss", "block", show=progress) as bar,
    ):
        for samples in calibration[done:].split(chunk):
            with streamed(model, device):
                runs = [_Run(model, blocks, ids[None], homes) for ids in samples]
            for index in reversed(range(first, len(blocks))):
                with placed(blocks[index], device):
                    for run in runs:
                        run.backward(blocks[index], members[index], further=index > first)
                        for name, linear in members[index].items():
                            losses[name] += _tile_losses(linear, masks[name], tile)
                        bar.update()
            done += len(samples)
            _keep(losses, done, stages, key)
    return {name: loss / len(calibration) for name, loss in losses.items()}


def _tile_losses(linear: nn.Linear, keep: Tensor, tile: tuple[int, int]) -> Tensor:
    """Of one sample, from the gradient that the weight has, which is freed; 0 where no token reached the layer."""
    gradient, linear.weight.grad = linear.weight.grad, None
    if gradient is None:
        return torch.zeros(tile_grid(keep.shape, tile), dtype=torch.float64)
    change = gradient.to(working_dtype(gradient)).mul_(linear.weight).masked_fill_(keep.to(gradient.device), 0)
    return tile_sums(change.square_(), tile).cpu()


def _restore(losses: dict[str, Tensor], stages: Path | None, key: str) -> int:
    """Give the sums what an earlier call with this key kept; returns of how many samples."""
    if stages is None or (found := finished(stages / _STAGE, key)) is None:
        return 0
    losses.update(load_tensors(stages / _STAGE / _SUMS, losses))
    samples: int = found["samples"]
    return samples


def _keep(losses: Mapping[str, Tensor], samples: int, stages: Path | None, key: str) -> None:
    if stages is None:
        return
    write_tensors(stages / _STAGE, key, {"samples": samples}, _SUMS, losses)


def _members(block: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    own = set(block.modules())
    return {name: linear for name, linear in linears.items() if linear in own}


@dataclass
class _Boundary:
    """What a block was called with: its hidden states and the rest."""

    hidden: Tensor
    call: BlockCall


class _Run:
    """One sample: the hidden states before every block, and the gradient after the block that comes next.

    last  output of the last block, from which gradients are taken
    """

    last: Tensor

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, ids: Tensor, homes: list[torch.device]):
        """homes: where the hidden states before each block are kept."""
        self.boundaries: list[_Boundary] = []
        self._homes = homes
        ids = ids.to(block_device(input_embeddings(model)))
        with ExitStack() as hooks, torch.no_grad():
            for block in blocks:
                hooks.callback(block.register_forward_pre_hook(self._note, with_kwargs=True).remove)
            hooks.callback(blocks[-1].register_forward_hook(self._cut).remove)
            logits: Tensor = model(input_ids=ids).logits
            # What is behind the last block ran with gradients.
            loss = functional.cross_entropy(logits[0, :-1].to(working_dtype(logits)), ids[0, 1:].to(logits.device))
        self.gradient: Tensor = torch.autograd.grad(loss, [self.last])[0]

    def backward(self, block: nn.Module, members: Mapping[str, nn.Linear], *, further: bool) -> None:
        """Run the last block that was not yet again, with gradients: its members' weights get theirs.

        further  blocks before it come next: `gradient` is then that of its hidden states
        """
        boundary = self.boundaries.pop()
        device = block_device(block)
        hidden = boundary.hidden.to(device).detach().requires_grad_(further)
        weights = [linear.weight.requires_grad_(True) for linear in members.values()]
        try:
            with torch.enable_grad():
                call = boundary.call
                output = hidden_of(block(hidden, *moved(call.args, device), **moved(call.kwargs, device)))
                output.backward(self.gradient.to(device))
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        if further:
            assert hidden.grad is not None
            self.gradient = hidden.grad

    def _note(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden, args, kwargs = split_call(args, kwargs)
        home = self._homes[len(self.boundaries)]
        self.boundaries.append(_Boundary(hidden.to(home), BlockCall(moved(args, home), moved(kwargs, home))))

    def _cut(self, block: nn.Module, args: tuple, output: Any) -> Any:
        """The last block's output as a tensor of its own, from which on gradients are recorded."""
        self.last = hidden_of(output).detach().requires_grad_(True)
        torch.set_grad_enabled(True)
        return (self.last, *output[1:]) if isinstance(output, tuple) else self.last


@contextmanager
def _no_trained_parameters(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient during the body, and none has one afterwards that it did not have."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for parameter, trained, gradient in before:
            parameter.requires_grad_(trained)
            parameter.grad = gradient
