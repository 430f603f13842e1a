"""The pruning methods straight from their formulas: loops over Python numbers and fp64 tensors.

They share no code with the package. `inputs` is a list of (tokens, K) tensors, one per sample.
"""

from __future__ import annotations

import itertools
import math

import torch


def smallest(values, count):
    """Indices of the `count` smallest, equal values from the lower index up."""
    return sorted(range(len(values)), key=lambda i: (values[i], i))[:count]


def two_of_four(scores):
    keep = [[True] * len(row) for row in scores]
    for row, kept in zip(scores, keep, strict=True):
        for start in range(0, len(row), 4):
            for i in smallest(row[start : start + 4], 2):
                kept[start + i] = False
    return torch.tensor(keep)


def channel_energy(inputs):
    k = inputs[0].shape[1]
    total = [0.0] * k
    for x in inputs:
        for row in x.double().tolist():
            for c in range(k):
                total[c] += row[c] ** 2
    return [value / len(inputs) for value in total]


def wanda_reference(weight, inputs, pattern, sparsity, shift=False):
    energy = channel_energy(inputs)
    if shift:
        least = min(1.0 if value == 0 else value for value in energy)
        energy = [value + least for value in energy]
    scores = [[abs(w) * math.sqrt(e) for w, e in zip(row, energy, strict=True)] for row in weight.double().tolist()]
    if pattern == "2:4":
        return two_of_four(scores)
    keep = []
    for row in scores:
        gone = set(smallest(row, int(len(row) * sparsity)))
        keep.append([i not in gone for i in range(len(row))])
    return torch.tensor(keep)


def magnitude_reference(weight, pattern, sparsity):
    scores = weight.double().abs().tolist()
    if pattern == "2:4":
        return two_of_four(scores)
    flat = sorted(itertools.chain(*scores))
    threshold = flat[int(len(flat) * sparsity)]
    return torch.tensor([[value > threshold for value in row] for row in scores])


def sparsegpt_reference(weight, inputs, pattern, sparsity, block_size=128, damping=0.01):
    """Optimal brain surgeon, column by column, inverting the remaining Hessian afresh each time."""
    w = weight.double().clone()
    n, k = w.shape
    hessian = sum(2 * x.double().T @ x.double() for x in inputs) / len(inputs)
    for c in range(k):
        if hessian[c, c] == 0:
            hessian[c, c] = 1
            w[:, c] = 0
    hessian = hessian + torch.eye(k, dtype=torch.float64) * (damping * hessian.diagonal().mean())
    rows = [torch.linalg.inv(hessian[c:, c:])[0] for c in range(k)]
    keep = torch.ones(n, k, dtype=torch.bool)
    for c in range(k):
        if pattern == "unstructured" and c % block_size == 0:
            columns = range(c, min(c + block_size, k))
            cost = {(r, j): float(w[r, j] ** 2 / rows[j][0]) for r in range(n) for j in columns}
            threshold = sorted(cost.values())[int(len(cost) * sparsity)]
            for (r, j), value in cost.items():
                keep[r, j] = value > threshold
        if pattern == "2:4" and c % 4 == 0:
            for r in range(n):
                for i in smallest([float(w[r, c + i] ** 2 / rows[c + i][0]) for i in range(4)], 2):
                    keep[r, c + i] = False
        for r in range(n):
            if not keep[r, c]:
                w[r, c:] -= w[r, c] / rows[c][0] * rows[c]
                w[r, c] = 0
    return w, keep


def thanos_reference(weight, inputs, pattern, sparsity, block_size=None, damping=0.01):
    """Block by block: score with current weights, then per row the inverse of the remaining Hessian afresh."""
    w = weight.double().clone()
    n, k = w.shape
    block_size = block_size or (512 if pattern == "2:4" else 128)
    energy = channel_energy(inputs)
    hessian = sum(2 * x.double().T @ x.double() for x in inputs) / len(inputs)
    for c in range(k):
        if hessian[c, c] == 0:
            hessian[c, c] = 1
            w[:, c] = 0
    hessian = hessian + torch.eye(k, dtype=torch.float64) * (damping * hessian.diagonal().mean())
    keep = torch.ones(n, k, dtype=torch.bool)
    for start in range(0, k, block_size):
        stop = min(start + block_size, k)
        metric = [[abs(w[r, c].item()) * math.sqrt(energy[c]) for c in range(k)] for r in range(n)]
        if pattern == "2:4":
            keep[:, start:stop] = two_of_four([row[start:stop] for row in metric])
        else:
            left = int(sparsity * (n * k)) - int((~keep).sum())
            order = sorted((metric[r][c], c, r) for r in range(n) for c in range(start, k))
            for _, c, r in order[:left]:
                if c < stop:
                    keep[r, c] = False
        inverse = torch.linalg.inv(hessian[start:, start:])
        for r in range(n):
            q = [c - start for c in range(start, stop) if not keep[r, c]]
            if q:
                solved = torch.linalg.solve(inverse[q][:, q], w[r, start:][q])
                w[r, start:] -= solved @ inverse[q]
                w[r, [start + c for c in q]] = 0
    return w, keep
