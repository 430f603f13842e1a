"""Mixtures of experts whose every product and sum is exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patch_kernels import TiledExperts, reference
from support.strategies import hybrid_mask


@dataclass
class ExpertsCase:
    """Packed matrices, and the same ones dense: (E, parts * N, K), zeros where pruned."""

    packed: TiledExperts
    dense: Tensor
    bias: Tensor | None

    def op_arguments(self, x: Tensor, experts: Tensor, batch_invariant: bool = False) -> tuple:
        """Of the op, in the order of its schema."""
        packed = self.packed
        of_weight = packed.weight, packed.tile_is_sparse, None, None, packed.out_features, packed.parts
        return x, experts, *of_weight, self.bias, batch_invariant


def whole_numbers(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


def real_numbers(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def experts_case(
    experts: int,
    parts: int,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    with_bias: bool = True,
    sparse_share: float = 0.5,
    seed: int = 0,
    numbers=whole_numbers,
) -> ExpertsCase:
    generator = torch.Generator().manual_seed(seed)
    masks = [hybrid_mask(*shape, sparse_share, generator) for _ in range(experts * parts)]
    weights = [numbers(generator, dtype, *shape) for _ in masks]
    bias = numbers(generator, dtype, experts, parts * shape[0]) if with_bias else None
    keeps, flags = zip(*masks, strict=True)
    packed = TiledExperts.pack(weights, keeps, flags, bias, parts=parts)
    masked = [torch.where(keep, weight, 0) for weight, keep in zip(weights, keeps, strict=True)]
    return ExpertsCase(packed, torch.stack(masked).reshape(experts, parts * shape[0], shape[1]), bias)


def some_experts(rows: int, count: int, seed: int) -> Tensor:
    """Half of the rows go to expert 1, none to the last, the others anywhere: experts of few and of many tokens."""
    generator = torch.Generator().manual_seed(seed)
    anywhere = torch.randint(0, max(1, count - 1), (rows,), generator=generator)
    return torch.where(torch.rand(rows, generator=generator) < 0.5, min(1, count - 1), anywhere)


def experts_are_exact() -> bool:
    """For processes with other kernels.

    Of the wide cases one unpacks more than one block, and in one the tokens of an expert exceed the scratch.
    """
    cases = [((130, 260), 2, 1), ((130, 260), 2, 40), ((130, 260), 1, 300), ((130, 25000), 1, 2), ((20, 25000), 1, 70)]
    for dtype in (torch.float16, torch.bfloat16):
        for shape, parts, tokens in cases:
            case = experts_case(3, parts, shape, dtype)
            x = whole_numbers(torch.Generator().manual_seed(tokens), dtype, tokens, shape[1])
            experts = some_experts(2 * tokens, 3, tokens)
            if not torch.equal(case.packed(x, experts), reference.tile_experts(x, experts, case.dense, case.bias)):
                return False
    return True
