"""Packed models in transformers: importing this module registers the quantization method "patch".

    import patch.hf
    model = AutoModelForCausalLM.from_pretrained(folder)      # or patch.load(folder)

transformers needs the import: without it, it only warns about an unknown method and loads random weights.
config.json holds the sizes and a checksum of every packed layer; they are checked against the headers of the
safetensors files before a tensor is allocated, and against the tensors after loading.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from patch.convert import layer_sha256, packed_layers, unpack_model
from patch.folder import is_count, read_json, resolve_folder
from patch.headers import TensorInfo, read_header
from patch.slim.lora import ADAPTER_KEYS
from patch_kernels import TILE, TiledLinear, payload_bytes, tile_grid

METHOD = "patch"
FORMAT_VERSION = 1
MAX_LAYERS = 100_000
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_HEADER_DTYPES = {"float16": "F16", "bfloat16": "BF16"}
_LAYER_KEYS = {"out_features", "in_features", "bias", "dtype", "payload_bytes", "sha256"}
_verify: contextvars.ContextVar[bool] = contextvars.ContextVar("patch_verify", default=True)


@register_quantization_config(METHOD)
class PatchConfig(QuantizationConfigMixin):
    """The quantization_config of a packed model.

    format_version  version of the packed format
    tile            [128, 128]
    layers          {module path: {out_features, in_features, bias, dtype, payload_bytes, sha256}}
    Everything is checked on construction; raises ValueError naming the layer and the rule.
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        tile: Sequence[int] = (TILE, TILE),
        quant_method: str = METHOD,
        **unknown: Any,
    ):
        if quant_method != METHOD:
            raise ValueError(f"quantization_config: expected quant_method {METHOD!r}, got {str(quant_method)[:80]!r}")
        if not is_count(format_version) or format_version != FORMAT_VERSION:
            raise ValueError(
                f"quantization_config: expected format_version {FORMAT_VERSION}, got "
                f"{repr(format_version)[:40]}; it "
                "was written by another version of patch-llm, install that one or export again"
            )
        if unknown:
            raise ValueError(f"quantization_config: unknown keys {sorted(unknown)[:5]}; export the model again")
        if not isinstance(tile, list | tuple) or list(tile) != [TILE, TILE] or not all(map(is_count, tile)):
            raise ValueError(f"quantization_config: expected tile [{TILE}, {TILE}], got {str(tile)[:80]}")
        if not isinstance(layers, Mapping) or not 0 < len(layers) <= MAX_LAYERS:
            raise ValueError(
                f"quantization_config: expected layers with 1 to {MAX_LAYERS} entries, got "
                f"{len(layers) if isinstance(layers, Mapping) else type(layers).__name__}; export the model "
                "again"
            )
        for name, layer in layers.items():
            _check_layer(name, layer)
        dtypes = {layer["dtype"] for layer in layers.values()}
        if len(dtypes) > 1:
            raise ValueError(f"quantization_config: expected one dtype for all layers, got {sorted(dtypes)}")
        self.quant_method = METHOD
        self.format_version = FORMAT_VERSION
        self.tile = [TILE, TILE]
        self.layers = {name: dict(layer) for name, layer in layers.items()}


@register_quantizer(METHOD)
class PatchHfQuantizer(HfQuantizer):
    """Builds packed layers before loading and checks them after it. Uses only hooks of transformers 5.17 to "
    "5.23."""

    requires_calibration = True  # only checkpoints that are packed already can be loaded

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("expected a device_map without 'disk', packed layers cannot be offloaded; use cpu or cuda")

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        checkpoint_files: Sequence[str] | None = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        config: PatchConfig = self.quantization_config
        for name, layer in config.layers.items():
            _check_module(model, name, layer)
        if checkpoint_files:
            check_files(checkpoint_files, config)
        for name, layer in config.layers.items():
            packed = TiledLinear(
                layer["in_features"],
                layer["out_features"],
                layer["bias"],
                payload_bytes=layer["payload_bytes"],
                dtype=_DTYPES[layer["dtype"]],
                device="meta",
            )
            model.set_submodule(name, packed)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        loaded = dict(packed_layers(model))
        for name, layer in self.quantization_config.layers.items():
            _check_loaded(name, layer, loaded.get(name))
            loaded[name].refresh_schedule()  # follows from the flags, so it is in no file
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return unpack_model(model, dtype=dtype)

    def remove_quantization_config(self, model: nn.Module) -> None:
        mark_dense(model)


def load(path: str | os.PathLike, *, verify: bool = True, **kwargs: Any) -> nn.Module:
    """Causal language model from a folder of export.save_packed, save_dense or save_pretrained, or a hub id.

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


@contextlib.contextmanager
def verification(enabled: bool) -> Iterator[None]:
    """Turn the checksum comparison on or off for from_pretrained calls inside the block."""
    token = _verify.set(enabled)
    try:
        yield
    finally:
        _verify.reset(token)


def mark_packed(model: nn.Module) -> None:
    """Give a model with TiledLinear layers the attributes that transformers saves and loads by."""
    layers = {
        name: {
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "bias": layer.bias is not None,
            "dtype": str(layer.weight_dtype).removeprefix("torch."),
            "payload_bytes": layer.payload.numel(),
            "sha256": layer_sha256(layer),
        }
        for name, layer in packed_layers(model)
    }
    config = PatchConfig(layers=layers)
    model.config.quantization_config = config
    model.hf_quantizer = PatchHfQuantizer(config, pre_quantized=True)
    model.quantization_method = METHOD
    model.is_quantized = True


def mark_dense(model: nn.Module) -> None:
    """Undo mark_packed."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
        (model.config, "_is_quantized"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    model.is_quantized = False


def check_files(files: Sequence[str | os.PathLike], config: PatchConfig) -> None:
    """Check the headers of all shards against the config, before anything is allocated."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(
                f"{file}: expected safetensors files, pickled weights are not read; export the model again"
            )
        header = read_header(os.path.realpath(file))  # the hub's cache holds links
        for name in header.keys() & tensors.keys():
            raise ValueError(f"{file}: tensor {name!r} is in two files; export the model again")
        tensors |= header
    where = Path(files[0]).parent
    for name, layer in config.layers.items():
        grid = tile_grid((layer["out_features"], layer["in_features"]))
        _check_tensor(where, f"{name}.payload", tensors, "U8", (layer["payload_bytes"],))
        _check_tensor(where, f"{name}.tile_is_sparse", tensors, "U8", tuple(grid))
        if layer["bias"]:
            _check_tensor(where, f"{name}.bias", tensors, _HEADER_DTYPES[layer["dtype"]], (layer["out_features"],))
        elif f"{name}.bias" in tensors:
            raise ValueError(f"{where}: {name}.bias is present, config.json says the layer has none; export again")
        if f"{name}.weight" in tensors:
            raise ValueError(f"{where}: {name} has a dense weight beside the packed one; export the model again")


def _check_tensor(
    where: Path, name: str, tensors: Mapping[str, TensorInfo], dtype: str, shape: tuple[int, ...]
) -> None:
    info = tensors.get(name)
    if info is None or info.dtype != dtype or info.shape != shape:
        got = "nothing" if info is None else f"{info.dtype} {info.shape}"
        raise ValueError(
            f"{where}: {name}: expected {dtype} {shape} by config.json, found {got}; export the model again"
        )


def _check_layer(name: Any, layer: Any) -> None:
    where = f"quantization_config: layer {str(name)[:200]!r}"
    if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)*", name, re.ASCII) or len(name) > 512:
        raise ValueError(f"{where}: expected a module path such as model.layers.0.mlp.up_proj")
    if not isinstance(layer, Mapping) or set(layer) != _LAYER_KEYS:
        got = sorted(map(str, layer))[:10] if isinstance(layer, Mapping) else type(layer).__name__
        raise ValueError(f"{where}: expected the keys {sorted(_LAYER_KEYS)}, got {got}; export the model again")
    for key in ("out_features", "in_features"):
        if not is_count(layer[key]) or not 0 < layer[key] < 1 << 31:
            raise ValueError(f"{where}: expected {key} of 1 to 2^31-1, got {str(layer[key])[:40]!r}")
    if not isinstance(layer["bias"], bool):
        raise ValueError(f"{where}: expected bias true or false, got {str(layer['bias'])[:40]!r}")
    if not isinstance(layer["dtype"], str) or layer["dtype"] not in _DTYPES:
        raise ValueError(f"{where}: expected dtype {' or '.join(_DTYPES)}, got {str(layer['dtype'])[:40]!r}")
    rows, cols = tile_grid((layer["out_features"], layer["in_features"]))
    dense, sparse = _tile_bytes()
    size = layer["payload_bytes"]
    low, high = rows * cols * sparse, rows * cols * dense
    if not is_count(size) or not low <= size <= high or (size - low) % (dense - sparse):
        raise ValueError(
            f"{where}: expected payload_bytes of {low} to {high} in steps of {dense - sparse} for "
            f"{rows}x{cols} tiles, "
            f"got {str(size)[:40]!r}; export the model again"
        )
    if not isinstance(layer["sha256"], str) or not re.fullmatch("[0-9a-f]{64}", layer["sha256"]):
        raise ValueError(f"{where}: expected sha256 of 64 hex digits, got {str(layer['sha256'])[:80]!r}")


def _tile_bytes() -> tuple[int, int]:
    """Bytes of a dense and of a sparse tile."""
    flag = torch.zeros(1, 1, dtype=torch.bool)
    return payload_bytes(flag), payload_bytes(~flag)


def _check_module(model: nn.Module, name: str, layer: Mapping[str, Any]) -> None:
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, nn.Linear):
        found = "nothing" if module is None else type(module).__name__
        raise ValueError(
            f"quantization_config: expected a linear layer at {name!r} of {type(model).__name__}, found "
            f"{found}; load "
            "with AutoModelForCausalLM, and the config.json the weights were saved with"
        )
    expected = (layer["out_features"], layer["in_features"], layer["bias"])
    if (module.out_features, module.in_features, module.bias is not None) != expected:
        raise ValueError(
            f"quantization_config: layer {name!r} is {expected[0]}x{expected[1]} with bias {expected[2]}, "
            "the model's is "
            f"{module.out_features}x{module.in_features} with bias {module.bias is not None}; use the "
            "config.json the "
            "weights were saved with"
        )
    if module.weight.dtype != _DTYPES[layer["dtype"]]:
        raise ValueError(
            f"quantization_config: layer {name!r}: expected dtype {layer['dtype']} (as packed), got "
            f"{module.weight.dtype}; leave dtype out, or load and call model.dequantize() for another dtype"
        )


def _check_loaded(name: str, layer: Mapping[str, Any], module: TiledLinear | None) -> None:
    if module is None or module.payload.is_meta or module.tile_is_sparse.is_meta:
        raise ValueError(f"{name}: expected a packed layer after loading, found none; export the model again")
    flags = module.tile_is_sparse
    grid = tuple(tile_grid((module.out_features, module.in_features)))
    if tuple(flags.shape) != grid or flags.dtype != torch.uint8 or int(flags.max()) > 1:
        raise ValueError(f"{name}: expected tile_is_sparse of 0 and 1 with shape {grid}; the file was damaged")
    expected = payload_bytes(flags.bool())
    if module.payload.numel() != layer["payload_bytes"] or expected != layer["payload_bytes"]:
        raise ValueError(
            f"{name}: expected a payload of {expected} bytes for its tiles, found {module.payload.numel()} "
            "and "
            f"{layer['payload_bytes']} in config.json; the file was damaged, export the model again"
        )
    if _verify.get() and layer_sha256(module) != layer["sha256"]:
        raise ValueError(
            f"{name}: the SHA-256 of the packed weight differs from config.json; the file was changed, copy "
            "or export "
            "it again"
        )


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
