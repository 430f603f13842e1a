"""Loads a causal language model, packed or dense, and refuses a checkpoint that is not complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from patch.files.folder import resolve_folder
from patch.files.safetensors_header import read_header
from patch.files.strict_json import read_json
from patch.models.adapted_linear import ADAPTER_KEYS
from patch.packed.quantizer import verification


def load(path: str | os.PathLike, *, verify: bool = True, **kwargs: Any) -> nn.Module:
    """Causal language model from a folder of save_packed, save_dense or save_pretrained, or a hub id.

    verify   check the SHA-256 of every packed layer
    kwargs   go to AutoModelForCausalLM.from_pretrained (device_map, dtype, ...)
    raises   FileNotFoundError, or ValueError naming the file, layer and rule. Unlike from_pretrained, a
             checkpoint that lacks tensors is refused instead of being completed by random ones.
    """
    name = os.fspath(path)
    folder = resolve_folder(name, must_exist=False)
    if folder.is_dir():
        name = str(folder)
        _check_folder(folder)
    elif name.startswith((".", "/", "~")) or os.path.lexists(name) or name.count("/") > 1:
        raise FileNotFoundError(f"expected a folder with a model at {name}, found none; check the path")
    with verification(verify):
        model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs)
    if dropped := [str(key) for key in info.get("unexpected_keys", ()) if str(key).endswith(ADAPTER_KEYS)]:
        raise ValueError(
            f"{name}: expected a model without adapters, found {len(dropped)} tensors of them: {sorted(dropped)[:2]}; "
            "put the artifact of compress on the dense model instead (--masks, or patch.slim)"
        )
    for problem in ("missing_keys", "mismatched_keys"):
        if keys := info.get(problem):
            raise ValueError(
                f"{name}: expected every tensor of {type(model).__name__}, found {len(keys)} "
                f"{problem.replace('_', ' ')}: {[str(key) for key in sorted(keys)][:5]}; export the model "
                "again"
            )
    return model


def _check_folder(folder: Path) -> None:
    """What transformers would answer with an obscure error, or follow out of the folder."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: expected config.json of a model, found none; give a folder made by export")
    config = read_json(Path(os.path.realpath(folder / "config.json")))
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: expected a JSON object; export the model again")
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.is_file():
        weight_map = read_json(Path(os.path.realpath(index)))
        weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index}: expected a weight_map of file names; export the model again")
        shards = set(weight_map.values())
    for shard in sorted(shards):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: expected plain names of safetensors files, got {shard[:200]!r}; do not load it")
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / shard}: missing; copy the whole folder again")
        read_header(os.path.realpath(folder / shard))
