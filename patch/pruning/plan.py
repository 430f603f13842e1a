"""What a long pruning will do, said before it starts: layers, text, memory; and whether the text is enough for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patch.files.progress import say
from patch.models.structure import decoder_blocks, decoder_of

logger = logging.getLogger(__name__)

# Python with torch and transformers, measured.
PROCESS_BYTES = 500 << 20
# Scores, their order, a working copy and its errors, for each weight of the layer that is pruned.
WORK_BYTES = 20
# The damped Hessian, its factor, its inverse and that one's factor.
WORK_STATISTICS = 4
# Of a weight while its block is fitted: master, gradient, two moments and a copy in float32, two more of 16 bits.
FIT_BYTES = 24


def say_plan(
    what: str,
    how: str,
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    calibration: Tensor | None = None,
    new_statistics: Callable[[Tensor], Any] | None = None,
    *,
    show: bool,
) -> None:
    """One line on stderr: how many layers are worked on, on which text, and the peak memory.

    what, how       is done, "pruning" with "wanda" for example
    new_statistics  as of `patch.pruning.sequential.update_blocks`; None: no statistics are gathered
    """
    if not show:
        return
    text, blocks = "", ""
    if calibration is not None:
        text, blocks = f": {samples_text(calibration)}", f" in {len(decoder_blocks(model)[1])} blocks"
    peak = peak_bytes(model, linears, calibration, new_statistics)
    say(f"{what} {len(linears)} layers{blocks} with {how}{text}; peak memory about {peak / 1e9:.1f} GB")


def samples_text(calibration: Tensor) -> str:
    """How much calibration text there is."""
    samples, seqlen = calibration.shape
    return f"{samples} samples of {seqlen} tokens ({samples * seqlen:,} tokens)"


def peak_bytes(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    calibration: Tensor | None,
    new_statistics: Callable[[Tensor], Any] | None,
) -> int:
    """About how much memory pruning block by block needs in all, the model included.

    It counts statistics for every layer, though those that read the same tensors share theirs.
    """
    total = PROCESS_BYTES + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    total += sum(linear.weight.numel() for linear in linears.values())  # masks
    work = max(linear.weight.numel() * WORK_BYTES for linear in linears.values())
    if calibration is None or new_statistics is None:
        return total + work
    sizes = {linear: _statistics_bytes(linear, new_statistics) for linear in linears.values()}
    total += max(
        sum(size for linear, size in sizes.items() if linear in set(block.modules()))
        for block in decoder_blocks(model)[1]
    )
    work += WORK_STATISTICS * max(sizes.values())
    item = next(iter(sizes)).weight.element_size()
    hidden = getattr(getattr(decoder_of(model), "config", None), "hidden_size", 0)
    widest = max(max(linear.weight.shape) for linear in sizes)
    return total + calibration.numel() * hidden * item + max(work, 8 * calibration.shape[1] * widest * item)


def _statistics_bytes(linear: nn.Linear, new_statistics: Callable[[Tensor], Any]) -> int:
    statistics = new_statistics(torch.empty_like(linear.weight, device="meta"))
    return sum(value.nbytes for value in vars(statistics).values() if isinstance(value, Tensor))


def reconstruction_bytes(model: nn.Module, calibration: Tensor, batch_size: int) -> int:
    """About how much memory the fit of blocks needs beside the model.

    Hidden states four times (inputs, targets, outputs before and after); of the largest block a float32 copy, masters,
    gradients and moments; activations as Korthikanti et al. ("Reducing Activation Recomputation", 2022, eq. 2) count
    them, without the attention's.
    """
    blocks = decoder_blocks(model)[1]
    weights = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    item = next(blocks.parameters()).element_size()
    hidden = getattr(getattr(decoder_of(model), "config", None), "hidden_size", 0)
    activations = 34 * 2 * batch_size * calibration.shape[1] * hidden
    return 4 * calibration.numel() * hidden * item + FIT_BYTES * max(weights) + activations


def free_bytes(device: torch.device) -> int:
    """Memory that is left on a GPU, or in the host as Linux counts it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def warn_of_few_tokens(tokens: Mapping[str, int], linears: Mapping[str, nn.Linear]) -> None:
    """Warn of layers whose Hessian cannot have full rank; tokens: {layer name: how many it is made from}."""
    few = [name for name, count in tokens.items() if count < linears[name].in_features]
    if few:
        worst = max(few, key=lambda name: linears[name].in_features / max(1, tokens[name]))
        logger.warning(
            "%d of %d layers have more inputs than calibration has tokens for them, '%s' %d for %d tokens: only "
            "damping makes such a Hessian invertible. Give more text (--nsamples, --seqlen)",
            len(few),
            len(linears),
            worst,
            linears[worst].in_features,
            tokens[worst],
        )
