"""`patch-llm info`: what is installed, what works here, and what to do where something does not."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping
from typing import Any

from patch import __version__
from patch.files.schema import record
from patch.settings import setting

NAME = "info"
SUMMARY = "report the environment, and whether each op works on each device here"
EXAMPLES = """\
examples:
  patch-llm info
  patch-llm info --json > report.json      # attach this to a bug report
"""
PROGRAM_NAME = "patch-llm"


@record
class Options:
    """Settings of `info`."""

    json: bool = setting(False, "print JSON")


def run(options: Options) -> None:
    """Print the report of patch_kernels.self_check."""
    from patch_kernels import self_check

    report = self_check.report()
    print(json_module.dumps(report, indent=1, default=str) if options.json else as_text(report))


def on_interrupt(options: Options) -> str:
    """Nothing to keep."""
    return "the report was stopped"


def as_text(report: Mapping[str, Any]) -> str:
    """The report as lines: facts, then one line per op and device with what to do where it fails."""
    lines = [f"{PROGRAM_NAME} {__version__}"]
    for key, value in report.items():
        if key not in ("checks", "build", "gpus", "sparse_gemm"):
            lines.append(f"  {key.replace('_', ' ')}: {'none' if value is None else value}")
    lines += [f"  {key.replace('_', ' ')}: {value}" for key, value in report["build"].items()]
    lines += [f"  GPU: {', '.join(f'{k} {v}' for k, v in gpu.items())}" for gpu in report["gpus"]] or ["  GPU: none"]
    for device, gemm in report["sparse_gemm"].items():
        why = f" ({gemm['reason']})" if gemm["reason"] else ""
        lines.append(f"  sparse GEMM on {device}: {gemm['family']} {gemm['state']}{why}, checked {gemm['checked']}")
    lines.append("ops")
    for check in report["checks"]:
        lines.append(f"  {check['device']:<8} {check['op']:<28} {'works' if check['ok'] else 'FAILS'}")
        if not check["ok"]:
            lines += [f"           {check['error']}", f"           what to do: {check['advice']}"]
    return "\n".join(lines)
