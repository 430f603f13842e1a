"""`patch-llm learn`: learn which tiles stay dense and the 2:4 patterns of the others, on frozen weights."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patch import settings
from patch.cli import inputs, outputs
from patch.settings import setting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from patch.learn.config import LearnConfig

logger = logging.getLogger(__name__)

NAME = "learn"
SUMMARY = "learn a PATCH (or MaskLLM) mask on the frozen weights"
EXAMPLES = """\
examples:
  patch-llm prune --model ./llama --method sparsegpt --data c4 --target-sparsity 0.35 --out prior
  patch-llm learn --model ./llama --prior prior --data slimpajama --sparsity 0.35 --out learned
  patch-llm learn --config learned/config.resolved.yaml --resume        # go on after an interrupt
  patch-llm learn --model ./llama --sparsity 0.45 --set learn.grad_checkpoint=true --dry-run    # how much memory
  patch-llm learn --model ./llama --preset tile --prior prior --data text.jsonl --sparsity 0.45 \\
      --steps 200 --set learn.lr=5e-4 --out short

--preset joint learns tiles and 2:4 patterns, tile learns tiles over the fixed patterns of --prior, mask_llm learns
2:4 patterns everywhere. All hyper-parameters are settings learn.NAME for --set and --config; the resolved
configuration with all of them is saved in --out.
"""
SECTION_FLAGS = {
    "--sparsity": (
        "learn.target_sparsity",
        "SHARE",
        "target share of zeros, 0 to 0.5 (mask_llm: always 0.5)",
    ),
    "--tile": ("learn.tile", "R,C", "rows,columns of a tile (default 128,128)"),
    "--lr": ("learn.lr", "LR", "learning rate (default of the preset)"),
    "--local-batch-size": ("learn.local_batch_size", "N", "blocks per forward pass (default 1)"),
    "--global-batch-size": ("learn.global_batch_size", "N", "blocks per optimiser step (default 256)"),
    "--exact-budget": (
        "learn.exact_budget",
        "",
        "choose the dense tiles by rank, so that the target is met exactly",
    ),
    "--seed": ("learn.seed", "N", "seed of initial logits, noise and data order (default 42)"),
}
DEFAULT_BLOCKS = 512_000
DEFAULT_SEQLEN = 4096


@dataclass(frozen=True)
class Options:
    """Settings of `learn`; the hyper-parameters are in the section `learn` (patch.learn.LearnConfig)."""

    model: str = setting(help=inputs.MODEL_HELP, metavar="MODEL")
    data: str | None = setting(None, f"{inputs.DATA_HELP} (required unless --dry-run)", metavar="TEXT")
    out: Path | None = setting(
        None, "folder for the result, checkpoints and metrics.jsonl (required unless --dry-run)", metavar="DIR"
    )
    preset: Literal["joint", "tile", "mask_llm"] = setting(
        "joint", "published hyper-parameters: joint, tile or mask_llm (default joint)", metavar="PRESET"
    )
    prior: str | None = setting(None, "folder made by prune: 2:4 masks and tile scores to start from", metavar="DIR")
    steps: int | None = setting(None, "optimiser steps (default: what --blocks gives)", metavar="N")
    blocks: int | None = setting(None, "blocks of text to train on (default: all, at most 512000)", metavar="N")
    seqlen: int | None = setting(None, "tokens per block (default 4096, or what the model allows)", metavar="N")
    text_field: str | None = setting(None, "column of a .jsonl or .parquet file (default text)", metavar="NAME")
    exclude: tuple[str, ...] = setting((), "layers to leave dense, as patterns such as '*.k_proj'", metavar="A,B")
    dtype: str = setting("auto", "dtype to load the model in (default: its own)", metavar="DTYPE")
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: the GPU if there is one)", metavar="DEVICE")
    resume: bool = setting(False, "go on from the newest complete checkpoint in --out")
    overwrite: bool = setting(False, "remove an earlier learning run in --out and start anew")
    dry_run: bool = setting(False, "print the memory that learning needs, from the model's config.json alone")
    learn: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps is not None and self.blocks is not None:
            raise ValueError("--steps and --blocks: expected one of them, got both. One follows from the other.")
        for name in ("steps", "blocks", "seqlen"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value}. Leave it out for the default.")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite: expected one of them, got both. Keep the run or replace it.")
        needed = [f"--{name}" for name in ("data", "out") if getattr(self, name) is None and not self.dry_run]
        if needed:
            raise ValueError(
                f"expected {', '.join(needed)}, got nothing. Give it as a flag, in --config, or by --set KEY=VALUE."
            )


def run(options: Options) -> None:
    """Learn, and save the artifact in OUT/result; see the module's docstring."""
    config = learning_config(options)
    if options.dry_run:
        print_memory(options, config)
        return
    _check_out(options)
    inputs.check_text_source(options.data)
    if options.prior is not None:
        prior = inputs.artifact_folder(options.prior, "--prior")
        if options.overwrite:
            outputs.check_input_stays(prior, options.out, "--prior")
    from patch.learn.run import learn
    from patch.models.keep_masks import measured_sparsity

    model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    masks, scores = _prior(options, config, model)
    blocks = _blocks(options, config, model)
    if options.overwrite:
        outputs.clear_learning_run(options.out)
    resolved = dataclasses.replace(options, learn=settings.to_dict(config), resume=False, overwrite=False)
    settings.save_resolved(resolved, options.out, header="patch-llm learn --config THIS_FILE --resume")
    result = learn(
        model,
        blocks,
        config,
        prior_masks=masks,
        tile_scores=scores,
        output_dir=options.out,
        resume=options.resume,
        exclude=options.exclude,
    )
    print(
        f"learned {len(result.masks)} layers in {config.total_steps(len(blocks))} steps: sparsity "
        f"{measured_sparsity(result.masks):.4f} (target {config.target_sparsity}, sampled masks "
        f"{1 - result.soft_density:.4f})"
    )
    next_step = f"patch-llm export --model {options.model} --masks {options.out} --format packed --out packed"
    outputs.print_written(options.out, "masks, metrics.jsonl and config.resolved.yaml", next_step)


def print_memory(options: Options, config: LearnConfig) -> None:
    """What learning with these options would allocate at its peak; reads config.json and writes nothing."""
    dtype, model_config = inputs.dtype_of(options.dtype), inputs.load_model_config(options.model)
    if dtype == "auto":
        dtype = model_config.dtype
    if dtype is None:
        raise ValueError(
            f"--dtype: expected a dtype in the config.json of {options.model}, got none. Give it, for example --dtype "
            "bf16."
        )
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
    found = [p for p in Path(options.out).glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    if not found:
        return (
            f"no checkpoint was complete yet in {options.out}; run again with --overwrite (or learn.save_steps lower)"
        )
    newest = max(found, key=lambda path: int(path.name.rpartition("-")[2]))
    return f"{newest} is kept; go on with the same command and --resume"


def learning_config(options: Options) -> LearnConfig:
    """LearnConfig of the preset with the settings of the section `learn` on top."""
    from patch.learn.config import LearnConfig

    settings.check_keys(LearnConfig, options.learn, "learn", prefix="learn.")
    if options.learn.get("mode", options.preset) != options.preset:
        raise ValueError(
            f"learn.mode: expected the mode of preset {options.preset}, got {options.learn['mode']!r}. Choose it with "
            "--preset."
        )
    sparsity = options.learn.get("target_sparsity")
    if sparsity is None and options.preset != "mask_llm":
        raise ValueError(
            f"--sparsity: expected a target with preset {options.preset}, got none. Give a share of zeros, for example "
            "--sparsity 0.45."
        )
    if sparsity is not None:
        sparsity = settings.convert(sparsity, float, "learn.target_sparsity")
    preset = settings.to_dict(LearnConfig.from_preset(options.preset, sparsity))
    return settings.build(LearnConfig, preset | options.learn, prefix="learn.")


def _check_out(options: Options) -> None:
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out: expected a folder, {options.out} is a file. Choose another --out.")
    earlier = [name for name in ("result", "metrics.jsonl") if (options.out / name).exists()]
    earlier += sorted(path.name for path in options.out.glob("checkpoint-*"))
    if earlier and not (options.resume or options.overwrite):
        raise ValueError(
            f"--out: expected no earlier learning run, {options.out} has {', '.join(earlier[:4])}. Use --resume, "
            "replace it with --overwrite, or choose another --out."
        )


def _prior(options: Options, config: LearnConfig, model: nn.Module):
    """(2:4 masks, tile scores) of --prior, or None for what there is not."""
    if options.prior is None:
        if config.mode == "tile":
            raise ValueError(
                "--prior: expected a folder with 2:4 masks for preset tile, got none. Make one with `patch-llm prune`."
            )
        return None, None
    artifact = inputs.load_masks(options.prior, model, "--prior")
    if artifact.meta.get("pattern") == "unstructured":
        raise ValueError(
            f"--prior: expected 2:4 masks, {options.prior} was pruned unstructured. Make it with `patch-llm prune "
            "--pattern 2:4`."
        )
    scores = artifact.tile_scores or None
    if config.mode == "mask_llm":
        return artifact.masks, None
    if scores is None:
        logger.warning("%s has no tile scores: the tile logits start without a prior", options.prior)
    elif tuple(artifact.meta.get("tile") or ()) != config.tile:
        raise ValueError(
            f"--tile: expected the tile of the prior's scores, {tuple(artifact.meta.get('tile') or ())}, got "
            f"{config.tile}. Use that tile, or prune again with --tile {config.tile[0]},{config.tile[1]}."
        )
    elif artifact.meta.get("target_sparsity") != config.target_sparsity:
        logger.warning(
            "the prior's tile scores are for sparsity %s, the target is %s",
            artifact.meta.get("target_sparsity"),
            config.target_sparsity,
        )
    return artifact.masks, scores


def _seqlen(options: Options, model: Any) -> int:
    """Tokens per block for a model or its configuration."""
    from patch.models.facts import context_length

    return options.seqlen or min(DEFAULT_SEQLEN, context_length(model) or DEFAULT_SEQLEN)


def _blocks(options: Options, config: LearnConfig, model: nn.Module) -> Tensor:
    """Packed training blocks, as many as --steps or --blocks ask for."""
    from patch.data.tokens import training_blocks

    seqlen = _seqlen(options, model)
    wanted = options.blocks
    if options.steps is not None:
        if options.steps % config.epochs:
            raise ValueError(
                f"--steps: expected a multiple of learn.epochs = {config.epochs}, got {options.steps}. Change one."
            )
        wanted = options.steps // config.epochs * config.global_batch_size
    tokenizer = inputs.load_tokenizer(options.model)
    blocks, _ = training_blocks(
        tokenizer, options.data, seqlen, max_blocks=wanted or DEFAULT_BLOCKS, text_field=options.text_field
    )
    if wanted is not None and len(blocks) < wanted:
        raise ValueError(
            f"--data: expected text for {wanted} blocks of {seqlen} tokens, got {len(blocks)}. Give more text, fewer "
            "--steps or --blocks, a smaller --seqlen, or several passes with --set learn.epochs=N."
        )
    return blocks
