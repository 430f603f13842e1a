"""Bytes of packed layers told from masks alone."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import build_tiny_model, mask_model

from patch.models.keep_masks import keep_masks
from patch.models.packed_size import expected_packed_share, expected_packed_text, packed_bytes, packed_text
from patch.packed.convert import pack_model
from patch.packed.swap import packed_layers


@pytest.mark.parametrize("share_sparse", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_bytes_are_those_of_the_packed_model(arch, share_sparse):
    model = mask_model(build_tiny_model(arch, dtype=torch.bfloat16), share_sparse)
    masks = keep_masks(model)
    dense = sum(model.get_submodule(name).weight.nbytes for name in masks)
    packed = pack_model(copy.deepcopy(model))
    written = sum(layer.payload.nbytes + layer.tile_is_sparse.numel() for _, layer in packed_layers(packed))
    assert packed_bytes(masks) == (written, dense)


def test_text_says_why_nothing_is_saved():
    keep = torch.ones(128, 128, dtype=torch.bool)
    assert packed_text({"a": keep}) == (
        "packed: 32,769 bytes in the masked layers, 1.00 of dense: only tiles of 128x128 that are 2:4 throughout get "
        "smaller"
    )
    keep = torch.tensor([True, True, False, False]).repeat(128, 32)
    assert packed_text({"a": keep}) == "packed: 18,433 bytes in the masked layers, 0.56 of dense"
    keep[:64, :64] = True  # a dense 64x64 tile leaves its 128x128 tile dense
    assert "1.00 of dense: only tiles" in packed_text({"a": keep})


@pytest.mark.parametrize(
    ("sparsity", "tile", "share"),
    [
        (0.45, (128, 128), 1 - 0.875 * 0.45),
        (0.45, (256, 128), 1 - 0.875 * 0.45),
        (0.45, (64, 64), 1 - 0.4375 * 0.9**4),
        (0.45, (64, 128), 1 - 0.4375 * 0.9**2),
        (0.45, (128, 96), 1 - 0.4375 * 0.9**3),
        (0.5, (16, 16), 0.5625),
        (0.0, (128, 128), 1.0),
    ],
)
def test_expected_share(sparsity, tile, share):
    assert expected_packed_share(sparsity, tile) == pytest.approx(share)


def test_expected_share_of_tiles_drawn_independently():
    """A mask of 64x64 tiles, nine of ten sparse, takes what the formula says."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(40, 40, generator=generator) > 0.9
    keep = torch.tensor([True, True, False, False]).repeat(40 * 64, 40 * 16)
    keep |= dense.repeat_interleave(64, 0).repeat_interleave(64, 1)
    packed, whole = packed_bytes({"a": keep})
    assert packed / whole == pytest.approx(expected_packed_share(0.45, (64, 64)), abs=0.02)


def test_expected_text_names_the_tile_that_packs():
    assert expected_packed_text(0.45, (128, 128)) == (
        "at sparsity 0.45 on 128x128 tiles, packing will take about 0.61 of dense bytes"
    )
    assert "about 0.71 of dense bytes: it stores tiles of 128x128, with which it would take 0.61" in (
        expected_packed_text(0.45, (64, 64))
    )
