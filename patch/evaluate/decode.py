"""The time that a language model takes for a new token, one sequence at a time."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from patch.models.modes import evaluating

# The first tokens meet cold caches, and layers that still learn how they are called.
WARM_UP_TOKENS = 3


class _Clock:
    """A streamer of transformers that notes when each token arrives; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode_milliseconds(model: PreTrainedModel, prompt: Tensor, tokens: int) -> float:
    """Median time of a new token in ms, greedy, batch 1, with the model's key-value cache.

    prompt  (tokens,) int64
    tokens  that are timed, after a few that are not; prompt and all of them must fit the model's context
    """
    clock = _Clock()
    device = next(model.parameters()).device
    new = tokens + WARM_UP_TOKENS
    before = model.generation_config
    # In place of the model's own settings: its file may ask for beams, or end at once.
    model.generation_config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
    try:
        ids = prompt[None].to(device)
        with evaluating(model):
            generate: Any = model.generate
            generate(ids, attention_mask=torch.ones_like(ids), streamer=clock)
    finally:
        model.generation_config = before
    times = clock.times[-tokens - 1 :]
    return 1000 * statistics.median(after - start for start, after in itertools.pairwise(times))
