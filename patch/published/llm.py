"""The body of patch.utils.get_llm."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from patch.evaluate.zero_shot import lm_eval_model
from patch.files.schema import record
from patch.models.facts import within_context
from patch.packed.load import load
from patch.pruning.options import DEFAULT_SEQLEN
from patch.published.arguments import path_of, require_dtype
from patch.settings import AtLeastOne, setting

logger = logging.getLogger(__name__)


@record
class Context:
    """What get_llm checks."""

    seqlen: AtLeastOne = setting(DEFAULT_SEQLEN)


def load_llm(
    name: str | os.PathLike, local_files_only: bool, token: str | None, seqlen: int, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, Any]:
    """(model on the CPU, its lm-eval wrapper or None); see patch.utils.get_llm."""
    length = Context(seqlen).seqlen
    path_of(name, "model_name")
    require_dtype(dtype)
    options: dict[str, Any] = {"local_files_only": local_files_only, "token": token}
    model: Any = load(name, dtype=dtype, **options).eval()
    model.seqlen = within_context(model, length)
    try:
        wrapped = lm_eval_model(model, AutoTokenizer.from_pretrained(name, **options))
    except ImportError:
        logger.info("lm-eval is not installed: no zero-shot evaluation")
        wrapped = None
    return model, wrapped
