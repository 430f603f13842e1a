"""Checks the safetensors files of a packed model against its config, before anything is allocated."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from patch.files.safetensors_header import TensorInfo, TensorRule, read_header, require_tensors
from patch.files.schema import listed
from patch.packed.quantization_config import PAYLOAD_NAMES, PatchConfig
from patch_kernels import tile_grid
from patch_kernels.packed_dtype import BY_NAME

_ADVICE = "Export the model again."
_FLAGS = ".tile_is_sparse"


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


def other_sha256(files: Sequence[str | os.PathLike]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor that is no part of a packed weight, sorted by name."""
    from safetensors import safe_open

    headers = {os.path.realpath(file): read_header(os.path.realpath(file)) for file in files}
    packed = {name.rpartition(".")[0] for header in headers.values() for name in header if name.endswith(_FLAGS)}
    others = {
        name: (file, info)
        for file, header in headers.items()
        for name, info in header.items()
        if name.rpartition(".")[0] not in packed or name.endswith(".bias")
    }
    digest = hashlib.sha256()
    for name, (file, info) in sorted(others.items()):
        digest.update(f"{name} {info}\n".encode())
        with safe_open(file, framework="pt") as opened:  # maps the file: nothing of it stays in memory
            digest.update(opened.get_tensor(name).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _rules(config: PatchConfig) -> dict[str, TensorRule | str]:
    """What the tensors of the packed layers have to be."""
    rules: dict[str, TensorRule | str] = {}
    payload = PAYLOAD_NAMES[config.format_version]
    for name, layer in config.layers.items():
        out_features = layer["out_features"]
        grid: tuple[int, ...] = tile_grid((out_features, layer["in_features"]))
        outputs: tuple[int, ...] = (out_features,)
        if layer.get("experts") is not None:
            grid, outputs = (
                (layer["experts"] * layer["parts"], *grid),
                (layer["experts"], layer["parts"] * out_features),
            )
        bias = TensorRule((BY_NAME[layer["dtype"]].header,), outputs)
        if payload != "weight":
            rules[f"{name}.weight"] = "no dense weight beside the packed one"
        rules[f"{name}.{payload}"] = TensorRule(("U8",), (layer["payload_bytes"],))
        rules[f"{name}.tile_is_sparse"] = TensorRule(("U8",), grid)
        rules[f"{name}.bias"] = bias if layer["bias"] else "no bias by config.json"
    return rules
