"""Sets of zero-shot tasks, by the name that `patch-llm eval --tasks` takes. Imports nothing heavy: help lists them."""

from __future__ import annotations

from collections.abc import Iterable

TASK_SETS: dict[str, tuple[str, ...]] = {
    # The eight of the paper's tables; MMLU (57 subjects, weighted by their questions) counts once in the mean.
    "paper": ("mmlu", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa", "race", "hellaswag"),
}


def task_set_names() -> list[str]:
    """Names of all sets."""
    return list(TASK_SETS)


def expanded(names: Iterable[str]) -> list[str]:
    """Names of tasks, each once, in place of the sets among them."""
    return list(dict.fromkeys(task for name in names for task in TASK_SETS.get(name, (name,))))
