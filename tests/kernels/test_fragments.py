"""Who holds which element: the maps of gemm/wgmma.h and gemm/fragments.h, against the figures of the PTX ISA written
out the other way round (from element to thread). A CUDA build has compared them with CuTe (cuda/cute_layouts.cpp)."""

from __future__ import annotations

from itertools import product

import pytest

host = pytest.importorskip("patch_kernels._host", reason="built without pybind11")

BASES = (0, 1024, 18432, 232448 - 1024)  # of a slot; the swizzle needs multiples of 1024


def tensor_map_offset(row: int, column: int) -> int:
    """Where TMA puts 16-bit element (row, column < 64) of a box: 16-byte units are permuted by row (SWIZZLE_128B)."""
    return 128 * row + 16 * ((column // 8) ^ (row % 8)) + 2 * (column % 8)


def address_read(descriptor: int, row: int, byte: int) -> int:
    """What wgmma reads through a K-major descriptor with the 128-byte swizzle: address bits 4-6 ^= bits 7-9."""
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    address = start + stride * (row // 8) + 128 * (row % 8) + byte
    return address ^ (address >> 7 & 7) << 4


def test_descriptor_fields():
    for address in range(0, 232448, 16):
        descriptor = host.wgmma_descriptor(address)
        assert descriptor & 0x3FFF == address >> 4  # start address
        assert descriptor >> 32 & 0x3FFF == 1024 >> 4  # stride: to the next eight rows
        assert descriptor >> 49 & 7 == 0  # base offset: slots start at multiples of 1024
        assert descriptor >> 62 == 1  # 128-byte swizzle
        reserved = 0b11 << 14 | 0b11 << 30 | 0b111 << 46 | 0x3FF << 52
        assert descriptor & reserved == 0
    # The window of a cluster is higher up; the field has only the 18 bits of the offset.
    assert host.wgmma_descriptor(0x01000400) == host.wgmma_descriptor(0x400)


def test_steps_do_not_carry_out_of_the_address_field():
    last = host.wgmma_descriptor(232448 - 18432)
    furthest = last + host.A_BLOCK_STEP + 3 * host.A_STEP
    assert furthest >> 14 == last >> 14


@pytest.mark.parametrize("base", BASES[:3])
@pytest.mark.parametrize("block", [0, 1])
def test_dense_operand(base, block):
    for half, step, row, k in product(range(2), range(4), range(64), range(16)):
        descriptor = host.wgmma_descriptor(base) + block * host.A_BLOCK_STEP + step * host.A_STEP
        stored = host.dense_offset(64 * block + row, 64 * half + 16 * step + k) - host.SLOT_BYTES * half
        assert address_read(descriptor, row, 2 * k) == base + stored


@pytest.mark.parametrize("base", BASES[:3])
@pytest.mark.parametrize("block", [0, 1])
def test_sparse_operand(base, block):
    """An instruction takes 32 columns, of which 16 are stored: kept values 16s .. 16s+15 for the s-th of a tile."""
    for half, selector, row, kept in product(range(2), range(2), range(64), range(16)):
        step = 2 * half + selector
        descriptor = host.wgmma_descriptor(base) + block * host.A_BLOCK_STEP + step * host.A_STEP
        assert address_read(descriptor, row, 2 * kept) == base + host.value_offset(64 * block + row, 16 * step + kept)


@pytest.mark.parametrize("base", BASES)
def test_token_operand(base):
    """x as the tensor copy leaves it: rows of 64 columns, up to 256 tokens."""
    descriptor = host.wgmma_descriptor(base)
    for token, k in product(range(256), range(16)):
        for step in range(4):
            address = address_read(descriptor + step * host.B_DENSE_STEP, token, 2 * k)
            assert address == base + tensor_map_offset(token, 16 * step + k)
    for token, k, selector in product(range(256), range(32), range(2)):
        address = address_read(descriptor + selector * host.B_SPARSE_STEP, token, 2 * k)
        assert address == base + tensor_map_offset(token, 32 * selector + k)


@pytest.mark.parametrize("n", range(8, 200, 8))
def test_wgmma_accumulators(n):
    """PTX ISA, wgmma m64nNk16, D: one thread and register for each (row, token)."""
    held = set()
    for row, token in product(range(64), range(n)):
        thread = 32 * (row // 16) + 4 * (row % 8) + token % 8 // 2
        i = 4 * (token // 8) + 2 * (row % 16 // 8) + token % 2
        assert (host.fragment_row(thread, i), host.fragment_token(thread, i)) == (row, token)
        held.add((thread, i))
    assert held == set(product(range(128), range(n // 2)))


def test_mma_accumulators():
    """PTX ISA, mma.m16n8k16, C and D."""
    for row, token in product(range(16), range(8)):
        lane, i = 4 * (row % 8) + token // 2, 2 * (row // 8) + token % 2
        assert (host.sum_row(lane, i), host.sum_token(lane, i)) == (row, token)


def nibbles_of_tile() -> dict[tuple[int, int], tuple[int, int]]:
    """(byte address of a word, nibble in it) -> (row, group), from the packed format."""
    return {
        (host.SLOT_BYTES + 4 * host.meta_word(r, c), host.meta_shift(r, c) // 4): (r, c)
        for r, c in product(range(128), range(32))
    }


def test_wgmma_metadata():
    """PTX ISA, sparse wgmma of 16-bit types: with selector s, threads 2s and 2s+1 of each quad give the metadata of 16
    columns each: row T/4 in the lower half-word, row T/4+8 in the upper, four groups a half-word in order."""
    stored = nibbles_of_tile()
    for block, half, selector, thread in product(range(2), range(2), range(2), range(128)):
        if thread % 4 // 2 != selector:
            continue
        word = host.SLOT_BYTES + host.META_BLOCK_BYTES * block + 8 * thread + 4 * half  # of the 8 bytes it loads
        for nibble in range(8):
            row = 64 * block + 16 * (thread // 32) + thread % 32 // 4 + 8 * (nibble // 4)
            column = 64 * half + 32 * selector + 16 * (thread % 2) + 4 * (nibble % 4)
            assert stored[word, nibble] == (row, column // 4)


def test_mma_metadata():
    """PTX ISA, sparse mma.m16n8k32: as above, for one warp."""
    stored = nibbles_of_tile()
    for row0, half, selector, lane in product(range(0, 128, 16), range(2), range(2), range(32)):
        if lane % 4 // 2 != selector:
            continue
        for nibble in range(8):
            row = row0 + lane // 4 + 8 * (nibble // 4)
            column = 64 * half + 32 * selector + 16 * (lane % 2) + 4 * (nibble % 4)
            assert stored[host.meta_address(lane, row0, half), nibble] == (row, column // 4)


def is_free_of_conflicts(addresses: list[int]) -> bool:
    """Eight rows of 16 bytes that cover all 32 banks: one wavefront of ldmatrix or stmatrix."""
    return len({address // 16 % 8 for address in addresses}) == 8


def test_stmatrix_of_y():
    """stmatrix.x4.trans: lanes 8i .. 8i+7 give the rows of matrix i, and element e of register i of lane l goes to row
    2*(l%4)+e, column l/4 of it. y must lie as its tensor map (16 tokens x 64 weight rows) expects it."""
    written = {}
    for warp, lane, i, e in product(range(4), range(32), range(4), range(2)):
        at = host.stage_offset(32 * warp + 8 * i + 2 * (lane % 4) + e) + 2 * (lane // 4)
        thread, sum_index = 32 * warp + lane, 2 * i + e  # words[i] packs sums 2i and 2i+1
        token, row = host.fragment_token(thread, sum_index), host.fragment_row(thread, sum_index)
        assert at == tensor_map_offset(token, row)
        written[at] = (token, row)
    assert set(written.values()) == set(product(range(16), range(64)))
    assert set(written) == set(range(0, 2048, 2))
    for warp, i in product(range(4), range(4)):
        assert is_free_of_conflicts([host.stage_offset(32 * warp + 8 * i + j) for j in range(8)])


def test_ldmatrix_of_weights():
    """ldmatrix.x4: register i of lane l gets elements 2*(l%4), +1 of row l/4 of matrix i, whose rows lanes 8i .. 8i+7
    name. PTX ISA, mma.m16n8k16, A: registers are (rows 0-7, 8-15) of columns 0-7, then of columns 8-15."""
    for row0, unit in product(range(0, 128, 16), range(0, 8, 2)):
        addresses = [host.weight_address(lane, row0, unit) for lane in range(32)]
        for lane, i, e in product(range(32), range(4), range(2)):
            row, column = row0 + lane // 4 + 8 * (i % 2), 8 * unit + 2 * (lane % 4) + e + 8 * (i // 2)
            at = addresses[8 * i + lane // 4] + 2 * (2 * (lane % 4) + e)
            assert at == host.dense_offset(row, column) == host.value_offset(row, column)
        assert all(is_free_of_conflicts(addresses[8 * i : 8 * i + 8]) for i in range(4))


def test_ldmatrix_of_tokens():
    """PTX ISA, mma B: register i of lane l has rows (columns of x) 8i + 2*(l%4), +1 and column (token) l/4, with two
    registers for k16 and four for the sparse k32."""
    for token0, unit in product(range(0, 128, 8), range(0, 8, 4)):
        addresses = [host.token_address(lane, token0, unit) for lane in range(32)]
        for lane, i, e in product(range(32), range(4), range(2)):
            column = 8 * unit + 8 * i + 2 * (lane % 4) + e
            at = addresses[8 * i + lane // 4] + 2 * (2 * (lane % 4) + e)
            assert at == tensor_map_offset(token0 + lane // 4, column)
        assert all(is_free_of_conflicts(addresses[8 * i : 8 * i + 8]) for i in range(4))
