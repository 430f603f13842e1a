"""One-shot pruning of a whole model, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from patch.calibration import BlockInputs, calibration_mode, capture_block_inputs, check_calibration, placed
from patch.models import decoder_blocks, maskable_linears, set_keep_mask
from patch.pruning.methods import Method, get_method, make_options
from patch.pruning.selection import Pruned, PruneOptions, check_inputs, check_weight


def prune_model(
    model: nn.Module,
    method: str,
    *,
    pattern: str = "2:4",
    sparsity: float = 0.5,
    calibration: torch.Tensor | None = None,
    shift_zero_metrics: bool = False,
    block_size: int | None = None,
    damping: float = 0.01,
    precision: str = "fp32",
    exclude: Sequence[str] = (),
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Prune the maskable layers of a causal language model in place; returns {layer name: keep (N, K) bool}.

    Blocks are pruned in order. All layers of a block use statistics of the still dense block, fed by the
    already pruned blocks before it. The keep masks are also attached to the layers
    (`patch.models.keep_masks`).

    calibration  (samples, seqlen) int64 token ids, read by wanda and sparsegpt, not by magnitude.
    exclude      fnmatch patterns over names of layers that stay dense.
    device       where each block is put while it is worked on; None: where it is.
    Other arguments as in `prune_weight`. Arguments, weights and token ids are checked before any work.
    Train/eval state, `use_cache` and hooks are as before afterwards, also after an exception; layers that
    were pruned by then stay pruned and have their mask. Source: the sequential scheme of SparseGPT and Wanda.
    """
    chosen = get_method(method)
    options = make_options(pattern, sparsity, block_size, damping, shift_zero_metrics, precision)
    linears = maskable_linears(model, exclude)
    if chosen.statistics is not None:
        if calibration is None:
            raise ValueError(
                f"calibration: expected token ids for method '{method}', got none. Pass windows of (samples, "
                "seqlen) token ids, or use method='magnitude'."
            )
        check_calibration(model, calibration)
        decoder_blocks(model)
    _check_device(device)
    for name, linear in linears.items():
        check_weight(linear.weight, options, f"layer '{name}'")

    if options.sparsity == 0:
        for linear in linears.values():
            set_keep_mask(linear, torch.ones_like(linear.weight, dtype=torch.bool))
        return {name: linear.keep_mask for name, linear in linears.items()}
    # tqdm: None hides the bar when stderr is not a terminal.
    bar_options = {"desc": f"prune ({method})", "disable": None if progress else True}
    if chosen.statistics is None:
        _prune_layers(chosen, linears, options, device, bar_options)
    else:
        _prune_sequentially(model, chosen, linears, calibration, options, device, bar_options)
    return {name: linear.keep_mask for name, linear in linears.items()}


@torch.no_grad()
def _prune_layers(
    chosen: Method,
    linears: Mapping[str, nn.Linear],
    options: PruneOptions,
    device: torch.device | str | None,
    bar_options: Mapping[str, Any],
) -> None:
    """Prune each layer on its own, for a method without calibration."""
    for linear in tqdm(linears.values(), unit="layer", **bar_options):
        with placed(linear, device):
            _store(linear, chosen.prune(linear.weight, None, options))


def _prune_sequentially(
    model: nn.Module,
    chosen: Method,
    linears: Mapping[str, nn.Linear],
    calibration: torch.Tensor,
    options: PruneOptions,
    device: torch.device | str | None,
    bar_options: Mapping[str, Any],
) -> None:
    """Prune block after block, each from the inputs that the pruned blocks before it produce."""
    _, blocks = decoder_blocks(model)
    with calibration_mode(model), tqdm(total=len(blocks), unit="block", **bar_options) as bar:
        inputs = capture_block_inputs(model, calibration, device)
        for index, block in enumerate(blocks):
            own = set(block.modules())
            members = {name: linear for name, linear in linears.items() if linear in own}
            with placed(block, device):
                if members:
                    _prune_block(chosen, index, block, members, inputs, options)
                if index + 1 < len(blocks):
                    inputs.advance(index, block)
            bar.update()


def _prune_block(
    chosen: Method,
    index: int,
    block: nn.Module,
    members: Mapping[str, nn.Linear],
    inputs: BlockInputs,
    options: PruneOptions,
) -> None:
    """Prune the layers of one block, all from statistics of the still dense block."""
    statistics = {name: chosen.new_statistics(linear.weight, options) for name, linear in members.items()}
    with _observed(members, statistics):
        for _ in inputs.run(index, block):
            pass
    for name, linear in members.items():
        # Popped: a Hessian is as large as a layer and is of no use once its layer is pruned.
        gathered = statistics.pop(name)
        if gathered.samples == 0:
            raise ValueError(
                f"layer '{name}': expected to see calibration inputs, got none; its block does not call it "
                "for these samples. Put it in exclude."
            )
        try:
            pruned = chosen.prune(linear.weight, gathered, options)
        except ValueError as error:
            raise ValueError(f"layer '{name}': {error}") from error
        _store(linear, pruned)


@contextmanager
def _observed(linears: Mapping[str, nn.Linear], statistics: Mapping[str, Any]) -> Iterator[None]:
    """Feed what each layer is called with to its statistics during the body."""

    def observer(name: str):
        def observe(linear: nn.Linear, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            x = x.reshape(-1, x.shape[-1])
            check_inputs(x, linear.in_features, linear.weight.device, f"layer '{name}'")
            statistics[name].add(x)

        return observe

    handles = []
    try:
        for name, linear in linears.items():
            handles.append(linear.register_forward_pre_hook(observer(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_device(device: torch.device | str | None) -> None:
    """Refuse a device that does not exist here, before the first block is moved to it."""
    try:
        kind = None if device is None else torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device: expected a torch device such as 'cuda' or 'cpu', got {device!r}. Pass None to prune "
            "where the model is."
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: expected a device of this machine, got {device!r} but torch sees no GPU. Pass None to "
            "prune where the model is."
        )


def _store(linear: nn.Linear, pruned: Pruned) -> None:
    """Give the layer its pruned weight and its mask, which then moves with it between devices."""
    linear.weight.copy_(pruned.weight)
    set_keep_mask(linear, pruned.keep)
