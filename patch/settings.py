"""Configuration of the commands: dataclasses filled from presets, files, `--set` overrides and flags.

Later sources win: defaults < preset < file (YAML or JSON) < `--set a.b=c` < explicit flags. Every key is checked
against the dataclass, so that a misspelt setting is refused instead of ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from patch.files.atomic import write_text_atomic

T = TypeVar("T")
RESOLVED_NAME = "config.resolved.yaml"
_FILE_SUFFIXES = (".yaml", ".yml", ".json")
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def load_config(
    cls: type[T],
    *,
    preset: Mapping[str, Any] | None = None,
    file: str | os.PathLike | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> T:
    """An instance of the dataclass `cls` from all sources, later ones winning.

    preset     nested values
    file       YAML or JSON file with nested values
    overrides  texts "a.b=c"; the value is read as YAML
    flags      {dotted key: value}; None means that the flag was not given
    raises     FileNotFoundError for a missing file, ValueError naming source, key, and what to write instead.
    """
    return build(cls, merge_sources(cls, preset=preset, file=file, overrides=overrides, flags=flags))


def merge_sources(
    cls: type,
    *,
    preset: Mapping[str, Any] | None = None,
    file: str | os.PathLike | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Nested values of all sources with their keys checked against `cls`, before conversion to its types."""
    values: dict[str, Any] = {}
    sources: list[tuple[str, Mapping[str, Any]]] = []
    if preset:
        sources.append(("preset", preset))
    if file is not None:
        sources.append((str(file), read_file(file)))
    for text in overrides:
        key, value = parse_override(text)
        sources.append((f"--set {text}", _nest(key, value)))
    for key, value in (flags or {}).items():
        if value is not None:
            sources.append((f"flag for {key}", _nest(key, value)))
    for source, content in sources:
        check_keys(cls, content, source)
        values = _merge(values, content)
    return values


def build(cls: type[T], values: Mapping[str, Any], *, prefix: str = "") -> T:
    """Dataclass instance from nested values, each converted to its field's type.

    prefix  what the values' keys are called in messages, e.g. "learn."
    raises  ValueError for an unknown key, a missing required one, or a value of another type.
    """
    check_keys(cls, values, "configuration", prefix=prefix)
    hints = typing.get_type_hints(cls)
    arguments, missing = {}, []
    for field in dataclasses.fields(cls):
        key = f"{prefix}{field.name}"
        if field.name in values:
            arguments[field.name] = convert(values[field.name], hints[field.name], key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            missing.append(key)
    if missing:
        needed = ", ".join(f"--{key.replace('_', '-')}" for key in missing)
        raise ValueError(f"expected {needed}, got nothing. Give it as a flag, in --config, or by --set KEY=VALUE.")
    return cls(**arguments)


def legal_keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted keys of a dataclass, nested dataclasses included."""
    hints = typing.get_type_hints(cls)
    keys = []
    for field in dataclasses.fields(cls):
        keys.append(f"{prefix}{field.name}")
        if dataclasses.is_dataclass(hints[field.name]):
            keys += legal_keys(hints[field.name], f"{prefix}{field.name}.")
    return keys


def check_keys(cls: type, values: Mapping[str, Any], source: str, *, prefix: str = "") -> None:
    """raises ValueError for the first key of `values` that `cls` does not have, naming the nearest legal one."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in names:
            near = _nearest(f"{prefix}{key}", legal_keys(cls, prefix))
            raise ValueError(f"{source}: expected a known setting, got '{prefix}{key}'. {near}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"{source}: expected '{prefix}{key}' to hold settings by name, got {value!r}. "
                    f"Write {prefix}{key}.{dataclasses.fields(hint)[0].name} = ..."
                )
            check_keys(hint, value, source, prefix=f"{prefix}{key}.")


def read_file(path: str | os.PathLike) -> dict[str, Any]:
    """Nested settings of a YAML or JSON file; an empty file has none."""
    path = Path(path)
    if path.suffix not in _FILE_SUFFIXES:
        raise ValueError(f"{path}: expected a file ending in {', '.join(_FILE_SUFFIXES)}. Rename the file.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a configuration file, found none. Check the path.")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _yaml_load(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: expected valid {_kind(path)}, got an error: {reason}. Correct the file.") from None
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


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type; texts become numbers, paths, booleans or tuples where that is what is meant.

    hint    int, float, bool, str, Path, Any, dict, X | None, Literal, tuple[X, X], tuple[X, ...], or a dataclass
    raises  ValueError naming the key, the expected type and the value.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if type(None) in args:
                return None
        (inner, *_) = [arg for arg in args if arg is not type(None)]
        return convert(value, inner, key)
    if origin is typing.Literal:
        if value in args:
            return value
        raise ValueError(
            f"{key}: expected one of {', '.join(map(str, args))}, got {value!r}. {_nearest(str(value), args)}"
        )
    if origin is tuple:
        return _convert_tuple(value, args, key)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, prefix=f"{key}.")
    if hint is Any or hint is dict or origin is dict:
        return value
    return _convert_scalar(value, hint, key)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested values of a dataclass instance, as YAML and JSON can hold them."""
    return _plain(dataclasses.asdict(config))


def dump_yaml(config: Any, *, header: str = "") -> str:
    """YAML text of a dataclass instance or of nested values, keys in order of definition, after `# header` lines."""
    import yaml

    values = to_dict(config) if dataclasses.is_dataclass(config) else _plain(config)
    lines = "".join(f"# {line}\n" for line in header.splitlines())
    return lines + yaml.safe_dump(values, sort_keys=False, default_flow_style=None, allow_unicode=True)


def save_resolved(config: Any, folder: str | os.PathLike, *, header: str = "") -> Path:
    """Write the resolved configuration into `folder` (made if needed) atomically; returns the file's path."""
    path = Path(folder) / RESOLVED_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, dump_yaml(config, header=header))
    return path


def _convert_tuple(value: Any, args: tuple, key: str) -> tuple:
    endless = len(args) == 2 and args[1] is Ellipsis
    if isinstance(value, str):
        # "128,128" and "128x128" are what people type for a tile.
        text = value.replace("x", ",") if args[0] is int else value
        value = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
    elif isinstance(value, int) and not isinstance(value, bool) and not endless:
        value = [value]
    if isinstance(value, list) and len(value) == 1 and args == (int, int):
        value = value * 2  # one number is a square tile
    if not isinstance(value, (list, tuple)) or not (endless or len(value) == len(args)):
        wanted = "a list" if endless else f"{len(args)} values"
        raise ValueError(f"{key}: expected {wanted}, got {value!r}. Write for example {_example(args)}.")
    kinds = [args[0]] * len(value) if endless else args
    return tuple(convert(item, kind, key) for item, kind in zip(value, kinds, strict=True))


def _convert_scalar(value: Any, hint: Any, key: str) -> Any:
    if hint is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in _TRUE | _FALSE:
            return str(value).lower() in _TRUE
    elif hint is Path:
        if isinstance(value, (str, Path)) and str(value):
            return Path(value).expanduser()
    elif hint is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    elif not isinstance(value, bool):  # int or float; True is no number here
        try:
            number = hint(value)
            if hint is float or not isinstance(value, float) or number == value:
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    article = {
        "int": "an integer",
        "float": "a number",
        "bool": "true or false",
        "Path": "a path",
        "str": "text",
    }
    example = {"int": "8", "float": "0.45", "bool": "true", "Path": "./folder", "str": "abc"}
    raise ValueError(
        f"{key}: expected {article[hint.__name__]}, got {value!r}. Write for example {example[hint.__name__]}."
    )


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    # YAML writes plain str only; some versions are subclasses of it.
    return str(value) if isinstance(value, (Path, str)) else value


def _nearest(given: str, legal: Iterable[Any]) -> str:
    legal = [str(key) for key in legal]
    near = difflib.get_close_matches(given, legal, n=1, cutoff=0.5)
    if not near:
        # A key given without its section, such as lr for learn.lr, is a common slip.
        near = [key for key in legal if key.rsplit(".", 1)[-1] == given.rsplit(".", 1)[-1]]
    return f"Did you mean '{near[0]}'?" if near else f"Settings are: {', '.join(legal)}."


def _yaml_load(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _example(args: tuple) -> str:
    return {int: "128,128", float: "4.0,0.05"}.get(args[0], "a,b")


def _kind(path: Path) -> str:
    return "JSON" if path.suffix == ".json" else "YAML"


def setting(
    default: Any = dataclasses.MISSING, help: str = "", *, metavar: str | None = None, positional: bool = False
) -> Any:
    """A dataclass field that becomes the flag --its-name (positional: plain words); required without a default."""
    return dataclasses.field(default=default, metadata={"help": help, "metavar": metavar, "positional": positional})
