"""Text and tokens: local files and named sets, tokenizing, packing, sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patch.data.sources import NAMED_SETS, iter_documents, load_documents
from patch.files.lazy import lazy_names

if TYPE_CHECKING:
    from patch.data.tokens import (
        calibration_windows,
        evaluation_text,
        pack_blocks,
        sample_joined,
        sample_windows,
        text_sha256,
        tokenize,
        training_blocks,
    )

__all__ = [
    "NAMED_SETS",
    "calibration_windows",
    "evaluation_text",
    "iter_documents",
    "load_documents",
    "pack_blocks",
    "sample_joined",
    "sample_windows",
    "text_sha256",
    "tokenize",
    "training_blocks",
]

# Where a text is, is known without torch; only its tokens need that.
__getattr__, __dir__ = lazy_names(__name__, {name: "tokens" for name in __all__ if name not in globals()})
