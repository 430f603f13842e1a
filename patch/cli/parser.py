"""The parser of `patch-llm`: one sub-command a module of patch.cli.commands, one flag a setting."""

from __future__ import annotations

import argparse
import importlib
import itertools
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from pydantic.fields import FieldInfo

from patch import __version__
from patch.files.schema import default_of, fields_of

PROGRAM = "patch-llm"
USAGE_ERROR = 2
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH", tuple: "A,B"}

COMMANDS = {
    "oneshot": "patch.cli.commands.oneshot",
    "permute": "patch.cli.commands.permute",
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

The main road is one command: oneshot, from a dense model to a packed one. Its steps by hand: prune -> compensate ->
export (a smaller model) -> eval / generate; learn trains a mask instead. `patch-llm demo` shows all of it in a few
minutes on a CPU.
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
    required = parser.add_argument_group("required (here, in --config or by --set)")
    optional = parser.add_argument_group("settings")
    for name, info in fields_of(module.Options).items():
        if info.description is not None:
            _add_flag(required if info.is_required() else optional, f"--{name.replace('_', '-')}", name, info)
    for flag, (kind, section, name) in getattr(module, "SECTION_FLAGS", {}).items():
        _add_flag(optional, flag, f"{section}.{name}", fields_of(kind)[name])


def _add_flag(group: Any, flag: str, key: str, info: FieldInfo) -> None:
    extra = typing.cast(dict[str, Any], info.json_schema_extra)
    kind = _kind(info.annotation)
    # Values stay text here: the settings convert and check them, with the same messages for all sources.
    shown = {"metavar": extra["metavar"] or _METAVARS.get(kind, "VALUE"), "help": _help(info, extra)}
    if extra["positional"]:
        # SUPPRESS: an absent word must not hide what --config or the flag gave.
        words = {"nargs": "*" if kind is tuple else "?", "default": argparse.SUPPRESS}
        group.add_argument(f"word {key}", **words, **shown)
        if kind is tuple:
            return  # a single word has its flag too, by which messages call it
    options: dict[str, Any] = {"dest": f"setting {key}", "default": None} | shown
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
        del options["metavar"]
    elif kind is tuple and Ellipsis in typing.get_args(info.annotation):
        options["action"] = "append"  # --data a --data b is --data a,b; argparse would keep the last one only
    group.add_argument(flag, **options)


def _kind(annotation: Any) -> Any:
    """The plain type of a setting: that of X | None and of an annotated type is X's."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(args[0])
    if origin in (typing.Union, types.UnionType):
        return _kind(next(arg for arg in args if arg is not type(None)))
    return origin or annotation


def _help(info: FieldInfo, extra: Mapping[str, Any]) -> str:
    """What the setting does, its choices and its default; percent signs are argparse's own."""
    text = info.description or ""
    if extra["choices"] is not None:
        text += f": {', '.join(extra['choices']())}"
    default = None if info.is_required() else default_of(info)
    if not isinstance(default, bool) and default not in (None, (), "") and "(default" not in text:
        text += f" (default {','.join(map(str, default)) if isinstance(default, tuple) else default})"
    return text.replace("%", "%%")


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
    """Help with room for long flags, no wider than the terminal; examples stay lines that can be copied."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(110, shutil.get_terminal_size().columns - 2))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        groups = itertools.groupby(text.splitlines(), key=lambda line: bool(line) and not line.startswith(" "))
        lines = [line for prose, kept in groups for line in (textwrap.wrap(" ".join(kept), width) if prose else kept)]
        return "\n".join(indent + line for line in lines)
