"""How ProxSparse trains."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from patch.files.schema import record
from patch.settings import AtLeastOne, NotNegative, Positive, Seed, setting


@record
class ProxSparseConfig:
    """How `learn_masks` trains; the defaults are the published ones. raises ValueError naming the setting."""

    lam: NotNegative = setting(
        0.1,
        "prox_sparse: weight of the regulariser in the proximal step, not multiplied by lr; it differs from model to "
        "model (docs/guide/prune.md)",
        metavar="LAMBDA",
    )
    lr: Positive = setting(1e-4, "prox_sparse: peak learning rate of AdamW (betas 0.9, 0.999, eps 1e-8)", metavar="LR")
    steps: AtLeastOne = setting(400, "prox_sparse: optimiser steps; all samples are read before one is read again")
    batch_size: AtLeastOne = setting(1, "samples per step")
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = setting(
        0.1, "share of the steps in which lr rises from 0; it falls linearly to 0 afterwards"
    )
    max_grad_norm: Positive = setting(1.0, "gradients of all weights together are scaled down to this norm")
    frozen_lam: NotNegative = setting(0.0, "weight of `frozen_weight_penalty`; 0: without it")
    frozen_epsilon: Positive = setting(0.1, "epsilon of `frozen_weight_penalty`")
    seed: Seed = setting(42, "seed of the sample order and of dropout")
    grad_checkpoint: bool = setting(False, "compute activations again in the backward pass: less memory, more time")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step; the first is 0. Linear warm-up, then linear to 0 at the end."""
        warmup = math.ceil(self.steps * self.warmup_ratio)
        if step < warmup:
            return self.lr * step / warmup
        return self.lr * max(0, self.steps - step) / max(1, self.steps - warmup)
