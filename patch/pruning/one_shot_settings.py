"""How a dense model becomes a hybrid one; a command's help reads this, so torch is not imported."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from patch.files.schema import record
from patch.pruning.options import (
    DEFAULT_EXPERT_TOKENS,
    DEFAULT_NSAMPLES,
    EXPERT_TOKENS_HELP,
    FEW_EXPERTS_HELP,
    BlockOptions,
    Budget,
    CompensationMethod,
    ExpertOptions,
    FewExperts,
    TilesBy,
)
from patch.pruning.registry import METHODS
from patch.settings import AtLeastOne, Names, Share, Tile, setting

# More calibration tokens than these gained next to nothing where it was measured.
_TOKENS = 131_072
# Calibration samples by which channels are reordered, at most.
REORDER_SAMPLES = 128


def default_nsamples(seqlen: int) -> int:
    """Calibration samples of so many tokens: 131,072 tokens in all, and at least 128 samples."""
    return max(DEFAULT_NSAMPLES, _TOKENS // seqlen)


def hybrid_methods() -> list[str]:
    """Names of the pruning methods that can leave tiles dense."""
    return [name for name, method in METHODS.items() if "tiles" in method.patterns]


@record(kw_only=True)
class OneShotSettings:
    """Settings of `patch.oneshot`. raises ValueError naming the field."""

    sparsity: Share = setting(0.45, "share of zeros in the masked layers, 0 to 0.5")
    method: str = setting("sparsegpt", "method that makes the 2:4 patterns", metavar="METHOD", choices=hybrid_methods)
    tiles_by: TilesBy = setting("fisher", "what ranks tiles: fisher, error or share", metavar="BY")
    budget: Budget = setting("model", "what has the sparsity: the model, every block, or every layer", metavar="OF")
    tile: Tile = setting((128, 128), "rows,columns of a tile", metavar="R,C")
    reorder: bool = setting(False, "reorder channels first, so that 2:4 costs less: a small gain for some minutes")
    reconstruct: CompensationMethod = setting(
        "blocks", "how the kept weights make up for the others: blocks, least_squares or sparsegpt", metavar="METHOD"
    )
    epochs: AtLeastOne | None = setting(None, "blocks: passes over the calibration samples (default 2)")
    batch_size: AtLeastOne | None = setting(
        None, "blocks: calibration samples a step (default: 8, or fewer for 128 steps); fewer need less memory"
    )
    expert_tokens: AtLeastOne = setting(DEFAULT_EXPERT_TOKENS, EXPERT_TOKENS_HELP)
    few_experts: FewExperts = setting("magnitude", FEW_EXPERTS_HELP, metavar="RULE")
    exclude: Names = setting((), "layers to leave dense, as patterns such as '*.k_proj'", metavar="A,B")

    @model_validator(mode="after")
    def _is_read(self) -> OneShotSettings:
        if self.method not in hybrid_methods():
            expected = f"expected one of {', '.join(hybrid_methods())}"
            raise ValueError(f"method: {expected}, got {self.method!r}. The usual one is sparsegpt.")
        for name, value in _of_blocks(self).items():
            if self.reconstruct != "blocks":
                got = f"got {value}. Leave it out, or use reconstruct='blocks'."
                raise ValueError(f"{name}: expected none with reconstruct {self.reconstruct}, {got}")
        return self


def expert_options(settings: Any) -> ExpertOptions:
    """What is done about experts with few tokens, by settings that have `expert_tokens` and `few_experts`."""
    return ExpertOptions(settings.expert_tokens, settings.few_experts)


def block_options(settings: OneShotSettings) -> BlockOptions:
    """How blocks are fitted with these settings."""
    return BlockOptions(**_of_blocks(settings))


def _of_blocks(settings: OneShotSettings) -> dict[str, int]:
    """Settings of the block fit that were given."""
    values = {"epochs": settings.epochs, "batch_size": settings.batch_size}
    return {name: value for name, value in values.items() if value is not None}
