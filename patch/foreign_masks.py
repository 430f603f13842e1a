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
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patch.folder import file_sha256
from patch.models import maskable_linears, measured_sparsity

__all__ = ["ForeignMasks", "locate", "patch_meta", "read_masks", "write_masks"]

# The files that mask repositories on the Hugging Face hub hold: MaskLLM's, the PATCH authors'.
FILE_NAMES = ("mask_compressed.npz", "mask.npz")
META, SHAPE = "__meta__", ".__shape__"
# Our names of patterns -> those in the PATCH authors' __meta__.
PATTERNS = {"2:4": "2:4", "patch": "Dense/2:4 tiles", "unstructured": "unstructured"}
# Our names of methods -> method and variant there.
_METHODS = {
    "joint": ("PATCH", "PATCH-Joint"),
    "tile": ("PATCH", "PATCH-Tile"),
    "mask_llm": ("MaskLLM", "MaskLLM"),
    "maskllm": ("MaskLLM", "MaskLLM"),  # imported
}
_LISTED_NAMES = 5
# What zipfile and numpy raise for a file whose bytes are not as written; numpy parses headers as Python text.
_DAMAGE = (
    *(ValueError, RuntimeError, EOFError, OSError, SyntaxError),
    *(tokenize.TokenError, zlib.error, zipfile.BadZipFile),
)


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
        if found:
            return found[0]
        raise FileNotFoundError(f"{path}: expected {' or '.join(FILE_NAMES)} in the folder, found neither")
    name = os.fspath(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix in (".npz", ".pt"):
        raise FileNotFoundError(
            f"expected a mask file ({', '.join(FILE_NAMES)} or .pt), a folder with one, or a Hugging Face repository "
            f"such as Vinnnf/LLaMA-2-7B-MaskLLM-C4, got {name!r} which is none; check the path"
        )
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
            raise ValueError(
                f"{path}: expected an .npz, got a .pt; it can be read too when asked for (allow_pt, --allow-pt)"
            )
        kind, masks, exact = _read_pt(path, wanted, known, model)
        meta, pattern = None, "2:4"
    else:
        kind, masks, meta = _read_npz(path, wanted, known)
        # Authors' masks are the non-zeros of masked weights: a kept weight that was zero is missing in them.
        exact = kind == "maskllm"
        names = {theirs: ours for ours, theirs in PATTERNS.items()}
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
    measured_sparsity(masks)  # refuses no masks, and masks that are not bool
    arrays = {META: np.array(json.dumps(dict(meta), sort_keys=True, allow_nan=False))}
    for name, keep in masks.items():
        if keep.dim() != 2:
            raise ValueError(f"layer '{name}': expected a mask (N, K), got {tuple(keep.shape)}")
        arrays[f"{name}.weight"] = np.packbits(keep.cpu().numpy().reshape(-1))
        arrays[f"{name}.weight{SHAPE}"] = np.array(keep.shape, dtype=np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(staging, "xb") as file:
            np.savez_compressed(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def patch_meta(masks: Mapping[str, Tensor], meta: Mapping[str, Any], base_model: str | None = None) -> dict[str, Any]:
    """The __meta__ of the PATCH authors' format for an artifact: of the file it was imported from, or made anew."""
    imported = (meta.get("imported_from") or {}).get("meta")
    if imported is not None:
        return imported | ({} if base_model is None else {"base_model": base_model})
    mode, measured = meta.get("method"), measured_sparsity(masks)
    target = meta.get("sparsity")
    pattern = "2:4" if mode == "mask_llm" else meta.get("pattern")
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
        raise FileNotFoundError(
            f"{repository}: expected {' or '.join(FILE_NAMES)} in the repository, found neither; check its files"
        )
    text = " ".join(str(reason).split())
    raise ConnectionError(
        f"expected to load masks from the Hugging Face repository {repository!r}, got {type(reason).__name__}: {text}; "
        "check the name, the access and the network, or pass a downloaded file"
    ) from reason


def _read_npz(
    path: Path, wanted: Mapping[str, tuple[int, int]], known: Collection[str]
) -> tuple[str, dict[str, Tensor], dict[str, Any] | None]:
    """(format, masks, __meta__ or None) of an .npz in either format."""
    headers = _npz_headers(path)
    if META in headers or any(key.endswith(SHAPE) for key in headers):
        kind, keys = "patch", [key for key in headers if key != META and not key.endswith(SHAPE)]
    elif headers and all(key.endswith(".mask") for key in headers):
        kind, keys = "maskllm", list(headers)
    else:
        raise ValueError(
            f"{path}: expected keys that end in .mask (MaskLLM), or names with their {SHAPE} (PATCH), got "
            f"{_listed(list(headers))}; give a file of masks"
        )
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
                _check_shapes(path, archive, headers, {name: layers[name] for name in wanted}, wanted)
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


def _check_shapes(
    path: Path,
    archive: Any,
    headers: Mapping[str, Any],
    layers: Mapping[str, str],
    wanted: Mapping[str, tuple[int, int]],
) -> None:
    wrong = {}
    for name, key in layers.items():
        dtype, shape = headers.get(key + SHAPE, (None, None))
        if dtype is None or dtype.kind not in "iu" or shape != (2,):
            wrong[name] = f"no {SHAPE} of two integers"
        elif (given := tuple(archive[key + SHAPE].tolist())) != wanted[name]:
            wrong[name] = f"{given}, not {wanted[name]}"
    _refuse(path, "the model's shapes", wrong)


def _read_pt(
    path: Path, wanted: Mapping[str, tuple[int, int]], known: Collection[str], model: nn.Module
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
    missing = [name for name in wanted if name not in layers]
    extra = [name for name in layers if name not in known]
    if missing or extra:
        raise ValueError(
            f"{path}: expected a mask for each of the {len(wanted)} layers, missing {_listed(missing)}; not maskable "
            f"layers of the model {_listed(extra)}. Use the masks of this model, and name layers that stay dense in "
            "exclude"
        )


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
        shown = "; ".join(f"{name}: {what}" for name, what in list(wrong.items())[:_LISTED_NAMES])
        more = "; ..." if len(wrong) > _LISTED_NAMES else ""
        raise ValueError(
            f"{path}: expected {expected}, not so in {len(wrong)} layers ({shown}{more}); "
            "the masks are of another model or the file is damaged"
        )


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable .npz of plain arrays ({error}); get the file again")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED_NAMES])
    return f"{len(names)} ({shown}{', ...' if len(names) > _LISTED_NAMES else ''})" if names else "0"
