"""The regulariser of ProxSparse and its proximal operator: pure functions.

Source: Liu et al., "ProxSparse: Regularized Learning of Semi-Structured Sparsity Masks for Pretrained LLMs", 2025."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patch.pruning.options import GROUP
from patch.pruning.selection import working_dtype
from patch_kernels.checks import FLOATS, require_multiple, require_number, require_tensor

# Groups treated at once by `prox`: some ten temporaries of 16 MiB in fp32.
_CHUNK_GROUPS = 1 << 20
_SWEEPS = 10
_ROUNDS = 100
_DAMPED_STEPS = 20


@torch.no_grad()
def prox(v: Tensor, lam: float, *, chunk_groups: int = _CHUNK_GROUPS) -> Tensor:
    """Proximal operator of lam * `regularizer`: the w with the least 1/2 * ||w - v||^2 + lam * R(w).

    v             (..., K), K % 4 == 0, any floating dtype of at least 16 bits; each four consecutive entries
                  of the last dimension are a group of their own
    lam           0 or more; 0 gives v
    chunk_groups  groups treated at once, which bounds the memory
    returns       shape and dtype of v, computed in at least fp32. No entry is larger than in v or changes its
                  sign. Groups in which fewer nonzeros cost as much as more take the fewer.

    |w| minimises the same over |w| >= 0 with z = |v|. Each |w_i| given the other three is
    max(z_i - lam * (sum of their pairwise products), 0), and repeating that descends.
    While lam * max(z) < 1/6 the off-diagonal rows of the Hessian sum to less than its diagonal 1 (Gershgorin),
    the problem is convex and that is the minimum. Otherwise the minimum has two, three or four nonzeros, the
    largest ones; each case is solved and the best one taken, as in the paper. Descent from 0 misses
    the minimum of some groups when lam * max(z) is near 1; small steps first (`_damped`) do not.
    """
    require_number("lam", lam, ge=0, advice="The usual one is 0.1.")
    require_tensor("prox, v", v, dtypes=FLOATS, advice="Convert it.", error=TypeError)
    _check_groups("prox", v)
    groups = v.detach().reshape(-1, GROUP)
    result = torch.empty_like(groups)
    for part, out in zip(groups.split(chunk_groups), result.split(chunk_groups), strict=True):
        z = part.T.to(working_dtype(v)).abs().contiguous()
        hard = lam * z.amax(0) >= 1 / 6
        w = _descend(z.masked_fill(hard, 0), lam, torch.zeros_like(z))
        if hard.any():
            w[:, hard] = _best_of_candidates(z[:, hard], lam)
        out.copy_(w.T.copysign(part))
    return result.reshape(v.shape)


def regularizer(weight: Tensor) -> Tensor:
    """R = sum over groups of |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|, a scalar in at least fp32.

    weight  (..., K), K % 4 == 0. R is 0 if and only if every group has at most two nonzeros (as long as no
            product underflows). Differentiable.
    """
    _check_groups("regularizer", weight)
    return _triples(weight.to(working_dtype(weight)).abs().reshape(-1, GROUP).T).sum()


def frozen_weight_penalty(weight: Tensor, original: Tensor, epsilon: float) -> Tensor:
    """||(W / (W0 + epsilon * sgn(W0))) * (W - W0)||_F^2 with sgn(0) = 1, a scalar in the dtype of weight.

    It lets a weight go to 0 for nothing and holds one that stays near its original.
    """
    return (weight * (weight - original) / _scale(original, epsilon)).square().sum()


def frozen_weight_gradient(weight: Tensor, original: Tensor, epsilon: float) -> Tensor:
    """Gradient of `frozen_weight_penalty` with respect to weight, same shape."""
    residual = weight * (weight - original)
    return residual.mul_(2 * (2 * weight - original)).div_(_scale(original, epsilon).square_())


def _descend(z: Tensor, lam: float, w: Tensor, nonzeros: int = GROUP, rounds: int = _ROUNDS) -> Tensor:
    """Coordinate descent from w over the first `nonzeros` of the rows of z (4, G), the last one first.

    Row i becomes max(z_i - lam * (pairwise products of the others), 0), the best one given the others. Ends
    when no entry moves by more than rounding. Where the Hessian is nearly singular that takes many sweeps; such
    groups are few and go on alone, for at most `rounds` rounds.
    """
    rows = list(w.unbind(0))
    enough = 4 * torch.finfo(z.dtype).eps * z.amax(0)
    for _ in range(_SWEEPS):
        change = torch.zeros_like(enough)
        for i in reversed(range(nonzeros)):
            new = (z[i] - lam * _pairs(rows, i)).clamp_min_(0)
            change = torch.maximum(change, (new - rows[i]).abs_())
            rows[i] = new
        moving = change > enough
        if not moving.any():
            return torch.stack(rows)
    w = torch.stack(rows)
    if rounds > 1:
        w[:, moving] = _descend(z[:, moving], lam, w[:, moving], nonzeros, rounds - 1)
    return w


def _damped(z: Tensor, lam: float, nonzeros: int) -> Tensor:
    """Start for `_descend`: small steps from 0, all rows at once.

    Full steps from 0 overshoot where z is large and may then end in a worse minimum. The gradient's Lipschitz
    constant is at most 4 around a minimum (the off-diagonal of its Hessian is at most 1), so 1/3 descends.
    """
    w = torch.zeros_like(z)
    for _ in range(_DAMPED_STEPS):
        pairs = torch.stack([_pairs(w, i) for i in range(nonzeros)])
        w[:nonzeros] = (w[:nonzeros] + (z[:nonzeros] - lam * pairs - w[:nonzeros]) / 3).clamp_min_(0)
    return w


def _best_of_candidates(z: Tensor, lam: float) -> Tensor:
    """The minimiser for z (4, G) >= 0: the best with two, with three and with four nonzeros."""
    z, order = z.sort(dim=0, descending=True, stable=True)
    best = z.clone()
    best[2:] = 0
    least = _objective(best, z, lam)
    for nonzeros in (3, 4):
        w = _descend(z, lam, _damped(z, lam, nonzeros), nonzeros)
        value = _objective(w, z, lam)
        best = torch.where(value < least, w, best)
        least = torch.minimum(value, least)
    return torch.empty_like(best).scatter_(0, order, best)


def _objective(w: Tensor, z: Tensor, lam: float) -> Tensor:
    return (w - z).square().sum(0) / 2 + lam * _triples(w)


def _pairs(w: Sequence[Tensor] | Tensor, i: int) -> Tensor:
    """Sum of the pairwise products of the three other rows: the derivative of `_triples` in row i."""
    a, b, c = (w[j] for j in range(GROUP) if j != i)
    return a * b + c * (a + b)


def _triples(w: Tensor) -> Tensor:
    """Sum of the products of any three of the rows of w (4, G)."""
    a, b, c, d = w.unbind(0)
    return a * b * (c + d) + c * d * (a + b)


def _scale(original: Tensor, epsilon: float) -> Tensor:
    return torch.where(original < 0, original - epsilon, original + epsilon)


def _check_groups(label: str, weight: Tensor) -> None:
    require_tensor(label, weight, shape=(..., "K"), advice="Pass a weight.")
    require_multiple(f"{label}, last dimension", weight.shape[-1], GROUP, "Pad with zeros or leave this layer dense.")
