"""Messages of the library in the words of the command line: a setting is called by its flag."""

from __future__ import annotations

import re
from types import ModuleType

from patch.files.schema import fields_of

_WORD = r"[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)?"
_HEAD = re.compile(rf"({_WORD})(?=: )")
# A value given in Python's way, as advice has it: pattern='unstructured', overwrite=True.
_GIVEN = re.compile(rf"(?<![\w.'\"/=-])({_WORD})=('[^' ]*'|\"[^\" ]*\"|True|False|[0-9][0-9.e-]*)(?![\w(])")
# Names that can only be those of settings: with an underscore or a section, not part of a path, a call or a quotation.
_NAME = re.compile(rf"(?<![\w.'\"/=-])({_WORD})(?![\w'\"/=(-]|\.\w)")

# Where the library means something else by the word than the flag does.
_OTHER_MEANING = ("blocks",)


def flags_of(command: ModuleType) -> dict[str, str]:
    """{what the library calls a setting: its flag in this command}; no name that two settings have."""
    flags = {
        name: f"--{name.replace('_', '-')}" for name, info in fields_of(command.Options).items() if info.description
    }
    for flag, (_, section, name) in getattr(command, "SECTION_FLAGS", {}).items():
        flags[f"{section}.{name}"] = flag
        flags.setdefault(name, flag)
    return flags


def in_flags(text: str, command: ModuleType) -> str:
    """The message with the flag for a setting at its head, in advice such as name=value, and for unmistakable names."""
    flags = flags_of(command)

    def given(match: re.Match[str]) -> str:
        name, value = match[1], match[2].strip("'\"")
        if name not in flags or text[: match.start()].endswith("--set "):
            return match[0]
        if value in ("True", "False"):
            return flags[name] if value == "True" else flags[name].replace("--", "--no-", 1)
        return f"{flags[name]} {value}"

    def named(match: re.Match[str]) -> str:
        is_plain = "_" not in match[1] and "." not in match[1]
        return match[0] if is_plain else flags.get(match[1], match[0])

    text = _GIVEN.sub(given, text)
    if (head := _HEAD.match(text)) and head[1] in flags and head[1] not in _OTHER_MEANING:
        text = flags[head[1]] + text[head.end() :]
    return _NAME.sub(named, text)
