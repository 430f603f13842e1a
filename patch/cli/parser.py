"""The parser of `patch-llm`: one sub-command a module of patch.cli.commands, one flag a setting."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import typing
from types import ModuleType
from typing import Any, NoReturn

from patch import __version__

PROGRAM = "patch-llm"
USAGE_ERROR = 2

COMMANDS = {
    "prune": "patch.cli.commands.prune",
    "learn": "patch.cli.commands.learn",
    "compensate": "patch.cli.commands.compensate",
    "compress": "patch.cli.commands.compress",
    "fine-tune": "patch.cli.commands.fine_tune",
    "export": "patch.cli.commands.export",
    "import-masks": "patch.cli.commands.import_masks",
    "export-masks": "patch.cli.commands.export_masks",
    "eval": "patch.cli.commands.eval",
    "report": "patch.cli.commands.report",
    "generate": "patch.cli.commands.generate",
    "info": "patch.cli.commands.info",
    "demo": "patch.cli.commands.demo",
}

DESCRIPTION = """\
Prune language models into a mix of dense and 2:4 sparse tiles, learned by PATCH.

A usual sequence: prune (a one-shot mask as the prior) -> learn (the PATCH mask) -> export (a smaller model)
-> eval / generate. `patch-llm demo` shows all of it in a few minutes on a CPU.
"""

EPILOG = """\
Every command takes --config FILE (YAML or JSON) and --set KEY=VALUE; flags win over --set over the file.
`patch-llm COMMAND --help` shows a command's flags with examples.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with all sub-commands; reads the commands' settings, imports nothing heavy."""
    parser = _Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG, formatter_class=_Formatter)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands", parser_class=_Parser)
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        sub = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY,
            epilog=module.EXAMPLES,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        _add_settings(sub, module)
        _add_common(sub)
        sub.set_defaults(command=module)
    return parser


def _add_settings(parser: argparse.ArgumentParser, module: ModuleType) -> None:
    """Flags of a command: one per setting, then those for settings inside a section."""
    hints = typing.get_type_hints(module.Options)
    required = parser.add_argument_group("required (here, in --config or by --set)")
    optional = parser.add_argument_group("settings")
    for field in dataclasses.fields(module.Options):
        if "help" not in field.metadata:
            continue
        group = required if field.default is dataclasses.MISSING else optional
        _add_flag(
            group,
            f"--{field.name.replace('_', '-')}",
            field.name,
            field.metadata,
            is_bool=hints[field.name] is bool,
            is_list=hints[field.name] == tuple[str, ...],
        )
    for flag, (key, metavar, text) in module.SECTION_FLAGS.items():
        _add_flag(optional, flag, key, {"metavar": metavar, "help": text}, is_bool=not metavar)


def _add_flag(group: Any, flag: str, key: str, metadata: Any, *, is_bool: bool, is_list: bool = False) -> None:
    if metadata.get("positional"):
        # SUPPRESS: an absent word must not hide what --config or the flag gave.
        words = {"nargs": "*" if is_list else "?", "metavar": metadata["metavar"], "help": metadata["help"]}
        group.add_argument(f"setting {key}", default=argparse.SUPPRESS, **words)
        if is_list:
            return  # a single word has its flag too, by which messages call it
    options: dict[str, Any] = {"dest": f"setting {key}", "default": None, "help": metadata["help"]}
    if is_bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        # Values stay text here: the configuration converts and checks them, with the same messages for all sources.
        options["metavar"] = metadata["metavar"]
    if is_list:
        options["action"] = "append"  # --data a --data b is --data a,b; argparse would keep the last one only
    group.add_argument(flag, **options)


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("common")
    group.add_argument("--config", metavar="FILE", help="YAML or JSON file with settings by name")
    group.add_argument(
        "--set",
        metavar="KEY=VALUE",
        dest="overrides",
        action="append",
        default=[],
        help="one setting; may be repeated",
    )
    group.add_argument("-v", "--verbose", action="store_true", help="more messages")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def print_error(text: str) -> None:
    print(f"{PROGRAM}: error: {text}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are one line in the form of all others."""

    def error(self, message: str) -> NoReturn:
        print_error(f"{message}. See `{self.prog} --help`.")
        raise SystemExit(USAGE_ERROR)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with room for long flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)
