"""The quality study: its report from known numbers, and a small study that goes on where it stopped."""

from __future__ import annotations

import csv
import re

import pytest
from conftest import build_byte_tokenizer, build_tiny_model

from benchmarks import quality, quality_report


def row(cell, seed, **numbers):
    shared = {"cell": cell, "method": cell, "group": cell, "target": 0.5, "seed": seed, "sparsity": 0.5}
    return shared | {"linear_bytes": 9, "dense_linear_bytes": 16, "tokens": 1000, "seconds": 2.0} | numbers


def test_summary_is_mean_and_sample_deviation_over_the_seeds():
    rows = [row("dense", 0, perplexity=4.0), row("wanda", 0, perplexity=5.0, masks_alone=6.0)]
    rows += [row("wanda", 1, perplexity=7.0, masks_alone=6.0)]
    dense, wanda = quality_report.summarize(rows)
    assert (dense["seeds"], dense["perplexity"], dense["perplexity_spread"], dense["masks_alone"]) == (1, 4.0, "", "")
    assert (wanda["seeds"], wanda["perplexity"], wanda["perplexity_spread"]) == (2, 6.0, 1.4142)
    assert (wanda["masks_alone_spread"], wanda["bytes_of_dense"], wanda["seconds"]) == (0, 0.5625, 2.0)


def test_report_files(tmp_path):
    rows = [row("dense", 0, perplexity=4.0)] + [
        row("wanda", seed, perplexity=5.0 + 2 * seed, compensated_least_squares=4.5) for seed in (0, 1)
    ]
    quality_report.write(tmp_path, rows, {"command": "run it"})
    text = (tmp_path / "quality.md").read_text()
    assert "* command: `run it`" in text
    assert re.search(r"wanda *\| *50.0% *\| *6.00 \+- 1.41 *\| *4.50 \+- 0.00 *\| *0.56x *\| *1,000 ", text)
    assert re.search(r"dense *\| *50.0% *\| *4.00 *\| *- ", text)
    assert len(list(csv.DictReader((tmp_path / "quality_cells.csv").open()))) == 3
    assert (tmp_path / "quality.png").stat().st_size > 0


@pytest.fixture
def flags(tmp_path):
    build_tiny_model("llama", hidden_size=32, intermediate_size=48, max_position_embeddings=64).save_pretrained(
        tmp_path / "model"
    )
    build_byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.txt").write_text("\n".join(f"Line {i} of {i * i} is here." for i in range(200)))
    (tmp_path / "held.txt").write_text("\n".join(f"Line {i} of {i * 7} is there." for i in range(20)))
    text = (
        f"--model {tmp_path}/model --train {tmp_path}/train.txt --heldout {tmp_path}/held.txt --window 32 --nsamples 4"
    )
    return [*text.split(), "--seeds", "0", "--targets", "0.45", "--out", str(tmp_path / "out")]


def test_a_study_goes_on_where_it_stopped(flags, monkeypatch):
    rows = quality.main([*flags, "--cells", "dense,magnitude,sparsegpt-45"])
    dense, magnitude, sparsegpt = rows
    assert "masks_alone" not in dense
    assert magnitude["perplexity"] == magnitude["masks_alone"]  # it keeps the weights
    assert sparsegpt["perplexity"] != sparsegpt["masks_alone"]
    assert (dense["tokens"], magnitude["tokens"], sparsegpt["tokens"]) == (0, 0, 4 * 32)
    assert magnitude["compensated_least_squares"] != magnitude["masks_alone"]
    monkeypatch.setattr(quality, "prune_model", lambda *args, **kwargs: pytest.fail("made again"))
    assert quality.main([*flags, "--cells", "dense,magnitude,sparsegpt-45"]) == rows


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--cells", "wandaa"], "--cells: expected names or patterns of cells, got 'wandaa'. Known: dense, magnitude"),
        (["--compensations", "adam"], "expected one of least_squares, sparsegpt, got 'adam'"),
        (["--ablations", "size"], "expected one of tile, layer, prior, got 'size'"),
        (["--heldout", "absent.txt"], "got 'absent.txt', which is no file"),
        (["--window", "4096"], "--heldout: expected at least one window of 4096 tokens, got 472 tokens. Give more"),
        (["--targets", "45"], "quality: target_sparsity: expected a share of zeros from 0 to 0.5, got 45.0"),
    ],
)
def test_bad_flags_are_refused(flags, capsys, extra, message):
    with pytest.raises(SystemExit) as stopped:
        quality.main([*flags, *extra])
    assert message in f"{stopped.value}{capsys.readouterr().err}"


def test_model_and_texts_come_together():
    with pytest.raises(SystemExit, match="expected --model, --train and --heldout together"):
        quality.main(["--out", "unused", "--model", "unused"])
