"""`patch-llm generate`: what of a model and its tokenizer it refuses by name, and what it does not mind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.commands import run
from support.models import build_byte_tokenizer, build_tiny_model
from tokenizers import normalizers

from patch.cli import inputs
from patch.cli.commands import generate

TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "model"
    build_tiny_model(seed=3).save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of the model that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def generated(capsys, folder, *arguments: object) -> tuple[int, str, str]:
    return run(capsys, "generate", "--model", folder, "--prompt", "Line 7", "--max-new-tokens", 4, *arguments)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "key", "value", "got"),
    [
        ("config.json", "pad_token_id", 300, 300),
        ("config.json", "pad_token_id", -1, -1),
        ("config.json", "eos_token_id", 260, 260),
        ("config.json", "bos_token_id", -5, -5),
        ("generation_config.json", "eos_token_id", [257, 260], 260),
        ("generation_config.json", "pad_token_id", -1, -1),
        ("generation_config.json", "bos_token_id", 1000, 1000),
    ],
)
def test_special_tokens_beyond_the_vocabulary_are_refused_by_key(capsys, folder, file, key, value, got):
    edit(folder / file, **{key: value})
    status, _, err = generated(capsys, folder)
    assert status == 2
    assert f"{folder}/{file}: {key}: expected a token of the vocabulary (0 to 259), got {got}. Correct the file" in err


def test_padding_that_cannot_be_loaded_is_refused_in_every_command(capsys, folder, tmp_path):
    edit(folder / "config.json", pad_token_id=300)
    text = tmp_path / "text.txt"
    text.write_text("some text " * 50)
    for command, *flags in (["eval", "--data", text], ["prune", "--method", "magnitude", "--out", tmp_path / "o"]):
        status, _, err = run(capsys, command, "--model", folder, *flags)
        assert status == 2
        assert f"{folder}/config.json: pad_token_id: expected a token of the vocabulary (0 to 259), got 300" in err
    edit(folder / "config.json", pad_token_id=-1)  # "none" in old configurations
    assert run(capsys, "eval", "--model", folder, "--data", text, "--window", 32)[0] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "generation_config.json: not valid JSON"),
        ("[]", "generation_config.json: expected values by name, got []"),
        (
            json.dumps(TOKENS | {"num_return_sequences": 3}),
            "generation_config.json: expected settings that fit together, transformers says: Greedy methods",
        ),
    ],
)
def test_a_damaged_generation_config_is_named(capsys, folder, content, message):
    (folder / "generation_config.json").write_text(content)
    status, _, err = generated(capsys, folder)
    assert status == 2 and message in err


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_p": 0.9},
        {"num_beams": 0},
        {"repetition_penalty": 0.0},
        {"min_new_tokens": 50},
        {"max_length": 2},
        {"bad_words_ids": [[400]]},
        {"do_sample": True, "temperature": 100.0},
    ],
)
def test_the_models_own_settings_of_generation_change_nothing(capsys, original, folder, settings):
    (folder / "generation_config.json").write_text(json.dumps(TOKENS | settings))
    status, out, _ = generated(capsys, folder)
    assert (status, out) == (0, generated(capsys, original)[1])


def test_generation_ends_at_every_end_that_the_model_names(original):
    model, tokenizer = inputs.load_model(str(original)), build_byte_tokenizer()
    options = generate.Options(model="m", prompt="Line 7", max_new_tokens=12)
    whole = tokenizer(generate.continuation(model, tokenizer, "Line 7", options))["input_ids"]
    with torch.no_grad():
        second = int(model(torch.tensor([tokenizer("Line 7")["input_ids"]])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [257, second]
    ended = generate.continuation(model, tokenizer, "Line 7", options)
    assert len(tokenizer(ended)["input_ids"]) <= 7 < len(whole)


def test_more_tokens_than_rows_are_refused_where_they_occur(capsys, folder):
    tokenizer = build_byte_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.add_special_tokens({"pad_token": "<none>"})  # never used for one sequence
    tokenizer.save_pretrained(folder)
    assert generated(capsys, folder)[0] == 0
    status, _, err = generated(capsys, folder, "--prompt", "a zebra")
    assert status == 2
    expected = "expected tokens of the model's 260 (rows of its embedding)"
    assert f"--prompt: {expected}, got 'zebra' (id 260). Use the tokenizer of this model" in err


def test_a_prompt_without_tokens_is_refused(capsys, folder):
    tokenizer = build_byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    tokenizer.save_pretrained(folder)
    status, _, err = generated(capsys, folder, "--prompt", "  ")
    assert status == 2
    assert "--prompt: expected text, got ' ' in which the tokenizer finds none. Give a word" in err
