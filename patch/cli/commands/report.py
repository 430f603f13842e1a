"""`patch-llm report`: one table, CSV file and plot of several results of `patch-llm eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patch.cli import outputs
from patch.files.schema import record
from patch.settings import Names, NewPath, setting

NAME = "report"
SUMMARY = "compare results of eval: Markdown table, CSV and plot"
EXAMPLES = """\
examples:
  patch-llm report dense.json wanda.json patch-45.json --out comparison
  patch-llm report results.json --labels "dense,Wanda 2:4,PATCH 45%" --out comparison
"""
# What came after the masks, by the key of an artifact's meta.
_STEPS = {"compensation": "compensated", "compression": "compressed", "fine_tune": "fine-tuned"}
# What the modes of `learn` are called in a legend; mask_llm is what 0.1.0 called maskllm.
_SERIES = {"joint": "PATCH joint", "tile": "PATCH tile", "maskllm": "MaskLLM", "mask_llm": "MaskLLM"}
TABLE, NUMBERS, PLOT = "report.md", "results.csv", "results.png"


@record(kw_only=True)
class Options:
    """Settings of `report`."""

    out: NewPath = setting(help="new folder for the report", metavar="FOLDER")
    results: Names = setting(
        (), "files written by `patch-llm eval --json`, the reference first", metavar="RESULT.json", positional=True
    )
    labels: Names = setting((), "names of the models in order (default: those of the files)", metavar="A,B")
    overwrite: bool = setting(False, "replace an earlier report")


def run(options: Options) -> None:
    """Read all files, check that they may be compared, write the folder."""
    out = outputs.check_new_folder(options.out, overwrite=options.overwrite, what="report")
    from patch.evaluate import plots, tables
    from patch.evaluate.results import csv_rows, markdown_tables, merge_models, read_results
    from patch.files.folder import write_folder

    if not options.results:
        raise ValueError("expected at least one result file, got none. Make one with `patch-llm eval --json FILE`.")
    models = merge_models({path: read_results(path) for path in options.results}, options.labels)
    text = markdown_tables(models)

    def write(folder: Path) -> None:
        (folder / TABLE).write_text(f"{text}\n\n![results]({PLOT})\n", encoding="utf-8")
        tables.write_csv(folder / NUMBERS, csv_rows(models))
        plots.plot_models(folder / PLOT, [model["label"] for model in models], **_plot(models))

    out = write_folder(out, write, replace=options.overwrite)
    print(text)
    outputs.print_written(out, f"{TABLE}, {NUMBERS} and {PLOT}", f"open {out / TABLE}")


def on_interrupt(options: Options) -> str:
    """The folder appears complete or not at all."""
    return f"nothing was written to {options.out}; run the same command again"


def _plot(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments of plot_models: panels of all measures, by sparsity where two models differ in it."""
    panels: dict[str, list[float | None]] = {}
    for name in dict.fromkeys(name for model in models for name in model["perplexity"]):
        values = [model["perplexity"].get(name, {}).get("perplexity") for model in models]
        panels[f"{name}: perplexity (lower is better)"] = values
    if any(model["zero_shot"] for model in models):
        values = [100 * m["zero_shot"]["average"] if m["zero_shot"] else None for m in models]
        panels["zero-shot: mean accuracy, % (higher is better)"] = values
    sparsities = [model["sparsity"] for model in models]
    if len({sparsity for sparsity in sparsities[1:] if sparsity}) < 2:
        return {"panels": panels}
    return {"panels": panels, "sparsities": sparsities, "series": [_series(model) for model in models]}


def _series(model: Mapping[str, Any]) -> str:
    """Curve of a model: what is not made alike is not joined by a line."""
    if not model["method"]:
        return model["label"]
    meta = (model.get("masks") or {}).get("meta") or {}
    parts = [_SERIES.get(model["method"], model["method"])]
    if meta.get("pattern") == "unstructured":
        parts.append("unstructured")
    return " ".join(parts + [done for key, done in _STEPS.items() if meta.get(key)])
