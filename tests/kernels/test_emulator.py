"""The GEMM and mask kernel bodies on the CPU emulators of csrc/emulate: right results, noticed faults, no races."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import ROOT

BUILD = ROOT / "build" / "emulate"
FAMILIES = ("sm80", "sm90")


@pytest.fixture(scope="session")
def emulator():
    """emulator(name, *arguments) runs an emulator, built once a session, and returns the finished process."""
    is_configured = (BUILD / "CMakeCache.txt").exists()
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not is_configured else []
    for command in (
        ["cmake", "-S", ROOT / "csrc" / "emulate", "-B", BUILD, *generator],
        ["cmake", "--build", BUILD, "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [BUILD / name, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
        )

    return run


@pytest.fixture(scope="session")
def tsan_emulator(emulator):
    if not (BUILD / "emulate_sm80_tsan").exists():
        pytest.skip("programs built by this C++ compiler with -fsanitize=thread do not link or do not run here")
    return emulator


@pytest.mark.parametrize("family", FAMILIES)
def test_integer_results_are_exact(emulator, family):
    done = emulator(f"emulate_{family}", "exact", "--cases", "2000", "--seed", "1")
    assert done.stdout == "2000 passed, 0 failed\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_self_check_of_a_gpu_passes_here(emulator, family):
    """Its problems and plans are sound: if it fails on a card, the card or the device code is to blame."""
    done = emulator(f"emulate_{family}", "selfcheck")
    assert done.returncode == 0 and done.stdout.endswith(" passed, 0 failed\n") and not done.stdout.startswith("0 ")


def test_mask_kernels_equal_the_cpu_op(emulator):
    """Masked weights and logit gradients bit for bit: addresses, staging and order of the lanes are right."""
    done = emulator("emulate_mask", "equal", "--cases", "600", "--seed", "1")
    assert done.stdout == "600 passed, 0 failed\n"
    faults = emulator("emulate_mask", "faults").stdout.split()
    assert len(faults) == 5
    assert [emulator("emulate_mask", "fault", fault).stdout for fault in faults] == [""] * 5


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_integer_results_are_exact_long(emulator, family):
    done = emulator(f"emulate_{family}", "exact", "--cases", "20000", "--seed", "2")
    assert done.stdout == "20000 passed, 0 failed\n"


def test_rows_do_not_depend_on_the_number_of_tokens(emulator):
    done = emulator("emulate_sm90", "invariant", "--cases", "100", "--seed", "1")
    assert done.stdout == "100 passed, 0 failed\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_planted_fault_is_noticed(emulator, family):
    faults = emulator(f"emulate_{family}", "faults").stdout.split()
    assert len(faults) >= 12
    with ThreadPoolExecutor(4) as pool:  # most of the time is waiting for what does not come
        runs = list(pool.map(lambda fault: emulator(f"emulate_{family}", "fault", fault), faults))
    assert "".join(run.stdout + run.stderr for run in runs if run.returncode != 0) == ""
    assert all(run.returncode == 0 for run in runs)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_data_race(tsan_emulator, family):
    done = tsan_emulator(f"emulate_{family}_tsan", "exact", "--cases", "60", "--seed", "1")
    assert "WARNING: ThreadSanitizer" not in done.stderr
    assert done.stdout == "60 passed, 0 failed\n"
    assert done.returncode == 0


@pytest.mark.parametrize(("family", "fault"), [("sm80", "lost_barrier"), ("sm90", "missing_sums_wait")])
def test_thread_sanitizer_sees_a_planted_race(tsan_emulator, family, fault):
    done = tsan_emulator(f"emulate_{family}_tsan", "fault", fault, TSAN_OPTIONS="halt_on_error=1")
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
