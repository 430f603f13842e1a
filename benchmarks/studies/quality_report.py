"""Table, CSV and plot of the quality study: means over seeds with their spread."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patch.evaluate import plots, tables
from patch.files.atomic import write_text_atomic

# Perplexity columns of a cell, in order, and what the table calls them.
PERPLEXITIES = {
    "perplexity": "perplexity",
    "masks_alone": "masks alone",
    "compensated_least_squares": "compensated",
    "compensated_sparsegpt": "compensated (sweep)",
}
NOTES = """
* perplexity: the model as the method leaves it. SparseGPT and Thanos change the weights they keep; the others do not.
* masks alone: the dense weights under the method's masks.
* compensated: the dense weights under the masks, the kept ones updated block by block on the calibration samples until
  every layer's output is nearest to the dense layer's (exact least squares for every row, damping 0.01{sweep}).
* mean over the seeds +- sample standard deviation. A seed draws the calibration samples and drives the learning.
* linear bytes: the pruned layers packed in bf16 against dense bf16. Unstructured zeros have no fast format: 1.00x.
* tokens: what the method sees before it is compensated, seconds: one run of it on a machine that may have been busy;
  both without the masks that PATCH and MaskLLM start from (SparseGPT's, for PATCH tile also MaskLLM's). One-shot
  methods need little by design, mask learning sees more and takes longer: this is no comparison at equal cost.
"""


def write(out: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, str]) -> None:
    """quality.md, quality.csv (one row per method), quality_cells.csv (one per seed) and quality.png.

    rows   results of the cells, each with cell, method, group, target and seed
    about  what was run: command, model, texts, machine
    """
    summary = summarize(rows)
    columns = [name for name in PERPLEXITIES if any(name in row for row in rows)]
    keys = dict.fromkeys(itertools.chain.from_iterable(rows))
    tables.write_csv(out / "quality_cells.csv", [{key: row.get(key, "") for key in keys} for row in rows])
    tables.write_csv(out / "quality.csv", summary)
    table = tables.format_table([_shown(row, columns) for row in summary], markdown=True)
    lines = [f"* {name}: {f'`{value}`' if name == 'command' else value}" for name, value in about.items()]
    sweep = "; sweep: SparseGPT's update with the mask given" if "compensated_sparsegpt" in columns else ""
    text = "\n".join(["# Quality of every method", "", *lines, "", table, NOTES.format(sweep=sweep)])
    write_text_atomic(out / "quality.md", text)
    plot(out / "quality.png", summary, columns)


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per method: mean and sample standard deviation over seeds (none for one seed), in order of appearance."""
    cells: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault(row["cell"], []).append(row)
    columns = [name for name in PERPLEXITIES if any(name in row for row in rows)]
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
        line |= {"bytes_of_dense": round(share, 4), "tokens": first["tokens"]}
        line["seconds"] = round(statistics.fmean(row["seconds"] for row in same), 1)
        summary.append(line)
    return summary


def _shown(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, str]:
    shown = {"method": row["method"], "zeros": f"{row['sparsity']:.1%}"}
    for name in columns:
        shown[PERPLEXITIES[name]] = _with_spread(row, name)
    return shown | {
        "linear bytes": f"{row['bytes_of_dense']:.2f}x",
        "tokens": f"{row['tokens']:,}",
        "seconds": f"{row['seconds']:.0f}",
        "seeds": str(row["seeds"]),
    }


def _with_spread(row: Mapping[str, Any], name: str) -> str:
    if row[name] == "":
        return "-"
    spread = row[f"{name}_spread"]
    return f"{row[name]:.2f}" if spread == "" else f"{row[name]:.2f} +- {spread:.2f}"


def plot(path: Path, summary: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """PNG with a panel per perplexity column that has a result beside the dense one: perplexity against zeros."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [name for name in columns if name != "masks_alone"]
    figure = Figure(figsize=(5.4 * len(panels) + 2.4, 5.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    dense = next((row["perplexity"] for row in summary if row["group"] == "dense"), None)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in summary:
        if row["group"] not in ("dense", "ablation"):
            groups.setdefault(row["group"], []).append(row)
    for axes, name in zip(all_axes, panels, strict=True):
        if dense is not None:
            axes.axhline(dense, color="black", linewidth=1.2, linestyle=":", label=f"dense: {dense:.2f}")
        for group, style in zip(groups, _styles(groups), strict=True):
            points = sorted((row["sparsity"], row[name], row[f"{name}_spread"] or 0) for row in groups[group])
            x, y, spread = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=spread, label=group, capsize=2.5, **style)
        axes.set_title("as the method leaves the weights" if name == "perplexity" else PERPLEXITIES[name], fontsize=11)
        axes.set_xlabel("zeros in the pruned layers")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(alpha=0.25)
    all_axes[0].set_ylabel("held-out perplexity (lower is better)")
    if all_axes[-1].has_data():
        all_axes[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    plots.save_figure(figure, path)


def _styles(groups: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Solid for what has a fast format, dashed for unstructured; one colour per method."""
    from matplotlib import colormaps

    colors: dict[str, Any] = {}
    palette = colormaps["tab10"].colors
    styles = []
    for number, group in enumerate(groups):
        method = group.removesuffix(" 2:4").removesuffix(" unstructured")
        color = colors.setdefault(method, palette[len(colors) % len(palette)])
        loose = group.endswith("unstructured")
        styles.append(
            {
                "color": color,
                "linestyle": "--" if loose else "-",
                "linewidth": 1.2 if loose else 1.8,
                "marker": "o" if group.startswith("PATCH") else "x" if loose else "sD^v<>"[number % 6],
                "markersize": 5,
            }
        )
    return styles
