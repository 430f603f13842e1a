"""The dtypes that a packed weight can have: one record each (csrc/format/packed_dtype.h has the same in C++)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedDtype:
    """A 16-bit dtype of packed weights.

    torch   of the weight, its bias, x and y
    name    in config.json
    header  in the header of a safetensors file
    """

    torch: torch.dtype
    name: str
    header: str


PACKED_DTYPES = (
    PackedDtype(torch.float16, "float16", "F16"),
    PackedDtype(torch.bfloat16, "bfloat16", "BF16"),
)
BY_NAME = {dtype.name: dtype for dtype in PACKED_DTYPES}
BY_TORCH = {dtype.torch: dtype for dtype in PACKED_DTYPES}
NAMES = " or ".join(BY_NAME)
