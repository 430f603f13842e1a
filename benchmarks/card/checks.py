"""Checks of tile_linear for benchmarks.card.run: exact integers, repeated launches, graph replay.

python -m benchmarks.card.checks --sanitizer     the small cases that compute-sanitizer watches
python -m benchmarks.card.checks --profile NAME  one call between cudaProfilerStart and Stop, for ncu
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator

import torch

from benchmarks import harness
from benchmarks.card import mask_checks
from benchmarks.ops.bench_tile_linear import packed_weight
from patch_kernels import PATTERNS, TiledExperts, TiledLinear, TiledWeight, reference, tile_grid
from patch_kernels.ops import tile_linear

# N, K: one tile, tails on both sides, an odd number of tile rows, several splits of K, more rows than SMs.
EXACT_SHAPES = [(128, 128), (129, 130), (100, 72), (384, 1024), (640, 2056), (256, 11008)]
LARGE_EXACT_SHAPES = [(4096, 4096), (20480, 512)]
EXACT_TOKENS = [1, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65, 128, 129, 200, 256, 513, 1024, 4095]
TYPE_MAPS = ["random", "dense", "sparse", "alternating", "one sparse"]
# Layers that one call computes. K, N of each: q, k, v whose own plans split K differently, gate and up that split alike
# and take one launch, and four of which some have no whole tile.
GROUPS = {
    "q, k, v of Llama-3-8B": (4096, (4096, 1024, 1024)),
    "q, k, v of Llama-3.2-1B": (2048, (2048, 512, 512)),
    "gate, up of Llama-3.2-1B": (2048, (8192, 8192)),
    "four": (1000, (1024, 130, 384, 64)),
}
GROUP_TOKENS = [1, 8, 16, 17, 33, 64, 100, 256, 1024]
DRY_GROUPS = {"q, k, v": (256, (384, 130, 64)), "gate, up": (130, (256, 256)), "four": (72, (128, 130, 64, 1))}
# Mixtures: experts, parts, N, K. More matrices than a launch takes, one that fills it, and sizes without a whole tile.
MIXTURES = {
    "gate, up of Qwen3-30B-A3B, 32 experts": (32, 2, 768, 2048),
    "down of Qwen3-30B-A3B, 32 experts": (32, 1, 2048, 768),
    "ragged": (9, 2, 130, 1000),
}
MIXTURE_CALLS = [(1, 1), (1, 8), (8, 8), (40, 4), (300, 8), (2048, 2)]  # rows of x, and of y for each
DRY_MIXTURES, DRY_CALLS = {"two parts": (9, 2, 130, 72), "one": (5, 1, 64, 130)}, [(1, 1), (3, 2), (40, 1)]
DRY_SHAPES, DRY_TOKENS = [(129, 130), (256, 384)], [1, 9, 65]
SANITIZER_CASES = [(256, 512, tokens) for tokens in (8, 64, 200)]
PROFILES = {  # name: N, K, tokens, sparsity
    "decode": (22016, 4096, 16, 0.45),
    "decode64": (22016, 4096, 64, 0.45),
    "prefill": (22016, 4096, 4096, 0.45),
    "prefill_dense": (22016, 4096, 4096, 0.0),
}


def type_map(kind: str, grid: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Tile flags of one of TYPE_MAPS."""
    if kind == "random":
        return torch.rand(grid, generator=generator) < 0.5
    if kind == "alternating":
        return (torch.arange(grid[0])[:, None] + torch.arange(grid[1])) % 2 == 1
    tiles = torch.full(grid, kind == "sparse")
    if kind == "one sparse":
        tiles[-1, -1] = True
    return tiles


def integer_weight(rows: int, cols: int, kind: str, dtype: torch.dtype, generator: torch.Generator):
    """Packed weight of integers in [-7, 7] and the dense weight it stands for."""
    tiles = type_map(kind, tile_grid((rows, cols)), generator)
    groups = -(-cols // 4)
    patterns = PATTERNS[torch.randint(0, 6, (rows * groups,), generator=generator)].reshape(rows, groups, 4)
    if cols % 4 in (1, 2):  # a cut group of one or two columns keeps them all
        patterns[:, -1] = True
    keep = patterns.reshape(rows, -1)[:, :cols]
    if cols % 4 == 3:  # two of the three that are there
        keep[:, -3:] = torch.tensor([True, False, True])
    keep = keep | ~reference.expand_tiles(tiles, (128, 128), (rows, cols))
    weight = torch.randint(-7, 8, (rows, cols), generator=generator).to(dtype)
    return TiledWeight.pack(weight, keep, tiles), torch.where(keep, weight, 0)


def on_device(tiled: TiledWeight, device: str) -> TiledWeight:
    tensors = {f.name: getattr(tiled, f.name) for f in dataclasses.fields(tiled)}
    return dataclasses.replace(
        tiled, **{name: value.to(device) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    )


def exact_y(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias of small integers: fp64 is exact, and so is fp32 in any order while sums stay below 2^24."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    assert y.abs().max() < 1 << 22, "the integers are too large for an exact test"
    return y.to(x.dtype)


def exact_cases(device: str, shapes: list, tokens_list: list) -> Iterator[tuple[str, int]]:
    """(case, number of values of y that differ) over shapes, tokens, type maps, bias and dtypes; y is compared bitwise.

    Every shape meets every number of tokens with random types, and every type map at three of them.
    """
    for (rows, cols), kind in itertools.product(shapes, TYPE_MAPS):
        for dtype in (torch.bfloat16, torch.float16):
            generator = torch.Generator().manual_seed(rows + cols)
            tiled, dense = integer_weight(rows, cols, kind, dtype, generator)
            weight, dense = on_device(tiled, device), dense.to(device)
            counts = (
                tokens_list if kind == "random" and dtype == torch.bfloat16 else tokens_list[:: len(tokens_list) // 3]
            )
            for tokens in counts:
                x = torch.randint(-4, 5, (tokens, cols), generator=generator).to(dtype).to(device)
                bias = None
                if tokens % 2:
                    bias = torch.randint(-8, 9, (rows,), generator=generator).to(dtype).to(device)
                y = poisoned_matmul(weight, x, bias)
                different = (y.view(torch.int16) != exact_y(x, dense, bias).view(torch.int16)).sum()
                yield f"{rows}x{cols} M={tokens} {kind} {str(dtype)[6:]}", int(different)


def group_operands(weights: list[TiledWeight], biases: list[torch.Tensor | None]) -> list:
    """What tile_linear_group takes for these layers."""
    return [
        operand
        for tiled, bias in zip(weights, biases, strict=True)
        for operand in (
            tiled.payload,
            tile_linear.tile_flags(tiled.tile_is_sparse),
            tiled.schedule,
            tiled.shape[0],
            bias,
        )
    ]


def group_cases(
    device: str, groups: dict[str, tuple[int, tuple[int, ...]]], tokens_list: list[int]
) -> Iterator[tuple[str, int]]:
    """(case, values of y that differ from the exact ones, or from those of a call of one layer) of calls of several.

    Bitwise, with and without batch_invariant; every other layer has a bias, and each its own type map.
    """
    for name, (cols, row_counts) in groups.items():
        generator = torch.Generator().manual_seed(cols)
        layers = []
        for rows, kind in zip(row_counts, itertools.cycle(TYPE_MAPS), strict=False):
            tiled, dense = integer_weight(rows, cols, kind, torch.bfloat16, generator)
            layers.append((on_device(tiled, device), dense.to(device)))
        for tokens in tokens_list:
            x = torch.randint(-4, 5, (tokens, cols), generator=generator).bfloat16().to(device)
            biases = [
                torch.randint(-8, 9, (rows,), generator=generator).bfloat16().to(device) if index % 2 else None
                for index, rows in enumerate(row_counts)
            ]
            expected = [exact_y(x, dense, bias) for (_, dense), bias in zip(layers, biases, strict=True)]
            operands = group_operands([tiled for tiled, _ in layers], biases)
            for batch_invariant in (False, True):
                different = 0
                results = tile_linear.tile_linear_group(x, operands, batch_invariant)
                for y, exact, (tiled, _), bias in zip(results, expected, layers, biases, strict=True):
                    single = tiled.matmul(x, bias, batch_invariant=batch_invariant)
                    for other in (exact, single):
                        different += int((y.view(torch.int16) != other.view(torch.int16)).sum())
                yield f"{name} M={tokens}{' batch invariant' if batch_invariant else ''}", different


def integer_experts(experts: int, parts: int, rows: int, cols: int, generator: torch.Generator):
    """TiledExperts of integers, each matrix with its own type map, and the dense weights (E, parts * N, K)."""
    matrices = [
        integer_weight(rows, cols, kind, torch.bfloat16, generator)
        for kind, _ in zip(itertools.cycle(TYPE_MAPS), range(experts * parts), strict=False)
    ]
    payload = torch.cat([tiled.payload for tiled, _ in matrices])
    module = TiledExperts(experts, parts, cols, rows, True, payload_bytes=payload.numel())
    module.weight = payload
    module.tile_is_sparse = torch.stack([tile_linear.tile_flags(tiled.tile_is_sparse) for tiled, _ in matrices])
    bias = torch.randint(-8, 9, (experts, parts * rows), generator=generator).bfloat16()
    module.bias = torch.nn.Parameter(bias, requires_grad=False)
    dense = torch.stack([dense for _, dense in matrices])
    return module, dense.reshape(experts, parts * rows, cols)


def expert_cases(
    device: str, mixtures: dict[str, tuple[int, int, int, int]], calls: list[tuple[int, int]]
) -> Iterator[tuple[str, int]]:
    """(case, values of y that differ from the exact ones) of random experts of random integers, bitwise.

    Of a batch-invariant call also those that differ when its first rows are called alone.
    """
    for name, (experts, parts, rows, cols) in mixtures.items():
        generator = torch.Generator().manual_seed(rows)
        module, dense = integer_experts(experts, parts, rows, cols, generator)
        module, dense = module.to(device), dense.to(device)
        for tokens, fan in calls:
            x = torch.randint(-4, 5, (tokens, cols), generator=generator).bfloat16().to(device)
            chosen = torch.randint(0, experts, (tokens * fan,), generator=generator).to(device)
            expected = torch.empty(tokens * fan, parts * rows, dtype=x.dtype, device=device)
            for expert in chosen.unique().tolist():
                at = (chosen == expert).nonzero()[:, 0]
                expected[at] = exact_y(x[at // fan], dense[expert], module.bias[expert])
            for module.batch_invariant in (False, True):
                y = module(x, chosen)
                different = int((y.view(torch.int16) != expected.view(torch.int16)).sum())
                if module.batch_invariant:
                    real = torch.randn(tokens, cols, generator=generator).bfloat16().to(device)
                    first = module(real[: (tokens + 1) // 2], chosen[: (tokens + 1) // 2 * fan])
                    whole = module(real, chosen)[: len(first)]
                    different += int((first.view(torch.int16) != whole.view(torch.int16)).sum())
                yield f"{name} M={tokens}x{fan}{' batch invariant' if module.batch_invariant else ''}", different


def poisoned_matmul(weight: TiledWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y, written where NaN lay before: freed memory of y's size is what the allocator hands out next."""
    poison = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype, device=x.device)
    del poison
    return weight.matmul(x, bias)


def repeat_cases(device: str, launches: int, sizes: list[tuple[int, int, int]]) -> Iterator[tuple[str, int]]:
    """(case, launches whose y differs from the first bit for bit), on real-valued data with every SM busy."""
    for rows, cols, tokens in sizes:
        tiled = packed_weight(torch.randn(rows, cols).bfloat16().to(device), 0.45)
        x = torch.randn(tokens, cols).bfloat16().to(device)
        first = tiled.matmul(x).view(torch.int16)
        different = sum(not torch.equal(tiled.matmul(x).view(torch.int16), first) for _ in range(launches - 1))
        yield f"{launches} launches {rows}x{cols} M={tokens}", different


def invariance_cases(device: str, sizes: list[tuple[int, int, int]]) -> Iterator[tuple[str, int]]:
    """(case, values of the first rows that depend on how many rows there are), with batch_invariant=True."""
    for rows, cols, most in sizes:
        tiled = packed_weight(torch.randn(rows, cols).bfloat16().to(device), 0.45)
        x = torch.randn(most, cols).bfloat16().to(device)
        whole = tiled.matmul(x, batch_invariant=True).view(torch.int16)
        for tokens in sorted({1, most // 16, most // 4, most // 2 + 1} - {0}):
            part = tiled.matmul(x[:tokens], batch_invariant=True).view(torch.int16)
            yield f"batch invariant {rows}x{cols} M={tokens} of {most}", int((part != whole[:tokens]).sum())


def graph_cases(sizes: list[tuple[int, int, int]]) -> Iterator[tuple[str, int]]:
    """(case, replays that differ from the eager result), the input changed in place between them."""
    for rows, cols, tokens in sizes:
        linear = torch.nn.Linear(cols, rows, dtype=torch.bfloat16, device="cuda")
        tiled = packed_weight(linear.weight.detach(), 0.45)
        layer = TiledLinear(cols, rows, payload_bytes=tiled.payload.numel(), device="cuda")
        layer.load_state_dict(
            {"payload": tiled.payload, "tile_is_sparse": tiled.tile_is_sparse.to(torch.uint8), "bias": linear.bias}
        )
        x = torch.randn(tokens, cols, device="cuda").bfloat16()
        with torch.no_grad():
            layer(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            different = 0
            for _ in range(5):
                x.copy_(torch.randn_like(x))
                eager = layer(x).clone()
                y.fill_(float("nan"))
                graph.replay()
                different += not torch.equal(y.view(torch.int16), eager.view(torch.int16))
        yield f"graph replay {rows}x{cols} M={tokens}", different


def sanitizer_cases(device: str) -> None:
    """Small exact cases: all but what experts need is made on the CPU, so that the tool sees tile_linear alone."""
    for rows, cols, tokens in SANITIZER_CASES:
        generator = torch.Generator().manual_seed(tokens)
        tiled, dense = integer_weight(rows, cols, "random", torch.bfloat16, generator)
        x = torch.randint(-4, 5, (tokens, cols), generator=generator).bfloat16()
        y = on_device(tiled, device).matmul(x.to(device)).cpu()
        assert torch.equal(y, exact_y(x, dense, None)), f"wrong result at M={tokens}"
    for tokens in (8, 64):
        layers = [integer_weight(rows, 512, "random", torch.bfloat16, generator) for rows in (256, 130)]
        x = torch.randint(-4, 5, (tokens, 512), generator=generator).bfloat16()
        operands = group_operands([on_device(tiled, device) for tiled, _ in layers], [None, None])
        for y, (_, dense) in zip(tile_linear.tile_linear_group(x.to(device), operands), layers, strict=True):
            assert torch.equal(y.cpu(), exact_y(x, dense, None)), f"wrong result of a group at M={tokens}"
    for case, different in expert_cases(device, {"experts": (9, 2, 130, 512)}, [(8, 2), (70, 1)]):
        assert different == 0, f"wrong result of {case}"


def profile(name: str) -> None:
    rows, cols, tokens, sparsity = PROFILES[name]
    tiled = packed_weight(torch.randn(rows, cols, device="cuda").bfloat16(), sparsity)
    x = torch.randn(tokens, cols, device="cuda").bfloat16()
    tiled.matmul(x)
    harness.profiled(lambda: tiled.matmul(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--sanitizer", action="store_true")
    choice.add_argument("--profile", choices=list(PROFILES))
    options = parser.parse_args()
    with torch.no_grad():
        if options.sanitizer:
            sanitizer_cases("cuda")
            with torch.enable_grad():
                mask_checks.sanitizer_cases("cuda")
        else:
            profile(options.profile)


if __name__ == "__main__":
    main()
