"""ProxSparse: train the weights until every four of them have at most two left, and keep that choice as a 2:4 mask.

Source: Liu et al., "ProxSparse: Regularized Learning of Semi-Structured Sparsity Masks for Pretrained LLMs", 2025.
"""

from __future__ import annotations

from patch.pruning.proxsparse.proximal import frozen_weight_gradient, frozen_weight_penalty, prox, regularizer
from patch.pruning.proxsparse.training import DEFAULT_NSAMPLES, ProxSparseConfig, check_learnable, learn_masks

__all__ = [
    "DEFAULT_NSAMPLES",
    "ProxSparseConfig",
    "check_learnable",
    "frozen_weight_gradient",
    "frozen_weight_penalty",
    "learn_masks",
    "prox",
    "regularizer",
]
