"""The table of the demo, its plots, and the sentences beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from patch.evaluate import plots, tables
from patch.evaluate.results import broken_perplexity

NOTES = """
Perplexity: {tokens} held-out tokens of files that neither training nor pruning saw, windows of {window}, fp32; as the
method leaves the model. SparseGPT and the hybrid, which is made by it, also change the weights they keep.
Reconstructed: the dense weights under the same mask, the kept ones then trained block by block, {passes} over
{samples} calibration windows (`patch-llm compensate`): the same for every row, so compare masks by this column.
Linear bytes: the linear layers in bf16, dense or packed.
Tokens: the text a mask is made from, all from the same part. One-shot masks need little by design; mask learning sees
more (and takes longer), so this is no comparison at equal cost."""
RESULTS, PERPLEXITY_PLOT, TILES_PLOT = FILES = ("results.csv", "perplexity.png", "tiles.png")


def table_row(
    label: str, result: Mapping[str, Any], target: float, tokens: int, reconstructed: float | None
) -> dict[str, Any]:
    """A row of results.csv.

    result         perplexity, sparsity, packed_bytes and dense_bytes
    target         share of zeros that was asked for, 0 for the dense model
    tokens         of text that the mask is made from
    reconstructed  perplexity; None for the dense model
    """
    return {
        "method": label,
        "target_sparsity": target,
        "sparsity": round(result["sparsity"], 6),
        "perplexity": round(result["perplexity"], 4),
        "reconstructed": "" if reconstructed is None else round(reconstructed, 4),
        "linear_bytes": result["packed_bytes"] if target else result["dense_bytes"],
        "dense_linear_bytes": result["dense_bytes"],
        "tokens_seen": tokens,
    }


def row_lines(row: Mapping[str, Any], vocabulary: int) -> list[str]:
    """What to say of a row as soon as it is there; vocabulary: tokens that the model knows."""
    perplexity, reconstructed = row["perplexity"], row["reconstructed"]
    lines = [f"{row['method']}: perplexity {perplexity:.2f}, sparsity {row['sparsity']:.1%}"]
    if reconstructed != "":
        worse = ", WORSE than without" if reconstructed > perplexity else ""
        lines.append(f"reconstructed: {reconstructed:.2f}{worse}")
    highest = max(perplexity, reconstructed or 0.0)
    if broken := broken_perplexity(highest, vocabulary):
        lines.append(f"WARNING: {row['method']}: perplexity {highest:,.0f} is {broken}")
    return lines


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of results.csv for people."""
    return tables.format_table([_shown(row) for row in rows])


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "method": row["method"],
        "perplexity": f"{row['perplexity']:.2f}",
        "reconstructed": "-" if row["reconstructed"] == "" else f"{row['reconstructed']:.2f}",
        "sparsity": f"{row['sparsity']:.1%}",
        "linear bytes": f"{row['linear_bytes']:,}",
        "of dense": of_dense(row["linear_bytes"], row["dense_linear_bytes"]),
        "tokens": f"{row['tokens_seen']:,}",
    }


def of_dense(held: int, dense: int) -> str:
    """Bytes as a multiple of the dense ones."""
    return f"{held / dense:.2f}x"


def write_results(
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    tile_is_sparse: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """results.csv and both plots.

    rows            of the table, the dense model first
    curves          rows that belong together, by the name of the curve
    tile_is_sparse  {layer: (rows, cols) bool} by method
    """
    tables.write_csv(out / RESULTS, rows)
    plots.plot_perplexity(
        out / PERPLEXITY_PLOT,
        {name: [(row["sparsity"], row["reconstructed"]) for row in points] for name, points in curves.items()},
        dense=rows[0]["perplexity"],
        title="Held-out perplexity against sparsity, all reconstructed",
    )
    sparsity = {row["method"]: row["sparsity"] for row in rows}
    maps = {f"{method}: {sparsity[method]:.1%} zeros": grids for method, grids in tile_is_sparse.items()}
    plots.plot_tile_maps(out / TILES_PLOT, maps)
