"""`patch-llm eval`: perplexity with its protocol, and zero-shot tasks through lm-eval."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patch.cli import inputs, outputs
from patch.evaluate.task_sets import expanded, task_set_names
from patch.files.schema import record
from patch.settings import AtLeastOne, DistinctNames, NewPath, setting, to_dict

if TYPE_CHECKING:
    from torch import nn

    from patch.evaluate.protocol import EvaluationSet
    from patch.models.coverage import Coverage

NAME = "eval"
SUMMARY = "measure perplexity and zero-shot accuracy, the dense model first"
EXAMPLES = """\
examples:
  patch-llm eval --model ./llama --data wikitext2,ptb,c4
  patch-llm eval --model ./llama --masks wanda,learned --data heldout.txt --json results.json
  patch-llm eval --model ./llama --compare packed --data heldout.txt --dtype bf16
  patch-llm eval --model ./llama --tasks paper --batch-size 8 --json dense.json   # needs patch-llm[eval]
  patch-llm eval --model ./llama --tasks my_task --task-path ./tasks --markdown -
"""
TAKES_PACKED = True
# Tokenizers that disagree on this are not the same; it has what they differ in: case, digits, spaces, non-ASCII.
_PROBE = "The 17th  probe:\n\tna\u00efve caf\u00e9s paid 3.14 (or 2,718) -- don't they?"


@record(kw_only=True)
class Options(inputs.MaskSettings, inputs.PlacementSettings):
    """Settings of `eval`."""

    model: str = setting(help=inputs.MODEL_HELP + "; listed first", metavar="MODEL")
    data: DistinctNames = setting((), inputs.DATA_HELP + "; several give one perplexity each", metavar="A,B")
    masks: DistinctNames = setting((), "folders made by prune or learn, put on the model one by one", metavar="A,B")
    compare: DistinctNames = setting((), "further models (dense or packed folders)", metavar="A,B")
    split: str | None = setting(None, "split of a named set (default by its convention)", metavar="NAME")
    text_field: str | None = setting(None, inputs.FIELD_HELP, metavar="NAME")
    window: inputs.TokensToPredict = setting(
        None, "tokens per window (default 4096, or what the model allows)", metavar="N"
    )
    max_windows: AtLeastOne | None = setting(None, "use only the first windows (default all)")
    window_bos: Literal["tokenizer", "every"] = setting(
        "tokenizer",
        "tokenizer: BOS as it puts it, at the start of the text; every: before every window",
        metavar="RULE",
    )
    batch_size: AtLeastOne = setting(1, "windows per forward pass")
    tasks: DistinctNames = setting(
        (), "zero-shot tasks of lm-eval, or sets of them", metavar="A,B", choices=task_set_names
    )
    task_path: NewPath | None = setting(None, "folder with further lm-eval task files (*.yaml)", metavar="FOLDER")
    bos: bool = setting(True, "begin questions of tasks with BOS where the tokenizer does so by itself (default)")
    limit: AtLeastOne | None = setting(None, "questions per task, for a quick look (default all)")
    json: NewPath | None = setting(None, "also write everything to this new file, for `report`", metavar="FILE")
    markdown: NewPath | None = setting(None, "also write tables in Markdown to this new file; - prints", metavar="FILE")


def run(options: Options) -> None:
    """Evaluate the model, then every masked version and every other model, on the same texts and tasks."""
    _check(options)
    from patch.evaluate.protocol import evaluation_set

    tasks, task_manager = _tasks(options)
    tokenizer = _tokenizer(options)
    sets: dict[str, EvaluationSet] = {}
    for source in options.data:
        label = _label(source, set(sets))
        sets[label] = evaluation_set(tokenizer, source, split=options.split, text_field=options.text_field)
    window = _window(options, sets)
    _check_masks(options)
    models: list[dict[str, Any]] = []
    try:
        for description, model in _models(options):
            measured = _measure(options, model, tokenizer, sets, window, tasks, task_manager)
            models.append(description | measured)
            del model
    finally:
        # Also when a later model fails or the user interrupts: what was measured may have taken hours.
        if models:
            _finish(options, models, list(sets))


def on_interrupt(options: Options) -> str:
    """What was measured before is written."""
    return "models that were finished are printed and in the files that were asked for; the others are not"


def _measure(
    options: Options,
    model: nn.Module,
    tokenizer: Any,
    sets: Mapping[str, EvaluationSet],
    window: int,
    tasks: Sequence[str],
    task_manager: Any,
) -> dict[str, Any]:
    """Perplexity on every set and the accuracies of one model."""
    from patch.evaluate.protocol import perplexity_report
    from patch.evaluate.zero_shot import zero_shot_report

    reports = {
        name: perplexity_report(
            model,
            tokenizer,
            text,
            window=window,
            max_windows=options.max_windows,
            batch_size=options.batch_size,
            window_bos=options.window_bos,
            progress=True,
        )
        for name, text in sets.items()
    }
    scores = None
    if tasks:
        how: dict[str, Any] = {"batch_size": options.batch_size, "limit": options.limit, "bos": options.bos}
        scores = zero_shot_report(model, tokenizer, tasks, task_manager=task_manager, **how)
    return {"perplexity": reports, "zero_shot": scores}


def _finish(options: Options, models: Sequence[Mapping[str, Any]], sets: Sequence[str]) -> None:
    """Print the results and write the files that were asked for."""
    from patch.evaluate.results import make_results, markdown_tables, results_text
    from patch.files.atomic import write_new_text
    from patch.models.facts import versions

    _print(models, sets)
    command = ["patch-llm", *sys.argv[1:]]
    results = make_results(models, command=command, settings=to_dict(options), versions=versions())
    if str(options.markdown) == "-":
        print(markdown_tables(results["models"]))
    elif options.markdown is not None:
        text = markdown_tables(results["models"]) + "\n"
        print(f"wrote {write_new_text(options.markdown, text)}")
    if options.json is not None:
        print(f"wrote {write_new_text(options.json, results_text(results))}")


def _check(options: Options) -> None:
    """Refuse what can be refused without reading a model or a text."""
    if not options.data and not options.tasks:
        raise ValueError("--data, --tasks: expected at least one of them, got none. Give for example --data ptb.")
    for flag, given in (("--task-path", options.task_path), ("--limit", options.limit), ("--no-bos", not options.bos)):
        if given and not options.tasks:
            raise ValueError(f"{flag}: expected --tasks with it, got none. Name the tasks to run with --tasks.")
    for name in ("split", "text_field", "window", "max_windows", "window_bos"):
        if getattr(options, name) not in (None, "tokenizer") and not options.data:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: expected --data with it, got none. It is about texts, not about --tasks.")
    for source in options.data:
        inputs.check_text_source(source)
    inputs.device_of(options.device)
    outputs.check_new_file(options.json, "--json")
    outputs.check_new_file(options.markdown, "--markdown")
    for folder in options.masks:
        inputs.artifact_folder(folder)


def _model_paths(options: Options) -> list[tuple[str, str]]:
    """(flag, path) of all models."""
    return [("--model", options.model), *(("--compare", path) for path in options.compare)]


def _tasks(options: Options) -> tuple[list[str], Any]:
    """The tasks by name and lm-eval's index of tasks, both checked; ([], None) without tasks."""
    if not options.tasks:
        return [], None
    from patch.evaluate.zero_shot import check_tasks, make_task_manager

    names = expanded(options.tasks)
    task_manager = make_task_manager(options.task_path)
    check_tasks(names, task_manager)
    return names, task_manager


def _tokenizer(options: Options) -> Any:
    """Tokenizer of the first model; raises ValueError when another model has a different one."""
    from patch.evaluate.protocol import require_bos

    tokenizer = inputs.load_tokenizer(options.model)
    if options.window_bos == "every":
        require_bos(tokenizer, "--window-bos")
    for path in options.compare:
        try:
            other = inputs.load_tokenizer(path)
        except FileNotFoundError:
            continue  # a folder without one is read with that of --model
        if other(_PROBE)["input_ids"] != tokenizer(_PROBE)["input_ids"]:
            got = f"{path} has another one: perplexities cannot be compared. Evaluate it in a run of its own."
            raise ValueError(f"--compare: expected models with the tokenizer of {options.model}, {got}")
    return tokenizer


def _window(options: Options, sets: Mapping[str, EvaluationSet]) -> int:
    """Tokens per window for all sets and models; raises ValueError for a set that is shorter than that."""
    from patch.evaluate.cross_entropy import DEFAULT_WINDOW, require_windows
    from patch.models.facts import context_length

    configs = [inputs.load_model_config(path, packed=True, flag=flag) for flag, path in _model_paths(options)]
    limit = min((length for length in map(context_length, configs) if length is not None), default=None)
    window = options.window or min(DEFAULT_WINDOW, limit or DEFAULT_WINDOW)
    require_windows(window, limit, {name: len(text.token_ids) for name, text in sets.items()}, "every model")
    return window


def _check_masks(options: Options) -> None:
    """Read the masks against the model's shapes: a folder that does not fit costs no evaluation of the others."""
    if options.masks:
        shapes = inputs.load_model_shapes(options.model)
        for path in options.masks:
            inputs.load_masks(options, path, shapes)


def _models(options: Options) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """(entry of the result file so far, model); one model in memory at a time."""
    from patch.files.folder import MANIFEST
    from patch.files.regular import file_sha256
    from patch.models.coverage import coverage

    taken: set[str] = set()
    first = "dense" if options.masks or options.compare else _label(options.model, taken)
    taken.add(first)
    model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    # Masks are put on dense models only. Without any, nothing says whether the model is dense or was pruned.
    for path in options.masks:
        inputs.load_masks(options, path, model)  # masks of other weights cost no evaluation of this model
    described = _description(first, options.model, model, covered=_packed_coverage(model))
    yield described | ({"sparsity": 0.0} if options.masks else {}), model
    del model  # or it would stay while the next one is loaded
    for path in options.masks:
        model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
        folder, artifact = inputs.artifact_folder(path), inputs.put_masks(options, path, model)
        masks = {"path": path, "manifest_sha256": file_sha256(folder / MANIFEST), "meta": artifact.meta}
        covered = coverage(model, artifact.masks)
        yield _description(_label(path, taken), options.model, model, masks=masks, covered=covered), model
        del model
    for path in options.compare:
        model = inputs.load_model(path, dtype=options.dtype, device=options.device, flag="--compare")
        yield _description(_label(path, taken), path, model, covered=_packed_coverage(model)), model
        del model


def _packed_coverage(model: nn.Module) -> Coverage | None:
    from patch.models.coverage import coverage_of
    from patch.packed.swap import packed_zeros

    counts = packed_zeros(model)
    if not counts:
        return None
    zeros = sum(zeros for zeros, _ in counts.values())
    return coverage_of(model, {name: weights for name, (_, weights) in counts.items()}, zeros)


def _print(models: Sequence[Mapping[str, Any]], sets: Sequence[str]) -> None:
    """Perplexities by set with their protocol, sparsities, accuracies."""
    from patch.evaluate.protocol import format_reports
    from patch.evaluate.results import task_rows, truncation_warnings, zero_shot_line
    from patch.evaluate.tables import format_table
    from patch.models.coverage import coverage_text

    for name in sets:
        print(format_reports({m["label"]: m["perplexity"][name] for m in models}, dense=models[0]["label"]))
    for model in models:
        if covered := model["coverage"]:
            print(f"{model['label']}: {coverage_text(**covered)}")
    if models[0]["zero_shot"]:
        print(format_table(task_rows(models)))
        print(zero_shot_line(models[0]["zero_shot"]))
    for model in models:
        for said in truncation_warnings(model["zero_shot"]):
            print(f"WARNING: {model['label']}, {said}")


def _description(
    label: str,
    path: str,
    model: nn.Module,
    *,
    masks: Mapping[str, Any] | None = None,
    covered: Coverage | None = None,
) -> dict[str, Any]:
    """Entry of a model; covered is None for one that has neither masks nor packed layers."""
    from patch.models.facts import model_fingerprint

    parameter = next(model.parameters())
    return {
        "label": label,
        "model": path,
        "commit": getattr(model.config, "_commit_hash", None),
        "masks": masks,
        "method": masks["meta"].get("method") if masks else None,
        "sparsity": covered.sparsity if covered else None,
        "coverage": covered.as_dict() if covered else None,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "model_fingerprint": model_fingerprint(model),
    }


def _label(path: str, taken: set[str]) -> str:
    """Last part of the path; all of it where that is taken, with a number where that is taken too."""
    candidates = itertools.chain((Path(path).name or path, path), (f"{path} ({n})" for n in itertools.count(2)))
    label = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(label)
    return label
