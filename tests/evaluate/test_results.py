"""Result files: written without replacing, read with checks, merged only where numbers may be compared."""

from __future__ import annotations

import copy
import csv
import io
import json
import math

import pytest

from patch.evaluate import results, tables
from patch.files import atomic


def perplexity_entry(loss: float) -> dict:
    entry = {"perplexity": math.exp(loss), "loss": loss, "text_sha256": "ab" * 32, "tokens": 999, "split": "test"}
    return entry | {"window": 64, "windows": 15}


def model(label: str, loss: float = 2.0, *, sparsity=None, accuracy=None, **changes) -> dict:
    """An entry as `patch-llm eval` makes it, with one set and, where accuracy is given, two tasks."""
    zero_shot = None
    if accuracy is not None:
        facts = {"questions": 1234, "num_fewshot": 0, "version": "1.0", "config_sha256": "cd"}
        tasks = {
            "piqa": facts | {"value": accuracy, "stderr": 0.0123},
            "race": facts | {"value": accuracy - 0.1, "stderr": None},
        }
        zero_shot = {"average": accuracy - 0.05, "metric": "acc,none", "limit": None, "lm_eval": "1", "tasks": tasks}
    entry = {"label": label, "model": "./m", "masks": None, "method": None, "sparsity": sparsity}
    entry |= {"model_fingerprint": label, "perplexity": {"ptb": perplexity_entry(loss)}, "zero_shot": zero_shot}
    return entry | changes


def file_of(*models: dict) -> dict:
    return results.make_results(models, command=["patch-llm", "eval"], settings={}, versions={"torch": "2"})


def save(path, *models: dict):
    return atomic.write_new_text(path, results.results_text(file_of(*models)))


def test_a_file_reads_back_as_it_was_made(tmp_path):
    made = file_of(model("dense", sparsity=0.0, accuracy=0.7), model("m", 3.0, sparsity=0.5, accuracy=0.6))
    path = atomic.write_new_text(tmp_path / "new" / "r.json", results.results_text(made))
    read = results.read_results(path)
    assert read == made
    assert list(read["models"][0]) == list(made["models"][0])  # in the same order
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_nothing_is_replaced_and_nothing_is_lost(tmp_path, monkeypatch):
    def link(*_, **__):
        raise PermissionError("a share without hard links")

    monkeypatch.setattr(atomic.os, "link", link)
    path = tmp_path / "r.json"
    names = [atomic.write_new_text(path, text).name for text in ("first", "second", "third")]
    assert names == ["r.json", "r-2.json", "r-3.json"]
    assert [(tmp_path / name).read_text() for name in names] == ["first", "second", "third"]
    for number in range(4, 1000):
        (tmp_path / f"r-{number}.json").touch()
    with pytest.raises(FileExistsError, match="expected a free name like"):
        atomic.write_new_text(path, "late")
    assert not list(tmp_path.glob(".*"))


def test_a_perplexity_that_overflows_is_null_beside_its_loss(tmp_path):
    entry = model("broken", perplexity={"ptb": perplexity_entry(2.0) | {"perplexity": math.inf, "loss": 800.0}})
    read = results.read_results(save(tmp_path / "r.json", entry))
    stored = read["models"][0]["perplexity"]["ptb"]
    assert (stored["perplexity"], stored["loss"]) == (None, 800.0)
    assert results.summary_rows(read["models"])[0]["ptb perplexity"] == "inf"


def change(*keys, value=None, remove=False):
    def apply(content):
        place = content
        for key in keys[:-1]:
            place = place[key]
        if remove:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            change("format", value="other"),
            "format: expected 'patch-llm-results', got 'other'. Give a file of `patch-llm eval --json`",
        ),
        (change("version", value=2), "expected version 1 of the result format, got 2. Evaluate again"),
        (change("models", value=[]), r"models: expected a list of models, got \[\]"),
        (change("models", value={}), "models: expected a list of models, got {}"),
        (change("models", 0, value=5), r"models\[0\]: expected values by name, got 5"),
        (change("models", 0, "label", remove=True), r"expected models\[0\].label, got nothing"),
        (
            change("models", 0, "sparsity", value="half"),
            r"models\[0\].sparsity: expected a number from 0 to 1, got 'half'",
        ),
        (change("models", 0, "sparsity", value=7), r"models\[0\].sparsity: expected a number from 0 to 1, got 7"),
        (change("models", 0, "perplexity", value=[]), r"models\[0\].perplexity: expected an object, got \[\]"),
        (
            change("models", 0, "perplexity", "ptb", "window", remove=True),
            r"expected models\[0\].perplexity.ptb.window, got nothing",
        ),
        (change("models", 0, "perplexity", "ptb", "loss", value=None), "ptb.loss: expected a number >= 0, got None"),
        (change("models", 0, "perplexity", "ptb", "loss", value=-0.5), "ptb.loss: expected a number >= 0, got -0.5"),
        (
            change("models", 0, "perplexity", "ptb", "perplexity", value=-5),
            r"models\[0\].perplexity.ptb.perplexity: expected a number >= 1, got -5",
        ),
        (
            change("models", 0, "perplexity", "ptb", "bits_per_byte", value=-5),
            "ptb.bits_per_byte: expected a number >= 0, got -5",
        ),
        (change("models", 0, "perplexity", "ptb", "perplexity", value=True), "ptb.perplexity: expected a number"),
        (change("models", 0, "perplexity", "ptb", "perplexity", value=3.0), "expected the exponential of the loss 2.0"),
        (
            change("models", 0, "coverage", value={"share": 1, "sparsity": 0.5, "decoder_sparsity": 0.5}),
            "expected the sparsity of its coverage, 0.5, got None",
        ),
        (change("models", 0, "zero_shot", "limit", remove=True), r"expected models\[0\].zero_shot.limit, got nothing"),
        (
            change("models", 0, "zero_shot", "average", value=None),
            "zero_shot.average: expected a number from 0 to 1, got None",
        ),
        (change("models", 0, "zero_shot", "average", value=54.6), "zero_shot.average: expected .* 0 to 1, got 54.6"),
        (
            change("models", 0, "zero_shot", "tasks", "race", "version", remove=True),
            r"expected models\[0\].zero_shot.tasks.race.version, got nothing",
        ),
        (
            change("models", 0, "zero_shot", "tasks", "race", "value", value="x"),
            "race.value: expected a number from 0 to 1, got 'x'",
        ),
        (
            change("models", 0, "zero_shot", "tasks", "race", "stderr", value="x"),
            "race.stderr: expected a number >= 0, got 'x'",
        ),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, edit, message):
    content = file_of(model("dense", accuracy=0.7))
    edit(content)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"bad\.json: .*{message}|bad\.json: {message}"):
        results.read_results(path)


def test_what_is_no_result_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json: expected a result file"):
        results.read_results(tmp_path / "none.json")
    path = tmp_path / "r.json"
    for text, message in (
        ("[1]", r"expected values by name, got \[1\]. Evaluate again with `patch-llm eval --json`"),
        ("{}", "expected format, version, models, got nothing. Evaluate again with `patch-llm eval --json`"),
        ("{", "not valid JSON"),
        ('{"a": NaN}', "not valid JSON"),
        (results.results_text(file_of(model("m"))).replace("7.38905609893065", "1e999"), "not valid JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"r\.json: {message}"):
            results.read_results(path)


def test_merging_lists_the_same_result_once():
    dense = model("dense", sparsity=0.0)
    alone = model("dense", sparsity=None)
    merged = results.merge_models({"a.json": file_of(alone), "b.json": file_of(dense, model("wanda", 3.0))})
    assert [(m["label"], m["sparsity"], m["file"]) for m in merged] == [
        ("dense", 0.0, "a.json"),
        ("wanda", None, "b.json"),
    ]


def test_labels():
    files = {
        "x/a.json": file_of(model("dense"), model("m", 3.0)),
        "x/b.json": file_of(model("m", 4.0, model_fingerprint="another")),
    }
    assert [m["label"] for m in results.merge_models(files)] == ["dense", "m (a)", "m (b)"]
    assert [m["label"] for m in results.merge_models(files, ["D", "E", "F"])] == ["D", "E", "F"]
    with pytest.raises(ValueError, match=r"expected 3 labels, got 1; .* dense \(x/a.json\), m \(x/a.json\), m \(x/b"):
        results.merge_models(files, ["D"])
    with pytest.raises(ValueError, match="expected different labels, got 'D' 2 times"):
        results.merge_models(files, ["D", "D", "F"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("perplexity", "ptb", "text_sha256", value="ef"), r"m \(b\): text_sha256 of ptb is ef, for dense \(a\)"),
        (change("perplexity", "ptb", "tokens", value=998), "tokens of ptb is 998, for dense"),
        (change("perplexity", "ptb", "window", value=32), "window of ptb is 32, .* evaluate both in the same way"),
        (change("perplexity", "ptb", "windows", value=1), "windows of ptb is 1, for dense"),
        (change("zero_shot", "tasks", "piqa", "version", value="2.0"), "version of piqa is 2.0"),
        (change("zero_shot", "tasks", "piqa", "num_fewshot", value=5), "num_fewshot of piqa is 5"),
        (change("zero_shot", "tasks", "piqa", "questions", value=10), "questions of piqa is 10"),
        (change("zero_shot", "tasks", "piqa", "config_sha256", value="x"), "config_sha256 of piqa is x"),
        (change("zero_shot", "metric", value="acc_norm,none"), "metric of piqa is acc_norm,none"),
        (change("zero_shot", "limit", value=10), "limit of piqa is 10"),
        (change("zero_shot", "tasks", "race", remove=True), r"set of zero-shot tasks is \['piqa'\], for dense \(a\)"),
    ],
)
def test_what_was_measured_differently_is_not_compared(edit, message):
    other = model("m", 3.0, accuracy=0.5)
    files = {"a": file_of(model("dense", accuracy=0.7)), "b": file_of(other)}
    results.merge_models(files)
    edit(files["b"]["models"][0])
    with pytest.raises(ValueError, match=message):
        results.merge_models(files)


def compared() -> list[dict]:
    first = model("dense", math.log(12.0), sparsity=0.0, accuracy=0.7)
    second = model("PATCH", math.log(14.5), sparsity=0.45, accuracy=0.6, method="joint")
    third = model("packed", math.log(14.5), perplexity={"c4": perplexity_entry(2.5)})
    return results.merge_models({"a.json": file_of(first, second, third)})


def broken() -> list[dict]:
    """A dense model, one that is worse than guessing, one that is only bad, one that overflows, one that is usual."""
    entries = {"dense": 3.0, "inverted": 14.3, "bad": 5.5, "endless": 800.0, "pruned": 3.5}
    return [
        model(
            label, perplexity={"ptb": perplexity_entry(2.0) | {"perplexity": value, "loss": loss, "vocabulary": 32000}}
        )
        for label, loss in entries.items()
        for value in [math.exp(loss) if loss < 700 else None]
    ]


def test_perplexities_that_no_working_model_has_are_said():
    said = results.model_warnings(broken())
    uniform = "worse than a uniform guess over 32,000 tokens: the model or its masks are broken"
    assert said == [
        f"inverted, ptb: perplexity 1,623,346 is {uniform}",
        "bad, ptb: perplexity 244.69 is 12 times that of dense: check the masks",
        f"endless, ptb: perplexity inf is {uniform}",
    ]
    made = [m | {"perplexity": {"ptb": m["perplexity"]["ptb"] | {"perplexity": 1.0}}} for m in broken()]
    assert results.model_warnings(made) == []
    gemma = broken()[1]
    gemma["perplexity"]["ptb"]["bos"] = "first window"
    assert results.model_warnings([gemma])[0].endswith(
        "the model or its masks are broken, or it needs --window-bos every"
    )
    # A file keeps them, a report finds them again among what it compares.
    entries = broken()
    entries[3]["perplexity"]["ptb"]["perplexity"] = math.inf  # null in files only
    assert file_of(*entries)["warnings"] == said
    table = results.markdown_tables(results.merge_models({"a.json": file_of(*broken()[:1]), "b": file_of(broken()[2])}))
    assert table.endswith("* **WARNING**: bad, ptb: perplexity 244.69 is 12 times that of dense: check the masks")


def test_questions_that_were_cut_are_said():
    entry = model("m", accuracy=0.6)
    entry["zero_shot"] |= {"max_length": 2048}
    entry["zero_shot"]["tasks"]["race"] |= {"truncated": 1200, "questions": 1234}
    said = "race: 1,200 of 1,234 questions are longer than the context of 2048 tokens and lost their beginning"
    assert results.model_warnings([entry]) == [f"m, {said}"]
    assert results.truncation_warnings(entry["zero_shot"]) == [said]
    rows = results.csv_rows(results.merge_models({"a.json": file_of(entry)}))
    assert (rows[0]["race truncated"], rows[0]["piqa truncated"]) == (1200, "")


def test_bits_per_byte_are_beside_perplexity_where_they_are_known():
    new = model(
        "new", perplexity={"ptb": perplexity_entry(2.0) | {"bits_per_byte": 1.25, "bytes": 4000, "bos": "none"}}
    )
    old = model("old", 3.0)  # of an earlier version
    merged = results.merge_models({"a.json": file_of(new), "b.json": file_of(old)})
    assert [row["ptb bits/byte"] for row in results.summary_rows(merged)] == ["1.2500", "-"]
    rows = results.csv_rows(merged)
    assert [(row["ptb bits_per_byte"], row["ptb bytes"]) for row in rows] == [(1.25, 4000), ("", "")]
    assert "no BOS; text SHA-256" in results.protocol_lines(merged)[0]
    every = model("every", perplexity={"ptb": perplexity_entry(2.0) | {"bos": "every window"}})
    with pytest.raises(ValueError, match=r"every \(b\): bos in every window of ptb is True, for old \(a\) it is False"):
        results.merge_models({"a": file_of(old), "b": file_of(every)})


def test_tables():
    summary = results.summary_rows(compared())
    assert [list(row.values()) for row in summary] == [
        ["dense", "0.0%", "12.0000", "-", "65.00"],
        ["PATCH", "45.0%", "14.5000", "-", "55.00"],
        ["packed", "-", "-", f"{math.exp(2.5):.4f}", "-"],
    ]
    assert list(summary[0]) == ["model", "sparsity", "ptb perplexity", "c4 perplexity", "mean accuracy %"]
    assert [list(row.values()) for row in results.task_rows(compared())] == [
        ["piqa", "1.0", "0", "1,234", "70.00 +- 1.23", "60.00 +- 1.23"],
        ["race", "1.0", "0", "1,234", "60.00", "50.00"],
        ["mean of 2", "", "", "", "65.00", "55.00"],
    ]
    text = results.markdown_tables(compared())
    assert text.splitlines()[0].startswith("| model ")
    assert "* ptb (test): 15 non-overlapping windows of 64 tokens out of 999" in text
    assert "* zero-shot: acc,none by lm-eval 1, plain mean over tasks" in text


def test_csv_has_every_digit(tmp_path):
    tables.write_csv(tmp_path / "r.csv", results.csv_rows(compared()))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text())))
    assert float(rows[1]["ptb perplexity"]) == math.exp(math.log(14.5))
    assert (rows[1]["piqa accuracy"], rows[1]["piqa stderr"], rows[1]["race stderr"]) == ("0.6", "0.0123", "")
    assert (rows[2]["ptb loss"], rows[2]["piqa accuracy"], rows[2]["mean accuracy"]) == ("", "", "")


def test_merging_changes_no_file():
    files = {"a": file_of(model("dense", accuracy=0.7), model("m", 3.0, accuracy=0.5))}
    before = copy.deepcopy(files)
    results.merge_models(files, ["x", "y"])
    assert files == before


@pytest.mark.parametrize(
    ("method", "meta", "series"),
    [
        (None, None, "label"),
        ("joint", {}, "PATCH joint"),
        ("joint", {"compensation": {"method": "least_squares"}}, "PATCH joint compensated"),
        ("maskllm", {"compression": {"bitwidth": 4}, "fine_tune": {"steps": 1}}, "MaskLLM compressed fine-tuned"),
        ("wanda", {"pattern": "unstructured"}, "wanda unstructured"),
        ("wanda", {"pattern": "2:4", "compression": None}, "wanda"),
    ],
)
def test_only_what_was_made_alike_is_one_curve(method, meta, series):
    from patch.cli.commands.report import _series

    masks = None if meta is None else {"meta": meta}
    assert _series({"label": "label", "method": method, "masks": masks}) == series
