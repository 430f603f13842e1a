// y = x @ weight.T + bias on the CPU from packed tiles: fp32 accumulation in increasing k, whatever the number of
// tokens, so row i of y depends on row i of x alone, bit for bit. A sparse tile does half the multiplications.
// Compiled once per instruction set (PK_ISA names the namespace).
#include <cstring>
#include <memory>
#include <vector>

#include "../format/layout.h"
#include "../math/elements.h"
#include "isa.h"
#include "parallel.h"

namespace patch_kernels::cpu::PK_ISA {
namespace {

constexpr int kVector = 16;        // tokens in a SIMD vector
constexpr int kPanel = 64;         // tokens in a panel: at most four vectors of accumulators per weight row
constexpr int kPanelsPerPass = 4;  // a decoded tile is used for this many panels, 4 x 128 x 64 accumulators = 128 KB

constexpr int64_t kTokensAtOnce = 1024;  // bounds the fp32 copy of x: 4 KB a column

typedef float Vec __attribute__((vector_size(4 * kVector)));

// x as panels of fp32, token fastest: panel p, column k, token t at ((p*cols + k)*width + t). width = 16, 32, 48 or 64.
struct Panels {
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

// acc[row][token] += values[row][k] * x[k][token], kRows rows and kVectors vectors of tokens at a time.
template <int kVectors, int kRows>
void multiply_dense(const DecodedTile& tile, const float* x, int depth, float* accumulators) {
  constexpr int kWidth = kVectors * kVector;
  for (int r = 0; r < kTile; r += kRows) {
    Vec sum[kRows][kVectors];
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) memcpy(&sum[i][v], accumulators + (r + i) * kWidth + v * kVector, sizeof(Vec));
    }
    for (int k = 0; k < depth; ++k) {
      Vec column[kVectors];
      for (int v = 0; v < kVectors; ++v) memcpy(&column[v], x + k * kWidth + v * kVector, sizeof(Vec));
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) sum[i][v] += tile.values[(r + i) * kTile + k] * column[v];
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) memcpy(accumulators + (r + i) * kWidth + v * kVector, &sum[i][v], sizeof(Vec));
    }
  }
}

template <int kVectors, int kRows>
void multiply_sparse(const DecodedTile& tile, const float* x, float* accumulators) {
  constexpr int kWidth = kVectors * kVector;
  for (int r = 0; r < kTile; r += kRows) {
    Vec sum[kRows][kVectors];
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) memcpy(&sum[i][v], accumulators + (r + i) * kWidth + v * kVector, sizeof(Vec));
    }
    for (int p = 0; p < kKeptPerRow; ++p) {
      for (int i = 0; i < kRows; ++i) {
        const int kept = (r + i) * kKeptPerRow + p;
        const float* column = x + tile.columns[kept] * kWidth;
        for (int v = 0; v < kVectors; ++v) {
          Vec tokens;
          memcpy(&tokens, column + v * kVector, sizeof(Vec));
          sum[i][v] += tile.values[kept] * tokens;
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) memcpy(accumulators + (r + i) * kWidth + v * kVector, &sum[i][v], sizeof(Vec));
    }
  }
}

template <int kVectors>
void multiply(const DecodedTile& tile, bool is_sparse, const float* x, int depth, float* accumulators) {
  // 8 to 16 vector accumulators hide the latency of the multiply-adds and still fit the registers.
  constexpr int kRows = kVectors >= 3 ? 4 : 8;
  if (is_sparse) {
    multiply_sparse<kVectors, kRows>(tile, x, accumulators);
  } else {
    multiply_dense<kVectors, kRows>(tile, x, depth, accumulators);
  }
}

void multiply(int vectors, const DecodedTile& tile, bool is_sparse, const float* x, int depth, float* accumulators) {
  switch (vectors) {
    case 1:
      return multiply<1>(tile, is_sparse, x, depth, accumulators);
    case 2:
      return multiply<2>(tile, is_sparse, x, depth, accumulators);
    case 3:
      return multiply<3>(tile, is_sparse, x, depth, accumulators);
    default:
      return multiply<4>(tile, is_sparse, x, depth, accumulators);
  }
}

// Columns are padded with zeros to whole tiles, so the padding of an edge tile multiplies zeros.
template <class T>
Panels make_panels(const T* x, int64_t tokens, int64_t cols, ParallelFor parallel) {
  Panels panels;
  panels.width = static_cast<int>(tokens >= kPanel ? kPanel : ceil_div(tokens, kVector) * kVector);
  panels.count = ceil_div(tokens, panels.width);
  const int64_t padded = ceil_div(cols, kTile) * kTile, width = panels.width;
  panels.storage.reset(new float[panels.count * padded * width + kVector]);
  const auto misaligned = reinterpret_cast<uintptr_t>(panels.storage.get()) % sizeof(Vec);
  panels.data = panels.storage.get() + (misaligned ? (sizeof(Vec) - misaligned) / sizeof(float) : 0);
  parallel_over(parallel, panels.count * (padded / kTile), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = item / (padded / kTile), k0 = item % (padded / kTile) * kTile;
      float* to = panels.data + (panel * padded + k0) * width;
      for (int64_t t = 0; t < width; ++t) {
        const int64_t token = panel * width + t;
        const int64_t real = token < tokens ? (cols - k0 < kTile ? cols - k0 : kTile) : 0;
        for (int64_t k = 0; k < real; ++k) to[k * width + t] = load_as<float>(x[token * cols + k0 + k]);
        for (int64_t k = real; k < kTile; ++k) to[k * width + t] = 0.0f;
      }
    }
  });
  return panels;
}

// One tile row against a pass of panels: accumulate all k tiles, then round and store.
template <class T>
void tile_row_pass(const TileLinearArgs& args, const Panels& panels, const std::vector<int64_t>& offsets,
                   int64_t tile_row, int64_t first_panel, int64_t last_panel, DecodedTile& tile,
                   std::vector<float>& accumulators) {
  const TiledMatrix& weight = args.weight;
  const int64_t tile_cols = ceil_div(weight.cols, kTile), width = panels.width;
  const int rows = static_cast<int>(weight.rows - tile_row * kTile < kTile ? weight.rows - tile_row * kTile : kTile);
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t p = first_panel; p < last_panel; ++p) {
    float* block = accumulators.data() + (p - first_panel) * kTile * width;
    for (int r = 0; r < kTile; ++r) {
      const float start = bias && r < rows ? load_as<float>(bias[tile_row * kTile + r]) : 0.0f;
      for (int64_t t = 0; t < width; ++t) block[r * width + t] = start;
    }
  }
  for (int64_t c = 0; c < tile_cols; ++c) {
    const int64_t index = tile_row * tile_cols + c;
    const bool is_sparse = weight.tile_is_sparse[index];
    decode<T>(weight.payload + offsets[index], is_sparse, tile);
    const int depth = static_cast<int>(weight.cols - c * kTile < kTile ? weight.cols - c * kTile : kTile);
    for (int64_t p = first_panel; p < last_panel; ++p) {
      multiply(static_cast<int>(width / kVector), tile, is_sparse, panels.data + (p * tile_cols + c) * kTile * width,
               depth, accumulators.data() + (p - first_panel) * kTile * width);
    }
  }
  T* y = static_cast<T*>(args.y);
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const float* block = accumulators.data() + (p - first_panel) * kTile * width;
    for (int64_t t = 0; t < width && p * width + t < args.tokens; ++t) {
      T* row = y + (p * width + t) * weight.rows + tile_row * kTile;
      for (int r = 0; r < rows; ++r) store_as(block[r * width + t], row[r]);
    }
  }
}

template <class T>
void run_tokens(const TileLinearArgs& args, const std::vector<int64_t>& offsets, ParallelFor parallel) {
  const TiledMatrix& weight = args.weight;
  const int64_t tile_rows = ceil_div(weight.rows, kTile);
  const Panels panels = make_panels(static_cast<const T*>(args.x), args.tokens, weight.cols, parallel);
  const int64_t passes = ceil_div(panels.count, kPanelsPerPass);
  parallel_over(parallel, passes * tile_rows, [&](int64_t begin, int64_t end) {
    const auto tile = std::make_unique<DecodedTile>();
    std::vector<float> accumulators(static_cast<size_t>(kPanelsPerPass) * kTile * panels.width);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / tile_rows * kPanelsPerPass;
      const int64_t last = first + kPanelsPerPass < panels.count ? first + kPanelsPerPass : panels.count;
      tile_row_pass<T>(args, panels, offsets, item % tile_rows, first, last, *tile, accumulators);
    }
  });
}

template <class T>
void run(const TileLinearArgs& args, ParallelFor parallel) {
  const TiledMatrix& weight = args.weight;
  const int64_t tiles = ceil_div(weight.rows, kTile) * ceil_div(weight.cols, kTile);
  std::vector<int64_t> offsets(tiles + 1, 0);
  for (int64_t t = 0; t < tiles; ++t) offsets[t + 1] = offsets[t] + tile_bytes(weight.tile_is_sparse[t]);
  for (int64_t first = 0; first < args.tokens; first += kTokensAtOnce) {
    TileLinearArgs part = args;
    part.x = static_cast<const T*>(args.x) + first * weight.cols;
    part.y = static_cast<T*>(args.y) + first * weight.rows;
    part.tokens = args.tokens - first < kTokensAtOnce ? args.tokens - first : kTokensAtOnce;
    run_tokens<T>(part, offsets, parallel);
  }
}

}  // namespace

void tile_linear(const TileLinearArgs& args, ParallelFor parallel) {
  if (args.tokens == 0 || args.weight.rows == 0) return;
  with_packed(args.dtype, [&](auto packed) { run<typename decltype(packed)::Storage>(args, parallel); });
}

}  // namespace patch_kernels::cpu::PK_ISA
