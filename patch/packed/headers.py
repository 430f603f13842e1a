"""Checks the headers of the safetensors files of a packed model against its config, before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from patch.files.safetensors_header import TensorInfo, read_header
from patch.packed.quantization_config import HEADER_DTYPES, PatchConfig
from patch_kernels import tile_grid


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
            _check_tensor(where, f"{name}.bias", tensors, HEADER_DTYPES[layer["dtype"]], (layer["out_features"],))
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
