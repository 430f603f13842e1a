"""Sequential calibration: the inputs of every decoder block, one block at a time.

One-shot pruning wants, for each block, the inputs it sees once all earlier blocks are pruned. The model itself is run
only to learn what its blocks are called with: hidden states of the first block, and attention mask, positions and
rotary embeddings of every block, which differ between blocks (Gemma-3 alternates sliding-window and global attention).
From there the blocks are run by hand, so only one block has to be on the accelerator, and memory holds one hidden state
per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from patch.models.modes import block_device
from patch.models.structure import decoder_blocks, decoder_of, input_embeddings

_NO_CHAIN = "This architecture cannot be calibrated block by block; use method='magnitude'."


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with besides its hidden states."""

    args: tuple
    kwargs: dict[str, Any]


class _Recorded(Exception):
    """Ends a forward pass once the calls that were asked for are recorded."""


class BlockInputs:
    """Inputs of one decoder block after the other, for every calibration sample.

    hidden  one (1, seqlen, hidden) tensor per sample: what the next block to be advanced through gets.
    Made by `capture_block_inputs`; blocks must be advanced through in order.
    """

    def __init__(self, hidden: list[torch.Tensor], calls: list[list[BlockCall]]):
        self.hidden = hidden
        self._calls = calls

    def beside(self) -> BlockInputs:
        """The same inputs again, to be advanced through the blocks on their own."""
        return BlockInputs(list(self.hidden), self._calls)

    @property
    def calls_alike(self) -> bool:
        """Whether all samples share the calls of the blocks, so that several can go through a block at once."""
        return len(self._calls) == 1

    def call(self, index: int, sample: int) -> BlockCall:
        """The call of block `index` for `sample`; all samples share one when they are called alike."""
        return self._calls[sample if len(self._calls) > 1 else 0][index]

    def run(self, index: int, block: nn.Module) -> Iterator[torch.Tensor]:
        """Yield the block's output (1, seqlen, hidden) for each sample in turn."""
        for sample, hidden in enumerate(self.hidden):
            yield self.output(index, block, sample, hidden)

    def output(self, index: int, block: nn.Module, sample: int, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output (1, seqlen, hidden) for a sample's hidden states."""
        device = block_device(block)
        call = self.call(index, sample)
        return hidden_of(block(moved(hidden, device), *moved(call.args, device), **moved(call.kwargs, device)))

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the hidden states by the block's outputs, sample by sample."""
        for sample, output in enumerate(self.run(index, block)):
            self.hidden[sample] = output


def capture_block_inputs(
    model: nn.Module, token_ids: torch.Tensor, device: torch.device | str | None = None
) -> BlockInputs:
    """Hidden states of the first block and the calls of every block, for each sample.

    token_ids  (samples, seqlen) int64.
    device     where each block is put while it runs; None: where it is.

    The first two samples run through the whole dense model. When every block is called alike for both, the
    calls are kept once and the other samples stop before the first block; otherwise (a model that feeds
    token-dependent tensors to its blocks) they are recorded for each sample. Call inside `calibration_mode`.

    Raises ValueError for a model that does more than chain its blocks.
    """
    _, blocks = decoder_blocks(model)
    decoder = decoder_of(model)
    hidden: list[torch.Tensor] = []
    calls: list[list[BlockCall]] = []
    for sample in range(len(token_ids)):
        ids = token_ids[sample : sample + 1]
        count = len(blocks) if sample < 2 else 1
        first_hidden, recorded = _record(decoder, blocks, ids, count, device)
        if calls and not _same(recorded, calls[0][:count]):
            return _capture_each(decoder, blocks, token_ids, device)
        hidden.append(first_hidden)
        calls = calls or [recorded]
    return BlockInputs(hidden, calls)


def _capture_each(
    decoder: nn.Module, blocks: nn.ModuleList, token_ids: torch.Tensor, device: torch.device | str | None
) -> BlockInputs:
    """The calls of every block for every sample, each from a full run of the dense model."""
    hidden: list[torch.Tensor] = []
    calls: list[list[BlockCall]] = []
    for sample in range(len(token_ids)):
        first_hidden, recorded = _record(decoder, blocks, token_ids[sample : sample + 1], len(blocks), device)
        hidden.append(first_hidden)
        calls.append(recorded)
    return BlockInputs(hidden, calls)


def _record(
    decoder: nn.Module,
    blocks: nn.ModuleList,
    token_ids: torch.Tensor,
    count: int,
    device: torch.device | str | None,
) -> tuple[torch.Tensor, list[BlockCall]]:
    """Run the decoder until block `count - 1` is called: (hidden states of block 0, calls up to there)."""
    recorder = _Recorder(count, device)
    with ExitStack() as hooks:
        for index, block in enumerate(blocks[:count]):
            for handle in recorder.attach(index, block):
                hooks.callback(handle.remove)
            if device is not None:
                # An exception inside a block skips its post-hook, which would leave it on the accelerator.
                hooks.callback(block.to, block_device(block))
        try:
            decoder(token_ids.to(_embedding_device(decoder)))
        except _Recorded:
            return cast(torch.Tensor, recorder.first_hidden), recorder.calls
    got = f"got {len(recorder.calls)} of the first {count} called"
    raise ValueError(f"expected the model to call its {len(blocks)} blocks in order, {got}. {_NO_CHAIN}")


class _Recorder:
    """Hooks that note each block's call and check that the blocks form a plain chain."""

    def __init__(self, count: int, device: torch.device | str | None):
        self.calls: list[BlockCall] = []
        self.first_hidden: torch.Tensor | None = None
        self._count = count
        self._device = device
        self._previous: torch.Tensor | None = None
        self._home: torch.device | None = None

    def attach(self, index: int, block: nn.Module) -> list[Any]:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            hidden, args, kwargs = split_call(args, kwargs)
            self._note(index, hidden, BlockCall(moved(args, None), moved(kwargs, None)))
            if self._device is None:
                return (hidden, *args), kwargs
            self._home = block_device(module)
            module.to(self._device)
            return (moved(hidden, self._device), *moved(args, self._device)), moved(kwargs, self._device)

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            if self._device is not None:
                module.to(self._home)
                output = moved(output, self._home)
            self._previous = hidden_of(output)
            return output

        return [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]

    def _note(self, index: int, hidden: torch.Tensor, call: BlockCall) -> None:
        if index != len(self.calls) or (index > 0 and not self._is_previous(hidden)):
            wanted = "expected a decoder whose blocks are called once, in order, each on the output of the one before"
            raise ValueError(f"{wanted}, got another computation around block {index}. {_NO_CHAIN}")
        if index == 0:
            self.first_hidden = hidden
        self.calls.append(call)
        if len(self.calls) == self._count:
            raise _Recorded

    def _is_previous(self, hidden: torch.Tensor) -> bool:
        previous = self._previous
        return hidden is previous or torch.equal(hidden, cast(torch.Tensor, previous).to(hidden.device))


def split_call(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple, dict[str, Any]]:
    """(hidden states, other args, other kwargs) of a block's call."""
    if args:
        return args[0], args[1:], kwargs
    return (
        kwargs["hidden_states"],
        (),
        {key: value for key, value in kwargs.items() if key != "hidden_states"},
    )


def hidden_of(output: Any) -> torch.Tensor:
    # Some architectures return (hidden states, attention weights, ...).
    return output[0] if isinstance(output, tuple) else output


def _embedding_device(decoder: nn.Module) -> torch.device:
    embedding = input_embeddings(decoder) if hasattr(decoder, "get_input_embeddings") else decoder
    return block_device(embedding)


def moved(value: Any, device: torch.device | str | None) -> Any:
    """Copy of a nest of containers with its tensors on `device` (None: where they are).

    The containers are rebuilt even when nothing moves: a block that writes into a dict it was given must not
    change what the next sample gets.
    """
    return each_tensor(value, lambda tensor: tensor if device is None else tensor.to(device))


def each_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Copy of a nest of containers with its tensors changed; other values and other mappings are as they are."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(each_tensor(item, change) for item in value)
    if type(value) is dict:
        return {key: each_tensor(item, change) for key, item in value.items()}
    return value


def _same(a: Any, b: Any) -> bool:
    """Whether two recorded values are equal in every tensor, container and plain value."""
    if isinstance(a, BlockCall) and isinstance(b, BlockCall):
        return _same(a.args, b.args) and _same(a.kwargs, b.kwargs)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.dtype == b.dtype and torch.equal(a, b))
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    # Blocks write into other mappings what later ones read (Gemma-4's shared keys): every sample has one of its own.
    return a is b or (not isinstance(a, Mapping) and a == b)
