"""The quantization_config of a packed model, checked before anything is built from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from patch.files.strict_json import is_count
from patch_kernels import TILE, payload_bytes, tile_grid

METHOD = "patch"
FORMAT_VERSION = 1
MAX_LAYERS = 100_000
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
HEADER_DTYPES = {"float16": "F16", "bfloat16": "BF16"}
_LAYER_KEYS = {"out_features", "in_features", "bias", "dtype", "payload_bytes", "sha256"}


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
    if not isinstance(layer["dtype"], str) or layer["dtype"] not in DTYPES:
        raise ValueError(f"{where}: expected dtype {' or '.join(DTYPES)}, got {str(layer['dtype'])[:40]!r}")
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
