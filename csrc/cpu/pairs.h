// Many tokens with AVX-512 BF16: a vector holds 16 tokens, and of each the pair of columns that a dot product takes. A
// 2:4 group keeps one of six pairs of its four columns, and its two kept values lie side by side: one instruction does
// a group of a sparse tile, two a group of a dense one. The six pairs of all groups of half a tile are made once for
// its 128 rows; they and the sums stay in L1.
#pragma once

#include <immintrin.h>

#include "lanes_avx512.h"

namespace patch_kernels::cpu {
namespace {

constexpr int kPairs = 6;
constexpr int kHalfGroups = kGroupsPerRow / 2;  // groups of half a tile: 64 columns
constexpr int kVectorTokens = 16;

struct PairTables {
  alignas(64) uint16_t take[kPairs][32];     // words of the pair, from 16 tokens x 4 columns in two vectors
  alignas(64) uint16_t pick[8][2][2][32];    // [s][upper row][half]: half-word of the metadata for groups 0..15
  alignas(64) uint16_t shift[32];            // of a group's nibble
  alignas(64) uint16_t offset[2][32];        // [vectors of tokens - 1]: bytes to the pair of a nibble
  alignas(64) uint16_t group_offset[2][32];  // the same: bytes to a group

  constexpr PairTables() : take(), pick(), shift(), offset(), group_offset() {
    int pair = 0;
    for (int i = 0; i < kGroup; ++i) {
      for (int j = i + 1; j < kGroup; ++j, ++pair) {
        for (int token = 0; token < kVectorTokens; ++token) {
          take[pair][2 * token] = static_cast<uint16_t>(kGroup * token + i);  // 32 and above: the second vector
          take[pair][2 * token + 1] = static_cast<uint16_t>(kGroup * token + j);
        }
        for (int v = 0; v < 2; ++v) offset[v][i | j << 2] = static_cast<uint16_t>(pair * 64 * (v + 1));
      }
    }
    for (int g = 0; g < kHalfGroups; ++g) {
      shift[g] = static_cast<uint16_t>(4 * (g & 3));
      for (int v = 0; v < 2; ++v) group_offset[v][g] = static_cast<uint16_t>(g * kPairs * 64 * (v + 1));
      for (int s = 0; s < 8; ++s) {
        for (int upper = 0; upper < 2; ++upper) {
          for (int half = 0; half < 2; ++half) {
            const int c = kHalfGroups * half + g, row = s + 8 * upper;
            const int word = meta_word(row, c) - meta_word(s & 6, 0);
            pick[s][upper][half][g] = static_cast<uint16_t>(2 * word + meta_shift(row, c) / 16);
          }
        }
      }
    }
  }
};
constexpr PairTables kPair;
constexpr int kFirstPair = 0, kLastPair = 5;  // columns 0, 1 and columns 2, 3: all that a dense tile needs

// x with four columns of a token side by side, groups of columns apart: [block of 32 or 16 tokens][group][token][4].
class GroupedTokens {
 public:
  GroupedTokens(const Tokens& x, ParallelFor parallel)
      : vectors_(x.count > kVectorTokens ? 2 : 1), tile_cols_(ceil_div(x.cols, kTile)) {
    const int64_t width = vectors_ * kVectorTokens, blocks = ceil_div(x.count, width);
    storage_.reset(new uint16_t[blocks * tile_cols_ * kTile * width + 32]);
    const uintptr_t address = reinterpret_cast<uintptr_t>(storage_.get());
    data_ = reinterpret_cast<uint16_t*>((address + 63) / 64 * 64);
    parallel_over(parallel, blocks * tile_cols_, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        uint16_t* to = data_ + item * kTile * width;
        for (int64_t t = 0; t < width; ++t) {
          const int64_t token = item / tile_cols_ * width + t;
          const uint16_t* from = token < x.count ? x.tile(token, item % tile_cols_) : nullptr;
          for (int g = 0; g < kGroupsPerRow; ++g) {
            uint64_t columns = 0;
            if (from) memcpy(&columns, from + kGroup * g, sizeof(columns));
            memcpy(to + (g * width + t) * kGroup, &columns, sizeof(columns));
          }
        }
      }
    });
  }

  int vectors() const { return vectors_; }
  const uint16_t* half_tile(int64_t block, int64_t c, int half) const {
    return data_ + ((block * tile_cols_ + c) * kTile + half * kTile / 2) * vectors_ * kVectorTokens;
  }

 private:
  int vectors_;
  int64_t tile_cols_;
  std::unique_ptr<uint16_t[]> storage_;
  uint16_t* data_;
};

class Pairs {
 public:
  static constexpr int kTokensOfItem = 64;
  static constexpr int64_t kScratchOfValue = sizeof(uint16_t);

  Pairs(const Tokens& x, ParallelFor parallel) : x_(x, parallel) {}

  class Worker {
   public:
    explicit Worker(const Pairs& pairs) : x_(pairs.x_) {}

    void run(const Item& item) {
      if (x_.vectors() == 1) {
        multiply<1>(item);
      } else {
        multiply<2>(item);
      }
    }

   private:
    template <int V>
    void multiply(const Item& item) {
      const Matrix& matrix = *item.matrix;
      const int width = V * kVectorTokens, blocks = static_cast<int>(ceil_div(item.tokens, width));
      memset(sums_, 0, sizeof(float) * kTile * width * blocks);
      TileCursor tile(matrix, item.tile_row);
      for (int64_t c = 0; c < matrix.tile_cols; ++c) {
        TileCursor next = tile;
        if (c + 1 < matrix.tile_cols) next.next();
        for (int half = 0; half < 2; ++half) {
          for (int block = 0; block < blocks; ++block) {
            const uint16_t* x = x_.half_tile(item.token / width + block, c, half);
            float* sums = sums_ + block * kTile * width;
            if (tile.is_sparse()) {
              make_pairs<V, true>(x);
              for (int r = 0; r < kTile; r += kRows) {
                if (block == 0) fetch(next, r, half);
                sparse_rows<V>(tile.at, r, half, sums + r * width);
              }
            } else {
              make_pairs<V, false>(x);
              for (int r = 0; r < kTile; r += kRows) {
                if (block == 0) fetch(next, r, half);
                dense_rows<V>(tile.at, r, half, sums + r * width);
              }
            }
          }
        }
        tile.next();
      }
      const int rows = matrix.rows_of(item.tile_row);
      for (int t = 0; t < item.tokens; ++t) {
        const float* sums = sums_ + t / width * kTile * width + t % width;
        for (int r = 0; r < rows; ++r) {
          store<BFloat16>(matrix, item.tile_row * kTile + r, item.token + t, sums[r * width]);
        }
      }
    }

    // A share of the next tile's bytes, into L2.
    static void fetch(const TileCursor& next, int row, int half) {
      const int bytes = (next.is_sparse() ? kSparseTileBytes : kDenseTileBytes) / (2 * kTile / kRows);
      const uint8_t* at = next.at + (half * (kTile / kRows) + row / kRows) * bytes;
      for (int i = 0; i < bytes; i += 64) prefetch(at + i);
    }

    template <int V, bool kAll>
    void make_pairs(const uint16_t* x) {
      for (int g = 0; g < kHalfGroups; ++g) {
        for (int v = 0; v < V; ++v) {
          const uint16_t* from = x + (g * V + v) * kVectorTokens * kGroup;
          const __m512i low = load512(from), high = load512(from + 32);
          for (int pair = 0; pair < kPairs; pair += kAll ? 1 : kLastPair) {
            const __m512i taken = _mm512_permutex2var_epi16(low, load512(kPair.take[pair]), high);
            _mm512_store_si512(pairs_ + 64 * ((g * kPairs + pair) * V + v), taken);
          }
        }
      }
    }

    // Eight rows of half a sparse tile: with the swizzle undone, four groups of a row are 16 bytes of values and 8 of
    // offsets.
    template <int V>
    void sparse_rows(const uint8_t* tile, int row, int half, float* sums) {
      alignas(64) uint8_t values[kRows][64];
      alignas(64) uint16_t offsets[kRows][32];
      for (int i = 0; i < kRows; ++i) {
        const int r = row + i, s = r & 7;
        const __m512i words = _mm512_permutexvar_epi16(load512(kPair.pick[s][r >> 3 & 1][half]), row_metadata(tile, r));
        const __m512i nibbles = _mm512_and_si512(_mm512_srlv_epi16(words, load512(kPair.shift)), _mm512_set1_epi16(15));
        const __m512i pair = _mm512_permutexvar_epi16(nibbles, load512(kPair.offset[V - 1]));
        _mm512_store_si512(offsets[i], _mm512_add_epi16(pair, load512(kPair.group_offset[V - 1])));
        const __m512i stored = load512(tile + 128 * r + 64 * (half ^ s >> 2));
        _mm512_store_si512(values[i], _mm512_permutexvar_epi64(load512(kRow.order[s & 3]), stored));
      }
      Sums<V> sum(sums);
#pragma GCC unroll 1
      for (int quad = 0; quad < kHalfGroups / 4; ++quad) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          // One load of four groups and shuffles: a load for each group would compete with the pairs for the ports.
          const __m128i four = _mm_load_si128(reinterpret_cast<const __m128i*>(values[i] + 16 * quad));
          const __m512i weights = _mm512_broadcast_i32x4(four);
          uint64_t where;
          memcpy(&where, offsets[i] + 4 * quad, sizeof(where));
          const uint8_t *pair0 = pairs_ + (where & 0xFFFF), *pair1 = pairs_ + (where >> 16 & 0xFFFF);
          const uint8_t *pair2 = pairs_ + (where >> 32 & 0xFFFF), *pair3 = pairs_ + (where >> 48);
          sum.add(i, pair0, _mm512_shuffle_epi32(weights, _MM_PERM_AAAA));
          sum.add(i, pair1, _mm512_shuffle_epi32(weights, _MM_PERM_BBBB));
          sum.add(i, pair2, _mm512_shuffle_epi32(weights, _MM_PERM_CCCC));
          sum.add(i, pair3, _mm512_shuffle_epi32(weights, _MM_PERM_DDDD));
        }
      }
      sum.store(sums);
    }

    template <int V>
    void dense_rows(const uint8_t* tile, int row, int half, float* sums) {
      alignas(64) uint8_t values[kRows][128];
      for (int i = 0; i < kRows; ++i) {
        const int r = row + i, s = r & 7;
        for (int j = 0; j < 2; ++j) {
          const __m512i stored = load512(tile + kSlotBytes * half + 128 * r + 64 * (j ^ s >> 2));
          _mm512_store_si512(values[i] + 64 * j, _mm512_permutexvar_epi64(load512(kRow.order[s & 3]), stored));
        }
      }
      Sums<V> sum(sums);
      for (int g = 0; g < kHalfGroups; ++g) {
#pragma GCC unroll 2
        for (int two = 0; two < 2; ++two) {
          const uint8_t* pair = pairs_ + 64 * (g * kPairs + (two ? kLastPair : kFirstPair)) * V;
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            int weights;
            memcpy(&weights, values[i] + 8 * g + 4 * two, sizeof(weights));
            sum.add(i, pair, _mm512_set1_epi32(weights));
          }
        }
      }
      sum.store(sums);
    }

    static constexpr int kRows = 8;  // 8 or 16 sums in registers: more than the latency of a dot product

    template <int V>
    struct Sums {
      __m512 of[kRows][V];
      explicit Sums(const float* from) {
        for (int i = 0; i < kRows * V; ++i) of[i / V][i % V] = _mm512_load_ps(from + 16 * i);
      }
      void add(int i, const uint8_t* pair, __m512i weights) {
        for (int v = 0; v < V; ++v) {
          of[i][v] = _mm512_dpbf16_ps(of[i][v], (__m512bh)_mm512_load_si512(pair + 64 * v), (__m512bh)weights);
        }
      }
      void store(float* to) const {
        for (int i = 0; i < kRows * V; ++i) _mm512_store_ps(to + 16 * i, of[i / V][i % V]);
      }
    };

    const GroupedTokens& x_;
    alignas(64) uint8_t pairs_[kHalfGroups * kPairs * 2 * 64];  // [group][pair][vector]
    alignas(64) float sums_[kTile * kTokensOfItem];             // [block of tokens][row][token]
  };

 private:
  GroupedTokens x_;
};

}  // namespace
}  // namespace patch_kernels::cpu
