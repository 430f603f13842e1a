"""The README's Python example runs as written, on a local model and text."""

from __future__ import annotations

import re

import torch
from support import ROOT

README = ROOT / "README.md"


def test_python_example_runs_as_written(tmp_path, monkeypatch, tiny_model, tokenizer, text_file):
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "tiny-llama")
    tokenizer.save_pretrained(tmp_path / "tiny-llama")
    (tmp_path / "text.txt").write_text(text_file.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert (tmp_path / "packed" / "config.json").is_file()
    assert len(scope["result"].masks) == 14
    assert scope["model"].get_memory_footprint() < model.get_memory_footprint() * 2
    out = scope["model"].generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 7)


def test_readme_is_short_and_ascii():
    text = README.read_text(encoding="utf-8")
    assert text.isascii() and "@@" not in text
    assert len(text.splitlines()) <= 150
    assert max(map(len, text.splitlines())) <= 120


def test_links_between_documents_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    assert len(documents) > 15
    for document in documents:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).exists(), f"{document}: {link}"
