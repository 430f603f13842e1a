"""What a training run depends on, and fingerprints of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_SAMPLED_TOKENS = 1 << 24
# Settings that may change between two parts of one run, because the trajectory does not depend on them.
FREE_SETTINGS = ("save_steps", "save_total_limit", "log_steps", "grad_checkpoint")


def plain(tensor: Tensor) -> Tensor:
    """The values as safetensors and hashes take them."""
    return tensor.detach().cpu().contiguous()


def data_fingerprint(blocks: Tensor) -> str:
    """SHA-256 of shape and token ids; of evenly spaced blocks where there are more than 16 M tokens."""
    step = max(1, -(-blocks.numel() // _SAMPLED_TOKENS))
    digest = hashlib.sha256(str(tuple(blocks.shape)).encode())
    digest.update(plain(blocks[::step]).numpy().tobytes())
    return digest.hexdigest()


def tensors_fingerprint(groups: Mapping[str, Mapping[str, Tensor] | None]) -> str:
    """SHA-256 over names, shapes, dtypes and all values."""
    digest = hashlib.sha256()
    for group, tensors in sorted(groups.items()):
        digest.update(f"{group} {tensors is None}\n".encode())
        for name, tensor in (tensors or {}).items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(plain(tensor).reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
