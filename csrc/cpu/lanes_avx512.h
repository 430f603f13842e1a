// A row of a tile with AVX-512 (F, BW, VL): 32 weights of 16 bits in a vector. Dot is the arithmetic of a packed dtype:
// with the dot product of AVX-512 BF16, or by fp32 after a conversion.
#pragma once

#include <immintrin.h>

#include "few_tokens.h"

namespace patch_kernels::cpu {
namespace {

// sum[i] += x[2i] * w[2i] + x[2i+1] * w[2i+1].
struct ShiftedBFloat16 {
  using Storage = BFloat16;
  struct Weights {
    __m512 low, high;
  };
  static __m512 low(__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
  static __m512 high(__m512i v) {
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
  static Weights weights(__m512i v) { return {low(v), high(v)}; }
  static __m512 dot(__m512 sum, __m512i x, const Weights& w) {
    return _mm512_fmadd_ps(high(x), w.high, _mm512_fmadd_ps(low(x), w.low, sum));
  }
};

// Here lane i has x[i] * w[i] + x[16+i] * w[16+i].
struct ConvertedHalf {
  using Storage = Half;
  struct Weights {
    __m512 low, high;
  };
  static __m512 low(__m512i v) { return _mm512_cvtph_ps(_mm512_castsi512_si256(v)); }
  static __m512 high(__m512i v) { return _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1)); }
  static Weights weights(__m512i v) { return {low(v), high(v)}; }
  static __m512 dot(__m512 sum, __m512i x, const Weights& w) {
    return _mm512_fmadd_ps(high(x), w.high, _mm512_fmadd_ps(low(x), w.low, sum));
  }
};

#if defined(__AVX512BF16__)
struct DotBFloat16 {
  using Storage = BFloat16;
  using Weights = __m512bh;
  static Weights weights(__m512i v) { return (__m512bh)v; }
  static __m512 dot(__m512 sum, __m512i x, Weights w) { return _mm512_dpbf16_ps(sum, (__m512bh)x, w); }
};
#endif

// Rows are XOR-swizzled: 16-byte unit u of row r lies at u ^ (r & 7). With s = r & 7 a vector of 64 bytes moves by
// s >> 2 and its four units are in the order of s & 3. "Half" j is columns [64j, 64j + 64) of a sparse row (one vector
// of kept values) or vector j of a slot row.
struct RowTables {
  alignas(64) uint16_t pick[8][2][2][32];  // [s][row in 8..15 of its block][half]: half-word of the metadata, per lane
  alignas(64) uint16_t base[4][32];        // [s & 3]: first column of the lane's group, in its half
  alignas(64) uint16_t shift[32];          // of the lane's two bits in its half-word
  alignas(64) uint64_t order[4][8];        // [s & 3]: where the 64-bit words of a vector lie

  constexpr RowTables() : pick(), base(), shift(), order() {
    for (int lane = 0; lane < 32; ++lane) {
      const int unit = lane / 8, element = lane % 8;
      shift[lane] = static_cast<uint16_t>(2 * element);
      for (int s = 0; s < 4; ++s) base[s][lane] = static_cast<uint16_t>(16 * (unit ^ s) + kGroup * (element / 2));
      for (int s = 0; s < 8; ++s) {
        for (int upper = 0; upper < 2; ++upper) {
          for (int half = 0; half < 2; ++half) {
            // A vector of metadata holds the words of rows s & ~1 and s | 1 of the block.
            const int c0 = 4 * ((4 * (half ^ s >> 2) + unit) ^ s), row = s + 8 * upper;
            const int word = meta_word(row, c0) - meta_word(s & 6, 0);
            pick[s][upper][half][lane] = static_cast<uint16_t>(2 * word + meta_shift(row, c0) / 16);
          }
        }
      }
    }
    for (int s = 0; s < 4; ++s) {
      for (int word = 0; word < 8; ++word) order[s][word] = static_cast<uint64_t>(2 * (word / 2 ^ s) + word % 2);
    }
  }
};
constexpr RowTables kRow;

inline __m512i load512(const void* from) { return _mm512_loadu_si512(from); }

// Metadata of row r and its neighbour r ^ 1.
inline __m512i row_metadata(const uint8_t* tile, int r) {
  return load512(tile + kSlotBytes + 4 * meta_word(r & ~9, 0));
}

template <class Dot>
struct Avx512Lanes {
  using Sum = __m512;
  static constexpr int kRowsAtOnce = 1;

  template <int T, bool kSparse>
  struct XTile {
    __m512i vectors[T][4];
    explicit XTile(const uint16_t* const* tokens) {
      for (int t = 0; t < T; ++t) {
        for (int i = 0; i < 4; ++i) vectors[t][i] = load512(tokens[t] + 32 * i);
      }
    }
  };

  template <int T>
  static inline __attribute__((always_inline)) void sparse_rows(const uint8_t* tile, int r, const XTile<T, true>& x,
                                                                Sum (&rows)[1][T]) {
    Sum(&sums)[T] = rows[0];
    const int s = r & 7;
    const __m512i metadata = row_metadata(tile, r), base = load512(kRow.base[s & 3]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i words = _mm512_permutexvar_epi16(load512(kRow.pick[s][r >> 3 & 1][half]), metadata);
      const __m512i bits = _mm512_srlv_epi16(words, load512(kRow.shift));
      const __m512i columns = _mm512_ternarylogic_epi64(bits, _mm512_set1_epi16(3), base, 0xEA);  // bits & 3 | base
      const auto weights = Dot::weights(load512(tile + 128 * r + 64 * (half ^ s >> 2)));
      for (int t = 0; t < T; ++t) {
        const __m512i kept = _mm512_permutex2var_epi16(x.vectors[t][2 * half], columns, x.vectors[t][2 * half + 1]);
        sums[t] = Dot::dot(sums[t], kept, weights);
      }
    }
  }

  template <int T>
  static inline __attribute__((always_inline)) void dense_rows(const uint8_t* tile, int r, const XTile<T, false>& x,
                                                               Sum (&rows)[1][T]) {
    Sum(&sums)[T] = rows[0];
    const int s = r & 7;
    const __m512i order = load512(kRow.order[s & 3]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint8_t* at = tile + kSlotBytes * (i >> 1) + 128 * r + 64 * ((i & 1) ^ s >> 2);
      const auto weights = Dot::weights(_mm512_permutexvar_epi64(order, load512(at)));
      for (int t = 0; t < T; ++t) sums[t] = Dot::dot(sums[t], x.vectors[t][i], weights);
    }
  }

  static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

template <class T>
struct LanesOf;
template <>
struct LanesOf<BFloat16> {
#if defined(__AVX512BF16__)
  using Dot = DotBFloat16;
#else
  using Dot = ShiftedBFloat16;
#endif
  using Lanes = Avx512Lanes<Dot>;
};
template <>
struct LanesOf<Half> {
  using Dot = ConvertedHalf;
  using Lanes = Avx512Lanes<Dot>;
};

}  // namespace
}  // namespace patch_kernels::cpu
