"""Perplexity against closed forms and an independent loop; its protocol."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.models import build_byte_tokenizer
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


def test_bits_per_byte_count_the_text_of_the_predictions(tiny_model, tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("caf\u00e9 \u4f60\u597d \U0001f600 plain words\n" * 12, encoding="utf-8")
    model, raw = tiny_model(), path.read_bytes()
    report = protocol.perplexity_report(model, tokenizer, path, window=32)
    assert report["tokens"] == len(raw)  # one token a byte, so the predicted bytes can be told from the tokens
    starts = [0, *[i for i in range(1, len(raw) + 1) if i == len(raw) or raw[i] & 0xC0 != 0x80]]
    # The tokens of a character end where it ends.
    end_of = [next(s for s in starts if s > token) for token in range(len(raw))]
    windows = len(raw) // 32
    expected = sum(end_of[32 * w + 31] - end_of[32 * w] for w in range(windows))
    assert report["bytes"] == expected
    nats = report["loss"] * windows * 31
    assert report["bits_per_byte"] == pytest.approx(nats / math.log(2) / expected, rel=1e-12)


def bos_tokenizer():
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return tokenizer


def test_bos_in_every_window(tiny_model, tokenizer, text_file):
    text_file.write_text("The fox. " * 20)
    model, text = tiny_model(), list(b"The fox. " * 20)
    own = torch.tensor(tokenizer(text_file.read_text())["input_ids"])
    first = protocol.perplexity_report(model, bos_tokenizer(), text_file, window=32)
    assert (first["bos"], first["tokens"], first["windows"]) == ("first window", 182, 5)
    assert first["loss"] == cross_entropy.mean_cross_entropy(model, torch.cat([torch.tensor([256]), own]), 32)
    assert first["bytes"] == 31 + 4 * 31  # BOS is no text, and the first token of the other windows is not predicted
    every = protocol.perplexity_report(model, bos_tokenizer(), text_file, window=32, window_bos="every")
    assert (every["bos"], every["windows"], every["bytes"]) == ("every window", 5, 5 * 31)
    rows = [[256, *own[31 * i : 31 * i + 31].tolist()] for i in range(5)]
    losses = [cross_entropy.mean_cross_entropy(model, row, 32) for row in rows]
    assert every["loss"] == pytest.approx(math.fsum(losses) / 5, rel=1e-12)
    # Nothing else decides which tokens are predicted: a tokenizer that puts none gives the same.
    same = protocol.perplexity_report(model, tokenizer, text_file, window=32, window_bos="every")
    assert (same["loss"], same["bytes"], same["tokens"]) == (every["loss"], every["bytes"], len(text))
    assert protocol.perplexity_report(model, tokenizer, text_file, window=32)["bos"] == "none"
    assert protocol.perplexity_report(model, tokenizer, text_file, window=32, max_windows=2)["windows"] == 2
    lines = [protocol.format_reports({"dense": report}).splitlines()[3] for report in (first, every, same)]
    assert "BOS in the first window only, as the tokenizer puts it (--window-bos every: in all of them)" in lines[0]
    assert lines[1].endswith("; BOS in every window") and lines[2] == lines[1].replace("182", "180")
    with pytest.raises(ValueError, match="dense: bos in every window is False, for every it is True"):
        protocol.format_reports({"every": every, "dense": every | {"bos": "none"}}, dense="every")


def test_bos_that_is_not_there_is_refused(tiny_model, tokenizer, text_file):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="window_bos: expected a tokenizer with a BOS token, got one without"):
        protocol.perplexity_report(tiny_model(), tokenizer, text_file, window=32, window_bos="every")
    with pytest.raises(ValueError, match="window_bos: expected one of tokenizer, every, got 'first'"):
        protocol.perplexity_report(tiny_model(), tokenizer, text_file, window=32, window_bos="first")
    with pytest.raises(ValueError, match="below the vocabulary size 260, got 0 to 300"):
        cross_entropy.perplexity(tiny_model(), [0] * 64, 32, bos=300)


def test_a_tokenizer_without_offsets_gives_no_bytes(tiny_model, tokenizer, text_file):
    class Slow:
        bos_token_id = 256
        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

        def __call__(self, texts, verbose):
            return tokenizer(texts)

    slow = Slow()
    report = protocol.perplexity_report(tiny_model(), slow, text_file, window=64, max_windows=2)
    assert (report["bytes"], report["bits_per_byte"]) == (None, None)
    fast = protocol.perplexity_report(tiny_model(), tokenizer, text_file, window=64, max_windows=2)
    assert report["loss"] == fast["loss"] and fast["bits_per_byte"] > 0
    assert protocol.format_reports({"dense": report}).splitlines()[1].split() == [
        "dense", f"{report['perplexity']:.4f}", "-", "float32"
    ]  # fmt: skip


def test_worse_than_a_uniform_guess_is_said(tiny_model, tokenizer, text_file):
    model = tiny_model()
    usual = protocol.perplexity_report(model, tokenizer, text_file, window=64, max_windows=2)
    assert usual["vocabulary"] == 260
    model.lm_head.weight.data.mul_(-100)
    broken = protocol.perplexity_report(model, tokenizer, text_file, window=64, max_windows=2)
    said = "worse than a uniform guess over 260 tokens: the model or its masks are broken"
    assert broken["perplexity"] > 260 and broken["warning"] == said
    assert (
        protocol.format_reports({"dense": usual | {"perplexity": 9.0}, "m": broken})
        .splitlines()[-1]
        .startswith(f"WARNING: m: perplexity {broken['perplexity']:,.0f} is {said}")
    )
    assert protocol.broken_perplexity(260.0, 260) is None and protocol.broken_perplexity(1e9, None) is None


def test_a_token_that_the_model_lacks_is_refused_where_it_occurs(tiny_model, text_file):
    larger = build_byte_tokenizer()
    larger.add_tokens(["quick"])
    model, plain = tiny_model(), text_file.with_name("plain.txt")
    assert len(larger) == 261
    plain.write_text("The slow fox. " * 20)
    protocol.perplexity_report(model, larger, plain, window=64)
    with pytest.raises(ValueError, match=r"corpus.txt: expected tokens of the model's 260 .*, got 'quick' \(id 260\)"):
        protocol.perplexity_report(model, larger, text_file, window=64)


def test_the_first_layer_with_nan_is_named(tiny_model):
    model, ids = tiny_model(), torch.zeros(64, dtype=torch.long)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    message = r"window 0 has a cross-entropy of nan \(the first .* is model.layers.1.mlp.down_proj\); use bf16 instead"
    with pytest.raises(ValueError, match=message):
        cross_entropy.perplexity(model, ids, 32)
    assert not any(module._forward_hooks for module in model.modules())


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
