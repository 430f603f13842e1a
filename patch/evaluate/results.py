"""Result files of evaluation: what is in them, how they are written and read, and which may be compared.

A file is JSON: format, version, date (UTC), command, settings, versions (of packages), warnings and models, a list of
{label, model, commit, masks, method, sparsity, dtype, device, model_fingerprint, perplexity, zero_shot}:
    commit      of the Hugging Face repository, null for a folder
    masks       null, or {path, manifest_sha256, meta} of the artifact put on the model
    method      of the artifact, null without one
    sparsity    share of zeros in the pruned or packed layers, 0 for the dense model, null where it is not known
    perplexity  {set: perplexity_report}, of patch.evaluate; perplexity is null where exp(loss) overflows
    zero_shot   null, or zero_shot_report of patch.evaluate.zero_shot
    coverage    null, or of patch.models.coverage: how much of the decoder is in masked layers, and its sparsity
Files of earlier versions lack coverage, bytes, bits_per_byte, bos, vocabulary and warning of sets, truncated of tasks.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from patch.evaluate.tables import format_table
from patch.files.paths import require_file
from patch.files.schema import Count, Says, parse, record
from patch.files.strict_json import read_json

FORMAT: Literal["patch-llm-results"] = "patch-llm-results"
VERSION = 1
# What perplexity_report says in "bos": windows that begin with a BOS token.
NO_WINDOW, FIRST_WINDOW, EVERY_WINDOW = "none", "first window", "every window"
_SAID_ELSEWHERE = ("model", "model_fingerprint", "dtype", "device", "versions")
# What two numbers must share to be comparable.
SAME_TEXT = ("text_sha256", "tokens", "window", "windows")
_SAME_QUESTIONS = ("version", "num_fewshot", "questions", "config_sha256")
# A pruned model is some percent worse than the dense one, a bad one several times.
_SUSPICIOUS = 10
_NotNegative = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]


@record(others=True)
class SetResult:
    """What is needed of a perplexity_report."""

    perplexity: Annotated[float, Field(ge=1)] | None
    loss: _NotNegative
    text_sha256: str
    tokens: Count
    window: Count
    windows: Count
    bytes: Count | None = None
    bits_per_byte: _NotNegative | None = None
    bos: str | None = None
    vocabulary: Count | None = None

    @model_validator(mode="after")
    def _of_the_loss(self) -> SetResult:
        if self.perplexity is not None and not math.isclose(math.log(self.perplexity), self.loss, abs_tol=1e-6):
            expected = f"expected the exponential of the loss {self.loss} as perplexity"
            raise ValueError(f"{expected}, got {self.perplexity}. Evaluate again with `patch-llm eval --json`.")
        return self


@record(others=True)
class TaskResult:
    """What is needed of a task."""

    value: _Share
    stderr: _NotNegative | None
    questions: Count
    num_fewshot: Count
    version: str
    config_sha256: str
    truncated: Count = 0


@record(others=True)
class ZeroShotResult:
    """What is needed of a zero_shot_report."""

    average: _Share
    metric: str
    limit: Count | None
    tasks: dict[str, TaskResult]
    max_length: Count | None = None


@record(others=True)
class CoverageResult:
    """What is needed of patch.models.coverage."""

    share: _Share
    sparsity: _Share
    decoder_sparsity: _Share


@record(others=True)
class ModelResult:
    """What is needed of a model."""

    label: str
    model: str
    sparsity: _Share | None
    method: str | None
    model_fingerprint: str
    perplexity: dict[str, SetResult]
    zero_shot: ZeroShotResult | None
    coverage: CoverageResult | None = None

    @model_validator(mode="after")
    def _of_the_coverage(self) -> ModelResult:
        if self.coverage is not None and self.sparsity != self.coverage.sparsity:
            got = f"got {self.sparsity}. Evaluate again with `patch-llm eval --json`."
            raise ValueError(f"expected the sparsity of its coverage, {self.coverage.sparsity}, {got}")
        return self


@record(others=True)
class ResultFile:
    """What is needed of a result file; other keys may be there."""

    format: Annotated[Literal["patch-llm-results"], Says(f"{FORMAT!r}", "Give a file of `patch-llm eval --json`.")]
    version: Annotated[
        int,
        Field(ge=VERSION, le=VERSION),
        Says(f"version {VERSION} of the result format", "Evaluate again with this version of patch-llm."),
    ]
    models: Annotated[list[ModelResult], Field(min_length=1), Says("a list of models")]


def make_results(
    models: Sequence[Mapping[str, Any]],
    *,
    command: Sequence[str],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The contents of a result file; models as in the module's docstring."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "settings": dict(settings),
        "versions": dict(versions),
        "warnings": model_warnings(models),
        "models": [_entry(model) for model in models],
    }


def results_text(results: Mapping[str, Any]) -> str:
    """The text of a result file; sets and tasks keep the order they were asked for in."""
    return json.dumps(results, indent=1, allow_nan=False) + "\n"


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """Contents of a result file.

    raises  FileNotFoundError; ValueError naming the file for another format or version and for missing values.
    """
    path = require_file(str(path), path, "a result file of `patch-llm eval --json`")
    results = read_json(path)
    parse(ResultFile, results, f"{path}: ", "Evaluate again with `patch-llm eval --json`.")
    return results


def merge_models(files: Mapping[str, Mapping[str, Any]], labels: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The models of several result files as one list, with labels that differ.

    files   {name of the file: read_results(file)}
    labels  one for each model of the list, default those of the files. A model that several files hold with the same
            results (the dense one, usually) is listed once; equal labels of different models get the file's name.
    raises  ValueError for a wrong number of labels, for equal ones, and for results that cannot be compared.
    """
    merged: list[dict[str, Any]] = []
    for name, results in files.items():
        for model in results["models"]:
            keys = ("model_fingerprint", "perplexity", "zero_shot")
            twin = next((known for known in merged if all(known[key] == model[key] for key in keys)), None)
            if twin is None:
                merged.append({**model, "file": name})
            elif twin["sparsity"] is None:  # evaluated on its own first, where nothing says that it is dense
                twin["sparsity"] = model["sparsity"]
    if labels:
        if len(labels) != len(merged):
            listed = ", ".join(map(_named, merged))
            raise ValueError(f"expected {len(merged)} labels, got {len(labels)}; the models in order are {listed}")
        for model, label in zip(merged, labels, strict=True):
            model["label"] = label
    else:
        counts = Counter(model["label"] for model in merged)
        for model in merged:
            if counts[model["label"]] > 1:
                model["label"] = f"{model['label']} ({Path(model['file']).stem})"
    for label, count in Counter(model["label"] for model in merged).items():
        if count > 1:
            raise ValueError(f"expected different labels, got {label!r} {count} times; give one for each with --labels")
    check_comparable(merged)
    return merged


def check_comparable(models: Sequence[Mapping[str, Any]]) -> None:
    """raises ValueError naming both models where the same set or task was not measured in the same way."""
    sets: dict[str, Mapping[str, Any]] = {}
    tasks: dict[str, Mapping[str, Any]] = {}
    for model in models:
        for name, report in model["perplexity"].items():
            first = sets.setdefault(name, model)
            require_comparable(_named(model), report, _named(first), first["perplexity"][name], name)
        zero_shot = model["zero_shot"]
        for name, task in (zero_shot or {"tasks": {}})["tasks"].items():
            first = tasks.setdefault(name, model)
            known = first["zero_shot"]
            require_same(_named(model), task, _named(first), known["tasks"][name], _SAME_QUESTIONS, name)
            require_same(_named(model), zero_shot, _named(first), known, ("metric", "limit"), name)
    scored = [model for model in models if model["zero_shot"]]
    names = [{"set of zero-shot tasks": sorted(model["zero_shot"]["tasks"])} for model in scored]
    for model, given in zip(scored, names, strict=True):
        require_same(_named(model), given, _named(scored[0]), names[0], given)


def require_comparable(
    label: str, report: Mapping[str, Any], other: str, expected: Mapping[str, Any], of: str = ""
) -> None:
    """Refuse to compare two perplexity reports of different texts, windows, or rules for BOS."""
    require_same(label, report, other, expected, SAME_TEXT, of)
    # Files of earlier versions do not say it: they never put one into every window.
    rules = [{"bos in every window": r.get("bos") == EVERY_WINDOW} for r in (report, expected)]
    require_same(label, rules[0], other, rules[1], rules[0], of)


def broken_perplexity(perplexity: float, vocabulary: int | None) -> str | None:
    """What to say of a perplexity above the number of tokens to guess from; None where it is not."""
    if vocabulary is None or perplexity <= vocabulary:
        return None
    return f"worse than a uniform guess over {vocabulary:,} tokens: the model or its masks are broken"


def perplexity_warnings(reports: Mapping[str, Mapping[str, Any]], reference: str) -> list[tuple[str, str]]:
    """(label, what is wrong) of perplexities that a working model does not have.

    reports    {label: perplexity_report} on the same text
    reference  label of the model that the others were made from
    """
    said = []
    values = {label: _perplexity_value(report) for label, report in reports.items()}
    for label, value in values.items():
        if broken := broken_perplexity(value, reports[label].get("vocabulary")):
            # Models trained with BOS at every start (Gemma) explode without it.
            hint = ", or it needs --window-bos every" if reports[label].get("bos") == FIRST_WINDOW else ""
            said.append((label, f"perplexity {value:,.0f} is {broken}{hint}"))
        elif value > _SUSPICIOUS * values.get(reference, math.inf):
            times = value / values[reference]
            said.append((label, f"perplexity {value:,.2f} is {times:,.0f} times that of {reference}: check the masks"))
    return said


def model_warnings(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on models that cannot be right, the first model being the reference, and on questions that were cut."""
    lines = []
    for name in _union(model["perplexity"] for model in models):
        reports = {model["label"]: model["perplexity"][name] for model in models if name in model["perplexity"]}
        lines += [f"{label}, {name}: {said}" for label, said in perplexity_warnings(reports, models[0]["label"])]
    return lines + [f"{model['label']}, {said}" for model in models for said in truncation_warnings(model["zero_shot"])]


def truncation_warnings(report: Mapping[str, Any] | None) -> list[str]:
    """Sentences on tasks of a zero_shot_report with questions that did not fit the context."""
    if report is None:
        return []
    return [
        f"{name}: {task['truncated']:,} of {task['questions']:,} questions are longer than the context of "
        f"{report['max_length']} tokens and lost their beginning"
        for name, task in report["tasks"].items()
        if task.get("truncated")
    ]


def bos_line(report: Mapping[str, Any]) -> str:
    """Which windows of a perplexity_report begin with a BOS token, and what to do where most lack the usual one."""
    rules = {
        NO_WINDOW: "no BOS",
        FIRST_WINDOW: "BOS in the first window only, as the tokenizer puts it (--window-bos every: in all of them)",
        EVERY_WINDOW: "BOS in every window",
    }
    return rules.get(report.get("bos", ""), "BOS as the tokenizer puts it")


def summary_rows(models: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a model for report.format_table: sparsity, perplexity of every set, mean accuracy in percent."""
    sets = _union(model["perplexity"] for model in models)
    with_bits = {name for m in models for name, r in m["perplexity"].items() if r.get("bits_per_byte") is not None}
    with_tasks = any(model["zero_shot"] for model in models)
    with_coverage = any(model.get("coverage") for model in models)
    rows = []
    for model in models:
        row = {"model": model["label"], "sparsity": _share_text(model["sparsity"])}
        if with_coverage:
            covered = model.get("coverage") or {}
            row["of the decoder"] = _share_text(covered.get("decoder_sparsity"))
            row["in masked layers"] = _share_text(covered.get("share"))
        for name in sets:
            report = model["perplexity"].get(name)
            row[f"{name} perplexity"] = _perplexity_text(report)
            if name in with_bits:
                bits = report and report.get("bits_per_byte")
                row[f"{name} bits/byte"] = "-" if bits is None else f"{bits:.4f}"
        if with_tasks:
            row["mean accuracy %"] = f"{100 * model['zero_shot']['average']:.2f}" if model["zero_shot"] else "-"
        rows.append(row)
    return rows


def task_rows(models: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a task for report.format_table, accuracy in percent +- standard error; empty without tasks."""
    scored = [model for model in models if model["zero_shot"]]
    rows = []
    for name in _union(model["zero_shot"]["tasks"] for model in scored):
        facts = scored[0]["zero_shot"]["tasks"][name]
        row = {"task": name, "version": str(facts["version"]), "n-shot": str(facts["num_fewshot"])}
        row["questions"] = f"{facts['questions']:,}"
        rows.append(row | {m["label"]: _accuracy_text(m["zero_shot"]["tasks"][name]) for m in scored})
    if rows:
        row = {"task": f"mean of {len(rows)}", "version": "", "n-shot": "", "questions": ""}
        rows.append(row | {m["label"]: f"{100 * m['zero_shot']['average']:.2f}" for m in scored})
    return rows


def csv_rows(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a model with every number, unrounded, accuracies in 0..1; empty where something was not measured."""
    sets = _union(model["perplexity"] for model in models)
    tasks = _union(model["zero_shot"]["tasks"] for model in models if model["zero_shot"])
    rows = []
    for model in models:
        row = {key: model[key] for key in ("label", "file", "model", "method", "sparsity", "model_fingerprint")}
        covered = model.get("coverage") or {}
        row |= {"decoder_sparsity": covered.get("decoder_sparsity"), "coverage": covered.get("share")}
        for name in sets:
            report = model["perplexity"].get(name, {})
            row |= {f"{name} {key}": report.get(key) for key in ("perplexity", "loss", "bits_per_byte", "bytes")}
        scores = model["zero_shot"] or {"tasks": {}}
        for name in tasks:
            task = scores["tasks"].get(name, {})
            row |= {f"{name} accuracy": task.get("value"), f"{name} stderr": task.get("stderr")}
            row |= {f"{name} truncated": task.get("truncated")}
        if tasks:
            row["mean accuracy"] = scores.get("average")
        rows.append({key: "" if value is None else value for key, value in row.items()})
    return rows


def markdown_tables(models: Sequence[Mapping[str, Any]]) -> str:
    """Tables of compared models in Markdown, and how their numbers were made."""
    parts = [format_table(summary_rows(models), markdown=True)]
    if rows := task_rows(models):
        parts.append(format_table(rows, markdown=True))
    parts.append("\n".join(f"* {line}" for line in protocol_lines(models)))
    if warnings := model_warnings(models):
        parts.append("\n".join(f"* **WARNING**: {line}" for line in warnings))
    return "\n\n".join(parts)


def protocol_lines(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences that say how the numbers of compared models were made."""
    lines = []
    for name in _union(model["perplexity"] for model in models):
        report = next(model["perplexity"][name] for model in models if name in model["perplexity"])
        split = f" ({report['split']})" if report.get("split") else ""
        lines.append(
            f"{name}{split}: {report['windows']} non-overlapping windows of {report['window']} tokens out of "
            f"{report['tokens']}, exp of the mean cross-entropy; {bos_line(report)}; "
            f"text SHA-256 {report['text_sha256']}"
        )
    scored = [model["zero_shot"] for model in models if model["zero_shot"]]
    return lines + [zero_shot_line(report) for report in scored[:1]]


def zero_shot_line(report: Mapping[str, Any]) -> str:
    """One sentence that says how the accuracies of zero_shot_report were made."""
    limit = f"; ONLY the first {report['limit']} questions of each task" if report["limit"] else ""
    return (
        f"zero-shot: {report['metric']} by lm-eval {report.get('lm_eval')}, plain mean over tasks; +- is the standard "
        f"error{limit}"
    )


def _entry(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model as the file holds it: what is said once for the model or the file is not repeated for every set."""
    sets = {}
    for name, report in model["perplexity"].items():
        kept = {key: value for key, value in report.items() if key not in _SAID_ELSEWHERE}
        # JSON has no infinity: a perplexity that overflows is null beside its loss.
        sets[name] = kept | {"perplexity": kept["perplexity"] if math.isfinite(kept["perplexity"]) else None}
    return {**model, "perplexity": sets}


def require_same(
    label: str, values: Mapping[str, Any], other: str, expected: Mapping[str, Any], keys: Iterable[str], of: str = ""
) -> None:
    """Refuse to compare two models' results that differ in what was measured; of: the set or task they are of."""
    for key in keys:
        if values[key] != expected[key]:
            differs = f"{key}{of and f' of {of}'} is {values[key]}, for {other} it is {expected[key]}"
            raise ValueError(f"{label}: {differs}: they cannot be compared; evaluate both in the same way")


def _named(model: Mapping[str, Any]) -> str:
    return f"{model['label']} ({model['file']})" if "file" in model else model["label"]


def _share_text(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _perplexity_value(report: Mapping[str, Any]) -> float:
    return math.inf if report["perplexity"] is None else report["perplexity"]


def _perplexity_text(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "-"
    return "inf" if report["perplexity"] is None else f"{report['perplexity']:.4f}"


def _accuracy_text(task: Mapping[str, Any]) -> str:
    value = f"{100 * task['value']:.2f}"
    return value if task["stderr"] is None else f"{value} +- {100 * task['stderr']:.2f}"


def _union(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys of all mappings, in the order of their first appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
