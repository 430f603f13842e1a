"""ProxSparse: train the weights until every four of them have at most two left, and keep that choice as a mask.

Every step is one of AdamW on the language-model loss, followed by the proximal operator of a regulariser that
is 0 exactly when a group of four has at most two nonzeros. Of the trained weights only the places of the two
largest of each four are used: the masks go onto the original weights. 2:4 only.
Source: Liu et al., "ProxSparse: Regularized Learning of Semi-Structured Sparsity Masks for Pretrained LLMs",
2025. Theirs trains all weights of the model; here those that are not masked stay as they are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from patch.files.progress import Progress, say
from patch.models.checks import check_device, require_finite_model, require_tokens, require_trained_dtype
from patch.models.modes import placed
from patch.models.structure import input_embeddings, layers_to_mask
from patch.pruning.options import GROUP, PruneOptions
from patch.pruning.plan import samples_text
from patch.pruning.proxsparse.config import ProxSparseConfig
from patch.pruning.proxsparse.proximal import frozen_weight_gradient, prox
from patch.pruning.selection import check_weight, keep_two_of_four, working_dtype
from patch_kernels.checks import require_finite

logger = logging.getLogger(__name__)
_BAR_INTERVAL = 10
# Weight, original, master weight, gradient and the two moments of AdamW.
_WEIGHT_BYTES = 20
_UNHARMED = "The model's weights are as before; lower lr, or check the model and the calibration text."


def learn_masks(
    model: nn.Module,
    calibration: Tensor,
    config: ProxSparseConfig | None = None,
    *,
    exclude: Sequence[str] = (),
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """2:4 keep masks {layer name: (N, K) bool} learned by ProxSparse; the model is as before afterwards.

    model        causal language model in float32, bfloat16 or float64 with its dense weights. Its maskable
                 weights are trained (a 16-bit model with fp32 master weights) and come back bit for bit, also
                 after an exception, as do gradients, requires_grad, train mode and use_cache.
    calibration  (samples, seqlen) int64 token ids, seqlen at least 2; the labels are the ids themselves
    config       None: the published defaults
    exclude      fnmatch patterns over names of layers that stay dense
    device       where the model is trained, then put back; None: where it is
    raises       ValueError or TypeError before any work; FloatingPointError naming the step when the loss or
                 its gradient is not finite

    Memory: 20 bytes per maskable weight, in any dtype but float64 (weight, original, master weight, gradient,
    two moments of AdamW), and the activations of batch_size samples. A function of its arguments and seed.
    """
    config = ProxSparseConfig() if config is None else config
    if not isinstance(config, ProxSparseConfig):
        raise TypeError(f"config: expected a ProxSparseConfig, got {type(config).__name__}. Make one.")
    linears = check_learnable(model, calibration, exclude=exclude, device=device)
    say(_plan(linears, calibration, config), show=progress)
    # Here because transformers' Trainer, behind it, takes seconds to import and no other method needs it.
    from patch.models.modes import prepared

    with prepared(model, grad_checkpoint=config.grad_checkpoint), placed(model, device):
        torch.manual_seed(config.seed)  # dropout; `prepared` puts the generator back
        # By weight: one that two layers share is trained once.
        weights = {linear.weight: name for name, linear in linears.items()}
        before = [(weight.detach().clone(), weight.grad) for weight in weights]
        try:
            trained = _train(model, weights, [original for original, _ in before], calibration, config, progress)
            keep = {weight: keep_two_of_four(master.abs()) for weight, master in zip(weights, trained, strict=True)}
        finally:
            with torch.no_grad():
                for weight, (original, gradient) in zip(weights, before, strict=True):
                    weight.requires_grad_(False)  # `prepared` sets the flags that were set
                    weight.copy_(original)
                    weight.grad = gradient
        masks = {name: keep[linear.weight] for name, linear in linears.items()}
    return {name: mask.to(linears[name].weight.device) for name, mask in masks.items()}


def _plan(linears: Mapping[str, nn.Linear], calibration: Tensor, config: ProxSparseConfig) -> str:
    weights = sum(weight.numel() for weight in {linear.weight for linear in linears.values()})
    steps = f"{config.steps} steps, each of {config.batch_size} of {samples_text(calibration)}"
    memory = f"{weights * _WEIGHT_BYTES / 1e9:.1f} GB for the weights in training, and the activations of a step"
    return f"learning the masks of {len(linears)} layers with prox_sparse: {steps}; {memory}"


def check_learnable(
    model: nn.Module, calibration: Tensor, *, exclude: Sequence[str] = (), device: torch.device | str | None = None
) -> dict[str, nn.Linear]:
    """The layers `learn_masks` trains; raises ValueError or TypeError for what it refuses."""
    linears = layers_to_mask(model, exclude)
    require_tokens(model, calibration, "calibration", least=2)
    check_device(device)
    for name, linear in linears.items():
        check_weight(linear.weight, PruneOptions(), f"layer '{name}'")
        require_trained_dtype(linear.weight, f"layer '{name}'")
    require_finite_model(model)
    return linears


def _train(
    model: nn.Module,
    weights: Mapping[Tensor, str],
    originals: Sequence[Tensor],
    calibration: Tensor,
    config: ProxSparseConfig,
    progress: bool,
) -> list[Tensor]:
    """Train the weights (each with the name of its layer) in place; returns them in at least fp32."""
    for weight in weights:
        weight.requires_grad_(True)
        weight.grad = None
    # A step of 1e-4 is below half a unit in the last place of a bf16 weight above 1/32 and would be lost.
    masters = [weight.detach().to(working_dtype(weight)) for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=config.lr, weight_decay=0.0, fused=True)
    batches = _batches(len(calibration), config)
    home = input_embeddings(model).weight.device
    share = 1.0
    note = ""
    with Progress(config.steps, "learning masks (prox_sparse)", "step", show=progress) as bar:
        for step, batch in enumerate(batches):
            ids = calibration[batch].to(home)
            loss = model(input_ids=ids, labels=ids).loss
            require_finite(f"ProxSparse, loss of step {step + 1}", loss, _UNHARMED, error=FloatingPointError)
            loss.backward()
            _take_gradients(weights, masters, originals, config)
            norm = nn.utils.clip_grad_norm_(masters, config.max_grad_norm)
            require_finite(f"ProxSparse, gradient of step {step + 1}", norm, _UNHARMED, error=FloatingPointError)
            optimizer.param_groups[0]["lr"] = config.lr_at(step)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for weight, master in zip(weights, masters, strict=True):
                    master.copy_(prox(master, config.lam))
                    weight.copy_(master)
            if step % _BAR_INTERVAL == 0 or step + 1 == config.steps:
                share = _violations(masters)
                note = f"loss {loss.item():.4f}, violations {share:.4f}"
            bar.update(note=note)
    for master, name in zip(masters, weights.values(), strict=True):
        if master not in optimizer.state:
            wanted = "expected to see calibration inputs, got none"
            raise ValueError(f"layer '{name}': {wanted}. The model skips it; put it in exclude.")
    logger.info("ProxSparse: %.4f of the groups have more than two nonzeros after %d steps", share, config.steps)
    return masters


def _batches(samples: int, config: ProxSparseConfig) -> Tensor:
    """Indices of the samples of every step, (steps, batch_size): one random order after the other."""
    generator = torch.Generator().manual_seed(config.seed)
    wanted = config.steps * config.batch_size
    orders = [torch.randperm(samples, generator=generator) for _ in range(math.ceil(wanted / samples))]
    return torch.cat(orders)[:wanted].reshape(config.steps, config.batch_size)


@torch.no_grad()
def _take_gradients(
    weights: Mapping[Tensor, str],
    masters: Sequence[Tensor],
    originals: Sequence[Tensor],
    config: ProxSparseConfig,
) -> None:
    """Move the weights' gradients to the masters, one at a time, with that of the frozen-weight term."""
    for weight, master, original in zip(weights, masters, originals, strict=True):
        if weight.grad is None:
            continue
        master.grad, weight.grad = weight.grad.to(master.dtype), None
        if config.frozen_lam > 0:
            gradient = frozen_weight_gradient(master, original.to(master.dtype), config.frozen_epsilon)
            master.grad.add_(gradient, alpha=config.frozen_lam)


def _violations(weights: Sequence[Tensor]) -> float:
    """Share of the groups of four that have more than two nonzeros."""
    counts = ((weight.reshape(-1, GROUP) != 0).sum(1) > 2 for weight in weights)
    return sum(int(count.sum()) for count in counts) / sum(weight.numel() // GROUP for weight in weights)
