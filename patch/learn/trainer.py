"""The training loop of the mask logits: transformers' Trainer with PATCH's objective and its own checkpoints.

The loss of an optimiser step with A micro-batches is the mean token loss of the whole batch (objective "distill":
the mean divergence of the predictions from the dense model's) plus the mean over the micro-batches of
    sparse_reg * |density - target|  -  weight_reg * (1 - t/T) * (kept share of the weights' norm)
with a new mask per micro-batch. Source: PATCH (Hourri, Mozaffari, Mehri Dehnavi 2025), training objective.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from patch.learn import state as state_files
from patch.learn.config import LearnConfig
from patch.learn.masked_linear import MaskedLayers
from patch.learn.objective import Objective, divergence
from patch.learn.optimizer import make_optimizer, scale_gradients
from patch.learn.schedules import Schedule, learning_rate_factor
from patch.models.modes import evaluating
from patch.runs import checkpoints as run_checkpoints
from patch.runs.metrics import MetricsLog
from patch.runs.progress import StepBar, shows_bars


class MaskTrainer(Trainer):
    """Trainer for mask logits: own objective, optimiser, schedules, data order and checkpoints.

    Checkpoints are safetensors and JSON, complete or absent, instead of Trainer's pickles written in place.
    """

    train_dataset: ShuffledBlocks

    def __init__(
        self,
        model: nn.Module,
        dataset: ShuffledBlocks,
        layers: MaskedLayers,
        *,
        metrics: MetricsLog,
        arguments: TrainingArguments,
        identity: dict[str, Any],
        callbacks: Sequence[TrainerCallback] = (),
        progress: bool = True,
    ) -> None:
        self.layers, self.config, self.metrics_log, self.identity = layers, layers.config, metrics, identity
        self._logits = layers.parameters()
        steps = arguments.max_steps
        config = self.config
        self._schedules = {
            name: Schedule(start, end, steps)
            for name in ("pattern_temperature", "pattern_scale", "tile_temperature", "tile_scale")
            for start, end in (getattr(config, name),)
        }
        self._micro_step = 0
        self._step_values: Tensor | None = None
        self._grad_norm: Tensor | None = None
        self._clock = (0, time.monotonic())
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=_collate,
            callbacks=list(callbacks),
        )
        # After Trainer has moved the model to its device.
        self._objective = Objective(layers)
        self._devices = {layer.weight.device for layer in layers.layers.values()}
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if progress and shows_bars():
            self.add_callback(StepBar())
        self.add_callback(_Guard(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Token loss, or divergence from the dense model, plus the regularisers of this micro-batch's masks."""
        state, step = self.layers.state, self.state.global_step
        accumulation = self.args.gradient_accumulation_steps
        state.draw = (step * accumulation + self._micro_step) * self.args.world_size + self.args.process_index
        for device in self._devices:
            state.sampling(device)
        state.sums.clear()
        target = self._dense_logits(inputs["input_ids"]) if self.config.objective == "distill" else None
        state.collect = True
        try:
            if target is None:
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            else:
                outputs = model(input_ids=inputs["input_ids"])
                loss = divergence(outputs.logits, target)
        finally:
            state.collect = False
        penalty, density, ratio = self._objective(self.layers.take_sums(), step / self.args.max_steps)
        # Where the model's own loss is divided by the tokens of the whole accumulated batch, Trainer does not
        # divide by the number of micro-batches, and the penalty has to be; elsewhere Trainer divides both.
        is_scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        share = 1.0 / accumulation
        if target is not None and is_scaled:
            loss = loss * share
        token_loss = loss.detach().double() * (1.0 if is_scaled else share)
        loss = loss + penalty.to(loss.dtype) * (share if is_scaled else 1.0)
        values = torch.stack([token_loss, penalty.detach() * share, density * share, ratio * share])
        earlier = self._step_values if self._micro_step > 0 else None
        self._step_values = values if earlier is None else earlier + values
        self._micro_step += 1
        return (loss, outputs) if return_outputs else loss

    def _dense_logits(self, ids: Tensor) -> Tensor:
        """What the same frozen weights predict without masks, noise and dropout."""
        state, model = self.layers.state, cast(nn.Module, self.model)
        state.is_off = True
        try:
            with evaluating(model):
                return model(input_ids=ids, use_cache=False).logits
        finally:
            state.is_off = False

    def begin_step(self) -> None:
        """Set what is constant during an optimiser step."""
        self._micro_step, self._grad_norm = 0, None
        for name, schedule in self._schedules.items():
            setattr(self.layers.state, name, schedule.at(self.state.global_step))

    def check_finite(self) -> None:
        """Stop before the optimiser turns a broken step into broken logits."""
        norm = self._grad_norm if self._grad_norm is not None else self._total_norm()
        values = cast(Tensor, self._step_values)
        if not torch.stack([values.sum(), norm.double()]).isfinite().all():
            step, (loss, penalty, *_) = self.state.global_step, values.tolist()
            raise FloatingPointError(
                f"step {step + 1}: expected a finite loss and finite gradients, got token loss {loss}, penalty "
                f"{penalty}. Step {step} and checkpoints are unharmed; lower lr or the scales, or check the data."
            )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser of `make_optimizer`."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self._logits, self.config)
        return self.optimizer

    @property
    def _made_optimizer(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, self.optimizer)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self.clip_gradients()

    def clip_gradients(self) -> Tensor:
        """Norm of all gradients; the optimizer itself scales them down to max_grad_norm in its next step."""
        self._grad_norm = norm = self._total_norm()
        optimizer = getattr(self.optimizer, "optimizer", self._made_optimizer)  # accelerate wraps it
        scale_gradients(optimizer, (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _total_norm(self) -> Tensor:
        gradients = [p.grad for p in self._logits.values() if p.grad is not None]
        # In the gradients' own dtype the norm of bfloat16 logits would have three digits.
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).to(gradients[0].device)
            for g in gradients
        ]
        return torch.linalg.vector_norm(torch.stack(norms))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """Linear warm-up from 0, then cosine."""
        config, steps = self.config, num_training_steps
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self._made_optimizer if optimizer is None else optimizer,
            lambda step: learning_rate_factor(step, steps, config.warmup_steps, config.min_lr_ratio),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # The dataset is shuffled already, as a function of the seed alone.
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Replace Trainer's interval averages by the values of the step, and append them to metrics.jsonl."""
        if "loss" in logs and self._step_values is not None:
            logs = self._record(logs, self._step_values)
            if self.is_world_process_zero():
                self.metrics_log.write({"step": self.state.global_step} | logs)
        super().log(logs, start_time)

    def _record(self, logs: dict[str, Any], values: Tensor) -> dict[str, Any]:
        gathered: Tensor = self.accelerator.gather(values[None].float()).double().mean(0)
        values = values if self.args.world_size == 1 else gathered
        token_loss, penalty, density, ratio = values.tolist()
        step = self.state.global_step
        last_step, last_time = self._clock
        self._clock = (step, time.monotonic())
        tokens = (step - last_step) * self.config.global_batch_size * self.train_dataset.block_size
        record = {
            "loss": token_loss + penalty,
            "lm_loss": token_loss,
            "soft_density": density,
            "hard_density": self.layers.hard_density(),
            "norm_ratio": ratio,
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
        }
        record |= {name: getattr(self.layers.state, name) for name in self._schedules}
        return record | {"tokens_per_second": round(tokens / max(self._clock[1] - last_time, 1e-9), 1)}

    def soft_density(self) -> float | None:
        """Mean density of the last step's sampled masks; None when this call trained no step."""
        return None if self._step_values is None else self._step_values[2].item()

    def start_clock(self) -> None:
        self._clock = (self.state.global_step, time.monotonic())

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        device = self.args.device
        states = run_checkpoints.random_states(device)
        if self.args.world_size > 1:
            states = {name: self.accelerator.gather(value.to(device)[None]).cpu() for name, value in states.items()}
        else:
            states = {name: value[None] for name, value in states.items()}
        if not self.is_world_process_zero():
            return
        self.metrics_log.sync()
        state = self._made_optimizer.state_dict()["state"]
        state_files.save_checkpoint(
            Path(cast(str, self.args.output_dir)),
            self.state.global_step,
            identity=self.identity,
            logits=self._logits,
            moments={name: state[index] for index, name in enumerate(self._logits)},
            random_states=states,
            save_trainer_state=self.state.save_to_json,
            keep=self.config.save_total_limit,
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Trainer.save_model would write the whole frozen model; the masks are saved by `learn`."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        loaded = run_checkpoints.load_tensors(Path(resume_from_checkpoint, state_files.LOGITS), self._logits)
        with torch.no_grad():
            for name, logits in self._logits.items():
                logits.copy_(loaded[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint, state_files.OPTIMIZER)
        moments = state_files.load_moments(path, self._logits, self.config.moments)
        optimizer = self._made_optimizer
        optimizer.load_state_dict(
            optimizer.state_dict() | {"state": {i: moments[name] for i, name in enumerate(self._logits)}}
        )
        # The schedule is a function of the step, so there is nothing to read for it.
        scheduler, step = cast(torch.optim.lr_scheduler.LambdaLR, self.lr_scheduler), self.state.global_step
        scheduler.last_epoch = step
        scheduler._last_lr = [base * scheduler.lr_lambdas[0](step) for base in scheduler.base_lrs]
        for group, lr in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = lr

    def _load_scaler(self, checkpoint: str | None) -> None:
        """No gradient scaler: float16 models are refused."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            path = Path(checkpoint, state_files.RANDOM)
            run_checkpoints.restore_random_states(path, self.args.process_index, self.args.device)


class ShuffledBlocks(Dataset):
    """The blocks in training order: per epoch a permutation by (seed, epoch), cut to whole global batches."""

    def __init__(self, blocks: Tensor, config: LearnConfig) -> None:
        self._blocks = blocks
        usable = blocks.shape[0] // config.global_batch_size * config.global_batch_size
        epochs = []
        for epoch in range(config.epochs):
            generator = torch.Generator().manual_seed((config.seed * 1_000_003 + epoch) % (1 << 63))
            epochs.append(torch.randperm(blocks.shape[0], generator=generator)[:usable])
        self.order = torch.cat(epochs)

    @property
    def block_size(self) -> int:
        return self._blocks.shape[1]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Tensor:
        return self._blocks[self.order[index]]


class _Guard(TrainerCallback):
    """Calls the trainer at the two instants that Trainer only tells callbacks about."""

    def __init__(self, trainer: MaskTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.start_clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_finite()


def _collate(blocks: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(blocks)
    return {"input_ids": ids, "labels": ids.clone()}
