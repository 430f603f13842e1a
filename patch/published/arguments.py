"""The dicts and namespaces of settings that the original PATCH code takes, read into records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from patch.settings import check_keys

T = TypeVar("T")


def values_of(given: Mapping[str, Any] | Any, what: str) -> dict[str, Any]:
    """The values of a dict or a namespace by name; raises TypeError for anything else."""
    is_namespace = hasattr(given, "__dict__") and not isinstance(given, type) and not callable(given)
    if not isinstance(given, Mapping) and not is_namespace:
        raise TypeError(f"{what}: expected a dict or a namespace, got {type(given).__name__}. Pass settings by name.")
    return dict(given) if isinstance(given, Mapping) else dict(vars(given))


def record_of(cls: type[T], values: Mapping[str, Any], what: str, also: Iterable[str] = ()) -> T:
    """An instance of a record; raises ValueError that begins with `what`. also: names that advice may name."""
    check_keys(cls, values, what, also=also)
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
