"""`patch-llm permute`: an ordinary dense model that computes the same, and refusals."""

from __future__ import annotations

import pytest
import torch
from support.commands import run
from support.models import build_byte_tokenizer, build_tiny_model

from patch import load
from patch.models.facts import fingerprints


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("permute")
    build_tiny_model("llama").save_pretrained(folder / "model")
    build_byte_tokenizer().save_pretrained(folder / "model")
    lines = [f"Line {i}: the {'quick' if i % 3 else 'slow'} fox {i * i} jumps." for i in range(200)]
    (folder / "train.txt").write_text("\n".join(lines))
    return folder


def flags(work, out, *extra):
    data = ("--data", work / "train.txt", "--nsamples", "2", "--seqlen", "32")
    return ("permute", "--model", work / "model", *data, "--out", out, *extra)


@pytest.mark.parametrize("extra", [(), ("--keep-residual",)])
def test_the_result_is_a_dense_model_that_computes_the_same(work, tmp_path, capsys, extra):
    status, said, err = run(capsys, *flags(work, tmp_path / "out", *extra))
    assert status == 0, err
    stream = "not the residual stream" if extra else "the residual stream"
    assert f"reordered the inner channels of 4 layers, {stream}\n" in said
    one, other = load(work / "model").eval(), load(tmp_path / "out").eval()
    ids = torch.arange(64)[None]
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, one(ids).logits, rtol=1e-4, atol=1e-5)
    assert fingerprints(one)["weights_fingerprint"] != fingerprints(other)["weights_fingerprint"]
    assert torch.equal(one.lm_head.weight, other.lm_head.weight) == bool(extra)


def test_it_refuses_before_any_work(work, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    for extra, message in (
        ((), "--out: expected a new folder, "),
        (("--out", tmp_path / "new", "--data", "none.txt"), "--data: expected a file"),
        (("--out", tmp_path / "new", "--seed", "-1"), "--seed: expected an integer from 0"),
    ):
        status, _, err = run(capsys, *flags(work, tmp_path / "out", *extra))
        assert status == 2
        assert message in err
        assert not (tmp_path / "new").exists()
