"""Evaluation: perplexity with its protocol, zero-shot tasks, result files, tables and plots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patch.files.lazy import lazy_names

if TYPE_CHECKING:
    from patch.evaluate.cross_entropy import mean_cross_entropy, perplexity
    from patch.evaluate.protocol import EvaluationSet, evaluation_set, perplexity_report

__all__ = ["EvaluationSet", "evaluation_set", "mean_cross_entropy", "perplexity", "perplexity_report"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "EvaluationSet": "protocol",
        "evaluation_set": "protocol",
        "mean_cross_entropy": "cross_entropy",
        "perplexity": "cross_entropy",
        "perplexity_report": "protocol",
    },
)
