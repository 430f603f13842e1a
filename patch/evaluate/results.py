"""Result files of evaluation: what is in them, how they are written and read, and which may be compared.

A file is JSON: format, version, date (UTC), command, settings, versions (of packages) and models, a list of
{label, model, commit, masks, method, sparsity, dtype, device, model_fingerprint, perplexity, zero_shot}:
    commit      of the Hugging Face repository, null for a folder
    masks       null, or {path, manifest_sha256, meta} of the artifact put on the model
    method      of the artifact, null without one
    sparsity    share of zeros in the pruned layers, 0 for the dense model, null where it is not known (packed)
    perplexity  {set: perplexity_report}, of patch.evaluate; perplexity is null where exp(loss) overflows
    zero_shot   null, or zero_shot_report of patch.evaluate.zero_shot
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from patch.evaluate.tables import format_table
from patch.files.strict_json import read_json

FORMAT = "patch-llm-results"
VERSION = 1
_MODEL_KEYS = ("label", "model", "sparsity", "method", "model_fingerprint", "perplexity", "zero_shot")
_SET_KEYS = ("perplexity", "loss", "text_sha256", "tokens", "window", "windows")
_TASK_KEYS = ("value", "stderr", "questions", "num_fewshot", "version", "config_sha256")
_SAID_ELSEWHERE = ("model", "model_fingerprint", "dtype", "device", "versions")
# What two numbers must share to be comparable.
_SAME_TEXT = ("text_sha256", "tokens", "window", "windows")
_SAME_QUESTIONS = ("version", "num_fewshot", "questions", "config_sha256")


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
        "models": [_entry(model) for model in models],
    }


def write_new_text(path: str | os.PathLike, text: str) -> Path:
    """Write a file that is not there yet, atomically; returns the path that was written.

    When the file appeared since it was looked for, the text goes to the next free name (results-2.json): an
    evaluation of hours is neither lost nor does it replace another one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(staging, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        for target in _names(path):
            try:
                # Takes the name, where a rename would replace; not a hard link, which many shares do not have.
                os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                continue
            os.replace(staging, target)
            return target
    finally:
        staging.unlink(missing_ok=True)
    raise FileExistsError(f"expected a free name like {path}, found none; give another one")


def results_text(results: Mapping[str, Any]) -> str:
    """The text of a result file; sets and tasks keep the order they were asked for in."""
    return json.dumps(results, indent=1, allow_nan=False) + "\n"


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """Contents of a result file.

    raises  FileNotFoundError; ValueError naming the file for another format or version and for missing values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a result file of `patch-llm eval --json`, found none; check the path"
        )
    results = read_json(path)
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a result file of `patch-llm eval --json`, this is another kind of file")
    if results.get("version") != VERSION:
        raise ValueError(
            f"{path}: expected version {VERSION} of the result format, got {str(results.get('version'))[:40]}; "
            "evaluate again with this version of patch-llm"
        )
    models = results.get("models")
    if not isinstance(models, list) or not models:
        raise ValueError(f"{path}: expected a list of models, got none; evaluate again")
    for number, model in enumerate(models):
        where = f"{path}: models[{number}]"
        _check_keys(model, _MODEL_KEYS, where)
        _check_number(model["sparsity"], f"{where}.sparsity", optional=True)
        for name, report in _items(model["perplexity"], f"{where}.perplexity"):
            _check_keys(report, _SET_KEYS, f"{where}.perplexity.{name}")
            _check_number(report["loss"], f"{where}.perplexity.{name}.loss")
            _check_number(report["perplexity"], f"{where}.perplexity.{name}.perplexity", optional=True)
        if model["zero_shot"] is not None:
            _check_keys(model["zero_shot"], ("average", "metric", "limit", "tasks"), f"{where}.zero_shot")
            _check_number(model["zero_shot"]["average"], f"{where}.zero_shot.average")
            for name, task in _items(model["zero_shot"]["tasks"], f"{where}.zero_shot.tasks"):
                _check_keys(task, _TASK_KEYS, f"{where}.zero_shot.tasks.{name}")
                _check_number(task["value"], f"{where}.zero_shot.tasks.{name}.value")
                _check_number(task["stderr"], f"{where}.zero_shot.tasks.{name}.stderr", optional=True)
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
            listed = ", ".join(f"{model['label']} ({model['file']})" for model in merged)
            raise ValueError(f"expected {len(merged)} labels, got {len(labels)}; the models in order are {listed}")
        for model, label in zip(merged, labels, strict=True):
            model["label"] = label
    else:
        counts = _counts(model["label"] for model in merged)
        for model in merged:
            if counts[model["label"]] > 1:
                model["label"] = f"{model['label']} ({Path(model['file']).stem})"
    for label, count in _counts(model["label"] for model in merged).items():
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
            _check_same(name, model, first, report, first["perplexity"][name], _SAME_TEXT)
        zero_shot = model["zero_shot"]
        for name, task in (zero_shot or {"tasks": {}})["tasks"].items():
            first = tasks.setdefault(name, model)
            _check_same(name, model, first, task, first["zero_shot"]["tasks"][name], _SAME_QUESTIONS)
            _check_same(name, model, first, zero_shot, first["zero_shot"], ("metric", "limit"))
        first = next(m for m in models if m["zero_shot"]) if zero_shot else None
        if first is not None and set(first["zero_shot"]["tasks"]) != set(zero_shot["tasks"]):
            raise ValueError(
                f"{_named(model)}: zero-shot tasks are {sorted(zero_shot['tasks'])}, for {_named(first)} they are "
                f"{sorted(first['zero_shot']['tasks'])}: their means cannot be compared; evaluate both on the "
                "same tasks"
            )


def summary_rows(models: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a model for report.format_table: sparsity, perplexity of every set, mean accuracy in percent."""
    sets = _union(model["perplexity"] for model in models)
    with_tasks = any(model["zero_shot"] for model in models)
    rows = []
    for model in models:
        row = {"model": model["label"], "sparsity": "-"}
        if model["sparsity"] is not None:
            row["sparsity"] = f"{model['sparsity']:.1%}"
        for name in sets:
            row[f"{name} perplexity"] = _perplexity_text(model["perplexity"].get(name))
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
        for name in sets:
            report = model["perplexity"].get(name, {})
            row |= {f"{name} {key}": report.get(key) for key in ("perplexity", "loss")}
        scores = model["zero_shot"] or {"tasks": {}}
        for name in tasks:
            task = scores["tasks"].get(name, {})
            row |= {f"{name} accuracy": task.get("value"), f"{name} stderr": task.get("stderr")}
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
    return "\n\n".join(parts)


def protocol_lines(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences that say how the numbers of compared models were made."""
    lines = []
    for name in _union(model["perplexity"] for model in models):
        report = next(model["perplexity"][name] for model in models if name in model["perplexity"])
        split = f" ({report['split']})" if report.get("split") else ""
        lines.append(
            f"{name}{split}: {report['windows']} non-overlapping windows of {report['window']} tokens out of "
            f"{report['tokens']}, exp of the mean cross-entropy; text SHA-256 {report['text_sha256']}"
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


def _names(path: Path) -> Iterable[Path]:
    yield path
    for number in range(2, 1000):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _entry(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model as the file holds it: what is said once for the model or the file is not repeated for every set."""
    sets = {}
    for name, report in model["perplexity"].items():
        kept = {key: value for key, value in report.items() if key not in _SAID_ELSEWHERE}
        # JSON has no infinity: a perplexity that overflows is null beside its loss.
        sets[name] = kept | {"perplexity": kept["perplexity"] if math.isfinite(kept["perplexity"]) else None}
    return {**model, "perplexity": sets}


def _check_keys(value: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected values by name, got {type(value).__name__}; evaluate again")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{where}: expected {', '.join(missing)}, found nothing; evaluate again")


def _items(value: Any, where: str) -> Iterable[tuple[str, Any]]:
    _check_keys(value, (), where)
    return value.items()


def _check_number(value: Any, where: str, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: expected a number, got {str(value)[:40]!r}; evaluate again")


def _check_same(
    name: str,
    model: Mapping[str, Any],
    first: Mapping[str, Any],
    values: Mapping[str, Any],
    expected: Mapping[str, Any],
    keys: Sequence[str],
) -> None:
    for key in keys:
        if values[key] != expected[key]:
            raise ValueError(
                f"{_named(model)}: {key} of {name} is {values[key]}, for {_named(first)} it is {expected[key]}: they "
                "cannot be compared; evaluate both in the same way"
            )


def _named(model: Mapping[str, Any]) -> str:
    return f"{model['label']} ({model['file']})" if "file" in model else model["label"]


def _perplexity_text(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "-"
    return "inf" if report["perplexity"] is None else f"{report['perplexity']:.4f}"


def _accuracy_text(task: Mapping[str, Any]) -> str:
    value = f"{100 * task['value']:.2f}"
    return value if task["stderr"] is None else f"{value} +- {100 * task['stderr']:.2f}"


def _counts(labels: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
    return counts


def _union(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys of all mappings, in the order of their first appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
