"""Checks that several functions make of what they are given: one spelling and one sentence for each kind.

`what` is where and what, such as "adamw_step, grad"; `advice` says what to do. torch.compile traces these functions:
texts are made where something is refused and nowhere else.
"""

from __future__ import annotations

import numbers
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

_INFINITY = float("inf")
_SIZES = (int, torch.SymInt, numbers.Integral)  # symbolic under torch.compile; the first is the usual one
_NUMBERS: tuple[Any, ...] = (
    float,
    *_SIZES,
    torch.SymFloat,
    numbers.Real,
    Tensor,
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def kind_of(value: Any) -> str:
    """What came, in the words of messages: "torch.float32 (2, 3)", or its type."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def require_tensor(
    what: str,
    tensor: Any,
    *,
    dtypes: Collection[torch.dtype] = (),
    shape: Sequence[Any] | None = None,
    device: torch.device | None = None,
    contiguous: bool = False,
    advice: str = "",
    error: type[Exception] = ValueError,
) -> None:
    """Refuse what is no tensor of one of these dtypes, of this shape, on this device.

    shape   sizes; a name stands for any size >= 1, a leading ... for any number of sizes: ("N", "K"), (..., 128)
    raises  `error` for another kind of value or dtype, ValueError for the rest; one sentence tells of everything.
    """
    is_kind = isinstance(tensor, Tensor) and (not dtypes or tensor.dtype in dtypes)
    if not is_kind or not _fits(tensor, shape, device, contiguous):
        words = ["contiguous"] * contiguous + [" or ".join(map(str, dtypes)) or "a tensor"]
        words += [_shown(shape)] * (shape is not None) + [f"on {device}"] * (device is not None)
        got = kind_of(tensor)
        if isinstance(tensor, Tensor):
            got += f" on {tensor.device}" * (device is not None) + f" with strides {tensor.stride()}" * contiguous
        raise (ValueError if is_kind else error)(f"{what}: expected {' '.join(words)}, got {got}. {advice}".rstrip())


def require_number(
    what: str,
    value: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    advice: str = "",
    integer: bool = False,
) -> None:
    """Refuse what is no number (or no integer), and a number outside its bounds (as in pydantic), infinite or NaN."""
    if not isinstance(value, _SIZES if integer else _NUMBERS):
        raise ValueError(
            f"{what}: expected {'an integer' if integer else 'a number'}, got {value!r}. {advice}".rstrip()
        )
    # Not math.isfinite: torch.compile cannot trace it for a number that changed between two calls.
    if not (
        -_INFINITY < value < _INFINITY
        and (ge is None or value >= ge)
        and (gt is None or value > gt)
        and (le is None or value <= le)
        and (lt is None or value < lt)
    ):
        is_finite = -_INFINITY < value < _INFINITY
        bounds = ((">=", ge), (">", gt), ("<=", le), ("<", lt))
        words = " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
        wanted = f"expected a {'' if is_finite else 'finite '}number {words}".rstrip()
        raise ValueError(f"{what}: {wanted}, got {value}. {advice}".rstrip())


def require_parts(what: str, value: Any, *names: str, advice: str = "") -> None:
    """Refuse what is no tuple or list with one value for each of these names."""
    if not isinstance(value, (tuple, list)) or len(value) != len(names):
        raise ValueError(f"{what}: expected ({', '.join(names)}), got {value!r}. {advice}".rstrip())


def require_sizes(what: str, sizes: Any, advice: str = "") -> None:
    """Refuse what is not two integers >= 1."""
    is_two = isinstance(sizes, (tuple, list)) and len(sizes) == 2
    if not is_two or any(isinstance(n, bool) or not isinstance(n, _SIZES) or n < 1 for n in sizes):
        got = tuple(sizes) if isinstance(sizes, (tuple, list)) else repr(sizes)
        raise ValueError(f"{what}: expected two integers >= 1, got {got}. {advice}".rstrip())


def require_multiple(what: str, value: int, of: int, advice: str = "", *, named: str = "") -> None:
    """Refuse an integer that `of` does not divide; named: what `of` is, "local_batch_size = " for example."""
    if value % of:
        raise ValueError(f"{what}: expected a multiple of {named}{of}, got {value}. {advice}")


def require_at_least(what: str, value: int, least: int, advice: str = "", *, named: str = "") -> None:
    """Refuse a number of things that is too small; named: what `least` is, "batch_size = " for example."""
    if value < least:
        raise ValueError(f"{what}: expected at least {named}{least}, got {value}. {advice}")


def require_finite(what: str, values: Tensor, advice: str = "", *, error: type[Exception] = ValueError) -> None:
    """Refuse a tensor that holds NaN or infinity."""
    if not all_finite(values):
        count = int((~torch.isfinite(values)).sum())
        got = values.item() if values.numel() == 1 else f"{count} that are NaN or infinite"
        raise error(f"{what}: expected finite values, got {got}. {advice}")


def all_finite(values: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    The least and the largest value are NaN where any value is; reading them takes a twentieth of isfinite's time on a
    CPU and no memory.
    """
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(values.detach().aminmax())).all())


def _fits(tensor: Tensor, shape: Sequence[Any] | None, device: torch.device | None, contiguous: bool) -> bool:
    if (device is not None and tensor.device != device) or (contiguous and not tensor.is_contiguous()):
        return False
    sizes = tensor.shape
    if shape is None or sizes == shape:
        return True
    if len(shape) > 0 and shape[0] is ...:
        shape = shape[1:]
        sizes = sizes[-len(shape) :]
    return len(sizes) == len(shape) and all(
        size >= 1 if isinstance(wanted, str) else size == wanted for size, wanted in zip(sizes, shape, strict=True)
    )


def _shown(shape: Sequence[Any] | None) -> str:
    names = ["..." if size is ... else str(size) for size in shape or ()]
    return f"({', '.join(names)}{',' * (len(names) == 1)})"
