"""`patch-llm eval`: perplexity with its protocol, and zero-shot tasks through lm-eval."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch.commands import common
from patch.commands.common import setting
from patch.config import write_text_atomic

if TYPE_CHECKING:
    from torch import nn

NAME = "eval"
SUMMARY = "measure perplexity (and zero-shot tasks), the dense model first"
EXAMPLES = """\
examples:
  patch-llm eval --model ./llama --data wikitext2
  patch-llm eval --model ./llama --masks wanda,learned --data heldout.txt --json results.json
  patch-llm eval --model ./llama --compare packed --data heldout.txt --dtype bf16
  patch-llm eval --model ./llama --data wikitext2 --tasks piqa,arc_easy      # needs patch-llm[eval]
"""
SECTION_FLAGS: dict[str, tuple[str, str, str]] = {}


@dataclass(frozen=True)
class Options:
    """Settings of `eval`."""

    model: str = setting(help=common.MODEL_HELP + "; listed first", metavar="MODEL")
    data: str = setting(help=common.DATA_HELP, metavar="TEXT")
    masks: tuple[str, ...] = setting((), "folders made by prune or learn, put on the model one by one", metavar="A,B")
    compare: tuple[str, ...] = setting((), "further models (dense or packed folders)", metavar="A,B")
    split: str | None = setting(None, "split of a named set (default by its convention)", metavar="NAME")
    text_field: str | None = setting(None, "column of a .jsonl or .parquet file (default text)", metavar="NAME")
    window: int | None = setting(None, "tokens per window (default 4096, or what the model allows)", metavar="N")
    max_windows: int | None = setting(None, "use only the first windows (default all)", metavar="N")
    batch_size: int = setting(1, "windows per forward pass (default 1)", metavar="N")
    tasks: tuple[str, ...] = setting((), "zero-shot tasks of lm-eval", metavar="A,B")
    limit: int | None = setting(None, "examples per task, for a quick look (default all)", metavar="N")
    dtype: str = setting("auto", "dtype to load the models in (default: their own)", metavar="DTYPE")
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: the GPU if there is one)", metavar="DEVICE")
    json: Path | None = setting(None, "also write everything to this file", metavar="FILE")

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("max_windows", 1), ("batch_size", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected an integer >= {least}, got {value}. Leave it out for the default.")


def run(options: Options) -> None:
    """Evaluate the model, then every masked version and every other model, on the same text."""
    common.check_text_source(options.data)
    common.dtype_of(options.dtype)
    for folder in options.masks:
        common.artifact_folder(folder)
    for path in (options.model, *options.compare):
        common.check_model_path(path)
    from patch.evaluate import format_reports, perplexity_report, zero_shot

    tokenizer = common.load_tokenizer(options.model)
    reports: dict[str, dict[str, Any]] = {}
    scores: dict[str, dict[str, float]] = {}
    for label, model, extra in _models(options):
        reports[label] = extra | perplexity_report(
            model,
            tokenizer,
            options.data,
            window=options.window,
            split=options.split,
            text_field=options.text_field,
            max_windows=options.max_windows,
            batch_size=options.batch_size,
            progress=True,
        )
        if options.tasks:
            scores[label] = zero_shot(
                model, tokenizer, options.tasks, batch_size=options.batch_size, limit=options.limit
            )
        del model
    first = next(iter(reports))
    print(format_reports(reports, dense=first))
    for label, report in reports.items():
        if "sparsity" in report:
            print(f"sparsity of {label}: {report['sparsity']:.4f}")
    for label, accuracies in scores.items():
        print(f"{label}: " + "  ".join(f"{task} {value:.4f}" for task, value in accuracies.items()))
    if options.json is not None:
        content = {"perplexity": reports, "zero_shot": scores}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(options.json, json.dumps(content, indent=1) + "\n")
        print(f"wrote {options.json}")


def on_interrupt(options: Options) -> str:
    """Evaluation writes its file at the end."""
    return "nothing was written; run the same command again"


def _models(options: Options) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """(label, model, what is known about it); one model in memory at a time."""
    from patch.models import keep_masks, measured_sparsity

    taken: set[str] = set()
    first = "dense" if options.masks or options.compare else _label(options.model, taken)
    taken.add(first)
    yield first, common.load_model(options.model, dtype=options.dtype, device=options.device), {}
    for folder in options.masks:
        model = common.load_model(options.model, dtype=options.dtype, device=options.device)
        common.apply_artifact(model, common.load_masks(folder, model))
        yield (
            _label(folder, taken),
            model,
            {"masks": folder, "sparsity": measured_sparsity(keep_masks(model))},
        )
    for path in options.compare:
        yield _label(path, taken), common.load_model(path, dtype=options.dtype, device=options.device), {}


def _label(path: str, taken: set[str]) -> str:
    """Last part of the path; all of it where that is taken."""
    name = Path(path).name or path
    label = path if name in taken else name
    taken.add(label)
    return label
