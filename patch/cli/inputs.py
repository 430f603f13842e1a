"""What commands read: models, tokenizers, masks, calibration text; refused in one sentence before any work."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from patch.files.paths import require_folder
from patch.files.schema import record
from patch.pruning.options import (
    DEFAULT_EXPERT_TOKENS,
    DEFAULT_NSAMPLES,
    DEFAULT_SEQLEN,
    EXPERT_TOKENS_HELP,
    FEW_EXPERTS_HELP,
    FewExperts,
)
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
_HUB_SECONDS = 10
TokensToPredict = Annotated[int, Field(ge=2)] | None


# Whether the command that runs may execute code that comes with a model: said once, by main, for all it loads.
may_run_code: ContextVar[bool] = ContextVar("may_run_code", default=False)


@record(kw_only=True)
class ModelSettings:
    """What every command that loads models has."""

    trust_remote_code: bool = setting(False, "run the Python code that a model brings along; read it before")


@record(kw_only=True)
class PlacementSettings(ModelSettings):
    """Where and in which dtype a command loads models."""

    dtype: DtypeName = setting("auto", "dtype to load the model in (default: its own)", metavar="DTYPE")
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: the GPU if there is one)", metavar="DEVICE")


@record(kw_only=True)
class MaskSettings:
    """Which masks a command accepts for its model."""

    masks_of_another_model: bool = setting(
        False, "accept masks (not weights) that were made from another model with layers of the same shapes"
    )


@record(kw_only=True)
class CalibrationSettings:
    """Which calibration samples a command draws from its text."""

    text_field: str | None = setting(None, FIELD_HELP, metavar="NAME")
    nsamples: AtLeastOne = setting(DEFAULT_NSAMPLES, "calibration samples")
    seqlen: AtLeastOne | None = setting(None, SEQLEN_HELP)
    seed: Seed = setting(0, "seed of the calibration samples")


@record(kw_only=True)
class ExpertSettings:
    """What a command does about experts that few calibration tokens reach."""

    expert_tokens: AtLeastOne = setting(DEFAULT_EXPERT_TOKENS, EXPERT_TOKENS_HELP)
    few_experts: FewExperts = setting("magnitude", FEW_EXPERTS_HELP, metavar="RULE")


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


def load_model(
    path: str, *, dtype: DtypeName = "auto", device: str | None = None, flag: str = "--model"
) -> PreTrainedModel:
    """Causal language model (dense or packed) in evaluation mode, all of its weights finite."""
    import patch
    from patch.models.checks import require_finite_model

    hide_bars_without_terminal()

    where = device_of(device)
    wanted = dtype_of(dtype)
    load_model_config(path, packed=True, flag=flag)
    with _model_errors(path, flag):
        model: PreTrainedModel = patch.load(path, dtype=wanted, trust_remote_code=may_run_code.get())
    require_finite_model(model, flag)
    return model.to(where).eval()  # type: ignore[arg-type]


def load_model_config(path: str, *, packed: bool = False, flag: str = "--model") -> Any:
    """transformers configuration of a dense (or packed, if allowed) model; nothing else of the model is read."""
    from transformers import AutoConfig

    from patch.models.checks import require_known_special_tokens

    check_model_path(path, flag)
    _check_hub(path, flag)
    with _model_errors(path, flag):
        config = AutoConfig.from_pretrained(path, trust_remote_code=may_run_code.get())
    # What the embedding takes as its padding index: it fails on a wrong one without naming the key.
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    require_known_special_tokens(
        config.get_text_config(), f"{path}/config.json", vocabulary, ("pad_token_id",), least=-1
    )
    if not packed and getattr(config, "quantization_config", None) is not None:
        got = f"{path!r} has a quantization_config in its config.json"
        raise ValueError(f"--model: expected a dense model, {got}. Give the model that it was made from.")
    return config


def load_model_shapes(path: str) -> nn.Module:
    """The model without its weights (on the meta device), where only names and shapes of layers are needed."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_model_config(path)
    with _model_errors(path), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=may_run_code.get())


@contextlib.contextmanager
def _model_errors(path: str, flag: str = "--model") -> Iterator[None]:
    """transformers' errors about a model that it cannot load, as one sentence that says what to do."""
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        if _is_ours(error):
            raise
        raise _refused_model(path, error, flag) from error


def _is_ours(error: Exception) -> bool:
    """Whether our own code raised it, in a full sentence."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return name.partition(".")[0] in ("patch", "patch_kernels")


def _refused_model(path: str, error: Exception, flag: str) -> Exception:
    """The sentence for transformers' error about a model."""
    reason = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())
    if "trust_remote_code" in str(error):
        got = f"{path!r} brings code of its own that would be run"
        advice = "Read that code, then give --trust-remote-code if you trust it."
        return ValueError(f"{flag}: expected a model whose code is in transformers, {got}. {advice}")
    if isinstance(error, OSError) and not Path(path).is_dir():
        got = f"got {path!r} which cannot be loaded ({reason}). Check the name, and the network or the cache."
        return FileNotFoundError(f"{flag}: expected a model folder or a Hugging Face id, {got}")
    if "out of memory" in reason:
        return error
    got = f"got {path!r} which does not load ({type(error).__name__}: {reason})"
    return ValueError(f"{flag}: expected a model that transformers loads, {got}. Correct its config.json or files.")


def hide_bars_without_terminal() -> None:
    """transformers draws its progress bars into log files too; ours are for terminals only."""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def load_tokenizer(path: str) -> Any:
    """Tokenizer saved beside a model."""
    from transformers import AutoTokenizer

    check_model_path(path)
    _check_hub(path, "--model")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=may_run_code.get())
    except ImportError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _refused_model(path, error, "--model") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        got = f"got none that loads ({reason}). Save the tokenizer into the model's folder."
        raise FileNotFoundError(f"--model: expected a tokenizer in {path!r}, {got}") from error


def load_masks(options: Any, path: str | os.PathLike, model: nn.Module, flag: str = "--masks") -> Artifact:
    """Artifact of prune, or of learn (its folder or the result inside), checked against the dense model.

    options  with masks_of_another_model
    """
    from patch.artifacts.artifact import load_artifact

    folder = artifact_folder(path, flag)
    return load_artifact(folder, model=model, masks_of_another_model=options.masks_of_another_model)


def put_masks(options: Any, path: str | os.PathLike, model: nn.Module) -> Artifact:
    """The artifact of `load_masks`, put on the dense model."""
    from patch.artifacts.apply import apply_artifact
    from patch.artifacts.artifact import load_artifact

    artifact = load_artifact(artifact_folder(path))
    apply_artifact(model, artifact, masks_of_another_model=options.masks_of_another_model)
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
    if (folder / "config.json").is_file():
        got = f"{folder} is a model"
        advice = "Give masks, and a model as --model (`eval` takes more of them as --compare)."
        raise ValueError(f"{flag}: expected a folder made by prune or learn, {got}. {advice}")
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


def check_model_path(path: str, flag: str = "--model", *, packed: bool = True) -> None:
    """Refuse a path that cannot hold a model, or one that is packed where that is no use, before anything is loaded."""
    folder = Path(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local:
        require_folder(flag, folder, "a model folder")
    if folder.is_dir() and not (folder / "config.json").is_file():
        advice = "Give the folder of the dense model; folders made by prune or learn belong to --masks."
        raise FileNotFoundError(f"{flag}: expected a transformers model, {path!r} has no config.json. {advice}")
    if folder.is_dir() and not packed and _is_packed(folder):
        got = f"{path!r} has packed layers"
        raise ValueError(f"{flag}: expected a dense model, {got}. Give the model that it was made from.")


def _is_packed(folder: Path) -> bool:
    from patch.files.strict_json import read_json

    config = read_json(folder.resolve() / "config.json")
    method = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(method, dict) and method.get("quant_method") == "patch"


def _check_hub(name: str, flag: str) -> None:
    """Refuse an id that is not in the cache while the hub does not answer, which libraries retry for minutes."""
    if Path(name).is_dir():
        return
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants, try_to_load_from_cache

    if getproxies() or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    hub = urlsplit(constants.ENDPOINT)
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        socket.create_connection((hub.hostname, hub.port or 443), timeout=_HUB_SECONDS).close()
    except OSError as error:
        got = (
            f"got {name!r}, which is no folder here and not in the cache, and {hub.hostname} does not answer ({error})"
        )
        advice = "Check the path, or the network."
        raise FileNotFoundError(f"{flag}: expected a model folder or a Hugging Face id, {got}. {advice}") from None
