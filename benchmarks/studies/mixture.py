"""The quality study of a mixture of experts: attention and experts pruned, where zeros go, and how much text it takes.

    python -m benchmarks.studies.mixture_model --text TRAIN --out MODEL                          trains a small mixture
    python -m benchmarks.studies.mixture --model MODEL --train TRAIN --heldout TEXT --window 128 --out DIR
    python -m benchmarks.studies.mixture --out DIR                           a smaller one, trained on the demo's text

Three tables. Methods: those of benchmarks.studies.quality, and attention alone pruned, which is what a tool does that
does not see experts. Budgets: one share of zeros for the whole model, for every block or for every layer, and how many
zeros each expert gets beside its share of the tokens. Few tokens: methods that have so little text that experts get few
tokens, with other rules for these (`patch.pruning.ExpertOptions`); the draws of the text are averaged.

Cells and folders are as in benchmarks.studies.quality: what was made with the same settings is not made again, and
processes with different --cells may share --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies import mixture_report
from benchmarks.studies.quality_cells import all_cells, chosen_cells, tiles_cell
from benchmarks.studies.quality_inputs import about, listed, open_study, study_inputs, study_parser, study_settings
from benchmarks.studies.quality_study import Cell, Made, Settings, Study
from patch.artifacts.artifact import load_artifact
from patch.demo.model import Stopwatch
from patch.models.structure import maskable_linears
from patch.pruning import compensate, get_method, prune_model
from patch.pruning.experts import expert_layers
from patch.pruning.options import Budget, ExpertOptions, FewExperts

METHOD = "sparsegpt"
TWO_OF_FOUR = ("sparsegpt", "wanda", "magnitude")
LEARNED = "joint-{:g}-fisher-distill"
BUDGETS: tuple[Budget, ...] = ("model", "block", "layer")
BUDGET_TILE = 32  # at which a layer of a small expert has enough tiles to choose from
FEW_TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024)
FEW_SAMPLES = (4, 16)
RULES: tuple[FewExperts, ...] = ("magnitude", "route")
FEW_METHODS = ("wanda", "sparsegpt", "least_squares")


def study_cells(settings: Settings, samples: Sequence[int], tokens: Sequence[int]) -> dict[str, dict[str, Cell]]:
    """Cells of the three tables by name: "methods", "budgets" and "few"; those of "needed" only come before others.

    samples, tokens  calibration samples, and the fewest tokens of an expert, of the last table
    """
    known = all_cells(settings, ("learning",))
    target = settings.targets[0]
    names = ["dense", *TWO_OF_FOUR, *(f"{METHOD}-tiles-{100 * t:g}" for t in settings.targets)]
    names += [f"{METHOD}-{100 * target:g}", LEARNED.format(100 * target)]
    methods = [known[name] for name in names]
    methods.insert(len(TWO_OF_FOUR) + 1, _attention())
    fine = dataclasses.replace(settings, tile=(BUDGET_TILE, BUDGET_TILE))
    budgets = [_budget(fine, target, budget) for budget in BUDGETS]
    few = [
        _few(method, n, ExpertOptions(least, rule))
        for n in samples
        for method in FEW_METHODS
        for rule in RULES
        for least in tokens
    ]
    parts = {"methods": methods, "budgets": budgets, "few": few, "needed": list(known.values())}
    return {part: {cell.name: cell for cell in cells} for part, cells in parts.items()}


def _budget(settings: Settings, target: float, budget: Budget) -> Cell:
    cell = tiles_cell(settings, METHOD, target, budget=budget)
    return dataclasses.replace(cell, name=f"{cell.name}-tile{BUDGET_TILE}", label=f"budget {budget}")


def _attention() -> Cell:
    """2:4 in the attention's layers, experts dense."""

    def make(study: Study, seed: int, needed: dict[str, dict[str, Tensor]]) -> Made:
        model = study.dense()
        linears = maskable_linears(model)
        experts = expert_layers(model, linears)
        masks = prune_model(
            model,
            METHOD,
            calibration=study.calibration(seed),
            exclude=[f"{path}.*" for path in {member.path for member in experts.values()}],
            device=study.device,
            progress=False,
        )
        # The others are kept whole: the share of zeros is that of all layers, as in the other rows.
        masks |= {name: torch.ones_like(linears[name].weight, dtype=torch.bool) for name in experts}
        return Made(model, masks, study.settings.nsamples * study.settings.window, True)

    label = f"{get_method(METHOD).label} 2:4, attention only"
    return Cell(f"{METHOD}-attention", label, "attention", 0.5, make)


def _few(method: str, nsamples: int, options: ExpertOptions) -> Cell:
    """2:4 by a method, or the kept weights of magnitude's 2:4 masks by least squares, from so many samples."""
    is_compensation = method == "least_squares"

    def make(study: Study, seed: int, needed: dict[str, dict[str, Tensor]]) -> Made:
        model, samples = study.dense(), study.calibration(seed, nsamples)
        shared: dict[str, Any] = {"calibration": samples, "experts": options, "progress": False}
        if is_compensation:
            masks = needed["magnitude"]
            compensate(model, masks, method=method, device=study.device, **shared)
        else:
            masks = prune_model(model, method, device=study.device, **shared)
        updates = is_compensation or get_method(method).updates_weights
        return Made(model, masks, samples.numel(), updates)

    name = f"few-{method}-{nsamples}-{options.few}-{options.tokens}"
    own = {"method": method, "samples": nsamples, "few": options.few, "least": options.tokens}
    return Cell(name, method, "few", 0.5, make, own, ("magnitude",) if is_compensation else ())


@torch.no_grad()
def expert_tokens(model: nn.Module, windows: Tensor) -> dict[tuple[str, int], int]:
    """{(mixture, expert): tokens of the windows (windows, tokens) that reach it in this model}."""
    linears = maskable_linears(model)
    members = expert_layers(model, linears)
    counts = {(member.path, member.index): 0 for member in members.values()}
    first = {(member.path, member.index): name for name, member in reversed(members.items())}

    def count(key: tuple[str, int], layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        counts[key] += args[0].numel() // args[0].shape[-1]

    hooks = [linears[name].register_forward_pre_hook(functools.partial(count, key)) for key, name in first.items()]
    for window in windows:
        model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return counts


def expert_rows(study: Study, seed: int, cells: dict[str, Cell]) -> list[dict[str, Any]]:
    """Of every expert its share of its mixture's calibration tokens, and of zeros in each of the cells."""
    model = study.dense()
    counts = expert_tokens(model, study.calibration(seed))
    members = expert_layers(model, maskable_linears(model))
    rows = []
    masks = {name: load_artifact(study.folder(cell, seed)).masks for name, cell in cells.items()}
    for (path, index), tokens in counts.items():
        own = [name for name, member in members.items() if (member.path, member.index) == (path, index)]
        row: dict[str, Any] = {"mixture": path, "expert": index, "tokens": tokens}
        row["share"] = tokens / max(1, sum(n for (other, _), n in counts.items() if other == path))
        for name, cell in cells.items():
            kept = sum(int(masks[name][layer].sum()) for layer in own)
            row[cell.label] = 1 - kept / sum(masks[name][layer].numel() for layer in own)
        rows.append(row)
    return rows


def few_counts(study: Study, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many experts get fewer tokens of the text of these rows (of "few") than each of their numbers; all draws."""
    model = study.dense()
    counts = []
    for samples in sorted({row["samples"] for row in rows}):
        draws = sorted({row["seed"] for row in rows})
        tokens = [expert_tokens(model, study.calibration(seed, samples)).values() for seed in draws]
        for least in sorted({row["least"] for row in rows}):
            below = [sum(n < least for n in draw) for draw in tokens]
            counts.append({"samples": samples, "least": least, "experts": below})
    return counts


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the study and write mixture.md and mixture.json; returns what the latter holds."""
    arguments = _parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = Stopwatch()

    def say(text: str) -> None:
        print(f"[{clock.seconds:7.1f} s] {text}", flush=True)

    try:
        if arguments.model is None and arguments.architecture is None:
            arguments.architecture = "mixtral"
        inputs = study_inputs(arguments, say)
        settings = study_settings(
            arguments,
            inputs[0],
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            targets=arguments.targets,
        )
        study = open_study(arguments, inputs, settings, say=say)
        parts = study_cells(settings, arguments.few_samples, arguments.few_tokens)
        cells = {name: cell for own in parts.values() for name, cell in own.items()}
        wanted = {name: cell for part in ("methods", "budgets", "few") for name, cell in parts[part].items()}
        chosen = {cell.name for cell in chosen_cells(wanted, arguments.cells)}
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"mixture: {error}") from None
    results: dict[str, list[dict[str, Any]]] = {"methods": [], "budgets": [], "few": []}
    for part, rows in results.items():
        is_few = part == "few"
        for cell in (cell for name, cell in parts[part].items() if name in chosen):
            for seed in arguments.draws if is_few else arguments.draws[:1]:
                make = study.result if is_few else study.row
                result = make(cell, seed, cells, finished_only=arguments.finished_only)
                if result is not None:
                    facts = cell.own if is_few else {}
                    rows.append({"cell": cell.name, "label": cell.label, "seed": seed} | facts | result)
    if not any(results.values()):
        raise SystemExit(f"mixture: expected finished cells in {study.out}, found none. Leave out --finished-only.")
    made = {name: parts["budgets"][name] for name in (row["cell"] for row in results["budgets"])}
    results["experts"] = expert_rows(study, arguments.draws[0], made)
    results["few_counts"] = few_counts(study, results["few"])
    default = ExpertOptions()
    head = about("benchmarks.studies.mixture", argv, inputs, study) | {
        "calibration": f"{settings.nsamples} samples of {settings.window} tokens",
        "experts": f"by {default.few} with fewer than {default.tokens} tokens, where nothing else is said",
        "tile": f"{settings.tile[0]}x{settings.tile[1]}",
        "mask learning": f"{settings.steps} steps of {settings.batch_size} x {settings.window}",
    }
    mixture_report.write(study.out, results, head, BUDGET_TILE)
    say(f"wrote {study.out / 'mixture.md'} and mixture.json")
    return results


def _parser() -> argparse.ArgumentParser:
    parser = study_parser(__doc__ or "")
    parser.add_argument("--steps", type=int, default=200, help="steps of mask learning (default 200)")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks a step (default 8)")
    parser.add_argument("--targets", type=listed(float), default=(0.45, 0.35, 0.25, 0.07), help="hybrids' zeros")
    parser.add_argument("--draws", type=listed(int), default=(0, 1), help="seeds; more than the first: of few tokens")
    parser.add_argument("--few-samples", type=listed(int), default=FEW_SAMPLES, help="default 4,16")
    parser.add_argument("--few-tokens", type=listed(int), default=FEW_TOKENS, help="default 1,16,32,64,...,1024")
    parser.add_argument("--cells", type=listed(str), default=("*",), help="names or patterns (default all)")
    parser.add_argument("--finished-only", action="store_true", help="run nothing: write what is there so far")
    return parser


if __name__ == "__main__":
    main()
