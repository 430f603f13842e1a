"""A whole step of mask learning against a dense step of the same frozen model and against eager PyTorch.

CPU  python -m benchmarks.ops.bench_learn_step --csv benchmarks/results/learn_step_cpu.csv
GPU  python -m benchmarks.ops.bench_learn_step --csv out.csv --check
dense        forward and backward, every masked Linear's weight gets its gradient (made and dropped); no optimiser
dense, no dW the same without gradients of weights
ours         MaskTrainer's step: masks, token loss, penalty, backward, clipping, AdamW, log
eager        the same mathematics as plain PyTorch writes it (eager_masks.py), logits in the weights' dtype, clipping
             and AdamW by torch, fused
Random weights: time does not depend on them. --check compares loss and gradients of ours and eager before timing; --dry
goes through everything on the CPU with a tiny model.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import harness, shapes
from benchmarks.rivals.eager_masks import EagerMasks, shared_copy
from patch.learn.config import MODES, LearnConfig
from patch.learn.masked_linear import MaskedLayers
from patch.learn.run import Run as LearnRun
from patch.learn.run import training_arguments
from patch.learn.schedules import Schedule
from patch.learn.trainer import MaskTrainer, ShuffledBlocks
from patch.models.modes import prepared
from patch.models.structure import maskable_linears
from patch.runs.metrics import MetricsLog
from patch_kernels import PATTERNS, reference

# In the order of shapes.CONFIG_FIELDS.
SIZES = {
    "dry": (64, 128, 2, 2, 1, 97),
    "cpu 512x4": (512, 1376, 4, 8, 8, 1024),
    "cpu 1024x2": (1024, 2752, 2, 16, 16, 1024),
    **{name.lower(): shapes.CONFIGS[name] for name in ("Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-2-7B")},
}
TOTAL_STEPS = 2000  # of the schedules; what is timed are the first
SCHEDULES = ("pattern_temperature", "pattern_scale", "tile_temperature", "tile_scale")
DENSE, DENSE_DX, OURS, EAGER = "dense", "dense, no dW", "ours", "eager"
RIVALS = (DENSE, DENSE_DX, OURS, EAGER)
LONG_TOKENS = 1024  # from here on a CPU repeats half as often
ALONE = "timed alone: does not fit beside the others"


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, mode and number of tokens of an optimiser step; every rival runs it."""

    size: str
    dtype: torch.dtype
    mode: str
    tokens: int
    block: int
    accumulation: int = 1
    checkpoint: bool = False

    def columns(self) -> dict:
        return {
            "model": self.size,
            "dtype": str(self.dtype)[6:],
            "mode": self.mode,
            "tokens": self.tokens,
            "accumulation": self.accumulation,
            "checkpointing": self.checkpoint,
        }

    def config(self) -> LearnConfig:
        blocks = self.tokens // self.block
        return LearnConfig.from_preset(
            self.mode,
            None if self.mode == "maskllm" else 0.45,
            local_batch_size=blocks // self.accumulation,
            global_batch_size=blocks,
            grad_checkpoint=self.checkpoint,
        )

    def batches(self, device: str) -> list[torch.Tensor]:
        """Token ids of each micro-batch."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, SIZES[self.size][-1], (self.tokens // self.block, self.block), generator=generator)
        return list(ids.to(device).chunk(self.accumulation))


def cases(sizes: list[str], dtypes: list[torch.dtype], tokens: list[int], block: int, accumulation: int) -> list[Case]:
    """Each size in turn, within it each dtype, then tokens, then modes."""
    return [Case(s, d, m, t, min(block, t), accumulation) for s in sizes for d in dtypes for t in tokens for m in MODES]


def gpu_cases(accumulation: int) -> list[Case]:
    """Llama-2-7B with checkpointing in mode tile; joint needs 24 bytes a weight and is expected not to fit."""
    result = cases(["llama-3.2-1b", "qwen2.5-0.5b"], [torch.bfloat16], [4096], 4096, accumulation)
    return result + [Case("llama-2-7b", torch.bfloat16, m, 4096, 4096, accumulation, True) for m in ("tile", "joint")]


def build_model(size: str, dtype: torch.dtype, device: str) -> nn.Module:
    """Random weights, made on the device."""
    config = LlamaConfig(**shapes.config_sizes(SIZES[size]), max_position_embeddings=8192, tie_word_embeddings=True)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


class RandomKeep(dict):
    """A random 2:4 keep mask for each layer that is asked for, made then: all at once would be a second model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._linears = maskable_linears(model)

    def __missing__(self, name: str) -> torch.Tensor:
        weight = self._linears[name].weight
        generator = torch.Generator(weight.device).manual_seed(len(name))
        chosen = torch.randint(0, 6, (weight.numel() // 4,), generator=generator, device=weight.device)
        return PATTERNS.to(weight.device)[chosen].reshape(weight.shape)


Step = Callable[[], None]


def dense_step(model: nn.Module, case: Case, device: str, weight_gradients: bool) -> Step:
    if weight_gradients:
        for linear in maskable_linears(model).values():
            linear.weight.requires_grad_(True)
            linear.weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    else:
        model.enable_input_require_grads()
    batches = case.batches(device)

    def step() -> None:
        for ids in batches:
            (model(input_ids=ids, labels=ids).loss / len(batches)).backward()

    return step


def masked_layers(model: nn.Module, case: Case) -> MaskedLayers:
    keep = RandomKeep(model) if case.mode == "tile" else None
    return MaskedLayers(model, maskable_linears(model), case.config(), prior_masks=keep)


def predicted_tokens(batches: list[torch.Tensor]) -> torch.Tensor:
    """Labels of an optimiser step: a block's first token is not predicted."""
    return torch.tensor(sum(ids.numel() - ids.shape[0] for ids in batches), device=batches[0].device)


def make_trainer(model: nn.Module, case: Case, device: str) -> MaskTrainer:
    config, batches = case.config(), case.batches(device)
    with tempfile.TemporaryDirectory() as folder:
        run = LearnRun(Path(folder), {}, None, False, 0, False, (), ())
        trainer = MaskTrainer(
            model,
            ShuffledBlocks(torch.cat(batches).cpu(), config),
            masked_layers(model, case),
            metrics=MetricsLog(None),
            arguments=training_arguments(config, TOTAL_STEPS, run),
            identity={},
            progress=False,
        )
    trainer.create_optimizer()
    trainer.create_scheduler(TOTAL_STEPS)
    return trainer


def ours_step(model: nn.Module, case: Case, device: str) -> Step:
    trainer, batches = make_trainer(model, case, device), case.batches(device)
    count = predicted_tokens(batches)

    def step() -> None:
        trainer.begin_step()
        for ids in batches:
            trainer.training_step(model, {"input_ids": ids, "labels": ids}, count)
        norm = trainer.clip_gradients()
        trainer.check_finite()
        trainer.optimizer.step()
        rate = trainer.lr_scheduler.get_last_lr()[0]
        trainer.lr_scheduler.step()
        model.zero_grad()
        trainer.state.global_step += 1
        trainer.log({"loss": 0.0, "learning_rate": rate, "grad_norm": norm.item()})

    return step


def eager_loss(model, masks: EagerMasks, ids: torch.Tensor, count: torch.Tensor, share: float, progress: float):
    """Loss of one micro-batch, `share` one over their number."""
    token_loss = model(input_ids=ids, labels=ids, num_items_in_batch=count).loss
    return token_loss + (share * masks.penalty(progress)).to(token_loss.dtype)


def eager_step(model: nn.Module, case: Case, device: str) -> Step:
    config, batches = case.config(), case.batches(device)
    masks = EagerMasks(model, masked_layers(model, case).layers, config)
    logits, count = masks.parameters(), predicted_tokens(batches)
    optimizer = torch.optim.AdamW(
        logits, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )
    schedules = {name: Schedule(*getattr(config, name), TOTAL_STEPS) for name in SCHEDULES}
    done = 0

    def step() -> None:
        nonlocal done
        masks.settings = {name: schedule.at(done) for name, schedule in schedules.items()}
        for ids in batches:
            eager_loss(model, masks, ids, count, 1 / len(batches), done / TOTAL_STEPS).backward()
            masks.forget()
        torch.nn.utils.clip_grad_norm_(logits, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        done += 1

    return step


def own_copy(model: nn.Module, case: Case) -> nn.Module:
    """A rival's model, the weights shared."""
    model = shared_copy(model)
    if case.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def make_step(name: str, model: nn.Module, case: Case, device: str) -> Step:
    """A rival's step on its own copy of the model."""
    model = own_copy(model, case)
    if name in (DENSE, DENSE_DX):
        return dense_step(model, case, device, name == DENSE)
    return (ours_step if name == OURS else eager_step)(model, case, device)


def frozen(model: nn.Module, case: Case):
    """The model as `learn` prepares it, for a `with`; checkpointing is set on the copies."""
    return prepared(model, grad_checkpoint=False)


def two_steps(name: str, model: nn.Module, case: Case, device: str) -> None:
    """From the loaded model to a second step: logits, gradients, moments and what the step keeps."""
    with frozen(model, case):
        step = make_step(name, model, case, device)
        step()
        step()


def loaded_model(name: str, case: Case) -> Step:
    return functools.partial(two_steps, name, build_model(case.size, case.dtype, "cpu"), case, "cpu")


def noise_of(case: Case, shape: tuple[int, int], index: int, draw: int, seed: int):
    """The op's own noise as eager_masks takes it."""
    grid = [-(-n // t) for n, t in zip(shape, case.config().tile, strict=True)]
    groups = shape[0] * shape[1] // 4
    dtype = case.dtype
    return reference.pattern_noise(seed, index, draw, groups).to(dtype), reference.tile_noise(
        seed, index, draw, *grid
    ).to(dtype)


def check(mode: str, dtype: torch.dtype = torch.float64, device: str = "cpu", *, checkpoint: bool = False) -> list[str]:
    """Losses and gradients of a step that differ between ours and eager, on a tiny model with the same noise."""
    case = Case("dry", dtype, mode, 64, 16, accumulation=2, checkpoint=checkpoint)
    relative = 1e-9 if dtype == torch.float64 else 2e-4
    base = build_model(case.size, dtype, device)
    with frozen(base, case):
        model, rival = own_copy(base, case), own_copy(base, case)
        trainer = make_trainer(model, case, device)
        layers = trainer.layers
        masks = EagerMasks(rival, masked_layers(rival, case).layers, layers.config)
        weight_shapes = [layer.shape for layer in layers.layers.values()]
        count = predicted_tokens(case.batches(device))
        trainer.state.global_step = 1000
        trainer.begin_step()
        masks.settings = {name: getattr(layers.state, name) for name in SCHEDULES}
        wrong = []
        for draw, ids in enumerate(case.batches(device), start=2000):
            mine = trainer.compute_loss(model, {"input_ids": ids, "labels": ids}, num_items_in_batch=count)
            mine.backward()
            masks.noise = lambda index, draw=draw: [
                tensor.to(device) for tensor in noise_of(case, weight_shapes[index], index, draw, layers.config.seed)
            ]
            expected = eager_loss(rival, masks, ids, count, 0.5, 1000 / TOTAL_STEPS)
            expected.backward()
            masks.forget()
            if abs(mine.item() - expected.item()) > relative * abs(expected.item()):
                wrong.append(f"{mode}: loss {mine.item()} of ours, {expected.item()} of eager")
        for (name, ours), eager in zip(layers.parameters().items(), masks.parameters(), strict=True):
            error = (ours.grad - eager.grad).abs().max()
            if not error <= relative * eager.grad.abs().max():
                wrong.append(f"{mode}: gradient of {name} differs by {error.item():.3g}")
        return wrong


@dataclasses.dataclass
class Run:
    """All cases within a budget of seconds."""

    device: str
    repeats: int
    peaks: Callable[[Case], bool] = lambda case: True
    csv: Path | None = None  # saved after every case: a run may be stopped
    rows: list[dict] = dataclasses.field(default_factory=list)
    not_run: list[Case] = dataclasses.field(default_factory=list)

    def run(self, todo: list[Case], budget_seconds: float = math.inf) -> None:
        self.not_run = harness.run_within(todo, self.measure, budget_seconds)

    def measure(self, case: Case) -> None:
        notes: dict[str, str] = {}  # why a rival is missing, or how it was timed
        model = build_model(case.size, case.dtype, self.device)
        if self.device == "cuda":
            notes = {name: text for name in (OURS, EAGER) if (text := why_too_large(name, model, case))}
            peaks = {name: cuda_peak_mib(name, model, case, notes) for name in RIVALS if name not in notes}
            with frozen(model, case):
                times = self._event_times(model, case, RIVALS, notes)
                for name in [name for name in notes if peaks.get(name)]:  # what was measured alone, fits alone
                    notes.pop(name)
                    times |= self._event_times(model, case, (name,), notes)
                    notes.setdefault(name, ALONE)
        else:
            names = RIVALS if self.peaks(case) else ()
            peaks = {name: harness.peak_bytes(functools.partial(loaded_model, name, case)) / 2**20 for name in names}
            with frozen(model, case):
                repeats = self.repeats if case.tokens < LONG_TOKENS else (self.repeats + 1) // 2
                times = harness.interleaved_times(self._steps(model, case, RIVALS, notes), repeats)
        self.rows += rows_of(case, times, peaks, notes)
        if self.csv is not None:
            harness.save_csv(self.csv, self.rows)

    def _event_times(self, model: nn.Module, case: Case, names: Sequence[str], notes: dict[str, str]):
        """Seconds on the GPU of the rivals whose states fit beside each other."""
        steps = self._steps(model, case, names, notes)
        times = harness.interleaved_event_times(
            steps, self.repeats, lambda name, error: notes.update({name: out_of_memory(error)})
        )
        steps.clear()
        free_memory()
        return times

    def _steps(self, model: nn.Module, case: Case, names: Sequence[str], notes: dict[str, str]) -> dict[str, Step]:
        steps = {}
        for name in names:
            if name not in notes:
                try:
                    steps[name] = make_step(name, model, case, self.device)
                except torch.OutOfMemoryError as error:
                    notes[name] = out_of_memory(error)
        return steps


def why_too_large(name: str, model: nn.Module, case: Case) -> str:
    """Why the logits of the 2:4 patterns with gradients and two moments cannot be on this card, or ""."""
    if case.mode == "tile":
        return ""
    weights = sum(linear.weight.numel() for linear in maskable_linears(model).values())
    needed = logit_state_bytes(weights, 4 if name == OURS else case.dtype.itemsize)
    free = torch.cuda.mem_get_info()[0]
    return "" if needed < free else f"does not fit: needs {needed >> 30} GiB for logits, {free >> 30} GiB are free"


def logit_state_bytes(weights: int, logit_bytes: int) -> int:
    """Pattern logits, their gradients and two moments: 6 values each for 4 weights."""
    return 4 * logit_bytes * 6 * weights // 4


def free_memory() -> None:
    gc.collect()  # hooks and modules refer to each other
    torch.cuda.empty_cache()


def out_of_memory(error: Exception) -> str:
    """The row's note. Frees what the failed step left."""
    error.__traceback__ = None
    free_memory()
    return "out of memory"


def cuda_peak_mib(name: str, model: nn.Module, case: Case, notes: dict[str, str]) -> float | str:
    """Peak over the loaded model; "" and an entry in notes when it does not fit."""
    try:
        return harness.cuda_peak_mib(functools.partial(two_steps, name, model, case, "cuda"))
    except torch.OutOfMemoryError as error:
        notes[name] = out_of_memory(error)
        return ""
    finally:
        free_memory()


def rows_of(
    case: Case, times: dict[str, list[float]], peaks: dict[str, float | str], notes: dict[str, str]
) -> list[dict]:
    """One row a rival, wins and losses."""
    medians = {name: harness.summary(samples)["median_ms"] for name, samples in times.items()}
    rows = []
    for name in RIVALS:
        row = case.columns() | {"method": name}
        measures = ("median_ms", "p5_ms", "p95_ms", "tokens_per_s", "over_dense", "eager_over_this")
        row |= dict.fromkeys(measures, "") | {"peak_MiB": peaks.get(name, ""), "note": notes.get(name, "")}
        if name in medians:
            row |= harness.summary(times[name])
            row["tokens_per_s"] = 1e3 * case.tokens / medians[name]
            if DENSE in medians:
                row["over_dense"] = medians[name] / medians[DENSE]
            if EAGER in medians:
                row["eager_over_this"] = medians[EAGER] / medians[name]
                if name == OURS and row["eager_over_this"] < 1:
                    row["note"] = "; ".join(filter(None, ["loss", row["note"]]))
        rows.append(row)
    return rows


def parser() -> argparse.ArgumentParser:
    result = harness.parser(__doc__)
    result.add_argument("--models", nargs="+", choices=list(SIZES), help="default: those of this device")
    result.add_argument("--tokens", nargs="+", type=int, default=[256, 512, 1024, 2048], help="of a step, on a CPU")
    result.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    result.add_argument("--budget-seconds", type=float, default=math.inf)
    result.add_argument("--check", action="store_true", help="compare ours with eager on a tiny model first")
    result.add_argument("--dry", action="store_true", help="a tiny model on the CPU, no memory")
    return result


def dry_run() -> Run:
    """Everything that a CPU can try in seconds."""
    run = Run("cpu", 1, peaks=lambda case: False)
    run.run(cases(["dry"], [torch.float32], [32], 16, accumulation=2))
    return run


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    on_gpu = torch.cuda.is_available() and not options.dry
    if options.check:
        wrong = [text for mode in MODES for text in check(mode, device="cuda" if on_gpu else "cpu")]
        if wrong:
            raise SystemExit("ours and eager disagree, nothing was timed: " + "; ".join(wrong))
    if options.dry:
        run = dry_run()
    elif on_gpu:
        run = Run("cuda", options.repeats, csv=options.csv)
        todo = gpu_cases(options.accumulation)
        run.run([case for case in todo if case.size in (options.models or SIZES)], options.budget_seconds)
    else:
        most = max(options.tokens)
        run = Run("cpu", options.repeats, lambda case: case.tokens == most, options.csv)  # a process a rival: slow
        names = options.models or [name for name in SIZES if name.startswith("cpu")]
        dtypes = [torch.float32, torch.bfloat16]
        run.run(cases(names, dtypes, options.tokens, 256, options.accumulation), options.budget_seconds)
    harness.show(run.rows, options.csv)
    for case in run.not_run:
        print(f"not run for lack of time: {case}")


if __name__ == "__main__":
    main()
