"""Checks of what functions are given, made once at the public edge: tokens, masks, weights, layer names, a device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patch.files.schema import listed
from patch.models.structure import decoder_of
from patch_kernels.checks import require_tensor

_DEVICE = "Pass None to work where the model is."
_LAYERS = "Use the masks of this model, and name layers that stay dense in exclude."
_WINDOWS = "Pass token windows, for example patch.data.pack_blocks(...)."
TRAINED_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def require_mask(keep: Any, shape: Sequence[int | str], what: str) -> None:
    """Refuse what is no bool keep mask of a shape (N, K), names for any sizes; `what` names it in the message."""
    advice = "Pass the keep mask of this layer of this model, True where a weight stays."
    require_tensor(what, keep, dtypes=(torch.bool,), shape=shape, advice=advice, error=TypeError)


def require_layer(
    model: nn.Module,
    name: str,
    what: str,
    advice: str,
    shape: Sequence[int] | None = None,
    *,
    kind: type[nn.Module] = nn.Linear,
) -> Any:
    """The layer at a module path; refuse another kind of module, none, and one whose weight has another shape."""
    try:
        layer: Any = model.get_submodule(name)
    except AttributeError:
        layer = None
    weight = getattr(layer, "weight", None)
    has_shape = isinstance(weight, Tensor) and (shape is None or tuple(weight.shape) == tuple(shape))
    if not isinstance(layer, kind) or not has_shape:
        wanted = f"{'an nn.Linear' if kind is nn.Linear else 'a layer'}{'' if shape is None else f' {tuple(shape)}'}"
        got = "nothing" if layer is None else type(layer).__name__
        got += f" {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
        raise ValueError(f"{what}: expected {wanted} at {name!r} of {type(model).__name__}, found {got}. {advice}")
    return layer


def require_layers(given: Collection[str], wanted: Collection[str], what: str) -> None:
    """Refuse tensors that are not one for each of the layers `wanted`; `what` names them in the message."""
    missing = [name for name in wanted if name not in given]
    extra = [name for name in given if name not in wanted]
    if missing or extra:
        got = f"got {len(given)}: missing {listed(missing)}; not maskable layers of the model {listed(extra)}"
        raise ValueError(f"{what}: expected one for each of the {len(wanted)} layers to mask, {got}. {_LAYERS}")


def require_tokens(model: nn.Module, ids: Any, what: str, *, least: int = 1, positions: str = "all") -> None:
    """Refuse token ids that a model cannot read: they must be (samples, tokens) int64 of its vocabulary.

    least      tokens that a sample has at least
    positions  "all": a sample may not be longer than the config allows; "learned": only where positions are learned,
               because rotary ones go on, and callers of get_llm lower that number on purpose
    """
    shape = ("samples", "tokens")
    require_tensor(what, ids, dtypes=(torch.int64,), shape=shape, advice=_WINDOWS, error=TypeError)
    config = getattr(decoder_of(model), "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        expected = "expected token ids from 0" + (f" below the vocabulary size {vocabulary}" if vocabulary else "")
        raise ValueError(f"{what}: {expected}, got {low} to {high}. Use the model's own tokenizer.")
    longest = getattr(config, "max_position_embeddings", None) or float("inf")
    if positions == "learned" and not any(
        isinstance(module, nn.Embedding) and "position" in name for name, module in model.named_modules()
    ):
        longest = float("inf")
    if not least <= ids.shape[1] <= longest:
        sizes = f"{least} or more tokens"
        if longest < float("inf"):
            sizes = f"{least} to {longest} tokens (max_position_embeddings)"
        expected = f"expected samples of {sizes}"
        raise ValueError(f"{what}: {expected}, got {ids.shape[1]}. Cut windows of such a length.")


def require_trained_dtype(weight: Tensor, what: str) -> None:
    """Refuse a weight in a dtype that is not trained on; `what` names it in the message."""
    if weight.dtype not in TRAINED_DTYPES:
        expected = f"expected float32, bfloat16 or float64 weights, got {weight.dtype}, in which gradients overflow"
        raise ValueError(f"{what}: {expected}. Load the model with dtype=torch.bfloat16 (--dtype bfloat16).")


def check_device(device: torch.device | str | None) -> None:
    """Refuse a device that does not exist here, before the first block is moved to it."""
    got = f"got {device!r}"
    try:
        kind = None if device is None else torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected a torch device such as 'cuda' or 'cpu', {got}. {_DEVICE}") from error
    if kind == "meta":
        raise ValueError(f"device: expected a device that holds values, {got}. {_DEVICE}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected a device of this machine, {got} but torch sees no GPU. {_DEVICE}")
