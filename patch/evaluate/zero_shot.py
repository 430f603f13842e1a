"""Zero-shot accuracy through lm-eval, by the protocol of the paper: `acc,none` of every task, plain mean.

lm-eval is optional (pip install 'patch-llm[eval]'); nothing else of the package needs it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from patch.data.sources import CONNECT
from patch.evaluate.cross_entropy import DEFAULT_WINDOW
from patch.evaluate.results import truncation_warnings
from patch.evaluate.task_sets import TASK_SETS
from patch.files.lazy import needed
from patch.files.paths import require_folder
from patch.models.checks import require_known_tokens
from patch.models.facts import context_length
from patch.models.modes import evaluating
from patch.models.structure import vocabulary_size

logger = logging.getLogger(__name__)

ZERO_SHOT_TASKS = TASK_SETS["paper"]
METRIC = "acc,none"
# acc has a closed-form standard error; lm-eval gives it only if it may bootstrap the other metrics of a task too.
_BOOTSTRAP_ITERS = 1
_SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
# The part of a task's configuration that makes its questions and their scoring. Not the rest: it holds paths of the
# machine, and keys that come and go with versions of lm-eval.
_QUESTION_KEYS = (
    "dataset_path",
    "dataset_name",
    "training_split",
    "validation_split",
    "test_split",
    "process_docs",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "description",
    "target_delimiter",
    "output_type",
    "num_fewshot",
    "should_decontaminate",
)


def zero_shot(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Any] = ZERO_SHOT_TASKS,
    *,
    batch_size: int = 1,
    limit: int | None = None,
    task_manager: Any = None,
    metric: str = METRIC,
    bos: bool = True,
    wrapped: Any = None,
) -> dict[str, float]:
    """Accuracy per task and their plain mean under "average"; see zero_shot_report for arguments and errors."""
    report = zero_shot_report(
        model,
        tokenizer,
        tasks,
        batch_size=batch_size,
        limit=limit,
        task_manager=task_manager,
        metric=metric,
        bos=bos,
        wrapped=wrapped,
    )
    return {name: task["value"] for name, task in report["tasks"].items()} | {"average": report["average"]}


def zero_shot_report(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Any] = ZERO_SHOT_TASKS,
    *,
    batch_size: int = 1,
    limit: int | None = None,
    task_manager: Any = None,
    metric: str = METRIC,
    bos: bool = True,
    wrapped: Any = None,
) -> dict[str, Any]:
    """Accuracy per task and their plain mean, with everything needed to repeat it, by lm-eval without examples.

    tasks         names of tasks or groups known to lm-eval, or task configs as dicts
    limit         questions per task (per subtask of a group) for a quick look; default all
    task_manager  what make_task_manager gives, default lm-eval's own tasks
    metric        "acc,none" for every task, as in the tables of the paper (never acc_norm)
    bos           False: prompts without the BOS token that the tokenizer adds by itself
    wrapped       the model as lm-eval's HFLM when the caller has it already, with its batch_size and bos
    returns       dict of JSON values: average (0..1), metric, limit, batch_size, max_length, add_bos, seeds, lm_eval
                  and tasks: {name: {value (0..1), stderr, questions, truncated, num_fewshot, version, subtasks,
                  config_sha256}}; truncated: questions longer than the context, whose beginning lm-eval cuts off
    raises        ImportError with the pip command when lm-eval is not installed; ValueError when a task has no such
                  metric, so that the mean is never over fewer tasks than asked for, and for a question with a token
                  that the model has no row for, or an answer that is empty or longer than the context.
    lm-eval seeds the global generators of random, numpy and torch.
    """
    if not tasks:
        raise ValueError(f"expected at least one task, got none; use for example {list(ZERO_SHOT_TASKS)}")
    with evaluating(model), _fewer_messages():  # around HFLM too: it switches the model to evaluation mode for good
        if wrapped is None:
            wrapped = lm_eval_model(model, tokenizer, batch_size=batch_size, bos=bos)
        import lm_eval

        with _watched(wrapped, vocabulary_size(model)) as truncated:
            output = lm_eval.simple_evaluate(
                wrapped,
                tasks=list(tasks),
                num_fewshot=0,
                limit=limit,
                task_manager=task_manager,
                bootstrap_iters=_BOOTSTRAP_ITERS,
                log_samples=False,
                **_SEEDS,
            )
    names = [task if isinstance(task, str) else task["task"] for task in tasks]
    found = {name: _task_result(output, name, metric, truncated) for name in names}
    for said in truncation_warnings({"tasks": found, "max_length": wrapped.max_length}):
        logger.info("%s", said)
    return {
        "average": math.fsum(task["value"] for task in found.values()) / len(found),
        "metric": metric,
        "limit": limit,
        "batch_size": batch_size,
        "max_length": wrapped.max_length,
        "add_bos": _starts_with_bos(wrapped),
        "seeds": dict(_SEEDS),
        "lm_eval": lm_eval_version(),
        "tasks": found,
    }


def make_task_manager(folder: str | os.PathLike | None = None) -> Any:
    """lm-eval's index of tasks, with the task files (*.yaml) in `folder` besides its own.

    raises  ImportError with the pip command; FileNotFoundError for a folder that is not there.
    """
    tasks = _lm_eval("tasks")
    if folder is not None:
        require_folder("task_path", folder, "a folder with lm-eval task files")
    return tasks.TaskManager(include_path=None if folder is None else os.fspath(folder))


def check_tasks(tasks: Sequence[str], task_manager: Any, *, metric: str = METRIC) -> None:
    """Load the tasks (and download their data) so that a wrong one is found before any model runs.

    raises  ValueError for an unknown name, a tag, a task or group without the metric, a task twice;
            ConnectionError when the data of a task can be neither found nor downloaded.
    """
    for name in tasks:
        if name in task_manager.all_tags:
            raise ValueError(f"expected tasks or groups of lm-eval, got the tag {name!r}; name its tasks one by one")
        if name not in task_manager.all_tasks:
            near = get_close_matches(name, task_manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see `lm-eval ls tasks`"
            raise ValueError(f"expected a task known to lm-eval, got {name!r}; {hint}")
    try:
        with _fewer_messages():
            loaded = task_manager.load(list(tasks))
    except (OSError, ValueError) as error:
        if str(error).startswith("Duplicate task"):
            raise ValueError(f"expected every task once: {error}; leave one of them out") from None
        got = f"got {type(error).__name__}: {error}; {CONNECT}, or use --task-path with tasks on local files"
        raise ConnectionError(f"expected to load the data of {', '.join(tasks)}, {got}") from error
    wanted = metric.split(",")[0]
    for name, task in loaded["tasks"].items():
        if wanted not in task.aggregation():
            raise ValueError(f"task {name}: expected the metric {wanted!r}, it has {sorted(task.aggregation())}")
    for name in tasks:
        if name in loaded["groups"] and not loaded["groups"][name].has_aggregation:
            expected = f"expected an aggregate_metric_list with {wanted!r}"
            raise ValueError(f"group {name}: {expected}, it has none; name its tasks")


def lm_eval_model(model: nn.Module, tokenizer: Any, *, batch_size: int = 1, bos: bool = True) -> Any:
    """The model as lm-eval's HFLM; raises ImportError with the pip command when lm-eval is not installed.

    bos  False: prompts without the BOS token that the tokenizer adds by itself
    """
    models = _lm_eval("models.huggingface")
    device = str(next(model.parameters()).device)
    length = context_length(model) or DEFAULT_WINDOW
    return models.HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # one without a padding token gets one, perhaps a new one
        batch_size=batch_size,
        max_length=length,
        device=device,
        add_bos_token=None if bos else False,
    )


def lm_eval_version() -> str:
    """Version of the installed lm-eval."""
    from importlib.metadata import version

    return version("lm_eval")


def _lm_eval(module: str) -> Any:
    return needed(f"lm_eval.{module}", "zero-shot evaluation needs lm-eval", "'patch-llm[eval]'")


def _starts_with_bos(wrapped: Any) -> bool:
    """Whether prompts begin with BOS; lm-eval's own setting is None where it leaves that to the tokenizer."""
    bos = wrapped.tokenizer.bos_token_id
    return bos is not None and wrapped.tok_encode("a")[:1] == [bos]


@contextlib.contextmanager
def _watched(wrapped: Any, vocabulary: int | None) -> Iterator[dict[str, set[int]]]:
    """Check what lm-eval asks the model during the body; gives {task: numbers of the questions that it cuts}.

    lm-eval cuts on the left, without a count: of many requests with a warning each, of some with none.
    """
    truncated: dict[str, set[int]] = defaultdict(set)
    asked: list[Any] = []
    bos = wrapped.tokenizer.bos_token_id
    scores, generates, tokens = wrapped.loglikelihood, wrapped.generate_until, wrapped._loglikelihood_tokens

    def loglikelihood(requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        asked[:] = requests
        return scores(requests, *args, **kwargs)

    def score_tokens(requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        # Rolling log-likelihoods come here too, in windows that fit and without having been asked for above.
        for request, (_, context, answer) in zip(asked, requests, strict=False):
            task = f"task {request.task_name}, question {request.doc_id}"
            if not 0 < len(answer) <= wrapped.max_length:
                got = f"got {len(answer)} tokens"
                advice = "Correct the task, or leave it out."
                raise ValueError(f"{task}: expected an answer of 1 to {wrapped.max_length} tokens, {got}. {advice}")
            require_known_tokens(torch.tensor(context + answer), vocabulary, task, wrapped.tokenizer)
            if bos is not None and context[:2] == [bos, bos]:
                advice = "Leave it out of the task's text, or use --no-bos."
                raise ValueError(f"{task}: expected one BOS token at its start, got two. {advice}")
            # The last token is only predicted.
            if len(context) + len(answer) > wrapped.max_length + 1:
                truncated[request.task_name].add(request.doc_id)
        asked.clear()
        return tokens(requests, *args, **kwargs)

    def generate_until(requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        for request in requests:
            prompt, settings = request.args
            new = settings.get("max_gen_toks") or settings.get("max_new_tokens") or wrapped.max_gen_toks
            ids = wrapped.tok_encode(prompt)
            require_known_tokens(torch.tensor(ids), vocabulary, f"task {request.task_name}", wrapped.tokenizer)
            if len(ids) > wrapped.max_length - new:
                truncated[request.task_name].add(request.doc_id)
        return generates(requests, *args, **kwargs)

    before = dict(vars(wrapped))
    vars(wrapped).update(  # found before the methods of its class
        loglikelihood=loglikelihood, generate_until=generate_until, _loglikelihood_tokens=score_tokens
    )
    try:
        yield truncated
    finally:
        for name in ("loglikelihood", "generate_until", "_loglikelihood_tokens"):
            del vars(wrapped)[name]
            vars(wrapped).update({name: before[name]} if name in before else {})


def _task_result(
    output: Mapping[str, Any], name: str, metric: str, truncated: Mapping[str, Collection[int]]
) -> dict[str, Any]:
    """What a result file keeps of one task or group."""
    values = output["results"].get(name, {})
    if metric not in values:
        got = f"lm-eval gave {sorted(values)}; leave the task out"
        raise ValueError(f"task {name}: expected the metric {metric!r}, {got}")
    subtasks = sorted(_leaves(output["group_subtasks"], name))
    stderr = values.get(metric.replace(",", "_stderr,", 1))
    return {
        "value": float(values[metric]),
        # lm-eval has no standard error for a single question, and says so with a text.
        "stderr": float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
        "questions": sum(output["n-samples"][task]["effective"] for task in subtasks),
        "truncated": sum(len(truncated.get(task, ())) for task in subtasks),
        "num_fewshot": max(output["n-shot"][task] for task in subtasks),
        "version": str(output["versions"].get(name)),
        "subtasks": [] if subtasks == [name] else subtasks,
        "config_sha256": _config_sha256([output["configs"][task] for task in subtasks]),
    }


def _leaves(group_subtasks: Mapping[str, Sequence[str]], name: str) -> set[str]:
    """The tasks of a group, through its subgroups; a task itself."""
    children = group_subtasks.get(name) or ()
    return {leaf for child in children for leaf in _leaves(group_subtasks, child)} or {name}


def _config_sha256(configs: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over what makes the questions of the tasks; functions count by what lm-eval prints of them."""
    kept = [{key: config[key] for key in _QUESTION_KEYS if key in config} for config in configs]
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()


@contextlib.contextmanager
def _fewer_messages() -> Iterator[None]:
    """lm-eval warns about every subtask of a group that it is zero-shot; shown with -v only."""
    lm_eval_logger = logging.getLogger("lm_eval")
    level = lm_eval_logger.level
    if not logger.isEnabledFor(logging.INFO):
        lm_eval_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        lm_eval_logger.setLevel(level)
