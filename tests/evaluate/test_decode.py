"""The time of a new token: which calls are timed, and what of the model stays as it was."""

from __future__ import annotations

import itertools

import pytest
import torch

from patch.evaluate import decode


def test_the_median_of_the_last_tokens_is_taken(tiny_model, monkeypatch):
    # The prompt arrives at 0; three tokens are not timed, then one of five takes long.
    ticks = itertools.accumulate([0, 9, 9, 9, 2, 2, 2, 9, 2])
    monkeypatch.setattr(decode.time, "perf_counter", lambda: next(ticks) / 1000)
    model = tiny_model("llama").train()
    before = model.generation_config
    assert decode.decode_milliseconds(model, torch.arange(8), 5) == pytest.approx(2.0)
    assert next(ticks, None) is None
    assert model.generation_config is before and model.training


@pytest.mark.parametrize("arch", ["llama", "gemma3", "opt"])
def test_an_end_of_text_does_not_end_it(tiny_model, arch):
    model = tiny_model(arch)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # all tokens are alike: 0 is the likeliest
    model.generation_config.eos_token_id = 0
    assert decode.decode_milliseconds(model, torch.arange(8), 5) > 0
