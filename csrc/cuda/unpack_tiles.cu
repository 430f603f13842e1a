// Packed format v1 to a dense weight on the GPU: one CTA a tile. Serves every GPU that has no GEMM kernel of its own:
// tile_linear unpacks and calls cuBLAS there.
#include "../format/layout.h"
#include "../ops.h"
#include "launch.h"

namespace patch_kernels::cuda {
namespace {

constexpr int kThreads = 256;

// Offset of a tile from the flags of all tiles before it. Each CTA counts by itself: no workspace, no second launch,
// and a 28672x8192 layer has only 14336 flags, which stay in L2.
__device__ int64_t tile_offset(const uint8_t* tile_is_sparse, int64_t tile) {
  __shared__ int counts[kThreads];
  int sparse = 0;
  for (int64_t t = threadIdx.x; t < tile; t += kThreads) sparse += tile_is_sparse[t];
  counts[threadIdx.x] = sparse;
  for (int stride = kThreads / 2; stride > 0; stride /= 2) {
    __syncthreads();
    if (threadIdx.x < stride) counts[threadIdx.x] += counts[threadIdx.x + stride];
  }
  __syncthreads();
  return tile * kDenseTileBytes - int64_t{counts[0]} * (kDenseTileBytes - kSparseTileBytes);
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(TiledMatrix matrix, int64_t tile_cols, uint16_t* weight) {
  const int64_t tile = blockIdx.x;
  const uint8_t* bytes = matrix.payload + tile_offset(matrix.tile_is_sparse, tile);
  const bool is_sparse = matrix.tile_is_sparse[tile] != 0;
  const int64_t row0 = tile / tile_cols * kTile, col0 = tile % tile_cols * kTile;
  for (int group = threadIdx.x; group < kTile * kGroupsPerRow; group += kThreads) {
    const int r = group / kGroupsPerRow, c = group % kGroupsPerRow;
    if (row0 + r >= matrix.rows) break;
    uint16_t values[kGroup] = {0, 0, 0, 0};
    if (is_sparse) {
      const auto* meta = reinterpret_cast<const uint32_t*>(bytes + kSlotBytes);
      const uint32_t nibble = meta[meta_word(r, c)] >> meta_shift(r, c) & 15;
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(bytes + value_offset(r, 2 * c));
#pragma unroll
      for (uint32_t j = 0; j < kGroup; ++j) {
        values[j] = static_cast<uint16_t>(j == (nibble & 3) ? pair & 0xFFFF : j == (nibble >> 2) ? pair >> 16 : 0);
      }
    } else {
      const uint2 four = *reinterpret_cast<const uint2*>(bytes + dense_offset(r, c * kGroup));
      values[0] = static_cast<uint16_t>(four.x), values[1] = static_cast<uint16_t>(four.x >> 16);
      values[2] = static_cast<uint16_t>(four.y), values[3] = static_cast<uint16_t>(four.y >> 16);
    }
    const int64_t col = col0 + c * kGroup;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (col + j < matrix.cols) weight[(row0 + r) * matrix.cols + col + j] = values[j];
    }
  }
}

}  // namespace

void unpack_tiles(const TiledMatrix& matrix, uint16_t* weight, void* stream) {
  const int64_t tile_cols = ceil_div(matrix.cols, kTile), tiles = ceil_div(matrix.rows, kTile) * tile_cols;
  if (tiles == 0) return;
  unpack_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(matrix, tile_cols,
                                                                                                  weight);
  check_launch("unpack_tiles");
}

}  // namespace patch_kernels::cuda
