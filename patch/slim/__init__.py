"""SLiM on top of a mask: quantised weights, low-rank adapters, fine-tuning of what the mask keeps.

Source: Mozaffari, Yazdanbakhsh, Mehri Dehnavi, "SLiM: One-shot Quantization and Sparsity with Low-rank
Approximation for LLM Weight Compression", 2025.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from patch.files.lazy import lazy_names

if TYPE_CHECKING:
    from patch.slim.compress import Compressed, compress_model, compress_weight
    from patch.slim.options import CompressOptions, FineTuneOptions
    from patch.slim.quantize import Quantized, quantize_weight

__all__ = [
    "CompressOptions",
    "Compressed",
    "FineTuneOptions",
    "Quantized",
    "compress_model",
    "compress_weight",
    "quantize_weight",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CompressOptions": "options",
        "Compressed": "compress",
        "FineTuneOptions": "options",
        "Quantized": "quantize",
        "compress_model": "compress",
        "compress_weight": "compress",
        "quantize_weight": "quantize",
    },
)
