"""What a share of zeros costs in decode time, from the measured times of the kernels at a published model's sizes.

The models of the quality study are so small that a token through them is all overhead. So time is that of one token
through the MLP of a block of Llama-3.2-1B (five sixths of its linear weights), read from what
benchmarks.ops.bench_tile_linear_cpu measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks.shapes import CONFIGS

MEASURED = Path(__file__).resolve().parents[1] / "results" / "tile_linear_cpu.csv"
MODEL = "Llama-3.2-1B"
TILES, TORCH = "tiles", "F.linear"


@dataclass(frozen=True)
class DecodeTimes:
    """Milliseconds of one token through the layers.

    of_zeros   {share of zeros: ms} with packed tiles, ascending
    dense_ms   dense in bf16, by whatever is fastest
    torch_ms   dense in bf16 by F.linear
    where      device and threads
    """

    of_zeros: Mapping[float, float]
    dense_ms: float
    torch_ms: float
    where: str

    def packed_ms(self, zeros: float) -> float:
        """With packed tiles at a share of zeros; between two measured shares on the line between them."""
        return float(np.interp(zeros, list(self.of_zeros), list(self.of_zeros.values())))


def read(path: Path) -> DecodeTimes:
    """Times from the CSV of bench_tile_linear_cpu; ends the program where the layers are not in it."""
    rows = harness.read_rows(path, "--decode-csv")
    hidden, intermediate = CONFIGS[MODEL][:2]
    layers = {f"{intermediate}x{hidden}": 2, f"{hidden}x{intermediate}": 1}  # gate and up, down
    total: dict[str, float] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row.get("shape"): row for row in rows if row["method"] == method and row.get("tokens") == "1"}
        if layers.keys() <= found.keys() and method != "read":
            total[method] = sum(count * float(found[shape]["median_ms"]) for shape, count in layers.items())
    tiles = {
        float(row["sparsity"]): total[row["method"]]
        for row in rows
        if row["method"].startswith(TILES) and row["method"] in total
    }
    if not tiles or TORCH not in total:
        wanted = f"expected times of one token for {' and '.join(layers)}, tiles and {TORCH}"
        raise SystemExit(f"--decode-csv: {wanted}, got none in {path}. Run benchmarks.ops.bench_tile_linear_cpu.")
    dense = min(ms for method, ms in total.items() if not method.startswith(TILES) or method == f"{TILES} 0%")
    where = f"{rows[0]['device']}, {rows[0]['threads']} threads"
    return DecodeTimes(dict(sorted(tiles.items())), dense, total[TORCH], where)
