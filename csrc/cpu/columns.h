// Many tokens in portable C++: a vector holds tokens, weights come one by one. Sums are fp32 in increasing k, whatever
// the number of tokens; a sparse tile does half the multiplications. The definition that every other kernel must meet.
#pragma once

#include <memory>

#include "tile_linear.h"

namespace patch_kernels::cpu {
namespace {

// Tokens in a vector, and vectors of sums that the registers hold beside a column and a weight.
#if defined(__AVX512F__)
constexpr int kVector = 16, kSumVectors = 16;
#elif defined(__AVX2__)
constexpr int kVector = 8, kSumVectors = 8;
#else  // 128 bits; two of them where there are 32
constexpr int kVector = 4, kSumVectors = 8;
#endif
constexpr int kPanel = 4 * kVector;  // tokens in a panel: at most four vectors of sums for a row
constexpr int kColumnTokens = 256;   // a decoded tile is used for as many: 256 x 128 sums are 128 KB

typedef float Vec __attribute__((vector_size(4 * kVector)));

// x as panels of fp32, token fastest: panel p, column k, token t at ((p*cols + k)*width + t). width is
// one to four vectors.
struct ColumnPanels {
  std::unique_ptr<float[]> storage;
  float* data;
  int64_t count;
  int width;
};

struct DecodedTile {
  alignas(64) float values[kTile * kTile];           // dense: [row][k]; sparse: [row][kept]
  alignas(64) uint8_t columns[kTile * kKeptPerRow];  // sparse: column in the tile of each kept value
};

template <class T>
float element(const uint8_t* from) {
  T value;
  memcpy(&value, from, sizeof(value));
  return load_as<float>(value);
}

// Rows are whole 16-byte units in another order: undo the swizzle unit by unit, then convert.
template <class T>
void decode_slot_row(const uint8_t* slot, int r, float* out) {
  for (int unit = 0; unit < 8; ++unit) {
    const uint8_t* from = slot + swizzle128(r, 16 * unit);
    for (int i = 0; i < 8; ++i) out[8 * unit + i] = element<T>(from + kValueBytes * i);
  }
}

template <class T>
void decode(const uint8_t* tile, bool is_sparse, DecodedTile& out) {
  for (int r = 0; r < kTile; ++r) {
    if (!is_sparse) {
      decode_slot_row<T>(tile, r, out.values + r * kTile);
      decode_slot_row<T>(tile + kSlotBytes, r, out.values + r * kTile + 64);
      continue;
    }
    decode_slot_row<T>(tile, r, out.values + r * kKeptPerRow);
    uint8_t* columns = out.columns + r * kKeptPerRow;
    for (int c0 = 0; c0 < kGroupsPerRow; c0 += 4) {  // four groups share a half-word
      uint16_t half_word;
      memcpy(&half_word, tile + kSlotBytes + 4 * meta_word(r, c0) + meta_shift(r, c0) / 8, sizeof(half_word));
      for (int i = 0; i < 8; ++i) {
        columns[2 * c0 + i] = static_cast<uint8_t>((c0 + i / 2) * kGroup + (half_word >> (2 * i) & 3));
      }
    }
  }
}

inline Vec load_vector(const float* from) {
  Vec vector;
  memcpy(&vector, from, sizeof(vector));
  return vector;
}

// sums[row][token] += values[row][k] * x[k][token], kRows rows and kVectors vectors of tokens at a time.
template <int kVectors, int kRows, bool kSparse>
void multiply(const DecodedTile& tile, const float* x, float* sums) {
  constexpr int kWidth = kVectors * kVector, kDepth = kSparse ? kKeptPerRow : kTile;
  for (int r = 0; r < kTile; r += kRows) {
    Vec sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kVectors; ++i) {
      sum[i / kVectors][i % kVectors] = load_vector(sums + r * kWidth + i * kVector);
    }
    for (int k = 0; k < kDepth; ++k) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const float value = tile.values[(r + i) * kDepth + k];
        const float* column = x + (kSparse ? tile.columns[(r + i) * kKeptPerRow + k] : k) * kWidth;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][v] += value * load_vector(column + v * kVector);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kVectors; ++i) {
      memcpy(sums + r * kWidth + i * kVector, &sum[i / kVectors][i % kVectors], sizeof(Vec));
    }
  }
}

template <int kVectors>
void multiply(const DecodedTile& tile, bool is_sparse, const float* x, float* sums) {
  constexpr int kRows = kSumVectors / (kVectors == 3 ? 4 : kVectors);
  if (is_sparse) {
    multiply<kVectors, kRows, true>(tile, x, sums);
  } else {
    multiply<kVectors, kRows, false>(tile, x, sums);
  }
}

inline void multiply(int vectors, const DecodedTile& tile, bool is_sparse, const float* x, float* sums) {
  switch (vectors) {
    case 1:
      return multiply<1>(tile, is_sparse, x, sums);
    case 2:
      return multiply<2>(tile, is_sparse, x, sums);
    case 3:
      return multiply<3>(tile, is_sparse, x, sums);
    default:
      return multiply<4>(tile, is_sparse, x, sums);
  }
}

// Columns are padded with zeros to whole tiles, so the padding of an edge tile multiplies zeros.
template <class T>
ColumnPanels column_panels(const Tokens& x, ParallelFor parallel) {
  ColumnPanels panels;
  panels.width = static_cast<int>(x.count >= kPanel ? kPanel : ceil_div(x.count, kVector) * kVector);
  panels.count = ceil_div(x.count, panels.width);
  const int64_t tile_cols = ceil_div(x.cols, kTile), width = panels.width;
  panels.storage.reset(new float[panels.count * tile_cols * kTile * width + kVector]);
  const auto misaligned = reinterpret_cast<uintptr_t>(panels.storage.get()) % sizeof(Vec);
  panels.data = panels.storage.get() + (misaligned ? (sizeof(Vec) - misaligned) / sizeof(float) : 0);
  parallel_over(parallel, panels.count * tile_cols, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      float* to = panels.data + item * kTile * width;
      for (int64_t t = 0; t < width; ++t) {
        const int64_t token = item / tile_cols * width + t;
        const uint16_t* from = token < x.count ? x.tile(token, item % tile_cols) : nullptr;
        for (int k = 0; k < kTile; ++k) to[k * width + t] = from ? load_as<float>(T{from[k]}) : 0.0f;
      }
    }
  });
  return panels;
}

template <class T>
class Columns {
 public:
  static constexpr int kTokensOfItem = kColumnTokens, kLeastTokens = kPanel;  // of an item
  static constexpr int kLeastRows = kTile;
  static constexpr int64_t kScratchOfValue = sizeof(float);  // bytes for each value of x

  Columns(const Tokens& x, ParallelFor parallel) : panels_(column_panels<T>(x, parallel)) {}

  // One tile row against a pass of panels: accumulate all k tiles, then round and store.
  class Worker {
   public:
    explicit Worker(const Columns& columns) : panels_(columns.panels_), tile_(std::make_unique<DecodedTile>()) {}

    void run(const Item& item) {
      const Matrix& matrix = *item.matrix;
      const int64_t width = panels_.width, first = item.token / width, last = ceil_div(item.token + item.tokens, width);
      sums_.assign((last - first) * kTile * width, 0.0f);
      TileCursor cursor(matrix, item.tile_row);
      for (int64_t c = 0; c < matrix.tile_cols; ++c, cursor.next()) {
        decode<T>(cursor.at, cursor.is_sparse(), *tile_);
        for (int64_t p = first; p < last; ++p) {
          multiply(static_cast<int>(width / kVector), *tile_, cursor.is_sparse(),
                   panels_.data + (p * matrix.tile_cols + c) * kTile * width,
                   sums_.data() + (p - first) * kTile * width);
        }
      }
      for (int t = 0; t < item.tokens; ++t) {
        const float* sums = sums_.data() + t / width * kTile * width + t % width;
        for (int r = 0; r < matrix.rows_of(item.tile_row); ++r) {
          store<T>(matrix, item.tile_row * kTile + r, item.token + t, sums[r * width]);
        }
      }
    }

   private:
    const ColumnPanels& panels_;
    std::unique_ptr<DecodedTile> tile_;
    std::vector<float> sums_;
  };

 private:
  ColumnPanels panels_;
};

}  // namespace
}  // namespace patch_kernels::cpu
