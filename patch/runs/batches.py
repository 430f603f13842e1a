"""How a run's batches are cut; settings alone must not wait for torch, which the checks bring."""

from __future__ import annotations


def accumulation_steps(name: str, batch_size: int, local_batch_size: int, processes: int) -> int:
    """Forward passes per optimiser step; raises ValueError, naming the setting `name`, for a batch left uneven."""
    from patch_kernels.checks import require_multiple

    per_pass = local_batch_size * processes
    named = f"local_batch_size * processes = {local_batch_size} * {processes} = "
    require_multiple(name, batch_size, per_pass, "Change one of them.", named=named)
    return batch_size // per_pass


def total_steps(what: str, blocks: int, name: str, batch_size: int, epochs: int) -> int:
    """Optimiser steps for a number of blocks, called `what`; what does not fill a batch is left out.

    raises  ValueError for blocks that do not fill one batch, of the size that the setting `name` gives.
    """
    from patch_kernels.checks import require_at_least

    advice = f"Give more text, shorter blocks or a smaller {name}."
    require_at_least(what, blocks, batch_size, advice, named=f"{name} = ")
    return blocks // batch_size * epochs
