"""PATCH: learn which tiles of a language model's weights stay dense and which become 2:4 sparse.

Importing this package is cheap: torch and transformers are imported by the modules that need them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "oneshot"]

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from patch.pruning.one_shot import OneShot


def load(path: str | os.PathLike, *, verify: bool = True, **kwargs: Any) -> PreTrainedModel:
    """Language model, packed or dense, from a folder or a hub id; see patch.packed.load."""
    from patch.files.paths import require_model_path

    name = require_model_path(path)  # before transformers is imported, which takes seconds
    from patch.packed.load import load as load_model

    return load_model(name, verify=verify, **kwargs)


def oneshot(model: nn.Module, tokenizer: Any = None, **arguments: Any) -> OneShot:
    """Make a dense language model hybrid in place: prune, then reconstruct; see patch.pruning.one_shot."""
    from patch.pruning.one_shot import oneshot as run

    return run(model, tokenizer, **arguments)
