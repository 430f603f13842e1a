"""Layer shapes, cell order and the byte and operation counts of the benchmarks. Plain arithmetic, no device."""

from __future__ import annotations

from dataclasses import dataclass

from patch_kernels.ops.tile_linear import DENSE_TILE_BYTES, SPARSE_TILE_BYTES, tile_grid

# (N, K) of the four projections of a decoder layer, QKV and gate+up fused.
MODELS = {
    "llama-2-7b": {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)},
    "llama-3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "llama-3-70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
}
# Sizes of published models by the names of transformers' configurations.
CONFIG_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
CONFIGS = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256),
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256),
    "Llama-2-13B": (5120, 13824, 40, 40, 40, 32000),
}


def config_sizes(sizes: tuple[int, ...]) -> dict[str, int]:
    """Keyword arguments of a transformers configuration."""
    return dict(zip(CONFIG_FIELDS, sizes, strict=True))


TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
SPARSITIES = (0.0, 0.25, 0.35, 0.45, 0.5)

# What a short run should cover first: decode, prefill, then what lies between.
TOKENS_BY_INTEREST = (16, 4096, 1, 64, 1024, 256, 8192, 8, 32, 128, 512)

# Rated memory bandwidth in TB/s by what nvidia-smi calls the card, first match; dense bf16 TFLOP/s of all of them.
BANDWIDTH_TBPS = (("H200", 4.8), ("H100 NVL", 3.9), ("H100 PCIe", 2.0), ("H100", 3.35), ("GH200", 4.0))
DENSE_TFLOPS = 989.0


@dataclass(frozen=True)
class Cell:
    """One layer at one number of tokens; every rival runs it side by side."""

    model: str
    layer: str
    rows: int
    cols: int
    tokens: int


def cells(models: list[str], tokens: list[int]) -> list[Cell]:
    """All cells, most informative first. The layers of a model stay together, so that sums are complete early."""

    def rank(model: str, count: int) -> tuple[int, int]:
        known = count in TOKENS_BY_INTEREST
        interest = TOKENS_BY_INTEREST.index(count) if known else len(TOKENS_BY_INTEREST)
        return interest + 3 * models.index(model), models.index(model)

    pairs = sorted(((m, t) for m in models for t in tokens), key=lambda pair: rank(*pair))
    return [Cell(m, layer, *shape, t) for m, t in pairs for layer, shape in MODELS[m].items()]


def sparse_tiles(rows: int, cols: int, sparsity: float) -> int:
    """Number of 2:4 tiles of a layer with this share of zeros."""
    grid = tile_grid((rows, cols))
    return round(2 * sparsity * grid[0] * grid[1])


def weight_bytes(rows: int, cols: int, sparsity: float) -> int:
    """Bytes of the packed weight; all-dense tiles count as a plain bf16 weight does, padded to tiles."""
    grid = tile_grid((rows, cols))
    sparse = sparse_tiles(rows, cols, sparsity)
    return sparse * SPARSE_TILE_BYTES + (grid[0] * grid[1] - sparse) * DENSE_TILE_BYTES


def call_bytes(cell: Cell, sparsity: float) -> int:
    """Least bytes through device memory: weight, x and y once."""
    return weight_bytes(cell.rows, cell.cols, sparsity) + 2 * cell.tokens * (cell.rows + cell.cols)


def effective_flops(cell: Cell) -> float:
    """Operations with zeros counted."""
    return 2.0 * cell.tokens * cell.rows * cell.cols


def executed_flops(cell: Cell, sparsity: float) -> float:
    """Operations that are executed: a 2:4 tile does half."""
    grid = tile_grid((cell.rows, cell.cols))
    return effective_flops(cell) * (1 - sparse_tiles(cell.rows, cell.cols, sparsity) / (2 * grid[0] * grid[1]))


def bandwidth_tbps(card: str) -> float:
    """Rated TB/s of the card, by its name."""
    for part, value in BANDWIDTH_TBPS:
        if part in card and not (part == "H200" and "GH200" in card):
            return value
    raise ValueError(
        f"bandwidth_tbps: expected one of {', '.join(part for part, _ in BANDWIDTH_TBPS)} in the card's name, got "
        f"{card!r}. Pass --bandwidth TB/s."
    )


def roofline_seconds(cell: Cell, sparsity: float, tbps: float, tflops: float = DENSE_TFLOPS) -> float:
    """Least time: the larger of bytes over bandwidth and executed operations over the dense rate."""
    return max(call_bytes(cell, sparsity) / (1e12 * tbps), executed_flops(cell, sparsity) / (1e12 * tflops))


def mask_logit_bytes(groups: int, mode: str, logit_bytes: int) -> float:
    """Bytes that say what the 2:4 masks are: six logits a group of four weights, or four bits where they are fixed."""
    return 0.5 * groups if mode == "tile" else 6 * logit_bytes * groups


def mask_forward_bytes(rows: int, cols: int, mode: str, weight_bytes: int = 2, logit_bytes: int = 4) -> float:
    """Least bytes of masked_weight's forward pass: weight and logits read, masked weight written.

    Tile logits are left out here and below: one for 16384 weights.
    """
    groups = rows * cols // 4
    return 2 * 4 * weight_bytes * groups + mask_logit_bytes(groups, mode, logit_bytes)


def mask_backward_bytes(
    rows: int, cols: int, mode: str, weight_bytes: int = 2, logit_bytes: int = 4, writes_masked: bool = False
) -> float:
    """Least bytes of its backward pass: weight, gradient and logits read, gradients of the logits written.

    writes_masked  the masked weight is made again in the same pass.
    """
    groups = rows * cols // 4
    gradients = 0 if mode == "tile" else 6 * logit_bytes * groups
    return (
        (3 if writes_masked else 2) * 4 * weight_bytes * groups
        + mask_logit_bytes(groups, mode, logit_bytes)
        + gradients
    )
