"""What long training commands say before they begin, on stderr and once for all processes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
_SAMPLED_BLOCKS = 64


def say_steps(steps: int, blocks: Tensor, batch_size: int, epochs: int, source: str, tokenizer: Any) -> None:
    """Steps, tokens, and the share that they are of the text that blocks (blocks, tokens) were cut from."""
    from patch.files.progress import say

    used = blocks[: steps // epochs * batch_size]
    passes = "" if epochs == 1 else f" in {epochs} passes"
    say(
        f"plan: {steps:,} optimiser steps of {batch_size} blocks of {blocks.shape[1]} tokens: "
        f"{epochs * used.numel():,} tokens{passes}{_share_of_text(source, tokenizer, used)}"
    )


def warn_of_few_steps(steps: int, batch: tuple[str, int], epochs: tuple[str, int], *, steps_flag: str = "") -> None:
    """Warn where steps are too few to learn from.

    batch, epochs  flag and value of the blocks a step and of the passes, which give more steps of the same text
    steps_flag     the flag that the number of steps was asked for with, "" where it follows from the text
    """
    from patch.runs.progress import FEW_STEPS

    if steps >= FEW_STEPS:
        return
    smaller, passes = max(1, batch[1] * steps // FEW_STEPS), -(-FEW_STEPS * epochs[1] // steps)
    advice = f"{batch[0]} {smaller}, a smaller --seqlen, or {epochs[0]}{passes} for more passes over the text"
    advice = f"{steps_flag} {2 * FEW_STEPS}" if steps_flag else advice
    logger.warning(
        "%d optimiser steps are too few to learn from: %d or more are usual. Give %s", steps, FEW_STEPS, advice
    )


def _share_of_text(source: str, tokenizer: Any, blocks: Tensor) -> str:
    """ ", about 12 % of the text" for a local .txt; "" for others, whose size says little about their text."""
    path = Path(source)
    if path.suffix != ".txt" or not path.is_file():
        return ""
    sample = blocks[:_SAMPLED_BLOCKS].flatten()
    bytes_a_token = len(tokenizer.decode(sample).encode("utf-8", "surrogatepass")) / sample.numel()
    share = min(1.0, blocks.numel() * bytes_a_token / path.stat().st_size)
    return f", about {share:.0%} of the text" if share >= 0.01 else ", less than 1 % of the text"
