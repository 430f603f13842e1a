"""Write a model as a folder: dense (opens with plain transformers) or packed (opens with patch.load)."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from patch.files.folder import write_folder
from patch.files.strict_json import read_json
from patch.models.adapted_linear import refuse_adapters
from patch.models.keep_masks import check_masks_hold
from patch.packed.convert import unpack_model
from patch.packed.swap import packed_layers

DEFAULT_SHARD = "5GB"


def save_dense(
    model: PreTrainedModel,
    tokenizer: Any,
    path: str | os.PathLike,
    *,
    max_shard_size: str = DEFAULT_SHARD,
    replace: bool = True,
) -> Path:
    """Write an ordinary transformers folder: weights with zeros where pruned, no sparsity key in config.json.

    model      dense, or packed (a dense copy is made; the model itself is not changed)
    tokenizer  saved beside it; None leaves it out
    replace    False: what is at the path by then is kept, the folder gets the next free name
    returns    the folder that was written
    raises     ValueError when a weight that its keep mask prunes is not zero, or a layer has adapters.
    """
    check_masks_hold(model)
    refuse_adapters(model)
    if any(packed_layers(model)):
        model = unpack_model(copy.deepcopy(model))

    def write(directory: Path) -> None:
        _save(model, tokenizer, directory, max_shard_size)
        if "quantization_config" in read_json(directory / "config.json"):
            raise ValueError(
                "expected a dense model, got one with a quantization_config of another method; dequantize it"
            )

    return write_folder(path, write, replace=replace)


def save_packed(
    model: PreTrainedModel,
    tokenizer: Any,
    path: str | os.PathLike,
    *,
    max_shard_size: str = DEFAULT_SHARD,
    replace: bool = True,
) -> Path:
    """Write a packed model (patch.packed.pack_model) for patch.load; `replace` and what is returned as in save_dense.

    raises  ValueError when the model has no packed layer.
    """
    if not any(packed_layers(model)):
        got = f"{type(model).__name__} without a packed layer"
        raise ValueError(f"expected a packed model, got {got}; call patch.packed.pack_model(model) first")
    return write_folder(path, lambda directory: _save(model, tokenizer, directory, max_shard_size), replace=replace)


def _save(model: PreTrainedModel, tokenizer: Any, directory: Path, max_shard_size: str) -> None:
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
