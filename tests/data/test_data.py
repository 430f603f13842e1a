"""Reading, tokenizing, packing and sampling of texts."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
import torch

from patch.data import tokens
from patch.data.sources import NAMED_SETS, load_documents


def test_pack_blocks_concatenates_and_drops_the_tail():
    blocks = tokens.pack_blocks([[1, 2, 3], [], [4, 5], [6, 7, 8, 9]], 4)
    assert blocks.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert blocks.dtype == torch.long


def test_pack_blocks_takes_tensors_and_stops_early():
    def documents():
        yield torch.arange(5)
        yield torch.arange(5, 10)
        raise AssertionError("read more than it needed")

    assert tokens.pack_blocks(documents(), 3, max_blocks=3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_pack_blocks_does_not_depend_on_how_the_text_is_batched():
    ids = list(range(1003))
    expected = tokens.pack_blocks([ids], 10)
    for size in (1, 7, 10, 1003):
        parts = [ids[i : i + size] for i in range(0, len(ids), size)]
        assert torch.equal(tokens.pack_blocks(parts, 10), expected)


@pytest.mark.parametrize(
    ("documents", "size", "error", "message"),
    [
        ([[1, 2, 3]], 4, ValueError, "at least one block of 4 tokens, got 3 tokens"),
        ([], 4, ValueError, "got 0 tokens"),
        ([[1, 2]], 0, ValueError, "block_size: expected an integer >= 1, got 0"),
        (["text"], 2, TypeError, "got text; tokenize"),
        ([[1.5, 2.0]], 2, TypeError, "integer token ids, got float64"),
        ([[[1, 2]]], 2, TypeError, r"1-D sequences of integer token ids"),
    ],
)
def test_pack_blocks_refuses(documents, size, error, message):
    with pytest.raises(error, match=message):
        tokens.pack_blocks(documents, size)


def test_sample_windows_draws_as_the_published_samplers_do():
    lengths = [3, 50, 10, 40, 11]
    documents = [[1000 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    seqlen, nsamples = 10, 20
    random.seed(7)
    expected = []
    for _ in range(nsamples):
        while True:
            i = random.randint(0, len(documents) - 1)
            if len(documents[i]) > seqlen:  # strict: a document of exactly seqlen tokens never serves
                break
        start = random.randint(0, len(documents[i]) - seqlen - 1)
        expected.append(documents[i][start : start + seqlen])
    assert tokens.sample_windows(documents, nsamples, seqlen, 7).tolist() == expected
    lazy = tokens.sample_windows(lengths, nsamples, seqlen, 7, encode=lambda n: documents[lengths.index(n)])
    assert lazy.tolist() == expected
    assert tokens.sample_windows(documents, nsamples, seqlen, 8).tolist() != expected


def test_sample_windows_leaves_the_global_generator_alone():
    random.seed(1)
    expected = random.random()
    random.seed(1)
    tokens.sample_windows([list(range(30))], 3, 5, 0)
    tokens.sample_joined(list(range(30)), 3, 5, 0)
    assert random.random() == expected


def test_sample_joined_draws_as_the_published_samplers_do():
    random.seed(0)
    starts = [random.randint(0, 100 - 8 - 1) for _ in range(5)]
    assert tokens.sample_joined(list(range(100)), 5, 8, 0)[:, 0].tolist() == starts


def test_more_samples_than_a_text_holds_are_said(caplog):
    tokens.sample_joined(list(range(40)), 5, 8, 0)
    assert not caplog.messages
    tokens.sample_joined(list(range(40)), 6, 8, 0)
    said = "6 samples of 8 tokens are drawn from a text of 40 tokens, so they overlap and say less than so many"
    assert caplog.messages == [f"{said}: give more text"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tokens.sample_windows([[1, 2], [3]], 1, 2, 0), "more than 2 tokens, got 2 shorter ones"),
        (lambda: tokens.sample_windows([], 1, 2, 0), "got 0 shorter ones"),
        (lambda: tokens.sample_windows([[1, 2, 3]], 0, 2, 0), "nsamples: expected an integer >= 1, got 0"),
        (lambda: tokens.sample_windows([[1, 2, 3]], 1, 0, 0), "seqlen: expected an integer >= 1, got 0"),
        (
            lambda: tokens.sample_windows([[1, 2, 3]], 1, 2, -1),
            "seed: expected an integer from 0 to 4294967295, got -1",
        ),
        (lambda: tokens.sample_joined([1, 2], 1, 2, 0), "more than 2 tokens, got 2"),
        (
            lambda: tokens.sample_joined([1, 2, 3, 4], 3, 2, 0),
            "nsamples: expected at most 2 different samples of 2 tokens from 4, got 3. Ask for fewer.",
        ),
    ],
)
def test_samplers_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_text_file_is_one_verbatim_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\r\ntwo \u00e9\n".encode())
    assert load_documents(path) == ["one\r\n\r\ntwo \u00e9\n"]


def test_jsonl_and_parquet_have_a_document_a_row(tmp_path):
    rows = [{"body": "first"}, {"body": "second \u00e9"}, {"body": "third"}]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert load_documents(jsonl, text_field="body") == ["first", "second \u00e9", "third"]
    assert load_documents(jsonl, text_field="body", limit=2) == ["first", "second \u00e9"]
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": [row["body"] for row in rows]}), tmp_path / "a.parquet")
    assert load_documents(tmp_path / "a.parquet", text_field="body", limit=2) == ["first", "second \u00e9"]


@pytest.mark.parametrize(
    ("name", "content", "kwargs", "error", "message"),
    [
        ("a.txt", b"", {}, ValueError, "expected text, found only empty documents"),
        ("a.txt", b" \n \n", {}, ValueError, "expected text, found only empty documents"),
        ("a.txt", b"ab\xff\xfecd", {}, ValueError, "expected UTF-8 text .* at byte 2"),
        ("a.md", b"text", {}, ValueError, r"expected a file ending in \.txt, \.jsonl, \.parquet"),
        ("a.jsonl", b'{"text": "a"}\n{oops\n', {}, ValueError, "line 2: expected JSON .*, got '{oops'"),
        ("a.jsonl", b'{"body": "a"}\n', {}, ValueError, r"field 'text', got .*body.*; correct it or set text_field"),
        (
            "a.jsonl",
            b'{"text": "a\\ud800b"}\n',
            {},
            ValueError,
            r"line 1: expected JSON with text .*, got .*surrogates not allowed",
        ),
        (
            "a.txt",
            "text".encode("utf-16-le"),
            {},
            ValueError,
            "expected UTF-8 text, found a NUL at character 1, as UTF",
        ),
        (
            "a.jsonl",
            b'{"text": 3}\n',
            {},
            ValueError,
            r"line 1: expected JSON with text in the field 'text', got .* \(the field holds 3, no text\)",
        ),
        ("a.jsonl", b'{"a": 1, "b": 2}', {}, ValueError, r"\(its fields are a, b\); correct it or set text_field"),
        ("a.jsonl", b"[1]\n", {}, ValueError, r"got '\[1\]' \(no fields by name\)"),
        ("a.jsonl", b"[" * 200_000, {}, ValueError, "line 1: expected JSON with text"),
        ("a.parquet", b"not parquet", {}, ValueError, "not a readable parquet file"),
        ("a.txt", b"text", {"split": "test"}, ValueError, "no split for the local file"),
        ("a.txt", b"text", {"limit": 0}, ValueError, "limit: expected an integer >= 1, got 0"),
    ],
)
def test_load_documents_refuses(tmp_path, name, content, kwargs, error, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        load_documents(path, **kwargs)


def test_parquet_without_the_column_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"expected text in the column 'text', got the columns \['text'\]"):
        load_documents(tmp_path / "a.parquet")


def test_unknown_source_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"one of c4, wikitext2, ptb, slimpajama, got .*missing.txt"):
        load_documents(tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError, match="Check the path"):
        load_documents(tmp_path)


def test_named_set_offline_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConnectionError, match=r"Salesforce/wikitext.*no route.*unset HF_HUB_OFFLINE.*local \.txt"):
        load_documents("wikitext2")
    with pytest.raises(ValueError, match=r"wikitext2, split: expected one of .* got 'dev'"):
        load_documents("wikitext2", "dev")


class _Rows(list):
    def select(self, indices):
        return _Rows(self[i] for i in indices)

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.mark.parametrize(
    ("name", "hub", "split", "joined"),
    [
        ("wikitext2", "Salesforce/wikitext", "test", "a\n\nb\n\nc"),
        ("ptb", "ptb-text-only/ptb_text_only", "test", "a b c"),
        ("c4", "allenai/c4", "validation", "a b c"),
    ],
)
def test_evaluation_text_follows_the_protocol_of_the_set(monkeypatch, name, hub, split, joined):
    datasets = pytest.importorskip("datasets")
    calls = []

    def fake(path, config, **kwargs):
        calls.append((path, config, kwargs["split"]))
        return _Rows({NAMED_SETS[name].field: text} for text in "abc")

    monkeypatch.setattr(datasets, "load_dataset", fake)
    text, windows = tokens.evaluation_text(name)
    assert text == joined
    assert calls == [(hub, "wikitext-2-raw-v1" if name == "wikitext2" else None, split)]
    assert windows == (256 if name == "c4" else None)


def test_calibration_windows_by_convention(monkeypatch, tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = ["short", "x" * 40, "y" * 50]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: _Rows({"text": t} for t in texts))
    windows, digest = tokens.calibration_windows(tokenizer, "c4", nsamples=8, seqlen=30, seed=0)
    assert torch.equal(windows, tokens.sample_windows(tokens.tokenize(tokenizer, texts), 8, 30, 0))
    assert digest == tokens.text_sha256(texts)
    joined, _ = tokens.calibration_windows(tokenizer, "wikitext2", nsamples=8, seqlen=30, seed=0)
    assert torch.equal(joined, tokens.sample_joined(tokens.tokenize(tokenizer, [" ".join(texts)])[0], 8, 30, 0))
    path = tmp_path / "a.txt"
    path.write_text("z" * 90)
    local, _ = tokens.calibration_windows(tokenizer, path, nsamples=4, seqlen=30, seed=0)
    assert local.shape == (4, 30)
    with pytest.raises(ValueError, match="more than 90 tokens"):
        tokens.calibration_windows(tokenizer, path, nsamples=4, seqlen=90)


def test_tokenize_is_the_same_for_any_batching(tokenizer, monkeypatch):
    texts = ["abc", "", "de"] * 5
    expected = [tokenizer(text)["input_ids"] for text in texts]
    monkeypatch.setattr(tokens, "TOKENIZE_BATCH", 4)
    assert tokens.tokenize(tokenizer, texts) == expected
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        tokens.tokenize(tokenizer, "abc")


def test_training_blocks(tokenizer, text_file):
    blocks, digest = tokens.training_blocks(tokenizer, text_file, 64, max_blocks=5)
    text = text_file.read_text()
    assert blocks.tolist() == [tokenizer(text[:320])["input_ids"][i : i + 64] for i in range(0, 320, 64)]
    assert digest == hashlib.sha256(text.encode() + b"\0").hexdigest()


def test_text_hash_sees_document_borders():
    assert tokens.text_sha256(["ab", "c"]) != tokens.text_sha256(["a", "bc"])
