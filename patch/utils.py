"""The functions of the original PATCH code under their names and arguments, on top of this package.

    model, lm_eval_model = get_llm("Qwen/Qwen2.5-0.5B")
    model = prepare_pruned_model(model, tokenizer, "checkpoints/qwen-wanda", prune_args, (128, 128), 0.45)
    ppl, accuracy = evaluate(model, lm_eval_model, tokenizer)

Differences on purpose: an existing checkpoint is loaded and verified (it used to be ignored and the dense
model returned), missing prune_args have defaults, unknown ones are refused, sets without data are an error.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patch import config as configuration
from patch.checkpoint import (
    Artifact,
    config_fingerprint,
    load_artifact,
    model_fingerprint,
    save_artifact,
)
from patch.data import calibration_windows, training_blocks
from patch.evaluate import context_length, perplexity_report, versions
from patch.folder import file_sha256, resolve_folder
from patch.foreign_masks import locate, read_masks
from patch.models import apply_keep_masks, maskable_linears
from patch.priors import tile_scores
from patch.pruning import (
    ProxSparseConfig,
    PruneOptions,
    check_prunable,
    get_method,
    proxsparse,
    prune_model,
    reference_method,
)
from patch.pruning.methods import make_options
from patch.slim import CompressOptions, compress_model
from patch.slim.compress import adapters, restore_compression, stored_options
from patch.slim.fine_tune import DEFAULT_BLOCK_SIZE, DEFAULT_BLOCKS, FineTuneOptions, check_trainable, fine_tune
from patch.sources import LOCAL_SUFFIXES, NAMED_SETS
from patch.zero_shot import ZERO_SHOT_TASKS, lm_eval_model, zero_shot

logger = logging.getLogger(__name__)

DEFAULT_SEQLEN = 2048
MASKLLM = "maskllm"  # not a pruning method: the masks are those of prune_args["maskllm_checkpoint"]
PRUNE_DEFAULTS: dict[str, Any] = {
    "prune_method": "wanda",
    "sparsity_type": "2:4",
    "sparsity_ratio": 0.5,
    "nsamples": 128,
    "maskllm_checkpoint": None,
    "optimizer_FT_pruning": "adamw_torch",
    "calibration_dataset": "c4",
    "eval_dataset": "wikitext2",
    "shift_zero_metrics": False,
    "precision": "fp32",
    "damping": 0.01,
    "block_size": None,
    "fine_tune": False,
    "prox_sparse": None,
    "fine_tune_dataset": "slimpajama",
} | CompressOptions().as_dict()


def prepare_pruned_model(
    model: nn.Module,
    tokenizer: Any,
    checkpoint_name: str | os.PathLike,
    prune_args: Mapping[str, Any] | Any,
    mask_tile_size: tuple[int, int],
    target_sparsity_ratio: float,
    seed: int = 0,
) -> nn.Module:
    """One-shot prune the model in place, or load an earlier result; returns the model.

    checkpoint_name        folder of the result. If it exists it is loaded, after checking that it was made
                           from this model, method, ratio, tile size, calibration set and seed.
    prune_args             dict or namespace with keys of PRUNE_DEFAULTS; "prox_sparse" takes a dict with fields of
                           patch.pruning.ProxSparseConfig for that method, whose nsamples is 400 by default
    mask_tile_size         (rows, cols) of the tiles that will be learned
    target_sparsity_ratio  0..0.5, of the unstructured reference model that gives the tile scores
    prune_method "maskllm" takes the masks of maskllm_checkpoint: a MaskLLM or PATCH file (patch.foreign_masks; a
    .pt too), a folder with one, or a Hugging Face repository. Its reference model is pruned by Wanda.
    Every pruned layer gets its keep mask (patch.models.keep_masks) and a buffer `distribution_scores`
    (rows, cols), the share of weights that the reference keeps in each tile. The reference of prox_sparse, which
    knows no unstructured masks, is pruned by wanda.
    With quantize_weight or lora_rank it is then compressed (patch.slim), with fine_tune its kept weights and
    adapters are trained; neither changes a mask.
    raises  ValueError or TypeError before any work.
    """
    args = _prune_args(prune_args)
    tile = _tile(mask_tile_size)
    _check_ratio("target_sparsity_ratio", target_sparsity_ratio)
    meta = _meta(model, args, tile, target_sparsity_ratio, seed)
    compress = _compression(args)
    _check_further_steps(model, args, compress)
    folder = resolve_folder(checkpoint_name, must_exist=False)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder or a new path, found a file; choose another checkpoint_name")
    if folder.is_dir() and os.listdir(folder):
        logger.info("loading the pruned model from %s", folder)
        artifact = load_artifact(folder, expect=meta, model=model)
        for key in ("compression", "fine_tune"):
            if key in artifact.meta and key not in meta:
                raise ValueError(
                    f"{folder}: expected a result without {key}, the artifact was made with {key} = "
                    f"{artifact.meta[key]!r}; use the same prune_args or another checkpoint_name"
                )
        return _apply(model, artifact)

    stored = _stored_masks(model, args) if args["prune_method"] == MASKLLM else None
    blocks = _fine_tuning_blocks(model, tokenizer, args, seed) if args["fine_tune"] else None
    calibration, text_hash = None, None
    if _is_calibrated(args):
        calibration, text_hash = calibration_windows(
            tokenizer,
            args["calibration_dataset"],
            nsamples=args["nsamples"],
            seqlen=_seqlen(model),
            seed=seed,
        )
    options = {key: args[key] for key in ("shift_zero_metrics", "precision", "damping", "block_size")}
    options["calibration"] = calibration
    if stored is None:
        check_prunable(model, get_method(args["prune_method"]), _pruning(args), calibration)
    reference = copy.deepcopy(model)
    reference_masks = prune_model(
        reference,
        reference_method(_computed(args["prune_method"])),
        pattern="unstructured",
        sparsity=target_sparsity_ratio,
        **options,
    )
    scores = {name: tile_scores(keep, tile) for name, keep in reference_masks.items()}
    del reference, reference_masks
    updated = None
    if stored is not None:
        masks = stored
        if not compress.is_active:
            apply_keep_masks(model, masks)
    else:
        # Adapters make up for what was pruned, so compression starts from the dense model.
        pruned = copy.deepcopy(model) if compress.is_active else model
        masks = prune_model(
            pruned,
            args["prune_method"],
            pattern=args["sparsity_type"],
            sparsity=args["sparsity_ratio"],
            prox=args["prox_sparse"],
            **options,
        )
        if compress.is_active and get_method(args["prune_method"]).updates_weights:
            updated = {name: pruned.get_submodule(name).weight for name in masks}
        del pruned  # a copy of the whole model
    if compress.is_active:
        compress_model(
            model,
            masks,
            compress,
            weights=updated,
            calibration=calibration,
            shift_zero_metrics=args["shift_zero_metrics"],
        )
    if blocks is not None:
        fine_tune(model, blocks, FineTuneOptions(seed=seed))
    weights = {name: model.get_submodule(name).weight.detach() for name in masks}
    save_artifact(
        folder,
        masks,
        meta=meta | {"model": _name(model), "calibration_text_sha256": text_hash, "versions": versions()},
        tile_scores=scores,
        weights=weights,
        adapters=adapters(model),
    )
    _attach_scores(model, scores)
    return model


def load_compressed_model(
    model: nn.Module, mask_tile_size: tuple[int, int], checkpoint_name: str | os.PathLike
) -> nn.Module:
    """Put the result of prepare_pruned_model into a dense model of the same architecture, in place.

    raises  FileNotFoundError; ValueError when the tile size, the config, a layer or a shape differs.
    """
    expect = {"tile": list(_tile(mask_tile_size)), "config_fingerprint": config_fingerprint(model.config)}
    return _apply(model, load_artifact(checkpoint_name, expect=expect, model=model))


def evaluate(
    model: nn.Module,
    lm_eval_model: Any,
    tokenizer: Any,
    evaluate_perplexity: bool = True,
    eval_dataset: str | os.PathLike = "wikitext2",
    eval_batch_size: int = 1,
    test_lmharness: bool = True,
) -> tuple[float, dict[str, float]]:
    """(perplexity, zero-shot accuracies with their mean under "average").

    lm_eval_model   the model's HFLM from get_llm or learn_mask; None: made here
    eval_dataset    named set or local file; windows of 4096 tokens or of the model's context, if shorter
    What is switched off is returned as 0.0 and {}.
    """
    value, results = 0.0, {}
    if evaluate_perplexity:
        report = perplexity_report(model, tokenizer, eval_dataset, batch_size=eval_batch_size)
        logger.info("perplexity %.4f (%s)", report["perplexity"], report)
        value = report["perplexity"]
    if test_lmharness:
        results = zero_shot(model, tokenizer, ZERO_SHOT_TASKS, wrapped=lm_eval_model)
    return value, results


def get_llm(
    model_name: str | os.PathLike,
    local_files_only: bool = False,
    hf_token: str | None = None,
    seqlen: int = DEFAULT_SEQLEN,
    *,
    dtype: torch.dtype | str = "auto",
) -> tuple[nn.Module, Any]:
    """(causal language model on the CPU, its lm-eval wrapper or None when lm-eval is not installed).

    seqlen  length of calibration samples, cut to the model's context; kept as model.seqlen
    dtype   "auto": that of the checkpoint, so that no small weight is rounded to zero
    """
    if isinstance(seqlen, bool) or not isinstance(seqlen, int) or seqlen < 1:
        raise ValueError(f"expected seqlen >= 1, got {seqlen!r}; the paper uses {DEFAULT_SEQLEN}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"local_files_only": local_files_only, "token": hf_token}
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, **options).eval()
    model.seqlen = min(seqlen, context_length(model) or seqlen)
    try:
        wrapped = lm_eval_model(model, AutoTokenizer.from_pretrained(model_name, **options))
    except ImportError:
        logger.info("lm-eval is not installed: no zero-shot evaluation")
        wrapped = None
    return model, wrapped


def _prune_args(given: Mapping[str, Any] | Any) -> dict[str, Any]:
    values = dict(given) if isinstance(given, Mapping) else dict(vars(given)) if hasattr(given, "__dict__") else None
    if values is None:
        raise TypeError(f"prune_args: expected a dict or a namespace, got {type(given).__name__}")
    if unknown := sorted(set(values) - set(PRUNE_DEFAULTS)):
        raise ValueError(f"prune_args: unknown keys {unknown}; expected only {sorted(PRUNE_DEFAULTS)}")
    args = PRUNE_DEFAULTS | values
    if get_method(_computed(args["prune_method"])).is_learned:
        args["nsamples"] = values.get("nsamples", proxsparse.DEFAULT_NSAMPLES)
        args["prox_sparse"] = _prox_config(args["prox_sparse"])
        if args["sparsity_type"] != "2:4":
            raise ValueError(
                f"prune_args: expected sparsity_type '2:4' for prox_sparse, got {args['sparsity_type']!r}; use wanda "
                "for an unstructured mask"
            )
    elif args["prox_sparse"] is not None:
        raise ValueError(
            f"prune_args: expected prox_sparse only with prune_method 'prox_sparse', got it with "
            f"{args['prune_method']!r}; leave it out"
        )
    _check_ratio("prune_args['sparsity_ratio']", args["sparsity_ratio"])
    if args["sparsity_type"] not in ("2:4", "unstructured"):
        raise ValueError(f"prune_args: expected sparsity_type '2:4' or 'unstructured', got {args['sparsity_type']!r}")
    if args["sparsity_type"] == "2:4" and args["sparsity_ratio"] != 0.5:
        raise ValueError(
            f"prune_args: expected sparsity_ratio 0.5 for 2:4, got {args['sparsity_ratio']}; set it to 0.5"
        )
    if isinstance(args["nsamples"], bool) or not isinstance(args["nsamples"], int) or args["nsamples"] < 1:
        raise ValueError(f"prune_args: expected nsamples >= 1, got {args['nsamples']!r}; the paper uses 128")
    if args["optimizer_FT_pruning"] != "adamw_torch":
        raise ValueError(
            f"prune_args: expected optimizer_FT_pruning 'adamw_torch', got {args['optimizer_FT_pruning']!r}; "
            "no other "
            "optimizer is available"
        )
    for key in ("shift_zero_metrics", "fine_tune"):
        if not isinstance(args[key], bool):
            raise TypeError(f"prune_args: expected {key} True or False, got {args[key]!r}")
    _pruning(args)
    compress = _compression(args)
    fixed_adapters = compress.lora_rank == 0 or compress.quantize_lora or compress.prune_lora
    if args["fine_tune"] and compress.quantize_weight and fixed_adapters:
        raise ValueError(
            "prune_args: expected fine_tune with weights or adapters that are not quantised, got quantised ones only; "
            "set lora_rank without quantize_lora and prune_lora, or leave fine_tune out"
        )
    checkpoint = args["maskllm_checkpoint"]
    if (args["prune_method"] == MASKLLM) != (checkpoint is not None):
        raise ValueError(
            f"prune_args: expected prune_method 'maskllm' and maskllm_checkpoint together, got "
            f"{args['prune_method']!r} and {checkpoint!r}; give both or neither"
        )
    if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(f"prune_args: expected maskllm_checkpoint as a name or path, got {type(checkpoint).__name__}")
    if checkpoint is not None and args["sparsity_type"] != "2:4":
        raise ValueError(
            f"prune_args: expected sparsity_type '2:4' with prune_method 'maskllm', got {args['sparsity_type']!r}"
        )
    for key in ("calibration_dataset", "eval_dataset", "fine_tune_dataset"):
        source = args[key]
        if not isinstance(source, str | os.PathLike):
            raise TypeError(f"prune_args: expected {key} as a name or path, got {type(source).__name__}")
        if os.fspath(source) not in NAMED_SETS and not Path(source).is_file():
            raise FileNotFoundError(
                f"prune_args: expected {key} to be one of {sorted(NAMED_SETS)} or a local file "
                f"({', '.join(LOCAL_SUFFIXES)}), got {os.fspath(source)!r}; check the path"
            )
    return args


def _prox_config(given: Any) -> ProxSparseConfig:
    if given is None or isinstance(given, ProxSparseConfig):
        return given or ProxSparseConfig()
    if not isinstance(given, Mapping):
        raise TypeError(f"prune_args: expected prox_sparse as a dict or ProxSparseConfig, got {type(given).__name__}")
    return configuration.build(ProxSparseConfig, given, prefix="prox_sparse.")


def _pruning(args: Mapping[str, Any]) -> PruneOptions:
    """Checked options of the pruning itself, with the method's block size where none is given."""
    keys = ("sparsity_type", "sparsity_ratio", "block_size", "damping", "shift_zero_metrics", "precision")
    try:
        return make_options(get_method(_computed(args["prune_method"])), *(args[key] for key in keys))
    except (TypeError, ValueError) as error:
        raise type(error)(f"prune_args: {error}") from error


def _tile(size: Any) -> tuple[int, int]:
    valid = isinstance(size, tuple | list) and len(size) == 2
    if not valid or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size):
        raise ValueError(
            f"mask_tile_size: expected (rows, cols), two integers > 0, got {size!r}; the paper uses (128, 128)"
        )
    if size[1] % 4:
        raise ValueError(f"mask_tile_size: expected columns in multiples of 4 (2:4 groups), got {size[1]}")
    return size[0], size[1]


def _check_ratio(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 0.5:
        raise ValueError(f"{name}: expected a share of zeros of 0 to 0.5, got {value!r}; 45 % is 0.45")


def _meta(model: nn.Module, args: dict[str, Any], tile: tuple[int, int], target: float, seed: int) -> dict[str, Any]:
    """What a checkpoint must have been made with to be reused."""
    method = args["prune_method"]
    meta = {
        "config_fingerprint": config_fingerprint(model.config),
        "model_fingerprint": model_fingerprint(model),
        "method": method,
        "pattern": args["sparsity_type"],
        "sparsity": args["sparsity_ratio"],
        "target_sparsity": target,
        "tile": list(tile),
    }
    if method == MASKLLM:
        meta["maskllm_sha256"] = file_sha256(Path(os.path.realpath(locate(args["maskllm_checkpoint"]))))
    if args["prox_sparse"] is not None:
        meta["prox_sparse"] = dataclasses.asdict(args["prox_sparse"])
    if _is_calibrated(args):
        meta |= {
            "calibration": _source_identity(args["calibration_dataset"]),
            "nsamples": args["nsamples"],
            "seqlen": _seqlen(model),
            "seed": seed,
            "shift_zero_metrics": args["shift_zero_metrics"],
            "precision": args["precision"],
        }
    if get_method(_computed(method)).updates_weights:
        meta |= {"damping": args["damping"], "block_size": _pruning(args).block_size}
    if _compression(args).is_active:
        meta["compression"] = _compression(args).as_dict()
    if args["fine_tune"]:
        meta["fine_tune"] = {"data": _source_identity(args["fine_tune_dataset"]), "seed": seed}
    return meta


def _computed(method: str) -> str:
    """The method that is run: a stored mask only needs its tiles scored, which is done by Wanda."""
    return "wanda" if method == MASKLLM else method


def _stored_masks(model: nn.Module, args: Mapping[str, Any]) -> dict[str, Tensor]:
    found = read_masks(args["maskllm_checkpoint"], model, allow_pt=True)
    if found.pattern != "2:4":
        raise ValueError(
            f"prune_args: expected 2:4 masks as maskllm_checkpoint, {args['maskllm_checkpoint']} holds the pattern "
            f"{found.pattern!r}; take it with `patch-llm import-masks`"
        )
    return found.masks


def _source_identity(source: str | os.PathLike) -> str:
    """Name of a named set, SHA-256 of a local file."""
    named = os.fspath(source) in NAMED_SETS
    return os.fspath(source) if named else file_sha256(Path(os.path.realpath(source)))


def _is_calibrated(args: dict[str, Any]) -> bool:
    return get_method(_computed(args["prune_method"])).needs_calibration or _compression(args).needs_calibration


def _compression(args: dict[str, Any]) -> CompressOptions:
    return CompressOptions(**{key: args[key] for key in CompressOptions().as_dict()})


def _check_further_steps(model: nn.Module, args: dict[str, Any], compress: CompressOptions) -> None:
    """Refuse layers that compression or fine-tuning cannot work on before they are pruned."""
    for name, linear in maskable_linears(model).items():
        compress.check_shape(tuple(linear.weight.shape), f"layer '{name}'")
        if args["fine_tune"]:
            check_trainable(linear.weight, f"layer '{name}'")


def _fine_tuning_blocks(model: nn.Module, tokenizer: Any, args: dict[str, Any], seed: int) -> Tensor:
    options = FineTuneOptions(seed=seed)
    block_size = min(DEFAULT_BLOCK_SIZE, context_length(model) or DEFAULT_BLOCK_SIZE)
    blocks, _ = training_blocks(tokenizer, args["fine_tune_dataset"], block_size, max_blocks=DEFAULT_BLOCKS)
    options.total_steps(len(blocks))  # refuses too little text
    return blocks


def _seqlen(model: nn.Module) -> int:
    given = getattr(model, "seqlen", None)
    return given if isinstance(given, int) else min(DEFAULT_SEQLEN, context_length(model) or DEFAULT_SEQLEN)


def _name(model: nn.Module) -> str:
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


@torch.no_grad()
def _apply(model: nn.Module, artifact: Artifact) -> nn.Module:
    options = stored_options(artifact.meta.get("compression"))
    apply_keep_masks(model, artifact.masks)  # refuses a wrong set of layers before it changes any
    for name, weight in artifact.weights.items():
        model.get_submodule(name).weight.copy_(weight.masked_fill(~artifact.masks[name], 0))
    restore_compression(model, artifact.adapters, options)
    _attach_scores(model, artifact.tile_scores)
    return model


def _attach_scores(model: nn.Module, scores: Mapping[str, Tensor]) -> None:
    for name, score in scores.items():
        model.get_submodule(name).register_buffer("distribution_scores", score, persistent=False)
