"""Readers of mask files made elsewhere; names, types and sizes are checked before the first mask is unpacked."""

from __future__ import annotations

import json
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patch.files.schema import listed
from patch.models.checks import require_layers

META, SHAPE = "__meta__", ".__shape__"
_OTHERS = "the masks are of another model or the file is damaged"
_NO_SHAPE = f"no {SHAPE} of two integers"
# What zipfile and numpy raise for a file whose bytes are not as written; numpy parses headers as Python text.
_DAMAGE = (
    *(ValueError, RuntimeError, EOFError, OSError, SyntaxError),
    *(tokenize.TokenError, zlib.error, zipfile.BadZipFile),
)


def _read_npz(
    path: Path, wanted: Mapping[str, tuple[int, ...]], known: Collection[str]
) -> tuple[str, dict[str, Tensor], dict[str, Any] | None]:
    """(format, masks, __meta__ or None) of an .npz in either format."""
    headers = _npz_headers(path)
    if META in headers or any(key.endswith(SHAPE) for key in headers):
        kind, keys = "patch", [key for key in headers if key != META and not key.endswith(SHAPE)]
    elif headers and all(key.endswith(".mask") for key in headers):
        kind, keys = "maskllm", list(headers)
    else:
        expected = f"keys that end in .mask (MaskLLM), or names with their {SHAPE} (PATCH)"
        raise ValueError(f"{path}: expected {expected}, got {listed(list(headers))}; give a file of masks")
    layers = {key.removesuffix(".mask").removesuffix(".weight"): key for key in keys}
    _check_names(path, layers, wanted, known)
    wrong = {
        name: f"{headers[layers[name]]}, not uint8 ({-(-rows * columns // 8)},)"
        for name, (rows, columns) in wanted.items()
        if headers[layers[name]] != (np.dtype(np.uint8), (-(-rows * columns // 8),))
    }
    _refuse(path, "the packed bits of the model's shapes", wrong)
    try:
        with np.load(path, allow_pickle=False) as archive:
            meta = None
            if kind == "patch":
                meta = _npz_meta(path, archive, headers)
                shapes = {name: _given_shape(archive, headers, layers[name]) for name in wanted}
                wrong = {
                    name: f"{shapes[name]}, not {shape}" for name, shape in wanted.items() if shapes[name] != shape
                }
                _refuse(path, "the model's shapes", wrong)
            masks = {}
            for name, shape in wanted.items():
                bits = np.unpackbits(archive[layers[name]], count=shape[0] * shape[1])
                masks[name] = torch.from_numpy(bits.view(np.bool_).reshape(shape))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _damaged(path, error) from None
    return kind, masks, meta


def _npz_headers(path: Path) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """{key: (dtype, shape)} from the headers alone, so that no size in a file is believed before it is checked."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    headers = {}
    raw = open(path, "rb")  # outside: a file that may not be read is not a damaged one
    try:
        with raw, zipfile.ZipFile(raw) as archive:
            for entry in archive.infolist():
                key = entry.filename.removesuffix(".npy")
                if key == entry.filename or key in headers:
                    raise ValueError(f"unexpected or repeated entry {entry.filename!r}")
                with archive.open(entry) as file:
                    version = np.lib.format.read_magic(file)
                    if version not in readers:
                        raise ValueError(f"{key}: unknown version {version}")
                    shape, _, dtype = readers[version](file)
                headers[key] = (dtype, shape)
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    return headers


def _npz_meta(path: Path, archive: Any, headers: Mapping[str, Any]) -> dict[str, Any] | None:
    if META not in headers:
        return None
    dtype, shape = headers[META]
    try:
        meta = json.loads(str(archive[META])) if dtype.kind == "U" and shape == () else None
    except ValueError:
        meta = None
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: expected {META} to be the text of a JSON object, got {dtype} {shape}; get it again")
    return meta


def _given_shape(archive: Any, headers: Mapping[str, Any], key: str) -> tuple[int, ...] | str:
    """The shape that a file in the PATCH authors' format tells of a mask, or what is wrong with it."""
    dtype, shape = headers.get(key + SHAPE, (np.dtype(object), None))
    return tuple(archive[key + SHAPE].tolist()) if (dtype.kind in "iu", shape) == (True, (2,)) else _NO_SHAPE


def _read_pt(
    path: Path, wanted: Mapping[str, tuple[int, ...]], known: Collection[str], model: nn.Module
) -> tuple[str, dict[str, Tensor], bool]:
    """(format, masks, whether 2:4 is exact) of MaskLLM's dict of masks, or of a state dict of masked weights."""
    from pickle import UnpicklingError

    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: expected a .pt that holds only tensors, it does not load ({reason})") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: expected a dict of tensors by name, got {type(values).__name__}")
    tensors = {k: t for k, t in values.items() if isinstance(t, Tensor) and t.layout == torch.strided}
    has_masks = any(key.endswith(".mask") for key in values)
    if has_masks:
        layers = {key.removesuffix(".mask").removesuffix(".weight"): key for key in values}
    else:
        # A whole state dict: what else is the model's stays out, as do norms and biases (2-D only).
        others = {key for key, _ in model.named_parameters(remove_duplicate=False)} - {f"{n}.weight" for n in known}
        layers = {k.removesuffix(".weight"): k for k, t in tensors.items() if t.dim() == 2 and k not in others}
    _check_names(path, layers, wanted, known)
    wrong = {}
    for name, shape in wanted.items():
        tensor = tensors.get(layers[name])
        if tensor is None or tuple(tensor.shape) != shape:
            wrong[name] = f"{'no tensor' if tensor is None else tuple(tensor.shape)}, not {shape}"
        elif not tensor.is_floating_point() and not (has_masks and tensor.dtype == torch.bool):
            wrong[name] = f"{tensor.dtype}, not floating point"
        elif has_masks and not ((tensor == 0) | (tensor == 1)).all():
            wrong[name] = "values other than 0 and 1"
    _refuse(path, "tensors of the model's shapes", wrong)
    # A comparison keeps the strides, and a saved tensor may be a transposed one.
    masks = {name: (tensors[layers[name]] != 0).contiguous() for name in wanted}
    return ("maskllm pt" if has_masks else "weights pt"), masks, has_masks


def _check_names(path: Path, layers: Collection[str], wanted: Collection[str], known: Collection[str]) -> None:
    # Masks of layers that are excluded may be there: they are left out.
    given = {name: None for name in layers if name in wanted or name not in known}
    require_layers(given, wanted, f"{path}")


def _check_two_of_four(path: Path, masks: Mapping[str, Tensor], *, exact: bool) -> None:
    wrong = {}
    for name, keep in masks.items():
        if keep.shape[1] % 4:
            wrong[name] = f"{keep.shape[1]} columns"
            continue
        kept = keep.view(-1, 4).sum(1, dtype=torch.uint8)
        if broken := int(((kept != 2) if exact else (kept > 2)).sum()):
            wrong[name] = f"{broken} groups of four"
    _refuse(path, f"{'exactly' if exact else 'at most'} 2 kept of every 4 weights", wrong)


def _refuse(path: Path, expected: str, wrong: Mapping[str, str]) -> None:
    """raises ValueError with the layers that are not as expected, and what is wrong with the first of them."""
    if wrong:
        got = listed([f"{name}: {what}" for name, what in wrong.items()])
        raise ValueError(f"{path}: expected {expected}, got other layers: {got}; {_OTHERS}")


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable .npz of plain arrays ({error}); get the file again")
