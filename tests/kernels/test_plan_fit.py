"""bench_plans --fit: the planner's constants come back from times that a model with other constants made."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.card.made_plans import OTHER_CARD, made_rows, save
from benchmarks.ops import bench_plans, plan_fit

host = pytest.importorskip("patch_kernels._host", reason="built without pybind11")


def test_constants_come_back(tmp_path):
    rows = made_rows(OTHER_CARD, sparsities=(0.5, 0.25, 0.0))
    times = plan_fit.read_times(save(tmp_path / "plans.csv", rows))
    found = plan_fit.fit(times)
    assert set(found.errors) == set(OTHER_CARD)
    assert set(found.untold) == {"sm80_macs_per_cycle", "sm80_sparse_share", "sm80_reduce_cycles"}
    assert found.constants == pytest.approx(host.model_constants() | OTHER_CARD, rel=0.01)
    assert np.abs(found.residuals).max() < 1e-3
    assert plan_fit.regrets(times, found.constants).max() == 1 < plan_fit.regrets(times, {}).max()


def test_constants_come_back_through_noise_and_outliers(tmp_path):
    """1.5 % of noise, one time in thirty threefold. The rates within 3 %, what only few times tell within 30 %."""
    rows = made_rows(OTHER_CARD, sparsities=(0.5, 0.25, 0.0), noise=0.015, outliers=0.03)
    found = plan_fit.fit(plan_fit.read_times(save(tmp_path / "plans.csv", rows)))
    for name in ("memory_bytes_per_cycle", "link_bytes_per_cycle", "macs_per_cycle", "cluster_bytes_per_cycle"):
        assert found.constants[name] == pytest.approx(OTHER_CARD[name], rel=0.03), name
    for name in found.errors:
        assert found.constants[name] == pytest.approx(OTHER_CARD[name], rel=0.3), name
        assert abs(math.log(found.constants[name] / OTHER_CARD[name])) < 4 * found.errors[name], name
    assert np.median(np.abs(found.residuals)) < 0.0125


def test_what_the_times_do_not_tell_is_left_alone(tmp_path):
    """Decode of dense layers without a split: no exchange, no change of type, and copies bound the time."""
    rows = made_rows(OTHER_CARD, sparsities=(0.0,), tokens=range(1, 17))
    times = plan_fit.read_times(save(tmp_path / "plans.csv", [row for row in rows if row["splits"] == 1]))
    found = plan_fit.fit(times)
    defaults = host.model_constants()
    for name in found.untold:
        assert found.constants[name] == defaults[name]
    assert {"switch_cycles", "exchange_turn_cycles", "cluster_bytes_per_cycle", "macs_per_cycle"} <= set(found.untold)
    assert found.constants["link_bytes_per_cycle"] == pytest.approx(21, rel=0.02)
    text = plan_fit.report(times, found)
    assert "not told by these times, left as they are: " in text and "switch_cycles" in text
    assert f"  double link_bytes_per_cycle = {found.constants['link_bytes_per_cycle']:.4g};" in text
    assert "double switch_cycles" not in text and "double cycles_per_us" not in text


def test_times_that_tell_nothing(tmp_path):
    rows = made_rows({}, sparsities=(0.45,), tokens=(16, 64, 1024), noise=5.0)
    with pytest.raises(ValueError, match="expected times that tell some constant, got none"):
        plan_fit.fit(plan_fit.read_times(save(tmp_path / "plans.csv", rows)))


def test_the_command_prints_constants(tmp_path, capsys, monkeypatch):
    rows = made_rows(OTHER_CARD, sparsities=(0.45, 0.0), tokens=(16, 64, 1024))
    monkeypatch.setattr("sys.argv", ["bench_plans", "--fit", str(save(tmp_path / "plans.csv", rows))])
    bench_plans.main()
    printed = capsys.readouterr().out
    assert printed.startswith(f"{len(rows)} times of 24 calls on a model, not a card\n")
    assert "  double link_bytes_per_cycle = 21" in printed


def changed(column, value, every=1):
    def change(rows):
        return [row | {column: value} if i % every == 0 else row for i, row in enumerate(rows)]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:40], r"expected 50 times or more, got 40 in .*plans\.csv\. Measure more layers and tokens"),
        (lambda rows: [{"method": "dense", "median_ms": 1.0}], r"got none with model, layer, .* in .*plans\.csv"),
        (
            changed("device", "another", 2),
            r"expected times of one card, got those of 2 in .*: a model, not a card, another",
        ),
        (changed("median_ms", -1.0, 9), r"expected times above zero in median_ms, got others in"),
        (changed("median_ms", "fast", 9), r"plans\.csv: could not convert string to float: 'fast'"),
        (changed("layer", "head", 9), r"expected a layer of benchmarks/shapes\.py, got llama-3-8b head\. Measure"),
        (changed("bn", 96, 9), r"expected plans of this version, got bn 96, .* for 16 tokens in"),
        (changed("workers", 0), r"expected tokens and workers from 1 to \d+, got 16 and 0\. Measure again"),
        (changed("tokens", 10**20), r"expected tokens and workers from 1 to \d+, got 10+ and"),
        (changed("sparsity", 2), r"expected a sparsity from 0 to 0\.5, got 2\. Measure again"),
        (changed("sm_count", 0), r"the capability of a card with kernels \(80, .*\) and 1 to 4096 multi.*got 90 and 0"),
        (changed("capability", 10**14), r"expected the capability of a card with kernels .*, got 10+ and"),
        (lambda rows: rows[:1] * 100, r"expected plans of 20 different calls or more, got 1 in .*plans\.csv"),
        (lambda rows: [{"a": 1, "b": 2}] * 2, r"got none with model, layer"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, capsys, monkeypatch, change, message):
    path = save(tmp_path / "plans.csv", change(made_rows({}, sparsities=(0.45,), tokens=(16, 64, 1024))))
    with pytest.raises(ValueError, match=message):
        plan_fit.read_times(path)
    monkeypatch.setattr("sys.argv", ["bench_plans", "--fit", str(path)])
    with pytest.raises(SystemExit) as stopped:
        bench_plans.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("bench_plans: --fit: ")


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"expected a file that bench_plans --csv wrote, got .*none\.csv"):
        plan_fit.read_times(tmp_path / "none.csv")
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    with pytest.raises(ValueError, match="got none with model, layer"):
        plan_fit.read_times(empty)
