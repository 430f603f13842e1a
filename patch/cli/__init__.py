"""The command `patch-llm`: parser, configuration and the one place where errors become messages."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from patch.cli.parser import PROGRAM, USAGE_ERROR, build_parser, print_error
from patch.settings import load_config

# Errors of the user or the environment; their text says what to do. Others are our mistakes.
EXPECTED_ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError, FloatingPointError)
INTERNAL_ERROR, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0, 2 for a user's error, 130 for an interrupt, else 1)."""
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
        )
        command.run(options)
    except KeyboardInterrupt:
        kept = command.on_interrupt(options) if options is not None else "nothing was started"
        print(f"\n{PROGRAM}: interrupted: {kept}", file=sys.stderr)
        return INTERRUPTED
    except EXPECTED_ERRORS as error:
        if arguments.debug:
            raise
        print_error(_one_line(error))
        return USAGE_ERROR
    except Exception as error:
        if arguments.debug:
            raise
        print_error(f"unexpected {type(error).__name__}: {_one_line(error)} (run again with --debug for the traceback)")
        return INTERNAL_ERROR
    return 0


def _given_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """{dotted key: value} of the flags that were given."""
    prefix = "setting "
    values = ((name, value) for name, value in vars(arguments).items() if name.startswith(prefix))
    given = {name.removeprefix(prefix): value for name, value in values if value is not None}
    return {key: ",".join(value) if isinstance(value, list) else value for key, value in given.items()}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
