"""Pruning of a single weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patch.mask import expand_tiles
from patch.pruning.hybrid import tile_errors, two_of_four
from patch.pruning.options import Pattern, Precision, TileOptions
from patch.pruning.registry import METHODS, get_method, make_options
from patch.pruning.selection import Pruned, check_inputs, check_weight
from patch.pruning.tiles import choose_dense_tiles


@torch.no_grad()
def prune_weight(
    weight: torch.Tensor,
    method: str,
    *,
    pattern: Pattern = "2:4",
    sparsity: float = 0.5,
    inputs: Sequence[torch.Tensor] | None = None,
    block_size: int | None = None,
    damping: float = 0.01,
    shift_zero_metrics: bool = False,
    precision: Precision = "fp32",
    tile: tuple[int, int] = (128, 128),
) -> Pruned:
    """Prune one weight (N, K); nothing is changed in place.

    method      "magnitude", "wanda", "sparsegpt" or "thanos".
    pattern     "2:4": exactly two of every four consecutive columns stay, sparsity must be 0.5, K % 4 == 0.
                "unstructured": a share `sparsity` of 0 up to 1 goes, by the method's own rule: one threshold
                for the matrix (magnitude), int(K * sparsity) in each row (wanda), one threshold for each
                block (sparsegpt), int(N * K * sparsity) of the matrix (thanos). Sparsity 0 returns the
                weight as it is.
                "tiles": 2:4, but for whole tiles that stay dense, so that a share `sparsity` of 0 to 0.5 goes: those
                whose 2:4 mask adds most to the error as the method counts it. They make up for the others' errors too.
    inputs      the layer's inputs, one (tokens, K) tensor per calibration sample, on the weight's device.
                Samples may differ in length and weigh the same. Needed by all but magnitude.
    block_size  columns sparsegpt and thanos treat at once; a multiple of 4 for 2:4. None: 128, but 512 for
                thanos with 2:4.
    damping     share of the mean diagonal sparsegpt and thanos add to the Hessian's diagonal; raised with a
                warning when that is not enough to invert it.
    shift_zero_metrics  wanda: lift all channel energies so that dead input channels do not score 0.
    precision   "fp32" or "fp64": of scores, statistics and updates. fp64 weights always take fp64.
    tile        rows, columns of a tile of pattern "tiles"; no other reads it

    Magnitude and wanda leave kept weights bit-identical, sparsegpt and thanos update them. Equal scores are
    pruned from the lower column up. Raises ValueError or TypeError before any work.
    """
    chosen = get_method(method)
    if chosen.learns:
        able = [name for name, row in METHODS.items() if not row.learns]
        wanted = f"expected one that prunes a single weight ({', '.join(able)}), got '{method}'"
        raise ValueError(f"method: {wanted}, which learns all masks of a model. Use patch.pruning.prune_model.")
    options = make_options(chosen, pattern, sparsity, block_size, damping, shift_zero_metrics, precision)
    check_weight(weight, options, "weight")
    samples = _check_samples(inputs, weight, method) if chosen.reads_inputs else ()
    if options.sparsity == 0:
        return Pruned(weight.detach().clone(), torch.ones_like(weight, dtype=torch.bool))
    statistics = None
    if chosen.reads_inputs:
        statistics = chosen.new_statistics(weight, options)
        for x in samples:
            statistics.add(x)
    if options.pattern != "tiles":
        return chosen.prune(weight, statistics, options)
    tile = TileOptions(tile=tile).tile
    keep, errors = tile_errors(weight, chosen.costs(weight, statistics, options), tile)
    dense = choose_dense_tiles({"": errors}, {"": keep}, sparsity, tile)[""]
    stays = expand_tiles(dense, tile, (weight.shape[0], weight.shape[1])).to(weight.device)
    return chosen.prune(weight, statistics, two_of_four(options), stays)


def _check_samples(inputs: Sequence[torch.Tensor] | None, weight: torch.Tensor, method: str) -> Sequence[torch.Tensor]:
    """The calibration inputs, checked."""
    if inputs is not None and not isinstance(inputs, (list, tuple)):
        got = type(inputs).__name__
        raise TypeError(f"inputs: expected a list of (tokens, in_features) tensors, got {got}. Wrap a single one.")
    if not inputs:
        got = f"got {'none' if inputs is None else 'an empty list'}. Pass one tensor per sample, or use magnitude."
        raise ValueError(f"inputs: expected calibration inputs for method '{method}', {got}")
    for index, x in enumerate(inputs):
        check_inputs(x, weight.shape[1], weight.device, f"inputs[{index}]")
    return inputs
