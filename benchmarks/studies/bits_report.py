"""Table, CSV and plot of the study of bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patch.evaluate import plots, tables
from patch.files.atomic import write_text_atomic

COLUMNS = {"rounded": "rounded to nearest", "reconstructed": "reconstructed"}
# Colour-blind safe; dense first.
INK = ("#333333", "#c44e1c", "#2a7fb8", "#6a51a3", "#2a9d8f")
MOST = 1.25
NOTES = """
* bytes a weight: codes of the kept weights, a scale of 16 bits for {group} weights of a row below 16 bits, and 2 bits
  for where a kept weight of a 2:4 group is; over all weights, pruned ones too. Nothing else of a model is counted.
* rounded to nearest: nothing is trained for the rounding. The hybrids were reconstructed by blocks before it.
* reconstructed: each decoder block trained through the rounding for the dense block's output, scales fixed.
* Rounding is simulated; there is no kernel for these widths here.

![perplexity against bytes a weight](bits.png)
"""


def write(out: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, str], group: int) -> None:
    """bits.md, bits.csv and bits.png in a folder; rows of benchmarks.studies.bits.measure."""
    tables.write_csv(out / "bits.csv", rows)
    table = tables.format_table([_shown(row) for row in rows], markdown=True)
    lines = [f"* {name}: {f'`{value}`' if name == 'command' else value}" for name, value in about.items()]
    text = "\n".join(["# Zeros and bits", "", *lines, "", table, NOTES.format(group=group)])
    write_text_atomic(out / "bits.md", text)
    plot(out / "bits.png", rows)


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    shown = {"model": row["model"], "bits": str(row["bits"]), "bytes a weight": f"{row['bytes_a_weight']:.3f}"}
    return shown | {COLUMNS[name]: "-" if row[name] == "" else f"{row[name]:.2f}" for name in COLUMNS}


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """PNG: perplexity against bytes a weight; a colour a model, dashed where only rounded.

    What is more than MOST times the lowest perplexity is above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(7.6, 5.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    models = list(dict.fromkeys(row["model"] for row in rows))
    for number, model in enumerate(models):
        own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["bytes_a_weight"])
        color = INK[number % len(INK)]
        for column, line in (("rounded", "--"), ("reconstructed", "-")):
            # What was not rounded ends both curves.
            points = [(r["bytes_a_weight"], r[column] if r[column] != "" else r["rounded"], r["bits"]) for r in own]
            x, y, bits = zip(*points, strict=True)
            style = {"color": color, "linestyle": line, "marker": "o" if line == "-" else "x", "markersize": 5}
            axes.plot(x, y, label=f"{model}, {COLUMNS[column]}", linewidth=1.8 if line == "-" else 1.1, **style)
            if line == "-":
                text = {"fontsize": 8, "color": color, "clip_on": True}
                for place, value, width in zip(x, y, bits, strict=True):
                    axes.annotate(str(width), (place, value), xytext=(3, 5), textcoords="offset points", **text)
    axes.set_xscale("log", base=2)
    lowest = min(row["rounded"] for row in rows)
    if max(row["rounded"] for row in rows) > MOST * lowest:
        axes.set_ylim(top=MOST * lowest, bottom=(1 - 0.05 * (MOST - 1)) * lowest)
        axes.set_title("what is above is in the table", fontsize=9, loc="left", color="grey")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes a weight of the pruned layers (numbers: bits of a kept weight)")
    axes.set_ylabel("held-out perplexity (lower is better)")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=9)
    plots.save_figure(figure, path)
