"""Loads a causal language model, packed or dense, and refuses a checkpoint that is not complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from patch.files.folder import resolve_folder
from patch.files.safetensors_header import read_header
from patch.files.schema import Says, listed, parse, record
from patch.files.strict_json import read_json
from patch.models.adapted_linear import ADAPTER_KEYS
from patch.packed.quantizer import verification

_ADVICE = "Export the model, or copy the whole folder, again."
_USE_ARTIFACT = "Put the artifact of compress on the dense model instead (--masks, or patch.slim)."
_Shard = Annotated[
    str,
    Field(pattern=r"^[^/\x00]+\.safetensors$"),
    Says("plain names of safetensors files", "Do not load it."),
]


@record(others=True)
class _Index:
    """Contents of model.safetensors.index.json: the file of each tensor."""

    weight_map: Annotated[dict[str, _Shard], Field(min_length=1)]


def load(path: str | os.PathLike, *, verify: bool = True, **kwargs: Any) -> PreTrainedModel:
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
    try:
        with verification(verify):
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs)
    except ValueError:
        _check_generation(folder)
        raise
    model: PreTrainedModel
    model, info = loaded
    dropped = [key for key in info.get("unexpected_keys", ()) if str(key).endswith(ADAPTER_KEYS)]
    for expected, keys, what, advice in (
        ("a model without adapters", dropped, "tensors of adapters", _USE_ARTIFACT),
        (f"every tensor of {type(model).__name__}", info.get("missing_keys"), "missing keys", _ADVICE),
        (f"every tensor of {type(model).__name__}", info.get("mismatched_keys"), "mismatched keys", _ADVICE),
    ):
        if keys:
            raise ValueError(f"{name}: expected {expected}, found {what}: {listed(sorted(map(str, keys)))}. {advice}")
    return model


def _check_generation(folder: Path) -> None:
    """transformers refuses settings of generation that do not fit together, without a name of their file."""
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            GenerationConfig.from_pretrained(folder)
        except ValueError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            expected = "expected settings that fit together, transformers says"
            raise ValueError(f"{file}: {expected}: {reason}. Correct the file, or remove it.") from None


def _check_folder(folder: Path) -> None:
    """What transformers would answer with an obscure error, or follow out of the folder."""
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        given = parse(_Index, read_json(Path(os.path.realpath(index))), f"{index}: ", _ADVICE)
        shards = sorted(set(given.weight_map.values()))
    for name in ("config.json", *shards):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: expected a file of the model, found none. {_ADVICE}")
    for config in (folder / "config.json", folder / "generation_config.json"):
        if config.is_file():
            parse(dict[str, Any], read_json(Path(os.path.realpath(config))), f"{config}: ", _ADVICE)
    for name in shards:
        read_header(os.path.realpath(folder / name))
