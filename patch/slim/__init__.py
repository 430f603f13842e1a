"""SLiM on top of a mask: quantised weights, low-rank adapters, fine-tuning of what the mask keeps.

Source: Mozaffari, Yazdanbakhsh, Mehri Dehnavi, "SLiM: One-shot Quantization and Sparsity with Low-rank
Approximation for LLM Weight Compression", 2025.
"""

from __future__ import annotations

from patch.models.adapted_linear import AdaptedLinear
from patch.slim.compress import Compressed, compress_model, compress_weight
from patch.slim.options import CompressOptions
from patch.slim.quantize import Quantized, quantize_weight

__all__ = [
    "AdaptedLinear",
    "CompressOptions",
    "Compressed",
    "Quantized",
    "compress_model",
    "compress_weight",
    "quantize_weight",
]
