"""Learning of masks: `learn` takes a dense model and gives it back masked, whatever happens on the way."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from patch.artifacts.artifact import load_artifact, save_artifact
from patch.learn import state as state_files
from patch.learn.checks import check_inputs
from patch.learn.config import LearnConfig
from patch.learn.masked_linear import MaskedLayers
from patch.learn.trainer import MaskTrainer, ShuffledBlocks
from patch.models.coverage import coverage, warn_of_dense_rest
from patch.models.facts import fingerprints, model_name, versions
from patch.models.keep_masks import apply_keep_masks, measured_sparsity
from patch.models.modes import prepared
from patch.models.structure import layers_to_mask
from patch.runs import checkpoints as run_checkpoints
from patch.runs import metrics as run_metrics
from patch.runs.arguments import rank, require_trackers, trainer_arguments, world_size
from patch.runs.folders import require_run_folder

logger = logging.getLogger(__name__)
# Sparsity further than this from the target is reported.
MISSED = 0.02


@dataclass
class LearnResult:
    """Outcome of `learn`.

    masks           keep masks (N, K) bool by layer name.
    tile_is_sparse  (rows, cols) bool grids by layer name.
    metrics         the records of metrics.jsonl, in order.
    hard_density    share of nonzeros of the final masks; soft_density the mean of the last step's sampled
                    masks, which is what the penalty controls.
    """

    masks: dict[str, Tensor]
    tile_is_sparse: dict[str, Tensor]
    metrics: list[dict[str, Any]]
    hard_density: float
    soft_density: float


def learn(
    model: nn.Module,
    train_blocks: Tensor,
    config: LearnConfig,
    *,
    prior_masks: Mapping[str, Tensor] | None = None,
    tile_scores: Mapping[str, Tensor] | None = None,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    exclude: Sequence[str] = (),
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    report_to: Sequence[str] = (),
) -> LearnResult:
    """Learn masks on the frozen weights of a causal language model and apply them.

    model         transformers causal LM in float32, bfloat16 or float64 with its dense weights; changed in
                  place and back as plain nn.Linear with pruned weights set to 0 and `keep_mask` attached, on
                  the device, with the train mode, requires_grad flags and use_cache that it came with. After
                  an error it is dense again.
    train_blocks  (blocks, tokens) int64 token ids; the labels are the ids themselves. Shuffled by
                  config.seed; what does not fill a global batch is left out.
    prior_masks   keep masks (N, K) bool by layer name, from one-shot 2:4 pruning; required (2 of 4
                  or all of 4) in mode "tile", where they are the fixed patterns. Groups of dense tiles, which keep all
                  4, start from (in mode "tile": get) the pattern of their two largest weights.
    tile_scores   (rows, cols) by layer name: with config.tile_prior_budget "layer" from patch.priors.tile_scores of an
                  unstructured mask, with "model" what the model loses by each tile's 2:4 pattern, in any one unit.
    output_dir    folder for checkpoints, metrics.jsonl and the result: a new one, or one of an earlier run; None
                  keeps nothing.
    resume        go on from the newest complete checkpoint in output_dir (or start, if there is none). A
                  finished run is not trained again, its masks are applied. The result equals an uninterrupted
                  run's bits.
    exclude       fnmatch patterns of layers left dense.
    progress      a bar where there is a terminal; for lines elsewhere pass patch.runs.progress.StepLines() in callbacks
    callbacks, report_to  passed to transformers' Trainer.
    raises        ValueError or TypeError before any work for bad input; FloatingPointError naming the step
                  when the loss or a gradient is not finite (checkpoints stay).
    """
    plan = plan_learning(
        model,
        train_blocks,
        config,
        prior_masks=prior_masks,
        tile_scores=tile_scores,
        output_dir=output_dir,
        resume=resume,
        exclude=exclude,
        report_to=report_to,
    )
    return plan.run(progress=progress, callbacks=callbacks)


@dataclass(frozen=True)
class LearnPlan:
    """A call of `learn` that passed every check and has changed nothing yet.

    made_from    what the result says of the dense model, {} where no result is kept
    checkpoint   what it goes on from, None for a start
    damaged      newer checkpoints that cannot be read, and why
    is_finished  there is a result, which `run` only applies
    """

    model: nn.Module
    train_blocks: Tensor
    config: LearnConfig
    linears: Mapping[str, nn.Linear]
    prior_masks: Mapping[str, Tensor] | None
    tile_scores: Mapping[str, Tensor] | None
    output_dir: Path | None
    exclude: tuple[str, ...]
    report_to: tuple[str, ...]
    identity: dict[str, Any]
    made_from: dict[str, Any]
    checkpoint: Path | None
    damaged: Mapping[Path, str]
    is_finished: bool

    def run(self, *, progress: bool = True, callbacks: Sequence[TrainerCallback] = ()) -> LearnResult:
        """Learn; see `learn`."""
        with contextlib.ExitStack() as stack:
            if self.output_dir is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="patch-learn-")))
            else:
                folder = self.output_dir
                folder.mkdir(parents=True, exist_ok=True)
            if self.is_finished:
                return _finished_result(self.model, folder, self.exclude)
            if rank() == 0:
                run_checkpoints.tidy_up(folder, self.damaged)
            if self.checkpoint is not None:
                logger.info("resuming from %s", self.checkpoint)
            saves = self.output_dir is not None
            run = Run(folder, self.identity, self.checkpoint, saves, rank(), progress, tuple(callbacks), self.report_to)
            masks, grids, log, soft = _train(
                self.model, self.train_blocks, self.config, self.linears, self.prior_masks, self.tile_scores, run
            )
            masks = {name: mask.to(self.linears[name].weight.device) for name, mask in masks.items()}
            grids = {name: grid.to(self.linears[name].weight.device) for name, grid in grids.items()}
            apply_keep_masks(self.model, masks, exclude=self.exclude)
            result = _result(masks, grids, log, soft, self.config)
            if saves and rank() == 0:
                covered = coverage(self.model, result.masks).as_dict()
                facts = self.made_from | {"coverage": covered, "run": self.identity}
                _save_result(folder, result, self.config, facts)
            return result


def plan_learning(
    model: nn.Module,
    train_blocks: Tensor,
    config: LearnConfig,
    *,
    prior_masks: Mapping[str, Tensor] | None = None,
    tile_scores: Mapping[str, Tensor] | None = None,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    exclude: Sequence[str] = (),
    report_to: Sequence[str] = (),
) -> LearnPlan:
    """Check everything that `learn` is given, and what is in output_dir; nothing is changed or written.

    overwrite  an earlier run in output_dir is no reason to refuse: the caller removes it before `LearnPlan.run`
    raises     as `learn`
    """
    if not isinstance(model, nn.Module) or isinstance(model, nn.Linear):
        raise TypeError(f"model: expected a causal language model, got {type(model).__name__}. Load it first.")
    linears = layers_to_mask(model, exclude)
    if resume and output_dir is None:
        raise ValueError("resume: expected an output_dir to resume from, got none; pass the folder of the earlier run")
    check_inputs(model, train_blocks, config, linears, prior_masks, tile_scores)
    config.accumulation_steps(world_size())
    if rank() == 0:
        warn_of_dense_rest(model, linears)
    require_trackers("report_to", report_to)
    if prior_masks is None and config.pattern_prior_strength > 0:
        logger.info("no prior_masks given: the 2:4 logits start from the random draw alone")
    if tile_scores is None and config.mode != "maskllm" and config.tile_prior_strength > 0:
        logger.info("no tile_scores given: the tile logits start from the random draw alone")
    tensors = {
        "layers": {name: torch.tensor(linear.weight.shape) for name, linear in linears.items()},
        "prior_masks": _ordered(prior_masks, linears),
        "tile_scores": _ordered(tile_scores, linears),
    }
    identity = state_files.run_identity(model, train_blocks, config, tensors, world_size())
    folder, checkpoint, is_finished = None, None, False
    damaged: dict[Path, str] = {}
    if output_dir is not None:
        folder = Path(output_dir).resolve()
        if rank() == 0:
            require_run_folder("output_dir", folder)
        if resume:
            checkpoint, damaged, is_finished = state_files.run_to_resume(folder, identity)
        elif rank() == 0 and not overwrite:
            state_files.refuse_used_folder(folder)
    named = {"model": model_name(model), "versions": versions()}
    return LearnPlan(
        model,
        train_blocks,
        config,
        linears,
        prior_masks,
        tile_scores,
        folder,
        tuple(exclude),
        tuple(report_to),
        identity,
        {} if folder is None else named | fingerprints(model),
        checkpoint,
        damaged,
        is_finished,
    )


@dataclass(frozen=True)
class Run:
    """Where and how one call of learn trains."""

    folder: Path
    identity: dict[str, Any]
    checkpoint: Path | None
    saves: bool
    rank: int
    progress: bool
    callbacks: tuple[TrainerCallback, ...]
    report_to: tuple[str, ...]


def _train(
    model: nn.Module,
    train_blocks: Tensor,
    config: LearnConfig,
    linears: Mapping[str, nn.Linear],
    prior_masks: Mapping[str, Tensor] | None,
    tile_scores: Mapping[str, Tensor] | None,
    run: Run,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Any]], float | None]:
    """Train the logits: (keep masks, tile grids, metrics, soft density). Leaves the model plain and dense."""
    total_steps = config.total_steps(train_blocks.shape[0])
    steps_done = 0 if run.checkpoint is None else int(run.checkpoint.name.rsplit("-", 1)[1])
    with prepared(model, grad_checkpoint=config.grad_checkpoint):
        layers = MaskedLayers(model, linears, config, prior_masks=prior_masks, tile_scores=tile_scores)
        metrics = None
        try:
            metrics = run_metrics.MetricsLog(
                run.folder / run_metrics.METRICS if run.saves and run.rank == 0 else None, steps_done
            )
            trainer = MaskTrainer(
                model,
                ShuffledBlocks(train_blocks, config),
                layers,
                metrics=metrics,
                arguments=training_arguments(config, total_steps, run),
                identity=run.identity,
                callbacks=run.callbacks,
                progress=run.progress,
            )
            trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
            if trainer.state.global_step != total_steps:
                done = f"{trainer.state.global_step} of {total_steps}"
                raise RuntimeError(f"learning was stopped at step {done} by a callback; call learn again, resume=True")
            masks, grids = layers.harden()
            soft_density, lines = trainer.soft_density(), metrics.lines
        finally:
            layers.remove()
            if metrics is not None:
                metrics.close()
    return masks, grids, lines, soft_density


def training_arguments(config: LearnConfig, total_steps: int, run: Run) -> TrainingArguments:
    return trainer_arguments(
        run.folder,
        total_steps,
        saves=run.saves,
        progress=run.progress,
        report_to=run.report_to,
        per_device_train_batch_size=config.local_batch_size,
        gradient_accumulation_steps=config.accumulation_steps(world_size()),
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        save_steps=config.save_steps,
        logging_steps=config.log_steps,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        bf16=False,  # the model computes in its own dtype, the logits are kept in config.logits_dtype
    )


def _finished_result(model: nn.Module, folder: Path, exclude: Sequence[str]) -> LearnResult:
    path = folder / run_checkpoints.RESULT
    artifact = load_artifact(path, model=model)
    logger.info("%s is finished already, applying its masks", path)
    apply_keep_masks(model, artifact.masks, exclude=exclude)
    metrics_path = folder / run_metrics.METRICS
    metrics = run_metrics.read_metrics(metrics_path) if metrics_path.exists() else []
    device = next(model.parameters()).device
    return LearnResult(
        {name: mask.to(device) for name, mask in artifact.masks.items()},
        {name: grid.to(device) for name, grid in artifact.tile_is_sparse.items()},
        metrics,
        artifact.meta["hard_density"],
        artifact.meta["soft_density"],
    )


def _result(
    masks: dict[str, Tensor],
    grids: dict[str, Tensor],
    metrics: list[dict[str, Any]],
    soft: float | None,
    config: LearnConfig,
) -> LearnResult:
    hard = 1.0 - measured_sparsity(masks)
    if soft is None:  # resumed after the last step: nothing was sampled in this call
        soft = metrics[-1]["soft_density"] if metrics else hard
    if abs(1 - hard - config.target_sparsity) > MISSED:
        advice = "Use exact_budget (--exact-budget), which meets it, or more steps (--steps)"
        if config.exact_budget:
            advice = "The next tile was too large: a smaller tile (--tile) comes nearer"
        said = "the target sparsity %.4f was missed: the masks have %.4f (sampled ones %.4f). %s"
        logger.warning(said, config.target_sparsity, 1 - hard, 1 - soft, advice)
    return LearnResult(masks, grids, metrics, hard, soft)


def _save_result(folder: Path, result: LearnResult, config: LearnConfig, facts: dict[str, Any]) -> None:
    meta = {
        "method": config.mode,
        "pattern": "patch",
        "sparsity": config.target_sparsity,
        "tile": config.tile,
        "seed": config.seed,
        "hard_density": result.hard_density,
        "soft_density": result.soft_density,
    } | facts
    save_artifact(folder / run_checkpoints.RESULT, result.masks, meta=meta, tile_is_sparse=result.tile_is_sparse)


def _ordered(tensors: Mapping[str, Tensor] | None, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor] | None:
    return None if tensors is None else {name: tensors[name] for name in linears}
