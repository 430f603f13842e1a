"""What identifies a model and a run: fingerprints, context length, name, versions of the packages."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from typing import Any

import torch
from torch import nn

from patch.models.mixtures import own_parameters

# Fields of a transformers config that change without the model changing; architectures is set by the first save.
_VOLATILE = {
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "quantization_config",
}


def config_fingerprint(config: Any) -> str:
    """SHA-256 over a transformers config (or dict), without the fields that do not change the model."""
    values = config if isinstance(config, dict) else config.to_dict()
    # The text of a config is JSON already; default=str covers dtypes that some versions leave in.
    return hashlib.sha256(_json_text(_lasting(values))).hexdigest()


def _lasting(value: Any) -> Any:
    """Values without the volatile ones, also in the parts of a multimodal config."""
    if not isinstance(value, dict):
        return value
    return {key: _lasting(part) for key, part in value.items() if key not in _VOLATILE}


def model_fingerprint(model: nn.Module, *, samples: int = 4096) -> str:
    """SHA-256 over names, shapes, dtypes and up to `samples` evenly spaced values of every saved tensor.

    Reading a few values of each tensor keeps this fast for large models; any training step changes it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, -(-flat.numel() // samples))
        values = flat[::step].cpu().contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and all values of the parameters, rounded to bfloat16.

    Rounded, so that a model has one fingerprint whether it is loaded in float32, in bfloat16 or in its own dtype; a
    float32 model loaded in float16 has another one, being rounded twice. Reads about 1.5 GB of bfloat16 a second.
    raises  ValueError for a parameter without values (meta device).
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(own_parameters(model), key=lambda item: item[0]):
        if parameter.is_meta:
            raise ValueError(f"{name}: expected a weight with values, got none (meta device). Load the whole model.")
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        values = parameter.detach().reshape(-1).to(torch.bfloat16).cpu()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprints(model: nn.Module) -> dict[str, str]:
    """What artifacts say of the dense model they are made from; to be taken before it changes.

    {"config_fingerprint": ..., "weights_fingerprint": ...}, the keys of an artifact's meta
    """
    config = getattr(model, "config", {})
    return {"config_fingerprint": config_fingerprint(config), "weights_fingerprint": weights_fingerprint(model)}


def _json_text(value: Any) -> bytes:
    import json

    return json.dumps(value, sort_keys=True, default=str).encode()


def context_length(model: Any) -> int | None:
    """Largest number of positions that a model or a configuration allows, None when it names none."""
    config = getattr(model, "config", model)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def within_context(model: Any, tokens: int) -> int:
    """A usual number of tokens, or the context of a model or configuration where that is shorter."""
    return min(tokens, context_length(model) or tokens)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import version

    import transformers

    from patch import __version__

    return {
        "patch-llm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": version("tokenizers"),
        "datasets": version("datasets"),
        "python": platform.python_version(),
    }


def processor(device: torch.device) -> str:
    """Name of the GPU or CPU behind a device, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def model_name(model: nn.Module) -> str:
    """Name or path that a model was loaded by; its class where there is none."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
