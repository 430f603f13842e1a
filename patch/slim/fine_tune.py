"""Fine-tuning of a masked model: the kept weights and the adapters are trained, what the mask prunes stays zero.

Gradients of pruned weights are dropped as soon as they are there (before clipping, so they have no part in the
norm), and the zeros are set again after each optimiser step. A model whose zeros do not hold is refused: at the
start, before every checkpoint and at the end. Quantised weights are not trained, their adapters are.
Source: fine-tuning step of SLiM (Mozaffari, Yazdanbakhsh, Mehri Dehnavi 2025), with its published settings.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from patch.files.strict_json import dump_json, read_json
from patch.models.adapted_linear import AdaptedLinear
from patch.models.checks import check_calibration
from patch.models.facts import model_fingerprint
from patch.models.keep_masks import check_masks_hold, keep_masks
from patch.models.modes import prepared
from patch.runs.checkpoints import TRAINER_STATE, checkpoints
from patch.runs.identity import data_fingerprint, tensors_fingerprint

logger = logging.getLogger(__name__)

# Data of the published code: 30,000 blocks of 1024 tokens of SlimPajama.
DEFAULT_DATA, DEFAULT_BLOCK_SIZE, DEFAULT_BLOCKS = "slimpajama", 1024, 30_000
RUN = "run.json"
# Settings that may change between two parts of one run, because the trajectory does not depend on them.
_FREE_SETTINGS = ("save_steps", "save_total_limit", "log_steps", "grad_checkpoint")
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class FineTuneOptions:
    """Settings of `fine_tune`; checked when made, defaults as published where they are known.

    lr, weight_decay, warmup_steps  AdamW with a linear warm-up and a linear decay to 0
    max_grad_norm                   gradients are clipped together
    batch_size                      blocks per optimiser step
    local_batch_size                blocks per forward pass; divides batch_size
    grad_checkpoint                 recompute activations in the backward pass
    save_steps, save_total_limit    checkpoints every so many steps, and how many are kept
    """

    lr: float = 1e-5
    weight_decay: float = 1e-2
    warmup_steps: int = 5
    max_grad_norm: float = 1.0
    batch_size: int = 64
    local_batch_size: int = 1
    epochs: int = 1
    seed: int = 42
    grad_checkpoint: bool = False
    save_steps: int = 500
    save_total_limit: int = 2
    log_steps: int = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not (number if kind is float else type(value) is kind):
                raise TypeError(
                    f"{field.name}: expected {kind.__name__}, got {value!r}. The default is {field.default!r}."
                )
            least = 0 if kind is float or field.name in ("warmup_steps", "seed") else 1
            if kind is not bool and value < least:
                raise ValueError(
                    f"{field.name}: expected {least} or more, got {value}. The default is {field.default}."
                )
        if self.lr == 0:
            raise ValueError("lr: expected a number above 0, got 0. The published one is 1e-5.")
        if self.batch_size % self.local_batch_size:
            raise ValueError(
                f"batch_size: expected a multiple of local_batch_size {self.local_batch_size}, got {self.batch_size}. "
                "Change one of them."
            )

    def total_steps(self, blocks: int) -> int:
        """Optimiser steps for a number of blocks; what does not fill a batch is left out."""
        if blocks < self.batch_size:
            raise ValueError(
                f"blocks: expected at least batch_size = {self.batch_size}, got {blocks}. Give more text, shorter "
                "blocks or a smaller batch_size."
            )
        return blocks // self.batch_size * self.epochs


@dataclass(frozen=True)
class FineTuneResult:
    """steps done, layers trained, and the mean loss of each logged interval as (step, loss)."""

    steps: int
    trained: tuple[str, ...]
    losses: tuple[tuple[int, float], ...]


def fine_tune(
    model: nn.Module,
    blocks: Tensor,
    options: FineTuneOptions | None = None,
    *,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    report_to: Sequence[str] = (),
) -> FineTuneResult:
    """Train the masked layers of a causal language model in place; everything else is frozen.

    model       transformers causal LM in fp32, bf16 or fp64 with keep masks attached (prune_model, learn,
                apply_keep_masks, compress_model). It comes back on its device, with the dtypes, train mode and
                requires_grad flags that it had. 16-bit parameters are trained as fp32 copies under bf16
                autocast: steps of 1e-5 would vanish in bf16.
    blocks      (blocks, tokens) int64 token ids; the labels are the ids themselves
    output_dir  folder of Trainer's checkpoints; None keeps none
    resume      go on from the newest complete checkpoint in output_dir (or start, if there is none); one of another
                model, masks, blocks or settings is refused
    callbacks, report_to  passed to transformers' Trainer
    raises      ValueError or TypeError before any work; ValueError naming the layer when a pruned weight is not
                zero, before a checkpoint with it is written; FloatingPointError for a loss or gradient that is not
                finite, before the step is made. After an error the model holds what was reached.
    """
    options = FineTuneOptions() if options is None else options
    trained = trained_parameters(model)
    check_masks_hold(model)
    check_calibration(model, blocks)
    if blocks.shape[1] < 2:
        raise ValueError(f"blocks: expected at least 2 tokens per block, got {blocks.shape[1]}. Use 1024.")
    steps = options.total_steps(len(blocks))
    if resume and output_dir is None:
        raise ValueError("resume: expected an output_dir to resume from, got none. Pass the folder of the earlier run.")
    with contextlib.ExitStack() as stack:
        if output_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="patch-fine-tune-")))
        else:
            folder = Path(output_dir)
            if not resume and any(folder.glob("checkpoint-*")):
                raise ValueError(
                    f"output_dir: expected no earlier run, {folder} has checkpoints. Pass resume=True to go on, or "
                    "choose another folder."
                )
            folder.mkdir(parents=True, exist_ok=True)
        checkpoint = checkpoint_to_resume(model, blocks, options, folder) if resume else None
        if checkpoint is None and int(os.environ.get("RANK", "0")) == 0:
            (folder / RUN).write_bytes(dump_json(_identity(model, blocks, options)))
        stack.enter_context(prepared(model, grad_checkpoint=options.grad_checkpoint))
        mixed = stack.enter_context(_trainable(model, trained))
        trainer = _MaskedTrainer(
            model=model,
            args=_arguments(options, folder, steps, mixed, output_dir is not None, progress, report_to),
            train_dataset=_Blocks(blocks[: len(blocks) // options.batch_size * options.batch_size]),
            callbacks=[_ZerosAgain(model, trained), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        # After the callbacks of the last step, which the one that sets zeros came before.
        check_masks_hold(model)
    losses = tuple((line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line)
    return FineTuneResult(trainer.state.global_step, tuple(trained), losses)


def checkpoint_to_resume(
    model: nn.Module, blocks: Tensor, options: FineTuneOptions, output_dir: str | os.PathLike
) -> Path | None:
    """The newest complete checkpoint in output_dir, None if there is none; the model as `fine_tune` takes it.

    raises  ValueError when it belongs to a run with another model, masks, blocks or settings.
    """
    folder = Path(output_dir)
    for path in reversed(checkpoints(folder)):
        try:
            json.loads((path / TRAINER_STATE).read_bytes())  # Trainer writes it last
        except (OSError, ValueError) as error:
            logger.warning("ignoring an incomplete checkpoint: %s (%s)", path, error)
        else:
            break
    else:
        return None
    expected = _identity(model, blocks, options)
    found = read_json(folder / RUN) if (folder / RUN).is_file() else None
    found = found if isinstance(found, dict) else {}
    if differing := [key for key in expected if found.get(key) != expected[key]]:
        raise ValueError(
            f"resume: expected the model, masks, blocks and settings of the run in {folder}, got another "
            f"{', '.join(differing)}. Resume with the same ones, or choose another folder."
        )
    return path


def _identity(model: nn.Module, blocks: Tensor, options: FineTuneOptions) -> dict[str, Any]:
    """JSON values that must agree before a run may go on."""
    settings = {name: value for name, value in asdict(options).items() if name not in _FREE_SETTINGS}
    return settings | {
        "model": model_fingerprint(model),
        "masks": tensors_fingerprint({"keep": keep_masks(model)}),
        "blocks": data_fingerprint(blocks),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def trained_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """{layer name: what fine_tune trains of it}: weights that are not quantised, adapters as they came from the SVD.

    raises  ValueError when there is no mask or nothing to train, TypeError for weights in another dtype.
    """
    masks = keep_masks(model)
    if not masks:
        raise ValueError("model: expected keep masks on its layers, got none. Prune, or apply an artifact, first.")
    chosen: dict[str, list[nn.Parameter]] = {}
    for name in masks:
        layer = model.get_submodule(name)
        check_trainable(layer.weight, f"layer '{name}'")
        made = getattr(layer, "compression", None)
        parameters = [] if made is not None and made.quantize_weight else [layer.weight]
        # 2:4 or quantised adapters would lose that; they are used as they are.
        if isinstance(layer, AdaptedLinear) and not (made is not None and (made.prune_lora or made.quantize_lora)):
            parameters += [layer.lora_left, layer.lora_right]
        if parameters:
            chosen[name] = parameters
    if not chosen:
        raise ValueError(
            "model: expected weights or adapters to train, got quantised ones only. Fine-tune before quantising, or "
            "compress with lora_rank and without quantize_lora and prune_lora."
        )
    return chosen


def check_trainable(weight: Tensor, label: str) -> None:
    """Refuse a weight in a dtype that is not trained; `label` names it in the message."""
    if weight.dtype not in _DTYPES:
        raise TypeError(
            f"{label}: expected fp32, bf16 or fp64 weights, got {weight.dtype}. Load the model with "
            "dtype=torch.bfloat16."
        )


class _MaskedTrainer(Trainer):
    """Trainer that stops at a loss that is not finite and never saves a model whose zeros do not hold."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: expected a finite loss, got {loss.item()}. The weights of the "
                "step before are unharmed; lower lr, or check the data and weights."
            )
        return result

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        check_masks_hold(self.model)
        super()._save(output_dir, state_dict)


class _ZerosAgain(TrainerCallback):
    """Sets the pruned weights to zero after each step: whatever an optimiser does to them, the mask wins.

    Before the step it refuses gradients that are not finite, which the optimiser would spread.
    """

    def __init__(self, model: nn.Module, trained: dict[str, list[nn.Parameter]]):
        self._model, self._trained = model, trained

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for name, parameters in self._trained.items():
            if not all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in parameters):
                raise FloatingPointError(
                    f"step {state.global_step + 1}: expected a finite gradient, got another one in {name}. The weights "
                    "of the step before are unharmed; lower lr, or check the data and weights."
                )

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        for name, keep in keep_masks(self._model).items():
            weight = self._model.get_submodule(name).weight
            if weight.requires_grad:
                weight.masked_fill_(~keep, 0)


class _Blocks(Dataset):
    """Token blocks as a causal language model's inputs and labels."""

    def __init__(self, blocks: Tensor):
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._blocks[index], "labels": self._blocks[index]}


@contextlib.contextmanager
def _trainable(model: nn.Module, trained: dict[str, list[nn.Parameter]]) -> Iterator[bool]:
    """Gradients for the chosen parameters, in fp32 where they had 16 bits; whether the model itself has 16 bits."""
    parameters = [parameter for chosen in trained.values() for parameter in chosen]
    before = [parameter.dtype for parameter in parameters]
    flags = [parameter.requires_grad for parameter in parameters]
    masks = keep_masks(model)
    mixed = any(model.get_submodule(name).weight.dtype == torch.bfloat16 for name in masks)
    handles = []
    try:
        for parameter in parameters:
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        for name in trained:
            layer = model.get_submodule(name)
            if layer.weight.requires_grad:
                handles.append(layer.weight.register_post_accumulate_grad_hook(_drop_pruned(layer)))
        yield mixed
    finally:
        for handle in handles:
            handle.remove()
        for parameter, dtype, flag in zip(parameters, before, flags, strict=True):
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(flag)


def _drop_pruned(layer: nn.Linear):
    """The mask is looked up at each call: it moves with the layer between devices."""

    def drop(weight: Tensor) -> None:
        weight.grad.masked_fill_(~layer.keep_mask, 0)

    return drop


def _arguments(
    options: FineTuneOptions,
    folder: Path,
    steps: int,
    mixed: bool,
    saves: bool,
    progress: bool,
    report_to: Sequence[str],
) -> TrainingArguments:
    use_cpu = not torch.cuda.is_available()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch_size % (options.local_batch_size * processes):
        raise ValueError(
            f"batch_size: expected a multiple of local_batch_size * processes = {options.local_batch_size} * "
            f"{processes}, got {options.batch_size}. Change one of them."
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=use_cpu,
        max_steps=steps,
        per_device_train_batch_size=options.local_batch_size,
        gradient_accumulation_steps=options.batch_size // (options.local_batch_size * processes),
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type="linear",
        max_grad_norm=options.max_grad_norm,
        optim="adamw_torch",
        seed=options.seed,
        bf16=mixed,
        save_strategy="steps" if saves else "no",
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        logging_strategy="steps",
        logging_steps=options.log_steps,
        logging_nan_inf_filter=False,
        disable_tqdm=not (progress and sys.stderr.isatty()),
        report_to=list(report_to),
        dataloader_pin_memory=not use_cpu,
    )
    # One process drives one device; DataParallel would copy the layers without their hooks.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
