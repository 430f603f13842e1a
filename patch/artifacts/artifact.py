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

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patch.files.folder import MANIFEST, resolve_folder, verify_folder, write_folder
from patch.files.safetensors_header import TensorInfo, TensorRule, read_header, require_tensors
from patch.files.schema import Count, Says, Sha256, Size, parse, record
from patch.files.strict_json import dump_json, parse_json, read_json
from patch.models.checks import require_layer, require_mask
from patch.models.facts import config_fingerprint, fingerprints, model_name, versions
from patch.runs.identity import plain
from patch.settings import Share

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

FORMAT: Literal["patch-artifact"] = "patch-artifact"
VERSION = 1
# Of artifacts with adapters: a reader that knows only version 1 must not leave them out in silence.
ADAPTER_VERSION = 2
DESCRIPTION = "artifact.json"
MASKS = "masks.safetensors"
WEIGHTS = "weights.safetensors"
ADAPTERS = "adapters.safetensors"
_WEIGHT_DTYPES = ("F16", "BF16", "F32", "F64")
_DTYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.uint8: "U8",
}
_SIDES = ("left", "right")
FINGERPRINTS = ("config_fingerprint", "weights_fingerprint")
_ADVICE = "Save the artifact again."


@record
class Layer:
    """A layer in artifact.json: (N, K) of its mask, and how many weights that keeps."""

    shape: tuple[Size, Size]
    kept: Count

    @model_validator(mode="after")
    def _kept_of_all(self) -> Layer:
        if self.kept > self.shape[0] * self.shape[1]:
            raise ValueError(f"expected kept of 0 to {self.shape[0] * self.shape[1]}, got {self.kept}. {_ADVICE}")
        return self


@record
class Description:
    """Contents of artifact.json."""

    format: Annotated[Literal["patch-artifact"], Says(repr(FORMAT), "Give a folder made by prune or learn.")]
    version: Annotated[
        int,
        Field(ge=VERSION, le=ADAPTER_VERSION),
        Says(
            f"version {VERSION} or {ADAPTER_VERSION}",
            "It was written by another version of patch-llm, install that one or save again.",
        ),
    ]
    layers: Annotated[dict[str, Layer], Field(min_length=1)]
    meta: dict[str, Any]


@record(others=True, kw_only=True)
class KnownMeta:
    """The keys of meta that are checked where they are present."""

    model: str | None = None
    method: Annotated[str, Field(min_length=1)] | None = None
    pattern: Annotated[str, Field(min_length=1)] | None = None
    sparsity: Share | None = None
    tile: Annotated[tuple[Size, Size], Says("two positive integers")] | None = None
    seed: Count | None = None
    config_fingerprint: Sha256 | None = None
    weights_fingerprint: Sha256 | None = None


@dataclass
class Artifact:
    """Contents of an artifact folder; every dict is keyed by layer name.

    masks           bool (N, K), True where a weight stays
    tile_scores     float32 (rows, cols), share of weights an unstructured reference keeps in each tile
    tile_is_sparse  bool (rows, cols)
    weights         (N, K) weights that the pruning method updated
    adapters        low-rank adapters left (K, rank) and right (rank, N), see patch.slim.lora
    folder          where it was read, for messages
    """

    masks: dict[str, Tensor]
    tile_scores: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    tile_is_sparse: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    folder: str = "artifact"


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
    replace: bool = True,
) -> Path:
    """Write an artifact folder, replacing an earlier one without ever leaving none; returns where it was written.

    masks           bool (N, K) per layer name
    meta            JSON values, with patch.models.facts.fingerprints of the dense model, taken before it was pruned;
                    model, method, pattern, sparsity (0..0.5), tile, seed are checked if present
    tile_scores, tile_is_sparse, weights, adapters   optional, for any of the layers in masks
    extra           further small files of the folder, e.g. {"config.yaml": text}
    replace         False: what is at the path by then is kept, the artifact gets the next free name
    raises          ValueError or TypeError before anything is written.
    """
    if not masks:
        raise ValueError("expected masks of at least one layer, got none; prune or learn first")
    for name, mask in masks.items():
        require_mask(mask, ("N", "K"), f"masks[{name!r}]")
    parts = {
        MASKS: {f"{name}.tile_scores": score.float() for name, score in (tile_scores or {}).items()}
        | {f"{name}.tile_is_sparse": grid.to(torch.uint8) for name, grid in (tile_is_sparse or {}).items()},
        WEIGHTS: {f"{name}.weight": weight for name, weight in (weights or {}).items()},
        ADAPTERS: {
            f"{name}.{side}": part
            for name, pair in (adapters or {}).items()
            for side, part in zip(_SIDES, pair, strict=True)
        },
    }
    shapes = {name: (mask.shape[0], mask.shape[1]) for name, mask in masks.items()}
    for file, tensors in parts.items():
        header = {name: _info(tensor) for name, tensor in tensors.items()}
        require_tensors(file, header, _rules(file, shapes, header, packed=False), "Give tensors of layers in masks.")
    description = {
        "format": FORMAT,
        "version": ADAPTER_VERSION if adapters else VERSION,
        "layers": {n: {"shape": list(m.shape), "kept": int(m.sum())} for n, m in masks.items()},
        "meta": _as_read_back(meta),
    }
    if missing := [key for key in FINGERPRINTS if not meta.get(key)]:
        advice = "Add patch.models.facts.fingerprints(model), taken before the model is pruned."
        raise ValueError(f"meta: expected {' and '.join(missing)} of the dense model, got none. {advice}")
    text = dump_json(description)
    reserved = {DESCRIPTION, MASKS, WEIGHTS, ADAPTERS, MANIFEST}
    for name in extra or {}:
        if name in reserved or Path(name).name != name:
            raise ValueError(f"extra: expected plain file names other than {sorted(reserved)}, got {name!r}")
    parts[MASKS] |= {f"{name}.keep": _pack_bits(mask) for name, mask in masks.items()}

    def write(directory: Path) -> None:
        (directory / DESCRIPTION).write_bytes(text)
        for file, tensors in parts.items():
            if tensors:
                save_file({name: plain(tensor) for name, tensor in tensors.items()}, directory / file)
        for name, content in (extra or {}).items():
            (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write_folder(path, write, replace=replace)


def load_artifact(
    path: str | os.PathLike,
    *,
    expect: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    masks_of_another_model: bool = False,
) -> Artifact:
    """Read an artifact folder after verifying all of it.

    expect   values that meta must have, e.g. {"model": ..., "method": ..., "sparsity": 0.5, "tile": (64, 64)}
    model    the dense model it was made from: layers and shapes, configuration and weights are checked (of a model on
             the meta device all but the weights)
    masks_of_another_model  also take masks, without weights, that were made from another model; recorded in meta
    raises   FileNotFoundError, or ValueError naming the file and rule, before any tensor is allocated; the
             contents of the masks (padding bits, counts) are checked right after reading them.
    """
    folder = resolve_folder(path)
    manifest = verify_folder(folder)
    for name in (DESCRIPTION, MASKS):
        if name not in manifest.files:
            raise ValueError(f"{folder / name}: missing; expected an artifact made by prune or learn. {_ADVICE}")
    description = _read_description(folder / DESCRIPTION)
    layers, meta = description.layers, description.meta
    if expect:
        _check_expectations(folder, meta, expect)
    has_weights = bool({WEIGHTS, ADAPTERS} & manifest.files.keys())
    shapes = {name: layer.shape for name, layer in layers.items()}
    if model is not None:
        for name, shape in shapes.items():
            require_layer(model, name, str(folder), "Load it with the model it was made from.", shape, kind=nn.Module)
        meta = require_made_from(
            model, meta, str(folder), has_weights=has_weights, masks_of_another_model=masks_of_another_model
        )
    has_adapters = ADAPTERS in manifest.files
    if has_adapters != (description.version == ADAPTER_VERSION):
        got = f"version {description.version} {'with' if has_adapters else 'without'} it"
        raise ValueError(f"{folder}: expected {ADAPTERS} exactly in version {ADAPTER_VERSION}, got {got}. {_ADVICE}")
    for file in (MASKS, WEIGHTS, ADAPTERS):
        if file in manifest.files:
            header = read_header(folder / file)
            require_tensors(folder / file, header, _rules(file, shapes, header), _ADVICE)

    tensors = load_file(folder / MASKS)
    artifact = Artifact(masks={}, meta=meta, folder=str(folder))
    for name, layer in layers.items():
        keep = _unpack_bits(folder / MASKS, name, tensors[f"{name}.keep"], shapes[name])
        if (kept := int(keep.sum())) != layer.kept:
            raise ValueError(
                f"{folder / MASKS}: {name}: expected {layer.kept} kept weights by {DESCRIPTION}, got {kept}. {_ADVICE}"
            )
        artifact.masks[name] = keep
        if (score := tensors.get(f"{name}.tile_scores")) is not None:
            artifact.tile_scores[name] = score
        if (grid := tensors.get(f"{name}.tile_is_sparse")) is not None:
            artifact.tile_is_sparse[name] = grid.bool()
    if WEIGHTS in manifest.files:
        weights = load_file(folder / WEIGHTS)
        artifact.weights = {name.removesuffix(".weight"): weight for name, weight in weights.items()}
    if has_adapters:
        parts = load_file(folder / ADAPTERS)
        names = sorted({name.rpartition(".")[0] for name in parts}, key=list(layers).index)
        artifact.adapters = {name: (parts[f"{name}.left"], parts[f"{name}.right"]) for name in names}
    return artifact


def require_made_from(
    model: nn.Module, meta: dict[str, Any], what: str, *, has_weights: bool, masks_of_another_model: bool = False
) -> dict[str, Any]:
    """Refuse an artifact that was made from another dense model, by the fingerprints in its meta; returns the meta.

    what           place of the artifact in messages
    has_weights    whether it holds weights or adapters, which fit no other model
    masks_of_another_model  take masks of another model; what is returned says so, and has the fingerprints of `model`
    """
    if meta.get("weights_fingerprint") is None:
        logger.warning("%s does not say which weights it was made from: whether they are these was not checked", what)
        return meta
    if any(parameter.is_meta for parameter in model.parameters()):
        found = {"config_fingerprint": config_fingerprint(getattr(model, "config", {}))}
    else:
        found = fingerprints(model)
    differs = [key for key in found if meta.get(key) != found[key]]
    if differs == ["config_fingerprint"] and _made_by_another_version(meta):
        # Versions of transformers name and complete the values of a config differently.
        logger.warning("%s was made with another version of transformers: the configuration was not compared", what)
        return meta
    if not differs:
        return meta
    source = meta.get("model", "another model")
    if has_weights or not masks_of_another_model:
        changed = "settings in config.json" if differs[0] == "config_fingerprint" else "weights"
        if has_weights:
            advice = "It holds weights, which fit no other model: give the model it was made from, or make it again."
        else:
            advice = "Give that model, or accept them with masks_of_another_model=True."
        if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
            advice += " A float32 model must be loaded in the dtype that it was pruned in."
        expected = f"expected an artifact made from {model_name(model)}"
        raise ValueError(f"{what}: {expected}, got one made from {source} whose {changed} differ. {advice}")
    logger.warning("%s was made from %s; its masks are put on %s as asked", what, source, model_name(model))
    return meta | found | {"masks_of_another_model": {"model": source} | {key: meta.get(key) for key in FINGERPRINTS}}


def _made_by_another_version(meta: Mapping[str, Any]) -> bool:
    made_with = meta.get("versions")
    return isinstance(made_with, dict) and made_with.get("transformers") != versions()["transformers"]


def _pack_bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(plain(mask).numpy().reshape(-1)))


def _unpack_bits(path: Path, name: str, bits: Tensor, shape: tuple[int, int]) -> Tensor:
    numel = shape[0] * shape[1]
    flat = np.unpackbits(bits.numpy())
    if flat[numel:].any():
        raise ValueError(f"{path}: {name}.keep: expected padding bits of zero, got others. {_ADVICE}")
    return torch.from_numpy(flat[:numel].astype(np.bool_)).reshape(shape)


def _info(tensor: Tensor) -> TensorInfo:
    """What the header of a safetensors file will say of a tensor."""
    return TensorInfo(_DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), tensor.nbytes)


def _rules(
    file: str, shapes: Mapping[str, tuple[int, int]], header: Mapping[str, TensorInfo], *, packed: bool = True
) -> dict[str, TensorRule | str]:
    """What the tensors of a file have to be for masks (N, K) of these shapes.

    header  what is in the file: layers with one half of an adapter need the other one, of the same rank
    packed  whether the masks are among them already
    """
    rules: dict[str, TensorRule | str] = {}
    for name, (rows, cols) in shapes.items():
        if file == MASKS:
            if packed:
                rules[f"{name}.keep"] = TensorRule(("U8",), (-(-rows * cols // 8),))
            grid = (range(1, rows + 1), range(1, cols + 1))
            rules[f"{name}.tile_scores"] = TensorRule(("F32",), grid, optional=True)
            rules[f"{name}.tile_is_sparse"] = TensorRule(("U8",), grid, optional=True)
        elif file == WEIGHTS:
            rules[f"{name}.weight"] = TensorRule(_WEIGHT_DTYPES, (rows, cols), optional=True)
        elif header.keys() & {f"{name}.{side}" for side in _SIDES}:
            left = header.get(f"{name}.left")
            rank = left.shape[1] if left is not None and len(left.shape) == 2 else "rank"
            rules[f"{name}.left"] = TensorRule(_WEIGHT_DTYPES, (cols, "rank"))
            rules[f"{name}.right"] = TensorRule(_WEIGHT_DTYPES, (rank, rows))
    return rules


def _known_meta(meta: dict[str, Any], where: str = "", advice: str = "Correct it or leave it out.") -> None:
    """Refuse values of the keys that have a meaning here; other keys may hold anything that JSON can."""
    parse(KnownMeta, meta, f"{where}meta.", advice)


def _as_read_back(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Meta as it will be read back: tuples become lists, and what JSON cannot hold is refused."""
    try:
        plain: dict[str, Any] = parse_json(dump_json(dict(meta)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"meta: expected values that JSON can hold ({error}); convert them to text") from None
    _known_meta(plain)
    return plain


def _read_description(path: Path) -> Description:
    description = parse(Description, read_json(path), f"{path}: ", _ADVICE)
    _known_meta(description.meta, f"{path}: ", _ADVICE)
    return description


def _check_expectations(folder: Path, meta: dict[str, Any], expect: Mapping[str, Any]) -> None:
    checked = _as_read_back(expect)
    # In the caller's order: another method is named before the settings that differ because of it.
    for key in expect:
        wanted = checked[key]
        if wanted is not None and meta.get(key) != wanted:
            made = f"the artifact was made with {key} = {meta.get(key)!r}"
            raise ValueError(
                f"{folder}: expected {key} = {wanted!r}, {made}; use the same {key}, another path, or remove the folder"
            )
