"""How to prune: the options that all methods share."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from patch.files.schema import Says, record
from patch.settings import AtLeastOne, Positive, Seed, Tile, setting

GROUP = 4
Pattern = Literal["2:4", "tiles", "unstructured"]
Precision = Literal["fp32", "fp64"]
CompensationMethod = Literal["blocks", "least_squares", "sparsegpt"]
TilesBy = Literal["fisher", "error", "share"]
Budget = Literal["model", "block", "layer"]
FewExperts = Literal["magnitude", "route", "refuse"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
COMPENSATIONS: tuple[CompensationMethod, ...] = get_args(CompensationMethod)
DEFAULT_BLOCK_SIZE = 128
DEFAULT_DAMPING = 0.01
DEFAULT_NSAMPLES = 128
DEFAULT_SEQLEN = 2048
DEFAULT_EXPERT_TOKENS = 256
EXPERT_TOKENS_HELP = "mixtures: calibration tokens that an expert's statistics need at least"
FEW_EXPERTS_HELP = "mixtures: experts with fewer tokens: magnitude, route (more tokens to them), or refuse"
_MOST_A_STEP = 8
_LEAST_STEPS = 128

ShareBelowOne = Annotated[
    float, Field(ge=0, lt=1), Says("a share of zeros from 0 up to but not including 1", "Write 0.45 for 45 %.")
]
Damping = Annotated[
    float, Field(ge=0), Says("a finite share of the mean diagonal, 0 or more", "The usual one is 0.01.")
]


@record
class PruneOptions:
    """How to prune; fields as in `patch.pruning.prune_weight`. raises ValueError naming the field."""

    pattern: Pattern = "2:4"
    sparsity: ShareBelowOne = 0.5
    block_size: AtLeastOne = setting(DEFAULT_BLOCK_SIZE, "columns treated at once")
    damping: Damping = DEFAULT_DAMPING
    shift_zero_metrics: bool = False
    precision: Precision = "fp32"

    @model_validator(mode="after")
    def _fits_the_pattern(self) -> PruneOptions:
        if self.pattern == "2:4" and self.sparsity != 0.5:
            advice = "Use pattern='tiles' for dense and 2:4 tiles at less sparsity, or pattern='unstructured'."
            raise ValueError(f"sparsity: expected 0.5 for pattern 2:4, got {self.sparsity!r}. {advice}")
        if self.pattern == "tiles" and self.sparsity > 0.5:
            advice = "Dense and 2:4 tiles reach no more; pattern='unstructured' does."
            raise ValueError(f"sparsity: expected 0 to 0.5 for pattern tiles, got {self.sparsity!r}. {advice}")
        if self.pattern != "unstructured":
            from patch_kernels.checks import require_multiple  # brings torch, which help must not wait for

            require_multiple("block_size", self.block_size, GROUP, "Pattern 2:4 needs that; the usual one is 128.")
        return self


@record
class TileOptions:
    """Which tiles stay dense with pattern "tiles". raises ValueError naming the field."""

    by: TilesBy = setting(
        "fisher", "what ranks tiles: fisher, the model's loss; error, the method's; share, the paper's"
    )
    budget: Budget = setting("model", "what has the sparsity: the whole model, every block or every layer")
    tile: Tile = setting((128, 128), "rows,columns of a tile", metavar="R,C")
    samples: AtLeastOne = setting(64, "calibration samples whose gradients fisher takes, at most")


@record
class ExpertOptions:
    """What is done about experts of a mixture that few calibration tokens reach. raises ValueError naming the field."""

    tokens: AtLeastOne = setting(DEFAULT_EXPERT_TOKENS, EXPERT_TOKENS_HELP)
    few: FewExperts = setting("magnitude", FEW_EXPERTS_HELP)


@record
class BlockOptions:
    """How `fit_block` trains a block. raises ValueError naming the field."""

    epochs: AtLeastOne = setting(2, "passes over the calibration samples for each block")
    lr: Positive = setting(
        0.02,
        "learning rate of Adam in root mean squares of a layer's kept weights; it falls linearly to 0",
        metavar="LR",
    )
    batch_size: AtLeastOne | None = setting(
        None, "calibration samples a step; None: 8, or as many fewer as it takes to make 128 steps"
    )
    seed: Seed = setting(0, "seed of the order of the samples")

    def samples_a_step(self, nsamples: int) -> int:
        """The batch size for so many samples: 32 steps, say, leave a block unfinished whatever the rate."""
        return self.batch_size or max(1, min(_MOST_A_STEP, self.epochs * nsamples // _LEAST_STEPS))

    def for_samples(self, nsamples: int) -> BlockOptions:
        """These options with the batch size as a number."""
        return dataclasses.replace(self, batch_size=self.samples_a_step(nsamples))


def require_options(what: str, value: Any, kind: type) -> None:
    """raises TypeError for what is not of a record of options; `what` begins the message."""
    if not isinstance(value, kind):
        name = kind.__name__
        raise TypeError(f"{what}: expected patch.pruning.{name}, got {type(value).__name__}. Write {name}(...).")
