// Packing and unpacking of format v1 on the CPU. The definition that every other reader and writer must equal.
#include <cstring>
#include <vector>

#include "../format/layout.h"
#include "parallel.h"

namespace patch_kernels::cpu {
namespace {

std::vector<int64_t> tile_offsets(const uint8_t* tile_is_sparse, int64_t tiles) {
  std::vector<int64_t> offsets(tiles + 1, 0);
  for (int64_t t = 0; t < tiles; ++t) offsets[t + 1] = offsets[t] + tile_bytes(tile_is_sparse[t]);
  return offsets;
}

void store_u16(uint8_t* to, uint16_t value) { memcpy(to, &value, sizeof(value)); }

uint16_t load_u16(const uint8_t* from) {
  uint16_t value;
  memcpy(&value, from, sizeof(value));
  return value;
}

uint32_t load_u32(const uint8_t* from) {
  uint32_t value;
  memcpy(&value, from, sizeof(value));
  return value;
}

struct TileView {
  int64_t row0, col0;
  int rows, cols;  // inside the matrix; less than 128 at ragged edges
};

TileView tile_view(int64_t tile, int64_t tile_cols, int64_t rows, int64_t cols) {
  const int64_t row0 = tile / tile_cols * kTile, col0 = tile % tile_cols * kTile;
  return {row0, col0, static_cast<int>(rows - row0 < kTile ? rows - row0 : kTile),
          static_cast<int>(cols - col0 < kTile ? cols - col0 : kTile)};
}

void pack_dense(const uint16_t* weight, const bool* keep, int64_t cols, const TileView& view, uint8_t* tile) {
  for (int r = 0; r < view.rows; ++r) {
    const int64_t row = (view.row0 + r) * cols + view.col0;
    for (int k = 0; k < view.cols; ++k) {
      if (keep[row + k]) store_u16(tile + dense_offset(r, k), weight[row + k]);
    }
  }
}

void unpack_row(const uint8_t* tile, bool is_sparse, int r, uint16_t* row) {
  if (!is_sparse) {  // whole 16-byte units in another order
    for (int k = 0; k < kTile; k += 8) memcpy(row + k, tile + dense_offset(r, k), 8 * sizeof(uint16_t));
    return;
  }
  for (int c = 0; c < kGroupsPerRow; ++c) {
    const int nibble = load_u32(tile + kSlotBytes + 4 * meta_word(r, c)) >> meta_shift(r, c) & 15;
    const uint64_t first = load_u16(tile + value_offset(r, 2 * c)),
                   second = load_u16(tile + value_offset(r, 2 * c + 1));
    const uint64_t group = first << 16 * (nibble & 3) | second << 16 * (nibble >> 2);
    memcpy(row + kGroup * c, &group, sizeof(group));
  }
}

PackError pack_sparse(const uint16_t* weight, const bool* keep, int64_t cols, const TileView& view, uint8_t* tile) {
  PackError error{0, -1, -1};
  for (int r = 0; r < kTile; ++r) {
    const int64_t row = (view.row0 + r) * cols + view.col0;
    for (int c = 0; c < kGroupsPerRow; ++c) {
      const int k0 = c * kGroup;
      const int real = r < view.rows && k0 < view.cols ? (view.cols - k0 < kGroup ? view.cols - k0 : kGroup) : 0;
      int bits = 0, kept = 0;
      for (int j = 0; j < real; ++j) {
        bits |= keep[row + k0 + j] << j;
        kept += keep[row + k0 + j];
      }
      if (kept != kept_of(real)) {
        if (error.count++ == 0) error.row = view.row0 + r, error.col = view.col0 + k0;
        continue;
      }
      const int nibble = group_nibble(bits);
      const int positions[kKept] = {nibble & 3, nibble >> 2};
      for (int i = 0; i < kKept; ++i) {
        if (bits >> positions[i] & 1) {
          store_u16(tile + value_offset(r, kKept * c + i), weight[row + k0 + positions[i]]);
        }
      }
      uint8_t* word = tile + kSlotBytes + 4 * meta_word(r, c);
      const uint32_t meta = load_u32(word) | static_cast<uint32_t>(nibble) << meta_shift(r, c);
      memcpy(word, &meta, sizeof(meta));
    }
  }
  return error;
}

}  // namespace

int64_t payload_bytes(const uint8_t* tile_is_sparse, int64_t tiles) {
  const int64_t sparse = count_sparse(tile_is_sparse, tiles);
  return sparse * kSparseTileBytes + (tiles - sparse) * kDenseTileBytes;
}

PackError pack_tiles(const uint16_t* weight, const bool* keep, const uint8_t* tile_is_sparse, int64_t rows,
                     int64_t cols, uint8_t* payload, ParallelFor parallel) {
  const int64_t tile_cols = ceil_div(cols, kTile), tiles = ceil_div(rows, kTile) * tile_cols;
  const std::vector<int64_t> offsets = tile_offsets(tile_is_sparse, tiles);
  std::vector<PackError> errors(tiles, PackError{0, -1, -1});
  parallel_over(parallel, tiles, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const TileView view = tile_view(t, tile_cols, rows, cols);
      uint8_t* tile = payload + offsets[t];
      memset(tile, 0, offsets[t + 1] - offsets[t]);
      if (tile_is_sparse[t]) {
        errors[t] = pack_sparse(weight, keep, cols, view, tile);
      } else {
        pack_dense(weight, keep, cols, view, tile);
      }
    }
  });
  PackError total{0, -1, -1};
  for (const PackError& error : errors) {
    const bool earlier = error.row < total.row || (error.row == total.row && error.col < total.col);
    if (error.count && (total.count == 0 || earlier)) total.row = error.row, total.col = error.col;
    total.count += error.count;
  }
  return total;
}

void unpack_tiles(const TiledMatrix& matrix, uint16_t* weight, ParallelFor parallel) {
  const int64_t tile_cols = ceil_div(matrix.cols, kTile), tiles = ceil_div(matrix.rows, kTile) * tile_cols;
  const std::vector<int64_t> offsets = tile_offsets(matrix.tile_is_sparse, tiles);
  parallel_over(parallel, tiles, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const TileView view = tile_view(t, tile_cols, matrix.rows, matrix.cols);
      for (int r = 0; r < view.rows; ++r) {
        uint16_t row[kTile];
        unpack_row(matrix.payload + offsets[t], matrix.tile_is_sparse[t], r, row);
        memcpy(weight + (view.row0 + r) * matrix.cols + view.col0, row, view.cols * sizeof(uint16_t));
      }
    }
  });
}

}  // namespace patch_kernels::cpu
