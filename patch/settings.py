"""Settings: records whose fields are settings of commands and functions, and their sources.

Later sources win: defaults < preset < file (YAML or JSON) < `--set a.b=c` < explicit flags. Every key is checked
against the record, so that a misspelt setting is refused instead of ignored. A field made by `setting` is a flag of a
command too: its name, help, default and range stand there and nowhere else.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from patch.files.atomic import write_text_atomic
from patch.files.paths import require_file
from patch.files.schema import Says, fields_of, is_record, nearest, parse, plain, record, refused, seed_for_all
from patch.files.strict_json import parse_json

__all__ = [
    "RESOLVED_NAME",
    "AtLeastOne",
    "DistinctNames",
    "Names",
    "NewPath",
    "NotNegative",
    "Positive",
    "Seed",
    "Share",
    "Tile",
    "build",
    "check_keys",
    "dump_yaml",
    "load_config",
    "parts",
    "record",
    "save_resolved",
    "setting",
    "to_dict",
]

T = TypeVar("T")

RESOLVED_NAME = "config.resolved.yaml"
_FILE_SUFFIXES = (".yaml", ".yml", ".json")


def setting(
    default: Any = ...,
    help: str = "",
    *,
    metavar: str | None = None,
    positional: bool = False,
    choices: Callable[[], Iterable[str]] | None = None,
    factory: Any = None,
    **constraints: Any,
) -> Any:
    """A field of a record that is a setting; in the Options of a command it becomes the flag --its-name.

    default      ... for a setting that must be given
    help         what it does, without default or range, which the help adds; "": no flag
    metavar      word for the value in the help; by default one for the type
    positional   plain words on the command line instead of a flag
    choices      names that the help lists, asked for when it is printed
    constraints  of pydantic's Field: ge, gt, le, lt, examples, ...
    """
    extra: dict[str, Any] = {"metavar": metavar, "positional": positional, "choices": choices}
    kind = {"default_factory": factory} if factory is not None else {"default": default}
    return Field(**kind, description=help or None, json_schema_extra=extra, **constraints)


def parts(value: Any) -> Any:
    """Texts "a,b" and lists as tuples: what comes before the check of a tuple that is a setting."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.strip("()[] ").split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _tile(value: Any, info: ValidationInfo) -> Any:
    """As `parts`, and where texts are converted what people type for a tile: 128x128, one number for a square one."""
    if not info.context:
        return parts(value)
    value = parts(value.replace("x", ",") if isinstance(value, str) else value)
    value = (value,) if isinstance(value, int) and not isinstance(value, bool) else value
    return value * 2 if isinstance(value, tuple) and len(value) == 1 else value


def _groups_inside(tile: tuple[int, int]) -> tuple[int, int]:
    if min(tile) < 1 or tile[1] % 4:
        advice = "A group of four must not cross tiles; use 128,128."
        raise ValueError(f"expected positive rows,columns with columns a multiple of 4, got {tile}. {advice}")
    return tile


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"expected every name once, got {', '.join(names)}. Leave the repeated one out.")
    return names


def _expanded(value: Any) -> Any:
    # Path("") is the current folder, which nobody means.
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"expected a path, got {value!r}. Write for example ./folder.")
    return Path(value).expanduser() if isinstance(value, str) else value


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0), AfterValidator(seed_for_all)]
Share = Annotated[float, Field(ge=0, le=0.5), Says("a share of zeros from 0 to 0.5", "45 percent is 0.45.")]
Names = Annotated[tuple[str, ...], BeforeValidator(parts), Says("a list", "Write for example a,b.")]
DistinctNames = Annotated[Names, AfterValidator(_distinct)]
Tile = Annotated[
    tuple[int, int],
    BeforeValidator(_tile),
    AfterValidator(_groups_inside),
    Says("2 values, each an integer", "Write for example 128,128, in Python (128, 128)."),
]
NewPath = Annotated[Path, BeforeValidator(_expanded)]


def load_config(
    cls: type[T],
    *,
    preset: Mapping[str, Any] | None = None,
    file: str | os.PathLike[str] | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    sections: Mapping[str, type] | None = None,
) -> T:
    """An instance of the record `cls` from all sources, later ones winning.

    preset     nested values
    file       YAML or JSON file with nested values
    overrides  texts "a.b=c"; the value is read as YAML
    flags      {dotted key: value}; None means that the flag was not given
    sections   {field with settings by name: record that checks them later}, whose keys advice may name
    raises     FileNotFoundError for a missing file, ValueError naming source, key, and what to write instead.
    """
    values: dict[str, Any] = {}
    sources: list[tuple[str, Mapping[str, Any]]] = [("preset", preset)] if preset else []
    if file is not None:
        sources.append((str(file), read_file(file)))
    for text in overrides:
        key, value = parse_override(text)
        sources.append((f"--set {text}", _nest(key, value)))
    given = ((key, value) for key, value in (flags or {}).items() if value is not None)
    sources += [(f"flag for {key}", _nest(key, value)) for key, value in given]
    also = [key for name, kind in (sections or {}).items() for key in legal_keys(kind, f"{name}.")]
    for source, content in sources:
        check_keys(cls, content, source, also=also)
        values = _merge(values, content)
    return build(cls, values)


def build(cls: type[T], values: Mapping[str, Any], *, prefix: str = "") -> T:
    """A record from nested values, texts converted to the types of its fields.

    prefix  what the values' keys are called in messages, e.g. "learn."
    raises  ValueError for an unknown key, a missing required one, or a value that a field does not take.
    """
    check_keys(cls, values, "configuration", prefix=prefix)
    required = (name for name, info in fields_of(cls).items() if info.is_required() and name not in values)
    require_given(f"{prefix}{name}" for name in required)
    return parse(cls, _meant(cls, values, prefix), prefix, text=True)


def require_given(missing: Iterable[str]) -> None:
    """raises ValueError for settings that were needed and are missing."""
    if needed := ", ".join(f"--{name.replace('_', '-')}" for name in missing):
        raise ValueError(f"expected {needed}, got nothing. Give it as a flag, in --config, or by --set KEY=VALUE.")


def check_keys(
    cls: type, values: Mapping[str, Any], source: str, *, prefix: str = "", also: Iterable[str] = ()
) -> None:
    """raises ValueError for the first key of `values` that `cls` does not have, naming the nearest legal one.

    also  further legal names that the advice may name
    """
    fields = fields_of(cls)
    for key, value in values.items():
        if key not in fields:
            near = nearest(f"{prefix}{key}", [*legal_keys(cls, prefix), *also])
            raise ValueError(f"{source}: expected a known setting, got '{prefix}{key}'. {near}")
        kind = fields[key].annotation
        if not is_record(kind) and typing.get_origin(kind) is not dict:
            continue
        if not isinstance(value, Mapping):
            advice = f"Write {prefix}{key}.{next(iter(fields_of(kind))) if is_record(kind) else 'NAME'} = ..."
            raise ValueError(f"{source}: expected '{prefix}{key}' to hold settings by name, got {value!r}. {advice}")
        if is_record(kind):
            check_keys(kind, value, source, prefix=f"{prefix}{key}.")


def legal_keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted keys of a record, those of nested records included."""
    keys = []
    for name, info in fields_of(cls).items():
        keys.append(f"{prefix}{name}")
        if is_record(info.annotation):
            keys += legal_keys(info.annotation, f"{prefix}{name}.")
    return keys


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Nested settings of a YAML or JSON file; an empty file has none."""
    path = Path(path)
    if path.suffix not in _FILE_SUFFIXES:
        raise ValueError(f"{path}: expected a file ending in {', '.join(_FILE_SUFFIXES)}. Rename the file.")
    require_file(str(path), path, "a configuration file")
    is_json = path.suffix == ".json"
    try:
        text = path.read_text(encoding="utf-8")
        content = parse_json(text.encode()) if is_json else _yaml_load(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        kind = "JSON" if is_json else "YAML"
        raise ValueError(f"{path}: expected valid {kind}, got an error: {reason}. Correct the file.") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path}: expected settings by name, got {type(content).__name__}. Write lines 'key: value'.")
    return content


def parse_override(text: str) -> tuple[str, Any]:
    """("a.b", value) of "a.b=value"; the value is read as YAML, so 3 is a number and [1, 2] a list."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        raise ValueError(f"--set: expected KEY=VALUE such as learn.lr=1e-3, got {text!r}. Put no spaces around '='.")
    try:
        return key, _yaml_load(value)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--set {key}: expected a YAML value, got {value!r} ({reason}). Quote it.") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested values of a record, as YAML and JSON can hold them."""
    return typing.cast(dict[str, Any], plain(config))


def dump_yaml(config: Any, *, header: str = "") -> str:
    """YAML text of a record or of nested values, keys in order of definition, after `# header` lines."""
    import yaml

    lines = "".join(f"# {line}\n" for line in header.splitlines())
    return lines + yaml.safe_dump(plain(config), sort_keys=False, default_flow_style=None, allow_unicode=True)


def save_resolved(config: Any, folder: str | os.PathLike[str], *, header: str = "") -> Path:
    """Write the resolved configuration into `folder` (made if needed) atomically; returns the file's path."""
    path = Path(folder) / RESOLVED_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, dump_yaml(config, header=header))
    return path


def _meant(cls: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values with None for the texts that mean it. True is no number here, which pydantic would take for 1."""
    meant = dict(values)
    for name, info in fields_of(cls).items():
        value = values.get(name)
        kinds = _alternatives(info.annotation)
        if isinstance(value, str) and value.lower() in ("none", "null") and type(None) in kinds:
            meant[name] = None
        elif isinstance(value, bool) and not {bool, Any} & kinds and kinds & {int, float, str}:
            raise refused(info, f"{prefix}{name}", value)
        elif is_record(info.annotation) and isinstance(value, Mapping):
            meant[name] = _meant(info.annotation, value, f"{prefix}{name}.")
    return meant


def _alternatives(annotation: Any) -> set[Any]:
    """The types of a union without their annotations, or the one type."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return {kind for arg in typing.get_args(annotation) for kind in _alternatives(arg)}
    return {typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation}


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast(dict[str, Any], value)


def _merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _yaml_load(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML's own loader keeps the last one of two equal keys without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise yaml.YAMLError(f"the key {twice[0]!r} is there twice below line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
