// What the kernels of tile_linear share: the matrix as they walk it, and the rows and tokens of one piece of work.
// Compiled once per instruction set: everything here has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "../format/layout.h"
#include "../math/elements.h"
#include "parallel.h"

namespace patch_kernels::cpu {
namespace {

constexpr int kBlockRows = 16;  // the least piece of a tile row that is worked on: its metadata are one block

// Rows of x as they came, of cols 16-bit values, and their last columns padded with zeros to a whole tile.
struct Tokens {
  const uint16_t* x;
  int64_t count, cols;
  const int64_t* rows;         // of x, or null: 0 to count - 1
  std::vector<uint16_t> tail;  // (count, 128), where cols is no multiple of 128

  explicit Tokens(const TileLinearArgs& args)
      : x(static_cast<const uint16_t*>(args.x)), count(args.tokens), cols(args.weight.cols), rows(args.x_rows) {
    const int64_t left = cols % kTile;
    if (left == 0) return;
    tail.resize(count * kTile, 0);
    for (int64_t t = 0; t < count; ++t) {
      memcpy(tail.data() + t * kTile, row(t) + cols - left, left * sizeof(uint16_t));
    }
  }

  const uint16_t* row(int64_t t) const { return x + (rows ? rows[t] : t) * cols; }

  // Columns [128c, 128c + 128) of token t.
  const uint16_t* tile(int64_t t, int64_t c) const {
    return (c + 1) * kTile <= cols ? row(t) + c * kTile : tail.data() + t * kTile;
  }
};

// A packed weight with where its tile rows begin, its bias, its tokens and its part of y.
struct Matrix {
  const uint8_t* payload;
  const uint8_t* tile_is_sparse;
  int64_t rows, tile_rows, tile_cols;
  const void* bias;
  const Tokens* x;
  void* y;
  const int64_t* y_rows;
  int64_t y_stride;
  std::vector<int64_t> row_begin;  // byte of the first tile of each tile row

  Matrix(const TileLinearArgs& args, const Tokens& tokens)
      : payload(args.weight.payload),
        tile_is_sparse(args.weight.tile_is_sparse),
        rows(args.weight.rows),
        tile_rows(ceil_div(args.weight.rows, kTile)),
        tile_cols(ceil_div(args.weight.cols, kTile)),
        bias(args.bias),
        x(&tokens),
        y(args.y),
        y_rows(args.y_rows),
        y_stride(args.y_stride ? args.y_stride : args.weight.rows),
        row_begin(tile_rows) {
    int64_t begin = 0;
    for (int64_t r = 0; r < tile_rows; ++r) {
      row_begin[r] = begin;
      begin += payload_bytes(tile_is_sparse + r * tile_cols, tile_cols);
    }
  }

  // Rows of a tile row that are in the matrix.
  int rows_of(int64_t tile_row) const {
    const int64_t left = rows - tile_row * kTile;
    return static_cast<int>(left < kTile ? left : kTile);
  }

  template <class T>
  T* row_of_y(int64_t token) const {
    return static_cast<T*>(y) + (y_rows ? y_rows[token] : token) * y_stride;
  }
};

// Walks the tiles of a tile row.
struct TileCursor {
  const uint8_t* at;
  const uint8_t* flag;

  TileCursor(const Matrix& matrix, int64_t tile_row)
      : at(matrix.payload + matrix.row_begin[tile_row]), flag(matrix.tile_is_sparse + tile_row * matrix.tile_cols) {}
  bool is_sparse() const { return *flag != 0; }
  void next() {
    at += tile_bytes(is_sparse());
    ++flag;
  }
};

// Rows [row, row + rows) of a tile row against tokens [token, token + tokens).
struct Item {
  const Matrix* matrix;
  int64_t tile_row;
  int row, rows;
  int64_t token;
  int tokens;
};

// Rounds the finished sum of a row and a token, with the bias, into y.
template <class T>
void store(const Matrix& matrix, int64_t row, int64_t token, float sum) {
  const T* bias = static_cast<const T*>(matrix.bias);
  store_as(bias ? sum + load_as<float>(bias[row]) : sum, matrix.row_of_y<T>(token)[row]);
}

// Into L2: L1 has too few miss buffers. Always inlined, and what calls it too: to GCC 12 a function that only
// prefetches has no effect, so it drops the call.
inline __attribute__((always_inline)) void prefetch(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }

}  // namespace
}  // namespace patch_kernels::cpu
