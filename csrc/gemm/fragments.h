// Who holds what in the warp instructions of the sm_80 family: row addresses for ldmatrix, and where a lane's
// accumulators lie (PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix").
#pragma once

#include "../format/layout.h"

namespace patch_kernels {

// Every slot, of weights or of x, is rows of 128 bytes with the swizzle of format/layout.h. `row0` is a multiple of 8,
// so the XOR depends on the lane alone and the compiler computes it once.

// ldmatrix.x4 of a 16x16 block of weights: its four matrices are rows 0-7 and 8-15 of columns 0-7, then of 8-15, which
// is the order of the A registers. unit = first 16-byte unit of the block in the row.
PK_HD constexpr int weight_address(int lane, int row0, int unit) {
  return swizzle128(row0 + (lane & 15), 16 * (unit + (lane >> 4)));
}

// ldmatrix.x4 of 8 tokens and 32 columns of x: matrix i is columns 8i..8i+7. Registers 0,1 and 2,3 are the B operands
// of two dense k16, all four that of one sparse k32.
PK_HD constexpr int token_address(int lane, int token0, int unit) {
  return swizzle128(token0 + (lane & 7), 16 * (unit + (lane >> 3)));
}

// Accumulator i of a lane: weight row and token in the 16x8 block.
PK_HD constexpr int sum_row(int lane, int i) { return (lane >> 2) + 8 * (i >> 1); }
PK_HD constexpr int sum_token(int lane, int i) { return 2 * (lane & 3) + (i & 1); }

// Metadata word of a lane for 16 rows of a sparse tile and 64 of its columns (half 0 or 1), from the tile's start.
PK_HD constexpr int meta_address(int lane, int row0, int half) {
  return kSlotBytes + 4 * ((row0 / 16 * 32 + lane) * 2 + half);
}

}  // namespace patch_kernels
