"""A dense model to a hybrid one in one call: choose tiles and patterns, then let the kept weights make up for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patch.data.sources import DEFAULT_HELDOUT_WINDOWS
from patch.data.split import Texts, calibration_and_heldout
from patch.evaluate.cross_entropy import perplexity
from patch.evaluate.results import broken_perplexity
from patch.files.progress import say
from patch.files.schema import require_integer
from patch.models.checks import require_seqlen, require_tokens
from patch.models.facts import within_context
from patch.models.keep_masks import measured_sparsity
from patch.models.modes import streamed
from patch.models.packed_size import packed_bytes
from patch.models.structure import vocabulary_size
from patch.pruning.channel_search import DEFAULT_STEPS
from patch.pruning.compensation import Compensation, compensate
from patch.pruning.hybrid import Hybrid
from patch.pruning.model import check_prunable, prune_tiles
from patch.pruning.one_shot_settings import (
    REORDER_SAMPLES,
    OneShotSettings,
    block_options,
    default_nsamples,
    expert_options,
)
from patch.pruning.options import DEFAULT_DAMPING, DEFAULT_NSAMPLES, DEFAULT_SEQLEN, TileOptions
from patch.pruning.permutation import ChannelOrders, can_permute, permute_channels
from patch.pruning.registry import get_method, make_options


@dataclass(frozen=True)
class OneShot:
    """What making a model hybrid did; perplexities are of the held-out tokens, None without them.

    masks          {layer name: keep (N, K) bool}: dense tiles are all True, others exactly 2:4
    tile_is_sparse {layer name: (rows, cols) bool}
    orders         of the channels, in which they were put first (`patch.pruning.permutation`); None: as they were
    dense          perplexity of the dense model
    pruned         with the masks and the weights of the pruning method
    reconstructed  of the model as it is now
    compensation   errors of layers and blocks before and after, of `patch.pruning.compensate`
    packed_bytes   that the masked layers take once they are packed, dense_bytes as dense 16-bit weights
    """

    masks: dict[str, Tensor]
    tile_is_sparse: dict[str, Tensor]
    orders: ChannelOrders | None
    dense: float | None
    pruned: float | None
    reconstructed: float | None
    compensation: Compensation
    packed_bytes: int
    dense_bytes: int

    @property
    def sparsity(self) -> float:
        """Share of zeros in the masked layers."""
        return measured_sparsity(self.masks)


def oneshot(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    calibration: Tensor | str | os.PathLike,
    heldout: Tensor | str | os.PathLike | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    heldout_windows: int = DEFAULT_HELDOUT_WINDOWS,
    device: torch.device | str | None = None,
    progress: bool = True,
    **settings: Any,
) -> OneShot:
    """Make a dense causal language model hybrid in place: a share of its tiles 2:4, the kept weights reconstructed.

    model        with its dense weights; afterwards its layers have keep masks, and zeros where these prune
    tokenizer    of the model, where calibration or heldout are texts
    calibration  (samples, seqlen) int64 token ids, or a text: a file or the name of a set
    heldout      the same, to measure on. None: of a calibration text that is a named set its evaluation split, of a
                 file the last tenth, which is then not calibrated on; beside token ids nothing is measured
    nsamples, seqlen, seed  of the samples of a calibration text; None: as many as make 131,072 tokens, at least 128, of
                 2048 tokens or what the model allows
    heldout_windows  of seqlen tokens, at most, that are measured on of a text
    device       where each block is put while it is worked on; None: where it is. The weights of the masked layers are
                 held twice for as long as pruning takes
    progress     say on stderr what is done, and how far it is
    settings     of `OneShotSettings`: sparsity=0.45, method="sparsegpt", tiles_by="fisher", budget="model",
                 tile=(128, 128), reorder=False, reconstruct="blocks", epochs=None, batch_size=None,
                 expert_tokens=256, few_experts="magnitude", exclude=()
    raises       ValueError or TypeError before any work
    """
    chosen = OneShotSettings(**settings)
    require_integer("heldout_windows", heldout_windows)
    windows, other = _tokens(model, tokenizer, calibration, heldout, nsamples, seqlen, seed, heldout_windows)
    require_tokens(model, windows, "calibration")
    if other is not None:
        require_tokens(model, other, "heldout", least=2)
        if shared := len(_rows(windows) & _rows(other)):
            why = "The weights are fitted to these, so perplexity on them says nothing."
            raise ValueError(f"heldout: expected other windows than calibration, got {shared} of the same. {why}")

    def measured() -> float | None:
        return None if other is None else heldout_perplexity(model, other, device=device, progress=progress)

    method = get_method(chosen.method)
    options = make_options(method, "tiles", chosen.sparsity, None, DEFAULT_DAMPING, False, "fp32")
    linears = check_prunable(model, method, options, windows, exclude=chosen.exclude, device=device)
    dense = measured()
    orders = reordered(model, windows, device=device, progress=progress) if chosen.reorder else None
    before = {name: linear.weight.detach().to("cpu", copy=True) for name, linear in linears.items()}
    hybrid = prune_hybrid(model, windows, chosen, device=device, progress=progress)
    masks = hybrid.masks
    pruned = measured()
    with torch.no_grad():
        for name, linear in linears.items():
            linear.weight.copy_(before.pop(name))
    compensation = reconstruct(model, masks, windows, chosen, device=device, progress=progress)
    reconstructed = measured()
    packed, plain = packed_bytes(masks)
    if dense is not None and reconstructed is not None:
        sizes = {"packed_bytes": packed, "dense_bytes": plain}
        for line in verdict(dense, reconstructed, vocabulary_size(model), pruned, **sizes):
            say(line, show=progress)
    return OneShot(masks, hybrid.tile_is_sparse, orders, dense, pruned, reconstructed, compensation, packed, plain)


def reordered(
    model: nn.Module, calibration: Tensor, *, device: torch.device | str | None = None, progress: bool = True
) -> ChannelOrders | None:
    """Before `oneshot` prunes: reorder channels in place; None for a model in which none is known that can be."""
    if not can_permute(model):
        say(f"channels of {type(model).__name__} stay in their order: none is known that can be moved", show=progress)
        return None
    return permute_channels(model, calibration[:REORDER_SAMPLES], steps=DEFAULT_STEPS, device=device, progress=progress)


def prune_hybrid(
    model: nn.Module,
    calibration: Tensor,
    settings: OneShotSettings,
    *,
    stages: Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Hybrid:
    """The first half of `oneshot`: prune in place, with the weights of the method.

    stages  folder for parts of this half, so that after an interrupt the same call goes on; None: nowhere
    """
    return prune_tiles(
        model,
        settings.method,
        sparsity=settings.sparsity,
        tiles=TileOptions(settings.tiles_by, settings.budget, settings.tile),
        stages=stages,
        experts=expert_options(settings),
        calibration=calibration[:DEFAULT_NSAMPLES],  # more gain nothing: reconstruction is what reads all
        exclude=settings.exclude,
        device=device,
        progress=progress,
    )


def reconstruct(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    calibration: Tensor,
    settings: OneShotSettings,
    *,
    stages: Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Compensation:
    """The second half: mask a DENSE model in place and update what is kept; stages as in `prune_hybrid`."""
    of_blocks: dict[str, Any] = {"stages": stages, "blocks": block_options(settings)}
    try:
        return compensate(
            model,
            masks,
            calibration=calibration,
            method=settings.reconstruct,
            experts=expert_options(settings),
            exclude=settings.exclude,
            device=device,
            progress=progress,
            **(of_blocks if settings.reconstruct == "blocks" else {}),
        )
    except MemoryError as error:
        # Here the method is that of pruning.
        raise MemoryError(str(error).replace("method=", "reconstruct=")) from error


def heldout_perplexity(
    model: nn.Module, windows: Tensor, *, device: torch.device | str | None = None, progress: bool = True
) -> float:
    """Perplexity on windows (windows, seqlen) int64; the blocks go to `device` one at a time, None: the model stays."""
    with streamed(model, device):
        return perplexity(model, windows.reshape(-1), windows.shape[1], progress=progress)


def verdict(
    dense: float,
    result: float,
    vocabulary: int | None,
    pruned: float | None = None,
    *,
    packed_bytes: int = 0,
    dense_bytes: int = 0,
) -> list[str]:
    """Warnings about a result that nobody should have to find out; [] for a usual one.

    dense, result, pruned      perplexities: of the dense model, the result, and before reconstruction
    packed_bytes, dense_bytes  of the masked layers
    """
    lines = []
    if packed_bytes > dense_bytes:
        why = "tiles of 128x128 at the edges of its layers hold padding"
        lines.append(f"packed, the layers are LARGER than dense ({packed_bytes:,} of {dense_bytes:,} bytes): {why}")
    if broken := broken_perplexity(result, vocabulary):
        lines.append(f"the perplexity of the result, {result:,.0f}, is {broken}")
    elif result > SUSPICIOUS * dense:
        advice = "Use a smaller sparsity, more calibration text, or text like the one the model is for"
        lines.append(f"the result's perplexity is {result / dense:.2f} times the dense model's. {advice}")
    if pruned is not None and result > pruned:
        lines.append(f"reconstruction made it WORSE ({pruned:.4f} before, {result:.4f} after); give it more text")
    return [f"WARNING: {line}" for line in lines]


# A hybrid of a trained model is some percent worse than the dense one.
SUSPICIOUS = 1.5


def _tokens(
    model: nn.Module,
    tokenizer: Any,
    calibration: Any,
    heldout: Any,
    nsamples: int | None,
    seqlen: int | None,
    seed: int,
    max_windows: int,
) -> tuple[Tensor, Tensor | None]:
    """Calibration and held-out windows, from tokens or texts."""
    for name, source in (("calibration", calibration), ("heldout", "" if heldout is None else heldout)):
        if not isinstance(source, Tensor | str | os.PathLike):
            expected = "expected a tensor of token ids, or a text: a file or the name of a set"
            raise TypeError(f"{name}: {expected}, got {type(source).__name__}.")
    given = [isinstance(tokens, Tensor) for tokens in (calibration, heldout) if tokens is not None]
    if all(given):
        for name, value in (("nsamples", nsamples), ("seqlen", seqlen)):
            if value is not None:
                raise ValueError(f"{name}: expected none beside token ids, got {value!r}. Cut the tokens instead.")
        return calibration, heldout
    if any(given):
        raise TypeError("heldout: expected token ids beside token ids, or a text beside a text, got one of each.")
    if not callable(tokenizer):
        got = None if tokenizer is None else type(tokenizer).__name__
        raise TypeError(f"tokenizer: expected the model's tokenizer for texts, got {got}. Pass it, or token ids.")
    length = within_context(model, DEFAULT_SEQLEN) if seqlen is None else seqlen
    require_seqlen(model, length)
    texts: Texts = calibration_and_heldout(
        tokenizer,
        calibration,
        heldout,
        nsamples=nsamples or default_nsamples(length),
        seqlen=length,
        seed=seed,
        max_windows=max_windows,
    )
    return texts.calibration, texts.heldout


def _rows(windows: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in windows.cpu().contiguous()}
