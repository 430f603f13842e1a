"""The quality study in a miniature: its cells, what is run again, and what table, CSV and plot say."""

from __future__ import annotations

import csv
import re
import shutil
import statistics

import pytest
import torch
from support.models import build_byte_tokenizer, build_tiny_model

from benchmarks import harness
from benchmarks.studies import decode_times, quality, quality_cells, quality_inputs, quality_report
from benchmarks.studies.quality_study import Settings, measured_cost
from patch.artifacts.artifact import load_artifact
from patch.data.tokens import tokenize
from patch.demo import corpus as corpus_module
from patch.demo.model import build_model
from patch.demo.settings import DemoSettings
from patch.evaluate.cross_entropy import perplexity
from patch.models.keep_masks import measured_sparsity
from patch.models.structure import maskable_linears
from patch.packed.load import load
from patch.pruning import METHODS
from patch.settings import load_config
from patch_kernels import tiles_that_are_two_of_four

ONE_SHOT = ["magnitude", "wanda", "sparsegpt", "thanos", "prox_sparse"]
TILES = [f"{name}-tiles-35" for name, row in METHODS.items() if "tiles" in row.patterns]
LOOSE = [f"{name}-35" for name, row in METHODS.items() if "unstructured" in row.patterns]
LEARNED = ["maskllm", "joint-35", "joint-35-fisher", "tile-35"]
CELLS = ["dense", *ONE_SHOT, *TILES, *LOOSE, *LEARNED]
TWICE = ["dense", "wanda", "sparsegpt-tiles-35", "wanda-35"]  # with a second seed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folder with a tiny model and two texts."""
    folder = tmp_path_factory.mktemp("quality-inputs")
    build_tiny_model(
        "llama",
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    ).save_pretrained(folder / "model")
    build_byte_tokenizer().save_pretrained(folder / "model")
    lines = [f"Line {i}: the {'quick' if i % 3 else 'slow'} fox {i * i} jumps." for i in range(400)]
    (folder / "train.txt").write_text("\n".join(lines[:300]))
    (folder / "held.txt").write_text("\n".join(lines[300:]))
    return folder


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing takes longer than the rest of a small study; the shared one below is made before this."""
    for name in ("plot_zeros", "plot_frontier"):
        monkeypatch.setattr(quality_report.quality_plots, name, lambda *arguments: None)


def arguments(inputs, out, *extra):
    flags = {
        "--model": inputs / "model",
        "--train": inputs / "train.txt",
        "--heldout": inputs / "held.txt",
        "--out": out,
        "--window": 32,
        "--heldout-windows": 4,
        "--nsamples": 4,
        "--reconstruction-samples": 8,
        "--block-epochs": 1,
        "--steps": 2,
        "--batch-size": 2,
        "--prox-steps": 2,
        "--tile": 32,
        "--targets": 0.35,
        "--seeds": "0",
    }
    return [str(part) for pair in flags.items() for part in pair] + [str(part) for part in extra]


def made_cells(capsys, what="running"):
    """(cell, seed) of the cells that the last call made; what="compensating (blocks)": that it compensated."""
    lines = [line.split("] ")[1] for line in capsys.readouterr().out.splitlines() if line.endswith(f": {what}")]
    return [tuple(line.removesuffix(f": {what}").split(", seed ")) for line in lines]


def without_costs(rows):
    """Rows without seconds and memory, which differ between runs."""
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "peak_mb"))} for row in rows]


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory):
    """(folder, rows) of a finished study: every cell, and some with a second seed."""
    out = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quality.quality_report, "write", lambda *arguments: None)
        quality.main(arguments(inputs, out))
        quality.main(arguments(inputs, out, "--seeds", "1", "--cells", ",".join(TWICE)))
    return out, quality.main(arguments(inputs, out, "--seeds", "0,1", "--finished-only"))


def test_every_method_has_a_cell_per_seed(done):
    _, rows = done
    made = [(name, 0) for name in CELLS] + [(name, 1) for name in TWICE]
    assert [(row["cell"], row["seed"]) for row in rows] == made
    for row in (row for row in rows if row["cell"] != "dense"):
        assert row["masks_alone"] > 1 and row["compensated_least_squares"] > 1 and row["compensated_blocks"] > 1, row
        method = row["cell"].split("-")[0]
        assert (row["perplexity"] == row["masks_alone"]) == (method not in ("sparsegpt", "thanos")), row


def test_masks_have_the_pattern_and_share_of_their_name(done):
    out, rows = done
    for name in CELLS[1:]:
        masks = load_artifact(out / "cells" / f"{name}-seed0").masks
        row = next(row for row in rows if row["cell"] == name and row["seed"] == 0)
        assert row["sparsity"] == measured_sparsity(masks)
        kept_of_four = [keep.reshape(-1, 4).sum(1) for keep in masks.values()]
        if name in (*ONE_SHOT, "maskllm"):
            assert all((kept == 2).all() for kept in kept_of_four), name
            assert row["linear_bytes"] < 0.6 * row["dense_linear_bytes"]
        elif name in (*TILES, *LEARNED):
            tiles = [keep.reshape(keep.shape[0] // 32, 32, -1, 32).sum((1, 3)) for keep in masks.values()]
            assert all(((kept == 1024) | (kept == 512)).all() for kept in tiles), name
            # One tile of 112 holds 0.45 % of the zeros.
            assert row["sparsity"] == pytest.approx(0.35, abs=0.0045), name
        else:
            assert row["sparsity"] == pytest.approx(0.35, abs=0.01), name
            assert row["linear_bytes"] >= row["dense_linear_bytes"]


def test_dense_and_tile_start_from_what_they_should(done, inputs):
    out, rows = done
    ids = torch.tensor(tokenize(build_byte_tokenizer(), [(inputs / "held.txt").read_text()])[0])
    assert rows[0]["perplexity"] == perplexity(load(inputs / "model", dtype=torch.float32).eval(), ids[:128], 32)
    fixed, tile = (load_artifact(out / "cells" / f"{name}-seed0") for name in ("maskllm", "tile-35"))
    for name, keep in tile.masks.items():
        sparse = tile.tile_is_sparse[name].repeat_interleave(32, 0).repeat_interleave(32, 1)
        assert torch.equal(keep, fixed.masks[name] | ~sparse)


@pytest.fixture
def copied(done, tmp_path):
    """A copy of the finished study, to change."""
    return shutil.copytree(done[0], tmp_path / "copy", symlinks=True)


def test_a_finished_cell_is_not_run_again_and_a_damaged_one_is(done, copied, inputs, capsys):
    out, rows = copied, done[1]
    assert quality.main(arguments(inputs, out)) == rows[: len(CELLS)]
    assert made_cells(capsys) == []
    (out / "cells" / "wanda-seed0" / "masks.safetensors").write_bytes(b"damaged")
    again = quality.main(arguments(inputs, out, "--cells", "wanda,joint-35"))
    # joint-35 does not need wanda.
    assert made_cells(capsys) == [("wanda", "0")]
    expected = [row for row in rows if row["cell"] in ("wanda", "joint-35") and row["seed"] == 0]
    assert without_costs(again) == without_costs(expected)


def test_a_compensation_is_added_without_pruning_again(copied, inputs, capsys):
    wanted = ("--cells", "dense,wanda")
    quality.main(arguments(inputs, copied, *wanted, "--compensations", "least_squares,sparsegpt,blocks"))
    output = capsys.readouterr().out
    assert "running" not in output
    assert [line.split("] ")[1] for line in output.splitlines() if "compensating" in line] == [
        "wanda, seed 0: compensating (sparsegpt)"
    ]
    quality.main(arguments(inputs, copied, *wanted, "--block-epochs", "2"))
    assert made_cells(capsys, "compensating (blocks)") == [("wanda", "0")]


def test_a_changed_setting_runs_what_depends_on_it(copied, inputs, capsys):
    quality.main(arguments(inputs, copied, "--compensations", "", "--steps", "3"))
    assert made_cells(capsys) == [(name, "0") for name in LEARNED]


def test_what_is_there_so_far_can_be_written_without_running_anything(copied, inputs, tmp_path, capsys):
    shutil.rmtree(copied / "cells" / "wanda-seed1")
    shutil.rmtree(copied / "compensated" / "wanda-35-seed0-blocks")
    capsys.readouterr()
    rows = quality.main(arguments(inputs, copied, "--seeds", "0,1", "--finished-only"))
    assert made_cells(capsys) == []
    expected = [(name, 0) for name in CELLS] + [(name, 1) for name in TWICE if name != "wanda"]
    assert [(row["cell"], row["seed"]) for row in rows] == expected
    assert [(r["cell"], r["seed"]) for r in rows[1:] if r["sparsity"] and "compensated_blocks" not in r] == [
        ("wanda-35", 0)
    ]
    with (copied / "quality.csv").open() as file:
        seeds = {line["cell"]: int(line["seeds"]) for line in csv.DictReader(file)}
    assert seeds == {name: 2 if name in TWICE and name != "wanda" else 1 for name in CELLS}
    with pytest.raises(SystemExit, match=r"expected finished cells in .* found none"):
        quality.main(arguments(inputs, tmp_path / "none", "--finished-only"))


def test_rows_of_an_earlier_run_fill_what_is_not_there(done, inputs, tmp_path):
    out, rows = done
    wanted = ("--cells", "dense,magnitude")
    flags = (*wanted, "--earlier", out / "quality_cells.csv")
    both = quality.main(arguments(inputs, tmp_path, *flags))
    assert without_costs(both) == without_costs(rows[:2] + rows[2:])
    assert "* from an earlier run: " in (tmp_path / "quality.md").read_text()
    with pytest.raises(
        SystemExit, match=r"--earlier: expected a dense model of the perplexity \[\d+.* that was measured"
    ):
        quality.main(arguments(inputs, tmp_path, *flags, "--heldout-windows", "3"))


def test_a_cell_makes_what_it_needs_first_and_an_interrupt_loses_nothing(inputs, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    wanted = ("--cells", "tile-35")
    with monkeypatch.context() as patched:
        patched.setattr(quality_cells, "learn", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quality.main(arguments(inputs, tmp_path, *wanted))
    assert made_cells(capsys) == [("sparsegpt", "0"), ("maskllm", "0")]
    (row,) = quality.main(arguments(inputs, tmp_path, *wanted))
    assert row["cell"] == "tile-35"
    assert made_cells(capsys) == [("maskllm", "0"), ("sparsegpt-35", "0"), ("tile-35", "0")]


def test_ablations_change_one_setting_each(inputs, tmp_path, capsys):
    cells = quality.all_cells(Settings(window=32, tile=(32, 32), targets=(0.35,)), quality.ABLATIONS)
    base = cells["joint-35"].own["learn"]
    changed = {
        name: {key for key, value in cells[name].own["learn"].items() if value != base[key]}
        for name in cells
        if name.startswith("joint-35-")
    }
    assert changed == {
        "joint-35-fisher": {"tile_prior_budget"},
        "joint-35-fisher-distill": {"tile_prior_budget", "objective"},
        "joint-35-fisher-hard": {"tile_prior_budget", "hard_pattern", "hard_tile"},
        "joint-35-tile16": {"tile"},
        "joint-35-layer": {"layer_target"},
        "joint-35-prior-none": set(),
        "joint-35-prior-magnitude": set(),
        "joint-35-prior-wanda": set(),
    }
    base = cells["sparsegpt-tiles-35"].own["tiles"]
    assert {
        name: {key: value for key, value in cells[name].own["tiles"].items() if value != base[key]}
        for name in cells
        if name.startswith("sparsegpt-tiles-35-")
    } == {
        "sparsegpt-tiles-35-error": {"by": "error"},
        "sparsegpt-tiles-35-share": {"by": "share"},
        "sparsegpt-tiles-35-block": {"budget": "block"},
        "sparsegpt-tiles-35-layer": {"budget": "layer"},
    }
    assert cells["joint-35-prior-none"].needs == ()
    assert cells["joint-35-prior-wanda"].needs == ("wanda", "wanda-35")
    chosen = "sparsegpt-tiles-35-error,joint-35-tile16,joint-35-prior-none"
    extra = ("--ablations", "tiles,tile,prior", "--cells", chosen)
    assert [row["method"] for row in quality.main(arguments(inputs, tmp_path, *extra))] == [
        "SparseGPT tiles 35%, by error",
        "PATCH joint 35%, tile 16x16",
        "PATCH joint 35%, prior none",
    ]


def test_both_compensations_can_be_columns(inputs, tmp_path):
    extra = ("--cells", "sparsegpt", "--compensations", "least_squares,sparsegpt")
    (row,) = quality.main(arguments(inputs, tmp_path, *extra))
    # The sweep with SparseGPT's own mask is SparseGPT.
    assert row["compensated_sparsegpt"] == pytest.approx(row["perplexity"], rel=1e-6)
    assert re.search(r"\| least squares \| +sweep \|", (tmp_path / "quality.md").read_text())


def test_table_csv_and_plot_hold_means_and_spreads(done):
    out, rows = done
    with (out / "quality.csv").open() as file:
        summary = {line["cell"]: line for line in csv.DictReader(file)}
    with (out / "quality_cells.csv").open() as file:
        assert [(line["cell"], line["seed"]) for line in csv.DictReader(file)] == [
            (row["cell"], str(row["seed"])) for row in rows
        ]
    for name in ("quality.png", "quality_frontier.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert list(summary) == CELLS
    values = [row["compensated_least_squares"] for row in rows if row["cell"] == "wanda-35"]
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    assert float(summary["wanda-35"]["compensated_least_squares"]) == round(mean, 4)
    text = (out / "quality.md").read_text()
    assert "python -m benchmarks.studies.quality --model" in text
    assert f"{mean:.2f} +- {spread:.2f}" in next(line for line in text.splitlines() if line.startswith("| Wanda 35%"))


def test_summary_is_mean_and_sample_deviation():
    shared = {"cell": "a", "method": "A", "group": "A", "target": 0.5, "sparsity": 0.5, "tokens": 7}
    shared |= {"linear_bytes": 1, "dense_linear_bytes": 2}
    rows = [shared | {"seed": s, "seconds": s, "perplexity": p} for s, p in ((0, 10.0), (1, 11.0), (2, 15.0))]
    rows.append(shared | {"cell": "b", "seed": 0, "seconds": 4, "perplexity": 9.0, "masks_alone": 8.0})
    first, second = quality_report.summarize(rows)
    assert (first["perplexity"], first["perplexity_spread"], first["seeds"]) == (12.0, round(7**0.5, 4), 3)
    assert (first["masks_alone"], first["seconds"], first["bytes_of_dense"]) == ("", 1.0, 0.5)
    assert (first["tokens"], first["peak_mb"]) == (7, "")
    assert (second["perplexity"], second["perplexity_spread"], second["masks_alone"]) == (9.0, "", 8.0)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--cells", "wander"), "--cells: expected names or patterns of cells, got 'wander'. Known: dense, magnitude"),
        (("--ablations", "seed"), "expected one of tiles, learning, tile, layer, prior, got 'seed'"),
        (("--compensations", "adam"), "expected one of blocks, least_squares, sparsegpt, got 'adam'"),
        (("--targets", "45"), "quality: target_sparsity: expected a share of zeros from 0 to 0.5, got 45.0"),
        (("--heldout", "absent.txt"), "got 'absent.txt', which is no file"),
        (("--architecture", "qwen2"), "quality: expected --architecture without --model, got both. Leave one out."),
    ],
)
def test_bad_flags_are_refused(inputs, tmp_path, capsys, extra, message):
    with pytest.raises(SystemExit) as error:
        quality.main(arguments(inputs, tmp_path, *extra))
    assert message in str(error.value) + capsys.readouterr().err


def test_a_model_without_texts_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="expected --model, --train and --heldout together"):
        quality.main(["--model", "somewhere", "--out", str(tmp_path)])


def test_too_little_heldout_text_is_refused(inputs, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(SystemExit, match="quality: --heldout: expected at least one window of 32 tokens"):
        quality.main(arguments(inputs, tmp_path, "--heldout", tmp_path / "short.txt"))


def test_without_a_model_the_dense_model_of_the_demo_is_trained_once(tmp_path, monkeypatch, capsys):
    from support.demo import TINY, write_sources

    write_sources(tmp_path / "sources")
    corpus = corpus_module.load_corpus(tmp_path / "sources")
    monkeypatch.setattr(corpus_module, "load_corpus", lambda: corpus)
    monkeypatch.setattr(quality_inputs, "DemoSettings", lambda: load_config(DemoSettings, overrides=TINY))
    flags = ["--out", str(tmp_path / "out"), "--cells", "dense,magnitude", "--seeds", "0", "--window", "32"]
    flags += ["--nsamples", "2", "--heldout-windows", "2"]
    first = quality.main(flags)
    assert "step 4/4" in capsys.readouterr().out
    assert quality.main(flags) == first
    assert "step 4/4" not in capsys.readouterr().out


def test_tiles_that_the_edge_cuts_have_the_share_and_bytes_of_their_name(tmp_path, monkeypatch):
    from support.demo import TINY, write_sources

    write_sources(tmp_path / "sources")
    corpus = corpus_module.load_corpus(tmp_path / "sources")
    monkeypatch.setattr(corpus_module, "load_corpus", lambda: corpus)
    monkeypatch.setattr(quality_inputs, "DemoSettings", lambda: load_config(DemoSettings, overrides=TINY))
    flags = ["--architecture", "qwen2", "--out", str(tmp_path / "out"), "--cells", "wanda-tiles-35", "--seeds", "0"]
    flags += ["--window", "32", "--nsamples", "2", "--heldout-windows", "2", "--reconstruction-samples", "4"]
    (row,) = quality.main([*flags, "--block-epochs", "1"])
    masks = load_artifact(tmp_path / "out" / "cells" / "wanda-tiles-35-seed0").masks
    grids = {name: tiles_that_are_two_of_four(keep) for name, keep in masks.items()}
    # 4 layers of 2 x 2 tiles, two of 4 x 2 and one of 2 x 4; the smallest tile is 64 x 64 of 410,112 weights.
    assert sorted(grid.numel() for grid in grids.values()) == [4] * 4 + [8] * 3
    assert 0.35 <= row["sparsity"] < 0.35 + 128 * 128 / 2 / sum(keep.numel() for keep in masks.values())
    assert row["linear_bytes"] == sum(18432 * int(g.sum()) + 32768 * int((~g).sum()) for g in grids.values())
    assert row["masks_alone"] > 1 and row["compensated_blocks"] > 1


def test_the_other_architecture_has_biases_and_no_multiple_of_a_tile(monkeypatch):
    settings = quality_inputs.model_settings("qwen2")
    assert quality_inputs.model_settings("llama") == DemoSettings().model
    model = build_model(
        vocab_size=300,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        layers=1,
        heads=settings.heads,
        seed=0,
        architecture=settings.architecture,
    )
    assert {name.split(".")[-1]: tuple(linear.weight.shape) for name, linear in maskable_linears(model).items()} == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (192, 192)),
        **dict.fromkeys(("gate_proj", "up_proj"), (456, 192)),
        "down_proj": (192, 456),
    }
    assert [name for name, _ in model.named_parameters() if name.endswith("q_proj.bias")]


def write_times(path, rows):
    columns = ("shape", "tokens", "method", "sparsity", "median_ms", "device", "threads")
    lines = [",".join(columns), *(",".join(map(str, row)) + ",CPU,2" for row in rows)]
    path.write_text("\n".join(lines))
    return path


def test_decode_time_is_that_of_two_wide_layers_and_a_narrow_one(tmp_path):
    rows = []
    for method, zeros, wide, narrow in (
        ("tiles 0%", 0.0, 8, 4),
        ("tiles 50%", 0.5, 4, 2),
        ("F.linear", 0.0, 9, 5),
        ("read", "", 1, 1),
        ("llama.cpp", 0.0, 7, 5),
    ):
        rows += [("8192x2048", 1, method, zeros, wide), ("2048x8192", 1, method, zeros, narrow)]
        rows.append(("8192x2048", 8, method, zeros, 100))
    times = decode_times.read(write_times(tmp_path / "times.csv", rows))
    assert times == decode_times.DecodeTimes({0.0: 20.0, 0.5: 10.0}, 19.0, 23.0, "CPU, 2 threads")
    assert [times.packed_ms(zeros) for zeros in (0.0, 0.125, 0.5)] == [20.0, 17.5, 10.0]


def test_decode_times_of_other_layers_are_refused(tmp_path):
    path = write_times(tmp_path / "times.csv", [("64x64", 1, "tiles 0%", 0.0, 1)])
    with pytest.raises(SystemExit, match=r"--decode-csv: expected times of one token for 8192x2048 and 2048x8192"):
        decode_times.read(path)
    with pytest.raises(SystemExit, match=r"--decode-csv: expected a file that --csv wrote, got .*absent"):
        decode_times.read(tmp_path / "absent.csv")


def test_memory_is_the_growth_above_what_was_held():
    held = torch.ones(8 << 20)
    with measured_cost() as cost:
        more = torch.ones(4 << 20)
    # Pages, and what the interpreter itself takes.
    assert more.nbytes <= 1e6 * cost.peak_mb < more.nbytes + (1 << 20) < held.nbytes
    assert cost.columns("_blocks").keys() == {"seconds_blocks", "peak_mb_blocks"}


def test_memory_that_cannot_be_measured_is_left_out(monkeypatch):
    def refuse(field):
        raise OSError

    monkeypatch.setattr(harness, "_status_bytes", refuse)
    with measured_cost() as cost:
        pass
    assert cost.columns().keys() == {"seconds"}
