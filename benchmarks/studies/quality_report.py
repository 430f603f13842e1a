"""Table and CSV of the quality study: means over seeds with their spread, and what each row took."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies import quality_plots
from benchmarks.studies.decode_times import DecodeTimes
from patch.evaluate import tables
from patch.files.atomic import write_text_atomic

# Perplexity columns of a cell, in order, and what the table calls them; those of a compensation bear its name.
PERPLEXITIES = {
    "perplexity": "perplexity",
    "masks_alone": "masks alone",
    "compensated_least_squares": "least squares",
    "compensated_sparsegpt": "sweep",
    "compensated_blocks": "blocks",
}
COSTS = ("tokens", "seconds", "peak_mb")
_COMPENSATED = "compensated_"
NOTES = """
* perplexity: the model as the method leaves it. SparseGPT and Thanos change the weights they keep; the others do not.
* masks alone: the dense weights under the method's masks.
* The next columns begin with the dense weights under the masks and update the kept ones: until every layer's output is
  nearest to the dense layer's (least squares: exact for every row; sweep: SparseGPT's update), or until every decoder
  block's output is near to the dense block's (blocks: Adam, from least squares, on more samples). All masks get the
  same.
* mean over the seeds +- sample standard deviation. A seed draws the calibration samples and drives the learning.
* linear bytes: the pruned layers packed in bf16 against dense bf16. Unstructured zeros have no packed format: 1.00x.
* tokens, seconds, peak MB: of the method, then of {last}. A method's calibration samples are the first of the
  reconstruction's, so only what learning sees is seen besides. Seconds are one run on a machine that may have been
  busy, without the masks that PATCH and MaskLLM start from (SparseGPT's, for PATCH tile also MaskLLM's). Peak MB is how
  far the resident memory of the process rose, the model included, interpreter, libraries and texts not. One-shot
  methods need little by design, mask learning sees more and takes longer: this is no comparison at equal cost.
"""


def write(out: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, str], times: DecodeTimes) -> None:
    """quality.md, quality.csv (one row per method), quality_cells.csv (one per seed), and two plots as PNG.

    rows   results of the cells, each with cell, method, group, target and seed
    about  what was run: command, model, texts, machine
    times  decode times by share of zeros
    """
    summary = summarize(rows)
    columns = columns_of(rows)
    keys = dict.fromkeys(itertools.chain.from_iterable(rows))
    tables.write_csv(out / "quality_cells.csv", [{key: row.get(key, "") for key in keys} for row in rows])
    tables.write_csv(out / "quality.csv", summary)
    table = tables.format_table([_shown(row, columns) for row in summary], markdown=True)
    lines = [f"* {name}: {f'`{value}`' if name == 'command' else value}" for name, value in about.items()]
    last = PERPLEXITIES[columns[-1]] if columns[-1].startswith(_COMPENSATED) else "no compensation"
    text = "\n".join(["# Quality of every method", "", *lines, "", table, NOTES.format(last=last)])
    write_text_atomic(out / "quality.md", text)
    quality_plots.plot_zeros(out / "quality.png", summary, columns, PERPLEXITIES)
    quality_plots.plot_frontier(out / "quality_frontier.png", summary, columns[-1], PERPLEXITIES, times)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Perplexity columns that some row has."""
    return [name for name in PERPLEXITIES if any(name in row for row in rows)]


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per method: mean and sample standard deviation over seeds (none for one seed), in order of appearance."""
    cells: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault(row["cell"], []).append(row)
    columns = columns_of(rows)
    compensations = [name.removeprefix(_COMPENSATED) for name in columns if name.startswith(_COMPENSATED)]
    summary = []
    for same in cells.values():
        first = same[0]
        line: dict[str, Any] = {key: first[key] for key in ("cell", "method", "group", "target")}
        line |= {"seeds": len(same), "sparsity": round(statistics.fmean(row["sparsity"] for row in same), 6)}
        for name in columns:
            values = [row[name] for row in same if name in row]
            line[name] = round(statistics.fmean(values), 4) if values else ""
            line[f"{name}_spread"] = round(statistics.stdev(values), 4) if len(values) > 1 else ""
        share = statistics.fmean(row["linear_bytes"] / row["dense_linear_bytes"] for row in same)
        line |= {"bytes_of_dense": round(share, 4)}
        for suffix in ("", *(f"_{name}" for name in compensations)):
            for cost in COSTS:
                values = [row[cost + suffix] for row in same if cost + suffix in row]
                line[cost + suffix] = round(statistics.fmean(values), 1) if values else ""
        summary.append(line)
    return summary


def _shown(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, str]:
    shown = {"method": row["method"], "zeros": f"{row['sparsity']:.1%}"}
    for name in columns:
        shown[PERPLEXITIES[name]] = _with_spread(row, name)
    shown["linear bytes"] = f"{row['bytes_of_dense']:.2f}x"
    last = columns[-1].removeprefix(_COMPENSATED) if columns[-1].startswith(_COMPENSATED) else None
    for cost in COSTS:
        values = [row[cost], *([row[f"{cost}_{last}"]] if last is not None else [])]
        shown[cost.replace("_mb", " MB")] = " + ".join(f"{value:,.0f}" for value in values if value != "") or "-"
    return shown | {"seeds": str(row["seeds"])}


def _with_spread(row: Mapping[str, Any], name: str) -> str:
    if row[name] == "":
        return "-"
    spread = row[f"{name}_spread"]
    return f"{row[name]:.2f}" if spread == "" else f"{row[name]:.2f} +- {spread:.2f}"
