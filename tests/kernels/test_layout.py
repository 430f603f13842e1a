"""Packed format v1, byte by byte, against the formulas written out in plain numpy, and against the PTX rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.strategies import SHAPES, hybrid_mask, two_of_four_keep

from patch_kernels import TiledWeight, payload_bytes, reference, tile_grid, tiles_that_are_two_of_four

host = pytest.importorskip("patch_kernels._host", reason="built without pybind11")


def swizzle(row, byte):
    return 128 * row + (byte ^ ((row & 7) << 4))


def test_dense_offsets_are_a_swizzled_permutation():
    offsets = [[host.dense_offset(r, k) for k in range(128)] for r in range(128)]
    expected = [[16384 * (k // 64) + swizzle(r, 2 * (k % 64)) for k in range(128)] for r in range(128)]
    assert offsets == expected
    assert sorted(np.ravel(offsets)) == list(range(0, host.DENSE_TILE_BYTES, 2))


def test_value_offsets_are_a_swizzled_permutation():
    offsets = [[host.value_offset(r, p) for p in range(64)] for r in range(128)]
    assert offsets == [[swizzle(r, 2 * p) for p in range(64)] for r in range(128)]
    assert sorted(np.ravel(offsets)) == list(range(0, host.SLOT_BYTES, 2))


def test_metadata_covers_every_bit_once():
    bits = {host.meta_word(r, c) * 32 + host.meta_shift(r, c) for r in range(128) for c in range(32)}
    assert bits == set(range(0, 2048 * 8, 4))


@pytest.mark.parametrize("row", range(128))
def test_metadata_lane_and_selector(row):
    """PTX ISA, sparse m16n8k32: lane 4*(row%8) + pair holds row and row+8; selector s reads pairs 2s, 2s+1."""
    for group in range(32):
        word, shift = host.meta_word(row, group), host.meta_shift(row, group)
        lane, half = divmod(word % 64, 2)
        assert word // 64 == row // 16
        assert lane // 4 == row % 8
        column = 4 * group
        assert half == column // 64
        assert lane % 4 // 2 == column % 64 // 32  # selector: which 32 columns of the 64
        assert lane % 2 == column % 32 // 16
        assert shift == 16 * (row % 16 // 8) + 4 * (group % 4)


def test_all_sixteen_keep_patterns():
    legal = {0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110}
    assert {n for n in range(16) if host.is_legal_nibble(n)} == legal
    for bits in range(16):
        kept = [j for j in range(4) if bits >> j & 1]
        nibble = host.group_nibble(bits)
        assert nibble in legal
        positions = (nibble & 3, nibble >> 2)
        if len(kept) == 2:
            assert positions == tuple(kept)
        elif len(kept) == 1:
            assert positions == ((kept[0], 3) if kept[0] < 3 else (2, 3))
        elif not kept:
            assert positions == (0, 1)


def unpack_by_formula(payload, tile_is_sparse, rows, cols):
    """Independent reader: only the formulas of docs/reference/format.md."""
    weight = np.zeros((rows, cols), dtype=np.uint16)
    data, at = payload.numpy(), 0
    for tile_row, tile_col in np.ndindex(*tile_is_sparse.shape):
        for r in range(min(128, rows - 128 * tile_row)):
            row = 128 * tile_row + r
            for k in range(min(128, cols - 128 * tile_col)):
                if not tile_is_sparse[tile_row, tile_col]:
                    offset = at + 16384 * (k // 64) + swizzle(r, 2 * (k % 64))
                    weight[row, 128 * tile_col + k] = data[offset : offset + 2].view(np.uint16)[0]
                    continue
                c, j = divmod(k, 4)
                lane = 4 * (r % 8) + 2 * (c // 8 % 2) + c // 4 % 2
                word = at + 16384 + 4 * ((r // 16 * 32 + lane) * 2 + c // 16)
                nibble = int(data[word : word + 4].view(np.uint32)[0]) >> (16 * (r // 8 % 2) + 4 * (c % 4)) & 15
                for i, position in enumerate((nibble & 3, nibble >> 2)):
                    if position == j:
                        offset = at + swizzle(r, 2 * (2 * c + i))
                        weight[row, 128 * tile_col + k] = data[offset : offset + 2].view(np.uint16)[0]
        at += 18432 if tile_is_sparse[tile_row, tile_col] else 32768
    assert at == data.size
    return torch.from_numpy(weight.view(np.int16))


@pytest.mark.parametrize("shape", [(3, 5), (129, 130), (100, 200)])
def test_pack_matches_an_independent_reader(shape):
    generator = torch.Generator().manual_seed(1)
    keep, tile_is_sparse = hybrid_mask(*shape, 0.5, generator)
    tile_is_sparse.flatten()[0] = True
    keep &= two_of_four_keep(*shape, generator) if tile_is_sparse.numel() == 1 else True
    tile_is_sparse = tiles_that_are_two_of_four(keep)
    weight = torch.randn(shape, generator=generator).bfloat16()
    payload = TiledWeight.pack(weight, keep, tile_is_sparse).payload
    expected = torch.where(keep, weight, 0).view(torch.int16)
    assert torch.equal(unpack_by_formula(payload, tile_is_sparse.numpy(), *shape), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_bit_exact(shape, dtype):
    """Any bit pattern survives under a kept position: -0.0, subnormals, inf and NaN included."""
    generator = torch.Generator().manual_seed(2)
    for sparse_share in (0.0, 0.5, 1.0):
        keep, tile_is_sparse = hybrid_mask(*shape, sparse_share, generator)
        bits = torch.randint(-32768, 32768, shape, generator=generator).to(torch.int16)
        bits.flatten()[:: max(1, bits.numel() // 7)] = -32768  # -0.0
        tiled = TiledWeight.pack(bits.view(dtype), keep, tile_is_sparse)
        assert tiled.payload.numel() == payload_bytes(tile_is_sparse)
        assert torch.equal(tiled.unpack().view(torch.int16), torch.where(keep, bits, 0))


def test_byte_formula():
    tile_is_sparse = torch.tensor([[True, False, True]])
    assert payload_bytes(tile_is_sparse) == 2 * 18432 + 32768
    # 2NK * (1 - 0.4375 s) of a weight in whole tiles
    assert payload_bytes(torch.ones(4, 4, dtype=torch.bool)) == int(2 * 512 * 512 * (1 - 0.4375))


def test_padding_bytes_are_zero_and_metadata_legal():
    """Bytes that no weight owns are fixed, so equal weights give equal payloads and files hash alike."""
    keep = torch.tensor([[True, True, False, False, True]])
    tiled = TiledWeight.pack(torch.ones(1, 5).bfloat16(), keep, torch.ones(1, 1, dtype=torch.bool))
    values = tiled.payload[:16384].view(torch.int16)
    assert values.ne(0).sum() == 3
    words = tiled.payload[16384:].view(torch.int32).numpy().view(np.uint32)
    nibbles = {int(w) >> s & 15 for w in words for s in range(0, 32, 4)}
    assert nibbles <= {0b0100, 0b1100}


def test_tiles_that_are_two_of_four_reads_the_mask_not_the_weight():
    generator = torch.Generator().manual_seed(3)
    keep, tile_is_sparse = hybrid_mask(300, 260, 0.5, generator)
    assert torch.equal(tiles_that_are_two_of_four(keep), tile_is_sparse)
    keep[0, :4] = torch.tensor([True, True, True, False])
    tile_is_sparse[0, 0] = False
    assert torch.equal(tiles_that_are_two_of_four(keep), tile_is_sparse)
    assert tile_grid((300, 260)) == (3, 3)


def test_documented_example():
    """The worked 4x8 example of docs/reference/format.md."""
    weight = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]] * 4, dtype=torch.bfloat16)
    keep = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0]] * 4, dtype=torch.bool)
    payload = TiledWeight.pack(weight, keep, torch.ones(1, 1, dtype=torch.bool)).payload
    row0 = payload[:8].view(torch.bfloat16)
    assert row0.tolist() == [1.0, 4.0, 6.0, 7.0]
    row1 = payload[128 + 16 : 128 + 24].view(torch.bfloat16)  # row 1: 16-byte unit 0 is stored at unit 1
    assert row1.tolist() == [1.0, 4.0, 6.0, 7.0]
    word0 = int(payload[16384:16388].view(torch.int32))
    assert word0 & 0xFF == 0b1001_1100  # group 0 keeps 0 and 3, group 1 keeps 1 and 2


def test_keep_bits_round_trip():
    generator = torch.Generator().manual_seed(4)
    for shape in ((1, 4), (3, 20), (5, 8)):
        keep = torch.rand(shape, generator=generator) < 0.5
        packed = reference.pack_keep(keep)
        assert packed.numel() == (keep.numel() // 4 + 1) // 2
        assert torch.equal(reference.unpack_keep(packed, shape), keep)
    with pytest.raises(ValueError, match="columns of keep: expected a multiple of 4, got 6"):
        reference.pack_keep(torch.ones(2, 6, dtype=torch.bool))
