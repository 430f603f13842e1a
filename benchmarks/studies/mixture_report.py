"""Tables and JSON of the study of a mixture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies.quality_report import PERPLEXITIES
from patch.evaluate import tables
from patch.files.atomic import write_text_atomic
from patch.files.strict_json import dump_json

Rows = Sequence[Mapping[str, Any]]

METHODS = """
One seed. perplexity: the model as the method leaves it. masks alone: the dense weights under its masks. The next
columns update the kept weights of the dense model under these masks, layer by layer (least squares) or a decoder block
at a time (blocks). zeros: of the weights of attention and experts, those that a row leaves dense included; routers are
never pruned. linear bytes: packed in bf16, of dense bf16; unstructured zeros have no packed format.
"""
BUDGETS = """
The same hybrid with the zeros of `budget`, tiles chosen by Fisher information, method SparseGPT. The tile is
{tile}x{tile}, so that a layer has as many to choose from as a layer of a large model has of 128x128; no kernel packs
such tiles. experts' zeros: least and most of an expert. correlation: of an expert's share of its mixture's tokens with
its share of zeros, over all experts ({count}).
"""
EXPERTS = """
Share of the mixture's calibration tokens that an expert gets, and its zeros by budget. {idle} of {count} experts get
less than 1 %, and zeros there cost next to nothing: transformers' loss balances experts over all blocks together, so
that a block may leave some of its own idle. A mixture whose experts are all in use has less to gain.
"""
FEW = """
Perplexity of 2:4, mean over draws of the calibration text ({draws}). A column is `ExpertOptions(tokens=N)`: experts
with fewer tokens follow the rule, and with 1 only those without a token. magnitude: pruned by magnitude, their weights
kept as they are; route: called with more tokens, those that the router scores highest for them. least squares: the kept
weights of magnitude's masks. Attention has all tokens in every column. Best of a row in bold. experts below: how many
have fewer tokens than N, by draw.
"""


def write(out: Path, results: Mapping[str, Rows], about: Mapping[str, str], tile: int) -> None:
    """mixture.md and mixture.json in a folder.

    results  rows of "methods", "budgets", "experts", "few", "few_counts", as `benchmarks.studies.mixture` makes them
    about    what was run: command, model, texts, machine
    tile     rows and columns of the budgets' tiles
    """
    (out / "mixture.json").write_bytes(dump_json({"about": dict(about), **results}))
    lines = [f"* {name}: {f'`{value}`' if name == 'command' else value}" for name, value in about.items()]
    parts = ["# Quality of a pruned mixture", "", *lines, ""]
    if rows := results["methods"]:
        parts += ["## Methods", METHODS, _table([_shown(row, "method") | _bytes(row) for row in rows]), ""]
    if rows := results["budgets"]:
        experts = results["experts"]
        found = [_shown(row, "budget") | _of_experts(row["label"], experts) for row in rows]
        parts += ["## Budgets", BUDGETS.format(tile=tile, count=len(experts)), _table(found)]
        idle = sum(row["share"] < 0.01 for row in experts)
        parts += [EXPERTS.format(idle=idle, count=len(experts)), _table([_expert(row) for row in experts]), ""]
    if rows := results["few"]:
        draws = len({row["seed"] for row in rows})
        parts += [
            "## Experts with few tokens",
            FEW.format(draws=draws),
            _table(few_rows(rows, results["few_counts"])),
            "",
        ]
    write_text_atomic(out / "mixture.md", "\n".join(parts))


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's; None where one of them does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(x, y)


def few_rows(rows: Rows, counts: Rows) -> list[dict[str, str]]:
    """A line for every method, length of the text and rule, a column for every fewest number of tokens.

    counts   how many experts are below it, a line for every length of the text
    """
    columns = sorted({row["least"] for row in rows})
    lines: dict[tuple[str, int, str], dict[int, list[float]]] = {}
    for row in rows:
        line = lines.setdefault((row["method"], row["samples"], row["few"]), {})
        line.setdefault(row["least"], []).append(row["perplexity"])
    shown = []
    for samples in dict.fromkeys(row["samples"] for row in counts):
        below = {row["least"]: row["experts"] for row in counts if row["samples"] == samples}
        cells = {str(least): "/".join(map(str, below[least])) for least in columns}
        shown.append({"method": "experts below", "samples": str(samples), "rule": "-"} | cells)
    for (method, samples, rule), values in lines.items():
        means = {least: statistics.fmean(found) for least, found in values.items()}
        best = min(means.values()) if len(means) > 1 else None
        cells = {
            str(least): "-" if least not in means else _bold(f"{means[least]:.2f}", means[least] == best)
            for least in columns
        }
        shown.append({"method": method.replace("_", " "), "samples": str(samples), "rule": rule} | cells)
    return shown


def _bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text


def _shown(row: Mapping[str, Any], first: str) -> dict[str, str]:
    shown = {first: row["label"].removeprefix(f"{first} "), "zeros": f"{row['sparsity']:.1%}"}
    for name in ("perplexity", "masks_alone", "compensated_least_squares", "compensated_blocks"):
        shown[PERPLEXITIES[name]] = f"{row[name]:.2f}" if name in row else "-"
    return shown


def _bytes(row: Mapping[str, Any]) -> dict[str, str]:
    return {"linear bytes": f"{row['linear_bytes'] / row['dense_linear_bytes']:.2f}x"}


def _of_experts(label: str, experts: Rows) -> dict[str, str]:
    zeros, shares = [row[label] for row in experts], [row["share"] for row in experts]
    found = correlation(shares, zeros)
    return {
        "experts' zeros": f"{min(zeros):.1%} to {max(zeros):.1%}",
        "correlation": "-" if found is None else f"{found:+.2f}",
    }


def _expert(row: Mapping[str, Any]) -> dict[str, str]:
    budgets = {name: f"{value:.1%}" for name, value in row.items() if name.startswith("budget ")}
    return {"mixture": row["mixture"], "expert": str(row["expert"]), "tokens": f"{row['share']:.1%}"} | budgets


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    return tables.format_table(rows, markdown=True)
