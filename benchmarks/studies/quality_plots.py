"""Plots of the quality study: perplexity against zeros, and against what zeros are for, bytes and decode time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies import decode_times
from benchmarks.studies.decode_times import DecodeTimes
from patch.evaluate import plots

UNSTRUCTURED = " unstructured"
PERPLEXITY_LABEL = "held-out perplexity (lower is better)"


def plot_zeros(
    path: Path, summary: Sequence[Mapping[str, Any]], columns: Sequence[str], headings: Mapping[str, str]
) -> None:
    """PNG with a panel per perplexity column that has a result beside the dense one: perplexity against zeros."""
    panels = [name for name in columns if name != "masks_alone"]
    # Each with its own scale: compensated, masks are so near to each other that one scale would hide it.
    figure, all_axes = _figure(len(panels), sharey=False)
    groups = _groups(summary)
    for axes, name in zip(all_axes, panels, strict=True):
        _dense_line(axes, summary)
        _draw(axes, groups, name, lambda row: row["sparsity"])
        axes.set_title("as the method leaves the weights" if name == "perplexity" else headings[name], fontsize=11)
        axes.set_xlabel("zeros in the pruned layers")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _finish(figure, all_axes, path)


def plot_frontier(
    path: Path,
    summary: Sequence[Mapping[str, Any]],
    column: str,
    headings: Mapping[str, str],
    times: DecodeTimes,
) -> None:
    """PNG of two panels: perplexity against bytes of the linear layers, and against the time of one token.

    column  which perplexity; rows without it are left out
    times   unstructured masks take the time of a dense layer, and its bytes
    """
    figure, all_axes = _figure(2, sharey=True)
    groups = _groups(summary)

    def decode_ms(row: Mapping[str, Any]) -> float:
        is_packed = not row["group"].endswith(UNSTRUCTURED)
        return times.packed_ms(row["sparsity"]) if is_packed else times.dense_ms

    for axes, place in zip(all_axes, (lambda row: row["bytes_of_dense"], decode_ms), strict=True):
        _dense_line(axes, summary)
        _draw(axes, groups, column, place)
    shown = "as the method leaves the weights" if column == "perplexity" else headings[column]
    all_axes[0].set_title(f"bytes ({shown})", fontsize=11)
    all_axes[0].set_xlabel("bytes of the pruned layers, packed in bf16, of dense bf16")
    all_axes[0].xaxis.set_major_formatter(lambda value, _: f"{value:.2f}x")
    for ms, label in ((times.dense_ms, "dense, fastest"), (times.torch_ms, "dense, F.linear")):
        all_axes[1].axvline(ms, color="grey", linewidth=1, linestyle=":")
        place = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right", "va": "top", "fontsize": 8}
        all_axes[1].annotate(label, (ms, 0.98), color="grey", **place)
    all_axes[1].set_title("decode time with the same zeros", fontsize=11)
    all_axes[1].set_xlabel(
        f"ms a token through the MLP of a block of {decode_times.MODEL}, not of this model\n(bf16, {times.where})"
    )
    _finish(figure, all_axes, path)


def _figure(panels: int, *, sharey: bool) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * panels + 2.6, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, sharey=sharey, squeeze=False)[0]


def _groups(summary: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in summary:
        if row["group"] not in ("dense", "ablation"):
            groups.setdefault(row["group"], []).append(row)
    return groups


def _dense_line(axes: Any, summary: Sequence[Mapping[str, Any]]) -> None:
    dense = next((row["perplexity"] for row in summary if row["group"] == "dense"), None)
    if dense is not None:
        axes.axhline(dense, color="black", linewidth=1.2, linestyle=":", label=f"dense: {dense:.2f}")


def _draw(
    axes: Any,
    groups: Mapping[str, Sequence[Mapping[str, Any]]],
    column: str,
    place: Callable[[Mapping[str, Any]], float],
) -> None:
    """A curve a group; place says where a row is on the x axis."""
    for group, style in zip(groups, _styles(groups), strict=True):
        found = [(place(row), row[column], row[f"{column}_spread"] or 0) for row in groups[group] if row[column] != ""]
        if found:
            x, y, spread = zip(*sorted(found), strict=True)
            axes.errorbar(x, y, yerr=spread, label=group, capsize=2.5, **style)
    axes.grid(alpha=0.25)


def _finish(figure: Any, all_axes: Any, path: Path) -> None:
    all_axes[0].set_ylabel(PERPLEXITY_LABEL)
    entries: dict[str, Any] = {}
    for axes in all_axes:
        handles, names = axes.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside right center", frameon=False, fontsize=9, ncols=1)
    plots.save_figure(figure, path)


def _styles(groups: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Solid for what has a packed format, dashed for unstructured; one colour per method."""
    from matplotlib import colormaps

    colors: dict[str, Any] = {}
    palette = colormaps["tab10"].colors
    styles = []
    for number, group in enumerate(groups):
        method = group.removesuffix(" 2:4").removesuffix(UNSTRUCTURED).removesuffix(" tiles")
        color = colors.setdefault(method, palette[len(colors) % len(palette)])
        loose = group.endswith(UNSTRUCTURED)
        hybrid = group.endswith(" tiles") or group.startswith("PATCH")
        styles.append(
            {
                "color": color,
                "linestyle": "--" if loose else "-",
                "linewidth": 1.2 if loose else 1.8,
                "marker": "o" if hybrid else "x" if loose else "sD^v<>"[number % 6],
                "markersize": 5,
            }
        )
    return styles
