"""Artifacts: the result of pruning or of mask learning, as a folder of safetensors and JSON.

    artifact.json        format, version, layers {name: {shape, kept}}, meta (model, method, pattern, ...)
    masks.safetensors    NAME.keep           uint8, np.packbits of the flattened keep mask (big-endian bits)
                         NAME.tile_scores    float32 (rows, cols), optional
                         NAME.tile_is_sparse uint8 (rows, cols), optional
    weights.safetensors  NAME.weight         weights that the method updated, optional
    adapters.safetensors NAME.left (K, rank), NAME.right (rank, N)   low-rank adapters, optional; version 2

Everything is checked against the headers, the sizes in artifact.json, the caller's expectations and the model
before a tensor is allocated. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patch.files.folder import MANIFEST, resolve_folder, verify_folder, write_folder
from patch.files.safetensors_header import TensorInfo, read_header
from patch.files.strict_json import dump_json, is_count, parse_json, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = "patch-artifact"
VERSION = 1
# Of artifacts with adapters: a reader that knows only version 1 must not leave them out in silence.
ADAPTER_VERSION = 2
DESCRIPTION = "artifact.json"
MASKS = "masks.safetensors"
WEIGHTS = "weights.safetensors"
ADAPTERS = "adapters.safetensors"
_WEIGHT_DTYPES = {"F16", "BF16", "F32", "F64"}
_SIDES = ("left", "right")


@dataclass
class Artifact:
    """Contents of an artifact folder; every dict is keyed by layer name.

    masks           bool (N, K), True where a weight stays
    tile_scores     float32 (rows, cols), share of weights an unstructured reference keeps in each tile
    tile_is_sparse  bool (rows, cols)
    weights         (N, K) weights that the pruning method updated
    adapters        low-rank adapters left (K, rank) and right (rank, N), see patch.slim.lora
    """

    masks: dict[str, Tensor]
    tile_scores: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    tile_is_sparse: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def save_artifact(
    path: str | os.PathLike,
    masks: Mapping[str, Tensor],
    *,
    meta: Mapping[str, Any],
    tile_scores: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    tile_is_sparse: Mapping[str, Tensor] | None = None,
    adapters: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    extra: Mapping[str, bytes | str] | None = None,
) -> None:
    """Write an artifact folder, replacing an earlier one without ever leaving none.

    masks           bool (N, K) per layer name
    meta            JSON values; model, method, pattern, sparsity (0..0.5), tile, seed are checked if present
    tile_scores, tile_is_sparse, weights, adapters   optional, for any of the layers in masks
    extra           further small files of the folder, e.g. {"config.yaml": text}
    raises          ValueError or TypeError before anything is written.
    """
    scores, grids, updated = dict(tile_scores or {}), dict(tile_is_sparse or {}), dict(weights or {})
    _check_masks(masks)
    for what, tensors in (("tile_scores", scores), ("tile_is_sparse", grids), ("weights", updated)):
        _check_parts(what, tensors, masks)
    _check_adapters(adapters or {}, masks)
    description = {
        "format": FORMAT,
        "version": ADAPTER_VERSION if adapters else VERSION,
        "layers": {n: {"shape": list(m.shape), "kept": int(m.sum())} for n, m in masks.items()},
        "meta": _check_meta(dict(meta)),
    }
    text = dump_json(description)
    tensors = {f"{name}.keep": _pack_bits(mask) for name, mask in masks.items()}
    tensors |= {f"{name}.tile_scores": _plain(score.float()) for name, score in scores.items()}
    tensors |= {f"{name}.tile_is_sparse": _plain(grid.to(torch.uint8)) for name, grid in grids.items()}
    reserved = {DESCRIPTION, MASKS, WEIGHTS, ADAPTERS, MANIFEST}
    for name in extra or {}:
        if name in reserved or Path(name).name != name:
            raise ValueError(f"extra: expected plain file names other than {sorted(reserved)}, got {name!r}")

    def write(directory: Path) -> None:
        (directory / DESCRIPTION).write_bytes(text)
        save_file(tensors, directory / MASKS)
        if updated:
            save_file({f"{name}.weight": _plain(weight) for name, weight in updated.items()}, directory / WEIGHTS)
        if adapters:
            parts = {
                f"{n}.{side}": _plain(p) for n, pair in adapters.items() for side, p in zip(_SIDES, pair, strict=True)
            }
            save_file(parts, directory / ADAPTERS)
        for name, content in (extra or {}).items():
            (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)

    write_folder(path, write)


def load_artifact(
    path: str | os.PathLike, *, expect: Mapping[str, Any] | None = None, model: nn.Module | None = None
) -> Artifact:
    """Read an artifact folder after verifying all of it.

    expect   values that meta must have, e.g. {"model": ..., "method": ..., "sparsity": 0.5, "tile": (64, 64)}
    model    layer names and weight shapes are checked against its modules
    raises   FileNotFoundError, or ValueError naming the file and rule, before any tensor is allocated; the
             contents of the masks (padding bits, counts) are checked right after reading them.
    """
    folder = resolve_folder(path)
    manifest = verify_folder(folder)
    for name in (DESCRIPTION, MASKS):
        if name not in manifest["files"]:
            raise ValueError(f"{folder / name}: missing; expected an artifact made by prune or learn, save it again")
    description = _read_description(folder / DESCRIPTION)
    layers, meta = description["layers"], description["meta"]
    if expect:
        _check_expectations(folder, meta, expect)
    shapes = {name: tuple(layer["shape"]) for name, layer in layers.items()}
    if model is not None:
        _check_against_model(folder, shapes, model)
    _check_mask_header(folder / MASKS, read_header(folder / MASKS), shapes)
    if WEIGHTS in manifest["files"]:
        _check_weight_header(folder / WEIGHTS, read_header(folder / WEIGHTS), shapes)
    has_adapters = ADAPTERS in manifest["files"]
    if has_adapters != (description["version"] == ADAPTER_VERSION):
        raise ValueError(
            f"{folder}: expected {ADAPTERS} exactly in version {ADAPTER_VERSION}, got version "
            f"{description['version']} {'with' if has_adapters else 'without'} it; save the artifact again"
        )
    if has_adapters:
        _check_adapter_header(folder / ADAPTERS, read_header(folder / ADAPTERS), shapes)

    tensors = load_file(folder / MASKS)
    artifact = Artifact(masks={}, meta=meta)
    for name, layer in layers.items():
        keep = _unpack_bits(folder / MASKS, name, tensors[f"{name}.keep"], shapes[name])
        if int(keep.sum()) != layer["kept"]:
            raise ValueError(
                f"{folder / MASKS}: {name} keeps {int(keep.sum())} weights, {DESCRIPTION} says "
                f"{layer['kept']}; "
                "the two files are not of one save, save again"
            )
        artifact.masks[name] = keep
        if (score := tensors.get(f"{name}.tile_scores")) is not None:
            artifact.tile_scores[name] = score
        if (grid := tensors.get(f"{name}.tile_is_sparse")) is not None:
            artifact.tile_is_sparse[name] = grid.bool()
    if WEIGHTS in manifest["files"]:
        weights = load_file(folder / WEIGHTS)
        artifact.weights = {name.removesuffix(".weight"): weight for name, weight in weights.items()}
    if has_adapters:
        parts = load_file(folder / ADAPTERS)
        names = sorted({name.rpartition(".")[0] for name in parts}, key=list(layers).index)
        artifact.adapters = {name: (parts[f"{name}.left"], parts[f"{name}.right"]) for name in names}
    return artifact


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _pack_bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(_plain(mask).numpy().reshape(-1)))


def _unpack_bits(path: Path, name: str, bits: Tensor, shape: tuple[int, int]) -> Tensor:
    numel = shape[0] * shape[1]
    flat = np.unpackbits(bits.numpy())
    if flat[numel:].any():
        raise ValueError(f"{path}: padding bits of {name}.keep are not zero; save the artifact again")
    return torch.from_numpy(flat[:numel].astype(np.bool_)).reshape(shape)


def _check_masks(masks: Mapping[str, Tensor]) -> None:
    if not masks:
        raise ValueError("expected masks of at least one layer, got none; prune or learn first")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2 or mask.numel() == 0:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"masks[{name!r}]: expected a 2-D bool tensor, True where a weight stays, got {got}")


def _check_parts(what: str, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name not in masks:
            raise ValueError(f"{what}: layer {name!r} has no mask; expected only layers in masks")
        if what == "weights":
            if tensor.shape != masks[name].shape or not tensor.is_floating_point():
                raise ValueError(
                    f"{what}[{name!r}]: expected floating point {tuple(masks[name].shape)} as its mask, got "
                    f"{tensor.dtype} {tuple(tensor.shape)}"
                )
        elif tensor.dim() != 2 or not 0 < tensor.numel() <= masks[name].numel():
            raise ValueError(f"{what}[{name!r}]: expected (rows, cols) of tiles, got {tuple(tensor.shape)}")


def _check_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """Meta as it will be read back: tuples become lists, and what JSON cannot hold is refused."""
    try:
        meta = parse_json(dump_json(meta))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"meta: expected values that JSON can hold ({error}); convert them to text or numbers"
        ) from None
    rules = {
        "model": lambda v: isinstance(v, str),
        "method": lambda v: isinstance(v, str) and v != "",
        "pattern": lambda v: isinstance(v, str) and v != "",
        "sparsity": lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 0.5,
        "tile": lambda v: isinstance(v, list) and len(v) == 2 and all(is_count(x) and 0 < x < 1 << 31 for x in v),
        "seed": is_count,
    }
    for key, is_valid in rules.items():
        if meta.get(key) is not None and not is_valid(meta[key]):
            raise ValueError(
                f"meta[{key!r}]: expected text for model, method and pattern, 0 to 0.5 for sparsity, two "
                "positive "
                f"integers for tile, an integer >= 0 for seed; got {str(meta[key])[:80]!r}"
            )
    return meta


def _read_description(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        got = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise ValueError(
            f"{path}: expected format {FORMAT!r}, got {str(got)[:80]!r}; give a folder made by prune or learn"
        )
    if not is_count(value.get("version")) or value["version"] not in (VERSION, ADAPTER_VERSION):
        raise ValueError(
            f"{path}: expected version {VERSION} or {ADAPTER_VERSION}, got {str(value.get('version'))[:40]}; it was "
            "written by another version of patch-llm, install that one or save again"
        )
    layers = value.get("layers")
    if set(value) != {"format", "version", "layers", "meta"} or not isinstance(layers, dict) or not layers:
        raise ValueError(f"{path}: expected the keys format, version, layers, meta; save the artifact again")
    if not isinstance(value["meta"], dict):
        raise ValueError(f"{path}: expected meta to be an object; save the artifact again")
    for name, layer in layers.items():
        shape = layer.get("shape") if isinstance(layer, dict) else None
        valid = isinstance(shape, list) and len(shape) == 2 and all(is_count(x) and 0 < x < 1 << 31 for x in shape)
        if not valid or set(layer) != {"shape", "kept"}:
            raise ValueError(
                f"{path}: layer {name[:200]!r}: expected shape (two sizes > 0) and kept, got {str(layer)[:120]}"
            )
        if not is_count(layer["kept"]) or layer["kept"] > shape[0] * shape[1]:
            raise ValueError(
                f"{path}: layer {name[:200]!r}: expected kept of 0 to {shape[0] * shape[1]}, got {layer['kept']}"
            )
    try:
        _check_meta(value["meta"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return value


def _check_expectations(folder: Path, meta: dict[str, Any], expect: Mapping[str, Any]) -> None:
    checked = _check_meta(dict(expect))
    # In the caller's order: another method is named before the settings that differ because of it.
    for key in expect:
        wanted = checked[key]
        if wanted is not None and meta.get(key) != wanted:
            raise ValueError(
                f"{folder}: expected {key} = {wanted!r}, the artifact was made with {key} = "
                f"{meta.get(key)!r}; use the "
                f"same {key}, another path, or remove the folder to make it anew"
            )


def _check_against_model(folder: Path, shapes: dict[str, tuple[int, int]], model: nn.Module) -> None:
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"{folder}: layer {name!r} is not in the model {type(model).__name__}; load the artifact "
                "with the "
                "model it was made from"
            )
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"{folder}: layer {name!r} has shape {shape}, the model's weight has {tuple(weight.shape)}; "
                "load the "
                "artifact with the model it was made from"
            )


def _check_mask_header(path: Path, header: dict[str, TensorInfo], shapes: dict[str, tuple[int, int]]) -> None:
    for name, (rows, cols) in shapes.items():
        info = header.pop(f"{name}.keep", None)
        expected = ((rows * cols + 7) // 8,)
        if info is None or info.dtype != "U8" or info.shape != expected:
            got = "nothing" if info is None else f"{info.dtype} {info.shape}"
            raise ValueError(
                f"{path}: {name}.keep: expected U8 {expected} for ({rows}, {cols}), got {got}; save it again"
            )
        for suffix, dtype in (("tile_scores", "F32"), ("tile_is_sparse", "U8")):
            info = header.pop(f"{name}.{suffix}", None)
            if info is None:
                continue
            fits = len(info.shape) == 2 and 0 < info.shape[0] <= rows and 0 < info.shape[1] <= cols
            if info.dtype != dtype or not fits:
                raise ValueError(
                    f"{path}: {name}.{suffix}: expected {dtype} (tile rows, tile columns) of ({rows}, "
                    f"{cols}), got "
                    f"{info.dtype} {info.shape}; save it again"
                )
    if header:
        raise ValueError(f"{path}: tensors of no known layer: {sorted(header)[:5]}; save the artifact again")


def _check_weight_header(path: Path, header: dict[str, TensorInfo], shapes: dict[str, tuple[int, int]]) -> None:
    for name, info in header.items():
        layer = name.removesuffix(".weight")
        if layer == name or layer not in shapes:
            raise ValueError(f"{path}: tensor {name!r} belongs to no layer of {DESCRIPTION}; save the artifact again")
        if info.shape != shapes[layer] or info.dtype not in _WEIGHT_DTYPES:
            raise ValueError(
                f"{path}: {name}: expected one of {sorted(_WEIGHT_DTYPES)} {shapes[layer]}, got {info.dtype} "
                f"{info.shape}; save the artifact again"
            )


def _check_adapters(adapters: Mapping[str, tuple[Tensor, Tensor]], masks: Mapping[str, Tensor]) -> None:
    for name, (left, right) in adapters.items():
        if name not in masks:
            raise ValueError(f"adapters: layer {name!r} has no mask; expected only layers in masks")
        rows, cols = masks[name].shape
        floating = left.is_floating_point() and right.is_floating_point()
        if not floating or left.dim() != 2 or left.shape[0] != cols or right.shape != (left.shape[1] or 1, rows):
            raise ValueError(
                f"adapters[{name!r}]: expected floating point ({cols}, rank) and (rank, {rows}), got {left.dtype} "
                f"{tuple(left.shape)} and {right.dtype} {tuple(right.shape)}"
            )


def _check_adapter_header(path: Path, header: dict[str, TensorInfo], shapes: dict[str, tuple[int, int]]) -> None:
    names = {name.rpartition(".")[0] for name in header}
    if unknown := names - shapes.keys():
        raise ValueError(f"{path}: adapters of no known layer: {sorted(unknown)[:5]}; save the artifact again")
    for name in names:
        left, right = (header.pop(f"{name}.{side}", None) for side in _SIDES)
        rows, cols = shapes[name]
        fits = left and right and len(left.shape) == 2 and left.shape[0] == cols and left.shape[1] > 0
        dtypes = fits and left.dtype in _WEIGHT_DTYPES and right.dtype in _WEIGHT_DTYPES
        if not dtypes or right.shape != (left.shape[1], rows):
            got = " and ".join(f"{part.dtype} {part.shape}" if part else "nothing" for part in (left, right))
            raise ValueError(
                f"{path}: {name}: expected left ({cols}, rank) and right (rank, {rows}), got {got}; save the artifact "
                "again"
            )
    if header:
        raise ValueError(f"{path}: expected left and right of each layer, got {sorted(header)[:5]}; save it again")
