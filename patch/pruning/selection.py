"""What the pruning methods share: the result type, the options, input checks and the selection rules.

Scores say how much a weight matters; the smallest are pruned. Equal scores are pruned from the lower column
up, so a selection never depends on the sorting algorithm or the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from patch.pruning.options import GROUP, PruneOptions


@dataclass(frozen=True)
class Pruned:
    """A pruned weight.

    weight  (N, K), dtype and device of the original, exactly 0 where pruned.
    keep    (N, K) bool, True where a weight stays. A kept weight may itself be 0.
    """

    weight: torch.Tensor
    keep: torch.Tensor


def check_weight(weight: torch.Tensor, options: PruneOptions, label: str) -> None:
    """Refuse a weight that cannot be pruned with these options; `label` names it in the message."""
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.itemsize < 2:
        kind = f"a {weight.dtype} tensor" if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise TypeError(
            f"{label}: expected a floating-point weight (fp16, bf16, fp32 or fp64), got {kind}. Prune before "
            "quantizing."
        )
    if weight.is_meta:
        raise ValueError(f"{label}: expected a weight with values, got one on the meta device. Load the model first.")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"{label}: expected a weight of shape (out_features, in_features), got {tuple(weight.shape)}. "
            "Pass a Linear's weight."
        )
    if options.pattern == "2:4" and weight.shape[1] % GROUP:
        raise ValueError(
            f"{label}: expected in_features divisible by {GROUP} for pattern 2:4, got {weight.shape[1]}. "
            "Exclude this layer or use pattern='unstructured'."
        )
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{label}: expected finite weights, got {int((~torch.isfinite(weight)).sum())} that are NaN or "
            "infinite. The checkpoint is damaged or overflowed its dtype; load it in bf16 or fp32."
        )


def check_inputs(x: torch.Tensor, in_features: int, device: torch.device, label: str) -> None:
    """Refuse one calibration sample that does not fit the layer; `label` names it in the message."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        kind = f"a {x.dtype} tensor" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(
            f"{label}: expected a floating-point tensor (tokens, in_features), got {kind}. Pass activations."
        )
    if x.dim() != 2 or x.shape[1] != in_features:
        raise ValueError(
            f"{label}: expected shape (tokens, {in_features}), got {tuple(x.shape)}. "
            "Pass one 2-D tensor of the layer's inputs per sample."
        )
    if x.shape[0] == 0:
        raise ValueError(f"{label}: expected at least one token, got {tuple(x.shape)}. Drop empty samples.")
    if x.device != device:
        raise ValueError(f"{label}: expected the weight's device {device}, got {x.device}. Move one of them.")
    if not torch.isfinite(x).all():
        raise ValueError(
            f"{label}: expected finite calibration inputs, got {int((~torch.isfinite(x)).sum())} NaN or "
            "infinite values. Run the model in bf16 or fp32; fp16 activations overflow in some models."
        )


def check_updated(weight: torch.Tensor) -> None:
    """Refuse updated weights that left the range of their dtype."""
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"expected updated weights within the range of {weight.dtype}, got NaN or infinite ones. Prune "
            "in fp32 or bf16, raise damping, or give more calibration samples."
        )


def working_dtype(weight: torch.Tensor, precision: str = "fp32") -> torch.dtype:
    """Precision of scores and statistics: fp64 when asked for and for fp64 weights, else fp32."""
    return torch.float64 if precision == "fp64" or weight.dtype == torch.float64 else torch.float32


def keep_two_of_four(score: torch.Tensor) -> torch.Tensor:
    """Keep the two largest of every four consecutive columns of score (N, K); exactly two, also with ties."""
    columns = score.reshape(-1, GROUP).unbind(-1)
    keep = []
    for j, own in enumerate(columns):
        # How many of the group go before this one. Eight times faster than sorting rows of four (4096 x 4096,
        # one CPU core: 0.10 s against 0.84 s).
        rank = torch.zeros_like(own, dtype=torch.uint8)
        for i, other in enumerate(columns):
            if i != j:
                rank += (other <= own) if i < j else (other < own)
        keep.append(rank >= GROUP // 2)
    return torch.stack(keep, dim=-1).reshape(score.shape)


def keep_above_threshold(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Keep what is above the (int(numel * sparsity) + 1)-th smallest value of score (N, K).

    The threshold value itself is pruned, with everything equal to it, as in the published code of magnitude
    pruning and SparseGPT.
    """
    # A sparsity just below 1 may round up to all of them.
    index = min(int(score.numel() * sparsity), score.numel() - 1)
    threshold = score.flatten().kthvalue(index + 1).values
    return score > threshold


def keep_in_rows(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Prune the int(K * sparsity) smallest of every row of score (N, K)."""
    smallest = score.argsort(dim=1, stable=True)[:, : int(score.shape[1] * sparsity)]
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, smallest, False)


def smallest_of_all(score: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` smallest of score (N, K); of equal ones the lower column first, then the lower row."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = score.flatten().kthvalue(count).values
    marked = score < threshold
    columns, rows = (score == threshold).T.nonzero()[: count - int(marked.sum())].unbind(1)
    marked[rows, columns] = True
    return marked


def select(weight: torch.Tensor, keep: torch.Tensor) -> Pruned:
    """The weight with what is not kept set to zero; kept values are bit-identical."""
    return Pruned(weight.detach().masked_fill(~keep, 0), keep)
