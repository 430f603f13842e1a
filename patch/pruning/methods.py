"""The registry of pruning methods, and pruning of a single weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patch.pruning import magnitude, sparsegpt, thanos, wanda
from patch.pruning.selection import (
    DEFAULT_BLOCK_SIZE,
    Pruned,
    PruneOptions,
    check_inputs,
    check_weight,
    working_dtype,
)


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


@torch.no_grad()
def prune_weight(
    weight: torch.Tensor,
    method: str,
    *,
    pattern: str = "2:4",
    sparsity: float = 0.5,
    inputs: Sequence[torch.Tensor] | None = None,
    block_size: int | None = None,
    damping: float = 0.01,
    shift_zero_metrics: bool = False,
    precision: str = "fp32",
) -> Pruned:
    """Prune one weight (N, K); nothing is changed in place.

    method      "magnitude", "wanda", "sparsegpt" or "thanos".
    pattern     "2:4": exactly two of every four consecutive columns stay, sparsity must be 0.5, K % 4 == 0.
                "unstructured": a share `sparsity` of 0 up to 1 goes, by the method's own rule: one threshold
                for the matrix (magnitude), int(K * sparsity) in each row (wanda), one threshold for each
                block (sparsegpt), int(N * K * sparsity) of the matrix (thanos). Sparsity 0 returns the
                weight as it is.
    inputs      the layer's inputs, one (tokens, K) tensor per calibration sample, on the weight's device.
                Samples may differ in length and weigh the same. Needed by all but magnitude.
    block_size  columns sparsegpt and thanos treat at once; a multiple of 4 for 2:4. None: 128, but 512 for
                thanos with 2:4.
    damping     share of the mean diagonal sparsegpt and thanos add to the Hessian's diagonal; raised with a
                warning when that is not enough to invert it.
    shift_zero_metrics  wanda: lift all channel energies so that dead input channels do not score 0.
    precision   "fp32" or "fp64": of scores, statistics and updates. fp64 weights always take fp64.

    Magnitude and wanda leave kept weights bit-identical, sparsegpt and thanos update them. Equal scores are
    pruned from the lower column up. Raises ValueError or TypeError before any work.
    """
    chosen = get_method(method)
    if chosen.is_learned:
        raise ValueError(
            f"method: expected one that prunes a single weight ({', '.join(METHODS)}), got '{method}', which learns "
            "the masks of a whole model. Use patch.pruning.prune_model."
        )
    options = make_options(chosen, pattern, sparsity, block_size, damping, shift_zero_metrics, precision)
    check_weight(weight, options, "weight")
    if chosen.statistics is not None:
        _check_samples(inputs, weight, method)
    if options.sparsity == 0:
        return Pruned(weight.detach().clone(), torch.ones_like(weight, dtype=torch.bool))
    statistics = None
    if chosen.statistics is not None:
        statistics = chosen.new_statistics(weight, options)
        for x in inputs:
            statistics.add(x)
    return chosen.prune(weight, statistics, options)


def _check_samples(inputs: Sequence[torch.Tensor] | None, weight: torch.Tensor, method: str) -> None:
    if inputs is not None and not isinstance(inputs, (list, tuple)):
        raise TypeError(
            f"inputs: expected a list of (tokens, in_features) tensors, one per calibration sample, got "
            f"{type(inputs).__name__}. Wrap a single sample in a list."
        )
    if not inputs:
        raise ValueError(
            f"inputs: expected calibration inputs for method '{method}', got "
            f"{'none' if inputs is None else 'an empty list'}. Pass one (tokens, in_features) tensor per "
            "sample, or use method='magnitude'."
        )
    for index, x in enumerate(inputs):
        check_inputs(x, weight.shape[1], weight.device, f"inputs[{index}]")
