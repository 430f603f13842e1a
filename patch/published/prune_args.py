"""The prune_args of the original PATCH code: names, defaults and checks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patch import settings
from patch.data.sources import LOCAL_SUFFIXES, NAMED_SETS
from patch.pruning import ProxSparseConfig, PruneOptions, get_method, proxsparse
from patch.pruning.registry import make_options
from patch.slim import CompressOptions

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
    return settings.build(ProxSparseConfig, given, prefix="prox_sparse.")


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


def _computed(method: str) -> str:
    """The method that is run: a stored mask only needs its tiles scored, which is done by Wanda."""
    return "wanda" if method == MASKLLM else method


def _is_calibrated(args: dict[str, Any]) -> bool:
    return get_method(_computed(args["prune_method"])).needs_calibration or _compression(args).needs_calibration


def _compression(args: dict[str, Any]) -> CompressOptions:
    return CompressOptions(**{key: args[key] for key in CompressOptions().as_dict()})
