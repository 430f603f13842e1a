"""Wanda: prune by |weight| times the norm of the input channel it reads. No weight update.

2:4: two of every four. Unstructured: the same number in every output row.
Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023.
"""

from __future__ import annotations

import torch

from patch.pruning.options import PruneOptions
from patch.pruning.selection import Pruned, keep_in_rows, keep_two_of_four, select, zeros_first


class Statistics:
    """Mean over samples of the squared norm of every input channel: `channel_energy` (in_features,)."""

    def __init__(self, in_features: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None):
        self.in_features = in_features
        self.samples = 0
        self.channel_energy = torch.zeros(in_features, dtype=dtype, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Add one sample (tokens, in_features). Every sample weighs the same, however many tokens it has."""
        self.samples += 1
        energy = x.detach().to(self.channel_energy.dtype).square().sum(0)
        self.channel_energy += (energy - self.channel_energy) / self.samples


def prune(
    weight: torch.Tensor, statistics: Statistics, options: PruneOptions, stays: torch.Tensor | None = None
) -> Pruned:
    """Prune weight (N, K) by |weight| * sqrt(channel energy). stays (N, K) bool: not pruned, with pattern 2:4."""
    energy = statistics.channel_energy
    if options.shift_zero_metrics:
        energy = shifted(energy)
    score = zeros_first(weight.detach().to(energy.dtype).abs() * energy.sqrt(), weight == 0)
    keep = keep_two_of_four(score, stays) if options.pattern == "2:4" else keep_in_rows(score, options.sparsity)
    return select(weight, keep)


def costs(weight: torch.Tensor, statistics: Statistics, options: PruneOptions) -> torch.Tensor:
    """What pruning each weight (N, K) adds to the squared error of the layer's output, taken alone."""
    return weight.detach().to(statistics.channel_energy.dtype).square() * statistics.channel_energy


def shifted(energy: torch.Tensor) -> torch.Tensor:
    """Energies (in_features,) raised together so that none is zero and weights of dead channels still
    compete.

    The shift is the smallest energy, with 1 in the place of zeros; so it is added when no channel is dead,
    too, and is at most 1 when one is. That is the rule of the published code.
    """
    return energy + energy.masked_fill(energy == 0, 1).min()
