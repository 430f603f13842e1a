// A row of a tile with AVX2, FMA and F16C: 16 weights of 16 bits in a vector, two 16-byte units of the row. A byte
// shuffle moves within 16 bytes, which are 8 columns of x: the kept columns of a unit come from two of them. The
// swizzle swaps the two units of odd rows: x is prepared for that too where a row is sparse, whose shuffles are the
// bottleneck.
#pragma once

#include <immintrin.h>

#include "few_tokens.h"

namespace patch_kernels::cpu {
namespace {

// Two units as two vectors of fp32. In which order is the packed dtype's, and the same for weights and x.
struct FloatUnits {
  __m256 first, second;
};

inline __m128i load128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline __m256i load256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// Even values, odd values.
struct SplitBFloat16 {
  static FloatUnits widen(__m256i v) {
    const __m256i odd = _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)), _mm256_castsi256_ps(odd)};
  }
  static FloatUnits widen(const uint8_t* unit0, const uint8_t* unit1) {
    return widen(_mm256_set_m128i(load128(unit1), load128(unit0)));
  }
};

// One unit, the other.
struct SplitHalf {
  static FloatUnits widen(__m256i v) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))};
  }
  static FloatUnits widen(const uint8_t* unit0, const uint8_t* unit1) {
    return {_mm256_cvtph_ps(load128(unit0)), _mm256_cvtph_ps(load128(unit1))};
  }
};

// The half-words of a row's eight units lie in 32 bytes: those of units 0, 4, 1, 5 in 16, of 2, 6, 3, 7 in the others.
struct Avx2Tables {
  // [odd row][row in 8..15 of its block][units 4..7]: the unit's half-word, eight times.
  alignas(32) uint8_t pick[2][2][2][32];
  alignas(32) uint16_t raise[16];  // moves the two bits of a kept value to the top of its half-word
  alignas(32) uint16_t base[16];   // bytes of column 0 of the value's group in its 8 columns

  constexpr Avx2Tables() : pick(), raise(), base() {
    for (int lane = 0; lane < 16; ++lane) {
      const int unit = lane / 8, element = lane % 8;
      raise[lane] = static_cast<uint16_t>(1 << (14 - 2 * element));
      base[lane] = static_cast<uint16_t>(0x0100 + 0x0202 * kGroup * (element / 2 % 2));
      for (int odd = 0; odd < 2; ++odd) {
        for (int upper = 0; upper < 2; ++upper) {
          for (int later = 0; later < 2; ++later) {
            const int c0 = 4 * (4 * later + (unit ^ odd)), row = 8 * upper;
            const int byte = 4 * meta_word(row, c0) + meta_shift(row, c0) / 8;
            pick[odd][upper][later][2 * lane] = static_cast<uint8_t>(byte);
            pick[odd][upper][later][2 * lane + 1] = static_cast<uint8_t>(byte + 1);
          }
        }
      }
    }
  }
};
constexpr Avx2Tables kAvx2;

template <class Packed>
struct Avx2Lanes {
  using Sum = __m256;
  static constexpr int kRowsAtOnce = 2;  // they have their swizzle, their words of metadata and x in common

  template <int T, bool kSparse>
  struct XTile;

  // Of each 32 columns: columns 0..7 and 16..23, columns 8..15 and 24..31.
  template <int T>
  struct XTile<T, true> {
    __m256i columns[2][T][4][2];  // [odd row]
    explicit XTile(const uint16_t* const* tokens) {
      for (int t = 0; t < T; ++t) {
        for (int i = 0; i < 8; ++i) {
          const uint16_t* from = tokens[t] + 32 * (i / 2) + 8 * (i % 2);
          const __m128i unit0 = load128(from), unit1 = load128(from + 16);
          columns[0][t][i / 2][i % 2] = _mm256_set_m128i(unit1, unit0);
          columns[1][t][i / 2][i % 2] = _mm256_set_m128i(unit0, unit1);
        }
      }
    }
  };

  template <int T>
  struct XTile<T, false> {
    FloatUnits values[T][8];
    explicit XTile(const uint16_t* const* tokens) {
      for (int t = 0; t < T; ++t) {
        for (int i = 0; i < 8; ++i) values[t][i] = Packed::widen(load256(tokens[t] + 16 * i));
      }
    }
  };

  template <int T>
  static inline __attribute__((always_inline)) void sparse_rows(const uint8_t* tile, int r, const XTile<T, true>& x,
                                                                Sum (&sums)[kRowsAtOnce][T]) {
    const uint8_t *row = tile + 128 * r, *metadata = tile + kSlotBytes + 4 * meta_word(r, 0);
    const int odd = r & 1, swizzle = 16 * (r & 6);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i words = _mm256_broadcastsi128_si256(load128(metadata + 16 * (i & 1)));
      const uint8_t* units = row + (32 * i ^ swizzle);
      FloatUnits weights[kRowsAtOnce];
      __m256i bytes[kRowsAtOnce];
      for (int j = 0; j < kRowsAtOnce; ++j) {
        weights[j] = Packed::widen(load256(units + 8 * 128 * j));
        const __m256i word = _mm256_shuffle_epi8(words, load256(kAvx2.pick[odd][j][i >> 1]));
        const __m256i top =
            _mm256_and_si256(_mm256_mullo_epi16(word, load256(kAvx2.raise)), _mm256_set1_epi16(-0x4000));
        // The column, 0..3, times 0x0202.
        const __m256i doubled = _mm256_mulhi_epu16(top, _mm256_set1_epi16(0x0202 << 2));
        bytes[j] = _mm256_add_epi16(doubled, load256(kAvx2.base));
      }
      for (int t = 0; t < T; ++t) {
        const __m256i early = x.columns[odd][t][i][0], late = x.columns[odd][t][i][1];
        for (int j = 0; j < kRowsAtOnce; ++j) {
          const __m256i kept =
              _mm256_blend_epi32(_mm256_shuffle_epi8(early, bytes[j]), _mm256_shuffle_epi8(late, bytes[j]), 0xCC);
          sums[j][t] = add(sums[j][t], Packed::widen(kept), weights[j]);
        }
      }
    }
  }

  template <int T>
  static inline __attribute__((always_inline)) void dense_rows(const uint8_t* tile, int r, const XTile<T, false>& x,
                                                               Sum (&sums)[kRowsAtOnce][T]) {
    const int swizzle = 16 * (r & 7);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const uint8_t* row = tile + kSlotBytes * (i >> 2) + 128 * r;
      const uint8_t *unit0 = row + (32 * (i & 3) ^ swizzle), *unit1 = row + ((32 * (i & 3) + 16) ^ swizzle);
      for (int j = 0; j < kRowsAtOnce; ++j) {
        const FloatUnits weights = Packed::widen(unit0 + 8 * 128 * j, unit1 + 8 * 128 * j);
        for (int t = 0; t < T; ++t) sums[j][t] = add(sums[j][t], x.values[t][i], weights);
      }
    }
  }

  static Sum add(Sum sum, const FloatUnits& x, const FloatUnits& weights) {
    return _mm256_fmadd_ps(x.second, weights.second, _mm256_fmadd_ps(x.first, weights.first, sum));
  }

  static float total(Sum sum) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
};

template <class T>
struct LanesOf;
template <>
struct LanesOf<BFloat16> {
  using Lanes = Avx2Lanes<SplitBFloat16>;
};
template <>
struct LanesOf<Half> {
  using Lanes = Avx2Lanes<SplitHalf>;
};

}  // namespace
}  // namespace patch_kernels::cpu
