"""Masks made elsewhere: files of MaskLLM and of the PATCH authors, read; the latter's are also written.

    MaskLLM mask_compressed.npz  NAME.weight.mask      uint8, np.packbits of the flattened keep mask
    MaskLLM .pt                  NAME.weight.mask      float, 1 keeps; or a state dict of masked weights
    PATCH mask.npz               NAME.weight           uint8, np.packbits of the flattened keep mask
                                 NAME.weight.__shape__ int64 (2,)
                                 __meta__              JSON text: base_model, method, sparsity, pattern, ...

NAME is the layer's name in transformers. Bits are big-endian and padded with zeros to whole bytes. Nothing is
unpickled from an .npz; a .pt is read only on request, by torch's loader that admits nothing but tensors. Names,
types and sizes are checked against the model before the first mask is unpacked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from patch.artifacts.foreign_readers import META, SHAPE, _check_two_of_four, _read_npz, _read_pt
from patch.files.atomic import replacing
from patch.files.regular import file_sha256
from patch.models.keep_masks import measured_sparsity
from patch.models.structure import maskable_linears

# The files that mask repositories on the Hugging Face hub hold: MaskLLM's, the PATCH authors'.
FILE_NAMES = ("mask_compressed.npz", "mask.npz")
_SOURCES = (
    f"a mask file ({', '.join(FILE_NAMES)} or .pt), a folder with one, or a Hugging Face repository such as "
    "Vinnnf/LLaMA-2-7B-MaskLLM-C4"
)
# Our names of patterns -> those in the PATCH authors' __meta__.
PATTERNS = {"2:4": "2:4", "patch": "Dense/2:4 tiles", "unstructured": "unstructured"}
# Our names of methods -> method and variant there.
_METHODS = {
    "joint": ("PATCH", "PATCH-Joint"),
    "tile": ("PATCH", "PATCH-Tile"),
    "maskllm": ("MaskLLM", "MaskLLM"),
    "mask_llm": ("MaskLLM", "MaskLLM"),  # the same in artifacts of 0.1.0
}


@dataclass(frozen=True)
class ForeignMasks:
    """What a file of masks holds for a model.

    masks       {layer name: keep (N, K) bool} in the model's order
    pattern     "2:4", "patch" (dense and 2:4 tiles) or "unstructured"
    provenance  JSON values: source, file, file_sha256, format, and the file's own meta
    """

    masks: dict[str, Tensor]
    pattern: str
    provenance: dict[str, Any]


def locate(source: str | os.PathLike) -> Path:
    """The mask file at `source`: a file, a folder that holds one, or a Hugging Face repository that does.

    raises  FileNotFoundError when there is none, ValueError when a folder holds both kinds, ConnectionError when
            the repository is neither cached nor reachable.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if len(found) > 1:
            raise ValueError(f"{path}: expected one of {' and '.join(FILE_NAMES)}, found both; name the file")
        if not found:
            raise FileNotFoundError(f"{path}: expected {' or '.join(FILE_NAMES)} in the folder, found neither")
        return found[0]
    name = os.fspath(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix in (".npz", ".pt"):
        raise FileNotFoundError(f"expected {_SOURCES}, got {name!r} which is none; check the path")
    return _download(name)


def read_masks(
    source: str | os.PathLike, model: nn.Module, *, exclude: Sequence[str] = (), allow_pt: bool = False
) -> ForeignMasks:
    """Masks of a file, folder or repository (see `locate`) for the maskable layers of a model.

    model     only its layers' names and shapes are read, so it may be on the meta device
    exclude   patterns of layers that stay dense; the file may have masks for them, which are left out
    allow_pt  also read a .pt: MaskLLM's, or a state dict of masked weights, whose zeros count as pruned
    raises    as `locate`; ValueError naming the layers that are missing, unknown, of another shape or byte count,
              or, in a 2:4 file, not 2:4.
    """
    wanted = {name: tuple(linear.weight.shape) for name, linear in maskable_linears(model, exclude).items()}
    known = maskable_linears(model)
    path = locate(source)
    if path.suffix == ".pt":
        if not allow_pt:
            raise ValueError(f"{path}: expected an .npz, got a .pt; allow_pt (--allow-pt) reads it too")
        kind, masks, exact = _read_pt(path, wanted, known, model)
        meta, pattern = None, "2:4"
    else:
        kind, masks, meta = _read_npz(path, wanted, known)
        # Authors' masks are the non-zeros of masked weights: a kept weight that was zero is missing in them.
        exact = kind == "maskllm"
        names: dict[Any, str] = {theirs: ours for ours, theirs in PATTERNS.items()}
        pattern = "2:4" if exact else names.get((meta or {}).get("pattern"), "unstructured")
    if pattern == "2:4":
        _check_two_of_four(path, masks, exact=exact)
    provenance = {
        "source": os.fspath(source),
        "file": path.name,
        "file_sha256": file_sha256(Path(os.path.realpath(path))),
        "format": kind,
        "meta": meta,
    }
    return ForeignMasks(masks, pattern, provenance)


def write_masks(path: str | os.PathLike, masks: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write the PATCH authors' mask.npz: a new file, complete or not at all.

    masks   {layer name: keep (N, K) bool}
    meta    JSON values, see `patch_meta`
    raises  FileExistsError when there is a file already, ValueError or TypeError for other masks.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: expected a file ending in .npz; rename it, the authors' loader wants mask.npz")
    if os.path.lexists(path):
        raise FileExistsError(f"{path}: expected a new file, found one; choose another path")
    measured_sparsity(masks)  # refuses no masks, and what is no mask (N, K)
    arrays: dict[str, Any] = {META: np.array(json.dumps(dict(meta), sort_keys=True, allow_nan=False))}
    for name, keep in masks.items():
        arrays[f"{name}.weight"] = np.packbits(keep.cpu().numpy().reshape(-1))
        arrays[f"{name}.weight{SHAPE}"] = np.array(keep.shape, dtype=np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)


def patch_meta(masks: Mapping[str, Tensor], meta: Mapping[str, Any], base_model: str | None = None) -> dict[str, Any]:
    """The __meta__ of the PATCH authors' format for an artifact: of the file it was imported from, or made anew."""
    imported = (meta.get("imported_from") or {}).get("meta")
    if imported is not None:
        return imported | ({} if base_model is None else {"base_model": base_model})
    mode: Any = meta.get("method")
    measured = measured_sparsity(masks)
    target = meta.get("sparsity")
    pattern: Any = "2:4" if mode in ("maskllm", "mask_llm") else meta.get("pattern")
    return {
        "base_model": base_model or meta.get("model"),
        "method": _METHODS.get(mode, (mode, mode))[0],
        "variant": _METHODS.get(mode, (mode, mode))[1],
        "sparsity": f"{100 * (measured if target is None else target):g}%",
        "pattern": PATTERNS.get(pattern, "unstructured"),
        "format": "bit-packed uint8 (np.packbits); unpack with np.unpackbits",
        "measured_sparsity": measured,
    }


def _download(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason: Exception | None = None
    for name in FILE_NAMES:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:  # not cached, and the hub does not answer
            reason = error
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:  # no such repository, no access, not a legal name
            reason = error
            break
    if reason is None:
        raise FileNotFoundError(f"{repository}: expected {' or '.join(FILE_NAMES)} in the repository, found neither")
    got = f"{type(reason).__name__}: {' '.join(str(reason).split())}"
    raise ConnectionError(
        f"expected to load masks from the Hugging Face repository {repository!r}, got {got}; check the name, the "
        "access and the network, or pass a downloaded file"
    ) from reason
