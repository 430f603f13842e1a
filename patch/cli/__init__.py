"""The command `patch-llm`: parser, configuration and the one place where errors become messages."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from patch.cli import outputs
from patch.cli.inputs import check_model_path, may_run_code
from patch.cli.parser import PROGRAM, USAGE_ERROR, build_parser, print_error
from patch.cli.wording import in_flags
from patch.files.failures import as_file_error, file_error_text
from patch.settings import load_config

# Errors of the user or the environment; their text says what to do. Others are our mistakes.
EXPECTED_ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError, FloatingPointError, MemoryError)
INTERNAL_ERROR, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0, 2 for a user's error, 130 for an interrupt, else 1)."""
    _let_threads_sleep()
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    command: ModuleType = arguments.command
    options = None
    try:
        options = load_config(
            command.Options,
            file=arguments.config,
            overrides=arguments.overrides,
            flags=_given_flags(arguments),
            sections={section: kind for kind, section, _ in getattr(command, "SECTION_FLAGS", {}).values()},
        )
        may_run_code.set(getattr(options, "trust_remote_code", False))
        _check_models(options, takes_packed=getattr(command, "TAKES_PACKED", False))
        command.run(options)
    except KeyboardInterrupt:
        kept = command.on_interrupt(options) if options is not None else "nothing was started"
        print(f"\n{PROGRAM}: interrupted: {kept}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if arguments.debug:
            raise
        return _report(error, command)
    finally:
        outputs.claims.close()
    return 0


def _check_models(options: Any, *, takes_packed: bool) -> None:
    """Refuse a path without a usable model at once, before a command imports what loads models."""
    paths = [("--model", getattr(options, "model", None)), *(("--compare", p) for p in getattr(options, "compare", ()))]
    for flag, path in paths:
        if path is not None:
            check_model_path(path, flag, packed=takes_packed)


def _report(error: Exception, command: ModuleType) -> int:
    """Say what went wrong in one line; the exit status."""
    if (found := as_file_error(error)) is not None:
        print_error(file_error_text(found))
        return USAGE_ERROR
    if isinstance(error, EXPECTED_ERRORS):
        print_error(in_flags(_one_line(error), command))
        return USAGE_ERROR
    print_error(f"unexpected {type(error).__name__}: {_one_line(error)} (run again with --debug for the traceback)")
    return INTERNAL_ERROR


def _let_threads_sleep() -> None:
    """OpenMP's threads sleep while they wait, unless the user says how they should; before torch starts them.

    Those that spin hold the core that another process needs, and on a busy machine everything waits for each other.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _given_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """{dotted key: value} of the flags and plain words that were given."""
    given: dict[str, Any] = {}
    for name, value in vars(arguments).items():
        kind, _, key = name.partition(" ")
        if kind not in ("setting", "word") or value is None:
            continue
        if key in given:
            got = f"got {given[key]!r} and {value!r}. Leave one out."
            raise ValueError(f"--{key.replace('_', '-')}: expected it once, as a plain word or as a flag, {got}")
        given[key] = ",".join(value) if isinstance(value, list) else value
    return given


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
