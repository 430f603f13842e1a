"""Everything that has to be run on a GPU, in one command and within its time.

    python -m benchmarks.card.build --out build/gpu         before, on a machine with nvcc; a GPU is not needed
    python -m benchmarks.card.run --minutes 9.5 --out DIR --bin build/gpu

Stages run in the order of STAGES, each in its own process, so that a fault in one does not stop the others. Each leaves
DIR/<stage>.json; a stage that ended is not run again unless --stages names it, so a second call goes on where the first
ran out of time. --dry-run goes through the same on a CPU with tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.card.stages import FUNCTIONS, LEAST_SECONDS, Skip, run_tool
from patch.files.atomic import write_text_atomic

# Stage: most seconds it may take. Those up to `timing` are the first call (* in GPU.md): together FIRST_CALL_MINUTES.
STAGES = {
    "facts": 30,
    "selector": 20,
    "exact": 120,
    "micro": 80,
    "plans": 110,
    "determinism": 40,
    "timing": 170,
    "masks": 120,
    "sanitizer": 100,
    "mask_timing": 240,
    "learn_step": 300,
    "ncu": 150,
}
FIRST_CALL_MINUTES = 9.5
# Not begun with less than half of their time: the first cells alone would count as finished.
WHOLE_OR_LATER = ("plans", "timing", "mask_timing", "learn_step")
CHILD_SECONDS = 10  # for a stage's process to import torch and to write its file
FINISHED = ("ok", "skipped")
NO_GPU = (
    "benchmarks.card.run: needs an NVIDIA GPU that torch can use, found none. "
    "Use --dry-run to try the commands on a CPU."
)


def write_json(path: Path, content: dict) -> None:
    """All of it or nothing: a killed run leaves no half file."""
    write_text_atomic(path, json.dumps(content, indent=1) + "\n")


def read_status(path: Path) -> str | None:
    """Status of an earlier run of a stage, if its file is whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_child(stage: str, options) -> None:
    """The stage itself, in its own process."""
    begin = time.monotonic()
    result = {"stage": stage, "dry_run": options.dry_run}
    try:
        data = FUNCTIONS[stage](options)
        result |= {"status": "failed" if data.get("failed") else "ok", "reason": data.pop("summary", ""), "data": data}
    except Skip as reason:
        result |= {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        # Whatever broke belongs into the stage's file; the other stages go on.
        result |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:2000]}
    write_json(options.out / f"{stage}.json", result | {"seconds": round(time.monotonic() - begin, 1)})


def start_child(stage: str, seconds: float, options) -> str:
    """Run a stage for at most `seconds`; the end of its output, if it left no file."""
    command = [sys.executable, "-m", "benchmarks.card.run", "--child", stage, "--out", str(options.out)]
    command += ["--stage-seconds", f"{max(seconds - CHILD_SECONDS, LEAST_SECONDS):.0f}"]
    command += ["--dry-run"] if options.dry_run else []
    command += ["--bin", str(options.bin)] if options.bin else []
    # Tiny sizes: two threads would mostly wait for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1"} if options.dry_run else None
    done = run_tool(command, seconds, environment)
    return f"exit code {done['rc']}: {done['output'].strip()[-1500:]}"


def run_stages(stages: list[str], options, child: Callable[[str, float, object], str] = start_child) -> list[dict]:
    """Run stages in order within options.minutes; the content of every stage's file."""
    deadline = time.monotonic() + 60 * options.minutes
    named = options.stages is not None
    results = []
    for stage in stages:
        path = options.out / f"{stage}.json"
        if named or read_status(path) not in FINISHED:
            path.unlink(missing_ok=True)
            seconds = min(deadline - time.monotonic(), STAGES[stage])
            if seconds < (STAGES[stage] / 2 if stage in WHOLE_OR_LATER else LEAST_SECONDS):
                write_json(path, {"stage": stage, "status": "not run", "reason": "no time left", "seconds": 0})
            else:
                print(f"{stage} ...", flush=True)
                begin = time.monotonic()
                end_of_output = child(stage, seconds, options)
                if read_status(path) is None:
                    spent = round(time.monotonic() - begin, 1)
                    failure = {"stage": stage, "status": "failed", "reason": end_of_output, "seconds": spent}
                    write_json(path, failure)
        results.append(json.loads(path.read_text(encoding="utf-8")))
    return results


def print_results(results: list[dict]) -> None:
    """One line a stage, and the sums of the timing stage."""
    for result in results:
        if result["stage"] == "timing" and result.get("data", {}).get("sums"):
            from benchmarks import harness

            harness.print_table(result["data"]["sums"])
    print(f"{'stage':12} {'status':8} {'seconds':>7}  result")
    for result in results:
        reason = result.get("reason", "").strip().splitlines() or [""]
        print(f"{result['stage']:12} {result['status']:8} {result['seconds']:7.1f}  {reason[-1][:140]}")


def stage_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected stages of {','.join(STAGES)}, got {','.join(unknown)}")
    return [name for name in STAGES if name in names]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=FIRST_CALL_MINUTES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, a file a stage and CSV")
    parser.add_argument("--stages", type=stage_names, help="run these again, e.g. exact,timing; default all unfinished")
    parser.add_argument("--bin", type=Path, help="folder of benchmarks.card.build")
    parser.add_argument("--dry-run", action="store_true", help="the whole flow on the CPU with tiny sizes")
    parser.add_argument("--child", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--stage-seconds", type=float, default=60, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child:
        run_child(options.child, options)
        return 0
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            print(NO_GPU, file=sys.stderr)
            return 2
    results = run_stages(options.stages or list(STAGES), options)
    print_results(results)
    return 0 if all(result["status"] in FINISHED for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
