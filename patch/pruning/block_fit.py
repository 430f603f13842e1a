"""Train the kept weights of one decoder block so that its output comes near to a target.

A layer's own least-squares error leaves out what attention and activations make of it; a block's output is what the
rest of the model reads. The weights a mask keeps are trained on the squared error of the block's output by Adam, in
float32, from the weights that the block has. Source of the objective: "A free lunch", arXiv 2510.14444.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from patch.models.modes import block_device
from patch.pruning.block_inputs import BlockInputs, each_tensor, hidden_of, moved
from patch.pruning.options import BlockOptions

# What makes a layer's weight in the forward pass from its trained weight: effective(layer name, weight (N, K)).
Effective = Callable[[str, Tensor], Tensor]
_BETAS = (0.9, 0.95)


def fit_block(
    index: int,
    block: nn.Module,
    members: Mapping[str, nn.Linear],
    masks: Mapping[str, Tensor],
    inputs: BlockInputs,
    targets: Sequence[Tensor],
    options: BlockOptions,
    *,
    effective: Effective | None = None,
) -> None:
    """Train the block's kept weights in place.

    members    layers of the block to train, by name, with their pruned weights at 0
    masks      {layer name: keep (N, K) bool}
    inputs     of block `index`, one (1, tokens, hidden) a sample
    targets    (1, tokens, hidden) a sample: what the block should put out
    effective  what the forward pass uses in place of a trained weight, such as a rounded one; gradients go through it
    Samples are drawn in an order of options.seed and the block's index. 16-bit weights have float32 masters.
    """
    device = block_device(block)
    paths = {name: _path(block, linear) for name, linear in members.items()}
    keeps = {name: masks[name].to(device) for name in members}
    masters = {name: linear.weight.detach().float().clone().requires_grad_(True) for name, linear in members.items()}
    # A float32 copy of what else is in the block: sums of a step would be lost in 16 bits.
    others = {name: _float(tensor.detach()) for name, tensor in (*block.named_parameters(), *block.named_buffers())}
    # Adam's steps have the size of its rate whatever the gradient, and models differ in the size of their weights.
    rates = [options.lr * _scale(master.detach()[keeps[name]]) for name, master in masters.items()]
    optimizer = torch.optim.Adam(
        [{"params": [master], "lr": rate} for master, rate in zip(masters.values(), rates, strict=True)], betas=_BETAS
    )
    size = options.samples_a_step(len(targets))
    steps = options.epochs * -(-len(targets) // size)
    generator = torch.Generator().manual_seed(options.seed * 4096 + index)
    forward = _Forward(index, block, inputs, others)
    step = 0
    with torch.enable_grad():
        for _ in range(options.epochs):
            for samples in torch.randperm(len(targets), generator=generator).split(size):
                used = {n: master if effective is None else effective(n, master) for n, master in masters.items()}
                weights = {f"{paths[name]}.weight": weight for name, weight in used.items()}
                for part in samples.split(size if forward.batched else 1):
                    wanted = torch.cat([targets[int(sample)] for sample in part]).to(device).float()
                    error = (forward(part.tolist(), weights) - wanted).square().mean()
                    if not error.requires_grad:  # all that is fitted are experts that no token was sent to
                        continue
                    # Parts share the graph of the effective weights. Kept without need, it would hold the activations.
                    (error * (len(part) / len(samples))).backward(retain_graph=effective is not None)
                for name, master in masters.items():
                    if master.grad is None:  # of an expert that no token was sent to
                        continue
                    master.grad.masked_fill_(~keeps[name], 0)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (1 - step / steps)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
    with torch.no_grad():
        for name, linear in members.items():
            linear.weight.copy_(masters[name])


class _Forward:
    """The block's outputs for some samples at once, with other weights than its own."""

    def __init__(self, index: int, block: nn.Module, inputs: BlockInputs, others: dict[str, Tensor]):
        self._index, self._block, self._inputs, self._others = index, block, inputs, others
        self._device = block_device(block)
        self._dtype = next(block.parameters()).dtype
        self.batched = inputs.calls_alike and len(inputs.hidden) > 1 and self._goes_together()

    def __call__(self, samples: Sequence[int], weights: Mapping[str, Tensor]) -> Tensor:
        """(samples, tokens, hidden) float32."""
        hidden = torch.cat([self._inputs.hidden[sample] for sample in samples]).to(self._device).float()
        call = self._inputs.call(self._index, samples[0])
        args, kwargs = _float(moved(call.args, self._device)), _float(moved(call.kwargs, self._device))
        with self._autocast():
            output = functional_call(self._block, {**self._others, **weights}, (hidden, *args), kwargs)
        return hidden_of(output).float()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._device.type == "cpu" or self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)

    def _goes_together(self) -> bool:
        """Whether two samples at once give what each gives alone: what a block is called with may be of one sample."""
        with torch.no_grad():
            alone = torch.cat([self([sample], {}) for sample in (0, 1)])
            try:
                together = self([0, 1], {})
            except (RuntimeError, ValueError):
                return False
        return together.shape == alone.shape and torch.allclose(together, alone, rtol=1e-3, atol=1e-3 * _scale(alone))


def _scale(x: Tensor) -> float:
    """Root mean square, 0 of nothing."""
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _path(block: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in block.named_modules() if module is layer)


def _float(value: Any) -> Any:
    """Copy of a nest of containers with its floating-point tensors in float32."""
    return each_tensor(value, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
