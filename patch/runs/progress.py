"""What a training run says while it goes on: a bar on a terminal, elsewhere a line every so often."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from patch.files.progress import LINE_SECONDS, duration, say
from patch.runs.arguments import rank

# Fewer optimiser steps than these learn next to nothing.
FEW_STEPS = 100
# The first lines say early how long it will take.
_FIRST_STEPS = (1, 2, 5, 10)


def say_once(text: str) -> None:
    """Print a line of plan or progress to stderr, once for all processes that train together."""
    say(text, show=rank() == 0)


def shows_bars() -> bool:
    """Whether there is a terminal to draw a bar on."""
    return sys.stderr.isatty()


class StepLines(TrainerCallback):
    """A line with step, loss, sparsity and time left after steps 1, 2, 5 and 10, then every so many seconds."""

    def __init__(self, say: Callable[[str], None] = say_once, every: float = LINE_SECONDS) -> None:
        self._say, self._every = say, every
        self._logs: dict[str, Any] = {}
        self._is_due = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begin = self._second_began = self._said = time.monotonic()
        self._before = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._print(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done, now = state.global_step - self._before, time.monotonic()
        if done == 1:
            self._second_began = now
        is_last = state.global_step == state.max_steps
        self._is_due = done in _FIRST_STEPS or is_last or now - self._said >= self._every

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        self._logs |= logs or {}

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._print(state)

    def _print(self, state: Any) -> None:
        """The line of the step before: only now its values are logged."""
        if not self._is_due:
            return
        self._is_due, self._said = False, time.monotonic()
        done, elapsed = state.global_step - self._before, self._said - self._begin
        # The first step is slower: it allocates, and compiles on a GPU.
        a_step = elapsed if done == 1 else (self._said - self._second_began) / (done - 1)
        left = a_step * (state.max_steps - state.global_step)
        values = [f"{name} {value:.3f}" for name, value in shown_values(self._logs).items()]
        when = f"about {duration(left)} left of {duration(elapsed + left)}" if left else f"took {duration(elapsed)}"
        self._say(f"step {state.global_step}/{state.max_steps}: {', '.join([*values, when])}")


class StepBar(ProgressCallback):
    """Trainer's progress bar with the last values behind it instead of one printed line per step."""

    training_bar: Any

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.training_bar is not None and (values := shown_values(logs or {})):
            self.training_bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)


def shown_values(logs: dict[str, Any]) -> dict[str, float]:
    """What is shown of Trainer's logged values: the token loss, and of masks that are learned their sparsity now."""
    values = {"loss": logs.get("lm_loss", logs.get("loss"))}
    if "hard_density" in logs:
        values["sparsity"] = 1.0 - logs["hard_density"]
    return {name: value for name, value in values.items() if value is not None}
