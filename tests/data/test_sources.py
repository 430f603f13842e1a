"""The named sets: what each use asks of the hub, how rows become text, and that large sets are never read whole."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json

import pytest
import torch

from patch.data import sources, tokens

C4_TRAIN, C4_VALIDATION = "en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"


def ptb(split):
    return {"data_files": {split: f"penn_treebank/{split}/0000.parquet"}, "revision": "refs/convert/parquet"}


# (set, use): dataset id, config, split, further arguments of load_dataset, text field, joined by (None: not joined)
RULES = {
    ("c4", "calibration"): ("allenai/c4", None, "train", {"data_files": {"train": C4_TRAIN}}, "text", None),
    ("c4", "training"): (
        "allenai/c4",
        None,
        "train",
        {"data_files": {"train": "en/c4-train.*-of-01024.json.gz"}, "streaming": True},
        "text",
        "",
    ),
    ("c4", "evaluation"): (
        "allenai/c4",
        None,
        "validation",
        {"data_files": {"validation": C4_VALIDATION}},
        "text",
        " ",
    ),
    ("wikitext2", "calibration"): ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", {}, "text", " "),
    ("wikitext2", "training"): ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", {}, "text", ""),
    ("wikitext2", "evaluation"): ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", {}, "text", "\n\n"),
    ("ptb", "calibration"): ("ptb-text-only/ptb_text_only", None, "train", ptb("train"), "sentence", " "),
    ("ptb", "training"): ("ptb-text-only/ptb_text_only", None, "train", ptb("train"), "sentence", ""),
    ("ptb", "evaluation"): ("ptb-text-only/ptb_text_only", None, "test", ptb("test"), "sentence", " "),
    ("slimpajama", "calibration"): (
        "DKYoon/SlimPajama-6B",
        None,
        "train",
        {"data_files": {"train": "data/train-00000-of-00048-*.parquet"}},
        "text",
        None,
    ),
    ("slimpajama", "training"): (
        "DKYoon/SlimPajama-6B",
        None,
        "train",
        {"data_files": {"train": "data/train-*.parquet"}, "streaming": True},
        "text",
        "",
    ),
    ("slimpajama", "evaluation"): (
        "DKYoon/SlimPajama-6B",
        None,
        "test",
        {"data_files": {"test": "data/test-*.parquet"}},
        "text",
        "\n\n",
    ),
}
NAMES = ("c4", "wikitext2", "ptb", "slimpajama")
TEXTS = ["a short one", "x" * 70 + "abc", "a second short one", "0123456789" * 9]


class Rows(list):
    """The part of datasets.Dataset that is used; a column is refused where `whole` says so."""

    def select(self, indices):
        return Rows(self[i] for i in indices)

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for datasets.load_dataset: records its arguments and serves TEXTS under the set's field."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(path, config=None, **arguments):
        calls.append((path, config, arguments.pop("split"), arguments))
        named = next(named for named in sources.NAMED_SETS.values() if named.hub_id == path)
        return Rows({named.field: text, "other": "wrong column"} for text in TEXTS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_the_table_of_rules_is_complete():
    assert set(RULES) == set(itertools.product(sources.NAMED_SETS, ("calibration", "training", "evaluation")))
    assert set(sources.NAMED_SETS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_calibration(hub, tokenizer, name):
    *request, field, join = RULES[name, "calibration"]
    windows, digest = tokens.calibration_windows(tokenizer, name, nsamples=9, seqlen=60, seed=3)
    assert hub == [tuple(request)]
    assert sources.NAMED_SETS[name].field == field
    if join is None:
        expected = tokens.sample_windows(tokens.tokenize(tokenizer, TEXTS), 9, 60, 3)
    else:
        expected = tokens.sample_joined(tokens.tokenize(tokenizer, [join.join(TEXTS)])[0], 9, 60, 3)
    assert torch.equal(windows, expected)
    assert digest == tokens.text_sha256(TEXTS)
    again, _ = tokens.calibration_windows(tokenizer, name, nsamples=9, seqlen=60, seed=3)
    assert torch.equal(windows, again)


@pytest.mark.parametrize("name", NAMES)
def test_training(hub, tokenizer, name):
    *request, field, join = RULES[name, "training"]
    blocks, digest = tokens.training_blocks(tokenizer, name, 16)
    assert hub == [tuple(request)]
    assert sources.NAMED_SETS[name].field == field
    ids = tokens.tokenize(tokenizer, [join.join(TEXTS)])[0]  # one token a byte: joined tokens are tokens of the joined
    assert blocks.tolist() == [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    assert digest == tokens.text_sha256(TEXTS)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation(hub, name):
    *request, field, join = RULES[name, "evaluation"]
    text, windows = tokens.evaluation_text(name)
    assert hub == [tuple(request)]
    assert sources.NAMED_SETS[name].field == field
    assert text == join.join(TEXTS)
    assert windows == (256 if name == "c4" else None)
    assert sources.NAMED_SETS[name].evaluation_documents == (1100 if name == "c4" else None)


class OnlySome(Rows):
    """Rows of which only those drawn may be read; a whole column never."""

    def __getitem__(self, key):
        assert isinstance(key, int), "asked for a whole column"
        return super().__getitem__(key)


@pytest.mark.parametrize("name", ["c4", "slimpajama"])
def test_calibration_of_large_sets_tokenizes_only_what_is_drawn(monkeypatch, tokenizer, name):
    datasets = pytest.importorskip("datasets")
    rows = OnlySome({"text": f"{i:04d}" * 20} for i in range(3000))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)
    tokenized = []
    monkeypatch.setattr(
        tokens, "tokenize", lambda tok, texts: tokenized.extend(texts) or [tok(t)["input_ids"] for t in texts]
    )
    windows, _ = tokens.calibration_windows(tokenizer, name, nsamples=8, seqlen=79, seed=0)
    assert windows.shape == (8, 79) and len(tokenized) == 8


@pytest.mark.parametrize("name", ["c4", "slimpajama"])
def test_training_on_large_sets_stops_the_stream(monkeypatch, tokenizer, name):
    datasets = pytest.importorskip("datasets")
    served = []

    def stream():
        for i in itertools.count():
            served.append(i)
            yield {"text": f"{i % 10}" * 8}

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: stream())
    monkeypatch.setattr(tokens, "TOKENIZE_BATCH", 10)
    blocks, digest = tokens.training_blocks(tokenizer, name, 12, max_blocks=3)
    assert blocks.shape == (3, 12) and len(served) == 10
    assert digest == tokens.text_sha256(str(i) * 8 for i in range(5))  # 36 tokens begin in five documents
    served.clear()
    blocks, _ = tokens.training_blocks(tokenizer, name, 12, max_documents=15)
    assert blocks.shape == (10, 12) and len(served) == 15


def test_packing_knows_no_workers(hub, tokenizer, monkeypatch):
    expected, digest = tokens.training_blocks(tokenizer, "slimpajama", 16)
    for batch, cores in ((1, 1), (3, 2), (1000, 64)):
        monkeypatch.setattr(tokens, "TOKENIZE_BATCH", batch)
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true" if cores > 1 else "false")
        for rank in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "2")
            blocks, again = tokens.training_blocks(tokenizer, "slimpajama", 16)
            assert torch.equal(blocks, expected) and again == digest
    names = set(inspect.signature(tokens.training_blocks).parameters) | set(
        inspect.signature(tokens.pack_blocks).parameters
    )
    assert not names & {"num_proc", "num_workers", "workers", "rank", "world_size"}


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (
            "calibration",
            ValueError,
            r"calibration text c4: expected at least one document of more than 500 tokens, got 4",
        ),
        ("training", ValueError, r"training text c4: expected at least one block of 500 tokens, got 192 tokens"),
    ],
)
def test_too_little_text_names_the_set_and_what_was_needed(hub, tokenizer, use, error, message):
    with pytest.raises(error, match=message):
        if use == "calibration":
            tokens.calibration_windows(tokenizer, "c4", nsamples=1, seqlen=500)
        else:
            tokens.training_blocks(tokenizer, "c4", 500)


def test_too_little_joined_text_names_the_set(hub, tokenizer):
    with pytest.raises(ValueError, match=r"calibration text ptb: expected a text of more than 500 tokens, got 195"):
        tokens.calibration_windows(tokenizer, "ptb", nsamples=1, seqlen=500)


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_an_error_for_every_use(hub, tokenizer, monkeypatch, name):
    monkeypatch.setattr("test_sources.TEXTS", ["", " \n"])
    refused = (
        rf"^{name}: expected text, found only empty documents|calibration text {name}: expected at least one document"
    )
    with pytest.raises(ValueError, match=refused):
        tokens.calibration_windows(tokenizer, name, nsamples=1, seqlen=4)
    with pytest.raises(ValueError, match=f"^{name}: expected text, found only empty documents"):
        tokens.training_blocks(tokenizer, name, 1)
    with pytest.raises(ValueError, match=f"^{name}: expected text, found only empty documents"):
        tokens.evaluation_text(name)


def test_a_stream_that_breaks_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def stream():
        yield {"text": "first"}
        raise OSError("connection reset")

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: stream())
    documents = sources.iter_documents("c4")
    assert next(documents) == "first"
    with pytest.raises(ConnectionError, match=r"allenai/c4.*OSError: connection reset; connect to .* local \.txt"):
        next(documents)


def test_arguments_are_refused_before_the_iteration_starts(tmp_path):
    for call, error, message in (
        (lambda: sources.iter_documents(tmp_path / "no.txt"), FileNotFoundError, "source: expected a file"),
        (lambda: sources.iter_documents("c4", "test"), ValueError, "split: expected one of .*, got 'test'"),
        (lambda: sources.iter_documents("c4", limit=0), ValueError, "limit: expected an integer >= 1, got 0"),
        (lambda: sources.named_rows("ptb", "dev"), ValueError, "ptb, split: expected one of .* got 'dev'"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_local_files_are_read_in_pieces(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5)) + "{broken\n")
    documents = sources.iter_documents(jsonl)
    assert list(itertools.islice(documents, 5)) == [f"row {i}" for i in range(5)]
    with pytest.raises(ValueError, match="line 6: expected JSON with text in the field"):
        next(documents)
    assert list(sources.iter_documents(jsonl, limit=2)) == ["row 0", "row 1"]
    monkeypatch.setattr(sources, "_PARQUET_ROWS", 2)
    parquet.write_table(pyarrow.table({"text": ["a", None, "b", "c", None]}), tmp_path / "a.parquet")
    assert (
        list(sources.iter_documents(tmp_path / "a.parquet"))
        == ["a", "b", "c"]
        == sources.load_documents(tmp_path / "a.parquet")
    )
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match="found only empty documents"):
        list(sources.iter_documents(tmp_path / "empty.jsonl"))


def test_the_datasets_package_reads_one_file_of_a_set_with_a_card(tmp_path, monkeypatch):
    """No stand-in: the same arguments on a local folder laid out like the hub's slimpajama."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    for name, texts in {
        "train-00000-of-00048-ab": ["first", "second"],
        "train-00001-of-00048-cd": ["third"],
        "validation-00000-of-00001-ef": ["held"],
        "test-00000-of-00001-01": ["test"],
    }.items():
        parquet.write_table(pyarrow.table({"text": texts}), folder / "data" / f"{name}.parquet")
    counts = {"train": 3, "validation": 1, "test": 1}
    splits = "".join(f"  - name: {name}\n    num_bytes: 9\n    num_examples: {n}\n" for name, n in counts.items())
    (folder / "README.md").write_text(
        f"---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n{splits}---\n"
    )
    local = dataclasses.replace(sources.NAMED_SETS["slimpajama"], hub_id=str(folder))
    monkeypatch.setitem(sources.NAMED_SETS, "slimpajama", local)
    rows = sources.named_rows("slimpajama", "train")
    assert (len(rows), rows[1]["text"]) == (2, "second")
    assert sources.load_documents("slimpajama", "test") == ["test"]
    assert list(sources.iter_documents("slimpajama")) == ["first", "second", "third"]
    assert list(sources.iter_documents("slimpajama", "validation")) == ["held"]
