"""Tables and plot of benchmarks.studies.generate, from its rows or from the CSV they were saved in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from patch.evaluate import plots

# Columns of the table after those of speed: (heading, measure, format).
SIZES = (
    ("weights MB", "weights", ".0f"),
    ("linears MB", "linears", ".0f"),
    ("head MB", "head", ".0f"),
    ("resident MB", "resident", ".0f"),
    ("peak MB", "peak", ".0f"),
    ("load s", "load", ".2f"),
    ("logits error", "logits error", ".3f"),
)
DENSE, PACKED = "dense", "packed"
# Colour-blind safe, ours first; a rival keeps its colour in every panel.
INK = {PACKED: "#c44e1c", DENSE: "#333333", "llama.cpp": "#2a7fb8", "OpenVINO": "#6a51a3"}


def print_report(rows: Sequence[dict]) -> None:
    table = speed_table(rows)
    if table:
        print("new tokens/s (over dense in transformers) at batch sizes b, ms to the first token of prompts p:")
        harness.print_table(table)
        print("\nsizes, load time, and distance of the logits from the dense model with the same zeros:")
        harness.print_table(size_table(rows))
    for row in rows:
        if row["measure"] == "missing":
            print(f"not measured: {row['model']} {row['method']} {row['mode']}: {row['note']}")
    for row in rows:
        if row["measure"] == "cut":
            print(f"cut: {row['model']} ({row['layers']} layers): {row['note']}")


def speed_table(rows: Sequence[dict]) -> list[dict]:
    """A line for each model and variant, a column for each cell; "-" where it was not measured."""
    cells = dict.fromkeys(
        (row["measure"], row["mode"], int(row["batch"]), int(row["prompt"]))
        for row in rows
        if row["measure"] in ("decode", "first token")
    )
    # Decoding by batch size, then first tokens by prompt, then what is compiled.
    ordered = sorted(cells, key=lambda cell: (cell[1] != "eager", cell[0] != "decode", *cell[2:]))
    result = []
    for model, layers, method in variants(rows):
        line = {"model": model, "layers": layers, "method": method}
        for measure, mode, batch, prompt in ordered:
            place = {"model": model, "measure": measure, "mode": mode, "batch": batch, "prompt": prompt}
            got = value_of(rows, method=method, **place)
            dense = value_of(rows, method=DENSE, **place | {"mode": "eager"})
            if measure == "decode":
                ratio = f" ({got / dense:.2f}x)" if got and dense else ""
                line[f"b{batch} {mode}"] = f"{got:.2f}{ratio}" if got else "-"
            else:
                line[f"p{prompt} ms"] = f"{got:.0f}" if got else "-"
        seconds = value_of(rows, model=model, method=method, measure="compile")
        if any(mode != "eager" for _, mode, _, _ in ordered):
            line["compile s"] = f"{seconds:.0f}" if seconds else "-"
        result.append(line)
    return result


def size_table(rows: Sequence[dict]) -> list[dict]:
    result = []
    for model, layers, method in variants(rows):
        line = {"model": model, "layers": layers, "method": method}
        for heading, measure, form in SIZES:
            found = value_of(rows, model=model, method=method, measure=measure)
            line[heading] = "-" if found is None else format(found, form)
        versions = [row["note"] for row in matching(rows, model=model, method=method, measure="load")]
        result.append(line | {"version": versions[0] if versions else "-"})
    return result


def variants(rows: Sequence[dict]) -> list[tuple[str, str, str]]:
    """(model, layers, method) of everything that was loaded, in order."""
    loaded = matching(rows, measure="load")
    return list(dict.fromkeys((row["model"], row["layers"], row["method"]) for row in loaded))


def matching(rows: Iterable[dict], **place: Any) -> list[dict]:
    """Rows with these values; those of a CSV are text."""
    return [row for row in rows if all(str(row[name]) == str(wanted) for name, wanted in place.items())]


def value_of(rows: Iterable[dict], **place: Any) -> float | None:
    found = matching(rows, **place)
    return float(found[0]["value"]) if found else None


def plot(rows: Sequence[dict], path: Path) -> None:
    """PNG: a column a model; tokens/s of one sequence above, memory below, both against the share of zeros."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    decoded = [row for row in rows if row["measure"] == "decode"]
    if not any(PACKED in row["method"] for row in decoded):
        print("plot: expected the speed of a packed model, got none; nothing to draw.")
        return
    models = list(dict.fromkeys(row["model"] for row in decoded))
    least = min(float(row["sparsity"]) for row in decoded if row["sparsity"] != "" and PACKED in row["method"])
    batch = min(int(row["batch"]) for row in decoded)
    figure = Figure(figsize=(max(5.0, 3.0 * len(models)), 5.0), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(models), sharex=True, squeeze=False)
    for column, model in zip(grid.T, models, strict=True):
        mine = matching(rows, model=model)
        for mode, line in (("eager", "-"), ("compile", "--")):
            _draw(column[0], matching(mine, measure="decode", mode=mode, batch=batch), 1.0, line, mode)
        _draw(column[1], matching(mine, measure="resident"), 1e-3, "-", "eager")
        done, total = mine[0]["layers"].split(" of ")
        column[0].set_title(model if done == total else f"{model} ({done} of {total} layers)", fontsize=10)
        column[1].set_xlabel("zeros in the decoder's linear layers", fontsize=8.5)
    sequences = "one sequence" if batch == 1 else f"{batch} sequences"
    grid[0][0].set_ylabel(f"new tokens/s, {sequences}", fontsize=8.5)
    grid[1][0].set_ylabel("memory of the process, GB", fontsize=8.5)
    entries: dict[str, Any] = {}
    for axes in grid.flat:
        handles, names = axes.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
        axes.set_ylim(bottom=0, top=1.08 * axes.get_ylim()[1])
        axes.set_xlim(least - 0.04, 0.54)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.tick_params(labelsize=8.5)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save_figure(figure, path)


def _draw(axes: Any, rows: Sequence[dict], scale: float, line: str, mode: str) -> None:
    """Packed variants as a curve, everything else as a horizontal line, as it has no zeros to speak of."""
    suffix = ", torch.compile" if mode == "compile" else ""
    points = sorted((float(row["sparsity"]), scale * float(row["value"])) for row in rows if PACKED in row["method"])
    if points:
        face = "white" if suffix else INK[PACKED]
        style = {"color": INK[PACKED], "linestyle": line, "marker": "o", "markersize": 4.5, "markerfacecolor": face}
        axes.plot(*zip(*points, strict=True), label=f"packed (PATCH){suffix}", linewidth=2, zorder=3, **style)
        dense = matching(rows, method=DENSE)
        if dense and not suffix:
            _write_ratio(axes, points[-1][0], points[-1][1] / (scale * float(dense[0]["value"])))
    for row in rows:
        method = row["method"]
        if PACKED not in method:
            label = f"dense, {'transformers' if method == DENSE else method}{suffix}"
            color = INK.get(method, "#7f7f7f")
            axes.axhline(scale * float(row["value"]), color=color, linestyle=line, linewidth=1.4, label=label)


def _write_ratio(axes: Any, sparsity: float, ratio: float) -> None:
    """The last point over dense in transformers, in the corner that is free because the axis begins at zero."""
    place: dict[str, Any] = {"xycoords": "axes fraction", "ha": "right", "weight": "bold", "zorder": 4}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    text = f"at {sparsity:.0%} zeros {ratio:.2f}x dense"
    axes.annotate(text, (0.98, 0.07), fontsize=8.5, color=INK[PACKED], bbox=box, **place)
