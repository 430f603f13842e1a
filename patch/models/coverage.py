"""How much of a model its masks cover: sparsity of the masked layers says little where much of the decoder is dense."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from patch.models.keep_masks import pruned_weights
from patch.models.structure import block_weights, blocks_as_stars, linear_at

logger = logging.getLogger(__name__)

_ENOUGH = 0.9
_NAMED = 4


@dataclass(frozen=True)
class Coverage:
    """Counts of weights: matrices in the decoder's blocks, without embeddings, output head, norms and biases.

    decoder_weights  all of them
    masked_weights   those of masked layers
    pruned_weights   those that the masks prune
    left_dense       {name, block numbers as *: weights} of what no mask covers, the largest first
    """

    decoder_weights: int
    masked_weights: int
    pruned_weights: int
    left_dense: dict[str, int]

    @property
    def share(self) -> float:
        """Share of the decoder's weights that are in masked layers."""
        return self.masked_weights / self.decoder_weights

    @property
    def sparsity(self) -> float:
        """Share of zeros in the masked layers."""
        return self.pruned_weights / self.masked_weights

    @property
    def decoder_sparsity(self) -> float:
        """Share of the decoder's weights that the masks prune."""
        return self.pruned_weights / self.decoder_weights

    def as_dict(self) -> dict[str, Any]:
        """JSON values: the counts, and the shares that follow from them."""
        shares = {"share": self.share, "sparsity": self.sparsity, "decoder_sparsity": self.decoder_sparsity}
        return asdict(self) | shares

    def text(self) -> str:
        """One line for people."""
        return coverage_text(self.sparsity, self.decoder_sparsity, self.share)

    def warning(self) -> str | None:
        """What is left dense, where that is more than a tenth of the decoder."""
        if self.share >= _ENOUGH:
            return None
        named = [f"{name} ({size / self.decoder_weights:.1%})" for name, size in self.left_dense.items()][:_NAMED]
        more = f" and {len(self.left_dense) - _NAMED} more" if len(self.left_dense) > _NAMED else ""
        share = f"only {self.share:.1%} of the decoder's weights are in masked layers"
        return f"{share}, left dense: {', '.join(named)}{more}"


def coverage_text(sparsity: float, decoder_sparsity: float, share: float, **_: Any) -> str:
    """The line of `Coverage.text` from the values of `Coverage.as_dict`."""
    return (
        f"sparsity {sparsity:.4f} in the masked layers, {decoder_sparsity:.4f} over the whole decoder "
        f"({share:.1%} of the decoder's weights are in masked layers)"
    )


def coverage(model: nn.Module, masks: Mapping[str, Tensor]) -> Coverage:
    """What masks {layer name: keep (N, K) bool} of a model's layers cover; the model may be on the meta device."""
    pruned = sum(pruned_weights(keep) for keep in masks.values())
    return coverage_of(model, {name: keep.numel() for name, keep in masks.items()}, pruned)


def coverage_of(model: nn.Module, masked: Mapping[str, int], pruned: int) -> Coverage:
    """The same from counts: {layer name: weights} of the masked layers, and how many weights are pruned."""
    weights = block_weights(model)
    left: dict[str, int] = {}
    for name, size in weights.items():
        if name.removesuffix(".weight") not in masked:
            shown = blocks_as_stars(name)
            left[shown] = left.get(shown, 0) + size
    ordered = dict(sorted(left.items(), key=lambda item: -item[1]))
    return Coverage(sum(weights.values()), sum(masked.values()), pruned, ordered)


def warn_of_dense_rest(model: nn.Module, layers: Iterable[str]) -> None:
    """Log a warning that names what masks of these layers leave dense, where that is more than a tenth."""
    masked = {name: linear_at(model, name).weight.numel() for name in layers}
    if message := coverage_of(model, masked, 0).warning():
        logger.warning("%s", message)
