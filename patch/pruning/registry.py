"""The registry of pruning methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from patch.pruning import magnitude, sparsegpt, thanos, wanda
from patch.pruning.options import DEFAULT_BLOCK_SIZE, PruneOptions
from patch.pruning.selection import Pruned, working_dtype


@dataclass(frozen=True)
class Method:
    """A pruning method: how it prunes one weight, and what it gathers from calibration data (or None).

    prune                   None: masks are learned for the whole model at once, only 2:4; see `prune_model`
    updates_weights         whether kept weights change, so that a mask alone is not the result
    block_size              columns treated at once unless the caller says otherwise
    two_of_four_block_size  the same for pattern 2:4
    """

    prune: Callable[[torch.Tensor, Any, PruneOptions], Pruned] | None
    statistics: type | None = None
    updates_weights: bool = False
    block_size: int = DEFAULT_BLOCK_SIZE
    two_of_four_block_size: int = DEFAULT_BLOCK_SIZE

    @property
    def is_learned(self) -> bool:
        """Whether the method learns from the whole model."""
        return self.prune is None

    @property
    def needs_calibration(self) -> bool:
        """Whether the method reads token ids."""
        return self.is_learned or self.statistics is not None

    def new_statistics(self, weight: torch.Tensor, options: PruneOptions) -> Any:
        """Empty statistics for the inputs of weight (N, K), on its device."""
        dtype = working_dtype(weight, options.precision)
        return self.statistics(weight.shape[1], dtype=dtype, device=weight.device)


METHODS: dict[str, Method] = {
    "magnitude": Method(magnitude.prune),
    "wanda": Method(wanda.prune, wanda.Statistics),
    "sparsegpt": Method(sparsegpt.prune, sparsegpt.Statistics, updates_weights=True),
    # Block sizes of the paper.
    "thanos": Method(thanos.prune, thanos.Statistics, updates_weights=True, two_of_four_block_size=512),
}
# Apart from the others, of which each can prune a weight by itself.
LEARNED_METHODS: dict[str, Method] = {"prox_sparse": Method(None)}


def get_method(name: str) -> Method:
    """The registered method; raises ValueError for any other name."""
    known = METHODS | LEARNED_METHODS
    if isinstance(name, str) and name in known:
        return known[name]
    raise ValueError(f"method: expected one of {', '.join(known)}, got {name!r}. Choose one of them.")


def reference_method(name: str) -> str:
    """The method for the unstructured reference of the tile scores: itself, or wanda where it knows only 2:4."""
    return "wanda" if get_method(name).is_learned else name


def make_options(method: Method, pattern, sparsity, block_size, damping, shift_zero_metrics, precision) -> PruneOptions:
    """Checked options; block_size None is the method's default for the pattern."""
    if block_size is None:
        block_size = method.two_of_four_block_size if pattern == "2:4" else method.block_size
    return PruneOptions(pattern, sparsity, block_size, damping, shift_zero_metrics, precision)
