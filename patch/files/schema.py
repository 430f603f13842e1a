"""Declared data: records whose fields say type, range and meaning once, and the one translator of their refusals.

Settings and the JSON descriptions that are read are pydantic dataclasses made by `record`. What a field takes is
declared at the field; a rule over several fields is one validator of the record. Every refusal is a ValueError with one
sentence: which field, what was expected, what came, what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic import dataclasses as pydantic_dataclasses
from pydantic.fields import FieldInfo
from typing_extensions import dataclass_transform

T = TypeVar("T")

_CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path", dict: "an object"}
_EXAMPLES = {int: "8", float: "0.45", bool: "true", str: "abc", Path: "./folder"}
_SHOWN_CHARACTERS = 80
MAX_SEED = (1 << 32) - 1


@dataclasses.dataclass(frozen=True)
class Says:
    """Metadata of an annotated type: how messages describe what it takes, and what they advise."""

    expected: str
    advice: str = ""


Size = Annotated[int, Field(ge=1, lt=1 << 31), Says("a size of 1 to 2^31-1")]
Count = Annotated[int, Field(ge=0, lt=1 << 63), Says("an integer of 0 to 2^63-1")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$"), Says("a SHA-256 of 64 hex digits")]


@typing.overload
def record(cls: type[T], /) -> type[T]: ...
@typing.overload
def record(*, kw_only: bool = False, others: bool = False) -> Any: ...
@dataclass_transform(frozen_default=True, field_specifiers=(Field, dataclasses.field))
def record(cls: Any = None, /, *, kw_only: bool = False, others: bool = False) -> Any:
    """Class decorator: a frozen dataclass that checks its fields when it is made, without any conversion.

    others  values that are no field are left out instead of being refused, for descriptions that hold more

    raises  (when an instance is made) ValueError with one sentence about the first field that is refused.
    """

    def made(cls: type) -> type:
        config = _CONFIG | {"extra": "ignore"} if others else _CONFIG
        checked: Any = pydantic_dataclasses.dataclass(cls, frozen=True, kw_only=kw_only, config=config)
        init = checked.__init__

        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                init(self, *args, **kwargs)
            except ValidationError as error:
                given = dict(zip(fields_of(checked), args, strict=False)) | kwargs
                raise refusal(error, checked, given) from None

        checked.__init__ = __init__
        return checked

    return made if cls is None else made(cls)


_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """Fields of a record by name."""
    return cls.__pydantic_fields__  # type: ignore[attr-defined]


def is_record(kind: Any) -> typing.TypeGuard[type]:
    """Whether a type was made by `record`."""
    return isinstance(kind, type) and hasattr(kind, "__pydantic_fields__")


def default_of(info: FieldInfo) -> Any:
    """The default of a field that has one."""
    return info.get_default(call_default_factory=True)


def parse(cls: type[T], value: Any, where: str = "", advice: str = "", *, text: bool = False) -> T:
    """A record from nested values as JSON or YAML give them.

    where   what messages begin with, "settings." or "file.json: "
    advice  what messages end with, where the field has no advice of its own
    text    values may be texts that stand for numbers, paths, true and false (flags, YAML): they are converted, and
            validators with conversions of their own find {"text": True} as context.
            Otherwise nothing is, but for lists and objects, which are JSON's tuples and records
    raises  ValueError with one sentence about the first field that is refused.
    """
    adapter = _adapter(cls)
    try:
        if text:
            return adapter.validate_python(value, strict=False, context={"text": True})
        # Python values have no strict way from a dict to a record; JSON has.
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise refusal(error, cls, value, where, advice, text=text) from None


def refusal(
    error: ValidationError, cls: type, given: Any, where: str = "", advice: str = "", *, text: bool = False
) -> ValueError:
    """The sentence for the first thing that pydantic refused: field, what was expected, what came, what to do."""
    details = error.errors(include_url=False)
    first = details[0]
    keys, place, info = _located(cls, first["loc"])
    kind = first["type"]
    if kind == "value_error":  # from a validator of ours, in full sentences
        rule = str(first["ctx"]["error"])
        # A validator of one field does not know its name; one of several names those that it means.
        return ValueError(f"{where}{place}: {rule}" if place and rule.startswith("expected") else f"{where}{rule}")
    if kind in ("missing", "missing_argument") and not isinstance(first["loc"][-1], int):
        missing = [_located(cls, d["loc"])[1] for d in details if d["type"] == kind]
        return ValueError(f"{where}expected {', '.join(missing)}, got nothing. {advice or 'Give a value.'}")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return ValueError(f"{where}expected known keys, got {place!r}. {advice or nearest(place, fields_of(cls))}")
    value = _given_at(given, keys, first["input"])
    value = _as_number(value) if text else value
    place = f"{where}{place}" if place else where.rstrip(".: ")
    return refused(info, place, value, advice, is_finite=kind != "finite_number")


def _given_at(given: Any, keys: Iterable[int | str], otherwise: Any) -> Any:
    """What was given for a field as a whole, where pydantic tells of one item of it or of a part of a text."""
    try:
        return functools.reduce(lambda value, key: value[key], keys, given)
    except (LookupError, TypeError):
        return otherwise


def _as_number(value: Any) -> Any:
    """A number that came as text, so that messages do not quote it; every other value as it is."""
    with contextlib.suppress(ValueError, TypeError):
        return json.loads(value)
    return value


def refused(info: FieldInfo | None, place: str, value: Any, advice: str = "", *, is_finite: bool = True) -> ValueError:
    """The sentence for a value that a field does not take; info None: where values by name were expected.

    is_finite  False: the value is infinite or no number, which would seem to fit a range such as ">= 0"
    """
    expected, own = ("values by name", "") if info is None else described(info.annotation, info.metadata)
    if not is_finite:
        expected = expected.replace("a number", "a finite number", 1)
    own = own or advice or ("" if info is None else _suggestion(info, value))
    return ValueError(f"{place}: expected {expected}, got {shown(value)}. {own}".rstrip())


def described(annotation: Any, metadata: Iterable[Any] = ()) -> tuple[str, str]:
    """(what a type takes, advice or "") in the words of messages."""
    metadata = list(metadata)
    while typing.get_origin(annotation) is Annotated:
        annotation, *inner = typing.get_args(annotation)
        metadata += inner
    flat = [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
    for item in flat:
        if isinstance(item, Says):
            return item.expected, item.advice
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return described(next(arg for arg in args if arg is not type(None)), flat)
    if origin is Literal:
        return (f"one of {', '.join(map(str, args))}" if len(args) > 1 else repr(args[0])), ""
    if origin in (tuple, list):
        return _described_items(origin, args, flat), ""
    kind = _KINDS.get(origin or annotation, "values by name" if is_record(annotation) else "another value")
    if any(isinstance(item, MinLen) for item in flat):
        return f"{kind} that is not empty", ""
    return kind + _range(flat), ""


def shown(value: Any) -> str:
    """A value as messages quote it."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def listed(names: Sequence[str], most: int = 5) -> str:
    """Their number and the first of them."""
    shown_names = ", ".join(names[:most])
    return f"{len(names)} ({shown_names}{', ...' if len(names) > most else ''})" if names else "0"


def nearest(given: str, legal: Iterable[Any], what: str = "Settings") -> str:
    """Advice for a name that is not legal: the one that was probably meant, or all of them."""
    names = [str(name) for name in legal]
    # fp16 and fp64 are no slip of the pen: names that differ in digits only mean different things.
    other = [name for name in names if _without_digits(name) != _without_digits(given)]
    near = difflib.get_close_matches(given, other, n=1, cutoff=0.6)
    if not near:
        # A key given without its section, such as lr for learn.lr, is a common slip.
        near = [name for name in names if name.rsplit(".", 1)[-1] == given.rsplit(".", 1)[-1]]
    return f"Did you mean '{near[0]}'?" if near else f"{what} are: {', '.join(names)}."


def _without_digits(name: str) -> str:
    return "".join(letter for letter in name if not letter.isdigit())


def require_choice(what: str, value: Any, choices: Iterable[str], advice: str = "") -> None:
    """raises ValueError for a value that is none of the names to choose from."""
    names = list(choices)
    if value not in names:
        found = advice or nearest(str(value), names, "Choices")
        raise ValueError(f"{what}: expected one of {', '.join(names)}, got {value!r}. {found}")


def require_integer(what: str, value: Any, least: int = 1, advice: str = "", *, kind: Any = numbers.Integral) -> None:
    """raises ValueError for what is no integer of at least `least`; True and False are none, int refuses NumPy's."""
    if isinstance(value, bool) or not isinstance(value, kind) or int(value) < least:
        raise ValueError(f"{what}: expected an integer >= {least}, got {value!r}. {advice}".rstrip())


def require_seed(what: str, value: Any) -> None:
    """raises ValueError for what some generator of random numbers does not take as its seed."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= int(value) <= MAX_SEED:
        raise ValueError(f"{what}: expected an integer from 0 to {MAX_SEED}, got {shown(value)}. Choose another seed.")


def _located(cls: type, location: tuple[int | str, ...]) -> tuple[list[int | str], str, FieldInfo | None]:
    """(keys, dotted path, field) of an error's location; the field is that of the innermost record on the way.

    Items of tuples and lists are told apart only where they are records.
    """
    keys: list[int | str] = []
    parts: list[str] = []
    info: FieldInfo | None = None
    kind: Any = cls
    for step in location:
        kind = _without_none(kind)
        if is_record(kind):
            names = fields_of(kind)
            name = list(names)[step] if isinstance(step, int) and step < len(names) else str(step)
            info = names.get(name)
            kind = None if info is None else info.annotation
            keys.append(name)
            parts.append(name)
            continue
        kind = _item_type(kind)
        if is_record(kind):
            keys.append(step)
            parts.append(f"[{step}]" if isinstance(step, int) else str(step)[:200])
            info = None
        elif isinstance(step, str) and kind is not None:
            keys.append(step)
            parts.append(step[:200])
            info = FieldInfo.from_annotation(kind)
    return keys, ".".join(parts).replace(".[", "["), info


def _without_none(kind: Any) -> Any:
    """X of X | None, where locations have no step for the choice; every other type as it is."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind
    others = [arg for arg in typing.get_args(kind) if arg is not type(None)]
    return others[0] if len(others) == 1 else kind


def _item_type(kind: Any) -> Any:
    """Type of the values of a mapping, of the items of a list, or of the record in a union; None for others."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _item_type(args[0])
    if origin in (typing.Union, types.UnionType):
        return next((found for arg in args if (found := arg if is_record(arg) else _item_type(arg))), None)
    if origin in (list, tuple):
        return next((arg for arg in args if is_record(arg)), None)
    return args[1] if len(args) == 2 else None


def _described_items(origin: Any, args: tuple[Any, ...], metadata: list[Any]) -> str:
    endless = origin is list or Ellipsis in args
    item = described(args[0])[0] if args else "values"
    count = next((m.min_length for m in metadata if isinstance(m, MinLen)), None) if endless else len(args)
    if endless and any(isinstance(m, MaxLen) and m.max_length != count for m in metadata):
        count = None
    return f"a list, each item {item}" if endless and count is None else f"{count} values, each {item}"


def _range(metadata: Iterable[Any]) -> str:
    words = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"}
    bounds = {words[type(m)]: getattr(m, words[type(m)]) for m in metadata if type(m) in words}
    if set(bounds) == {"ge", "le"}:
        return f" from {bounds['ge']} to {bounds['le']}"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    shown_bounds = [f"{sign} {bounds[name]}" for name, sign in signs.items() if name in bounds]
    return f" {' and '.join(shown_bounds)}" if shown_bounds else ""


def _suggestion(info: FieldInfo, given: Any) -> str:
    """What to do, from the field: an example, the value that was nearly hit, the default."""
    if typing.get_origin(info.annotation) is Literal:
        return nearest(str(given), typing.get_args(info.annotation), "Choices")
    if info.examples:
        return f"Write for example {info.examples[0]}."
    if info.is_required():
        example = _EXAMPLES.get(typing.cast(type, info.annotation))
        return "" if example is None else f"Write for example {example}."
    default = default_of(info)
    return "Leave it out for the default." if default is None else f"The default is {default!r}."


def part_of(cls: type[T], whole: Any) -> T:
    """The record `cls` of the values that a record with more fields has for it."""
    return cls(**{name: getattr(whole, name) for name in fields_of(cls)})


def plain(value: Any) -> Any:
    """Nested values as YAML and JSON can hold them: lists for tuples, text for paths, dicts for records."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    # YAML writes plain str only; some versions are subclasses of it.
    return str(value) if isinstance(value, (Path, str)) else value
