"""States that a model is put into for a while, and out of again whatever happens: calibration, evaluation, training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from patch.models.structure import decoder_blocks, decoder_of


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Run the body without gradients, dropout or key-value cache; all of it is as before afterwards."""
    config: Any = getattr(decoder_of(model), "config", None)
    training = [module for module in model.modules() if module.training]
    had_cache = getattr(config, "use_cache", None)
    try:
        model.eval()
        if had_cache is not None:
            config.use_cache = False
        with torch.no_grad():
            yield
    finally:
        if had_cache is not None:
            config.use_cache = had_cache
        # Module by module: a caller may have frozen only parts of the model in eval mode.
        for module in training:
            module.training = True


@contextmanager
def placed(module: nn.Module, device: torch.device | str | None) -> Iterator[nn.Module]:
    """Keep `module` on `device` during the body, then put it back; None leaves it where it is."""
    home = block_device(module)
    try:
        yield module if device is None else module.to(device)
    finally:
        if device is not None:
            module.to(home)


@contextmanager
def streamed(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """Run the model on `device` during the body, its decoder's blocks one at a time; None changes nothing.

    Between calls blocks are where they were, so that a model larger than the device's memory runs. What is around them
    (embeddings, head) is on the device for the whole body.
    """
    if device is None:
        yield
        return
    home = block_device(model)
    blocks = decoder_blocks(model)[1]
    inside = {id(tensor) for tensor in (*blocks.parameters(), *blocks.buffers())}
    around = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in inside]
    with ExitStack() as undo:
        undo.callback(_send, around, home)
        _send(around, device)
        for block in blocks:
            undo.callback(block.to, home)  # an exception inside a block skips its post-hook
            undo.callback(block.register_forward_pre_hook(lambda module, args: _fetch(module, device)).remove)
            undo.callback(block.register_forward_hook(lambda module, args, output: _fetch(module, home)).remove)
        yield


def _fetch(module: nn.Module, device: torch.device | str) -> None:
    module.to(device)


def _send(tensors: list[torch.Tensor], device: torch.device | str) -> None:
    for tensor in tensors:
        tensor.data = tensor.data.to(device)


def block_device(block: nn.Module) -> torch.device:
    """Device of a block's first parameter; a model may be spread over several devices."""
    return next(block.parameters()).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has the training flag it came with."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: what a model caches must stay usable in training
            yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def prepared(model: nn.Module, *, grad_checkpoint: bool) -> Iterator[None]:
    """Frozen weights, train mode, no key-value cache, checkpointing if asked; all undone at the end."""
    device = next(model.parameters()).device
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model_config: Any = getattr(model, "config", None)
    use_cache = getattr(model_config, "use_cache", None)
    checkpointing = grad_checkpoint and not _is_checkpointing(model)
    generators = [] if not torch.cuda.is_available() else [torch.cuda.current_device()]
    with torch.random.fork_rng(devices=generators):
        try:
            model.requires_grad_(False)
            model.train()
            if use_cache is not None:
                model_config.use_cache = False
            if checkpointing:
                _set_checkpointing(model, True)
            yield
        finally:
            if checkpointing:
                _set_checkpointing(model, False)
            if use_cache is not None:
                model_config.use_cache = use_cache
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module, was_training in training.items():
                module.training = was_training
            model.to(device)


def _is_checkpointing(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _set_checkpointing(model: nn.Module, enabled: bool) -> None:
    # transformers 5.20 renamed the methods of activation checkpointing; the older name goes away in version
    # 6.
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    if enabled:
        # Reentrant checkpointing needs an input with gradient, which frozen embeddings do not give.
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    else:
        getattr(model, f"{name}_disable")()
