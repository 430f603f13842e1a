"""Plots of results as PNG; they need no display."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from patch.files.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

DENSE_COLOR, SPARSE_COLOR = "#1f4e79", "#f2b872"
_REFERENCE_COLOR = "black"
_COLORS = (_REFERENCE_COLOR, DENSE_COLOR, "#c44e1c", "#2a9d8f", "#7f7f7f", "#2ca02c", "#9467bd", "#8c564b", "#e377c2")
_MARKERS = "*osD^vPX"
_ZEROS = "zeros in the pruned layers"
_NOT_KNOWN = "not\nknown"


def plot_perplexity(
    path: str | os.PathLike,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    dense: float,
    title: str = "",
) -> None:
    """PNG of perplexity against sparsity.

    curves  {label: points of (sparsity 0..0.5, perplexity)}; a curve of one point is a marker
    dense   perplexity of the dense model, a marker at sparsity 0
    """
    figure, axes = _figure(8.0, 4.6)
    drawn = {"dense": [(0.0, dense)]} | {label: sorted(points) for label, points in curves.items()}
    for (label, points), marker, color in zip(drawn.items(), _endless(_MARKERS), _endless(_COLORS), strict=False):
        _draw_curve(axes, label, points, marker, color)
    _guide(axes, dense)
    _logarithmic_if_wide(axes, "y", [value for points in drawn.values() for _, value in points])
    axes.set_xlim(-0.04, 0.54)
    axes.set_xticks(np.arange(0, 0.51, 0.1), [f"{share:.0%}" for share in np.arange(0, 0.51, 0.1)])
    axes.margins(y=0.12)
    axes.set_xlabel(_ZEROS)
    axes.set_ylabel("held-out perplexity (lower is better)")
    axes.grid(alpha=0.25)
    axes.set_title(title, fontsize=11)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_models(
    path: str | os.PathLike,
    labels: Sequence[str],
    panels: Mapping[str, Sequence[float | None]],
    *,
    sparsities: Sequence[float | None] | None = None,
    series: Sequence[str] | None = None,
) -> None:
    """PNG with one panel per measure, the models by name, or by sparsity where `sparsities` is given.

    labels      one per model; the first is the reference, at whose value there is a dotted line
    panels      {"title: measure": value per model, None where it was not measured}; the measure labels its axis
    sparsities  zeros in the pruned layers, 0..0.5, per model; models with None stand apart, to the right
    series      per model, the curve it is a point of; needed with sparsities
    raises      ValueError when there is nothing to draw.
    """
    if not panels or not labels:
        raise ValueError("panels: expected at least one measure of one model, got none. Evaluate a model first.")
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    height = 3.9 if sparsities else 1.6 + 0.34 * len(labels)
    figure, axes = _figure(1.2 + 4.4 * columns, height * rows, columns=columns, rows=rows)
    cells = np.ravel(axes)
    for cell, (name, values) in zip(cells, panels.items(), strict=False):
        title, _, measure = name.rpartition(": ")
        if sparsities is None:
            _draw_by_name(cell, labels, values)
            cell.set_xlabel(measure, fontsize=9)
            cell.set_ylabel("model", fontsize=9)
        else:
            _draw_by_sparsity(cell, labels, values, sparsities, series or labels)
            cell.set_xlabel(_ZEROS, fontsize=9)
            cell.set_ylabel(measure, fontsize=9)
        cell.set_title(title, fontsize=10)
    for cell in cells[len(panels) :]:
        cell.set_visible(False)
    if sparsities is not None:
        _shared_legend(figure, cells[: len(panels)])
    save_figure(figure, path)


def plot_tile_maps(
    path: str | os.PathLike,
    maps: Mapping[str, Mapping[str, Any]],
    *,
    title: str = "dense and 2:4 sparse tiles",
) -> None:
    """PNG with one panel per model: the tile grid of every layer, blocks downwards, kinds of layer to the right.

    maps    {panel label: {layer name: (rows, cols) bool grid, True where sparse}}
    raises  ValueError when there is nothing to draw.
    """
    if not maps or not all(maps.values()):
        raise ValueError("maps: expected at least one panel with layers, got none. Pass tile_is_sparse of a result.")
    layouts = {label: _layout(grids) for label, grids in maps.items()}
    rows, cols = (max(layout[0].shape[axis] for layout in layouts.values()) for axis in (0, 1))
    cell = min(0.16, 40.0 / max(cols, rows))
    width, height = max(4.2, cols * cell) * len(maps) + 0.8, max(2.4, rows * cell) + 1.7
    figure, panels = _figure(min(width, 40), min(height, 40), columns=len(maps))
    for axes, (label, (canvas, x_ticks, y_ticks)) in zip(np.ravel(panels), layouts.items(), strict=True):
        # White lines between tiles, as long as the tiles are large enough to see them.
        line_width = 0.8 if cell > 0.08 else 0.0
        axes.pcolormesh(canvas, cmap=_tile_colors(), vmin=0, vmax=2, edgecolors="white", linewidth=line_width)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_xticks(list(x_ticks.values()), list(x_ticks), fontsize=8)
        axes.set_yticks(list(y_ticks.values()), list(y_ticks), fontsize=8)
        axes.tick_params(length=0)
        axes.set_xlabel("layer (columns of tiles: inputs)", fontsize=9)
        axes.set_ylabel("block (rows of tiles: outputs)", fontsize=9)
        axes.set_title(label, fontsize=10)
        for spine in axes.spines.values():
            spine.set_visible(False)
    _tile_legend(figure)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _draw_by_name(axes: Axes, labels: Sequence[str], values: Sequence[float | None]) -> None:
    """One dot a model, the first on top. Dots, not bars: the axis need not start at zero."""
    rows = range(len(labels))
    known = [(row, value) for row, value in zip(rows, values, strict=True) if value is not None]
    if values[0] is not None:
        axes.axvline(values[0], color=_REFERENCE_COLOR, linewidth=1.0, linestyle=":", alpha=0.5)
    if known:
        axes.scatter([value for _, value in known], [row for row, _ in known], color=DENSE_COLOR, zorder=3)
        _logarithmic_if_wide(axes, "x", [value for _, value in known])
    for row, value in known:
        _write_value(axes, value, (value, row))
    axes.set_yticks(list(rows), list(labels), fontsize=9)
    axes.set_ylim(len(labels) - 0.5, -0.7)
    axes.margins(x=0.15)
    axes.grid(alpha=0.25)


def _draw_by_sparsity(
    axes: Axes,
    labels: Sequence[str],
    values: Sequence[float | None],
    sparsities: Sequence[float | None],
    series: Sequence[str],
) -> None:
    """One curve a series, markers where it is one model; models of unknown sparsity at a tick of their own."""
    shown = [sparsity for sparsity in sparsities if sparsity is not None]
    low, high = min(shown), max(shown)
    apart = high + max(0.05, 0.2 * (high - low))
    curves: dict[str, list[tuple[float, float]]] = {}
    names = [labels[0], *series[1:]]
    for name, value, sparsity in zip(names, values, sparsities, strict=True):
        if value is not None:
            curves.setdefault(name, []).append((apart if sparsity is None else sparsity, value))
    styles = dict(zip(dict.fromkeys(names), zip(_endless(_MARKERS), _endless(_COLORS), strict=False), strict=False))
    for name, points in curves.items():
        _draw_curve(axes, name, sorted(points), *styles[name])
    if values[0] is not None:
        _guide(axes, values[0])
    _logarithmic_if_wide(axes, "y", [value for value in values if value is not None])
    _mark_shares(axes, low, high, None if len(shown) == len(sparsities) else apart)
    axes.margins(y=0.15)
    axes.grid(alpha=0.25)


def _mark_shares(axes: Axes, low: float, high: float, apart: float | None) -> None:
    """Ticks in percent, and one for what stands apart."""
    from matplotlib.ticker import MaxNLocator

    ticks = [share for share in MaxNLocator(6).tick_values(low, high) if low - 0.01 <= share <= high + 0.01]
    texts = [f"{share:.0%}" if abs(100 * share - round(100 * share)) < 1e-6 else f"{share:.1%}" for share in ticks]
    if apart is not None:
        ticks, texts = [*ticks, apart], [*texts, _NOT_KNOWN]
        axes.axvline((high + apart) / 2, color="0.8", linewidth=0.8)
    axes.set_xlim(low - 0.04, (high if apart is None else apart) + 0.04)
    axes.set_xticks(ticks, texts)


def _draw_curve(axes: Axes, label: str, points: Sequence[tuple[float, float]], marker: str, color: str) -> None:
    """Points with their values, joined where there are several."""
    line = "-" if len(points) > 1 else "none"
    axes.plot(
        *zip(*points, strict=True),
        marker=marker,
        markersize=7,
        color=color,
        linestyle=line,
        linewidth=1.8,
        label=label,
        zorder=3,
    )
    for point in points:
        _write_value(axes, point[1], point)


def _guide(axes: Axes, value: float) -> None:
    """A faint line at the reference's value, which has a marker of its own."""
    axes.axhline(value, color=_REFERENCE_COLOR, linewidth=1.0, linestyle=":", alpha=0.5)


def _write_value(axes: Axes, value: float, point: tuple[float, float]) -> None:
    """The number above its mark, on white so that lines across stay off it."""
    box: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    place: dict[str, Any] = {"textcoords": "offset points", "xytext": (0, 7), "ha": "center"}
    axes.annotate(f"{value:.2f}", point, fontsize=8, bbox=box, zorder=4, **place)


def _logarithmic_if_wide(axes: Axes, axis: str, values: Sequence[float]) -> None:
    """A broken model's perplexity must not press all others into one spot."""
    if min(values, default=0) > 0 and max(values) > 10 * min(values):
        from matplotlib.ticker import LogLocator, NullFormatter

        getattr(axes, f"set_{axis}scale")("log")
        ticks = getattr(axes, f"{axis}axis")
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter(lambda value, _: f"{value:g}")
        ticks.set_minor_formatter(NullFormatter())


def _shared_legend(figure: Figure, cells: Iterable[Axes]) -> None:
    entries: dict[str, Any] = {}
    for cell in cells:
        handles, names = cell.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside right center", frameon=False, fontsize=9)


def _layout(grids: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, float], dict[str, float]]:
    """One canvas of all grids (0 empty, 1 dense, 2 sparse) and the tick positions of kinds and blocks."""
    arrays = {name: np.asarray(grid, dtype=bool) for name, grid in grids.items()}
    places = {name: _place(name) for name in arrays}
    blocks = sorted({block for block, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    heights = {b: max(a.shape[0] for n, a in arrays.items() if places[n][0] == b) for b in blocks}
    widths = {k: max(a.shape[1] for n, a in arrays.items() if places[n][1] == k) for k in kinds}
    tops, lefts = _offsets(heights), _offsets(widths)
    canvas = np.zeros((sum(heights.values()) + len(blocks) - 1, sum(widths.values()) + len(kinds) - 1), dtype=int)
    for name, array in arrays.items():
        block, kind = places[name]
        top, left = tops[block], lefts[kind]
        canvas[top : top + array.shape[0], left : left + array.shape[1]] = np.where(array, 2, 1)
    x_ticks = {kind: lefts[kind] + widths[kind] / 2 for kind in kinds}
    y_ticks = {f"block {block}" if block >= 0 else "": tops[block] + heights[block] / 2 for block in blocks}
    return canvas, x_ticks, y_ticks


def _place(name: str) -> tuple[int, str]:
    """(block number or -1, kind of layer) of a module path such as model.layers.3.mlp.up_proj."""
    parts = name.split(".")
    numbers = [int(part) for part in parts if part.isdigit()]
    return (numbers[0] if numbers else -1), parts[-1].removesuffix("_proj")


def _offsets(sizes: Mapping[Any, int]) -> dict[Any, int]:
    """Start of each part when they are laid side by side with one cell between."""
    offsets, position = {}, 0
    for key, size in sizes.items():
        offsets[key] = position
        position += size + 1
    return offsets


def _figure(width: float, height: float, *, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    # The object interface with the Agg canvas: no pyplot state, no display, safe beside a user's own plots.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _tile_colors() -> ListedColormap:
    from matplotlib.colors import ListedColormap

    return ListedColormap(["white", DENSE_COLOR, SPARSE_COLOR])


def _tile_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(color=DENSE_COLOR, label="dense tile"),
        Patch(color=SPARSE_COLOR, label="2:4 sparse tile"),
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a matplotlib figure as PNG, atomically."""
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _endless(values: Sequence[str]) -> Iterator[str]:
    while True:
        yield from values
