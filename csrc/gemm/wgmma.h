// Operands of wgmma: shared-memory descriptors and who holds which element. PTX ISA, "Asynchronous warpgroup level
// matrix instructions": "Matrix descriptor format", "Register fragments", "Shared memory matrix layout".
#pragma once

#include <cstdint>

#include "../format/layout.h"

namespace patch_kernels {

// Both operands are K-major with the 128-byte swizzle: start address / 16 in bits 0-13, 1024 bytes between groups of
// eight rows (stride field, bits 32-45, / 16), swizzle mode 1 in bits 62-63. The leading dimension field is not used.
PK_HD constexpr uint64_t wgmma_descriptor(uint32_t smem_address) {
  return static_cast<uint64_t>((smem_address & 0x3FFFF) >> 4) | uint64_t{1} << 16 | uint64_t{64} << 32 |
         uint64_t{1} << 62;
}

// Steps of a descriptor's address field. A dense instruction takes 16 columns, a sparse one 32 of which 16 are stored.
constexpr int kAStep = 2;              // A: 16 stored columns, 32 bytes
constexpr int kABlockStep = 512;       // A: the next 64 rows, 8192 bytes
constexpr int kBDenseStep = 2;         // B: 16 columns
constexpr int kBSparseStep = 4;        // B: 32 columns
constexpr int kMetaBlockBytes = 1024;  // metadata of 64 rows

// Accumulator i of thread t (of 128) of an m64nN instruction.
PK_HD constexpr int fragment_row(int t, int i) { return 16 * (t >> 5) + ((t & 31) >> 2) + 8 * ((i >> 1) & 1); }
PK_HD constexpr int fragment_token(int t, int i) { return 2 * (t & 3) + (i & 1) + 8 * (i >> 2); }

// stmatrix.x4.trans of 16 rows x 16 tokens a warp: registers are (octet of tokens, half of rows) = (0,0) (0,1) (1,0)
// (1,1), and lane l gives the address of token 8*(l>>4) + (l&7), rows of half (l>>3)&1. Byte offset in a block of
// 16 tokens x 64 rows with the 128-byte swizzle, as the tensor map of y expects it.
PK_HD constexpr int stage_offset(int t) {
  const int lane = t & 31, token = 8 * (lane >> 4) + (lane & 7);
  return swizzle128(token, 16 * (2 * (t >> 5) + ((lane >> 3) & 1)));
}

}  // namespace patch_kernels
