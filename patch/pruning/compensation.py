"""Let the kept weights make up for a given mask, layer by layer or block by block, mask fixed.

Mask learning leaves the weights as they are. Given the mask it ends with, each layer's output on calibration
text can be brought back towards the dense layer's: for a row w of the weight, the kept entries of v minimise
(v - w) H (v - w)^T with H the Hessian of the layer's inputs. "least_squares" finds that minimum exactly
(Hassibi and Stork, "Optimal Brain Surgeon", 1992, eq. 5 for several weights at once); "sparsegpt" is
SparseGPT's sweep from left to right, in which a column no longer changes once it is passed (Frantar and
Alistarh, 2023): less memory and work, a larger error. "blocks" starts from the least squares of a block's layers and
trains what is kept on the block's output: `patch.pruning.block_fit`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from patch.evaluate.cross_entropy import perplexity
from patch.files.schema import require_choice
from patch.models.checks import check_device, require_finite_model, require_tokens
from patch.models.coverage import warn_of_dense_rest
from patch.models.facts import weights_fingerprint
from patch.models.keep_masks import check_keep_masks, set_keep_mask
from patch.models.structure import decoder_blocks
from patch.pruning.hessian import Statistics, damped_until, eliminate, full_precision, inverse_factor, inverse_of
from patch.pruning.options import (
    BlockOptions,
    CompensationMethod,
    ExpertOptions,
    Precision,
    PruneOptions,
    require_options,
)
from patch.pruning.plan import say_plan
from patch.pruning.reconstruction import Reconstruction
from patch.pruning.selection import Pruned, check_updated, check_weight, working_dtype
from patch.pruning.sequential import update_blocks
from patch.pruning.sparsegpt import sweep
from patch.runs.identity import data_fingerprint, tensors_fingerprint
from patch.runs.stages import digest

logger = logging.getLogger(__name__)

COMPENSATIONS: tuple[CompensationMethod, ...] = ("blocks", "least_squares", "sparsegpt")


@dataclass(frozen=True)
class Compensation:
    """What compensating a model did.

    layer_errors       {layer name: (before, after)}: ||X (V - W)^T||^2 / ||X W^T||^2 on the calibration text, V
                       the masked weight before and after the update of the layer. Layers without a pruned weight are
                       not listed.
    block_errors       {index of a block: (before, after)} with method "blocks": ||out - target||^2 / ||target||^2 on
                       the calibration text, target the dense block's output on the dense model's inputs, before and
                       after the block was trained. Blocks without a pruned weight are not listed.
    perplexity_before  of the masked model on the held-out windows; None without them
    perplexity_after   of the compensated model on the same windows
    """

    layer_errors: dict[str, tuple[float, float]]
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    block_errors: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def is_worse(self) -> bool:
        """Whether the held-out perplexity rose; False without held-out text."""
        before, after = self.perplexity_before, self.perplexity_after
        return before is not None and after is not None and not after <= before


def compensate(
    model: nn.Module,
    keep_masks: Mapping[str, Tensor],
    *,
    calibration: Tensor,
    heldout: Tensor | None = None,
    method: str = "blocks",
    damping: float = 0.01,
    precision: Precision = "fp32",
    block_size: int = 128,
    blocks: BlockOptions | None = None,
    experts: ExpertOptions | None = None,
    stages: str | os.PathLike[str] | None = None,
    exclude: Sequence[str] = (),
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Compensation:
    """Mask a dense model in place and update its kept weights so that its outputs stay near the dense ones.

    model        causal language model with its DENSE weights: what a mask removed cannot be made up for once
                 it is gone
    keep_masks   {layer name: (N, K) bool}, as of PATCH, MaskLLM or a one-shot method; afterwards attached to
                 the layers. Pruned weights are exactly 0, no mask changes.
    calibration  (samples, seqlen) int64 token ids
    heldout      (windows, seqlen) int64 token ids that calibration does not hold: perplexity on them is
                 measured with the masks alone and after the update, and a rise is logged as a warning
    method       "blocks" (trains each block's kept weights, from least squares), "least_squares" (exact for every row)
                 or "sparsegpt"
    damping      share of the mean diagonal added to H; raised with a warning when H cannot be inverted
    precision    "fp32" or "fp64" for H and the update
    block_size   columns "sparsegpt" treats at once; no influence on the result but rounding
    blocks       how "blocks" trains; None: the defaults
    experts      what is done about experts of a mixture with few calibration tokens; None: `ExpertOptions`. By
                 "magnitude" their kept weights stay as they are but for what "blocks" trains
    stages       folder in which "blocks" keeps every finished block: the same call again goes on where it stopped
    exclude      patterns of layers that were left dense
    device       where each block is put while it is worked on; None: where it is
    progress     say on stderr what will be done, and how far it is: a bar on a terminal, otherwise a line now and then
    raises       ValueError or TypeError before any work; ValueError naming the layer when its update fails
                 (layers before it are then updated already; it and those after it are dense, without a mask)

    Blocks are updated in order, each from the inputs that the updated blocks before it produce.
    """
    require_choice("method", method, COMPENSATIONS)
    if method != "blocks" and (blocks is not None or stages is not None):
        given = "blocks" if blocks is not None else "stages"
        raise ValueError(f"{given}: expected none with method '{method}', got one. Leave it out, or use 'blocks'.")
    if blocks is not None:
        require_options("blocks", blocks, BlockOptions)
    if experts is not None:
        require_options("experts", experts, ExpertOptions)
    options = PruneOptions("unstructured", 0.0, block_size, damping, precision=precision)
    linears = check_keep_masks(model, keep_masks, exclude)
    require_tokens(model, calibration, "calibration")
    if heldout is not None:
        require_tokens(model, heldout, "heldout")
    decoder_blocks(model)
    check_device(device)
    for name, linear in linears.items():
        check_weight(linear.weight, options, f"layer '{name}'")
    require_finite_model(model)
    masks = {name: keep_masks[name].to(linear.weight.device) for name, linear in linears.items()}
    pruned = {name: linear for name, linear in linears.items() if not masks[name].all()}
    if pruned and all(not linear.weight[~masks[name]].any() for name, linear in pruned.items()):
        got = "a model in which everything the masks prune is 0 already"
        raise ValueError(f"model: expected its dense weights, got {got}. Load the dense model and pass the masks.")
    warn_of_dense_rest(model, linears)

    def new_statistics(weight: Tensor) -> Statistics:
        return Statistics(weight.shape[1], dtype=working_dtype(weight, precision), device=weight.device)

    say_plan("compensating", method, model, linears, calibration, new_statistics, show=progress)
    before = None
    if heldout is not None:
        with _masked(linears, masks):
            before = _perplexity(model, heldout, progress)
    errors: dict[str, tuple[float, float]] = {}
    reconstruction = None
    if method == "blocks":
        blocks = (blocks or BlockOptions()).for_samples(len(calibration))
        folder = None if stages is None else Path(stages)
        key = "" if folder is None else _key(model, masks, calibration, options, blocks)
        reconstruction = Reconstruction(masks, blocks, folder, key)

    def update(name: str, linear: nn.Linear, statistics: Statistics) -> Pruned:
        keep = masks[name].to(linear.weight.device)
        with full_precision():
            weight = compensated(linear.weight, keep, statistics.hessian, method=method, options=options)
            before, after = (
                output_error(v, linear.weight, statistics.hessian)
                for v in (linear.weight.masked_fill(~keep, 0), weight)
            )
            errors[name] = before, after
        return Pruned(weight, keep)

    for name in linears.keys() - pruned.keys():
        set_keep_mask(linears[name], masks[name])
    if pruned:
        update_blocks(
            model,
            pruned,
            calibration,
            new_statistics,
            update,
            device=device,
            what=f"compensating ({method})",
            progress=progress,
            refinement=reconstruction,
            experts=experts,
        )
    after = None if heldout is None else _perplexity(model, heldout, progress)
    result = Compensation(errors, before, after, {} if reconstruction is None else reconstruction.errors)
    if result.is_worse:
        logger.warning(
            "compensation made held-out perplexity worse: %.4f with the masks alone, %.4f after. Give more "
            "calibration text, raise damping, or use the masks alone",
            result.perplexity_before,
            result.perplexity_after,
        )
    return result


@torch.no_grad()
def compensated(weight: Tensor, keep: Tensor, hessian: Tensor, *, method: str, options: PruneOptions) -> Tensor:
    """The weight (N, K) with what `keep` (N, K) drops at exactly 0 and the rest updated; see `compensate`."""
    current = weight.detach().to(hessian.dtype)
    if method != "sparsegpt":
        result = damped_until(hessian, options.damping, lambda damped: _least_squares(current, keep, damped))
    else:
        result = current.clone()
        sweep(result, keep, damped_until(hessian, options.damping, inverse_factor), options.block_size)
    result = result.to(weight.dtype)
    check_updated(result)
    return result


@torch.no_grad()
def output_error(weight: Tensor, dense: Tensor, hessian: Tensor) -> float:
    """||X (V - W)^T||^2 / ||X W^T||^2 for weight V and dense W (N, K) and H of the inputs X; 0 when both are 0."""
    dense = dense.to(hessian.dtype)
    change = weight.to(hessian.dtype) - dense
    error, norm = (float(((w @ hessian) * w).sum(dtype=torch.float64)) for w in (change, dense))
    return error / norm if norm > 0 else 0.0


def _key(
    model: nn.Module, masks: Mapping[str, Tensor], calibration: Tensor, options: PruneOptions, blocks: BlockOptions
) -> str:
    """What trained blocks depend on."""
    return digest(
        {
            "model": weights_fingerprint(model),
            "masks": tensors_fingerprint({"masks": masks}),
            "calibration": data_fingerprint(calibration),
            "options": [asdict(options), asdict(blocks)],
        }
    )


def _least_squares(weight: Tensor, keep: Tensor, damped: Tensor) -> Tensor | None:
    inverse = inverse_of(damped)
    return None if inverse is None else eliminate(weight, inverse, ~keep)


@contextmanager
def _masked(linears: Mapping[str, nn.Linear], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the layers with masked weights during the body, one masked copy at a time."""
    dense: dict[nn.Linear, Tensor] = {}

    def before(linear: nn.Linear, args: tuple, keep: Tensor) -> None:
        dense[linear] = linear.weight.data
        linear.weight.data = linear.weight.data.masked_fill(~keep, 0)

    def after(linear: nn.Linear, args: tuple, output: Tensor) -> None:
        linear.weight.data = dense.pop(linear)

    handles = []
    try:
        for name, linear in linears.items():
            keep = masks[name]
            handles.append(linear.register_forward_pre_hook(lambda m, args, keep=keep: before(m, args, keep)))
            handles.append(linear.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for linear, weight in dense.items():
            linear.weight.data = weight


def _perplexity(model: nn.Module, windows: Tensor, progress: bool) -> float:
    return perplexity(model, windows.reshape(-1), windows.shape[1], progress=progress)
