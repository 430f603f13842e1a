"""The dicts and namespaces of settings that the original PATCH code takes, read into records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch

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


def path_of(value: Any, what: str) -> str | os.PathLike[str]:
    """A name or path; raises TypeError for anything else."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{what}: expected a name or path, got {type(value).__name__}. Pass text or a pathlib.Path.")
    return value


def require_tokenizer(tokenizer: Any) -> None:
    """raises TypeError for what does not turn text into tokens."""
    if not callable(tokenizer):
        advice = "Pass AutoTokenizer.from_pretrained(...) of the model."
        raise TypeError(f"tokenizer: expected the model's tokenizer, got {type(tokenizer).__name__}. {advice}")


def require_dtype(dtype: Any) -> None:
    """raises ValueError for what is no dtype of weights; "auto" is that of the checkpoint."""
    if dtype == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    advice = "Pass torch.bfloat16 for example."
    raise ValueError(f"dtype: expected a floating torch.dtype or 'auto', got {dtype!r}. {advice}")
