"""What commands read: models, tokenizers, masks, calibration text; refused in one sentence before any work."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from patch.files.paths import require_folder
from patch.files.schema import record
from patch.pruning.options import DEFAULT_NSAMPLES, DEFAULT_SEQLEN
from patch.settings import AtLeastOne, Seed, setting

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from patch.artifacts.artifact import Artifact

FIELD_HELP = "column of a .jsonl or .parquet file (default text)"
SEQLEN_HELP = "tokens per sample (default 2048, or what the model allows)"
EXCLUDE_HELP = "layers to leave dense, as patterns such as '*.k_proj'"
MODEL_HELP = "model folder or Hugging Face id"
DATA_HELP = "text: a .txt, .jsonl or .parquet file, or c4, wikitext2, ptb, slimpajama"
_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DtypeName = Literal["auto", "float32", "bfloat16", "float16", "bf16", "fp16", "fp32"]
TokensToPredict = Annotated[int, Field(ge=2)] | None


@record(kw_only=True)
class PlacementSettings:
    """Where and in which dtype a command loads models."""

    dtype: DtypeName = setting("auto", "dtype to load the model in (default: its own)", metavar="DTYPE")
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: the GPU if there is one)", metavar="DEVICE")


@record(kw_only=True)
class CalibrationSettings:
    """Which calibration samples a command draws from its text."""

    text_field: str | None = setting(None, FIELD_HELP, metavar="NAME")
    nsamples: AtLeastOne = setting(DEFAULT_NSAMPLES, "calibration samples")
    seqlen: AtLeastOne | None = setting(None, SEQLEN_HELP)
    seed: Seed = setting(0, "seed of the calibration samples")


def check_text_source(source: str | None, flag: str = "--data") -> str:
    """A named set or an existing local file; raises before any model is loaded."""
    from patch.data.sources import require_source

    if source is None:
        raise ValueError(f"{flag}: expected a text, got none. Give {DATA_HELP.removeprefix('text: ')}.")
    return require_source(flag, source)


def dtype_of(name: DtypeName) -> torch.dtype | str:
    """torch dtype by name, or "auto"."""
    import torch

    full = _SHORT_DTYPES.get(name, name)
    return full if full == "auto" else getattr(torch, full)


def device_of(name: str | None) -> torch.device:
    """Device by name; None takes the GPU if there is one. raises ValueError when it is not there."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # refused too: it holds no values
    if device.type == "meta":
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}. Use --device cpu.")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        got = f"got {name!r} with {count} GPUs visible to torch"
        raise ValueError(f"--device: expected a GPU that is there, {got}. Use --device cpu, or see `patch-llm info`.")
    return device


def load_model(path: str, *, dtype: DtypeName = "auto", device: str | None = None) -> PreTrainedModel:
    """Causal language model (dense or packed) in evaluation mode."""
    import patch

    hide_bars_without_terminal()

    check_model_path(path)
    where = device_of(device)
    wanted = dtype_of(dtype)
    with _model_errors(path):
        model: PreTrainedModel = patch.load(path, dtype=wanted)
    return model.to(where).eval()  # type: ignore[arg-type]


def load_model_config(path: str, *, packed: bool = False) -> Any:
    """transformers configuration of a dense (or packed, if allowed) model; nothing else of the model is read."""
    from transformers import AutoConfig

    check_model_path(path)
    with _model_errors(path):
        config = AutoConfig.from_pretrained(path)
    if not packed and getattr(config, "quantization_config", None) is not None:
        got = f"{path!r} has a quantization_config in its config.json"
        raise ValueError(f"--model: expected a dense model, {got}. Give the model that it was made from.")
    return config


def load_model_shapes(path: str) -> nn.Module:
    """The model without its weights (on the meta device), where only names and shapes of layers are needed."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_model_config(path)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@contextlib.contextmanager
def _model_errors(path: str) -> Iterator[None]:
    """transformers' errors about a model that is not there, as one sentence that says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        reason = str(error).strip().splitlines()[0]
        got = f"got {path!r} which cannot be loaded ({reason}). Check the name, and the network or the cache."
        raise FileNotFoundError(f"--model: expected a model folder or a Hugging Face id, {got}") from error


def hide_bars_without_terminal() -> None:
    """transformers draws its progress bars into log files too; ours are for terminals only."""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def load_tokenizer(path: str) -> Any:
    """Tokenizer saved beside a model."""
    from transformers import AutoTokenizer

    check_model_path(path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        got = f"got none that loads ({reason}). Save the tokenizer into the model's folder."
        raise FileNotFoundError(f"--model: expected a tokenizer in {path!r}, {got}") from error


def load_masks(path: str | os.PathLike, model: nn.Module, flag: str = "--masks") -> Artifact:
    """Artifact of prune, or of learn (its folder or the result inside), checked against the model."""
    from patch.artifacts.artifact import load_artifact
    from patch.models.facts import config_fingerprint

    artifact = load_artifact(artifact_folder(path, flag), model=model)
    made_for = artifact.meta.get("config_fingerprint")
    if made_for is not None and made_for != config_fingerprint(model.config):
        got = f"{path} was made from {artifact.meta.get('model')!r} whose configuration differs"
        raise ValueError(f"{flag}: expected masks of this model, {got}. Give that model, or make the masks again.")
    return artifact


def refuse_further_steps(meta: Mapping[str, Any], path: str | os.PathLike, steps: Mapping[str, str]) -> None:
    """Refuse masks whose weights are the result of another command, {key of its meta: command}."""
    for key, command in steps.items():
        if meta.get(key) is not None:
            got = f"{path} is a result of {command}, whose weights would be lost"
            raise ValueError(f"--masks: expected masks alone, {got}. Give what it was made from, and {command} later.")


def artifact_folder(path: str | os.PathLike, flag: str = "--masks") -> Path:
    """The artifact at `path`: the folder itself, or `result` in the folder of a learning run."""
    folder = require_folder(flag, path, "a folder made by prune or learn")
    if (folder / "result").is_dir():
        return folder / "result"
    if any(folder.glob("checkpoint-*")):
        got = f"{folder} has checkpoints but no result"
        raise ValueError(f"{flag}: expected a finished learning run, {got}. Finish it with `patch-llm ... --resume`.")
    return folder


def load_calibration(options: Any, model: nn.Module, tokenizer: Any = None) -> tuple[torch.Tensor, str]:
    """Calibration samples (nsamples, seqlen) that a command's options ask for, and the SHA-256 of their text.

    options    with data, text_field, nsamples, seqlen (None: 2048, or what the model allows) and seed
    tokenizer  default: the one saved beside options.model
    """
    from patch.data.tokens import calibration_windows
    from patch.models.facts import within_context

    return calibration_windows(
        load_tokenizer(options.model) if tokenizer is None else tokenizer,
        options.data,
        nsamples=options.nsamples,
        seqlen=options.seqlen or within_context(model, DEFAULT_SEQLEN),
        seed=options.seed,
        text_field=options.text_field,
    )


def check_model_path(path: str) -> None:
    """Refuse a path that cannot hold a model, before anything is loaded."""
    folder = Path(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local:
        require_folder("--model", folder, "a model folder")
    if folder.is_dir() and not (folder / "config.json").is_file():
        advice = "Give the folder of the dense model; folders made by prune or learn belong to --masks."
        raise FileNotFoundError(f"--model: expected a transformers model, {path!r} has no config.json. {advice}")
