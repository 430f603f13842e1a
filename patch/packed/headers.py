"""Checks the headers of the safetensors files of a packed model against its config, before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from patch.files.safetensors_header import TensorInfo, TensorRule, read_header, require_tensors
from patch.files.schema import listed
from patch.packed.quantization_config import PatchConfig
from patch_kernels import tile_grid
from patch_kernels.packed_dtype import BY_NAME

_ADVICE = "Export the model again."


def check_files(files: Sequence[str | os.PathLike], config: PatchConfig) -> None:
    """Check the headers of all shards against the config, before anything is allocated."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file}: expected safetensors files, pickled weights are not read. {_ADVICE}")
        header = read_header(os.path.realpath(file))  # the hub's cache holds links
        if twice := sorted(header.keys() & tensors.keys()):
            raise ValueError(f"{file}: expected each tensor in one file, got {listed(twice)} in two. {_ADVICE}")
        tensors |= header
    require_tensors(Path(files[0]).parent, tensors, _rules(config), _ADVICE, others=True)


def _rules(config: PatchConfig) -> dict[str, TensorRule | str]:
    """What the tensors of the packed layers have to be."""
    rules: dict[str, TensorRule | str] = {}
    for name, layer in config.layers.items():
        out_features = layer["out_features"]
        bias = TensorRule((BY_NAME[layer["dtype"]].header,), (out_features,))
        rules[f"{name}.payload"] = TensorRule(("U8",), (layer["payload_bytes"],))
        rules[f"{name}.tile_is_sparse"] = TensorRule(("U8",), tuple(tile_grid((out_features, layer["in_features"]))))
        rules[f"{name}.bias"] = bias if layer["bias"] else "no bias by config.json"
        rules[f"{name}.weight"] = "no dense weight beside the packed one"
    return rules
