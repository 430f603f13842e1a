"""What the host side of tile_linear launches on a GPU, seen without one: plans, tensor maps, first calls, refusals."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
from support import ROOT, cuda_host_cases

from benchmarks.ops import bench_host_cost, cuda_host


def output(module: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library():
    if (tool := cuda_host.missing_tool()) is not None:
        pytest.skip(f"needs {tool}")
    return str(cuda_host.build())


@pytest.fixture(scope="module")
def results(library):
    return json.loads(output("support.cuda_host_cases", library).splitlines()[-1])


@pytest.mark.parametrize("case", [case.__name__ for case in cuda_host_cases.CASES])
def test_host_side(results, case):
    assert results[case] == "", results[case]


def test_host_cost_is_measured(library, tmp_path):
    output("benchmarks.ops.bench_host_cost", "--repeats", "1", "--csv", str(tmp_path / "h.csv"))
    rows = list(csv.DictReader((tmp_path / "h.csv").open()))
    assert len(rows) == 3 * 5 and {row["method"] for row in rows} == {"nn.Linear", "TiledLinear", "TiledLinear, 3-D x"}
    assert all(float(row["us"]) > 0 and float(row["of_nn_linear"]) > 0 for row in rows)
    assert len({(row["mode"], row["method"], row["tokens"]) for row in rows}) == len(rows)


def test_a_missing_tool_is_told(monkeypatch):
    monkeypatch.setattr(cuda_host, "missing_tool", lambda: "nvcc")
    with pytest.raises(SystemExit, match="bench_host_cost: needs nvcc, but none was found"):
        bench_host_cost.main([])
