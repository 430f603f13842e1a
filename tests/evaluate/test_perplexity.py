"""Perplexity against closed forms and an independent loop; its protocol."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from patch.evaluate import cross_entropy, protocol


class Fixed(nn.Module):
    """Language model with given logits per position."""

    def __init__(self, logits_of, dtype=torch.float32):
        super().__init__()
        self.logits_of = logits_of
        self.anchor = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, input_ids, use_cache=None):
        return SimpleNamespace(logits=self.logits_of(input_ids).to(self.anchor.dtype))


@pytest.mark.parametrize("vocabulary", [2, 7, 260])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_uniform_model_has_the_vocabulary_size_as_perplexity(vocabulary, dtype):
    model = Fixed(lambda ids: torch.full((*ids.shape, vocabulary), 3.0), dtype)
    ids = torch.randint(vocabulary, (1000,))
    assert cross_entropy.perplexity(model, ids, 32) == pytest.approx(vocabulary, rel=1e-6)


def test_known_distribution():
    # Always predicts token 0 with probability 3/4 and token 1 with 1/4.
    model = Fixed(lambda ids: torch.tensor([math.log(3.0), 0.0]).expand(*ids.shape, 2))
    ids = torch.tensor([1, 0, 0, 1, 1, 1, 0, 0, 1])  # windows 1001 1100, tail 1 dropped; first tokens unscored
    mean = -(4 * math.log(0.75) + 2 * math.log(0.25)) / 6
    assert [int(t) for t in ids[:8].reshape(2, 4)[:, 1:].sum(0)] == [1, 0, 1]
    assert cross_entropy.perplexity(model, ids, 4) == pytest.approx(math.exp(mean), rel=1e-6)


def plain_perplexity(model, ids, window):
    """Independent loop: one window at a time, fp64 log-softmax, one prediction at a time."""
    means = []
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        with torch.no_grad():
            logits = model(input_ids=part[None]).logits[0].double()
        losses = [-torch.log_softmax(logits[i], 0)[part[i + 1]].item() for i in range(window - 1)]
        means.append(sum(losses) / len(losses))
    return math.exp(sum(means) / len(means))


@pytest.mark.parametrize("arch", ["llama", "gemma3", "opt"])
def test_equals_an_independent_loop_for_every_batch_size(tiny_model, arch):
    model = tiny_model(arch)
    ids = torch.randint(260, (7 * 32 + 5,), generator=torch.Generator().manual_seed(0))
    expected = plain_perplexity(model, ids, 32)
    for batch_size in (1, 2, 3, 7, 20):
        assert cross_entropy.perplexity(model, ids, 32, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


def test_long_windows_are_scored_in_chunks(monkeypatch, tiny_model):
    model = tiny_model()
    ids = torch.randint(260, (128,), generator=torch.Generator().manual_seed(0))
    whole = cross_entropy.perplexity(model, ids, 64)
    monkeypatch.setattr(cross_entropy, "_LOSS_CHUNK", 10)
    assert cross_entropy.perplexity(model, ids, 64) == pytest.approx(whole, rel=1e-6)


def test_training_flags_come_back_as_they_were(tiny_model):
    model = tiny_model()
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    cross_entropy.perplexity(model, torch.zeros(64, dtype=torch.long), 32)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="finite logits"):
        model.lm_head.weight.data.fill_(math.nan)
        cross_entropy.perplexity(model, torch.zeros(64, dtype=torch.long), 32)
    assert [module.training for module in model.modules()] == before
    loss = model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.sum()
    loss.backward()  # nothing was left behind in inference mode


IDS = list(range(64))


@pytest.mark.parametrize(
    ("ids", "window", "kwargs", "error", "message"),
    [
        (IDS, 65, {}, ValueError, "one window of 65 tokens, got 64 tokens"),
        (IDS * 4, 129, {}, ValueError, "at most 128 .the context of the model., got 129"),
        (IDS, 1, {}, ValueError, "window: expected an integer >= 2, got 1"),
        (IDS, 0, {}, ValueError, "window: expected an integer >= 2, got 0"),
        (IDS, -5, {}, ValueError, "window: expected an integer >= 2, got -5"),
        (IDS, 2.5, {}, ValueError, "window: expected an integer >= 2, got 2.5"),
        (IDS, True, {}, ValueError, "window: expected an integer >= 2, got True"),
        (IDS, np.int64(8), {}, ValueError, "window: expected an integer >= 2, got"),
        (IDS, 8, {"batch_size": np.int64(1)}, ValueError, "batch_size: expected an integer >= 1, got"),
        (IDS, 8, {"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
        ([], 8, {}, (ValueError, TypeError), "token ids|tokens"),
        ([0.5] * 64, 8, {}, TypeError, "integer token ids, got torch.float32"),
        ([[1] * 8] * 8, 8, {}, ValueError, r"shape \(tokens,\) or \(1, tokens\), got \(8, 8\)"),
        ([260] * 64, 8, {}, ValueError, "token ids of 0 below the vocabulary size 260, got 260 to 260"),
        ([-1] * 64, 8, {}, ValueError, "token ids of 0 below the vocabulary size 260, got -1 to -1"),
    ],
)
def test_perplexity_refuses(tiny_model, ids, window, kwargs, error, message):
    with pytest.raises(error, match=message):
        cross_entropy.perplexity(tiny_model(), ids, window, **kwargs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_name_the_window(bad):
    def logits(ids):
        out = torch.zeros(*ids.shape, 8)
        out[ids == 7] = bad
        return out

    ids = torch.zeros(32, dtype=torch.long)
    ids[20] = 7
    with pytest.raises(ValueError, match="finite logits, window 2 has"):
        cross_entropy.perplexity(Fixed(logits), ids, 8, batch_size=2)


def test_report_holds_the_protocol(tiny_model, tokenizer, text_file):
    model = tiny_model()
    text_file.write_text(text_file.read_text()[:1000])
    report = protocol.perplexity_report(model, tokenizer, text_file, window=64, max_windows=5)
    ids = torch.tensor(tokenizer(text_file.read_text())["input_ids"])
    assert report["perplexity"] == cross_entropy.perplexity(model, ids[:320], 64)
    assert (report["windows"], report["window"], report["tokens"]) == (5, 64, len(ids))
    assert report["dtype"] == "float32" and report["versions"]["torch"] == torch.__version__
    assert len(report["text_sha256"]) == len(report["model_fingerprint"]) == 64
    assert protocol.perplexity_report(model, tokenizer, text_file)["window"] == 128  # the model's limit
    with pytest.raises(ValueError, match="window: expected an integer >= 2, got 0"):
        protocol.perplexity_report(model, tokenizer, text_file, window=0)
    with pytest.raises(ValueError, match="max_windows: expected an integer >= 1, got 0"):
        protocol.perplexity_report(model, tokenizer, text_file, max_windows=0)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    assert protocol.perplexity_report(model, tokenizer, text_file)["model_fingerprint"] != report["model_fingerprint"]


def test_reports_print_the_dense_model_first(tiny_model, tokenizer, text_file):
    one = protocol.perplexity_report(tiny_model(), tokenizer, text_file, window=64, max_windows=1)
    table = protocol.format_reports({"wanda 2:4": one, "dense": one, "patch": one}).splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["dense", "wanda", "patch"]
    assert one["text_sha256"] in table[4] and "1 non-overlapping windows of 64" in table[5]
    with pytest.raises(ValueError, match="evaluate the dense model too"):
        protocol.format_reports({"patch": one})
    with pytest.raises(ValueError, match=r"patch: window is 32, for dense it is 64: .* cannot be compared"):
        protocol.format_reports({"dense": one, "patch": one | {"window": 32}})
    with pytest.raises(ValueError, match="patch: text_sha256 is"):
        protocol.format_reports({"dense": one, "patch": one | {"text_sha256": "0"}})
