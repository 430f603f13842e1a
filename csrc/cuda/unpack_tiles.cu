// Packed format v1 to a dense weight on the GPU: one CTA a tile, eight neighbours of a row a thread. Serves the
// backward pass of tile_linear, and every GPU that has no GEMM kernel of its own: tile_linear unpacks and calls cuBLAS
// there.
#include "../format/layout.h"
#include "../gemm/plan.h"
#include "../ops.h"
#include "launch.h"

namespace patch_kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 8;  // columns of a thread: 16 bytes of a dense tile, two groups
constexpr int kRunsPerRow = kTile / kRun;

// Sparse ones among the first `tiles` flags, counted by the whole CTA: no workspace and no second launch.
__device__ uint32_t count_sparse(const uint8_t* flags, int64_t tiles) {
  __shared__ uint32_t counts[kThreads / 32];
  const int64_t vectors = reinterpret_cast<uintptr_t>(flags) % sizeof(uint4) == 0 ? tiles / sizeof(uint4) : 0;
  uint32_t sparse = 0;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    const uint4 four = reinterpret_cast<const uint4*>(flags)[i];
    for (const uint32_t word : {four.x, four.y, four.z, four.w}) sparse = __dp4a(word, 0x01010101u, sparse);
  }
  for (int64_t i = vectors * sizeof(uint4) + threadIdx.x; i < tiles; i += kThreads) sparse += flags[i];
  const uint32_t of_warp = __reduce_add_sync(0xFFFFFFFFu, sparse);
  if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = of_warp;
  __syncthreads();
  uint32_t total = 0;
#pragma unroll
  for (const uint32_t count : counts) total += count;
  return total;
}

// A group's four elements from its two kept ones and its nibble: bytes of `pair`, or of 0 where PRMT's selector is 4.
__device__ uint2 spread(uint32_t pair, uint32_t nibble) {
  constexpr uint32_t kZeros = 0x44444444, kFirst = 0x44 ^ 0x10, kSecond = 0x44 ^ 0x32;
  const uint32_t selector = kZeros ^ kFirst << 8 * (nibble & 3) ^ kSecond << 2 * (nibble & 12);
  return {__byte_perm(pair, 0, selector), __byte_perm(pair, 0, selector >> 16)};
}

// CTAs follow the order of the schedule, if there is one.
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(TiledMatrix matrix, int64_t tile_cols, Schedule schedule, uint16_t* weight) {
  const int64_t tile = blockIdx.x;
  int64_t tile_row = tile / tile_cols, offset;
  bool is_sparse;
  if (schedule.tiles) {
    const uint32_t entry = schedule.tiles[tile];
    tile_row = schedule.order[tile_row];
    is_sparse = entry_is_sparse(entry);
    offset = entry_offset(entry);
  } else {
    is_sparse = matrix.tile_is_sparse[tile] != 0;
    const int64_t before = count_sparse(matrix.tile_is_sparse, tile);
    offset = tile * kDenseTileBytes - before * (kDenseTileBytes - kSparseTileBytes);
  }
  const uint8_t* bytes = matrix.payload + offset;
  const int64_t row0 = tile_row * kTile, col0 = tile % tile_cols * kTile;
  const int rows = static_cast<int>(matrix.rows - row0 < kTile ? matrix.rows - row0 : kTile);
  const int cols = static_cast<int>(matrix.cols - col0 < kTile ? matrix.cols - col0 : kTile);
  const int k = threadIdx.x % kRunsPerRow * kRun;
  if (k >= cols) return;
  for (int r = threadIdx.x / kRunsPerRow; r < rows; r += kThreads / kRunsPerRow) {
    uint4 run;
    if (is_sparse) {
      const int c = k / kGroup;
      const auto* meta = reinterpret_cast<const uint32_t*>(bytes + kSlotBytes);
      const uint32_t nibbles = meta[meta_word(r, c)] >> meta_shift(r, c);  // of groups c and c + 1
      const uint2 pairs = *reinterpret_cast<const uint2*>(bytes + value_offset(r, 2 * c));
      const uint2 low = spread(pairs.x, nibbles & 15), high = spread(pairs.y, nibbles >> 4 & 15);
      run = {low.x, low.y, high.x, high.y};
    } else {
      run = *reinterpret_cast<const uint4*>(bytes + dense_offset(r, k));
    }
    uint16_t* to = weight + (row0 + r) * matrix.cols + col0 + k;
    if (matrix.cols % kRun == 0) {
      __stwb(reinterpret_cast<uint4*>(to), run);  // a plain assignment is split into words by nvcc
    } else if (matrix.cols % kGroup == 0) {
      __stwb(reinterpret_cast<uint2*>(to), make_uint2(run.x, run.y));
      if (k + kGroup < cols) __stwb(reinterpret_cast<uint2*>(to + kGroup), make_uint2(run.z, run.w));
    } else {
      const uint32_t words[] = {run.x, run.y, run.z, run.w};
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (k + j < cols) to[j] = static_cast<uint16_t>(words[j / 2] >> 16 * (j % 2));
      }
    }
  }
}

}  // namespace

void unpack_tiles(const TiledMatrix& matrix, const Schedule& schedule, uint16_t* weight, void* stream) {
  const int64_t tile_cols = ceil_div(matrix.cols, kTile), tiles = ceil_div(matrix.rows, kTile) * tile_cols;
  if (tiles == 0) return;
  unpack_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(matrix, tile_cols,
                                                                                                  schedule, weight);
  check_launch("unpack_tiles");
}

}  // namespace patch_kernels::cuda
