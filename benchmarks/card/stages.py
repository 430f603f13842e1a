"""What each stage of benchmarks.card.run does: a function of the runner's options that returns the stage's data.

data["summary"] is the line that the runner prints, data["failed"] whether the stage failed; Skip says why there is
nothing to run. A stage imports what it needs itself, so that what cannot be imported costs that stage alone.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

LEAST_SECONDS = 5  # with less time left a stage is not begun
MICRO_SECONDS = 25  # of one program
# Programs of benchmarks/micro in the order of what their numbers decide (GPU.md).
SELECTOR = ("selector",)
MICRO = ("cluster", "contention", "issue_rate", "type_switch", "l2_to_sm", "hbm_stream")
FINDINGS = ("other lane pair", "overwritten in flight")  # cases whose mismatches answer a question and are no fault
PLANS_MODELS = ["llama-2-7b", "llama-3-8b"]
PLANS_TOKENS = [16, 64, 128, 256, 512]
FIT_SECONDS = 15


class Skip(Exception):
    """A stage has nothing to run here; the text says why."""


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


def run_in_turn(
    commands: dict[str, list[str]], seconds: float, most_chars: int, environment: dict[str, str] | None = None
) -> dict:
    """Result of run_tool by name for programs that share `seconds`, with the last most_chars of what each printed."""
    deadline = time.monotonic() + seconds
    data: dict = {}
    for name, command in commands.items():
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            data[name] = {"rc": None, "output": "not run: no time left"}
            continue
        done = run_tool(command, left, environment)
        data[name] = done | {"output": done["output"][-most_chars:]}
    return data


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


def selector(options) -> dict:
    return run_micro(options, SELECTOR)


def micro(options) -> dict:
    return run_micro(options, MICRO)


def run_micro(options, names: Iterable[str]) -> dict:
    """What programs of benchmarks/micro print; the stage fails for one that fails and for values that are wrong."""
    if options.dry_run:
        raise Skip("micro programs run on a GPU only")
    if options.bin is None:
        raise Skip("no --bin: build them by python -m benchmarks.card.build --out build/gpu")
    deadline = time.monotonic() + options.stage_seconds
    results, problems = [], []
    for name in names:
        program = options.bin / name
        left = deadline - time.monotonic()
        if not program.is_file():
            problems.append(f"{name}: not in {options.bin}")
        elif left < LEAST_SECONDS:
            problems.append(f"{name}: not run: no time left")
        else:
            done = run_tool([str(program.resolve())], min(left, MICRO_SECONDS))
            results += json_lines(done["output"])
            if done["rc"] != 0:
                problems.append(f"{name}: exit code {done['rc']}: {done['output'].strip()[-300:]}")
    checks = [row for row in results if row["unit"] == "mismatches" and not row["case"].endswith(FINDINGS)]
    wrong = [row for row in checks if row["value"] != 0]
    return {
        "results": results,
        "problems": problems,
        "wrong": wrong,
        "failed": bool(problems or wrong),
        "summary": f"{len(results)} values, {len(wrong)} wrong, {len(problems)} programs failed",
    }


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


def tally(cases: Iterable[tuple[str, int]], seconds: float = math.inf) -> dict:
    """Counts of (case, differences); stops the stage as failed, not at once, when there are any.

    After `seconds` the rest is left out, and the summary says so.
    """
    deadline = time.monotonic() + seconds
    count, bad, cut = 0, [], False
    for name, different in cases:
        count += 1
        if different:
            bad.append({"case": name, "different": different})
        if cut := time.monotonic() > deadline:
            break
    return {
        "cases": count,
        "bad": bad,
        "cut": cut,
        "failed": bool(bad),
        "summary": f"{count} cases, {len(bad)} differ"
        + (f", first: {bad[0]['case']}" if bad else "")
        + (f"; the rest not run after {seconds:.0f} s" if cut else ""),
    }


def exact(options) -> dict:
    import torch

    from benchmarks.card import checks

    with torch.no_grad():
        if options.dry_run:
            cases = itertools.chain(
                checks.exact_cases("cpu", checks.DRY_SHAPES, checks.DRY_TOKENS),
                checks.group_cases("cpu", checks.DRY_GROUPS, checks.DRY_TOKENS),
                checks.expert_cases("cpu", checks.DRY_MIXTURES, checks.DRY_CALLS),
            )
            return tally(cases)
        # Large weights last: packing them takes most of the time.
        cases = itertools.chain(
            checks.exact_cases("cuda", checks.EXACT_SHAPES, checks.EXACT_TOKENS),
            checks.group_cases("cuda", checks.GROUPS, checks.GROUP_TOKENS),
            checks.expert_cases("cuda", checks.MIXTURES, checks.MIXTURE_CALLS),
            checks.exact_cases("cuda", checks.LARGE_EXACT_SHAPES, checks.EXACT_TOKENS),
        )
        data = tally(cases, options.stage_seconds)
    return require_kernels(data)


def require_kernels(data: dict) -> dict:
    """Fails a stage that ran the fall-back (unpack and cuBLAS) instead of the kernels it is about."""
    from benchmarks.ops.bench_tile_linear import fallback_reason

    reason = fallback_reason()
    if reason is not None:
        data["failed"] = True
        data["summary"] += f"; NOT the kernels of this GPU: {reason}"
    return data


def plans(options) -> dict:
    """Every plan of some calls timed, and the constants of the planner's model fitted to the times."""
    from benchmarks.ops import bench_plans, plan_fit

    path, left = options.out / "plans.csv", []
    path.unlink(missing_ok=True)
    if options.dry_run:
        from benchmarks.card import made_plans

        try:
            rows = made_plans.made_rows(made_plans.OTHER_CARD, sparsities=(0.45, 0.0), tokens=PLANS_TOKENS)
        except ValueError as error:  # no module for the model
            raise Skip(str(error)) from None
        made_plans.save(path, rows)
    elif reason := bench_plans.without_choice():
        return {"failed": True, "summary": reason}
    else:
        _, left = bench_plans.sweep(plan_calls(), 10, options.stage_seconds - FIT_SECONDS, path)
    try:
        times = plan_fit.read_times(path)
        found = plan_fit.fit(times)
    except ValueError as error:
        return {"failed": True, "summary": f"no fit: {error}"}
    before, after = plan_fit.regrets(times, {}), plan_fit.regrets(times, found.constants)
    return {
        "device": times.device,
        "fit": plan_fit.report(times, found),
        "constants": found.constants,
        "not_run": [f"{cell.model} {cell.layer} M={cell.tokens} {sparsity:.0%}" for cell, sparsity in left],
        "summary": f"{len(times.us)} times of {times.device}; the model's plan over the best one: "
        f"mean {before.mean():.3f}, most {before.max():.2f}; fitted: {after.mean():.3f}, {after.max():.2f}; "
        f"{len(left)} calls without time",
    }


def plan_calls() -> list[tuple]:
    """(cell, sparsity) of the stage `plans`: shapes that both models have once, and 45 % zeros before none."""
    from benchmarks import shapes

    cells = {}
    for cell in shapes.cells(PLANS_MODELS, PLANS_TOKENS):
        cells.setdefault((cell.rows, cell.cols, cell.tokens), cell)
    return [(cell, sparsity) for sparsity in (0.45, 0.0) for cell in cells.values()]


def determinism(options) -> dict:
    import torch

    from benchmarks.card import checks

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

    from benchmarks.card import mask_checks as checks
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
    command = [sys.executable, "-m", "benchmarks.card.checks", "--sanitizer"]
    # The caching allocator would hide an access behind the end of a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tools = ("memcheck", "synccheck", "initcheck", "racecheck")
    commands = {tool: ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command] for tool in tools}
    data = run_in_turn(commands, options.stage_seconds, 3000, environment)
    # racecheck does not follow the async proxy: what it says is advice.
    failed = [tool for tool in ("memcheck", "synccheck", "initcheck") if data[tool]["rc"] != 0]
    codes = ", ".join(f"{tool} {data[tool]['rc']}" for tool in data)
    return data | {"failed": bool(failed), "summary": f"exit codes: {codes}"}


def timing(options) -> dict:
    import torch

    from benchmarks import shapes
    from benchmarks.ops import bench_tile_linear as bench
    from benchmarks.ops import bench_tile_linear_cpu
    from benchmarks.rivals import peer_cutlass

    if options.dry_run:
        dry = bench_tile_linear_cpu.CpuRun([(256, 256)], [1, 9], (0.0, 0.5), repeats=1, l3_bytes=1 << 20)
        dry.run()
        return {"rows": dry.rows, "summary": f"{len(dry.rows)} rows on the CPU"}
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

    from benchmarks import shapes
    from benchmarks.ops import bench_masked_weight as bench

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
    from benchmarks.ops import bench_learn_step as bench
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
    from benchmarks.card import checks, mask_checks

    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "WarpStateStats", "Occupancy")
    flags = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details"]
    for section in sections:
        flags += ["--section", section]
    commands = {
        name: ["ncu", *flags, sys.executable, "-m", module.__name__, "--profile", name]
        for module in (checks, mask_checks)
        for name in module.PROFILES
    }
    data = run_in_turn(commands, options.stage_seconds, 60000)
    failed = [name for name in data if data[name]["rc"] != 0]
    return data | {"failed": bool(failed), "summary": f"{len(data) - len(failed)} of {len(data)} kernels profiled"}


FUNCTIONS = {
    "facts": facts,
    "selector": selector,
    "exact": exact,
    "micro": micro,
    "plans": plans,
    "determinism": determinism,
    "timing": timing,
    "masks": masks,
    "sanitizer": sanitizer,
    "mask_timing": mask_timing,
    "learn_step": learn_step,
    "ncu": ncu,
}
