"""Write a model as a folder: dense (opens with plain transformers) or packed (opens with patch.load)."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patch.files.folder import write_folder
from patch.files.schema import listed
from patch.files.strict_json import read_json
from patch.models.adapted_linear import refuse_adapters
from patch.models.facts import config_fingerprint
from patch.models.keep_masks import check_masks_hold
from patch.packed.convert import unpack_model
from patch.packed.headers import other_sha256
from patch.packed.load import load, open_as
from patch.packed.swap import packed_layers
from patch_kernels.checks import kind_of

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
    raises     ValueError when a weight that its keep mask prunes is not zero, a layer has adapters, or what was
               written does not load as the model that was given: then nothing is left at path.
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
        _check_written(model, directory)

    return write_folder(path, write, replace=replace)


def save_packed(
    model: PreTrainedModel,
    tokenizer: Any,
    path: str | os.PathLike,
    *,
    max_shard_size: str = DEFAULT_SHARD,
    replace: bool = True,
    finish: Callable[[Path], object] | None = None,
) -> Path:
    """Write a packed model (patch.packed.pack_model) for patch.load; `replace` and what is returned as in save_dense.

    finish  is called with the complete folder before it gets its name: it may open it, add files to it, or raise
    raises  ValueError when the model has no packed layer, or what was written does not load as the model that
            was given: then nothing is left at path.
    """
    if not any(packed_layers(model)):
        got = f"{type(model).__name__} without a packed layer"
        raise ValueError(f"expected a packed model, got {got}; call patch.packed.pack_model(model) first")

    def write(directory: Path) -> None:
        _save(model, tokenizer, directory, max_shard_size)
        path = directory / "config.json"
        config = read_json(path)
        config["quantization_config"]["config_sha256"] = config_fingerprint(config)
        config["quantization_config"]["other_sha256"] = other_sha256(sorted(directory.glob("*.safetensors")))
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _check_written(model, directory)
        if finish is not None:
            finish(directory)

    return write_folder(path, write, replace=replace)


def _save(model: PreTrainedModel, tokenizer: Any, directory: Path, max_shard_size: str) -> None:
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _check_written(model: PreTrainedModel, directory: Path) -> None:
    """Open what was written, and refuse it unless every tensor is that of the model, bit for bit.

    The files are mapped and tensors compared one by one: a second model never is in memory.
    """
    # As its own class: of a dense folder load may take another one (the text decoder alone), and the code of a class
    # that is not of transformers is no part of what was written.
    by_load = any(packed_layers(model)) and type(model).__module__.startswith("transformers.")
    again = load(directory) if by_load else open_as(type(model), str(directory))
    wanted, got = model.state_dict(), again.state_dict()
    differ = sorted(name for name in wanted.keys() | got.keys() if not _is_same(wanted.get(name), got.get(name)))
    if differ:
        first = differ[0]
        have, have_not = (kind_of(tensors[first]) if first in tensors else "nothing" for tensors in (wanted, got))
        raise ValueError(
            f"{listed(differ)}: expected the model's tensors ({have}) when what was written is opened again, "
            f"got others ({have_not}). Nothing was kept; give the whole model one dtype, or use save_pretrained."
        )


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bits = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*bits)
