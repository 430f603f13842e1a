"""What identifies a model and a run: fingerprints, context length, name, versions of the packages."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import torch
from torch import nn

# Fields of a transformers config that change without the model changing.
_VOLATILE = {
    "_name_or_path",
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
    kept = {key: value for key, value in values.items() if key not in _VOLATILE}
    return hashlib.sha256(_json_text(kept)).hexdigest()


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


def model_name(model: nn.Module) -> str:
    """Name or path that a model was loaded by; its class where there is none."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
