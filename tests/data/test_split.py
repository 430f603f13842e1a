"""Text to prune with and text to measure on: which tokens each gets, and what is refused."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from patch.data import split
from patch.data.sources import NAMED_SETS
from patch.data.split import calibration_and_heldout
from patch.data.tokens import calibration_windows, sample_joined, tokenize

SIZES = {"nsamples": 5, "seqlen": 32, "seed": 3}


def test_the_end_of_a_file_is_cut_off_before_calibration_is_drawn(tokenizer, text_file):
    texts = calibration_and_heldout(tokenizer, text_file, max_windows=7, **SIZES)
    ids = tokenize(tokenizer, [text_file.read_text()])[0]
    tail = 7 * 32
    assert texts.heldout.flatten().tolist() == ids[-tail:]
    assert texts.heldout.shape == (7, 32)
    assert torch.equal(texts.calibration, sample_joined(ids[:-tail], 5, 32, 3))
    assert texts.where == (f"the last 224 of {len(ids):,} tokens of {text_file}, cut off before calibration was drawn")
    assert texts.text_sha256 == calibration_windows(tokenizer, text_file, **SIZES)[1]


def test_no_more_than_a_tenth_is_cut_off(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("a" * 1000)
    assert calibration_and_heldout(tokenizer, tmp_path / "t.txt", **SIZES).heldout.shape == (3, 32)


def test_another_text_leaves_the_first_whole(tokenizer, text_file, tmp_path):
    (tmp_path / "h.txt").write_text("b" * 100)
    texts = calibration_and_heldout(tokenizer, text_file, tmp_path / "h.txt", **SIZES)
    assert texts.heldout.flatten().tolist() == tokenize(tokenizer, ["b" * 96])[0]
    assert torch.equal(texts.calibration, calibration_windows(tokenizer, text_file, **SIZES)[0])
    assert texts.where == str(tmp_path / "h.txt")


def test_a_named_set_is_measured_on_its_evaluation_split(tokenizer, monkeypatch):
    rows = {"train": ["train " * 99], "test": ["test " * 99]}
    monkeypatch.setattr(split, "calibration_windows", lambda *_, **__: (torch.zeros(1, 32, dtype=torch.int64), "0"))
    monkeypatch.setattr(split, "evaluation_text", lambda name, text_field: (rows["test"][0], 2))
    texts = calibration_and_heldout(tokenizer, "wikitext2", **SIZES)
    assert texts.heldout.flatten().tolist() == tokenize(tokenizer, rows["test"])[0][:64]
    assert texts.where == "the evaluation split of wikitext2" and "wikitext2" in NAMED_SETS


def test_digests_tell_tokens_apart(tokenizer, text_file):
    one, other = (calibration_and_heldout(tokenizer, text_file, **SIZES | {"seed": seed}) for seed in (0, 1))
    assert one.sha256("heldout") == other.sha256("heldout") != one.sha256("calibration")
    assert one.sha256("calibration") != other.sha256("calibration")
    assert re.fullmatch("[0-9a-f]{64}", one.sha256("heldout"))
    # The same tokens in other windows predict other ones.
    short = dataclasses.replace(one, heldout=one.heldout.reshape(-1, 16))
    assert short.sha256("heldout") != one.sha256("heldout")


@pytest.mark.parametrize(
    ("source", "heldout", "message"),
    [
        (
            "t.txt",
            None,
            "heldout: expected a window of 32 tokens in the last tenth of the text, .*t.txt has 300 tokens",
        ),
        ("t.txt", "t.txt", "heldout: expected another text than that to calibrate on, got '.*t.txt' for both. The"),
        ("t.txt", "s.txt", "heldout: expected at least one window of 32 tokens, '.*s.txt' has 5 tokens. Give more"),
        ("s.txt", "t.txt", "calibration text .*s.txt: expected a text of more than 32 tokens, got 5"),
    ],
)
def test_too_little_text_and_one_text_for_both_are_refused(tokenizer, tmp_path, source, heldout, message):
    (tmp_path / "t.txt").write_text("a" * 300)
    (tmp_path / "s.txt").write_text("short")
    other = None if heldout is None else tmp_path / heldout
    with pytest.raises(ValueError, match=message):
        calibration_and_heldout(tokenizer, tmp_path / source, other, **SIZES)
