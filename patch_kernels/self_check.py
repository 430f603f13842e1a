"""What works here: environment, build facts and a self-check of every op on every device, for `patch-llm info`."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

from patch_kernels import card_check, reference
from patch_kernels._library import build_info, gemm_status
from patch_kernels.ops import LIBRARY_PATH, adamw, masked_weight, tile_linear
from patch_kernels.packed_dtype import BY_TORCH
from patch_kernels.streamed_linear import StreamedLinear
from patch_kernels.tiled_experts import TiledExperts
from patch_kernels.tiled_weight import TiledWeight


def _small_problem(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A ragged 200x300 weight of small integers with dense and sparse tiles: every product and sum is exact."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = 200, 300
    weight = torch.randint(-3, 4, (rows, cols), generator=generator).to(dtype)
    tile_is_sparse = torch.tensor([[True, False, True], [False, True, True]])
    pattern = reference.PATTERNS[torch.randint(0, 6, (rows * cols // 4,), generator=generator)].reshape(rows, cols)
    keep = pattern | ~reference.expand_tiles(tile_is_sparse, (128, 128), (rows, cols))
    return weight.to(device), keep.to(device), tile_is_sparse.to(device)


def _pack_is_right(device: torch.device) -> None:
    for dtype in BY_TORCH:
        weight, keep, tile_is_sparse = _small_problem(device, dtype)
        unpacked = TiledWeight.pack(weight, keep, tile_is_sparse).unpack()
        if not torch.equal(unpacked, torch.where(keep, weight, 0)):
            raise ArithmeticError("unpack(pack(weight)) is not the masked weight")


def _linear_is_right(device: torch.device) -> None:
    for dtype in BY_TORCH:
        weight, keep, tile_is_sparse = _small_problem(device, dtype)
        x = (torch.arange(5 * weight.shape[1], device=device) % 5 - 2).to(dtype).reshape(5, -1)
        y = TiledWeight.pack(weight, keep, tile_is_sparse).matmul(x)
        if not torch.equal(y.cpu(), reference.tile_linear(x.cpu(), torch.where(keep, weight, 0).cpu())):
            raise ArithmeticError("result differs from the exact integer result")


def _experts_are_right(device: torch.device) -> None:
    for dtype in BY_TORCH:
        weight, keep, tile_is_sparse = _small_problem(device, dtype)
        weights = [weight, -weight, weight.flip(0), weight.flip(0) * 2]  # two parts of two experts
        keeps = [keep, keep, keep.flip(0), keep.flip(0)]
        flags = [tile_is_sparse] * 2 + [torch.zeros_like(tile_is_sparse)] * 2
        bias = torch.arange(2 * 400, device=device).remainder(7).to(dtype).reshape(2, 400)
        packed = TiledExperts.pack(weights, keeps, flags, bias, parts=2)
        x = (torch.arange(5 * 300, device=device) % 5 - 2).to(dtype).reshape(5, -1)
        experts = torch.arange(10, device=device) % 3 % 2
        dense = torch.stack(list(map(torch.where, keeps, weights, torch.zeros_like(weight).expand(4, -1, -1))))
        expected = reference.tile_experts(x.cpu(), experts.cpu(), dense.reshape(2, 400, 300).cpu(), bias.cpu())
        if not torch.equal(packed(x, experts).cpu(), expected):
            raise ArithmeticError("result differs from the exact integer result")


def _masked_weight_is_right(device: torch.device) -> None:
    # A GPU has kernels of its own for 16-bit weights with the usual tile.
    for dtype, shape, tile in ((torch.float32, (64, 96), (32, 32)), (torch.bfloat16, (160, 192), (128, 128))):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(shape, generator=generator).to(dtype)
        logits = torch.randn(weight.numel() // 4, 6, generator=generator)
        tile_logits = torch.randn(tile_linear.tile_grid(shape, tile), generator=generator)
        results = []
        for function, target in ((masked_weight.masked_weight, device), (reference.masked_weight, torch.device("cpu"))):
            pattern, tiles = (t.clone().to(target).requires_grad_() for t in (logits, tile_logits))
            weights, sums = function(weight.to(target), pattern, tiles, tile=tile, noise=(1, 2, 3))
            (weights.float().square().sum() + sums.sum()).backward()
            made: tuple[Any, ...] = (weights, sums, pattern.grad, tiles.grad)
            results.append([t.detach().cpu().double() for t in made])
        for got, expected in zip(*results, strict=True):
            # A 16-bit weight may be rounded the other way; a tile's gradient is summed in another order.
            tolerance = 1e-4 if got is not results[0][0] else max(1e-4, torch.finfo(dtype).eps)
            if not torch.allclose(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
                raise ArithmeticError(f"differs from the reference by {(got - expected).abs().max():.2e}")


def _adamw_is_right(device: torch.device) -> None:
    for moments in (torch.float32, torch.bfloat16, torch.uint8):
        generator = torch.Generator().manual_seed(0)
        start, grad = torch.randn(1000, generator=generator), torch.randn(1000, generator=generator)
        results = []
        for function, target in ((adamw.adamw_step, device), (reference.adamw_step, torch.device("cpu"))):
            state = [start.clone(), torch.zeros(1000, dtype=moments), torch.zeros(1000, dtype=moments)]
            param, exp_avg, exp_avg_sq = (t.to(target) for t in state)
            first, second = (torch.zeros(4, device=target) if moments == torch.uint8 else None for _ in range(2))
            for step in (1, 2):
                function(
                    param, grad.to(target), exp_avg, exp_avg_sq, exp_avg_scale=first, exp_avg_sq_scale=second,
                    step=step, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, seed=1, stream=2,
                )  # fmt: skip
            results.append([t.cpu() for t in (param, exp_avg, exp_avg_sq)])
        if not all(torch.equal(got, expected) for got, expected in zip(*results, strict=True)):
            raise ArithmeticError(f"with {moments} moments the bits are not those of the reference")


def _dense_linear_is_right(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in BY_TORCH:
        linear = torch.nn.Linear(777, 130, dtype=dtype, device=device).requires_grad_(False)
        linear.weight.copy_(torch.randint(-2, 3, (130, 777), generator=generator))
        linear.bias.copy_(torch.randint(-2, 3, (130,), generator=generator))
        for tokens in (1, 5, 9):
            x = torch.randint(-2, 3, (tokens, 777), generator=generator).to(device, dtype)
            expected = (x.double() @ linear.weight.double().T + linear.bias.double()).to(dtype)
            StreamedLinear.of_linear(linear)
            y = linear(x)
            StreamedLinear.to_linear(linear)
            if not torch.equal(y, expected):
                raise ArithmeticError(f"wrong with {tokens} tokens of {dtype}")


CHECKS: dict[str, Callable[[torch.device], None]] = {
    "pack_tiles, unpack_tiles": _pack_is_right,
    "tile_linear": _linear_is_right,
    "tile_experts": _experts_are_right,
    "dense_linear": _dense_linear_is_right,
    "masked_weight": _masked_weight_is_right,
    "adamw_step": _adamw_is_right,
}


def devices() -> list[torch.device]:
    """The CPU and every CUDA device that torch sees."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _advice(device: torch.device, error: Exception) -> str:
    if device.type == "cuda" and build_info(LIBRARY_PATH)["cuda_architectures"] == "none":
        return "This build has no CUDA kernels. Rebuild with nvcc on PATH: PATCH_KERNELS_CUDA=1 pip install ."
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = f"{major}.{minor}{'a' if major == 9 else ''}"
        return f"Rebuild for this GPU: TORCH_CUDA_ARCH_LIST={arch} pip install ."
    return f"Rebuild on this machine (pip install .) and report the error if it stays: {type(error).__name__}"


def check_device(device: torch.device) -> list[dict]:
    """Run each op on small data on a device; a list of {op, device, ok, error, advice}."""
    rows = []
    for op, check in CHECKS.items():
        row = {"op": op, "device": str(device), "ok": True, "error": "", "advice": ""}
        try:
            check(device)
        except Exception as error:  # whatever is wrong, the report must say it rather than stop
            row |= {"ok": False, "error": str(error).splitlines()[0], "advice": _advice(device, error)}
        rows.append(row)
    return rows


def report() -> dict:
    """Environment, build facts, devices and self-checks, ready for JSON."""
    gpus = [
        {
            "name": torch.cuda.get_device_name(i),
            "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
            "memory_bytes": torch.cuda.get_device_properties(i).total_memory,
        }
        for i in range(torch.cuda.device_count())
    ]
    checks = [row for device in devices() for row in check_device(device)]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cpu_threads": torch.get_num_threads(),
        "library": str(LIBRARY_PATH),
        "build": build_info(LIBRARY_PATH),
        "gpus": gpus,
        # After the checks: the first call of tile_linear on a GPU is what tests its kernels.
        "sparse_gemm": {
            f"cuda:{i}": gemm_status(LIBRARY_PATH, i) | {"checked": card_check.how(i)}
            for i in range(torch.cuda.device_count())
        },
        "checks": checks,
    }
