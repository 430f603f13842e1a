"""Checks of what functions are given, made once at the public edge: tokens, masks, weights, layer names, a device."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patch.files.schema import listed, require_integer
from patch.models.facts import context_length
from patch.models.mixtures import open_mixtures
from patch.models.structure import decoder_of
from patch_kernels.checks import all_finite, require_tensor

_DAMAGED = "Get an undamaged copy of the model; if it was cast to fp16, load it in bf16."
_DEVICE = "Pass None to work where the model is."
_LAYERS = "Use the masks of this model, and name layers that stay dense in exclude."
_OFFLOADED = "Load the model without offloading (no device_map, or one that fits)."
_RESIZE = "Use the tokenizer of this model, or model.resize_token_embeddings(len(tokenizer)) before training it."
_WINDOWS = "Pass token windows, for example patch.data.pack_blocks(...)."
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
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
    """The layer at a module path; refuse another kind of module, none, and one whose weight has another shape.

    Mixtures are opened where the path leads nowhere else.
    """
    layer: Any = _module_at(model, name)
    if layer is None:
        open_mixtures(decoder_of(model))
        layer = _module_at(model, name)
    weight = getattr(layer, "weight", None)
    has_shape = isinstance(weight, Tensor) and (shape is None or tuple(weight.shape) == tuple(shape))
    if not isinstance(layer, kind) or not has_shape:
        wanted = f"{'an nn.Linear' if kind is nn.Linear else 'a layer'}{'' if shape is None else f' {tuple(shape)}'}"
        got = "nothing" if layer is None else type(layer).__name__
        got += f" {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
        raise ValueError(f"{what}: expected {wanted} at {name!r} of {type(model).__name__}, found {got}. {advice}")
    return layer


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def require_layers(given: Mapping[str, Any], wanted: Collection[str], what: str) -> None:
    """Refuse tensors that are not one for each of the layers `wanted`; `what` names them in the message."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{what}: expected tensors by layer name, got {type(given).__name__}. {_LAYERS}")
    missing = [name for name in wanted if name not in given]
    extra = [name for name in given if name not in wanted]
    if missing or extra:
        got = f"got {len(given)}: missing {listed(missing)}; not maskable layers of the model {listed(extra)}"
        near = difflib.get_close_matches(extra[0], missing, n=1, cutoff=0.8) if extra else []
        meant = f" Is '{extra[0]}' meant for '{near[0]}'?" if near else ""
        raise ValueError(f"{what}: expected one for each of the {len(wanted)} layers to mask, {got}. {_LAYERS}{meant}")


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


def require_seqlen(model: Any, seqlen: Any) -> None:
    """Refuse a length of samples that a model, or one of its configuration, cannot read, before any text is read."""
    require_integer("seqlen", seqlen, least=2)
    longest = context_length(model)
    if longest is not None and seqlen > longest:
        raise ValueError(
            f"seqlen: expected 2 to {longest} tokens (max_position_embeddings), got {seqlen}. Choose a shorter one."
        )


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


def require_finite_model(model: nn.Module, what: str = "model") -> None:
    """Refuse a model with NaN or infinity in any weight, or with weights on the meta device; `what` begins the message.

    Saved buffers count too, but for -inf, which causal masks hold. Packed weights are not read: they were dense once.
    Costs one pass over memory without a copy: 0.13 s for 1 GB of bf16 (2 threads, November 2026).
    """
    tensors = dict(_saved_tensors(model))
    elsewhere = [name for name, tensor in tensors.items() if tensor.is_meta]
    if elsewhere:
        got = f"{listed(elsewhere)} of {len(tensors)} tensors are on the meta device (offloaded)"
        raise ValueError(f"{what}: expected all weights in memory, {got}. {_OFFLOADED}")
    bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if bad:
        got = f"{listed(bad)} of {len(tensors)} tensors have NaN or infinity"
        raise ValueError(f"{what}: expected finite weights, {got}. {_DAMAGED}")


def require_known_tokens(ids: Tensor, vocabulary: int | None, what: str, tokenizer: Any) -> None:
    """Refuse token ids that the embedding has no row for, naming the first; `what` begins the message."""
    bad = ids[(ids < 0) | (ids >= vocabulary)] if vocabulary is not None else ids[ids < 0]
    if len(bad):
        token = int(bad[0])
        got = f"got {tokenizer.convert_ids_to_tokens(token)!r} (id {token})"
        expected = f"expected tokens of the model's {vocabulary} (rows of its embedding)"
        raise ValueError(f"{what}: {expected}, {got}. {_RESIZE}")


def require_known_special_tokens(
    config: Any, file: str, vocabulary: int | None, keys: Sequence[str] = SPECIAL_TOKENS, least: int = 0
) -> None:
    """Refuse a configuration whose padding, BOS or EOS token is none of the vocabulary; `file` begins the message.

    least  smallest id that passes: -1 stands for "none" in old configurations, which only generation minds
    """
    for key in keys:
        given = getattr(config, key, None)
        for token in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(token, int) and not least <= token < (vocabulary or math.inf):
                expected = "expected a token of the vocabulary" + (f" (0 to {vocabulary - 1})" if vocabulary else "")
                raise ValueError(f"{file}: {key}: {expected}, got {token}. Correct the file, or set it to null.")


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers, each once; what is not saved (rotary tables, masks) is made by code."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    values = tensor if tensor.itemsize > 1 else tensor.half()  # torch knows no least value of 8-bit floats
    if all_finite(values):
        return True
    return not isinstance(tensor, nn.Parameter) and bool((values < math.inf).all())  # -inf alone; NaN is no less
