"""How much memory a learning run needs, found by walking its real step on tensors without contents.

No formula of any architecture is here: the model is built from its configuration on fake tensors (sizes and dtypes, no
bytes), gets the real masked layers, and the real trainer takes one step. Every storage that is born and dies on the way
is counted.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.utils import import_utils

from patch.learn.checks import check_blocks, check_model, check_precision
from patch.learn.config import LearnConfig
from patch.learn.masked_linear import MaskedLayers
from patch.learn.run import Run, training_arguments
from patch.learn.trainer import MaskTrainer, ShuffledBlocks
from patch.models.keep_masks import apply_keep_masks
from patch.models.modes import prepared
from patch.models.structure import maskable_linears
from patch.runs.metrics import MetricsLog

GB = 10**9
CARDS_GB = (24, 80, 141)
MASKED, OTHER, FIXED, LOGITS, GRADIENTS, MOMENTS, ACTIVATIONS = KINDS = (
    "masked weights",
    "other weights",
    "fixed patterns",
    "logits",
    "gradients",
    "moments",
    "activations",
)
# "step" is an optimiser step after the first; before it the masked layers are made, after it the keep masks.
PHASES = ("start", "step", "end")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that `learn` has allocated on its device when it has most.

    phases       {phase of PHASES: {kind of KINDS: bytes}}, each at the phase's own peak. "activations" is whatever the
                 other kinds are not: what backward needs, masked weights, keep masks, temporaries.
    host_bytes   prior masks, which stay in host memory.
    masked_elems, masked_layers  weights and layers that get a mask.
    device_type  "cpu" or "cuda": whose kernels were walked.
    """

    phases: dict[str, dict[str, int]]
    host_bytes: int
    masked_elems: int
    masked_layers: int
    device_type: str

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def by_kind(self) -> dict[str, int]:
        """Bytes by kind in the phase with the highest peak."""
        return self.phases[self.peak_phase]

    @property
    def peak(self) -> int:
        return sum(self.by_kind.values())

    def text(self, cards_gb: Sequence[int] = CARDS_GB) -> str:
        """Lines to print: bytes by kind, the peak, and whether it fits cards of these sizes in GB (10^9 bytes)."""
        totals = {phase: sum(kinds.values()) for phase, kinds in self.phases.items()}
        lower = ", ".join(f"{phase} {gigabytes(totals[phase])}" for phase in totals if phase != self.peak_phase)
        lines = [f"{self.masked_layers} masked layers with {self.masked_elems / 1e9:.3f} billion weights"]
        lines += [f"  {kind:<16}{gigabytes(size):>12}" for kind, size in self.by_kind.items()]
        lines.append(f"  {'peak':<16}{gigabytes(self.peak):>12}  in phase {self.peak_phase} ({lower})")
        for size in cards_gb:
            left = size * GB - self.peak
            verdict = f"fits, {gigabytes(left)} left" if left >= 0 else f"does not fit, {gigabytes(-left)} too much"
            lines.append(f"  {f'{size} GB':<16}{verdict}")
        if self.host_bytes:
            lines.append(f"note: host memory holds the prior masks besides, {gigabytes(self.host_bytes)}")
        lines.append("note: not in these figures: CUDA context (0.5 to 1 GB), fragmentation of torch's allocator")
        if self.device_type == "cpu":
            lines.append("note: walked with the kernels of a CPU; a GPU may choose another attention kernel")
        return "\n".join(lines)


def learning_memory(
    model_config: Any,
    config: LearnConfig,
    *,
    seqlen: int,
    dtype: torch.dtype,
    exclude: Sequence[str] = (),
    with_prior: bool = False,
) -> MemoryEstimate:
    """Peak memory of `patch.learn.learn` for a model that need not exist; allocates next to nothing.

    model_config  transformers configuration of a causal language model.
    seqlen        tokens per block; config.local_batch_size blocks go through a forward pass.
    dtype         of the weights: float32, bfloat16 or float64.
    exclude       patterns of layers left dense, as for `learn`.
    with_prior    prior masks are given. Mode "tile" always has them.
    returns       bytes of tensors on the device that `learn` would use here. Torch cannot walk a GPU's step without a
                  GPU: then the kernels are the CPU's, whose attention keeps what a GPU's flash attention keeps, and
                  cuBLAS workspaces (up to 32 MiB) are missing.
    raises        ValueError for models, blocks and layers that `learn` refuses for their sizes or dtypes.
    """
    # One number seen as all blocks: only the size matters.
    blocks = torch.zeros(1, 1, dtype=torch.int64).expand(config.global_batch_size, seqlen)
    with tempfile.TemporaryDirectory(prefix="patch-memory-") as folder:
        arguments = training_arguments(config, 1, Run(Path(folder), {}, None, False, 0, False, (), ()))
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake, arguments.device:
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
        model.to = lambda *_, **__: model  # it is where it belongs, and Module.to cannot exchange fake tensors
        linears = maskable_linears(model, exclude)
        check_precision(config, linears)
        check_blocks(model, blocks, config)
        priors = None
        with prepared(model, grad_checkpoint=config.grad_checkpoint), _as_in_a_run(), fake:
            if with_prior or config.mode == "tile":
                priors = {name: torch.empty(linear.weight.shape, dtype=torch.bool) for name, linear in linears.items()}
            ledger = _Ledger(arguments.device.type)
            ledger.ignore(tree_leaves(priors))
            with ledger:
                _walk(model, linears, config, blocks, priors, arguments, ledger)
    masked_elems = sum(linear.weight.numel() for linear in linears.values())
    host_bytes = 0 if priors is None else masked_elems
    return MemoryEstimate(ledger.phases, host_bytes, masked_elems, len(linears), arguments.device.type)


@contextlib.contextmanager
def _as_in_a_run() -> Iterator[None]:
    """transformers takes fake tensors for a graph being traced, and would write out attention masks that no run has."""
    actual = import_utils.is_fake_tensor
    import_utils.is_fake_tensor = lambda x: False
    try:
        yield
    finally:
        import_utils.is_fake_tensor = actual


def _walk(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    config: LearnConfig,
    blocks: Tensor,
    priors: dict[str, Tensor] | None,
    arguments: TrainingArguments,
    ledger: _Ledger,
) -> None:
    """What `learn` does, once through, on fake tensors."""
    ledger.book(OTHER, [*model.parameters(), *model.buffers()])
    ledger.book(MASKED, [p for linear in linears.values() for p in linear.parameters()])

    ledger.begin("start")
    check_model(linears)
    layers = MaskedLayers(model, linears, config, prior_masks=priors)
    ledger.book(LOGITS, layers.parameters().values())
    ledger.book(FIXED, [layer.fixed_pattern for layer in layers.layers.values() if layer.fixed_pattern is not None])
    trainer = MaskTrainer(
        model,
        ShuffledBlocks(blocks, config),
        layers,
        metrics=MetricsLog(None),
        arguments=arguments,
        identity={},
        progress=False,
    )

    ledger.begin("step")
    _walk_step(model, trainer, config, blocks.shape[1], ledger)

    ledger.begin("end")
    # Not layers.harden(): the choice of an exact budget depends on values. It works on the host.
    hardened = {name: layer.harden() for name, layer in layers.layers.items()}
    layers.remove()
    # The trainer lives on: it is part of reference cycles, in a real run too.
    apply_keep_masks(model, {name: pair[0] for name, pair in hardened.items()}, exclude=_others(model, linears))


def _walk_step(model: nn.Module, trainer: MaskTrainer, config: LearnConfig, seqlen: int, ledger: _Ledger) -> None:
    """An optimiser step with moments, and with gradients of an earlier micro-batch if there is one."""
    logits = list(trainer.layers.parameters().values())
    for parameter in logits:
        parameter.register_post_accumulate_grad_hook(lambda p: ledger.book(GRADIENTS, [p.grad]))
    optimizer = trainer.create_optimizer()
    _give_gradients(logits, ledger)
    optimizer.step()  # makes the moments
    ledger.book(MOMENTS, tree_leaves(list(optimizer.state.values())))
    optimizer.zero_grad()

    accumulation = trainer.current_gradient_accumulation_steps = config.accumulation_steps()
    shape, device = (config.local_batch_size, seqlen), trainer.args.device
    # Trainer fetches the batches of a whole step at once.
    batches = [
        {name: torch.zeros(shape, dtype=torch.int64, device=device) for name in ("input_ids", "labels")}
        for _ in range(accumulation)
    ]
    if accumulation > 1:
        _give_gradients(logits, ledger)
    trainer.begin_step()
    trainer.training_step(model, batches[-1])
    if config.max_grad_norm > 0:
        trainer.clip_gradients()
    trainer.check_finite()
    optimizer.step()
    optimizer.zero_grad()


def _give_gradients(logits: Iterable[Tensor], ledger: _Ledger) -> None:
    for parameter in logits:
        parameter.grad = torch.empty_like(parameter)
        ledger.book(GRADIENTS, [parameter.grad])


def _others(model: nn.Module, linears: dict[str, nn.Linear]) -> list[str]:
    return [name for name in maskable_linears(model) if name not in linears]


class _Ledger(TorchDispatchMode):
    """Live bytes of one kind of device by KINDS, and the highest total of every phase.

    A storage is booked when an operation first returns a tensor of it, and struck off when the storage itself dies.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.phases: dict[str, dict[str, int]] = {}
        self._device_type = device_type
        self._now = dict.fromkeys(KINDS, 0)
        self._total = self._highest = 0
        self._phase = ""
        # By id of the storage: (keeps the callback alive, its kind, its bytes). None: not counted.
        self._entries: dict[int, tuple[weakref.ref, str | None, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # Fake tensors have no values. Every question that is asked on the way is whether all is well: yes.
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device_type:
                storage = tensor.untyped_storage()
                if id(storage) not in self._entries:
                    self._enter(storage, ACTIVATIONS)
        return result

    def begin(self, phase: str) -> None:
        self._phase, self._highest = phase, self._total
        self.phases[phase] = dict(self._now)

    def book(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Say of which kind the storages of these tensors are."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.device.type == self._device_type:
                storage = tensor.untyped_storage()
                self._strike(id(storage))
                self._enter(storage, kind)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these storages."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage(), None)

    def _enter(self, storage: torch.UntypedStorage, kind: str | None) -> None:
        key = id(storage)
        size = 0 if kind is None else storage.nbytes()
        self._entries[key] = (weakref.ref(storage, lambda _: self._strike(key)), kind, size)
        if kind is None:
            return
        self._now[kind] += size
        self._total += size
        if self._phase and self._total > self._highest:
            self._highest = self._total
            self.phases[self._phase] = dict(self._now)

    def _strike(self, key: int) -> None:
        _, kind, size = self._entries.pop(key, (None, None, 0))
        if kind is not None:
            self._now[kind] -= size
            self._total -= size


def gigabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / GB:.2f} GB" if size >= GB / 10 else f"{size / 1e6:.2f} MB"
