"""Checks of masked_weight and of learning with it, for benchmarks.card.run: against the CPU op, and against themselves.

python -m benchmarks.card.mask_checks --profile NAME  one pass between cudaProfilerStart and Stop, for ncu
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator

import torch

from benchmarks import harness
from benchmarks.ops.bench_masked_weight import (
    SETTINGS,
    Case,
    Inputs,
    Outcome,
    both_passes,
    differences,
    differing,
    forward_backward,
    inputs,
    ours,
    random_inputs,
    settings,
)
from patch.learn.config import MODES, LearnConfig
from patch_kernels import masked_weight, reference

NOISE = (5, 7, 9)
# N, K and tile: one tile, tails on both sides, odd tiles, many tiles.
CASES = [
    ((128, 128), (128, 128)),
    ((130, 260), (64, 128)),
    ((33, 52), (16, 16)),
    ((9, 68), (4, 12)),
    ((257, 4100), (128, 128)),
    ((7, 20), (3, 8)),
    ((640, 2048), (128, 128)),
]
DRY_CASES = CASES[1:4]
LARGE = (65536, 11264)  # its fp32 logits take 4.4e9 bytes: offsets beyond 2^31 and 2^32
LARGE_BYTES = 40 << 30
GENTLE = dict(pattern_scale=2.0, tile_scale=3.0)  # as tests/kernels/test_gpu.py
PROFILES = ("mask_forward", "mask_backward")
PROFILED = Case(8192, 8192, "joint", torch.bfloat16, torch.float32)


def make(shape: tuple[int, int], tile: tuple[int, int], mode: str, dtype: torch.dtype, device: str) -> Inputs:
    """Real-valued inputs with logits around 1."""
    logits = torch.float64 if dtype == torch.float64 else torch.float32
    return random_inputs(shape, tile, mode, dtype, logits, 1.0, device)


def moved(data: Inputs, device: str) -> Inputs:
    def there(tensor):
        return None if tensor is None else tensor.detach().to(device).requires_grad_(tensor.requires_grad)

    return Inputs(*(there(t) for t in (data.weight, data.pattern, data.tiles, data.keep, data.grad)))


def different_bits(a: Outcome, b: Outcome) -> int:
    """Values that are not the same, NaN counted as equal to itself."""
    return sum(int((~torch.eq(a[n], b[n]) & ~(a[n].isnan() & b[n].isnan())).sum()) for n in a)


def equality_cases(device: str, shapes_and_tiles: list) -> Iterator[tuple[str, int]]:
    """(case, values that differ) of the GPU op from the CPU op; on a CPU, of the op from the reference."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for (shape, tile), mode, dtype in itertools.product(shapes_and_tiles, MODES, dtypes):
        data = make(shape, tile, mode, dtype, "cpu")
        for hard, noise in ((False, NOISE), (False, None), (True, NOISE)):
            options = GENTLE | dict(noise=noise, hard_pattern=hard, hard_tile=hard)
            function = masked_weight if device == "cuda" else reference.masked_weight
            expected = both_passes(function, data, tile, **options)
            got = both_passes(masked_weight, moved(data, device), tile, **options)
            name = f"{shape[0]}x{shape[1]} tile {tile[0]}x{tile[1]} {mode} {str(dtype)[6:]}"
            name += f"{' hard' if hard else ''}{'' if noise else ' no noise'}"
            yield name, sum(differences(got, expected, hard and mode != "tile").values())


def large_cases(shape: tuple[int, int] = LARGE) -> Iterator[tuple[str, int]]:
    """The same where offsets do not fit in 32 bits, both passes on the GPU against the CPU op."""
    data = make(shape, (128, 128), "joint", torch.bfloat16, "cuda")
    on_cpu = moved(data, "cpu")
    got = both_passes(masked_weight, data, (128, 128), noise=NOISE, **GENTLE)
    got = {name: tensor.cpu() for name, tensor in got.items()}
    del data
    torch.cuda.empty_cache()
    expected = both_passes(masked_weight, on_cpu, (128, 128), noise=NOISE, **GENTLE)
    for name in expected:
        parts = zip(got[name].chunk(64), expected[name].chunk(64), strict=True)
        # Measured against the largest of a part: stricter than against the largest of all.
        yield f"{shape[0]}x{shape[1]} {name}", sum(differing(a.cuda(), b) for a, b in parts)


def repeat_cases(device: str, launches: int, sizes: list[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """(case, launches of both passes that differ from the first, bit for bit)."""
    for size, mode in itertools.product(sizes, MODES):
        data = make(size, (128, 128), mode, torch.bfloat16, device)
        first = both_passes(masked_weight, data, (128, 128), noise=NOISE, **SETTINGS)
        again = (both_passes(masked_weight, data, (128, 128), noise=NOISE, **SETTINGS) for _ in range(launches - 1))
        yield f"{launches} launches {size[0]}x{size[1]} {mode}", sum(different_bits(first, r) > 0 for r in again)


def tile_gradient_of(masked: torch.Tensor, data: Inputs, temperature: float, scale: float) -> torch.Tensor:
    """The tile gradient that belongs to a sampled mask of whole 128x128 tiles, from the forward result alone (fp64).

    A group of the mask sums to 2 + 2 d, d its tile's share of dense; then the 2:4 part is (mask - d) / (1 - d).
    """
    mask = masked / data.weight
    rows, cols = (n // 128 for n in mask.shape)
    dense = (mask.reshape(-1, 4).sum(1) / 2 - 1).reshape(rows, 128, cols, 32).mean((1, 3))
    spread = reference.expand_tiles(dense, (128, 128), tuple(mask.shape))
    pattern = (mask - spread) / (1 - spread)
    to_dense = (data.grad * data.weight * (1 - pattern)).reshape(rows, 128, cols, 128).sum((1, 3))
    return to_dense * dense * (1 - dense) * scale / temperature


def same_mask_cases(device: str, draws: int) -> Iterator[tuple[str, int]]:
    """(case, tiles) whose gradient is not that of the mask the forward pass sampled."""
    data = make((256, 384), (128, 128), "joint", torch.float64, device)
    for draw in range(draws):
        options = dict(pattern_temperature=0.7, pattern_scale=2.0, tile_temperature=1.3, tile_scale=1.5)
        masked, _ = masked_weight(data.weight, data.pattern, data.tiles, noise=(1, 2, draw), **options)
        (gradient,) = torch.autograd.grad(masked, data.tiles, data.grad)
        expected = tile_gradient_of(masked.detach(), data, 1.3, 1.5)
        wrong = (gradient - expected).abs() > 1e-8 * expected.abs().max()
        yield f"backward sees the mask of forward, draw {draw}", int(wrong.sum())


def learn_case(device: str, mode: str) -> Iterator[tuple[str, int]]:
    """(case, differences) of a short learn() from a repetition: masks and logged values, bit for bit."""
    from benchmarks.ops import bench_learn_step  # with transformers; the tools that watch the op need neither
    from patch.learn.run import learn

    base = bench_learn_step.build_model("dry", torch.float32, device)
    # Attention by plain matrix products: the backward pass of the fused one adds in no fixed order.
    base.set_attn_implementation("eager")
    blocks = torch.randint(0, 97, (8, 16), generator=torch.Generator().manual_seed(0))
    sparsity = None if mode == "maskllm" else 0.4
    config = LearnConfig.from_preset(mode, sparsity, global_batch_size=4, local_batch_size=2, tile=(16, 16), lr=0.05)
    results = []
    for _ in range(2):
        model = copy.deepcopy(base)
        keep = bench_learn_step.RandomKeep(model)
        prior = {name: keep[name].cpu() for name in bench_learn_step.maskable_linears(model)}
        results.append(learn(model, blocks, config, prior_masks=prior, progress=False))
    first, second = results
    different = sum(int((first.masks[name] != second.masks[name]).sum()) for name in first.masks)
    for one, two in zip(first.metrics, second.metrics, strict=True):
        different += sum(one[key] != two[key] for key in one if key != "tokens_per_second")
    yield f"learn twice, {mode}", different


def sanitizer_cases(device: str) -> None:
    """Small cases of both passes, everything else made on the CPU."""
    for (shape, tile), mode in itertools.product(CASES[1:4], MODES):
        data = make(shape, tile, mode, torch.bfloat16, "cpu")
        got = both_passes(masked_weight, moved(data, device), tile, noise=NOISE, **GENTLE)
        expected = both_passes(masked_weight, data, tile, noise=NOISE, **GENTLE)
        wrong = sum(differences({name: value.cpu() for name, value in got.items()}, expected, False).values())
        assert wrong == 0, f"masked_weight: {wrong} wrong values at {shape} {mode}"


def profile(name: str) -> None:
    data, options = inputs(PROFILED, "cuda"), settings(PROFILED)
    forward_backward(ours, data, options, [])
    masked, sums = ours(data, options)

    def forward() -> None:
        ours(data, options)

    def backward() -> None:
        torch.autograd.grad([masked, sums], data.leaves(), [data.grad, torch.ones_like(sums)])

    harness.profiled(forward if name == "mask_forward" else backward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, required=True)
    profile(parser.parse_args().profile)


if __name__ == "__main__":
    main()
