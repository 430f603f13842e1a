"""A demo that takes seconds."""

from __future__ import annotations

import random

TINY = (
    "model.vocab_size=300",
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.layers=1",
    "model.heads=2",
    "model.block_size=32",
    "model.steps=4",
    "model.batch_size=2",
    "learn.steps=7",
    "learn.batch_size=2",
    "tile=[32, 32]",
    "blocks.epochs=1",
    "targets=[0.35]",
    "more_targets=[0.25]",
    "calibration_blocks=4",
    "heldout_tokens=64",
    "new_tokens=4",
)


def write_sources(folder, count: int = 48) -> None:
    """Files that look like small programs; every part of the split gets some."""
    words = random.Random(0)
    (folder / "package").mkdir(parents=True)
    for number in range(count):
        lines = [f"def function_{words.randrange(9)}(x):\n    return x + {words.randrange(99)}\n" for _ in range(30)]
        where = folder / "package" if number % 2 else folder
        (where / f"module_{number}.py").write_text("\n".join(lines))
