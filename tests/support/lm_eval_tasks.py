"""Small local tasks for lm-eval: multiple choice, and a group of two like MMLU. No network, no shared cache."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from support import lm_eval_tasks

# Questions per task; the subtasks differ in size so that the group's mean must be weighted to be right.
SIZES = {"local_plain": 24, "local_first": 9, "local_second": 21}
# Of one length, or the shortest would win for every question and every model; the last are longer.
WORDS = ("seven", "eight", "three", "forty", "sixty", "ninety", "twelve")


def questions(task: str) -> list[dict]:
    """Multiple choice with two to five choices that differ from question to question, as do the right positions."""
    rows = []
    for i in range(SIZES[task]):
        choices = [WORDS[(i * i + 3 * k) % 7] for k in range(2 + i % 4)]
        rows.append({"q": f"{task}: {i * i} is", "choices": choices, "gold": i // 4 % len(choices)})
    return rows


def task_config(task: str, folder: Path, metric: str = "acc") -> dict:
    """The task's configuration for lm-eval; its questions are written to `folder`."""
    data = folder / f"{task}.jsonl"
    data.write_text("\n".join(map(json.dumps, questions(task))))
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 3.0},
    }


def write_task_folder(folder: Path) -> Path:
    """Task files: local_plain, local_group (of local_first and local_second), and what `eval` must refuse."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {task: task_config(task, folder) for task in SIZES}
    files["no_acc"] = task_config("local_plain", folder, "acc_norm") | {"task": "no_acc"}
    files["no_data"] = files["local_plain"] | {"task": "no_data", "dataset_path": "nobody/no-such-set"}
    files["no_data"].pop("dataset_kwargs")
    files["tagged"] = files["local_plain"] | {"task": "tagged", "tag": "local_tag"}
    group = {"group": "local_group", "task": ["local_first", "local_second"], "metadata": {"version": 2}}
    files["no_mean"] = group | {"group": "no_mean"}
    files["local_group"] = group | {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


def right_answers(model, tokenizer, task: str) -> list[bool]:
    """Independent: whether the gold choice has the largest sum of log-probabilities, one choice at a time in fp64."""
    right = []
    for row in lm_eval_tasks.questions(task):
        scores = []
        for choice in row["choices"]:
            question, answer = tokenizer(row["q"])["input_ids"], tokenizer(" " + choice)["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([question + answer])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logits[len(question) + i - 1, t]) for i, t in enumerate(answer)))
        right.append(scores.index(max(scores)) == row["gold"])
    return right
