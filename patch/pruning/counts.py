"""What a model's forward pass takes, counted by walking it on tensors without contents: operations and bytes.

No formula of any architecture is here: the model is built from its configuration on fake tensors (sizes and dtypes, no
bytes), reads one sample, and every product and every tensor that a backward pass would need is counted; as with an
attention mask, since nobody can know of tokens without values that none is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from patch.models.structure import decoder_blocks, maskable_linears
from patch.pruning.experts import expert_layers


@dataclass(frozen=True)
class Block:
    """Of one decoder block; a sample is one sequence.

    flops         of its forward pass on a sample
    saved_bytes   that a backward pass of a sample needs, in float32
    elems         parameters
    layers        (N, K) of its masked layers
    inputs        K of every tensor that masked layers read; those that read the same one share statistics
    """

    flops: int
    saved_bytes: int
    elems: int
    layers: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """Of a model, and of a forward pass over one sample of `seqlen` tokens.

    around_flops, around_elems  of what is in no block: embeddings, head, norms
    hidden_elems                of the hidden states between blocks
    logits_elems                of the logits
    itemsize                    bytes of a weight
    has_experts                 whether layers of experts are among the masked ones
    """

    blocks: tuple[Block, ...]
    seqlen: int
    around_flops: int
    around_elems: int
    hidden_elems: int
    logits_elems: int
    itemsize: int
    has_experts: bool = False

    @property
    def elems(self) -> int:
        """Parameters of the whole model."""
        return self.around_elems + sum(block.elems for block in self.blocks)

    @property
    def masked_elems(self) -> int:
        """Weights of the masked layers."""
        return sum(rows * cols for block in self.blocks for rows, cols in block.layers)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the traceback that torch logs of an operation that cannot be walked: the caller says so in a sentence."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def counted(config: Any, *, seqlen: int, dtype: torch.dtype, exclude: Sequence[str] = ()) -> Counts:
    """Counts for a transformers configuration of a causal language model; allocates next to nothing.

    dtype    of the weights
    exclude  patterns of layers that stay dense
    raises   whatever a model raises that computes with values of tensors, which fake ones do not have
    Experts are counted as if all had as many tokens.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        linears = maskable_linears(model, exclude)
        _, blocks = decoder_blocks(model)
        walk = _Walk(blocks, set(linears.values()))
        ids = torch.zeros(1, seqlen, dtype=torch.int64)
        with walk, FlopCounterMode(display=False, custom_mapping=_ATTENTION) as walk.counter:
            logits = model(input_ids=ids, use_cache=False).logits
        total = walk.counter.get_total_flops()
    found = []
    for index, block in enumerate(blocks):
        own = [module for module in block.modules() if isinstance(module, nn.Linear) and module in walk.linears]
        found.append(
            Block(
                walk.flops[index],
                walk.saved[index],
                sum(parameter.numel() for parameter in block.parameters()),
                tuple((linear.out_features, linear.in_features) for linear in own),
                tuple(walk.inputs[index].values()),
            )
        )
    elems = sum(parameter.numel() for parameter in model.parameters())
    return Counts(
        tuple(found),
        seqlen,
        total - sum(walk.flops.values()),
        elems - sum(block.elems for block in found),
        walk.hidden_elems,
        logits.numel(),
        dtype.itemsize,
        bool(expert_layers(model, linears)),
    )


def _attention_flops(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the two products of attention, query (batch, heads, queries, dim) and key; a causal half is not left out."""
    batch, heads, queries, dim = query
    return 4 * batch * heads * queries * key[-2] * dim


# Torch counts the kernels of GPUs alone.
_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class _Walk:
    """Notes, while the model runs, what happens in which block."""

    def __init__(self, blocks: nn.ModuleList, linears: set[nn.Linear]):
        self.linears = linears
        self.flops: dict[int, int] = {}
        self.saved = dict.fromkeys(range(len(blocks)), 0)
        self.inputs: dict[int, dict[int, int]] = {index: {} for index in range(len(blocks))}
        self.hidden_elems = 0
        self.counter: Any = None
        self._blocks = blocks
        self._now: int | None = None
        self._start = 0
        # Kept alive, so that no two tensors have one identity.
        self._alive: list[Any] = []
        self._seen = {id(parameter.untyped_storage()) for parameter in blocks.parameters()}
        self._stack = ExitStack()

    def __enter__(self) -> _Walk:
        enter = self._stack.enter_context
        enter(torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor))
        for index, block in enumerate(self._blocks):
            self._stack.callback(block.register_forward_pre_hook(self._begin(index), with_kwargs=True).remove)
            self._stack.callback(block.register_forward_hook(self._end(index)).remove)
            for linear in self.linears.intersection(block.modules()):
                self._stack.callback(linear.register_forward_pre_hook(self._read(index)).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _begin(self, index: int) -> Any:
        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._now, self._start = index, self.counter.get_total_flops()
            self.hidden_elems = (args[0] if args else kwargs["hidden_states"]).numel()

        return begin

    def _end(self, index: int) -> Any:
        def end(module: nn.Module, args: tuple, output: Any) -> None:
            self._now, self.flops[index] = None, self.counter.get_total_flops() - self._start

        return end

    def _read(self, index: int) -> Any:
        def read(linear: nn.Linear, args: tuple) -> None:
            self._alive.append(args[0])
            self.inputs[index][id(args[0])] = linear.in_features

        return read

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self._now is not None and id(storage) not in self._seen:
            self._seen.add(id(storage))
            self._alive.append(storage)
            self.saved[self._now] += storage.nbytes()
        return tensor
