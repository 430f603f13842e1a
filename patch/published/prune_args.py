"""The prune_args of the original PATCH code: names, defaults and checks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ValidationInfo, model_validator

from patch import settings
from patch.data.sources import require_source
from patch.files.schema import Says, part_of, record
from patch.pruning.options import Damping, Pattern, Precision, PruneOptions
from patch.pruning.proxsparse.config import ProxSparseConfig
from patch.pruning.registry import Method, get_method, make_options
from patch.published.arguments import record_of, values_of
from patch.settings import AtLeastOne, Share, Tile
from patch.slim.options import CompressOptions

MASKLLM = "maskllm"  # not a pruning method: the masks are those of prune_args["maskllm_checkpoint"]
_PUBLISHED_NAMES = {"method": "prune_method", "pattern": "sparsity_type", "sparsity": "sparsity_ratio"}


def _path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _source_is_there(name: str, info: ValidationInfo) -> str:
    return require_source(f"prune_args: {info.field_name}", name)


def _prox_config(value: Any) -> Any:
    return settings.build(ProxSparseConfig, value, prefix="prox_sparse.") if isinstance(value, Mapping) else value


PathText = Annotated[str, BeforeValidator(_path_text), Says("a name or path")]
Source = Annotated[PathText, AfterValidator(_source_is_there)]
ProxSettings = Annotated[
    ProxSparseConfig | None, BeforeValidator(_prox_config), Says("a dict of settings, or ProxSparseConfig")
]


@record(kw_only=True)
class PruneArgs(CompressOptions):
    """prune_args under their published names, those of CompressOptions among them.

    nsamples     None: what is usual for the method
    prox_sparse  settings of prune_method "prox_sparse"
    """

    prune_method: str = "wanda"
    sparsity_type: Pattern = "2:4"
    sparsity_ratio: Share = 0.5
    nsamples: AtLeastOne | None = None
    maskllm_checkpoint: PathText | None = None
    optimizer_FT_pruning: Literal["adamw_torch"] = "adamw_torch"
    calibration_dataset: Source = "c4"
    eval_dataset: Source = "wikitext2"
    shift_zero_metrics: bool = False
    precision: Precision = "fp32"
    damping: Damping = 0.01
    block_size: AtLeastOne | None = None
    fine_tune: bool = False
    prox_sparse: ProxSettings = None
    fine_tune_dataset: Source = "slimpajama"

    @model_validator(mode="after")
    def _fits_together(self) -> PruneArgs:
        self.pruning()
        got = f"got {self.prune_method!r}"
        if self.prox_sparse is not None and self.prune_method != "prox_sparse":
            raise ValueError(f"prox_sparse: expected only with prune_method 'prox_sparse', {got}. Leave it out.")
        fixed_adapters = self.lora_rank == 0 or self.quantize_lora or self.prune_lora
        if self.fine_tune and self.quantize_weight and fixed_adapters:
            advice = "Set lora_rank without quantize_lora and prune_lora, or leave fine_tune out."
            raise ValueError(f"fine_tune: expected weights or adapters to train, got quantised ones only. {advice}")
        if self.is_stored != (self.maskllm_checkpoint is not None):
            expected = "expected prune_method 'maskllm' and maskllm_checkpoint together"
            raise ValueError(f"{expected}, {got} and {self.maskllm_checkpoint!r}. Give both or neither.")
        if self.is_stored and self.sparsity_type != "2:4":
            expected = "expected '2:4' with prune_method 'maskllm'"
            raise ValueError(f"sparsity_type: {expected}, got {self.sparsity_type!r}. Leave it out.")
        return self

    @property
    def is_stored(self) -> bool:
        """Whether the masks are not made but read, from maskllm_checkpoint."""
        return self.prune_method == MASKLLM

    @property
    def computed_method(self) -> str:
        """Name of the method that is run: a stored mask only needs its tiles scored, which is done by Wanda."""
        return "wanda" if self.is_stored else self.prune_method

    @property
    def method(self) -> Method:
        """The registered method that is run."""
        return get_method(self.computed_method)

    @property
    def samples(self) -> int:
        """Calibration samples."""
        return self.method.nsamples if self.nsamples is None else self.nsamples

    @property
    def own_settings(self) -> Any:
        """Settings of the method's own, the published ones where none are given; None for a method without."""
        kind = self.method.settings_type
        return None if kind is None else self.prox_sparse or kind()

    @property
    def is_calibrated(self) -> bool:
        """Whether the calibration set is read."""
        return self.method.needs_calibration or self.compression().needs_calibration

    def pruning(self) -> PruneOptions:
        """Checked options of the pruning itself, with the method's block size where none is given."""
        try:
            return make_options(
                self.method,
                self.sparsity_type,
                self.sparsity_ratio,
                self.block_size,
                self.damping,
                self.shift_zero_metrics,
                self.precision,
            )
        except ValueError as error:
            # Names as the caller wrote them: "pattern: expected ..." and "Use pattern='...'".
            names = rf"\b({'|'.join(_PUBLISHED_NAMES)})(?=[:=])"
            raise ValueError(re.sub(names, lambda found: _PUBLISHED_NAMES[found[0]], str(error))) from None

    def compression(self) -> CompressOptions:
        """What is done on top of the masks."""
        return part_of(CompressOptions, self)


def read_prune_args(given: Mapping[str, Any] | Any) -> PruneArgs:
    """Checked prune_args of a dict or a namespace. raises ValueError, TypeError or FileNotFoundError."""
    return record_of(PruneArgs, values_of(given, "prune_args"), "prune_args")


@record
class Target:
    """The tiles that will be learned, and the share of zeros of the reference that scores them."""

    mask_tile_size: Tile
    target_sparsity_ratio: Share


def read_target(tile: Any, sparsity: Any) -> Target:
    """Checked tile size and target."""
    return Target(tile, sparsity)
