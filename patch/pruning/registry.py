"""The registry of pruning methods: one row a method, from which commands, published functions and the study take it.

Importing it imports no method, so that a command's help answers at once.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from patch.files.schema import require_choice
from patch.pruning.options import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_NSAMPLES,
    PATTERNS,
    Pattern,
    Precision,
    PruneOptions,
)

if TYPE_CHECKING:
    import torch

    from patch.pruning.selection import Pruned


@dataclass(frozen=True)
class Method:
    """A pruning method.

    label                   its name in tables
    module                  module with `prune(weight, statistics, options, stays) -> Pruned`, `costs` for pattern tiles
                            and, with reads_inputs, a class `Statistics`; with learns: `learn_masks` and
                            `check_learnable` (see proxsparse.training)
    reads_inputs            whether it gathers statistics of the layers' inputs from calibration data
    updates_weights         whether kept weights change, so that a mask alone is not the result
    learns                  masks are learned for the whole model at once
    patterns                what it can prune to
    options                 fields of PruneOptions that it reads besides pattern and sparsity
    nsamples                calibration samples that are usual for it
    block_size              columns treated at once unless the caller says otherwise
    two_of_four_block_size  the same for pattern 2:4
    section                 what a command's settings of its own are called, "" for none
    settings                "module:record" of these settings
    flags                   {flag of the command: setting of the section}
    """

    label: str
    module: str
    reads_inputs: bool = False
    updates_weights: bool = False
    learns: bool = False
    patterns: tuple[Pattern, ...] = PATTERNS
    options: tuple[str, ...] = ("precision",)
    nsamples: int = DEFAULT_NSAMPLES
    block_size: int = DEFAULT_BLOCK_SIZE
    two_of_four_block_size: int = DEFAULT_BLOCK_SIZE
    section: str = ""
    settings: str = ""
    flags: tuple[tuple[str, str], ...] = ()

    @property
    def needs_calibration(self) -> bool:
        """Whether the method reads token ids."""
        return self.learns or self.reads_inputs

    @property
    def code(self) -> ModuleType:
        """The module, imported now."""
        return importlib.import_module(self.module)

    @property
    def settings_type(self) -> type | None:
        """Record of the method's own settings, None for a method without."""
        module, _, name = self.settings.partition(":")
        return getattr(importlib.import_module(module), name) if module else None

    def prune(
        self, weight: torch.Tensor, statistics: Any, options: PruneOptions, stays: torch.Tensor | None = None
    ) -> Pruned:
        """Prune a weight (N, K) by the statistics of its inputs (None without reads_inputs).

        stays  (N, K) bool: weights that are not pruned, with pattern 2:4
        """
        pruned: Pruned = self.code.prune(weight, statistics, options, stays)
        return pruned

    def costs(self, weight: torch.Tensor, statistics: Any, options: PruneOptions) -> torch.Tensor:
        """What the method believes that pruning each weight (N, K) adds to the squared error of the layer's output."""
        costs: torch.Tensor = self.code.costs(weight, statistics, options)
        return costs

    def new_statistics(self, weight: torch.Tensor, options: PruneOptions) -> Any:
        """Empty statistics for the inputs of weight (N, K), on its device."""
        from patch.pruning.selection import working_dtype

        dtype = working_dtype(weight, options.precision)
        return self.code.Statistics(weight.shape[1], dtype=dtype, device=weight.device)


METHODS: dict[str, Method] = {
    "magnitude": Method("magnitude", "patch.pruning.magnitude"),
    "wanda": Method("Wanda", "patch.pruning.wanda", reads_inputs=True, options=("precision", "shift_zero_metrics")),
    "sparsegpt": Method(
        "SparseGPT",
        "patch.pruning.sparsegpt",
        reads_inputs=True,
        updates_weights=True,
        options=("precision", "damping", "block_size"),
    ),
    "thanos": Method(
        "Thanos",
        "patch.pruning.thanos",
        reads_inputs=True,
        updates_weights=True,
        options=("precision", "damping", "block_size"),
        two_of_four_block_size=512,  # of the paper
    ),
    "prox_sparse": Method(
        "ProxSparse",
        "patch.pruning.proxsparse.training",
        learns=True,
        patterns=("2:4",),
        options=(),
        nsamples=400,  # one for each step of the published settings
        section="prox",
        settings="patch.pruning.proxsparse.config:ProxSparseConfig",
        flags=(("--prox-lambda", "lam"), ("--prox-lr", "lr"), ("--prox-steps", "steps")),
    ),
}


def method_names() -> list[str]:
    """Names of all methods, in the order of the registry."""
    return list(METHODS)


def get_method(name: str) -> Method:
    """The registered method; raises ValueError for any other name."""
    require_choice("method", name, METHODS)
    return METHODS[name]


def reference_method(name: str) -> str:
    """The method for the unstructured reference of the tile scores: itself, or wanda where it knows only 2:4."""
    return name if "unstructured" in get_method(name).patterns else "wanda"


def make_options(
    method: Method,
    pattern: Pattern,
    sparsity: float,
    block_size: int | None,
    damping: float,
    shift_zero_metrics: bool,
    precision: Precision,
) -> PruneOptions:
    """Checked options; block_size None is the method's default for the pattern."""
    if block_size is None:
        block_size = method.block_size if pattern == "unstructured" else method.two_of_four_block_size
    options = PruneOptions(pattern, sparsity, block_size, damping, shift_zero_metrics, precision)
    if pattern not in method.patterns:
        known = f"{' or '.join(method.patterns)} for method {method.label}"
        raise ValueError(f"pattern: expected {known}, got {pattern}. Use wanda for other patterns.")
    return options
