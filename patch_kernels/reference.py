"""Plain PyTorch version of every op: slow, differentiable, obvious. Tests and benchmarks compare against it.

The noise is the same counter-based stream that the compiled ops use, so equal arguments give equal noise.
"""

from __future__ import annotations

from typing import cast

import torch

from patch_kernels.checks import require_multiple, require_tensor

TILE = 128

# Keep patterns of 2:4 sparsity in the order of MaskLLM and PATCH: 1100 1010 1001 0110 0101 0011.
PATTERNS = torch.tensor(
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.bool
)

_LOW32 = 0xFFFFFFFF
_TILE_STREAM = 1 << 31  # set in the fourth counter word for tile noise


def _multiply_high_low(a: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * constant, for int64 tensors holding 32-bit words (int64 would overflow)."""
    low_product = (a & 0xFFFF) * constant
    high_product = (a >> 16) * constant + (low_product >> 16)
    return high_product >> 16, ((high_product & 0xFFFF) << 16) | (low_product & 0xFFFF)


def philox4x32(counter: list[torch.Tensor], key: int) -> list[torch.Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four counter words (int64 tensors of 32-bit values) and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _LOW32, (key >> 32) & _LOW32
    for _ in range(10):
        high0, low0 = _multiply_high_low(c0, 0xD2511F53)
        high1, low1 = _multiply_high_low(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return [c0, c1, c2, c3]


def _uniform(bits: torch.Tensor) -> torch.Tensor:
    """21 random bits to a float64 strictly inside (0, 1)."""
    return (bits.double() + 0.5) / 2.0**21


def pattern_noise(seed: int, layer: int, draw: int, groups: int) -> torch.Tensor:
    """Standard Gumbel noise of a layer's 2:4 logits: (groups, 6) float64, a function of the arguments only."""
    index = torch.arange(groups, dtype=torch.int64)
    words = philox4x32(
        [index & _LOW32, index >> 32, torch.full_like(index, draw & _LOW32), torch.full_like(index, layer)], seed
    )
    x, y, z, w = words
    bits = [word >> 11 for word in words]
    bits += [((x & 0x7FF) << 10) | (y & 0x3FF), ((z & 0x7FF) << 10) | (w & 0x3FF)]
    return -torch.log(-torch.log(_uniform(torch.stack(bits, dim=1))))


def tile_noise(seed: int, layer: int, draw: int, rows: int, cols: int) -> torch.Tensor:
    """Standard logistic noise of a layer's tile logits: (rows, cols) float64, a function of the arguments only."""
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    words = philox4x32(
        [row, col, torch.full_like(row, draw & _LOW32), torch.full_like(row, layer | _TILE_STREAM)], seed
    )
    return torch.logit(_uniform(words[0] >> 11))


def expand_tiles(grid: torch.Tensor, tile: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """Repeat each entry of grid (rows, cols) over its tile and cut the ragged edge: (N, K)."""
    return grid.repeat_interleave(tile[0], 0)[: shape[0]].repeat_interleave(tile[1], 1)[:, : shape[1]]


def pack_keep(keep: torch.Tensor) -> torch.Tensor:
    """Keep mask (N, K) bool as four bits a group: uint8 ((N*K/4 + 1) // 2,), even group in the low nibble.

    Bit j of a nibble says whether element j of the group stays. raises ValueError if K is not a multiple of 4.
    """
    require_tensor("pack_keep, keep", keep, dtypes=(torch.bool,), shape=("N", "K"), advice="Pass a keep mask.")
    require_multiple("pack_keep, columns of keep", keep.shape[1], 4, "Exclude such layers from 2:4 sparsity.")
    bit = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=keep.device)
    nibbles = (keep.reshape(-1, 4).to(torch.uint8) * bit).sum(1, dtype=torch.uint8)
    if nibbles.numel() % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack_keep(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Inverse of pack_keep: bool (N, K)."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=1).reshape(-1)[: shape[0] * shape[1] // 4]
    bit = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=packed.device)
    return (nibbles[:, None] & bit).ne(0).reshape(shape)


def _straight_through(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """Forward value of hard, gradient of soft."""
    return hard + soft - soft.detach()


def masked_weight(
    weight: torch.Tensor,
    pattern_logits: torch.Tensor | None,
    tile_logits: torch.Tensor | None,
    *,
    tile: tuple[int, int] = (TILE, TILE),
    pattern_temperature: float = 1.0,
    pattern_scale: float = 1.0,
    tile_temperature: float = 1.0,
    tile_scale: float = 1.0,
    hard_pattern: bool = False,
    hard_tile: bool = False,
    fixed_pattern: torch.Tensor | None = None,
    noise: tuple[int, int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mathematics of patch_kernels.masked_weight (see there), by autograd, every intermediate at full size."""
    shape = (weight.shape[0], weight.shape[1])
    compute = weight.dtype if weight.dtype == torch.float64 else torch.float32
    if pattern_logits is not None:
        scores = pattern_scale * pattern_logits.to(compute)
        if noise is not None:
            scores = scores + pattern_noise(*noise, scores.shape[0]).to(scores)
        probability = torch.softmax(scores / pattern_temperature, dim=1)
        if hard_pattern:
            one_hot = torch.zeros_like(probability).scatter_(1, probability.argmax(1, keepdim=True), 1.0)
            probability = _straight_through(one_hot, probability)
        mask = (probability @ PATTERNS.to(probability)).reshape(shape)
    else:
        mask = unpack_keep(cast(torch.Tensor, fixed_pattern), shape).to(compute)
    if tile_logits is not None:
        scores = tile_scale * tile_logits.to(compute)
        if noise is not None:
            scores = scores + tile_noise(*noise, scores.shape[0], scores.shape[1]).to(scores)
        dense = torch.sigmoid(scores / tile_temperature)
        if hard_tile:
            dense = _straight_through((scores > 0).to(dense), dense)
        dense = expand_tiles(dense, tile, shape)
        mask = dense + (1 - dense) * mask
    dense_weight = weight.detach().to(compute)
    # 0 * inf is NaN: a non-finite weight under a mask of exactly zero is dropped, not multiplied.
    dropped = (mask == 0) & ~dense_weight.isfinite()
    masked = mask * torch.where(dropped, 0.0, dense_weight)
    sums = torch.stack([mask.double().sum(), masked.double().square().sum()])
    return masked.to(weight.dtype), sums


def tile_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x @ weight.T + bias with float64 accumulation, rounded once to x's dtype. weight is dense (N, K)."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    return y.to(x.dtype)


def tile_experts(
    x: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Row p of y is x[p // fan] times expert experts[p], fan = P / T; weight is dense (E, rows, K), bias (E, rows)."""
    y = x.new_empty((experts.shape[0], weight.shape[1]))
    for p, expert in enumerate(experts.tolist()):
        row = x[p * x.shape[0] // experts.shape[0]]
        y[p] = tile_linear(row, weight[expert], None if bias is None else bias[expert])
    return y


_ROUNDING_STREAM = 1 << 31  # set in the second counter word for stochastic rounding


def rounding_bits(seed: int, stream: int, step: int, what: int, elems: int) -> torch.Tensor:
    """16 random bits (elems,) int64 to round with; what: 0 parameter, 1 first moment, 2 second moment.

    The second moment of an element takes the bits of its neighbour's first: both moments share a Philox call.
    """
    if what == 2:
        pairs = rounding_bits(seed, stream, step, 1, elems + elems % 2).reshape(-1, 2)
        return pairs.flip(1).flatten()[:elems]
    draw = torch.arange(-(-elems // 8), dtype=torch.int64)
    words = philox4x32(
        [
            draw & _LOW32,
            draw >> 32 | _ROUNDING_STREAM,
            torch.full_like(draw, step),
            torch.full_like(draw, stream << 2 | what),
        ],
        seed,
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=1).flatten()[:elems]


def round_to_bfloat16(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """fp32 to bf16: up with the probability that makes the mean exact. Finite stays finite."""
    bits = x.view(torch.int32).long() & _LOW32
    magnitude = bits & 0x7FFFFFFF
    rounded = (magnitude + random) >> 16
    rounded = torch.where(magnitude < 0x7F800000, rounded.clamp(max=0x7F7F), rounded)
    rounded = torch.where(magnitude > 0x7F800000, 0x7FC0, rounded) | (bits >> 16 & 0x8000)
    return rounded.to(torch.int32).to(torch.int16).view(torch.bfloat16)


def decode_moment(codes: torch.Tensor, scale: torch.Tensor, signed: bool) -> torch.Tensor:
    """uint8 codes (n,) and their blocks' scales to fp32: exponent and three mantissa bits of an fp32 number."""
    scales = scale.repeat_interleave(256)[: codes.numel()]
    magnitude = codes.long() & (0x7F if signed else 0xFF)
    value = (magnitude << 20).to(torch.int32).view(torch.float32) * 2.0 ** (113 if signed else 97) * scales
    return torch.where(codes >= 0x80, -value, value) if signed else value


def encode_moment(x: torch.Tensor, random: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 (n,) to uint8 codes and scales, the power of two at or below each block's largest magnitude."""
    blocks = torch.nn.functional.pad(x.abs(), (0, -x.numel() % 256)).reshape(-1, 256)
    scale = torch.exp2(torch.frexp(blocks.amax(1))[1].double() - 1).clamp(min=2.0**-126).float()
    scale[~blocks.isfinite().all(1)] = torch.nan
    inverse = (1 / scale).repeat_interleave(256)[: x.numel()]
    bits = (x.abs() * inverse * 2.0 ** (-113 if signed else -97)).view(torch.int32).long()
    codes = (bits + (random << 4)) >> 20
    codes = codes | (x.signbit().long() << 7) if signed else torch.where((codes == 0) & (x > 0), 1, codes)
    return (codes & 0xFF).to(torch.uint8), scale


@torch.no_grad()
def adamw_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    exp_avg_scale: torch.Tensor | None = None,
    exp_avg_sq_scale: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    seed: int = 0,
    stream: int = 0,
) -> None:
    """patch_kernels.adamw_step on CPU tensors."""

    def fp32(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float32)

    def store(tensor: torch.Tensor, value: torch.Tensor, what: int, scale: torch.Tensor | None = None) -> None:
        if tensor.dtype != torch.float32:
            random = rounding_bits(seed, stream, step, what, tensor.numel())
            if tensor.dtype == torch.bfloat16:
                value = round_to_bfloat16(value, random)
            else:
                value, scales = encode_moment(value, random, signed=what == 1)
                cast(torch.Tensor, scale).copy_(scales)
        tensor.copy_(value.reshape(tensor.shape))

    def load(tensor: torch.Tensor, scale: torch.Tensor | None = None, signed: bool = False) -> torch.Tensor:
        flat = tensor.reshape(-1)
        if tensor.dtype != torch.uint8:
            return flat.float()
        return decode_moment(flat, cast(torch.Tensor, scale), signed)

    p, g = load(param), load(grad)
    m, v = load(exp_avg, exp_avg_scale, signed=True), load(exp_avg_sq, exp_avg_sq_scale)
    g = g if grad_scale is None else g * grad_scale.reshape(())
    m = m + (g - m) * fp32(1 - betas[0])
    v = v * fp32(betas[1]) + g * g * fp32(1 - betas[1])
    # In fp64: torch's fp32 square root is not correctly rounded everywhere.
    root = v.clamp(min=2.0**-100).double().sqrt().float()
    denominator = root * fp32(1 / (1 - betas[1] ** step) ** 0.5) + fp32(eps)
    p = p * fp32(1 - lr * weight_decay) - fp32(lr / (1 - betas[0] ** step)) * m / denominator
    store(param, p, 0)
    store(exp_avg, m, 1, exp_avg_scale)
    store(exp_avg_sq, v, 2, exp_avg_sq_scale)
