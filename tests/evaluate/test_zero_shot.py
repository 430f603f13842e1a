"""Zero-shot accuracy by the real lm-eval on local stand-in tasks, against log-likelihoods computed directly."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
from support import lm_eval_tasks
from support.lm_eval_tasks import right_answers
from support.models import build_byte_tokenizer

from patch.evaluate import zero_shot

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (pip install 'patch-llm[eval]')"
)


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """lm-eval's index of the local tasks alone: reading its own 14,000 takes seconds."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    from lm_eval.tasks import TaskManager

    folder = lm_eval_tasks.write_task_folder(tmp_path / "tasks")
    return TaskManager(include_path=str(folder), include_defaults=False)


@needs_lm_eval
def test_accuracy_is_that_of_direct_log_likelihoods(manager, tiny_model, tokenizer):
    model = tiny_model(seed=1)
    plain, first, second = (right_answers(model, tokenizer, task) for task in lm_eval_tasks.SIZES)
    # The stand-ins can tell a right harness from a wrong one: neither all right nor all wrong, subtasks that differ.
    assert 0 < sum(plain) < len(plain)
    assert sum(first) / len(first) != sum(second) / len(second)
    model.train()
    state = zero_shot.zero_shot_report(
        model, tokenizer, ["local_plain", "local_group"], task_manager=manager, batch_size=3
    )
    assert model.training
    tasks = state["tasks"]
    share = sum(plain) / 24
    assert tasks["local_plain"]["value"] == pytest.approx(share, rel=1e-12)
    assert tasks["local_plain"]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 23), rel=1e-12)
    assert tasks["local_plain"]["subtasks"] == []
    # As MMLU: weighted by questions, so the same as over all of them.
    assert tasks["local_group"]["value"] == pytest.approx(sum(first + second) / 30, rel=1e-12)
    assert tasks["local_group"]["subtasks"] == ["local_first", "local_second"]
    assert [tasks[name]["questions"] for name in tasks] == [24, 30]
    assert [tasks[name]["version"] for name in tasks] == ["3.0", "2"]
    assert {task["num_fewshot"] for task in tasks.values()} == {0}
    # The mean is over what was asked for: the group counts once.
    assert state["average"] == pytest.approx((share + sum(first + second) / 30) / 2, rel=1e-12)
    assert (state["metric"], state["limit"], state["max_length"]) == ("acc,none", None, 128)


@needs_lm_eval
def test_limit_counts_per_subtask(manager, tiny_model, tokenizer):
    report = zero_shot.zero_shot_report(tiny_model(), tokenizer, ["local_group"], task_manager=manager, limit=2)
    assert report["tasks"]["local_group"]["questions"] == 4
    assert report["limit"] == 2


@needs_lm_eval
def test_one_question_has_no_standard_error(manager, tiny_model, tokenizer):
    report = zero_shot.zero_shot_report(tiny_model(), tokenizer, ["local_plain"], task_manager=manager, limit=1)
    assert report["tasks"]["local_plain"]["stderr"] is None


@needs_lm_eval
def test_tasks_may_be_configurations(manager, tmp_path, tiny_model, tokenizer):
    model = tiny_model(seed=1)
    config = lm_eval_tasks.task_config("local_plain", tmp_path)
    result = zero_shot.zero_shot(model, tokenizer, [config], task_manager=manager)
    assert set(result) == {"local_plain", "average"}
    assert result["average"] == pytest.approx(sum(right_answers(model, tokenizer, "local_plain")) / 24, rel=1e-12)
    bad = lm_eval_tasks.task_config("local_plain", tmp_path, "acc_norm")
    with pytest.raises(ValueError, match="task local_plain: expected the metric 'acc,none', lm-eval gave"):
        zero_shot.zero_shot(model, tokenizer, [bad], task_manager=manager)


@needs_lm_eval
@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        (["local_plane"], ValueError, "a task known to lm-eval, got 'local_plane'; did you mean local_plain"),
        (["zzz"], ValueError, "got 'zzz'; see `lm-eval ls tasks`"),
        (["local_tag"], ValueError, "got the tag 'local_tag'; name its tasks"),
        (["no_acc"], ValueError, r"task no_acc: expected the metric 'acc', it has \['acc_norm'\]"),
        (["no_mean"], ValueError, "group no_mean: expected an aggregate_metric_list with 'acc'"),
        (["local_group", "local_first"], ValueError, "expected every task once: .*local_first"),
        (["no_data"], ConnectionError, "expected to load the data of no_data, got .* --task-path"),
    ],
)
def test_wrong_tasks_are_found_before_any_model_runs(manager, tasks, error, message):
    with pytest.raises(error, match=message):
        zero_shot.check_tasks(tasks, manager)


@needs_lm_eval
def test_right_tasks_pass(manager):
    zero_shot.check_tasks(["local_plain", "local_group"], manager)


@needs_lm_eval
def test_the_tasks_of_the_paper_are_lm_evals_own(tmp_path):
    """Eight names, none a tag; MMLU is a group whose mean is weighted by questions."""
    manager = zero_shot.make_task_manager(lm_eval_tasks.write_task_folder(tmp_path / "tasks"))
    assert len(set(zero_shot.ZERO_SHOT_TASKS)) == 8
    assert set(zero_shot.ZERO_SHOT_TASKS) <= set(manager.all_tasks) - set(manager.all_tags)
    assert "mmlu" in manager.all_groups
    assert "local_plain" in manager.all_tasks
    with pytest.raises(FileNotFoundError, match="folder with lm-eval task files, found none at"):
        zero_shot.make_task_manager(tmp_path / "absent")


def test_fingerprint_of_questions_follows_the_prompt_only():
    config = {"doc_to_text": "{{q}}", "dataset_kwargs": {"data_files": "/a"}, "process_docs": "<function f at 0x7f1>"}
    same = config | {"dataset_kwargs": {"data_files": "/b"}, "process_docs": "<function f at 0x8e2>", "new_key": 1}
    assert zero_shot._config_sha256([config]) == zero_shot._config_sha256([same])
    assert zero_shot._config_sha256([config]) != zero_shot._config_sha256([config | {"doc_to_text": "Q: {{q}}"}])


def test_without_lm_eval_the_error_says_the_command(monkeypatch, tiny_model, tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for call in (lambda: zero_shot.zero_shot(tiny_model(), tokenizer), zero_shot.make_task_manager):
        with pytest.raises(ImportError, match=r"needs lm-eval; run: pip install 'patch-llm\[eval\]'"):
            call()
    with pytest.raises(ValueError, match="at least one task"):
        zero_shot.zero_shot(tiny_model(), tokenizer, [])


@needs_lm_eval
@pytest.mark.parametrize("bos", [True, False])
def test_bos_is_as_asked_and_the_report_says_what_was_done(manager, tiny_model, bos):
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    model, firsts = tiny_model("llama"), set()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: firsts.update((args[0] if args else kwargs["input_ids"])[:, 0].tolist()),
        with_kwargs=True,
    )
    report = zero_shot.zero_shot_report(model, tokenizer, ["local_plain"], task_manager=manager, bos=bos, limit=2)
    assert (tokenizer.bos_token_id in firsts) is bos and len(firsts) > 0
    assert report["add_bos"] is bos


def bos_tokenizer():
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return tokenizer


@needs_lm_eval
def test_bos_is_there_once_also_where_the_text_has_it(manager, tiny_model, tmp_path):
    task = lm_eval_tasks.task_config("local_plain", tmp_path) | {"task": "with_bos", "doc_to_text": "<s>{{q}}"}
    model, seen = tiny_model("llama"), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["input_ids"]), with_kwargs=True
    )
    zero_shot.zero_shot_report(model, bos_tokenizer(), [task], task_manager=manager, limit=2)
    assert seen and all(int((ids == 256).sum()) == len(ids) for ids in seen)


@needs_lm_eval
def test_bos_twice_is_refused(manager, tiny_model):
    wrapped = zero_shot.lm_eval_model(tiny_model(), bos_tokenizer())
    encode = wrapped.tok_encode
    wrapped.tok_encode = lambda text, **how: [256, *encode(text, **how)]  # as versions of lm-eval did
    with pytest.raises(ValueError, match=r"task local_plain, question 0: expected one BOS token at its start, got two"):
        zero_shot.zero_shot_report(
            wrapped.model, wrapped.tokenizer, ["local_plain"], task_manager=manager, wrapped=wrapped
        )


@needs_lm_eval
def test_questions_longer_than_the_context_are_counted(manager, tiny_model, tokenizer):
    model = tiny_model(max_position_embeddings=23)
    report = zero_shot.zero_shot_report(
        model, tokenizer, ["local_plain", "local_group"], task_manager=manager, batch_size=4
    )
    for name, tasks in (("local_plain", ["local_plain"]), ("local_group", ["local_first", "local_second"])):
        rows = [row for task in tasks for row in lm_eval_tasks.questions(task)]
        # The last token of an answer is only predicted.
        long = [row for row in rows if any(len(f"{row['q']} {choice}") > 24 for choice in row["choices"])]
        assert 0 < len(long) < len(rows)
        assert report["tasks"][name]["truncated"] == len(long)
    whole = zero_shot.zero_shot_report(tiny_model(), tokenizer, ["local_plain"], task_manager=manager, limit=1)
    assert whole["tasks"]["local_plain"]["truncated"] == 0


@needs_lm_eval
def test_generated_answers_are_counted_too(manager, tiny_model, tokenizer, tmp_path):
    task = lm_eval_tasks.task_config("local_plain", tmp_path, "exact_match") | {
        "task": "generated",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 22, "do_sample": False},
    }
    task.pop("doc_to_choice")
    report = zero_shot.zero_shot_report(
        tiny_model(max_position_embeddings=40),
        tokenizer,
        [task],
        task_manager=manager,
        limit=12,
        metric="exact_match,none",
    )
    long = [row for row in lm_eval_tasks.questions("local_plain")[:12] if len(row["q"]) > 18]
    assert len(long) == 2
    assert report["tasks"]["generated"]["truncated"] == len(long)


@needs_lm_eval
@pytest.mark.parametrize(
    ("change", "tokens", "message"),
    [
        ({}, ["three"], r"task t, question \d+: expected tokens of the model's 260 .*, got 'three' \(id 260\)"),
        (
            {"doc_to_choice": ["a", "b" * 130]},
            [],
            "task t, question 0: expected an answer of 1 to 128 tokens, got 130 tokens. Correct the task",
        ),
    ],
)
def test_questions_that_the_model_cannot_read_are_named(manager, tiny_model, tmp_path, change, tokens, message):
    tokenizer = build_byte_tokenizer()
    tokenizer.add_tokens(tokens)
    task = lm_eval_tasks.task_config("local_plain", tmp_path) | {"task": "t", "target_delimiter": ""} | change
    with pytest.raises(ValueError, match=message):
        zero_shot.zero_shot_report(tiny_model(), tokenizer, [task], task_manager=manager)


@needs_lm_eval
def test_the_wrapper_is_as_before_afterwards(manager, tiny_model, tokenizer):
    wrapped = zero_shot.lm_eval_model(tiny_model(), tokenizer)
    before = set(vars(wrapped))
    zero_shot.zero_shot_report(
        wrapped.model, tokenizer, ["local_plain"], task_manager=manager, limit=1, wrapped=wrapped
    )
    assert set(vars(wrapped)) == before


@needs_lm_eval
def test_the_callers_tokenizer_is_not_changed(tiny_model):
    tokenizer = build_byte_tokenizer()
    tokenizer.pad_token = None
    wrapped = zero_shot.lm_eval_model(tiny_model("llama"), tokenizer)
    assert wrapped.tokenizer.pad_token is not None and tokenizer.pad_token is None
