"""Tables, CSV and plots."""

from __future__ import annotations

import csv
import struct

import numpy as np
import pytest

from patch.evaluate import plots, tables

ROWS = [
    {"method": "dense", "perplexity": "20.10", "bytes": "1,024"},
    {"method": "PATCH 45%", "perplexity": "9.05", "bytes": "640"},
]


def test_plain_table_aligns_texts_left_and_numbers_right():
    assert tables.format_table(ROWS).splitlines() == [
        "method     perplexity  bytes",
        "---------  ----------  -----",
        "dense           20.10  1,024",
        "PATCH 45%        9.05    640",
    ]


def test_markdown_table():
    assert tables.format_table(ROWS, markdown=True).splitlines()[:3] == [
        "| method    | perplexity | bytes |",
        "| --------- | ---------: | ----: |",
        "| dense     |      20.10 | 1,024 |",
    ]


def test_csv_round_trips(tmp_path):
    tables.write_csv(tmp_path / "r.csv", [{"a": "x, y", "b": 1.5}, {"a": 'q"', "b": 2}])
    with open(tmp_path / "r.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "x, y", "b": "1.5"}, {"a": 'q"', "b": "2"}]


@pytest.mark.parametrize("rows", [[], [{"a": 1}, {"b": 1}]])
def test_rows_without_common_columns_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match="rows: expected"):
        tables.format_table(rows)
    with pytest.raises(ValueError, match="rows: expected"):
        tables.write_csv(tmp_path / "r.csv", rows)


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_perplexity_plot(tmp_path):
    curves = {"PATCH": [(0.45, 12.0), (0.25, 11.0)], "MaskLLM": [(0.5, 13.0)]}
    plots.plot_perplexity(tmp_path / "p.png", curves, dense=10.0, title="t")
    width, height = png_size(tmp_path / "p.png")
    assert width > height > 300
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


LABELS = ["dense", "Wanda 2:4", "PATCH 25%", "PATCH 35%", "PATCH 45%", "packed"]
PANELS = {
    "wikitext2: perplexity (lower is better)": [12.08, 25.3, 13.47, 13.84, 14.57, 14.58],
    "c4: perplexity (lower is better)": [16.1, 300.4, 18.2, None, 20.3, 20.3],
    "zero-shot: mean accuracy, % (higher is better)": [46.0, 33.47, 42.39, 41.2, 40.27, 40.2],
}


def test_models_by_name(tmp_path):
    plots.plot_models(tmp_path / "n.png", LABELS, PANELS)
    width, height = png_size(tmp_path / "n.png")
    assert width > 1500 and height > 350
    # Four panels take two rows.
    plots.plot_models(tmp_path / "m.png", LABELS, PANELS | {"ptb": PANELS[next(iter(PANELS))]})
    assert png_size(tmp_path / "m.png")[1] > 1.8 * height
    plots.plot_models(tmp_path / "one.png", ["dense"], {"ptb": [None]})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.png", "n.png", "one.png"]


def test_models_by_sparsity(tmp_path):
    sparsities = [0.0, 0.5, 0.25, 0.35, 0.45, None]
    series = ["dense", "Wanda", "PATCH", "PATCH", "PATCH", "packed"]
    plots.plot_models(tmp_path / "s.png", LABELS, PANELS, sparsities=sparsities, series=series)
    width, height = png_size(tmp_path / "s.png")
    assert width > height > 350


def test_drawn_values_are_those_given():
    """What the axes hold, read back from matplotlib."""
    _, axes = plots._figure(4, 3)
    plots._draw_by_sparsity(
        axes,
        LABELS,
        PANELS["c4: perplexity (lower is better)"],
        [0, 0.5, 0.25, 0.35, 0.45, None],
        ["dense", "Wanda", "PATCH", "PATCH", "PATCH", "packed"],
    )
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert drawn["PATCH"] == [(0.25, 18.2), (0.45, 20.3)]
    assert (drawn["Wanda"], drawn["dense"], drawn["packed"]) == ([(0.5, 300.4)], [(0, 16.1)], [(0.6, 20.3)])
    styles = {line.get_label(): (line.get_linestyle(), line.get_marker()) for line in axes.lines}
    assert styles["PATCH"][0] == "-"
    for single in ("Wanda", "dense", "packed"):
        assert styles[single][0] == "None" and styles[single][1] not in ("", "None")
    ticks = dict(zip((t.get_text() for t in axes.get_xticklabels()), axes.get_xticks(), strict=True))
    assert ticks["50%"] == pytest.approx(0.5) and ticks["not\nknown"] == pytest.approx(0.6)
    assert axes.get_yscale() == "log"
    _, axes = plots._figure(4, 3)
    plots._draw_by_name(axes, LABELS, PANELS["wikitext2: perplexity (lower is better)"])
    assert axes.collections[0].get_offsets().tolist()[1] == [25.3, 1.0]
    assert [text.get_text() for text in axes.texts][2] == "13.47"
    assert axes.get_xscale() == "linear"


def axes_of(monkeypatch, draw) -> list:
    """The visible axes of what would have been written."""
    figures: list = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    draw()
    return [axes for figure in figures for axes in figure.axes if axes.get_visible()]


def test_every_axis_is_labelled(monkeypatch):
    grids = {"model.layers.0.mlp.up_proj": np.eye(3, 2).astype(bool)}
    by_sparsity = {"sparsities": [0.0, 0.5, 0.25, 0.35, 0.45, None], "series": LABELS}
    drawn = axes_of(monkeypatch, lambda: plots.plot_models("p", LABELS, PANELS))
    assert [axes.get_title() for axes in drawn] == ["wikitext2", "c4", "zero-shot"]
    assert [axes.get_xlabel() for axes in drawn] == [name.split(": ")[1] for name in PANELS]
    assert {axes.get_ylabel() for axes in drawn} == {"model"}
    drawn = axes_of(monkeypatch, lambda: plots.plot_models("p", LABELS, PANELS, **by_sparsity))
    assert [axes.get_ylabel() for axes in drawn] == [name.split(": ")[1] for name in PANELS]
    assert {axes.get_xlabel() for axes in drawn} == {"zeros in the pruned layers"}
    drawn = axes_of(monkeypatch, lambda: plots.plot_perplexity("p", {"Wanda": [(0.5, 900.0)]}, dense=10.0))
    drawn += axes_of(monkeypatch, lambda: plots.plot_tile_maps("p", {"one": grids, "two": grids}))
    assert len(drawn) == 3 and all(axes.get_xlabel() and axes.get_ylabel() for axes in drawn)
    assert drawn[0].get_yscale() == "log"
    assert [line.get_linestyle() for line in drawn[0].lines if line.get_label() in ("dense", "Wanda")] == ["None"] * 2


@pytest.mark.parametrize(("labels", "panels"), [([], {"a": []}), (["dense"], {})])
def test_nothing_to_plot_is_refused(tmp_path, labels, panels):
    with pytest.raises(ValueError, match="panels: expected at least one measure of one model"):
        plots.plot_models(tmp_path / "p.png", labels, panels)


def test_tile_map(tmp_path):
    grids = {
        "model.layers.0.self_attn.q_proj": np.ones((2, 2), bool),
        "model.layers.0.mlp.up_proj": np.zeros((3, 2), bool),
        "model.layers.1.mlp.up_proj": np.eye(3, 2).astype(bool),
    }
    plots.plot_tile_maps(tmp_path / "t.png", {"one": grids, "two": grids})
    assert min(png_size(tmp_path / "t.png")) > 200
    with pytest.raises(ValueError, match="maps: expected at least one panel"):
        plots.plot_tile_maps(tmp_path / "t.png", {"one": {}})


def test_layout_puts_blocks_downwards_and_kinds_to_the_right():
    grids = {
        "model.layers.0.q_proj": np.array([[True, False]]),
        "model.layers.0.up_proj": np.array([[True], [True]]),
        "model.layers.1.up_proj": np.array([[False], [True]]),
    }
    canvas, x_ticks, y_ticks = plots._layout(grids)
    assert canvas.tolist() == [[2, 1, 0, 2], [0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]
    assert x_ticks == {"q": 1.0, "up": 3.5}
    assert y_ticks == {"block 0": 1.0, "block 1": 4.0}
