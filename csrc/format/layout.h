// Packed format v1: where every value and metadata bit of a tile lies, for host and device. Nothing else knows.
//
// A layer is ceil(N/128) x ceil(K/128) tiles in (tile row, tile column) order, one after the other, each either
//   dense    32768 B: two slots of 16384 B, slot h holds columns [64h, 64h+64)
//   sparse   18432 B: 16384 B of kept values, then 2048 B of metadata
// A row of 128 bytes is XOR-swizzled in 16-byte units by its row number: the 128-byte swizzle of TMA and wgmma
// (PTX ISA, "Shared memory matrix layout"). Edge tiles are padded with zeros. Example: docs/reference/format.md.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PK_HD __host__ __device__ __forceinline__
#else
#define PK_HD inline __attribute__((always_inline))
#endif

namespace patch_kernels {

constexpr int kTile = 128;  // rows and columns of a tile
constexpr int kGroup = 4;   // consecutive columns, of which a sparse tile keeps kKept
constexpr int kKept = 2;
constexpr int kGroupsPerRow = kTile / kGroup;
constexpr int kKeptPerRow = kKept * kGroupsPerRow;
constexpr int kValueBytes = 2;     // fp16 or bf16
constexpr int kSlotBytes = 16384;  // 128 rows of 128 bytes
constexpr int kMetaBytes = 2048;   // 4 bits for each of 128 x 32 groups
constexpr int kDenseTileBytes = 2 * kSlotBytes;
constexpr int kSparseTileBytes = kSlotBytes + kMetaBytes;

// What a sparse tile keeps of a group that has `real` columns inside the matrix: as many as of a whole one, or all.
constexpr int kept_of(int real) { return real < kKept ? real : kKept; }

PK_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Byte b in [0,128) of row r of a slot.
PK_HD constexpr int swizzle128(int r, int b) { return 128 * r + (b ^ ((r & 7) << 4)); }

// Dense tile: row r, column k.
PK_HD constexpr int dense_offset(int r, int k) { return kSlotBytes * (k >> 6) + swizzle128(r, kValueBytes * (k & 63)); }

// Sparse tile: kept value p of row r. Group c owns p = 2c and 2c+1, in increasing column order.
PK_HD constexpr int value_offset(int r, int p) { return swizzle128(r, kValueBytes * p); }

// Sparse tile: 32-bit word (after the values) and shift of the 4 metadata bits of group c in row r.
// A 16-row block is 32 lanes x 2 words. lane = 4*(r%8) + 2*f + j, where f (columns 32..63 of the word's 64) is the
// sparsity selector of mma.sp / wgmma.sp: 0 reads lanes 0,1 of each quad, 1 reads lanes 2,3
// (PTX ISA, "Sparse matrix storage", 16-bit types). Rows 8..15 of the block use the upper half-word.
PK_HD constexpr int meta_word(int r, int c) {
  const int lane = 4 * (r & 7) + 2 * ((c >> 3) & 1) + ((c >> 2) & 1);
  return ((r >> 4) * 32 + lane) * 2 + (c >> 4);
}
PK_HD constexpr int meta_shift(int r, int c) { return 16 * ((r >> 3) & 1) + 4 * (c & 3); }

// Metadata nibble of a group that keeps the columns set in keep_bits (bit j = column j): i0 | i1 << 2 with i0 < i1, the
// only order ordered_metadata allows. Groups of padding keep fewer than two: the free position is filled so that the
// nibble stays legal and its value is zero.
PK_HD constexpr int group_nibble(int keep_bits) {
  int i0 = 0;
  while (i0 < 3 && !((keep_bits >> i0) & 1)) ++i0;
  if (keep_bits == 0) return 0 | 1 << 2;
  int i1 = i0 + 1;
  while (i1 < 3 && !((keep_bits >> i1) & 1)) ++i1;
  return i0 == 3 ? 2 | 3 << 2 : i0 | i1 << 2;
}

// The six legal nibbles: 0100 1000 1100 1001 1101 1110.
PK_HD constexpr bool is_legal_nibble(int nibble) { return (nibble & 3) < (nibble >> 2); }

// Sparse ones among the flags of `tiles` tiles. In bytes, block by block, which compilers vectorise: it is part of
// every call, and a large layer has thousands of tiles.
inline int64_t count_sparse(const uint8_t* tile_is_sparse, int64_t tiles) {
  constexpr int64_t kBlock = 128;
  int64_t sparse = 0;
  for (int64_t first = 0; first < tiles; first += kBlock) {
    const int count = static_cast<int>(tiles - first < kBlock ? tiles - first : kBlock);
    uint8_t in_block = 0;
    for (int i = 0; i < count; ++i) in_block = static_cast<uint8_t>(in_block + (tile_is_sparse[first + i] != 0));
    sparse += in_block;
  }
  return sparse;
}

constexpr int tile_bytes(bool is_sparse) { return is_sparse ? kSparseTileBytes : kDenseTileBytes; }

}  // namespace patch_kernels
