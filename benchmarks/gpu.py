"""Everything that has to be run on a GPU, in one command and within its time.

    python -m benchmarks.build_gpu --out build/gpu          before, on a machine with nvcc; a GPU is not needed
    python -m benchmarks.gpu --minutes 10 --out DIR --bin build/gpu

Stages run in the order of STAGES, each in its own process, so that a fault in one does not stop the others. Each leaves
DIR/<stage>.json; a stage that ended is not run again unless --stages names it, so a second call goes on where the first
ran out of time. --dry-run goes through the same on a CPU with tiny sizes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# Stage: most seconds it may take. Timing also leaves RESERVE_SECONDS for what comes after it.
STAGES = {
    "facts": 60,
    "micro": 130,
    "exact": 120,
    "determinism": 60,
    "masks": 120,
    "sanitizer": 100,
    "timing": 600,
    "mask_timing": 240,
    "learn_step": 300,
    "ncu": 150,
}
# Not begun with less than half of their time: the first cells alone would count as finished.
WHOLE_OR_LATER = ("mask_timing", "learn_step")
RESERVE_SECONDS = 90
LEAST_SECONDS = 5  # with less time left a stage is not begun
CHILD_SECONDS = 10  # for a stage's process to import torch and to write its file
MICRO_SECONDS = 25  # of one program
FINISHED = ("ok", "skipped")
NO_GPU = (
    "benchmarks.gpu: needs an NVIDIA GPU that torch can use, found none. Use --dry-run to try the commands on a CPU."
)


class Skip(Exception):
    """A stage has nothing to run here; the text says why."""


def write_json(path: Path, content: dict) -> None:
    """All of it or nothing: a killed run leaves no half file."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_status(path: Path) -> str | None:
    """Status of an earlier run of a stage, if its file is whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def facts(options) -> dict:
    import torch

    from benchmarks import harness

    result = harness.environment()
    if options.dry_run:
        return result | {"device": "cpu", "summary": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    result |= {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }
    if shutil.which("nvidia-smi"):
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        result["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    source, target = torch.randint(0, 256, (2, 4 << 30), dtype=torch.uint8, device="cuda")
    result["copy_TB_per_s"] = 2e-12 * source.numel() / cuda_median_seconds(lambda: target.copy_(source), 10)
    for size in (4096, 8192):
        a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
        seconds = cuda_median_seconds(lambda a=a, b=b: a @ b, 20)
        result[f"cublas_{size}_bf16_TFLOP_per_s"] = 2e-12 * size**3 / seconds
    result["summary"] = (
        f"{properties.name}, copy {result['copy_TB_per_s']:.2f} TB/s, "
        f"cuBLAS 8192 {result['cublas_8192_bf16_TFLOP_per_s']:.0f} TFLOP/s"
    )
    return result


def cuda_median_seconds(call: Callable[[], object], samples: int) -> float:
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for index in range(samples + 3):  # the first three warm up
        begin.record()
        call()
        end.record()
        end.synchronize()
        if index >= 3:
            seconds.append(1e-3 * begin.elapsed_time(end))
    return sorted(seconds)[samples // 2]


def micro(options) -> dict:
    from benchmarks.build_gpu import micro_sources

    if options.dry_run:
        raise Skip("micro programs run on a GPU only")
    if options.bin is None:
        raise Skip("no --bin: build them by python -m benchmarks.build_gpu --out build/gpu")
    results, problems = [], []
    for source in micro_sources():
        program = options.bin / source.stem
        if not program.is_file():
            problems.append(f"{source.stem}: not in {options.bin}")
            continue
        done = run_tool([str(program.resolve())], MICRO_SECONDS)
        results += json_lines(done["output"])
        if done["rc"] != 0:
            problems.append(f"{source.stem}: exit code {done['rc']}: {done['output'].strip()[-300:]}")
    data = {"results": results, "problems": problems, "failed": bool(problems)}
    wrong = [row for row in results if row["unit"] == "mismatches" and "other lane pair" not in row["case"]]
    data["wrong"] = [row for row in wrong if row["value"] != 0]
    data["summary"] = f"{len(results)} values, {len(data['wrong'])} wrong, {len(problems)} programs failed"
    return data


def json_lines(text: str) -> list[dict]:
    """The lines of a program's output that are JSON objects."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # cut by a timeout
    return found


def tally(cases: Iterable[tuple[str, int]]) -> dict:
    """Counts of (case, differences); stops the stage as failed, not at once, when there are any."""
    count, bad = 0, []
    for name, different in cases:
        count += 1
        if different:
            bad.append({"case": name, "different": different})
    return {
        "cases": count,
        "bad": bad,
        "failed": bool(bad),
        "summary": f"{count} cases, {len(bad)} differ" + (f", first: {bad[0]['case']}" if bad else ""),
    }


def exact(options) -> dict:
    import torch

    from benchmarks import gpu_checks as checks

    with torch.no_grad():
        if options.dry_run:
            return tally(checks.exact_cases("cpu", checks.DRY_SHAPES, checks.DRY_TOKENS))
        data = tally(checks.exact_cases("cuda", checks.EXACT_SHAPES, checks.EXACT_TOKENS))
    return require_kernels(data)


def require_kernels(data: dict) -> dict:
    """Fails a stage that ran the fall-back (unpack and cuBLAS) instead of the kernels it is about."""
    from benchmarks import gpu_checks as checks

    reason = checks.fallback_reason()
    if reason is not None:
        data["failed"] = True
        data["summary"] += f"; NOT the kernels of this GPU: {reason}"
    return data


def determinism(options) -> dict:
    import torch

    from benchmarks import gpu_checks as checks

    sizes = [(4096, 4096, tokens) for tokens in (1, 16, 64, 200, 1024)] + [(640, 2048, 33)]
    with torch.no_grad():
        if options.dry_run:
            small = [(256, 384, 9)]
            return tally([*checks.repeat_cases("cpu", 5, small), *checks.invariance_cases("cpu", small)])
        cases = itertools.chain(
            checks.repeat_cases("cuda", 50, sizes),
            checks.graph_cases(sizes),
            checks.invariance_cases("cuda", [(4096, 4096, 512), (640, 2048, 65)]),
        )
        return require_kernels(tally(cases))


def masks(options) -> dict:
    import torch

    from benchmarks import gpu_mask_checks as checks
    from patch.learn.config import MODES

    if options.dry_run:
        cases = [
            checks.equality_cases("cpu", checks.DRY_CASES),
            checks.repeat_cases("cpu", 3, [(256, 384)]),
            checks.same_mask_cases("cpu", 3),
            checks.learn_case("cpu", "joint"),
        ]
        return tally(itertools.chain(*cases))
    cases = [
        checks.equality_cases("cuda", checks.CASES),
        checks.repeat_cases("cuda", 20, [(640, 2048), (4096, 4096), (8192, 8192)]),
        checks.same_mask_cases("cuda", 20),
        *(checks.learn_case("cuda", mode) for mode in MODES),
    ]
    free = torch.cuda.mem_get_info()[0]
    fits = free >= checks.LARGE_BYTES
    data = tally(itertools.chain(*cases, checks.large_cases() if fits else ()))
    if not fits:
        data["summary"] += f"; logits beyond 2^32 bytes not run: {free >> 30} of {checks.LARGE_BYTES >> 30} GiB free"
    return data


def sanitizer(options) -> dict:
    if options.dry_run:
        raise Skip("compute-sanitizer needs a GPU")
    if shutil.which("compute-sanitizer") is None:
        raise Skip("compute-sanitizer is not installed")
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "--sanitizer"]
    # The caching allocator would hide an access behind the end of a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    deadline = time.monotonic() + options.stage_seconds
    data: dict = {}
    for tool in ("memcheck", "synccheck", "initcheck", "racecheck"):
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            data[tool] = {"rc": None, "output": "not run: no time left"}
            continue
        done = run_tool(["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command], left, environment)
        data[tool] = done | {"output": done["output"][-3000:]}
    # racecheck does not follow the async proxy: what it says is advice.
    failed = [tool for tool in ("memcheck", "synccheck", "initcheck") if data[tool]["rc"] != 0]
    codes = ", ".join(f"{tool} {data[tool]['rc']}" for tool in data)
    return data | {"failed": bool(failed), "summary": f"exit codes: {codes}"}


def timing(options) -> dict:
    import torch

    from benchmarks import bench_tile_linear as bench
    from benchmarks import peer_cutlass, shapes

    if options.dry_run:
        rows = bench.cpu_rows(1, [(256, 256)], [1, 9], (0.0, 0.5))
        return {"rows": rows, "summary": f"{len(rows)} rows on the CPU"}
    library = options.bin / "libcutlass_sparse_gemm.so" if options.bin else None
    run = bench.GpuRun(
        models=["llama-2-7b", "llama-3-8b"],
        tokens=[1, 16, 64, 256, 1024, 4096],
        sparsities=list(shapes.SPARSITIES),
        budget_seconds=options.stage_seconds,
        csv=options.out / "tile_linear.csv",
        samples=20,
        l2_bytes=torch.cuda.get_device_properties(0).L2_cache_size,
        tbps=shapes.bandwidth_tbps(torch.cuda.get_device_name()),
        peer=peer_cutlass.load(library) if library is not None and library.is_file() else None,
    )
    with torch.no_grad():
        run.run()
    left = [f"{cell.model} {cell.layer} M={cell.tokens}" for cell in run.not_run]
    sums = bench.layer_sums(run.rows)
    data = {
        "sums": sums,
        "wrong": run.wrong,
        "missing": run.missing,
        "not_run": left,
        "failed": any(": tiles" in text for text in run.wrong) or not run.rows,  # not for a rival's failure
        "summary": f"{len(run.rows)} rows, {len(run.wrong)} failed or wrong, {len(left)} cells without time",
    }
    return require_kernels(data)


def mask_timing(options) -> dict:
    import torch

    from benchmarks import bench_masked_weight as bench
    from benchmarks import shapes

    if options.dry_run:
        run = bench.dry_run()
        return mask_rows(run, bench.place)
    run = bench.Run(
        "cuda",
        20,
        shapes.bandwidth_tbps(torch.cuda.get_device_name()),
        checks=True,
        compiled=lambda case: case.rows == case.cols == 4096 and not case.hard,  # each compilation takes seconds
        l2_bytes=torch.cuda.get_device_properties(0).L2_cache_size,
        csv=options.out / "masked_weight.csv",
    )
    pairs = [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
    run.run(bench.cases(bench.GPU_SHAPES, pairs), options.stage_seconds)
    return mask_rows(run, bench.place)


def mask_rows(run, place: Callable[[object], str]) -> dict:
    return {
        "rows": run.rows,
        "wrong": run.wrong,
        "not_run": [place(case) for case in run.not_run],
        "failed": bool(run.wrong) or not run.rows,
        "summary": f"{len(run.rows)} rows, {len(run.wrong)} wrong or missing, {len(run.not_run)} cases without time",
    }


def learn_step(options) -> dict:
    from benchmarks import bench_learn_step as bench
    from patch.learn.config import MODES

    wrong = [text for mode in MODES for text in bench.check(mode, device="cpu" if options.dry_run else "cuda")]
    if wrong:
        summary = f"ours and eager disagree, nothing was timed: {wrong[0]}"
        return {"rows": [], "wrong": wrong, "failed": True, "summary": summary}
    if options.dry_run:
        run = bench.dry_run()
    else:
        run = bench.Run("cuda", 10, csv=options.out / "learn_step.csv")
        run.run(bench.gpu_cases(1), options.stage_seconds)
    return {
        "rows": run.rows,
        "not_run": [str(case) for case in run.not_run],
        "failed": not run.rows,
        "summary": f"{len(run.rows)} rows, {len(run.not_run)} cases without time",
    }


def ncu(options) -> dict:
    if options.dry_run:
        raise Skip("ncu needs a GPU")
    if shutil.which("ncu") is None:
        raise Skip("ncu is not installed")
    from benchmarks import gpu_checks, gpu_mask_checks

    profiles = [(module.__name__, name) for module in (gpu_checks, gpu_mask_checks) for name in module.PROFILES]
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "WarpStateStats", "Occupancy")
    flags = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details"]
    for section in sections:
        flags += ["--section", section]
    deadline = time.monotonic() + options.stage_seconds
    data: dict = {}
    for module, name in profiles:
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            data[name] = {"rc": None, "output": "not run: no time left"}
            continue
        child = [sys.executable, "-m", module, "--profile", name]
        done = run_tool(["ncu", *flags, *child], left)
        data[name] = done | {"output": done["output"][-60000:]}
    failed = [name for name in data if data[name]["rc"] != 0]
    return data | {"failed": bool(failed), "summary": f"{len(data) - len(failed)} of {len(profiles)} kernels profiled"}


FUNCTIONS = {
    "facts": facts,
    "micro": micro,
    "exact": exact,
    "determinism": determinism,
    "masks": masks,
    "sanitizer": sanitizer,
    "timing": timing,
    "mask_timing": mask_timing,
    "learn_step": learn_step,
    "ncu": ncu,
}


def run_tool(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> dict:
    """Exit code (None: stopped at its time) and output of a program."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return {"rc": None, "output": f"{text}\nstopped after {seconds:.0f} s"}
    return {"rc": done.returncode, "output": done.stdout}


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
    command = [sys.executable, "-m", "benchmarks.gpu", "--child", stage, "--out", str(options.out)]
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
    for index, stage in enumerate(stages):
        path = options.out / f"{stage}.json"
        if named or read_status(path) not in FINISHED:
            path.unlink(missing_ok=True)
            left = deadline - time.monotonic()
            if index + 1 < len(stages) and stage == "timing":
                left -= RESERVE_SECONDS
            seconds = min(left, STAGES[stage])
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
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, a file a stage and CSV")
    parser.add_argument("--stages", type=stage_names, help="run these again, e.g. exact,timing; default all unfinished")
    parser.add_argument("--bin", type=Path, help="folder of benchmarks.build_gpu")
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
