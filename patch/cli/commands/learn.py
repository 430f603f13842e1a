"""`patch-llm learn`: learn which tiles stay dense and the 2:4 patterns of the others, on frozen weights."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import model_validator

from patch import settings
from patch.cli import inputs, outputs, plans
from patch.files.schema import record
from patch.learn.config import LearnConfig, Mode
from patch.settings import AtLeastOne, DistinctNames, Names, NewPath, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from patch.learn.run import LearnPlan, LearnResult

logger = logging.getLogger(__name__)

NAME = "learn"
SUMMARY = "learn a PATCH (or MaskLLM) mask on the frozen weights"
EXAMPLES = """\
examples:
  # a small model and a text of 1 MB, minutes on two cores:
  patch-llm prune --model ./llama --data text.txt --seqlen 256 --nsamples 64 --target-sparsity 0.45 --out prior
  patch-llm learn --model ./llama --prior prior --data text.txt --sparsity 0.45 --seqlen 256 --steps 200 \\
      --local-batch-size 4 --global-batch-size 4 --exact-budget --out learned
  # as published, 2000 steps of 256 blocks of 4096 tokens, for a GPU:
  patch-llm learn --model ./llama --prior prior --data slimpajama --sparsity 0.45 --steps 2000 --out learned
  patch-llm learn --config learned/config.resolved.yaml --resume        # go on after an interrupt
  patch-llm learn --model ./llama --sparsity 0.45 --set learn.grad_checkpoint=true --dry-run    # how much memory

--preset joint learns tiles and 2:4 patterns, tile learns tiles over the fixed patterns of --prior, maskllm learns
2:4 patterns everywhere. All hyper-parameters are settings learn.NAME for --set and --config; the resolved
configuration with all of them is saved in --out.
"""
SECTION_FLAGS = {
    "--sparsity": (LearnConfig, "learn", "target_sparsity"),
    "--tile": (LearnConfig, "learn", "tile"),
    "--lr": (LearnConfig, "learn", "lr"),
    "--local-batch-size": (LearnConfig, "learn", "local_batch_size"),
    "--global-batch-size": (LearnConfig, "learn", "global_batch_size"),
    "--exact-budget": (LearnConfig, "learn", "exact_budget"),
    "--seed": (LearnConfig, "learn", "seed"),
}
DEFAULT_BLOCKS = 512_000
DEFAULT_SEQLEN = 4096


@record(kw_only=True)
class Options(inputs.MaskSettings, inputs.PlacementSettings):
    """Settings of `learn`; the hyper-parameters are in the section `learn` (patch.learn.LearnConfig)."""

    model: str = setting(help=inputs.MODEL_HELP, metavar="MODEL")
    data: str | None = setting(None, f"{inputs.DATA_HELP} (required unless --dry-run)", metavar="TEXT")
    out: NewPath | None = setting(
        None, "folder for the result, checkpoints and metrics.jsonl (required unless --dry-run)", metavar="DIR"
    )
    preset: Mode = setting("joint", "published hyper-parameters: joint, tile or maskllm", metavar="PRESET")
    prior: str | None = setting(None, "folder made by prune: 2:4 masks and tile scores to start from", metavar="DIR")
    steps: AtLeastOne | None = setting(None, "optimiser steps (default: what --blocks gives)")
    blocks: AtLeastOne | None = setting(None, "blocks of text to train on (default: all, at most 512000)")
    seqlen: AtLeastOne | None = setting(None, "tokens per block (default 4096, or what the model allows)")
    text_field: str | None = setting(None, inputs.FIELD_HELP, metavar="NAME")
    exclude: Names = setting((), inputs.EXCLUDE_HELP, metavar="A,B")
    report_to: DistinctNames = setting((), "send metrics to wandb, tensorboard or trackio", metavar="A,B")
    resume: bool = setting(False, "go on from the newest complete checkpoint in --out")
    overwrite: bool = setting(False, "remove an earlier learning run in --out and start anew")
    dry_run: bool = setting(False, "print the memory that learning needs, from the model's config.json alone")
    learn: dict[str, Any] = setting(factory=dict)

    @property
    def folder(self) -> Path:
        """--out, which is there unless this is a dry run."""
        return cast(Path, self.out)

    @model_validator(mode="after")
    def _fits_together(self) -> Options:
        outputs.refuse_both(self, "steps", "blocks", "One follows from the other.")
        outputs.refuse_both(self, "resume", "overwrite", "Keep the run or replace it.")
        settings.require_given(name for name in ("data", "out") if getattr(self, name) is None and not self.dry_run)
        return self


def run(options: Options) -> None:
    """Learn, and save the artifact in OUT/result; see the module's docstring."""
    config = learning_config(options)
    if options.dry_run:
        print_memory(options, config)
        return
    if options.prior is not None:
        prior = inputs.artifact_folder(options.prior, "--prior")
        if options.overwrite:
            outputs.check_input_stays(prior, options.folder, "--prior")
    outputs.check_run_folder(options)
    inputs.check_text_source(options.data)
    from patch.learn.run import plan_learning
    from patch.runs.arguments import rank, require_trackers
    from patch.runs.progress import StepLines, shows_bars

    require_trackers("--report-to", options.report_to)
    model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    masks, scores, config = _prior(options, config, model)
    tokenizer = inputs.load_tokenizer(options.model)
    blocks = _blocks(options, config, model, tokenizer)
    plan = plan_learning(
        model,
        blocks,
        config,
        prior_masks=masks,
        tile_scores=scores,
        output_dir=options.out,
        resume=options.resume,
        overwrite=options.overwrite,
        exclude=options.exclude,
        report_to=options.report_to,
    )
    if rank() == 0 and not plan.is_finished:
        _print_plan(options, plan, tokenizer)
        if options.overwrite:
            outputs.clear_learning_run(options.folder)
        resolved = dataclasses.replace(options, learn=settings.to_dict(config), resume=False, overwrite=False)
        settings.save_resolved(resolved, options.folder, header="patch-llm learn --config THIS_FILE --resume")
    result = plan.run(callbacks=() if shows_bars() else (StepLines(),))
    if rank() == 0:
        _print_result(options, plan, result)


def _print_plan(options: Options, plan: LearnPlan, tokenizer: Any) -> None:
    """What will be done, and warnings where it will not lead far."""
    from patch.files.progress import say
    from patch.models.keep_masks import zeros_already
    from patch.models.packed_size import expected_packed_text

    config, blocks = plan.config, plan.train_blocks
    steps = config.total_steps(len(blocks))
    plans.say_steps(steps, blocks, config.global_batch_size, config.epochs, cast(str, options.data), tokenizer)
    weights = sum(linear.weight.numel() for linear in plan.linears.values())
    target = "2:4 everywhere, sparsity 0.5" if config.mode == "maskllm" else f"target sparsity {config.target_sparsity}"
    say(f"plan: masks for {len(plan.linears)} linear layers with {weights / 1e6:,.2f} M weights, {target}")
    say(f"plan: {_peak_memory(options, plan)}; a checkpoint every {config.save_steps} steps in {options.out}")
    if plan.checkpoint is not None:
        say(f"plan: going on from {plan.checkpoint.name}")
    batch, epochs = ("--global-batch-size", config.global_batch_size), ("--set learn.epochs=", config.epochs)
    plans.warn_of_few_steps(steps, batch, epochs, steps_flag="" if options.steps is None else "--steps")
    if config.mode != "maskllm":
        say(f"plan: {expected_packed_text(config.target_sparsity, config.tile)}")
    if (already := zeros_already(plan.linears)) is not None:
        logger.warning("%s. Give --model the dense model", already)


def _peak_memory(options: Options, plan: LearnPlan) -> str:
    """The estimate of --dry-run in one line; no model is refused for want of it."""
    from patch.learn.memory import gigabytes, learning_memory
    from patch.runs.arguments import world_size

    if world_size() > 1:
        return "peak memory as --dry-run without torchrun says, in each process"
    dtype = next(iter(plan.linears.values())).weight.dtype
    with_prior = plan.prior_masks is not None
    sizes: dict[str, Any] = {"seqlen": plan.train_blocks.shape[1], "dtype": dtype, "with_prior": with_prior}
    try:
        estimate = learning_memory(plan.model.config, plan.config, exclude=plan.exclude, **sizes)
    except Exception as error:  # of whatever code a model brings, run on tensors without contents
        logger.info("no estimate of memory: %s", error)
        return "peak memory not known"
    return f"about {gigabytes(estimate.peak)} of tensors at the peak"


def _print_result(options: Options, plan: LearnPlan, result: LearnResult) -> None:
    from patch.models.packed_size import packed_text

    steps, target = plan.config.total_steps(len(plan.train_blocks)), plan.config.target_sparsity
    sampled = 1 - result.soft_density
    print(f"learned {len(result.masks)} layers in {steps} steps: target sparsity {target}, sampled masks {sampled:.4f}")
    outputs.print_sparsity(plan.model, result.masks)
    print(packed_text(result.masks))
    next_step = f"patch-llm export --model {options.model} --masks {options.out} --format packed --out packed"
    outputs.print_written(options.folder, "masks, metrics.jsonl and config.resolved.yaml", next_step)


def print_memory(options: Options, config: LearnConfig) -> None:
    """What learning with these options would allocate at its peak; reads config.json and writes nothing."""
    wanted, model_config = inputs.dtype_of(options.dtype), inputs.load_model_config(options.model)
    dtype: torch.dtype | None = model_config.dtype if isinstance(wanted, str) else wanted
    if dtype is None:
        expected = f"expected a dtype in the config.json of {options.model}"
        raise ValueError(f"--dtype: {expected}, got none. Give it, for example --dtype bf16.")
    from patch.learn.memory import learning_memory

    seqlen = _seqlen(options, model_config)
    estimate = learning_memory(
        model_config,
        config,
        seqlen=seqlen,
        dtype=dtype,
        exclude=options.exclude,
        with_prior=options.prior is not None,
    )
    print(
        f"memory to learn {options.model}: preset {config.mode}, {str(dtype).removeprefix('torch.')} weights, "
        f"{config.local_batch_size} x {seqlen} tokens, gradient checkpointing "
        f"{'on' if config.grad_checkpoint else 'off'}"
    )
    print(estimate.text())


def on_interrupt(options: Options) -> str:
    """Learning keeps its checkpoints."""
    if options.dry_run:
        return "nothing was started"
    return outputs.kept_checkpoint(options.folder) or (
        f"no checkpoint was complete yet in {options.out}; run again with --overwrite (or learn.save_steps lower)"
    )


def learning_config(options: Options) -> LearnConfig:
    """LearnConfig of the preset with the settings of the section `learn` on top."""
    settings.check_keys(LearnConfig, options.learn, "learn", prefix="learn.")
    if options.learn.get("mode", options.preset) != options.preset:
        got = f"got {options.learn['mode']!r}. Choose it with --preset."
        raise ValueError(f"learn.mode: expected the mode of preset {options.preset}, {got}")
    sparsity = options.learn.get("target_sparsity")
    if sparsity is None and options.preset != "maskllm":
        advice = "Give a share of zeros, for example --sparsity 0.45."
        raise ValueError(f"--sparsity: expected a target with preset {options.preset}, got none. {advice}")
    # Without a target the preset is maskllm, whose target is always 0.5.
    given = settings.build(
        LearnConfig, {"mode": options.preset, "target_sparsity": 0.5} | options.learn, prefix="learn."
    )
    preset = LearnConfig.from_preset(options.preset, None if sparsity is None else given.target_sparsity)
    return dataclasses.replace(preset, **{name: getattr(given, name) for name in options.learn})


def _prior(
    options: Options, config: LearnConfig, model: nn.Module
) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None, LearnConfig]:
    """(2:4 masks, tile scores) of --prior, or None for what there is not, and the configuration that reads them."""
    if options.prior is None:
        if config.mode == "tile":
            expected = "expected a folder with 2:4 masks for preset tile"
            raise ValueError(f"--prior: {expected}, got none. Make one with `patch-llm prune`.")
        return None, None, config
    artifact = inputs.load_masks(options, options.prior, model, "--prior")
    if artifact.meta.get("pattern") == "unstructured":
        got = f"{options.prior} was pruned unstructured"
        raise ValueError(f"--prior: expected 2:4 masks, {got}. Make it with `patch-llm prune --pattern 2:4`.")
    has_losses = artifact.meta.get("pattern") == "tiles"
    scores, tile = artifact.tile_scores or None, tuple(artifact.meta.get("tile") or ())
    if config.mode == "maskllm":
        return artifact.masks, None, config
    if has_losses and "tile_prior_budget" not in options.learn:
        budget: Any = "layer" if (artifact.meta.get("tiles") or {}).get("budget") == "layer" else "model"
        config = dataclasses.replace(config, tile_prior_budget=budget)
    if scores is None:
        logger.warning("%s has no tile scores: the tile logits start without a prior", options.prior)
    elif tile != config.tile:
        advice = f"Use that tile, or prune again with --tile {config.tile[0]},{config.tile[1]}."
        raise ValueError(f"--tile: expected the tile of the prior's scores, {tile}, got {config.tile}. {advice}")
    elif not has_losses and artifact.meta.get("target_sparsity") != config.target_sparsity:
        logger.warning(
            "the prior's tile scores are for sparsity %s, the target is %s",
            artifact.meta.get("target_sparsity"),
            config.target_sparsity,
        )
    return artifact.masks, scores, config


def _seqlen(options: Options, model: Any) -> int:
    """Tokens per block for a model or its configuration."""
    from patch.models.facts import within_context

    return options.seqlen or within_context(model, DEFAULT_SEQLEN)


def _blocks(options: Options, config: LearnConfig, model: nn.Module, tokenizer: Any) -> Tensor:
    """Packed training blocks, as many as --steps or --blocks ask for."""
    from patch.data.tokens import training_blocks
    from patch_kernels.checks import require_multiple

    seqlen = _seqlen(options, model)
    wanted = options.blocks
    if options.steps is not None:
        require_multiple("--steps", options.steps, config.epochs, "Change one.", named="learn.epochs = ")
        wanted = options.steps // config.epochs * config.global_batch_size
    blocks, _ = training_blocks(
        tokenizer, cast(str, options.data), seqlen, max_blocks=wanted or DEFAULT_BLOCKS, text_field=options.text_field
    )
    if wanted is not None and len(blocks) < wanted:
        expected = f"expected text for {wanted} blocks of {seqlen} tokens, got {len(blocks)}"
        advice = "fewer --steps or --blocks, a smaller --seqlen, or several passes with --set learn.epochs=N"
        raise ValueError(f"--data: {expected}. Give more text, {advice}.")
    return blocks
