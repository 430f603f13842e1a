"""The first check of a card's GEMM kernels, in a process of its own.

A fault or a hang of a kernel takes the CUDA context of its process with it. So before the first call on a device a
child process runs the self-check, one kernel family after the other until one works; what it found is kept in the
user's cache folder, and later processes start no child. The check in the process itself stays: it takes about a second,
a card may be broken that is named like a good one, and it loads every kernel before a graph is captured.

PATCH_KERNELS_CARD_CHECK_SECONDS: time a family has (60); 0 starts no child.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from patch_kernels._library import card_check_seconds, cuda_function, gemm_status
from patch_kernels.ops import LIBRARY_PATH

FAMILIES = ("sm90", "sm80", "none")  # best first
_START_SECONDS = 120  # until the child has imported torch; what takes longer says nothing about the card
_SAYS = "card_check: "  # begins the lines of the child that are meant for the parent; libraries may print too
_CHECKING = _SAYS + "checking"


@dataclass(frozen=True)
class Card:
    """What a verdict holds for: the kind of card, its driver and the compiled kernels. Every card of a kind is checked
    again, in the process itself."""

    name: str
    compute_capability: str
    multiprocessors: int  # fewer in a MIG slice
    driver: str
    library: str  # SHA-256


@dataclass(frozen=True)
class Outcome:
    """What a child found of one family. works is None where it could not tell, and reason says why."""

    works: bool | None
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The best family that works on a card; reason: what was wrong with better ones."""

    family: str
    reason: str


_lock = threading.Lock()
_how: dict[int, str] = {}  # for `patch-llm info`, by device


def ensure(device: int) -> None:
    """Have the kernels of a CUDA device checked before its first call, once a process."""
    with _lock:
        if device not in _how:
            _how[device] = _check(device)


def how(device: int) -> str:
    """How the kernels of a device were checked, in words."""
    return _how.get(device, "not yet")


def _check(device: int) -> str:
    best_family = cuda_function(LIBRARY_PATH, "best_family")
    is_open = gemm_status(LIBRARY_PATH, device)["state"] == "unchecked"
    if best_family is None or not is_open or os.environ.get("PATCH_KERNELS_SPARSE_GEMM") == "0":
        return "not by another process: it is decided already"
    major, minor = torch.cuda.get_device_capability(device)
    best = best_family(10 * major + minor)["family"]
    seconds = card_check_seconds()
    if best == "none" or seconds == 0:
        return "no kernels for it" if best == "none" else "in this process: PATCH_KERNELS_CARD_CHECK_SECONDS is 0"
    if not Path(sys.executable or "").name.startswith("python"):
        return f"in this process: sys.executable is no Python interpreter but {sys.executable!r}"
    card = card_of(device)
    path = remembered_path(card)
    verdict = remembered(path, card)
    said = f"by another process, before; delete {path} to forget it"
    if verdict is None:
        verdict, undecided = find_family(best, lambda family: run_child(child_command(device, family), seconds))
        said = f"in this process: {undecided}" if undecided else "by another process, just now"
        if not undecided:
            remember(path, card, verdict)
    limit_family = cuda_function(LIBRARY_PATH, "limit_family")
    if verdict.family != best and limit_family is not None:
        limit_family(device, verdict.family.encode(), verdict.reason.encode())
    return said


def find_family(best: str, check: Callable[[str], Outcome]) -> tuple[Verdict, str]:
    """The first family from `best` on that does not fail, "none" if all do, and why it could not be tried, or ""."""
    failures: list[str] = []
    for family in FAMILIES[FAMILIES.index(best) : -1]:
        outcome = check(family)
        if outcome.works is not False:
            return Verdict(family, "; ".join(failures)), outcome.reason
        failures.append(f"the {family} kernels failed their check by another process: {outcome.reason}")
    return Verdict("none", "; ".join(failures)), ""


def child_command(device: int, family: str) -> list[str]:
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    arguments = ["--device", str(device), "--family", family, "--uuid", uuid]
    # Not -m: this module is imported with its package before it could be run.
    return [sys.executable, "-c", "from patch_kernels.card_check import main; main()", *arguments]


def run_child(command: list[str], seconds: float) -> Outcome:
    """Run the child and tell what it found; `seconds` count from where it says that it begins."""
    try:
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            # Files and no pipes: nobody has to read while the child writes. A session of its own: an interrupt of the
            # terminal reaches the parent, which ends it.
            child = subprocess.Popen(
                command,
                cwd=Path(__file__).parents[1],  # where the child finds this package
                env={**os.environ, "PATCH_KERNELS_LIBRARY": str(LIBRARY_PATH)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
            try:
                status = _wait(child, output, seconds)
            finally:
                _end(child)
            return _outcome(status, _lines(output), _lines(errors), seconds)
    except OSError as error:
        return Outcome(None, f"the process that checks the card did not start: {error}")


def _wait(child: subprocess.Popen[bytes], output: BinaryIO, seconds: float) -> int | None:
    """The exit status; None when the time is over."""
    end = time.monotonic() + _START_SECONDS
    has_begun = False
    while (status := child.poll()) is None:
        if not has_begun and _CHECKING in _lines(output):
            has_begun, end = True, time.monotonic() + seconds
        if time.monotonic() > end:
            return None
        time.sleep(0.01)
    return status


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill it. A process that waits for a broken card inside its driver may stay: it is not waited for any longer."""
    if child.poll() is None:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)


def _lines(file: BinaryIO) -> list[str]:
    size = os.fstat(file.fileno()).st_size  # by pread: the position belongs to the child
    return os.pread(file.fileno(), size, 0).decode(errors="replace").splitlines()


def _outcome(status: int | None, output: list[str], errors: list[str], seconds: float) -> Outcome:
    last = f": {errors[-1]}" if errors else ""
    if _CHECKING not in output:
        how_it_ended = f"gave no sign in {_START_SECONDS} s" if status is None else f"ended with status {status}"
        return Outcome(None, f"the process that checks the card {how_it_ended} before it began{last}")
    if status is None:
        return Outcome(False, f"no end after {seconds:g} s")
    if status < 0:
        how_it_ended = f"ended by signal {-status} ({signal.strsignal(-status)})"
        if -status not in _FAULTS:  # by the system, short of memory or of time, or by an operator
            return Outcome(None, f"the process that checks the card {how_it_ended}")
        return Outcome(False, how_it_ended)
    result = _result(output)
    if status > 0 or result is None:
        return Outcome(False, f"ended with status {status} and without a result{last}")
    if result["ran"] != "yes":
        return Outcome(None, f"another process cannot use the card ({result['complaint']})")
    return Outcome(not result["complaint"], result["complaint"])


# Signals that a process gets for what it did itself.
_FAULTS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS)


def _result(output: list[str]) -> dict[str, str] | None:
    said = [line.removeprefix(_SAYS) for line in output if line.startswith(_SAYS)]
    try:
        result = json.loads(said[-1])
        return {name: str(result[name]) for name in ("ran", "complaint")}
    except (ValueError, TypeError, KeyError):
        return None


def card_of(device: int) -> Card:
    properties = torch.cuda.get_device_properties(device)
    return Card(
        properties.name,
        f"{properties.major}.{properties.minor}",
        properties.multi_processor_count,
        _driver(),
        hashlib.sha256(LIBRARY_PATH.read_bytes()).hexdigest(),
    )


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    except (OSError, IndexError):  # not Linux's own driver: WSL, a container that hides it
        version = cuda_function(LIBRARY_PATH, "driver_complaint")
        return "" if version is None else version(0, 0)["driver"]


def remembered_path(card: Card) -> Path | None:
    """File of a card's verdict, one for each so that processes do not write into each other's; None without a home."""
    name = hashlib.sha256(json.dumps(vars(card), sort_keys=True).encode()).hexdigest()[:32]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None
    return folder / "patch_kernels" / f"card-{name}.json"


def remembered(path: Path | None, card: Card) -> Verdict | None:
    """What an earlier process found; None for nothing, or nothing that can be read."""
    try:
        content: Any = json.loads(path.read_bytes()) if path is not None else None
        verdict = Verdict(str(content["family"]), str(content["reason"]))
        is_right = content["card"] == vars(card) and verdict.family in FAMILIES
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return verdict if is_right else None


def remember(path: Path | None, card: Card, verdict: Verdict) -> None:
    """Keep a verdict. Whoever reads meanwhile sees the whole file or none. It is no error if it cannot be written."""
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(file, "w") as stream:
                json.dump({"card": vars(card), **vars(verdict)}, stream, indent=1)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)


def main() -> None:
    """The child."""
    parser = argparse.ArgumentParser(description="Check the GEMM kernels of one family on a CUDA device.")
    parser.add_argument("--device", type=int, required=True)
    parser.add_argument("--family", choices=FAMILIES[:-1], required=True)
    parser.add_argument("--uuid", required=True, help="of the device that is meant")
    options = parser.parse_args()
    check = cuda_function(LIBRARY_PATH, "check_card")
    if check is None:
        sys.exit("card_check: this build has no CUDA kernels")
    print(_CHECKING, flush=True)
    try:
        uuid = str(torch.cuda.get_device_properties(options.device).uuid)
        if uuid == options.uuid:
            result = check(options.device, options.family.encode())
        else:
            result = {"ran": "no", "complaint": f"expected the card {options.uuid}, got {uuid}"}
    except (RuntimeError, AssertionError) as error:  # as torch refuses a device that it cannot open
        result = {"ran": "no", "complaint": str(error).splitlines()[0]}
    print(_SAYS + json.dumps(result), flush=True)
