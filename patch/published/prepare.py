"""One-shot pruning by the argument names of the original PATCH code, with the result kept in a folder."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from patch.artifacts.apply import apply_artifact
from patch.artifacts.artifact import Artifact, load_artifact, save_artifact
from patch.artifacts.foreign import locate, read_masks
from patch.data.sources import NAMED_SETS
from patch.data.tokens import calibration_windows, training_blocks
from patch.files.folder import resolve_folder
from patch.files.paths import require_place_for_folder
from patch.files.regular import file_sha256
from patch.files.schema import require_seed
from patch.models.checks import require_trained_dtype
from patch.models.coverage import coverage
from patch.models.facts import fingerprints, model_name, versions, within_context
from patch.models.keep_masks import apply_keep_masks
from patch.models.structure import linear_at, maskable_linears
from patch.pruning.model import check_prunable, prune_model
from patch.pruning.options import DEFAULT_SEQLEN
from patch.pruning.tile_scores import reference_tile_scores
from patch.published.arguments import path_of, require_tokenizer
from patch.published.prune_args import PruneArgs, Target, read_prune_args, read_target
from patch.slim.compress import adapters, compress_model
from patch.slim.fine_tune import fine_tune
from patch.slim.options import DEFAULT_BLOCK_SIZE, DEFAULT_BLOCKS, CompressOptions, FineTuneOptions

logger = logging.getLogger(__name__)


def prepare(
    model: nn.Module,
    tokenizer: Any,
    checkpoint_name: str | os.PathLike,
    prune_args: Mapping[str, Any] | Any,
    mask_tile_size: tuple[int, int],
    target_sparsity_ratio: float,
    seed: int,
) -> nn.Module:
    """The work of patch.utils.prepare_pruned_model; see there."""
    require_seed("seed", seed)
    args = read_prune_args(prune_args)
    target = read_target(mask_tile_size, target_sparsity_ratio)
    compress = args.compression()
    _check_further_steps(model, args, compress)
    meta = _meta(model, args, target, seed)
    folder = resolve_folder(path_of(checkpoint_name, "checkpoint_name"), must_exist=False)
    require_place_for_folder("checkpoint_name", folder, "Choose another.")
    if folder.is_dir() and os.listdir(folder):
        logger.info("loading the pruned model from %s", folder)
        artifact = load_artifact(folder, expect=meta)
        for key in ("compression", "fine_tune"):
            if key in artifact.meta and key not in meta:
                got = f"the artifact was made with {key} = {artifact.meta[key]!r}"
                raise ValueError(f"{folder}: expected a result without {key}, {got}; use another checkpoint_name")
        return load_prepared(model, artifact)

    if args.fine_tune or args.is_calibrated:
        require_tokenizer(tokenizer)
    stored = _stored_masks(model, args) if args.is_stored else None
    blocks = _fine_tuning_blocks(model, tokenizer, args, seed) if args.fine_tune else None
    calibration, text_hash = None, None
    if args.is_calibrated:
        calibration, text_hash = calibration_windows(
            tokenizer, args.calibration_dataset, nsamples=args.samples, seqlen=_seqlen(model), seed=seed
        )
    options = {key: getattr(args, key) for key in ("shift_zero_metrics", "precision", "damping", "block_size")}
    options["calibration"] = calibration
    if stored is None:
        check_prunable(model, args.method, args.pruning(), calibration)
    scores = reference_tile_scores(
        model, args.computed_method, target.target_sparsity_ratio, target.mask_tile_size, **options
    )
    updated: dict[str, Tensor] | None = None
    if stored is not None:
        masks = stored
        if not compress.is_active:
            apply_keep_masks(model, masks)
    else:
        # Adapters make up for what was pruned, so compression starts from the dense model.
        pruned = copy.deepcopy(model) if compress.is_active else model
        masks = prune_model(
            pruned,
            args.prune_method,
            pattern=args.sparsity_type,
            sparsity=args.sparsity_ratio,
            prox=args.own_settings,
            **options,
        )
        if compress.is_active and args.method.updates_weights:
            updated = {name: linear_at(pruned, name).weight for name in masks}
        del pruned  # a copy of the whole model
    if compress.is_active:
        compress_model(
            model,
            masks,
            compress,
            weights=updated,
            calibration=calibration,
            shift_zero_metrics=args.shift_zero_metrics,
        )
    if blocks is not None:
        fine_tune(model, blocks, FineTuneOptions(seed=seed))
    weights = {name: linear_at(model, name).weight.detach() for name in masks}
    covered = coverage(model, masks)
    logger.info("%s", covered.text())
    save_artifact(
        folder,
        masks,
        meta=meta
        | {"model": model_name(model), "calibration_text_sha256": text_hash, "versions": versions()}
        | {"coverage": covered.as_dict()},
        tile_scores=scores,
        weights=weights,
        adapters=adapters(model),
    )
    _attach_scores(model, scores)
    return model


def _meta(model: nn.Module, args: PruneArgs, target: Target, seed: int) -> dict[str, Any]:
    """What a checkpoint must have been made with to be reused."""
    meta = {
        **fingerprints(model),
        "method": args.prune_method,
        "pattern": args.sparsity_type,
        "sparsity": args.sparsity_ratio,
        "target_sparsity": target.target_sparsity_ratio,
        "tile": list(target.mask_tile_size),
    }
    if args.maskllm_checkpoint is not None:
        meta["maskllm_sha256"] = file_sha256(Path(os.path.realpath(locate(args.maskllm_checkpoint))))
    if args.own_settings is not None:
        meta[args.prune_method] = dataclasses.asdict(args.own_settings)
    if args.is_calibrated:
        meta |= {
            "calibration": _source_identity(args.calibration_dataset),
            "nsamples": args.samples,
            "seqlen": _seqlen(model),
            "seed": seed,
            "shift_zero_metrics": args.shift_zero_metrics,
            "precision": args.precision,
        }
    if args.method.updates_weights:
        meta |= {"damping": args.damping, "block_size": args.pruning().block_size}
    if args.compression().is_active:
        meta["compression"] = args.compression().as_dict()
    if args.fine_tune:
        meta["fine_tune"] = {"data": _source_identity(args.fine_tune_dataset), "seed": seed}
    return meta


def _stored_masks(model: nn.Module, args: PruneArgs) -> dict[str, Tensor]:
    found = read_masks(args.maskllm_checkpoint or "", model, allow_pt=True)
    if found.pattern != "2:4":
        got = f"{args.maskllm_checkpoint} holds {found.pattern!r}; take it with `patch-llm import-masks`"
        raise ValueError(f"prune_args: maskllm_checkpoint: expected 2:4 masks, {got}")
    return found.masks


def _source_identity(source: str | os.PathLike) -> str:
    """Name of a named set, SHA-256 of a local file."""
    named = os.fspath(source) in NAMED_SETS
    return os.fspath(source) if named else file_sha256(Path(os.path.realpath(source)))


def _check_further_steps(model: nn.Module, args: PruneArgs, compress: CompressOptions) -> None:
    """Refuse layers that compression or fine-tuning cannot work on before they are pruned."""
    for name, linear in maskable_linears(model).items():
        compress.check_shape(tuple(linear.weight.shape), f"layer '{name}'")
        if args.fine_tune:
            require_trained_dtype(linear.weight, f"layer '{name}'")


def _fine_tuning_blocks(model: nn.Module, tokenizer: Any, args: PruneArgs, seed: int) -> Tensor:
    options = FineTuneOptions(seed=seed)
    block_size = within_context(model, DEFAULT_BLOCK_SIZE)
    blocks, _ = training_blocks(tokenizer, args.fine_tune_dataset, block_size, max_blocks=DEFAULT_BLOCKS)
    options.total_steps(len(blocks))  # refuses too little text
    return blocks


def _seqlen(model: nn.Module) -> int:
    given = getattr(model, "seqlen", None)
    return given if isinstance(given, int) else within_context(model, DEFAULT_SEQLEN)


def load_prepared(model: nn.Module, artifact: Artifact) -> nn.Module:
    """Put a result of `prepare` on the dense model."""
    apply_artifact(model, artifact, every_layer=True)
    _attach_scores(model, artifact.tile_scores)
    return model


def _attach_scores(model: nn.Module, scores: Mapping[str, Tensor]) -> None:
    for name, score in scores.items():
        model.get_submodule(name).register_buffer("distribution_scores", score, persistent=False)
