"""Every file of examples/ does its task on a tiny model."""

from __future__ import annotations

import json
import re
import runpy
import sys
import threading
import urllib.error
import urllib.request

import pytest
import torch
from support import ROOT
from support.commands import text
from support.models import build_byte_tokenizer, build_tiny_model

import patch
from patch.artifacts.artifact import load_artifact
from patch.artifacts.foreign import write_masks

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder with a model, two texts, masks in the authors' format, and what the examples write."""
    folder = tmp_path_factory.mktemp("examples")
    model = build_tiny_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    build_byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(text(300))
    (folder / "heldout.txt").write_text(text(100))
    return folder


def example(capsys, monkeypatch, name, *arguments):
    """What an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture
def packed(work, capsys, monkeypatch):
    if not (work / "packed").exists():
        example(capsys, monkeypatch, "prune.py", work / "model", work / "text.txt", work / "to-pack", "--samples", 4)
        example(capsys, monkeypatch, "pack_and_load.py", work / "model", work / "to-pack", work / "packed")
    return work / "packed"


def test_oneshot(work, capsys, monkeypatch):
    out = work / "oneshot"
    flags = ("--samples", 4, "--tokens", 32)
    printed = example(capsys, monkeypatch, "oneshot.py", work / "model", work / "text.txt", out, *flags)
    assert re.search(r"^perplexity \d+\.\d\d dense, \d+\.\d\d pruned, \d+\.\d\d reconstructed$", printed, re.M)
    assert "zeros, 0." in printed and patch.load(out).config.quantization_config is not None
    with pytest.raises(ValueError, match=r"out: expected a new folder, .* exists already. Choose another name"):
        example(capsys, monkeypatch, "oneshot.py", "no-model", "absent", out)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_prune(work, capsys, monkeypatch, method):
    out = work / f"pruned-{method}"
    printed = example(
        capsys, monkeypatch, "prune.py", work / "model", work / "text.txt", out, "--method", method, "--samples", 4
    )
    assert printed == f"14 layers, sparsity 0.500, in {out}\n"
    artifact = load_artifact(out)
    assert len(artifact.masks) == 14 and bool(artifact.weights) == (method == "sparsegpt")
    for name, others in (
        ("prune.py", 1),
        ("import_masks.py", 1),
        ("learn.py", 1),
        ("pack_and_load.py", 1),
        ("compensate.py", 3),
    ):
        with pytest.raises(ValueError, match=r"out: expected a new folder, .* exists already. Choose another name"):
            example(capsys, monkeypatch, name, "no-model", *["absent"] * others, out)


def test_a_hybrid_then_compensate(work, capsys, monkeypatch):
    out, texts = work / "hybrid", (work / "text.txt", work / "heldout.txt")
    flags = ("--method", "sparsegpt", "--sparsity", 0.25, "--samples", 4)
    printed = example(capsys, monkeypatch, "prune.py", work / "model", texts[0], out, *flags)
    artifact = load_artifact(out, expect={"pattern": "tiles", "sparsity": 0.25})
    assert 0.25 <= float(printed.split("sparsity ")[1].split(",")[0]) < 0.5
    arguments = (work / "model", out, *texts, work / "reconstructed", "--samples", 8, "--tokens", 32)
    example(capsys, monkeypatch, "compensate.py", *arguments)
    rebuilt = load_artifact(work / "reconstructed")
    assert rebuilt.meta["pattern"] == "tiles" and rebuilt.weights.keys() == artifact.masks.keys()
    assert not any(weight[~artifact.masks[name]].any() for name, weight in rebuilt.weights.items())


def test_learn_then_compensate(work, capsys, monkeypatch):
    learned = work / "learned"
    flags = ("--steps", 3, "--batch-size", 2, "--tokens", 32)
    printed = example(capsys, monkeypatch, "learn.py", work / "model", work / "text.txt", learned, *flags)
    assert printed.endswith(f"in {learned}\n") and (work / "learned-run" / "metrics.jsonl").is_file()
    flags = ("--samples", 8, "--tokens", 32)
    texts = (work / "text.txt", work / "heldout.txt")
    printed = example(
        capsys, monkeypatch, "compensate.py", work / "model", learned, *texts, work / "compensated", *flags
    )
    assert "with the masks alone" in printed
    assert len(load_artifact(work / "compensated").weights) == 14


def test_pack_and_load(packed, work, capsys, monkeypatch):
    printed = example(capsys, monkeypatch, "pack_and_load.py", work / "model", work / "to-pack", work / "packed-again")
    assert printed.startswith("Once upon a time") and "of the dense bytes" in printed


def test_import_masks(work, capsys, monkeypatch, packed):
    artifact = load_artifact(work / "to-pack")
    write_masks(work / "masks.npz", artifact.masks, artifact.meta | {"pattern": "2:4"})
    out = work / "imported"
    printed = example(capsys, monkeypatch, "import_masks.py", work / "model", work / "masks.npz", out)
    assert printed == f"14 layers (2:4), sparsity 0.500, in {out}\n"
    assert all(torch.equal(mask, artifact.masks[name]) for name, mask in load_artifact(out).masks.items())


def test_serve(packed):
    serve = runpy.run_path(str(EXAMPLES / "serve.py"))["server"](str(packed), 0)
    thread = threading.Thread(target=serve.serve_forever, daemon=True)
    thread.start()
    address = f"http://localhost:{serve.server_port}"
    try:
        body = json.dumps({"prompt": "Line 1", "max_new_tokens": 3}).encode()
        with urllib.request.urlopen(address, data=body, timeout=60) as answer:
            assert isinstance(json.load(answer)["text"], str)
        for wrong in (b'{"text": "no prompt"}', b'{"prompt": ""}', b'{"prompt": "a", "max_new_tokens": 0}', b"[]"):
            with pytest.raises(urllib.error.HTTPError, match=r'expected \{"prompt": TEXT\}'):
                urllib.request.urlopen(address, data=wrong, timeout=60)
    finally:
        serve.shutdown()
        serve.server_close()
        thread.join(10)


def test_every_example_is_run_here():
    source = (ROOT / "tests/project/test_examples.py").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in source, path
