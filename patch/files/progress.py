"""How far a long work is: a bar with the time left on a terminal, a plain line now and then where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

LINE_SECONDS = 30.0
# Less than this left after the first part is not worth a line.
_SHORT_SECONDS = 10.0


def say(text: str, *, show: bool = True) -> None:
    """One line on stderr, where plans and progress go: stdout is for results."""
    if show:
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Shows on stderr how far its `with` body is, by calls of `update`.

    total  parts in all
    what   is done, "pruning (wanda)" for example
    unit   of the parts, in the singular
    show   False: nothing is shown
    On a terminal that is a bar; otherwise a line after the first part, unless little is left, then one every 30 s.
    """

    def __init__(self, total: int, what: str, unit: str, *, show: bool = True):
        self._total, self._what, self._unit, self._show = total, what, unit, show
        self._done = 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if self._show and sys.stderr.isatty():
            self._bar = tqdm(total=self._total, desc=self._what, unit=self._unit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, parts: int = 1, note: str = "") -> None:
        """Count parts that are done; note: what to show behind them, "loss 3.21" for example."""
        self._done += parts
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(parts)
        elif self._show:
            self._print_when_due(note)

    def _print_when_due(self, note: str) -> None:
        now = time.monotonic()
        left = (now - self._start) / self._done * (self._total - self._done)
        is_first = self._last == self._start
        if left > 0 and (left >= _SHORT_SECONDS if is_first else now - self._last >= LINE_SECONDS):
            self._last = now
            counts = f"{self._done} of {self._total} {self._unit}s, about {duration(left)} left"
            say(f"{self._what}: {counts}{f' ({note})' if note else ''}")


def tracked(items: Collection[T], what: str, unit: str, *, show: bool = True) -> Iterator[T]:
    """The items one after the other, each counted when the next is asked for; see `Progress`."""
    with Progress(len(items), what, unit, show=show) as progress:
        for item in items:
            yield item
            progress.update()


def duration(seconds: float) -> str:
    """A time as people say it: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
