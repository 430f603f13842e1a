"""Packed models in transformers: the quantizer of the method "patch", and the marks of a packed model.

    import patch.packed
    model = AutoModelForCausalLM.from_pretrained(folder)      # or patch.load(folder)

config.json holds the sizes and a checksum of every packed layer; they are checked against the headers of the
safetensors files before a tensor is allocated, and against the tensors after loading.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantizer

from patch.files.strict_json import read_json
from patch.models.checks import require_layer
from patch.models.facts import config_fingerprint
from patch.packed.experts import PackedExperts, packed_like
from patch.packed.headers import check_files, other_sha256
from patch.packed.projections import fuse_projections, stream_head, unstream_head
from patch.packed.quantization_config import FORMAT_VERSION, METHOD, PAYLOAD_NAMES, PatchConfig
from patch.packed.swap import layer_sha256, packed_layers, unpack_layers
from patch_kernels import TiledExperts, TiledLinear, payload_bytes, tile_grid
from patch_kernels.checks import require_tensor
from patch_kernels.packed_dtype import BY_NAME, BY_TORCH

_ADVICE = "Load with AutoModelForCausalLM, and with the config.json that the weights were saved with."
_DAMAGED = "The file was changed, copy it or export the model again."
_verify: contextvars.ContextVar[bool] = contextvars.ContextVar("patch_verify", default=True)


@register_quantizer(METHOD)
class PatchHfQuantizer(HfQuantizer):
    """Builds packed layers before loading and checks them after it; uses only hooks of transformers 5.17 to 5.24."""

    quantization_config: PatchConfig
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
        config = self.quantization_config
        alone = {name: layer for name, layer in config.layers.items() if layer.get("experts") is None}
        for name, layer in alone.items():
            _check_module(model, name, layer)
        mixtures = {path: _mixture(model, path, described) for path, described in config.mixtures.items()}
        if checkpoint_files:
            check_files(checkpoint_files, config)
            _check_others(checkpoint_files, config)
        for path, mixture in mixtures.items():
            model.set_submodule(path, mixture)
        for name, layer in alone.items():
            packed = TiledLinear(
                layer["in_features"],
                layer["out_features"],
                layer["bias"],
                payload_bytes=layer["payload_bytes"],
                dtype=BY_NAME[layer["dtype"]].torch,
                device="meta",
            )
            model.set_submodule(name, packed)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        loaded = dict(packed_layers(model))
        for name, layer in self.quantization_config.layers.items():
            _check_loaded(name, layer, loaded.get(name))
            loaded[name].refresh_schedule()  # follows from the flags, so it is in no file
        # In memory, and when it is saved again.
        self.quantization_config.format_version = self.quantization_config.written_version
        _keep_names(model)
        fuse_projections(model)
        stream_head(model)
        return model

    def get_weight_conversions(self) -> list[Any]:
        return [WeightRenaming(rf"\.{PAYLOAD_NAMES[1]}$", f".{PAYLOAD_NAMES[FORMAT_VERSION]}")]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """save_pretrained asks before it writes config.json: describe the layers as they are now."""
        if not getattr(model, "_hf_peft_config_loaded", False):  # else adapters alone are written
            mark_packed(model)
        return None, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside packed layers (lora.py); transformers' Trainer refuses the model without them

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        # A string once the model was saved.
        unpack_layers(model, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        unstream_head(model)
        mark_dense(model)
        return model

    def remove_quantization_config(self, model: nn.Module) -> None:
        mark_dense(model)


@contextlib.contextmanager
def verification(enabled: bool) -> Iterator[None]:
    """Turn the checksum comparison on or off for from_pretrained calls inside the block."""
    token = _verify.set(enabled)
    try:
        yield
    finally:
        _verify.reset(token)


def mark_packed(model: Any) -> None:
    """Give a model with packed layers the attributes that transformers saves and loads by."""
    layers = {
        name: {
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "bias": layer.bias is not None,
            "dtype": BY_TORCH[layer.weight_dtype].name,
            "payload_bytes": layer.payload.numel(),
            "sha256": layer_sha256(layer),
        }
        | ({"experts": layer.experts, "parts": layer.parts} if isinstance(layer, TiledExperts) else {})
        for name, layer in packed_layers(model)
    }
    config = PatchConfig(layers=layers)
    config.format_version = config.written_version
    model.config.quantization_config = config
    model.hf_quantizer = PatchHfQuantizer(config, pre_quantized=True)
    model.quantization_method = METHOD
    model.is_quantized = True
    _keep_names(model)


def mark_dense(model: Any) -> None:
    """Undo mark_packed."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "_weight_conversions"),
        (model.config, "quantization_config"),
        (model.config, "_is_quantized"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    model.is_quantized = False


def _keep_names(model: Any) -> None:
    """Have save_pretrained write module paths, the names in quantization_config.layers.

    It would give tensors the names that older checkpoints of some architectures have, and cut or join weights as these
    do, which bytes of tiles do not survive.
    """
    model._weight_conversions = []


def _check_others(files: Sequence[str], config: PatchConfig) -> None:
    """Compare config.json and the tensors beside the packed layers with what was saved, where the folder says it."""
    if not _verify.get():
        return
    file, wanted = Path(files[0]).parent / "config.json", config.config_sha256
    if wanted is not None and file.is_file() and config_fingerprint(read_json(file.resolve())) != wanted:
        advice = "Copy or export the folder again; patch.load(..., verify=False) opens it as it is."
        raise ValueError(f"{file}: expected the settings that the weights were saved with, got others. {advice}")
    wanted = config.other_sha256
    if wanted is not None and (found := other_sha256(files)) != wanted:
        raise ValueError(
            f"{Path(files[0]).parent}: expected tensors beside the packed layers (embeddings, norms, output head) of "
            f"SHA-256 {wanted}, got {found}. {_DAMAGED}"
        )


def _check_module(model: nn.Module, name: str, layer: Mapping[str, Any]) -> None:
    shape = (layer["out_features"], layer["in_features"])
    module = require_layer(model, name, "quantization_config", _ADVICE, shape)
    for what, expected, got, advice in (
        ("bias", layer["bias"], module.bias is not None, _ADVICE),
        ("dtype", BY_NAME[layer["dtype"]].torch, module.weight.dtype, "Leave dtype out, or call model.dequantize()."),
    ):
        if got != expected:
            raise ValueError(
                f"quantization_config: layer {name!r}: expected {what} {expected} as packed, got {got}. {advice}"
            )


def _mixture(model: nn.Module, path: str, described: Mapping[str, Mapping[str, Any]]) -> PackedExperts:
    """The empty packed module of a mixture; refuses a model that has another one there."""
    where = f"quantization_config: layer {path!r}"
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{where}: expected a mixture of experts as packed, found nothing. {_ADVICE}") from None
    return packed_like(module, where, described, _ADVICE)


def _check_loaded(name: str, layer: Mapping[str, Any], module: TiledLinear | TiledExperts | None) -> None:
    if module is None or module.payload.is_meta or module.tile_is_sparse.is_meta:
        raise ValueError(f"{name}: expected a packed layer after loading, found none. {_DAMAGED}")
    flags = module.tile_is_sparse
    grid: tuple[int, ...] = tile_grid((module.out_features, module.in_features))
    if isinstance(module, TiledExperts):
        grid = (module.experts * module.parts, *grid)
    require_tensor(f"{name}.tile_is_sparse", flags, dtypes=(torch.uint8,), shape=grid, advice=_DAMAGED)
    if int(flags.max()) > 1:
        raise ValueError(f"{name}.tile_is_sparse: expected flags of 0 and 1, got {int(flags.max())}. {_DAMAGED}")
    sizes = [payload_bytes(flags.bool()), module.payload.numel(), layer["payload_bytes"]]
    if len(set(sizes)) > 1:
        got = f"{sizes[1]} and {sizes[2]} in config.json"
        raise ValueError(f"{name}: expected a payload of {sizes[0]} bytes for its tiles, got {got}. {_DAMAGED}")
    if _verify.get() and (found := layer_sha256(module)) != layer["sha256"]:
        raise ValueError(f"{name}: expected a packed weight of SHA-256 {layer['sha256']}, got {found}. {_DAMAGED}")
