"""The quality study: what every method does to a model's perplexity, in one table, CSV and two plots.

    python -m benchmarks.studies.quality --out build/quality                                  the demo's model and text
    python -m benchmarks.studies.quality --architecture qwen2 --out build/qwen2        a ragged Qwen2 on the same text
    python -m benchmarks.studies.quality --model DIR_OR_HUB_ID --train TEXT --heldout TEXT --out DIR

Dense; five 2:4 methods; hybrids of 2:4 and dense tiles in one shot, by Fisher information over the whole model;
unstructured pruning at the same shares of zeros; MaskLLM; PATCH joint, from SparseGPT's masks and from Fisher's, and
PATCH tile. Each with its own weights, with the dense weights under its mask, and with the kept weights compensated
layer by layer and by blocks. --ablations adds other choices of dense tiles, tile sizes, a target per decoder block, and
other priors. TEXT is a .txt, .jsonl or .parquet file or a named set.

One result is a cell: a method and a seed, in a folder of its own, and beside it what a compensation makes of its masks.
What was made with the same settings is not made again, so an interrupted study goes on where it stopped, one with more
flags adds to what is there, and processes with different --seeds or --cells may share --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.studies import decode_times, quality_report
from benchmarks.studies.quality_cells import ABLATIONS, all_cells, chosen_cells
from benchmarks.studies.quality_inputs import about, listed, open_study, study_inputs, study_parser, study_settings
from benchmarks.studies.quality_study import Settings
from patch.demo.model import Stopwatch
from patch.pruning import COMPENSATIONS, ProxSparseConfig

TEXTS = ("cell", "method", "group")  # columns of quality_cells.csv that hold no number


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the study and write what quality_report.write does; returns the cells' rows."""
    arguments = _parser().parse_args(argv)
    times = decode_times.read(arguments.decode_csv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = Stopwatch()

    def say(text: str) -> None:
        print(f"[{clock.seconds:7.1f} s] {text}", flush=True)

    try:
        inputs = study_inputs(arguments, say)
        settings = study_settings(
            arguments,
            inputs[0],
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            lr=arguments.lr,
            prox=ProxSparseConfig(lam=arguments.prox_lambda, lr=arguments.prox_lr, steps=arguments.prox_steps),
            prox_samples=arguments.prox_steps,
            targets=arguments.targets,
        )
        cells = all_cells(settings, arguments.ablations)
        chosen = chosen_cells(cells, arguments.cells)
        study = open_study(arguments, inputs, settings, compensations=arguments.compensations, say=say)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"quality: {error}") from None
    rows = []
    for seed in arguments.seeds:
        for cell in chosen:
            result = study.row(cell, seed, cells, finished_only=arguments.finished_only)
            if result is not None:
                shown = {"cell": cell.name, "method": cell.label, "group": cell.group, "target": cell.target}
                rows.append(shown | {"seed": seed} | result)
    earlier = [] if arguments.earlier is None else earlier_rows(arguments.earlier, rows)
    rows += earlier
    out: Path = arguments.out
    if not rows:
        raise SystemExit(f"quality: expected finished cells in {out}, found none. Run it without --finished-only.")
    learning = f"{settings.steps} steps of {settings.batch_size} x {settings.window}, lr {settings.lr:g}"
    head = about("benchmarks.studies.quality", argv, inputs, study) | {"mask learning": learning}
    if earlier:
        head["from an earlier run"] = f"{arguments.earlier}: {', '.join(dict.fromkeys(r['cell'] for r in earlier))}"
    quality_report.write(out, rows, head, times)
    say(f"wrote {out / 'quality.md'}, quality.csv, quality_cells.csv, quality.png and quality_frontier.png")
    return rows


def earlier_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of an earlier quality_cells.csv for cells and seeds that `rows` do not hold.

    Ends the program with one sentence unless both have a dense model of the same perplexity: other models, texts and
    windows do not belong in one table.
    """
    found = [
        {name: _number(value) if name not in TEXTS else value for name, value in row.items() if value != ""}
        for row in harness.read_rows(path, "--earlier")
    ]
    here, there = ({round(r["perplexity"], 3) for r in part if r["cell"] == "dense"} for part in (rows, found))
    if len(here) != 1 or here != there:
        wanted = f"expected a dense model of the perplexity {sorted(here)} that was measured here"
        raise SystemExit(f"--earlier: {wanted}, got {sorted(there)} in {path}. Give one of this model and text.")
    known = {(row["cell"], row["seed"]) for row in rows}
    return [row for row in found if (row["cell"], row["seed"]) not in known]


def _number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = study_parser(__doc__ or "")
    parser.add_argument("--steps", type=int, default=500, help="steps of mask learning (default 500)")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks a step (default 8)")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate of the masks (default 5e-4)")
    parser.add_argument("--prox-lambda", type=float, default=0.1, help="ProxSparse: regulariser (default 0.1)")
    parser.add_argument("--prox-lr", type=float, default=1e-4, help="ProxSparse: learning rate (default 1e-4)")
    parser.add_argument("--prox-steps", type=int, default=400, help="ProxSparse: steps and samples (default 400)")
    parser.add_argument("--targets", type=listed(float), default=Settings.targets, help="shares of zeros")
    parser.add_argument("--seeds", type=listed(int), default=(0, 1, 2), help="default 0,1,2")
    parser.add_argument("--cells", type=listed(str), default=("*",), help="names or patterns (default all)")
    parser.add_argument("--finished-only", action="store_true", help="run nothing: write what is there so far")
    parser.add_argument(
        "--earlier", type=Path, help="quality_cells.csv of an earlier run: its rows for what is not here"
    )
    parser.add_argument("--ablations", type=listed(_ablation_name), default=(), help=", ".join(ABLATIONS))
    parser.add_argument(
        "--compensations",
        type=listed(_compensation),
        default=("least_squares", "blocks"),
        help=f"{', '.join(COMPENSATIONS)} (default least_squares,blocks)",
    )
    parser.add_argument(
        "--decode-csv", type=Path, default=decode_times.MEASURED, help="decode times (default benchmarks/results)"
    )
    return parser


def _ablation_name(text: str) -> str:
    return _one_of(ABLATIONS, text)


def _compensation(text: str) -> str:
    return _one_of(COMPENSATIONS, text)


def _one_of(known: Sequence[str], text: str) -> str:
    if text not in known:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {text!r}")
    return text


if __name__ == "__main__":
    main()
