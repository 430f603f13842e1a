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
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from patch.files.strict_json import dump_json, read_json
from patch.models.adapted_linear import AdaptedLinear
from patch.models.checks import require_tokens, require_trained_dtype
from patch.models.facts import model_fingerprint
from patch.models.keep_masks import check_masks_hold, keep_mask_of, keep_masks
from patch.models.modes import prepared
from patch.models.structure import linear_at
from patch.runs.arguments import rank, require_trackers, trainer_arguments, world_size
from patch.runs.checkpoints import TRAINER_STATE, checkpoints
from patch.runs.folders import IDENTITY, require_run_folder
from patch.runs.identity import FREE_SETTINGS, data_fingerprint, tensors_fingerprint
from patch.runs.progress import StepBar, shows_bars
from patch.slim.options import FineTuneOptions
from patch_kernels.checks import require_finite

logger = logging.getLogger(__name__)

_UNHARMED = "The weights of the step before are unharmed; lower lr, or check the data and weights."


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
    output_dir  folder of Trainer's checkpoints, new or of an earlier run; None keeps none
    resume      go on from the newest complete checkpoint in output_dir (or start, if there is none); one of another
                model, masks, blocks or settings is refused
    callbacks, report_to  passed to transformers' Trainer
    raises      ValueError or TypeError before any work; ValueError naming the layer when a pruned weight is not
                zero, before a checkpoint with it is written; FloatingPointError for a loss or gradient that is not
                finite, before the step is made. After an error the model holds what was reached.
    """
    options = FineTuneOptions() if options is None else options
    checkpoint = check_fine_tuning(model, blocks, options, output_dir=output_dir, resume=resume, report_to=report_to)
    trained, steps = trained_parameters(model), options.total_steps(len(blocks))
    with contextlib.ExitStack() as stack:
        if output_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="patch-fine-tune-")))
        else:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
        if checkpoint is None and rank() == 0:
            (folder / IDENTITY).write_bytes(dump_json(_identity(model, blocks, options)))
        stack.enter_context(prepared(model, grad_checkpoint=options.grad_checkpoint))
        mixed = stack.enter_context(_trainable(model, trained))
        trainer = _MaskedTrainer(
            model=model,
            args=_arguments(options, folder, steps, mixed, output_dir is not None, progress, report_to),
            train_dataset=_Blocks(blocks[: len(blocks) // options.batch_size * options.batch_size]),
            callbacks=[_ZerosAgain(model, trained), *callbacks],
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if progress and shows_bars():
            trainer.add_callback(StepBar())
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        # After the callbacks of the last step, which the one that sets zeros came before.
        check_masks_hold(model)
    losses = tuple((int(line["step"]), line["loss"]) for line in trainer.state.log_history if "loss" in line)
    return FineTuneResult(trainer.state.global_step, tuple(trained), losses)


def check_fine_tuning(
    model: nn.Module,
    blocks: Tensor,
    options: FineTuneOptions,
    *,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report_to: Sequence[str] = (),
) -> Path | None:
    """Check everything that `fine_tune` is given, and what is in output_dir; nothing is changed or written.

    overwrite  an earlier run in output_dir is no reason to refuse: the caller removes it before `fine_tune`
    returns    the checkpoint to go on from, None for a start
    raises     as `fine_tune`
    """
    trained_parameters(model)
    check_masks_hold(model)
    require_tokens(model, blocks, "blocks", least=2)
    options.total_steps(len(blocks))
    options.accumulation_steps(world_size())
    require_trackers("report_to", report_to)
    if output_dir is None:
        if resume:
            expected = "expected an output_dir to resume from, got none"
            raise ValueError(f"resume: {expected}. Pass the folder of the earlier run.")
        return None
    folder = Path(output_dir)
    if rank() == 0:
        require_run_folder("output_dir", folder)
        if not resume and not overwrite and any(folder.glob("checkpoint-*")):
            advice = "Pass resume=True to go on, or choose another folder."
            raise ValueError(f"output_dir: expected no earlier run, {folder} has checkpoints. {advice}")
    return _checkpoint_to_resume(model, blocks, options, folder) if resume else None


def _checkpoint_to_resume(model: nn.Module, blocks: Tensor, options: FineTuneOptions, folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, None if there is none; the model as `fine_tune` takes it.

    raises  ValueError when it belongs to a run with another model, masks, blocks or settings.
    """
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
    found = read_json(folder / IDENTITY) if (folder / IDENTITY).is_file() else None
    found = found if isinstance(found, dict) else {}
    if differing := [key for key in expected if found.get(key) != expected[key]]:
        got = f"got another {', '.join(differing)}. Resume with the same ones, or choose another folder."
        raise ValueError(f"resume: expected the model, masks, blocks and settings of the run in {folder}, {got}")
    return path


def _identity(model: nn.Module, blocks: Tensor, options: FineTuneOptions) -> dict[str, Any]:
    """JSON values that must agree before a run may go on."""
    settings = {name: value for name, value in asdict(options).items() if name not in FREE_SETTINGS}
    return settings | {
        "model": model_fingerprint(model),
        "masks": tensors_fingerprint({"keep": keep_masks(model)}),
        "blocks": data_fingerprint(blocks),
        "processes": world_size(),
    }


def trained_parameters(model: nn.Module) -> dict[str, list[Tensor]]:
    """{layer name: what fine_tune trains of it}: weights that are not quantised, adapters as they came from the SVD.

    raises  ValueError when there is no mask or nothing to train, and for weights in another dtype.
    """
    masks = keep_masks(model)
    if not masks:
        raise ValueError("model: expected keep masks on its layers, got none. Prune, or apply an artifact, first.")
    chosen: dict[str, list[Tensor]] = {}
    for name in masks:
        layer = linear_at(model, name)
        require_trained_dtype(layer.weight, f"layer '{name}'")
        made = getattr(layer, "compression", None)
        parameters = [] if made is not None and made.quantize_weight else [layer.weight]
        # 2:4 or quantised adapters would lose that; they are used as they are.
        if isinstance(layer, AdaptedLinear) and not (made is not None and (made.prune_lora or made.quantize_lora)):
            parameters += [layer.lora_left, layer.lora_right]
        if parameters:
            chosen[name] = parameters
    if not chosen:
        advice = "Fine-tune before quantising, or use lora_rank without quantize_lora and prune_lora."
        raise ValueError(f"model: expected weights or adapters to train, got quantised ones only. {advice}")
    return chosen


class _MaskedTrainer(Trainer):
    """Trainer that stops at a loss that is not finite and never saves a model whose zeros do not hold."""

    model: nn.Module

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        require_finite(f"step {self.state.global_step + 1}, loss", loss, _UNHARMED, error=FloatingPointError)
        return result

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        check_masks_hold(self.model)
        super()._save(output_dir, state_dict)


class _ZerosAgain(TrainerCallback):
    """Sets the pruned weights to zero after each step: whatever an optimiser does to them, the mask wins.

    Before the step it refuses gradients that are not finite, which the optimiser would spread.
    """

    def __init__(self, model: nn.Module, trained: dict[str, list[Tensor]]):
        self._model, self._trained = model, trained

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for name, parameters in self._trained.items():
            what = f"step {state.global_step + 1}, gradient of {name}"
            for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
                require_finite(what, gradient, _UNHARMED, error=FloatingPointError)

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        for name, keep in keep_masks(self._model).items():
            weight = linear_at(self._model, name).weight
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
def _trainable(model: nn.Module, trained: dict[str, list[Tensor]]) -> Iterator[bool]:
    """Gradients for the chosen parameters, in fp32 where they had 16 bits; whether the model itself has 16 bits."""
    parameters = [parameter for chosen in trained.values() for parameter in chosen]
    before = [parameter.dtype for parameter in parameters]
    flags = [parameter.requires_grad for parameter in parameters]
    masks = keep_masks(model)
    mixed = any(linear_at(model, name).weight.dtype == torch.bfloat16 for name in masks)
    handles = []
    try:
        for parameter in parameters:
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        for name in trained:
            layer = linear_at(model, name)
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


def _drop_pruned(layer: nn.Linear) -> Callable[[Tensor], None]:
    """The mask is looked up at each call: it moves with the layer between devices."""

    def drop(weight: Tensor) -> None:
        cast(Tensor, weight.grad).masked_fill_(~keep_mask_of(layer), 0)

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
    return trainer_arguments(
        folder,
        steps,
        saves=saves,
        progress=progress,
        report_to=report_to,
        per_device_train_batch_size=options.local_batch_size,
        gradient_accumulation_steps=options.accumulation_steps(world_size()),
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type="linear",
        max_grad_norm=options.max_grad_norm,
        optim="adamw_torch",
        seed=options.seed,
        bf16=mixed,
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        logging_steps=options.log_steps,
    )
