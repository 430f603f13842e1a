"""Evaluation: perplexity with its protocol, zero-shot tasks, result files, tables and plots."""

from __future__ import annotations

from patch.evaluate.cross_entropy import mean_cross_entropy, perplexity
from patch.evaluate.protocol import EvaluationSet, evaluation_set, perplexity_report

__all__ = ["EvaluationSet", "evaluation_set", "mean_cross_entropy", "perplexity", "perplexity_report"]
