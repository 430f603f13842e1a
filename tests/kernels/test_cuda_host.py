"""What the host side of tile_linear launches on a GPU, seen without one: plans, tensor maps, first calls, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support import ROOT, cuda_host_cases

from benchmarks.ops import cuda_host


@pytest.fixture(scope="module")
def results():
    if (tool := cuda_host.missing_tool()) is not None:
        pytest.skip(f"needs {tool}")
    library = cuda_host.build()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "support.cuda_host_cases", str(library)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [case.__name__ for case in cuda_host_cases.CASES])
def test_host_side(results, case):
    assert results[case] == "", results[case]
