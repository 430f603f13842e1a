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
constexpr int kVectorTokens = 16;

// Groups whose pairs are in L1 at a time, 12 KB: with two vectors of tokens those of half a sparse tile.
constexpr int groups_of_pass(int vectors) { return kGroupsPerRow / vectors; }

struct PairTables {
  alignas(64) uint16_t take[kPairs][32];                // words of the pair, from 16 tokens x 4 columns in two vectors
  alignas(64) uint16_t pick[8][2][kGroupsPerRow];       // [s][upper row]: half-word of the metadata of a group
  alignas(64) uint16_t shift[kGroupsPerRow];            // of its nibble in there
  alignas(64) uint16_t offset[2][32];                   // [vectors of tokens - 1]: bytes to the pair of a nibble
  alignas(64) uint16_t group_offset[2][kGroupsPerRow];  // the same: bytes to a group, from the first of its pass

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
    for (int g = 0; g < kGroupsPerRow; ++g) {
      shift[g] = static_cast<uint16_t>(4 * (g & 3));
      for (int v = 0; v < 2; ++v) {
        group_offset[v][g] = static_cast<uint16_t>(g % groups_of_pass(v + 1) * kPairs * 64 * (v + 1));
      }
      for (int s = 0; s < 8; ++s) {
        for (int upper = 0; upper < 2; ++upper) {
          const int row = s + 8 * upper, word = meta_word(row, g) - meta_word(s & 6, 0);
          pick[s][upper][g] = static_cast<uint16_t>(2 * word + meta_shift(row, g) / 16);
        }
      }
    }
  }
};
constexpr PairTables kPair;
constexpr int kFirstPair = 0, kLastPair = 5;  // columns 0, 1 and columns 2, 3: all that a dense tile needs

// x with kColumns columns of a token side by side: [block of 16 tokens][tile][columns / kColumns][token][kColumns].
template <int kColumns>
class BlockedTokens {
 public:
  static constexpr int kTileValues = kTile * kVectorTokens;  // of a block in a tile

  BlockedTokens(const Tokens& x, ParallelFor parallel) : tile_cols_(ceil_div(x.cols, kTile)) {
    const int64_t items = ceil_div(x.count, kVectorTokens) * tile_cols_;
    storage_.reset(new uint16_t[items * kTileValues + 32]);
    data_ = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(storage_.get()) + 63) / 64 * 64);
    parallel_over(parallel, items, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        uint16_t* to = data_ + item * kTileValues;
        for (int t = 0; t < kVectorTokens; ++t) {
          const int64_t token = item / tile_cols_ * kVectorTokens + t;
          const uint16_t* from = token < x.count ? x.tile(token, item % tile_cols_) : nullptr;
          for (int k = 0; k < kTile; k += kColumns) {
            uint16_t columns[kColumns] = {};
            if (from) memcpy(columns, from + k, sizeof(columns));
            memcpy(to + k * kVectorTokens + t * kColumns, columns, sizeof(columns));
          }
        }
      }
    });
  }

  const uint16_t* tile(int64_t block, int64_t c) const { return data_ + (block * tile_cols_ + c) * kTileValues; }
  int64_t stride() const { return tile_cols_ * kTileValues; }  // from a block to the next

 private:
  int64_t tile_cols_;
  std::unique_ptr<uint16_t[]> storage_;
  uint16_t* data_;
};

// Sums of an item, [block of 16 tokens][row of the tile][token], into y: rounds a vector of tokens at a time, and turns
// rows of tokens into tokens of rows.
inline void store_blocks(const Item& item, const float* sums) {
  const Matrix& matrix = *item.matrix;
  const BFloat16* bias = static_cast<const BFloat16*>(matrix.bias);
  const int64_t row0 = item.tile_row * kTile;
  const int real = matrix.rows_of(item.tile_row), end = item.row + item.rows < real ? item.row + item.rows : real;
  for (int first = 0; first < item.tokens; first += kVectorTokens, sums += kTile * kVectorTokens) {
    BFloat16 rounded[kTile * kVectorTokens];
    for (int r = item.row; r < end; ++r) {
      const float added = bias ? load_as<float>(bias[row0 + r]) : 0.0f;
      for (int i = r * kVectorTokens; i < (r + 1) * kVectorTokens; ++i) store_as(sums[i] + added, rounded[i]);
    }
    for (int t = 0; t < kVectorTokens && first + t < item.tokens; ++t) {
      BFloat16* y = matrix.row_of_y<BFloat16>(item.token + first + t) + row0;
      for (int r = item.row; r < end; ++r) y[r] = rounded[r * kVectorTokens + t];
    }
  }
}

class Pairs {
 public:
  static constexpr int kTokensOfItem = 256, kLeastTokens = 32;  // of an item
  static constexpr int kLeastRows = 32;
  static constexpr int64_t kScratchOfValue = sizeof(uint16_t);

  Pairs(const Tokens& x, ParallelFor parallel) : x_(x, parallel) {}

  class Worker {
   public:
    explicit Worker(const Pairs& pairs) : x_(pairs.x_) {}

    void run(const Item& item) {
      const Matrix& matrix = *item.matrix;
      const int blocks = static_cast<int>(ceil_div(item.tokens, kVectorTokens));
      row_ = item.row;
      end_ = item.row + item.rows;
      memset(sums_, 0, sizeof(float) * kTile * kVectorTokens * blocks);
      TileCursor tile(matrix, item.tile_row);
      for (int64_t c = 0; c < matrix.tile_cols; ++c) {
        TileCursor next = tile;
        if (c + 1 < matrix.tile_cols) next.next();
        for (int block = 0; block < blocks; block += 2) {
          const uint16_t* x = x_.tile(item.token / kVectorTokens + block, c);
          float* sums = sums_ + block * kTile * kVectorTokens;
          const TileCursor* after = block == 0 ? &next : nullptr;
          if (block + 1 < blocks) {
            multiply<2>(tile, x, sums, after);
          } else {
            multiply<1>(tile, x, sums, after);
          }
        }
        tile.next();
      }
      store_blocks(item, sums_);
    }

   private:
    template <int V>
    void multiply(const TileCursor& tile, const uint16_t* x, float* sums, const TileCursor* after) {
      if (tile.is_sparse()) {
        sparse<V>(tile.at, x, sums, after);
      } else {
        dense<V>(tile.at, x, sums, after);
      }
    }

    // The share of a tile's bytes that goes with kRows of its rows, in their order: the memory likes that best.
    static inline __attribute__((always_inline)) void fetch(const TileCursor& tile, int row) {
      const int bytes = tile_bytes(tile.is_sparse()) / (kTile / kRows);
      const uint8_t* at = tile.at + row / kRows * bytes;
      for (int i = 0; i < bytes; i += 64) prefetch(at + i);
    }

    template <int V>
    void sparse(const uint8_t* tile, const uint16_t* x, float* sums, const TileCursor* after) {
      constexpr int kGroups = groups_of_pass(V);
      for (int first = 0; first < kGroupsPerRow; first += kGroups) {
        make_pairs<V, 1>(x + first * kGroup * kVectorTokens, kGroups);
        for (int r = row_; r < end_; r += kRows) {
          if (after && first == 0) fetch(*after, r);
          sparse_rows<V>(tile, r, first, sums + r * kVectorTokens);
        }
      }
    }

    template <int V>
    void dense(const uint8_t* tile, const uint16_t* x, float* sums, const TileCursor* after) {
      make_pairs<V, kLastPair - kFirstPair>(x, kGroupsPerRow);
      for (int r = row_; r < end_; r += kRows) {
        if (after) fetch(*after, r);
        dense_rows<V>(tile, r, sums + r * kVectorTokens);
      }
    }

    // Every kStep-th of the pairs, those of a group side by side.
    template <int V, int kStep>
    void make_pairs(const uint16_t* x, int groups) {
      uint8_t* to = pairs_;
      for (int g = 0; g < groups; ++g) {
        for (int pair = 0; pair < kPairs; pair += kStep) {
          for (int v = 0; v < V; ++v, to += 64) {
            const uint16_t* from = x + v * x_.stride() + g * kVectorTokens * kGroup;
            const __m512i taken =
                _mm512_permutex2var_epi16(load512(from), load512(kPair.take[pair]), load512(from + 32));
            _mm512_store_si512(to, taken);
          }
        }
      }
    }

    // Eight rows, which begin at a multiple of eight: their swizzles are 0 to 7.
    template <int V>
    void sparse_rows(const uint8_t* tile, int row, int first_group, float* sums) {
      alignas(64) uint16_t offsets[kRows][kGroupsPerRow];
      for (int i = 0; i < kRows; ++i) {
        const __m512i words =
            _mm512_permutexvar_epi16(load512(kPair.pick[i][row >> 3 & 1]), row_metadata(tile, row + i));
        const __m512i nibbles = _mm512_and_si512(_mm512_srlv_epi16(words, load512(kPair.shift)), _mm512_set1_epi16(15));
        const __m512i pair = _mm512_permutexvar_epi16(nibbles, load512(kPair.offset[V - 1]));
        _mm512_store_si512(offsets[i], _mm512_add_epi16(pair, load512(kPair.group_offset[V - 1])));
      }
      Sums<V> sum(sums);
      const uint8_t* rows = tile + 128 * row;
      for (int unit = first_group / 4; unit < first_group / 4 + groups_of_pass(V) / 4; ++unit) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          // One load of four groups and shuffles: a load for each group would compete with the pairs for the ports.
          const uint8_t* four = rows + 128 * i + 16 * (unit ^ i);
          const __m512i weights = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(four)));
          uint64_t where;
          memcpy(&where, offsets[i] + 4 * unit, sizeof(where));
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
    void dense_rows(const uint8_t* tile, int row, float* sums) {
      Sums<V> sum(sums);
      const uint8_t* pair = pairs_;
      for (int slot = 0; slot < 2; ++slot) {
        const uint8_t* rows = tile + kSlotBytes * slot + 128 * row;
#pragma GCC unroll 1
        for (int unit = 0; unit < 8; ++unit) {
#pragma GCC unroll 4
          for (int two = 0; two < 4; ++two, pair += 64 * V) {
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
              int weights;
              memcpy(&weights, rows + 128 * i + 16 * (unit ^ i) + 4 * two, sizeof(weights));
              sum.add(i, pair, _mm512_set1_epi32(weights));
            }
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
        for (int v = 0; v < V; ++v) {
          for (int i = 0; i < kRows; ++i) of[i][v] = _mm512_load_ps(from + (v * kTile + i) * kVectorTokens);
        }
      }
      void add(int i, const uint8_t* pair, __m512i weights) {
        for (int v = 0; v < V; ++v) {
          of[i][v] = _mm512_dpbf16_ps(of[i][v], (__m512bh)_mm512_load_si512(pair + 64 * v), (__m512bh)weights);
        }
      }
      void store(float* to) const {
        for (int v = 0; v < V; ++v) {
          for (int i = 0; i < kRows; ++i) _mm512_store_ps(to + (v * kTile + i) * kVectorTokens, of[i][v]);
        }
      }
    };

    const BlockedTokens<kGroup>& x_;
    int row_ = 0, end_ = 0;                                   // of the item
    alignas(64) uint8_t pairs_[kGroupsPerRow * kPairs * 64];  // [group][pair][vector]; a dense tile needs less
    alignas(64) float sums_[kTile * kTokensOfItem];           // [block of 16 tokens][row][token]
  };

 private:
  BlockedTokens<kGroup> x_;
};

}  // namespace
}  // namespace patch_kernels::cpu
