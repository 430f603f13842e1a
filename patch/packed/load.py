"""Loads a language model, packed or dense, and refuses a checkpoint that is not complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
from pydantic import Field
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)

from patch.files.paths import require_model_path
from patch.files.safetensors_header import read_header
from patch.files.schema import Says, listed, parse, record
from patch.files.strict_json import read_json
from patch.models.adapted_linear import ADAPTER_KEYS
from patch.packed.quantization_config import METHOD
from patch.packed.quantizer import verification

_ADVICE = "Export the model, or copy the whole folder, again."
_USE_ARTIFACT = "Put the artifact of compress on the dense model instead (--masks, or patch.slim)."
_WHERE = ("trust_remote_code", "revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
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
    """Language model from a folder of save_packed, save_dense or save_pretrained, or a hub id.

    verify   check the SHA-256 of every packed layer, and of the tensors beside them where config.json has it
    kwargs   go to from_pretrained (device_map, dtype, ...)
    returns  a model of the class that was packed; of a dense folder the class of AutoModelForCausalLM, or of
             AutoModelForImageTextToText where the configuration has no causal language model
    raises   FileNotFoundError, or ValueError naming the file, layer and rule. Unlike from_pretrained, a
             checkpoint that lacks tensors is refused instead of being completed by random ones.
    """
    name = require_model_path(path)
    if os.path.isdir(name):
        _check_folder(Path(name))
    with _config_errors(name):
        config = AutoConfig.from_pretrained(name, **{key: kwargs[key] for key in _WHERE if key in kwargs})
    return open_as(_class_of(config), name, verify=verify, **kwargs)


def open_as(cls: Any, name: str, *, verify: bool = True, **kwargs: Any) -> PreTrainedModel:
    """A model of a class, or of an automatic class, from a folder or hub id; see load."""
    try:
        with verification(verify), _config_errors(name):
            loaded: Any = cls.from_pretrained(name, output_loading_info=True, **kwargs)
    except ValueError:
        _check_generation(Path(name))
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


def _class_of(config: Any) -> Any:
    """The class that opens a model: names of layers and tensors belong to the one that was packed."""
    named = getattr(transformers, str((config.architectures or [""])[0]), None)
    is_packed = getattr(config, "quantization_config", None) is not None
    if is_packed and config.quantization_config.get("quant_method") == METHOD and isinstance(named, type):
        return named
    causal, multimodal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if type(config) in multimodal and type(config) not in causal:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


@contextlib.contextmanager
def _config_errors(name: str) -> Iterator[None]:
    """What transformers raises for values of config.json that fit no model, or not its tensors, as a ValueError."""
    try:
        yield
    except (OSError, ValueError, ImportError, torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        expected = "expected a config.json that describes the model of its tensors"
        raise ValueError(f"{name}: {expected}, got one that transformers refuses ({reason}). {_ADVICE}") from error


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
