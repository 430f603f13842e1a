"""The study of bits in a miniature: grids, training through the rounding, bytes, and what is written."""

from __future__ import annotations

import copy
import csv

import pytest
import torch
from support.models import build_byte_tokenizer, build_tiny_model

from benchmarks.studies import bits, rounding
from patch.models.keep_masks import apply_keep_masks
from patch.models.structure import linear_at, maskable_linears
from patch.pruning.options import BlockOptions


def all_kept(model):
    return {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in maskable_linears(model).items()}


def two_of_four(model):
    """The larger two of every four weights."""
    masks = {}
    for name, layer in maskable_linears(model).items():
        groups = layer.weight.detach().abs().reshape(layer.weight.shape[0], -1, 4)
        masks[name] = (groups.argsort(2).argsort(2) >= 2).reshape(layer.weight.shape)
    return masks


def test_a_grid_has_a_scale_for_every_group_and_a_shorter_last_one():
    weight = torch.tensor([[7.0, -3.2, 0.0, 1.0, 14.0, 2.0]])
    grid = rounding.RoundingGrid(weight, torch.ones_like(weight, dtype=torch.bool), 8, 4)
    # 127 codes for 7, and for 14.
    expected = torch.cat([torch.round(weight[:, :4] * (127 / 7)) / (127 / 7), torch.round(weight[:, 4:] * 127 / 14)], 1)
    expected[:, 4:] /= 127 / 14
    assert torch.equal(grid.nearest(weight), expected)
    assert grid.nearest(torch.full((1, 6), 100.0)).tolist() == [[7.0] * 4 + [14.0] * 2]


def test_gradients_pass_as_if_nothing_were_rounded():
    weight = torch.tensor([[1.0, 0.4, -0.3, 0.0]], requires_grad=True)
    grid = rounding.RoundingGrid(weight.detach(), torch.ones(1, 4, dtype=torch.bool), 2, 4)
    made = grid.straight_through(weight)
    assert torch.equal(made, grid.nearest(weight.detach()))
    made.mul(torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert weight.grad.tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_bytes_are_codes_indices_and_scales():
    hybrid = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]] * 2).bool()
    # 12 codes, an index for as many as are pruned, and with few bits two scales a row.
    assert rounding.bytes_a_weight({"a": hybrid}, 16, 4) == (12 * 16 + 4 * 2) / 8 / 16
    assert rounding.bytes_a_weight({"a": hybrid}, 3, 4) == (12 * 3 + 4 * 2 + 4 * 16) / 8 / 16
    assert rounding.bytes_a_weight({"a": torch.ones(2, 6, dtype=torch.bool)}, 4, 4) == (12 * 4 + 4 * 16) / 8 / 12


@pytest.mark.parametrize("masks_of", [all_kept, two_of_four])
def test_training_through_the_rounding_brings_blocks_nearer(masks_of):
    dense = build_tiny_model("llama").eval()
    ids = torch.randint(0, 60, (16, 24), generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(dense)
    masks = masks_of(model)
    apply_keep_masks(model, masks)
    nearest = copy.deepcopy(model)
    rounding.round_to_nearest(nearest, masks, 3, 16)
    grids = {n: rounding.RoundingGrid(linear_at(model, n).weight.detach(), keep, 3, 16) for n, keep in masks.items()}
    options = BlockOptions(epochs=8, lr=0.05, batch_size=4)
    rounding.fit_rounded(model, dense, masks, ids, bits=3, group=16, options=options)
    errors = []
    with torch.no_grad():
        wanted = dense.model(ids).last_hidden_state
        errors = [float((m.model(ids).last_hidden_state - wanted).square().mean()) for m in (model, nearest)]
    assert errors[0] < 0.8 * errors[1]
    for name, keep in masks.items():
        weight = linear_at(model, name).weight.detach()
        assert not weight[~keep].any()
        assert torch.equal(weight, grids[name].nearest(weight))


def test_a_block_that_training_brings_no_nearer_is_rounded_to_nearest():
    dense = build_tiny_model("llama").eval()
    model, nearest = copy.deepcopy(dense), copy.deepcopy(dense)
    masks = all_kept(dense)
    ids = torch.randint(0, 60, (4, 8), generator=torch.Generator().manual_seed(0))
    rounding.round_to_nearest(nearest, masks, 4, 16)
    options = BlockOptions(epochs=1, lr=10.0, batch_size=4)
    rounding.fit_rounded(model, dense, masks, ids, bits=4, group=16, options=options)
    for name in masks:
        assert torch.equal(linear_at(model, name).weight, linear_at(nearest, name).weight)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Flags of a tiny model and its texts."""
    folder = tmp_path_factory.mktemp("bits-inputs")
    build_tiny_model("llama", num_hidden_layers=1).save_pretrained(folder / "model")
    build_byte_tokenizer().save_pretrained(folder / "model")
    lines = [f"Line {i}: the {'quick' if i % 3 else 'slow'} fox {i * i} jumps." for i in range(400)]
    (folder / "train.txt").write_text("\n".join(lines[:300]))
    (folder / "held.txt").write_text("\n".join(lines[300:]))
    flags = {"--model": folder / "model", "--train": folder / "train.txt", "--heldout": folder / "held.txt"}
    flags |= {"--window": 32, "--heldout-windows": 4, "--nsamples": 4, "--reconstruction-samples": 8}
    flags |= {"--block-epochs": 1, "--tile": 32, "--group": 32}
    return [str(part) for pair in flags.items() for part in pair]


def test_every_model_at_every_width_is_measured_once(inputs, tmp_path, monkeypatch):
    flags = [*inputs, "--out", str(tmp_path), "--targets", "0,0.35", "--bits", "16,4,2"]
    rows = bits.main(flags)
    assert [(row["model"], row["bits"]) for row in rows] == [
        (model, width) for model in ("dense", "hybrid 35 %") for width in (16, 4, 2)
    ]
    assert rows[0]["bytes_a_weight"] == 2.0 and rows[0]["reconstructed"] == ""
    assert all(row["reconstructed"] > 1 for row in rows if row["bits"] < 16)
    with (tmp_path / "bits.csv").open() as file:
        assert [line["rounded"] for line in csv.DictReader(file)] == [str(row["rounded"]) for row in rows]
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
    assert "| hybrid 35 % | " in (tmp_path / "bits.md").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(rounding, "fit_rounded", None)
        patched.setattr(rounding, "round_to_nearest", None)
        assert bits.main(flags) == rows
    # Another width starts from the blocks that are there.
    monkeypatch.setattr("patch.pruning.reconstruction.fit_block", None)
    bits.main([*flags[:-1], "16,3"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--bits", "9"), "bits: bitwidth: expected 2 to 8 bits, got 9"),
        (("--group", "0"), "bits: block: expected a group size of 1 or more, got 0"),
        (("--targets", "0.7"), "bits: target_sparsity: expected a share of zeros from 0 to 0.5, got 0.7"),
    ],
)
def test_bad_flags_are_refused(inputs, tmp_path, extra, message):
    with pytest.raises(SystemExit) as error:
        bits.main([*inputs, "--out", str(tmp_path), *extra])
    assert message in str(error.value)
