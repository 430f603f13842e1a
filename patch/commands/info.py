"""`patch-llm info`: what is installed, what works here, and what to do where something does not."""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass

from patch.commands.common import setting
from patch.config import dump_yaml

NAME = "info"
SUMMARY = "report the environment, and whether each op works on each device here"
EXAMPLES = """\
examples:
  patch-llm info
  patch-llm info --json > report.json      # attach this to a bug report
"""
SECTION_FLAGS: dict[str, tuple[str, str, str]] = {}


@dataclass(frozen=True)
class Options:
    """Settings of `info`."""

    json: bool = setting(False, "print JSON")


def run(options: Options) -> None:
    """Print the report of patch_kernels.support."""
    from patch_kernels import support

    report = support.report()
    print(json_module.dumps(report, indent=1, default=str) if options.json else dump_yaml(report), end="")
    if options.json:
        print()


def on_interrupt(options: Options) -> str:
    """Nothing to keep."""
    return "the report was stopped"
