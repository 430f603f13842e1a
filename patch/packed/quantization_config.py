"""The quantization_config of a packed model, checked before anything is built from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from patch.files.schema import Count, Says, Sha256, Size, parse, record
from patch_kernels import TILE, tile_grid
from patch_kernels.ops.tile_linear import DENSE_TILE_BYTES, SPARSE_TILE_BYTES
from patch_kernels.packed_dtype import BY_NAME, NAMES

METHOD = "patch"
FORMAT_VERSION = 2
# Of folders with a packed mixture.
EXPERTS_VERSION = 3
# The tensor of a layer's packed weight in each version. Version 1 loads, the others are written: plain transformers
# takes a layer without a `weight` as new and fills it with random numbers, and refuses one whose `weight` has another
# shape.
PAYLOAD_NAMES = {1: "payload", 2: "weight", 3: "weight"}
MAX_LAYERS = 100_000
_ADVICE = "Export the model again."


@record(kw_only=True)
class PackedLayer:
    """A packed layer as config.json describes it."""

    out_features: Size
    in_features: Size
    bias: bool
    dtype: Annotated[str, Field(pattern=f"^({'|'.join(BY_NAME)})$"), Says(NAMES)]
    payload_bytes: Count
    sha256: Sha256
    experts: Size | None = None
    parts: Annotated[int, Field(ge=1, le=2), Says("1, or 2 for gate and up", _ADVICE)] | None = None

    @model_validator(mode="after")
    def _whole_tiles(self) -> PackedLayer:
        if (self.experts is None) != (self.parts is None):
            raise ValueError(f"expected experts and parts of a mixture, got one of them alone. {_ADVICE}")
        rows, cols = tile_grid((self.out_features, self.in_features))
        tiles = rows * cols * (self.experts or 1) * (self.parts or 1)
        low, high = tiles * SPARSE_TILE_BYTES, tiles * DENSE_TILE_BYTES
        step = DENSE_TILE_BYTES - SPARSE_TILE_BYTES
        if not low <= self.payload_bytes <= high or (self.payload_bytes - low) % step:
            of = "" if self.experts is None else f" of {self.experts} experts with {self.parts} matrices"
            steps = f"{low} to {high} in steps of {step} for {rows}x{cols} tiles{of}"
            raise ValueError(f"expected payload_bytes of {steps}, got {self.payload_bytes}. {_ADVICE}")
        return self


def _module_paths(layers: dict[str, PackedLayer]) -> dict[str, PackedLayer]:
    for name in layers:
        if not re.fullmatch(r"\w+(\.\w+)*", name, re.ASCII) or len(name) > 512:
            raise ValueError(f"expected module paths such as model.layers.0.mlp.up_proj, got {name[:200]!r}. {_ADVICE}")
    dtypes = {layer.dtype for layer in layers.values()}
    if len(dtypes) > 1:
        raise ValueError(f"expected one dtype for all layers, got {sorted(dtypes)}. {_ADVICE}")
    return layers


@record(kw_only=True)
class Description:
    """The keys of quantization_config."""

    quant_method: Annotated[str, Field(pattern=f"^{METHOD}$"), Says(repr(METHOD))]
    format_version: Annotated[
        int,
        Field(ge=min(PAYLOAD_NAMES), le=max(PAYLOAD_NAMES)),
        Says(
            f"{min(PAYLOAD_NAMES)} to {max(PAYLOAD_NAMES)}",
            "It was written by another version of patch-llm, install that one or export again.",
        ),
    ]
    tile: Annotated[
        tuple[Annotated[int, Field(ge=TILE, le=TILE)], ...],
        Field(min_length=2, max_length=2),
        Says(f"[{TILE}, {TILE}]"),
    ]
    layers: Annotated[
        dict[str, PackedLayer],
        Field(min_length=1, max_length=MAX_LAYERS),
        AfterValidator(_module_paths),
        Says(f"1 to {MAX_LAYERS} layers by name"),
    ]
    other_sha256: Sha256 | None = None
    config_sha256: Sha256 | None = None


@register_quantization_config(METHOD)
class PatchConfig(QuantizationConfigMixin):
    """The quantization_config of a packed model.

    format_version  of the folder: 2, 3 with packed mixtures, or 1 in folders written before
    tile            [128, 128]
    layers          {module path: {out_features, in_features, bias, dtype, payload_bytes, sha256}}, and of a projection
                    of a mixture experts and parts, the matrices of each expert
    other_sha256    checksum of every other tensor of the files (headers.other_sha256); None: they are not checked
    config_sha256   patch.models.facts.config_fingerprint of config.json as it was written; None: it is not checked
    Everything is checked on construction; raises ValueError naming the layer and the rule.
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        tile: Sequence[int] = (TILE, TILE),
        other_sha256: str | None = None,
        config_sha256: str | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ):
        given = {"quant_method": quant_method, "format_version": format_version, "tile": tile, "layers": layers}
        given |= {"other_sha256": other_sha256, "config_sha256": config_sha256}
        parse(Description, given | unknown, "quantization_config: ", _ADVICE)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.layers = {name: dict(layer) for name, layer in (layers or {}).items()}
        self.format_version = format_version
        self.tile = [TILE, TILE]
        self.other_sha256 = other_sha256
        self.config_sha256 = config_sha256

    @property
    def mixtures(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{module path of a mixture: {projection: its entry of layers}}."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for name, layer in self.layers.items():
            if layer.get("experts") is not None:
                path, _, projection = name.rpartition(".")
                found.setdefault(path, {})[projection] = layer
        return found

    @property
    def written_version(self) -> int:
        """The version that a folder with these layers gets."""
        return EXPERTS_VERSION if self.mixtures else FORMAT_VERSION
