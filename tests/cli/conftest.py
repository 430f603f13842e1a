"""A folder with what the commands made once, for all tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import text
from support.models import build_byte_tokenizer, build_tiny_model

from patch import cli


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Folder with a tiny dense model, texts, and the results of prune and learn made by the commands."""
    folder = tmp_path_factory.mktemp("cli")
    for name, overrides in (("model", {}), ("other", {"intermediate_size": 256})):
        build_tiny_model("llama", **overrides).save_pretrained(folder / name)
        build_byte_tokenizer().save_pretrained(folder / name)
    (folder / "train.txt").write_text(text(400))
    (folder / "held.txt").write_text(text(60))
    (folder / "short.txt").write_text("too short")
    shared = f"--model {folder}/model --data {folder}/train.txt --seqlen 32"
    prune = f"prune {shared} --method wanda --nsamples 4 --tile 64,64 --target-sparsity 0.35 --out {folder}/prior"
    assert cli.main(prune.split()) == 0
    learn = f"learn {shared} --prior {folder}/prior --sparsity 0.35 --tile 64 --steps 3 --exact-budget"
    learn += f" --local-batch-size 2 --global-batch-size 4 --set learn.warmup_steps=1 --out {folder}/learned"
    assert cli.main(learn.split()) == 0
    return folder
