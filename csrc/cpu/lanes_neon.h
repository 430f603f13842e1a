// A row of a tile with NEON as every 64-bit ARM has it: 8 weights of 16 bits in a vector, one 16-byte unit of the row.
// The kept columns of a unit come from 16 columns of x by one table look-up.
#pragma once

#include <arm_neon.h>

#include "few_tokens.h"

namespace patch_kernels::cpu {
namespace {

// Sums in fp32 of a unit that was widened to two vectors. In which order is the packed dtype's, and the same for
// weights and x.
struct FloatUnit {
  float32x4_t first, second;
};
struct FloatSums {
  using Sum = FloatUnit;
  static void add(Sum& sum, const FloatUnit& x, const FloatUnit& weights) {
    sum.first = vfmaq_f32(sum.first, x.first, weights.first);
    sum.second = vfmaq_f32(sum.second, x.second, weights.second);
  }
  static float total(const Sum& sum) { return vaddvq_f32(vaddq_f32(sum.first, sum.second)); }
};

// Even values, odd values.
struct SplitBFloat16 : FloatSums {
  using Unit = FloatUnit;
  static Unit unit(uint16x8_t v) {
    const uint32x4_t words = vreinterpretq_u32_u16(v);
    const uint32x4_t odd = vandq_u32(words, vdupq_n_u32(0xFFFF0000u));
    return {vreinterpretq_f32_u32(vshlq_n_u32(words, 16)), vreinterpretq_f32_u32(odd)};
  }
};

// Values 0..3, values 4..7.
struct SplitHalf : FloatSums {
  using Unit = FloatUnit;
  static Unit unit(uint16x8_t v) {
    const float16x8_t halves = vreinterpretq_f16_u16(v);
    return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_f32_f16(vget_high_f16(halves))};
  }
};

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
struct DotBFloat16 {
  using Sum = float32x4_t;
  using Unit = bfloat16x8_t;
  static Unit unit(uint16x8_t v) { return vreinterpretq_bf16_u16(v); }
  static void add(Sum& sum, Unit x, Unit weights) { sum = vbfdotq_f32(sum, x, weights); }
  static float total(Sum sum) { return vaddvq_f32(sum); }
};
#endif

struct NeonTables {
  alignas(16) int16_t shift[8];  // of a kept value's two bits in the half-word of its unit, to the right
  alignas(16) uint16_t base[8];  // bytes of column 0 of its group in the unit's 16 columns

  constexpr NeonTables() : shift(), base() {
    for (int i = 0; i < 8; ++i) {
      shift[i] = static_cast<int16_t>(-2 * i);
      base[i] = static_cast<uint16_t>(0x0100 + 0x0202 * kGroup * (i / 2));
    }
  }
};
constexpr NeonTables kNeon;

template <class Dot>
struct NeonLanes {
  using Sum = typename Dot::Sum;
  using Unit = typename Dot::Unit;
  static constexpr int kRowsAtOnce = 2;  // they have their swizzle and x in common

  template <int T, bool kSparse>
  struct XTile;

  template <int T>
  struct XTile<T, true> {
    uint8x16x2_t columns[T][8];
    explicit XTile(const uint16_t* const* tokens) {
      for (int t = 0; t < T; ++t) {
        for (int u = 0; u < 8; ++u) {
          const uint16_t* from = tokens[t] + 16 * u;
          columns[t][u] = {{vreinterpretq_u8_u16(vld1q_u16(from)), vreinterpretq_u8_u16(vld1q_u16(from + 8))}};
        }
      }
    }
  };

  template <int T>
  struct XTile<T, false> {
    Unit values[T][16];
    explicit XTile(const uint16_t* const* tokens) {
      for (int t = 0; t < T; ++t) {
        for (int u = 0; u < 16; ++u) values[t][u] = Dot::unit(vld1q_u16(tokens[t] + 8 * u));
      }
    }
  };

  template <int T>
  static inline __attribute__((always_inline)) void sparse_rows(const uint8_t* tile, int r, const XTile<T, true>& x,
                                                                Sum (&sums)[kRowsAtOnce][T]) {
    const int16x8_t shift = vld1q_s16(kNeon.shift);
    const uint16x8_t base = vld1q_u16(kNeon.base);
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) {
      Unit weights[kRowsAtOnce];
      uint8x16_t bytes[kRowsAtOnce];
      for (int j = 0; j < kRowsAtOnce; ++j) {
        const int row = r + 8 * j;
        const uint8_t* metadata = tile + kSlotBytes + 4 * meta_word(row, 4 * u) + meta_shift(row, 4 * u) / 8;
        const uint16x8_t word = vld1q_dup_u16(reinterpret_cast<const uint16_t*>(metadata));
        const uint16x8_t column = vandq_u16(vshlq_u16(word, shift), vdupq_n_u16(3));
        bytes[j] = vreinterpretq_u8_u16(vmlaq_n_u16(base, column, 0x0202));
        weights[j] = Dot::unit(load(tile + swizzle128(row, 16 * u)));
      }
      for (int t = 0; t < T; ++t) {
        for (int j = 0; j < kRowsAtOnce; ++j) {
          const uint16x8_t kept = vreinterpretq_u16_u8(vqtbl2q_u8(x.columns[t][u], bytes[j]));
          Dot::add(sums[j][t], Dot::unit(kept), weights[j]);
        }
      }
    }
  }

  template <int T>
  static inline __attribute__((always_inline)) void dense_rows(const uint8_t* tile, int r, const XTile<T, false>& x,
                                                               Sum (&sums)[kRowsAtOnce][T]) {
#pragma GCC unroll 16
    for (int u = 0; u < 16; ++u) {
      for (int j = 0; j < kRowsAtOnce; ++j) {
        const Unit weights = Dot::unit(load(tile + dense_offset(r + 8 * j, 8 * u)));
        for (int t = 0; t < T; ++t) Dot::add(sums[j][t], x.values[t][u], weights);
      }
    }
  }

  static uint16x8_t load(const uint8_t* from) { return vreinterpretq_u16_u8(vld1q_u8(from)); }

  static float total(const Sum& sum) { return Dot::total(sum); }
};

template <class T>
struct LanesOf;
template <>
struct LanesOf<BFloat16> {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  using Lanes = NeonLanes<DotBFloat16>;
#else
  using Lanes = NeonLanes<SplitBFloat16>;
#endif
};
template <>
struct LanesOf<Half> {
  using Lanes = NeonLanes<SplitHalf>;
};

}  // namespace
}  // namespace patch_kernels::cpu
