// A few tokens: time is the bytes of the weight over the memory's bandwidth. A vector holds weights of one row,
// straight from the packed bytes; x comes to them: in the order of the row's 16-byte units, and for a sparse row only
// the columns that it kept. The sums of a row and a token are a vector to the end, so a result does not depend on how
// many tokens there are, nor on how rows are dealt out.
//
// Lanes is how an instruction set does a row (lanes_*.h):
//   Sum                        a vector of partial sums
//   XTile<T, kSparse>          128 columns of T tokens, made from T pointers, for rows of a sparse or a dense tile
//   kRowsAtOnce                1, or 2: rows r and r + 8 of a block
//   sparse_rows<T>(tile, r, x, sums), dense_rows<T>(...)   these rows of a tile times T tokens, added to their sums
//   total(sum)                 of all lanes
#pragma once

#include "tile_linear.h"

namespace patch_kernels::cpu {
namespace {

constexpr int kFewTokensAtOnce = 64;   // tokens of an item
constexpr int kSumsInL1 = 256;         // rows x tokens of an item that is chosen by cache alone
constexpr int kTokensInRegisters = 4;  // of x, whose 128 columns are four vectors of 512 bits a token
constexpr int kBlocksAhead = 4;        // prefetched, 8 to 16 KB: measured on Zen 4, flat from 3 to 6

// Rows of an item of 1 to kFewTokensAtOnce tokens.
inline int few_tokens_rows(int tokens) {
  const int rows = kSumsInL1 / tokens;
  return rows >= kTile ? kTile : rows >= 64 ? 64 : rows >= 32 ? 32 : kBlockRows;
}

// The bytes of a block of rows that will be worked on: values, and the second slot or the metadata.
struct Ahead {
  const uint8_t *values, *second;
  int second_step;

  Ahead(const TileCursor& tile, int row)
      : values(tile.at + 128 * row),
        second(tile.at + kSlotBytes + (tile.is_sparse() ? 16 : 128) * row),
        second_step(tile.is_sparse() ? 16 : 128) {}
  inline __attribute__((always_inline)) void fetch(int r) const {
    prefetch(values + 128 * r);
    prefetch(values + 128 * r + 64);
    prefetch(second + second_step * r);
    prefetch(second + second_step * r + 64);
  }
};

template <class Lanes, class Value>
class FewTokens {
  using Sum = typename Lanes::Sum;

 public:
  // upcoming: the item after this one, whose first bytes are fetched by then, or null.
  static void run(const Item& item, const Item* upcoming) {
    constexpr int kSums = kFewTokensAtOnce * kBlockRows;
    static_assert(kSums >= kSumsInL1, "few_tokens_rows x tokens of any item");
    alignas(64) Sum sums[kSums];
    memset(static_cast<void*>(sums), 0, sizeof(Sum) * item.rows * item.tokens);
    const Matrix& matrix = *item.matrix;
    const Tokens& x = *matrix.x;
    TileCursor tile(matrix, item.tile_row);
    for (int64_t c = 0; c < matrix.tile_cols; ++c) {
      Next next{tile, item.row};
      if (c + 1 < matrix.tile_cols) {
        next.tile.next();
      } else if (upcoming) {
        next = {TileCursor(*upcoming->matrix, upcoming->tile_row), upcoming->row};
      }
      for (int t = 0; t < item.tokens; t += kTokensInRegisters) {
        const uint16_t* tokens[kTokensInRegisters];
        const int count = item.tokens - t < kTokensInRegisters ? item.tokens - t : kTokensInRegisters;
        for (int i = 0; i < count; ++i) tokens[i] = x.tile(item.token + t + i, c);
        const Next* ahead = t == 0 ? &next : nullptr;
        switch (count) {
          case 1:
            rows<1>(item, tile, ahead, tokens, sums + t);
            break;
          case 2:
            rows<2>(item, tile, ahead, tokens, sums + t);
            break;
          case 3:
            rows<3>(item, tile, ahead, tokens, sums + t);
            break;
          default:
            rows<4>(item, tile, ahead, tokens, sums + t);
        }
      }
      tile.next();
    }
    for (int r = 0; r < item.rows; ++r) {
      const int64_t row = item.tile_row * kTile + item.row + r;
      if (row >= matrix.rows) break;
      for (int t = 0; t < item.tokens; ++t) {
        store<Value>(matrix, row, item.token + t, Lanes::total(sums[r * item.tokens + t]));
      }
    }
  }

 private:
  // The tile that follows and the row of it where the work goes on.
  struct Next {
    TileCursor tile;
    int row;
  };

  // All rows of the item times T tokens. next: the tile whose bytes are fetched when those of this one are, or null.
  template <int T>
  static void rows(const Item& item, const TileCursor& tile, const Next* next, const uint16_t* const* tokens,
                   Sum* sums) {
    if (tile.is_sparse()) {
      rows<T, true>(item, tile, next, tokens, sums);
    } else {
      rows<T, false>(item, tile, next, tokens, sums);
    }
  }

  template <int T, bool kSparse>
  static void rows(const Item& item, const TileCursor& tile, const Next* next, const uint16_t* const* tokens,
                   Sum* sums) {
    const typename Lanes::template XTile<T, kSparse> x(tokens);
    for (int row = 0; row < item.rows; row += kBlockRows) {
      // The block that is kBlocksAhead later in this walk: further down, or in the next tile.
      const int later = row + kBlocksAhead * kBlockRows;
      const bool in_this = later < item.rows || !next;
      const Ahead ahead(in_this ? tile : next->tile, (in_this ? item.row : next->row) + later % item.rows);
      block<T, kSparse>(tile.at, item.row + row, next != nullptr, ahead, x, sums + row * item.tokens, item.tokens);
    }
  }

  template <int T, bool kSparse>
  static inline __attribute__((always_inline)) void block(const uint8_t* tile, int row, bool fetch, const Ahead& ahead,
                                                          const typename Lanes::template XTile<T, kSparse>& x,
                                                          Sum* sums, int stride) {
    constexpr int kAtOnce = Lanes::kRowsAtOnce;
    for (int r = 0; r < kBlockRows / kAtOnce; ++r) {
      Sum sum[kAtOnce][T];
      for (int i = 0; i < kAtOnce; ++i) {
        if (fetch) ahead.fetch(r + 8 * i);
        for (int t = 0; t < T; ++t) sum[i][t] = sums[(r + 8 * i) * stride + t];
      }
      if constexpr (kSparse) {
        Lanes::template sparse_rows<T>(tile, row + r, x, sum);
      } else {
        Lanes::template dense_rows<T>(tile, row + r, x, sum);
      }
      for (int i = 0; i < kAtOnce; ++i) {
        for (int t = 0; t < T; ++t) sums[(r + 8 * i) * stride + t] = sum[i][t];
      }
    }
  }
};

}  // namespace
}  // namespace patch_kernels::cpu
