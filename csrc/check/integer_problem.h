// For the self-check and the emulators: a random problem of small integers, whose sums are exact in fp32 in any order:
// a kernel's y must equal the integer result rounded once. Everything that is not data is NaN or a canary, so that
// reading or writing it shows.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../gemm/problem.h"
#include "../math/elements.h"
#include "../ops.h"

namespace patch_kernels {

enum class Types { kRandom, kDense, kSparse, kAlternating, kOneSparse };
constexpr int kTypes = 5;

struct Sizes {
  int rows = 0, cols = 0, tokens = 0;
  int x_padding = 0;  // units of 8 elements between rows of x, beyond cols rounded up to 8
  Types types = Types::kRandom;
  bool bias = false;
  uint32_t seed = 0;
};

inline std::string describe(const Sizes& s) {
  char text[192];
  snprintf(text, sizeof(text), "rows %d cols %d tokens %d x_padding %d types %d bias %d seed %u", s.rows, s.cols,
           s.tokens, s.x_padding, static_cast<int>(s.types), s.bias, s.seed);
  return text;
}

// A number in [low, high].
inline int between(std::mt19937& random, int low, int high) {
  return low + static_cast<int>(random() % static_cast<uint32_t>(high - low + 1));
}

// Sizes at and beside edges as often as any others, and multiples of 8, which take the wide stores.
inline int random_size(std::mt19937& random, int high, int edge = kTile) {
  int size = between(random, 1, high);
  const int kind = between(random, 0, 3);
  if (kind == 0) size = between(random, 1, std::max(1, high / edge)) * edge + between(random, -1, 1);
  if (kind == 1) size = between(random, 1, std::max(1, high / 8)) * 8;
  return std::min(high, std::max(1, size));
}

inline DType random_packed(std::mt19937& random) {
  return PackedDtypes::kDTypes[between(random, 0, PackedDtypes::kCount - 1)];
}

inline Sizes random_sizes(std::mt19937& random, int max_rows, int max_cols, int max_tokens) {
  Sizes s;
  s.rows = random_size(random, max_rows);
  s.cols = random_size(random, max_cols);
  s.tokens = between(random, 0, max_tokens);
  s.x_padding = between(random, 0, 2);
  s.types = static_cast<Types>(between(random, 0, kTypes - 1));
  s.bias = between(random, 0, 1) != 0;
  s.seed = random();
  return s;
}

// An integer rounded to `precision` significant bits, to nearest even, by whole-number arithmetic.
inline int64_t round_integer(int64_t value, int precision) {
  const int64_t magnitude = value < 0 ? -value : value;
  int shift = 0;
  while (magnitude >> shift >> precision) ++shift;
  if (shift == 0) return value;
  const int64_t half = int64_t{1} << (shift - 1), rest = magnitude & ((int64_t{1} << shift) - 1);
  int64_t kept = magnitude >> shift;
  if (rest > half || (rest == half && (kept & 1))) ++kept;
  return value < 0 ? -(kept << shift) : kept << shift;
}

// 16-byte aligned memory that ends where the data ends.
template <class T>
struct Aligned {
  explicit Aligned(size_t n) : size(n), memory(new uint8_t[n * sizeof(T) + 16]) {
    data = reinterpret_cast<T*>(memory.get() + (16 - reinterpret_cast<uintptr_t>(memory.get()) % 16) % 16);
  }
  size_t size;
  std::unique_ptr<uint8_t[]> memory;
  T* data;
};

template <class Element>
class IntegerProblem {
  static constexpr uint16_t kCanary = 0xABCD;  // no result of these problems
  static constexpr uint16_t kNaN = 0x7FFF;

 public:
  // A layer: some tile rows of the weight. Its y (tokens, rows) lies where those rows would lie if y were transposed.
  // Of the tokens it has `tokens` from first_token on, its other rows of y stay as they were.
  struct Part {
    int first_row, rows, tile_rows;
    int first_token = 0, tokens = 0;
    int y_stride = 0;
    // y begins where row y_row would, at a column where it lies between the rows of the part before.
    int y_row = 0, y_column = 0;
    int64_t payload_offset;
    std::vector<int32_t> words;  // its schedule
  };

  explicit IntegerProblem(const Sizes& s)
      : sizes(s),
        tile_rows(static_cast<int>(ceil_div(s.rows, kTile))),
        tile_cols(static_cast<int>(ceil_div(s.cols, kTile))),
        is_sparse(tile_rows * tile_cols),
        bias(s.rows),
        x(static_cast<size_t>(s.tokens) * x_stride()),
        y(static_cast<size_t>(s.tokens) * s.rows + 2 * kCanaries) {
    std::mt19937 random(s.seed);
    draw_types(random);
    draw_weight(random);
    draw_x(random);
    cut(1);
    expect();
    poison();
  }

  // Layers that one launch computes: the weight is cut between tile rows, into at most as many as there are.
  void cut(int layers) {
    layers = std::min({layers, kMaxLayers, tile_rows});
    parts.clear();
    for (int i = 0; i < layers; ++i) {
      Part part;
      const int first = tile_rows * i / layers, last = tile_rows * (i + 1) / layers;
      part.first_row = kTile * first;
      part.rows = std::min(sizes.rows, kTile * last) - part.first_row;
      part.tile_rows = last - first;
      part.tokens = sizes.tokens, part.y_stride = part.rows, part.y_row = part.first_row;
      const uint8_t* flags = is_sparse.data() + static_cast<size_t>(first) * tile_cols;
      part.payload_offset = cpu::payload_bytes(is_sparse.data(), flags - is_sparse.data());
      part.words.resize(schedule_words(part.tile_rows, tile_cols));
      make_schedule(flags, part.tile_rows, tile_cols, part.words.data());
      parts.push_back(std::move(part));
    }
  }

  // Layers as of experts: each has some rows of x, none at times. Of two beside each other that have as many rows the
  // second writes its y between the rows of the first, as gate and up of an expert do.
  void send_tokens() {
    std::mt19937 random(sizes.seed + 1);
    const int fewer = between(random, 0, 7);  // rows: else all but the last part have whole tiles
    for (Part& part : parts) {
      if (part.rows > fewer) part.rows -= fewer;
      part.y_stride = part.rows;
      part.first_token = between(random, 0, sizes.tokens);
      part.tokens = between(random, 0, sizes.tokens - part.first_token);
    }
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      Part &one = parts[i], &other = parts[i + 1];
      if (one.rows != other.rows || one.y_stride != one.rows) continue;
      other.first_token = one.first_token, other.tokens = one.tokens;
      one.y_stride = other.y_stride = 2 * one.rows;
      other.y_row = one.first_row, other.y_column = one.rows;
    }
  }

  int x_stride() const { return (sizes.cols + 7) / 8 * 8 + 8 * sizes.x_padding; }

  // Where a problem's data lie: here, or where they were copied to.
  struct Places {
    const uint16_t* x;
    const uint8_t* payload;
    const uint16_t* bias;
    uint16_t* y;                        // with its canaries
    std::vector<const int32_t*> words;  // of each part
  };
  Places own_places() {
    Places places{x.data, payload->data, bias.data(), y.data, {}};
    for (const Part& part : parts) places.words.push_back(part.words.data());
    return places;
  }

  // The problem as kernels see it; items and splits are the caller's.
  GemmProblem view() { return view(own_places()); }
  GemmProblem view(const Places& at) const {
    GemmProblem p{};
    p.x = at.x;
    p.tokens = sizes.tokens, p.cols = sizes.cols, p.x_stride = x_stride();
    p.token_ctas = p.row_ctas = p.splits = 1;
    for (const Part& part : parts) {
      GemmLayer& layer = p.layers[p.layer_count++];
      layer.payload = at.payload + part.payload_offset;
      layer.bias = sizes.bias ? at.bias + part.first_row : nullptr;
      layer.y = at.y + y_offset(part);
      layer.rows = part.rows;
      layer.first_token = part.first_token, layer.tokens = part.tokens, layer.y_stride = part.y_stride;
      layer.schedule = schedule_view(at.words[p.layer_count - 1], part.tile_rows, tile_cols);
    }
    return p;
  }

  // What is wrong with y, or "".
  std::string complaint() const {
    for (size_t i = 0; i < kCanaries; ++i) {
      if (y.data[i] != kCanary || y.data[y.size - 1 - i] != kCanary) return "write outside y";
    }
    std::vector<bool> written(y.size);
    for (const Part& part : parts) {
      for (int token = 0; token < part.tokens; ++token) {
        for (int r = 0; r < part.rows; ++r) {
          const size_t at = y_offset(part) + static_cast<size_t>(token) * part.y_stride + r;
          const size_t of_token = static_cast<size_t>(part.first_token + token) * sizes.rows;
          const uint16_t wanted = expected[of_token + part.first_row + r];
          written[at] = true;
          if (y.data[at] == wanted) continue;
          char text[128];
          snprintf(text, sizeof(text), "y[token %d][row %d] is %g, expected %g", token, part.first_row + r,
                   static_cast<double>(Element::widen(y.data[at])), static_cast<double>(Element::widen(wanted)));
          return text;
        }
      }
    }
    for (size_t i = kCanaries; i < y.size - kCanaries; ++i) {
      if (!written[i] && y.data[i] != kNaN) return "write beyond the tokens of a layer";
    }
    return "";
  }

  // Elements before a layer's y.
  size_t y_offset(const Part& part) const {
    return kCanaries + static_cast<size_t>(sizes.tokens) * part.y_row + part.y_column;
  }

  // Canaries around y, NaN in it: as before any kernel ran.
  void poison() {
    std::fill(y.data, y.data + y.size, kCanary);
    std::fill(y.data + kCanaries, y.data + y.size - kCanaries, kNaN);
  }

 private:
  void draw_types(std::mt19937& random) {
    const int tiles = tile_rows * tile_cols, one = between(random, 0, tiles - 1);
    for (int t = 0; t < tiles; ++t) {
      switch (sizes.types) {
        case Types::kRandom:
          is_sparse[t] = between(random, 0, 1) != 0;
          break;
        case Types::kDense:
          is_sparse[t] = 0;
          break;
        case Types::kSparse:
          is_sparse[t] = 1;
          break;
        case Types::kAlternating:
          is_sparse[t] = (t / tile_cols + t % tile_cols) % 2;
          break;
        case Types::kOneSparse:
          is_sparse[t] = t == one;
          break;
      }
    }
  }

  void draw_weight(std::mt19937& random) {
    const size_t count = static_cast<size_t>(sizes.rows) * sizes.cols;
    std::vector<uint16_t> weight(count);
    std::unique_ptr<bool[]> keep(new bool[count]);
    kept_weight.resize(count);
    bias_value.resize(sizes.rows);
    for (int r = 0; r < sizes.rows; ++r) {
      for (int k0 = 0; k0 < sizes.cols; k0 += kGroup) {
        const int real = std::min(kGroup, sizes.cols - k0);
        int bits = 15;
        if (is_sparse[r / kTile * tile_cols + k0 / kTile] && real > kKept) {
          do bits = between(random, 0, (1 << real) - 1);
          while (__builtin_popcount(static_cast<unsigned>(bits)) != kKept);
        }
        for (int j = 0; j < real; ++j) {
          const size_t at = static_cast<size_t>(r) * sizes.cols + k0 + j;
          const int value = between(random, -7, 7);
          weight[at] = Element::round(static_cast<float>(value));
          keep[at] = bits >> j & 1;
          kept_weight[at] = keep[at] ? value : 0;
        }
      }
      bias_value[r] = between(random, -7, 7);
      bias[r] = Element::round(static_cast<float>(bias_value[r]));
    }
    payload = std::make_unique<Aligned<uint8_t>>(cpu::payload_bytes(is_sparse.data(), tile_rows * tile_cols));
    const ParallelFor serial = [](int64_t n, ParallelBody body, void* context) { body(0, n, context); };
    cpu::pack_tiles(weight.data(), keep.get(), is_sparse.data(), sizes.rows, sizes.cols, payload->data, serial);
  }

  void draw_x(std::mt19937& random) {
    std::fill(x.data, x.data + x.size, kNaN);
    x_value.resize(static_cast<size_t>(sizes.tokens) * sizes.cols);
    for (int t = 0; t < sizes.tokens; ++t) {
      for (int k = 0; k < sizes.cols; ++k) {
        const int value = between(random, -4, 4);
        x_value[static_cast<size_t>(t) * sizes.cols + k] = value;
        x.data[static_cast<size_t>(t) * x_stride() + k] = Element::round(static_cast<float>(value));
      }
    }
  }

  void expect() {
    expected.resize(static_cast<size_t>(sizes.tokens) * sizes.rows);
    for (int t = 0; t < sizes.tokens; ++t) {
      for (int r = 0; r < sizes.rows; ++r) {
        const int* w = &kept_weight[static_cast<size_t>(r) * sizes.cols];
        const int* xs = &x_value[static_cast<size_t>(t) * sizes.cols];
        int sum = sizes.bias ? bias_value[r] : 0;
        for (int k = 0; k < sizes.cols; ++k) sum += w[k] * xs[k];
        const int64_t rounded = round_integer(sum, Element::kPrecision);
        expected[static_cast<size_t>(t) * sizes.rows + r] = Element::round(static_cast<float>(rounded));
      }
    }
  }

 public:
  static constexpr size_t kCanaries = 512;
  const Sizes sizes;
  const int tile_rows, tile_cols;
  std::vector<uint8_t> is_sparse;
  std::vector<uint16_t> bias;
  std::vector<Part> parts;
  std::unique_ptr<Aligned<uint8_t>> payload;
  Aligned<uint16_t> x, y;

 private:
  std::vector<int> kept_weight, bias_value, x_value;
  std::vector<uint16_t> expected;
};

}  // namespace patch_kernels
