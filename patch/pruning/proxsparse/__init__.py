"""ProxSparse: train the weights until every four of them have at most two left, and keep that choice as a 2:4 mask.

Source: Liu et al., "ProxSparse: Regularized Learning of Semi-Structured Sparsity Masks for Pretrained LLMs", 2025.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from patch.files.lazy import lazy_names

if TYPE_CHECKING:
    from patch.pruning.proxsparse.config import ProxSparseConfig
    from patch.pruning.proxsparse.proximal import prox
    from patch.pruning.proxsparse.training import learn_masks

__all__ = ["ProxSparseConfig", "learn_masks", "prox"]

__getattr__, __dir__ = lazy_names(
    __name__, {"ProxSparseConfig": "config", "learn_masks": "training", "prox": "proximal"}
)
