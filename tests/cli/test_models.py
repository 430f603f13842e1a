"""Which models the commands take: wrong ones are refused in one sentence, whatever transformers says of them."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys

import pytest
from support.commands import run
from support.models import build_byte_tokenizer, build_tiny_model

from patch.cli import inputs

MAGNITUDE = ("prune", "--method", "magnitude")


@pytest.fixture
def model(tmp_path):
    """A folder with a tiny model, for edits."""
    build_tiny_model("llama").save_pretrained(tmp_path / "m")
    build_byte_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 96}, "--model: expected "),
        ({"num_attention_heads": "four"}, "--model: expected a model that transformers loads, got "),
        ({"model_type": "no_such_type"}, "--model: expected a model that transformers loads, got "),
        ({"hidden_act": "no_such_act"}, "--model: expected a model that transformers loads, got "),
    ],
)
def test_an_edited_configuration_is_refused(model, tmp_path, capsys, changes, message):
    edit(model, **changes)
    status, _, err = run(capsys, *MAGNITUDE, "--model", model, "--out", tmp_path / "o")
    error = err.splitlines()[-1]
    assert status == 2
    refused_by_load = f"patch-llm: error: {model}: expected a config.json that describes the model of its tensors"
    assert error.startswith((f"patch-llm: error: {message}", refused_by_load))
    assert "config.json" in error or "mismatched keys" in error


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_where_it_is_trusted(model, tmp_path, capsys):
    (model / "own.py").write_text(CODE)
    edit(
        model,
        model_type="own_llama",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    flags = (*MAGNITUDE, "--model", model, "--out", tmp_path / "o")
    status, _, err = run(capsys, *flags)
    assert status == 2
    assert err.splitlines()[-1] == (
        f"patch-llm: error: --model: expected a model whose code is in transformers, '{model}' brings code of its own "
        "that would be run. Read that code, then give --trust-remote-code if you trust it."
    )
    assert run(capsys, *flags, "--trust-remote-code")[0] == 0
    assert inputs.may_run_code.get()
    assert run(capsys, *flags, "--overwrite")[0] == 2  # trust ends with the command


def test_a_packed_model_is_refused_where_a_dense_one_is_needed(model, tmp_path, capsys):
    assert run(capsys, *MAGNITUDE, "--model", model, "--out", tmp_path / "p")[0] == 0
    assert run(capsys, "export", "--model", model, "--masks", tmp_path / "p", "--out", tmp_path / "packed")[0] == 0
    status, _, err = run(capsys, *MAGNITUDE, "--model", tmp_path / "packed", "--out", tmp_path / "o")
    assert status == 2
    assert "packed' has packed layers. Give the model that it was made from." in err
    assert run(capsys, "generate", "--model", tmp_path / "packed", "--prompt", "a", "--max-new-tokens", 1)[0] == 0
    # What a command wrote is taken for what it is.
    for out, kind in (("p", "result"), ("packed", "export")):
        command = "export" if kind == "result" else "import-masks"
        masks = ("--masks", tmp_path / "p") if kind == "result" else ("x.npz",)
        flags = ("--model", model, *masks, "--out", tmp_path / out, "--overwrite")
        status, _, err = run(capsys, command, *flags)
        assert status == 2
        assert f"exists already (a complete {kind}). Choose another --out, only another {kind} may replace it" in err
    status, _, err = run(capsys, "export", "--model", model, "--masks", tmp_path / "packed", "--out", tmp_path / "o")
    assert status == 2
    assert (
        f"--masks: expected a folder made by prune or learn, {tmp_path / 'packed'} is a model. Give masks, and" in err
    )
    status, _, err = run(capsys, "export-masks", tmp_path / "p", "--masks", tmp_path / "o", "--out", tmp_path / "x.npz")
    assert status == 2
    assert "--masks: expected it once, as a plain word or as a flag, got" in err
    shutil.rmtree(tmp_path / "packed")


def test_a_hub_that_does_not_answer_is_said_at_once(tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    def no_network(address, timeout):
        assert address == ("huggingface.co", 443) and timeout <= 10
        raise socket.gaierror("name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", no_network)
    status, _, err = run(capsys, *MAGNITUDE, "--model", "nobody/nothing", "--out", tmp_path / "o")
    assert status == 2
    assert (
        "--model: expected a model folder or a Hugging Face id, got 'nobody/nothing', which is no folder here and not "
        "in the cache, and huggingface.co does not answer (name or service not known). Check the path, or the network."
    ) in err


def test_a_missing_model_is_refused_before_torch_is_imported(tmp_path):
    code = (
        "import sys; from patch import cli; status = cli.main(sys.argv[1:]); "
        "print(status, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    for command in ("eval --data x.txt", f"prune --out {tmp_path}/o", "generate --prompt a"):
        arguments = [sys.executable, "-c", code, *command.split(), "--model", "./nope"]
        result = subprocess.run(arguments, capture_output=True, text=True, check=True)
        assert result.stdout == "2 False False\n"
        assert "--model: expected a model folder, found none at nope. Check the path." in result.stderr
