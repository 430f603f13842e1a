// Arithmetic of a PATCH mask for one group of four weights (PATCH, arXiv 2509.23410, section 3): noise, pattern
// probabilities, mask, and their derivatives. Written once: the CPU runs it on kLanes groups at a time (every loop over
// lanes is vectorised by the compiler), CUDA runs it with one lane per thread.
//
// Forward and backward call the same functions and nothing is contracted behind their back, so both see the same mask
// bit for bit. On the CPU they are IEEE additions and multiplications alone: every instruction set gives the same bits.
// A GPU takes its own log2, exp2 and reciprocal (mul_add and the functions below it), which differ from those by about
// 2^-22.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "layout.h"

namespace patch_kernels {
namespace {  // internal linkage: this header is compiled once per instruction set

constexpr int kPatterns = 6;
constexpr uint32_t kTileStreamBit = 1u << 31;  // of the fourth counter word: tile noise
constexpr double kLog2E = 1.4426950408889634;

struct NoiseKey {
  uint64_t seed;
  uint32_t layer;
  uint32_t draw;
  bool enabled;
};

PK_HD NoiseKey noise_key(const int64_t* key, uint32_t layer) {
  if (!key) return {0, layer, 0, false};
  return {static_cast<uint64_t>(key[0]), layer, static_cast<uint32_t>(key[1]), true};
}

// exponent of 2 = logit * scale + log2-noise * noise; of patterns and of tiles.
template <class Real>
struct Factors {
  Real logit;     // log2(e) * scale / temperature
  Real noise;     // 1 / temperature
  Real gradient;  // scale / temperature
};
template <class Real>
PK_HD Factors<Real> make_factors(double inverse_temperature, double scale_over_temperature) {
  return {static_cast<Real>(kLog2E * scale_over_temperature), static_cast<Real>(inverse_temperature),
          static_cast<Real>(scale_over_temperature)};
}

template <class To, class From>
PK_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

PK_HD uint64_t multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // as C++, nvcc adds the zero upper half of a
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011). Counters are updated in place.
template <int kLanes>
PK_HD void philox(uint32_t (&c0)[kLanes], uint32_t (&c1)[kLanes], uint32_t (&c2)[kLanes], uint32_t (&c3)[kLanes],
                  uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t product0 = multiply_wide(c0[l], 0xD2511F53u);
      const uint64_t product1 = multiply_wide(c2[l], 0xCD9E8D57u);
      c0[l] = static_cast<uint32_t>(product1 >> 32) ^ c1[l] ^ key0;
      c1[l] = static_cast<uint32_t>(product1);
      c2[l] = static_cast<uint32_t>(product0 >> 32) ^ c3[l] ^ key1;
      c3[l] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// a * b + c: fused where that is exact to predict (a GPU), two roundings on every CPU.
PK_HD float mul_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}
PK_HD double mul_add(double a, double b, double c) { return a * b + c; }

// log2 of a positive normal number, absolute error 2^-22 for results near 0 (PTX ISA, lg2.approx), relative elsewhere.
PK_HD float log2_positive(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  // The mantissa is reduced to [1/sqrt2, sqrt2).
  const int32_t bits = bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float f = bit_cast<float>(bits - exponent * (1 << 23)) - 1.0f;
  float p = 0.12583689391613007f;
  p = p * f - 0.20726968348026276f;
  p = p * f + 0.21571561694145203f;
  p = p * f - 0.23894482851028442f;
  p = p * f + 0.28791624307632446f;
  p = p * f - 0.3607036769390106f;
  p = p * f + 0.48091062903404236f;
  p = p * f - 0.7213473320007324f;
  p = p * f + 1.4426950216293335f;
  return p * f + static_cast<float>(exponent);
#endif
}
PK_HD double log2_positive(double x) { return ::log2(x); }

// 2^x for x <= 0, relative error 2^-22; 0 below 2^-126. NaN stays NaN.
PK_HD float exp2_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float clamped = x < -126.0f ? -126.0f : x;
  const float shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the sum's low mantissa bits are round(clamped)
  const float f = clamped - (shifted - 12582912.0f);
  float p = 0.00015345810970757157f;
  p = p * f + 0.0013399930903688073f;
  p = p * f + 0.009618489071726799f;
  p = p * f + 0.05550328642129898f;
  p = p * f + 0.24022646248340607f;
  p = p * f + 0.6931471824645996f;
  p = p * f + 1.0f;
  const uint32_t scale = (static_cast<uint32_t>(bit_cast<int32_t>(shifted) - 0x4B400000) + 127u) << 23;
  const float result = p * bit_cast<float>(scale);
  return x < -126.0f ? 0.0f : result;
#endif
}
PK_HD double exp2_nonpositive(double x) { return ::exp2(x); }

// The larger one; of NaN and a number, the number (b may not be NaN).
PK_HD float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}
PK_HD double larger(double a, double b) { return a > b ? a : b; }

PK_HD float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}
PK_HD double reciprocal(double x) { return 1.0 / x; }

// 21 random bits to u = (bits + 0.5) / 2^21: exact in fp32 and strictly inside (0, 1), as is 1 - u.
PK_HD float uniform21(uint32_t bits, float) {
  return bit_cast<float>(0x3F800000u | bits << 2) - 0.99999976158142089844f;  // 1 + bits / 2^21, less 1 - 2^-22
}
PK_HD double uniform21(uint32_t bits, double) {
  return (static_cast<double>(static_cast<int32_t>(bits)) + 0.5) * (1.0 / 2097152.0);
}

// -log2(u), an exponential variate in units of ln 2. The largest Gumbel values come from u near 1, where a log2 with an
// absolute error is no longer right: 1 % of the result at u = 1 - 2^-15, all of it at the last u. There -log2(1 - t) is
// its series, whose relative error is below t^5 / 6.
template <class Real>
PK_HD Real exponential(uint32_t bits) {
  const Real u = uniform21(bits, Real(0)), t = Real(1) - u;
  Real series = Real(kLog2E / 5);
  series = mul_add(series, t, Real(kLog2E / 4));
  series = mul_add(series, t, Real(kLog2E / 3));
  series = mul_add(series, t, Real(kLog2E / 2));
  series = mul_add(series, t, Real(kLog2E)) * t;
  const Real direct = -log2_positive(u);
  return t < Real(1.0 / 32) ? series : direct;
}
template <>
PK_HD double exponential<double>(uint32_t bits) {
  return -::log2(uniform21(bits, 0.0));
}

// The dense choice of one tile: d = sigmoid((scale*logit + logistic)/temperature).
template <class Real>
struct TileGate {
  Real forward;  // d, or 0/1 if hard
  Real slope;    // of the soft d over the logit
};

template <class Real>
PK_HD TileGate<Real> tile_gate(Real logit, uint32_t row, uint32_t col, const Factors<Real>& factors, bool hard,
                               const NoiseKey& noise) {
  Real z = factors.logit * logit;
  if (noise.enabled) {
    uint32_t c0[1] = {row}, c1[1] = {col}, c2[1] = {noise.draw}, c3[1] = {noise.layer | kTileStreamBit};
    philox<1>(c0, c1, c2, c3, noise.seed);
    // The logistic variate ln(u) - ln(1 - u); 1 - u is the uniform of the inverted bits.
    const uint32_t bits = c0[0] >> 11;
    const Real logistic = exponential<Real>(~bits & 0x1FFFFFu) - exponential<Real>(bits);
    z = mul_add(logistic, factors.noise, z);
  }
  // sigmoid through 2^-|z|, which neither overflows nor loses the small tail
  const Real e = exp2_nonpositive(z < 0 ? z : -z);
  const Real soft = (z < 0 ? e : Real(1)) * reciprocal(Real(1) + e);
  return {hard ? Real(z > 0 ? 1 : 0) : soft, factors.gradient * soft * (Real(1) - soft)};
}

// Pattern probabilities p[k][lane] of groups first..first+kLanes-1 from their logits l[k][lane]:
// softmax((scale*l + Gumbel)/temperature). With E = -log2(u), Gumbel = -ln(ln2 * E), and the constant cancels.
template <class Real, int kLanes>
PK_HD void pattern_probabilities(const Real (&logits)[kPatterns][kLanes], uint64_t first, const Factors<Real>& factors,
                                 const NoiseKey& noise, Real (&p)[kPatterns][kLanes]) {
  for (int k = 0; k < kPatterns; ++k) {
    for (int l = 0; l < kLanes; ++l) p[k][l] = logits[k][l] * factors.logit;
  }
  if (noise.enabled) {
    uint32_t words[4][kLanes], bits[kPatterns][kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t group = first + static_cast<uint64_t>(l);
      words[0][l] = static_cast<uint32_t>(group);
      words[1][l] = static_cast<uint32_t>(group >> 32);
      words[2][l] = noise.draw;
      words[3][l] = noise.layer;
    }
    philox<kLanes>(words[0], words[1], words[2], words[3], noise.seed);
    for (int l = 0; l < kLanes; ++l) {
      // Six 21-bit fields out of 128 bits, no bit used twice.
      for (int k = 0; k < 4; ++k) bits[k][l] = words[k][l] >> 11;
      bits[4][l] = (words[0][l] & 0x7FFu) << 10 | (words[1][l] & 0x3FFu);
      bits[5][l] = (words[2][l] & 0x7FFu) << 10 | (words[3][l] & 0x3FFu);
    }
    for (int k = 0; k < kPatterns; ++k) {
      for (int l = 0; l < kLanes; ++l) {
        p[k][l] = mul_add(-log2_positive(exponential<Real>(bits[k][l])), factors.noise, p[k][l]);
      }
    }
  }
  Real total[kLanes], highest[kLanes];
  for (int l = 0; l < kLanes; ++l) highest[l] = p[0][l];
  for (int k = 1; k < kPatterns; ++k) {
    for (int l = 0; l < kLanes; ++l) highest[l] = larger(p[k][l], highest[l]);
  }
  for (int k = 0; k < kPatterns; ++k) {
    for (int l = 0; l < kLanes; ++l) {
      p[k][l] = exp2_nonpositive(p[k][l] - highest[l]);
      total[l] = k == 0 ? p[k][l] : total[l] + p[k][l];
    }
  }
  for (int l = 0; l < kLanes; ++l) total[l] = reciprocal(total[l]);
  for (int k = 0; k < kPatterns; ++k) {
    for (int l = 0; l < kLanes; ++l) p[k][l] *= total[l];
  }
}

// Keep share m[j][lane] of the four columns: the expected pattern, or the likeliest one (first of equals) if hard.
template <class Real, int kLanes>
PK_HD void pattern_mask(const Real (&p)[kPatterns][kLanes], bool hard, Real (&m)[kGroup][kLanes]) {
  Real chosen[kPatterns][kLanes];
  if (hard) {
    Real highest[kLanes], taken[kLanes];
    for (int l = 0; l < kLanes; ++l) highest[l] = p[0][l];
    for (int k = 1; k < kPatterns; ++k) {
      for (int l = 0; l < kLanes; ++l) highest[l] = larger(p[k][l], highest[l]);
    }
    for (int l = 0; l < kLanes; ++l) taken[l] = 0;
    for (int k = 0; k < kPatterns; ++k) {
      for (int l = 0; l < kLanes; ++l) {
        chosen[k][l] = (p[k][l] == highest[l] && taken[l] == Real(0)) ? Real(1) : Real(0);
        taken[l] += chosen[k][l];
      }
    }
  } else {
    for (int k = 0; k < kPatterns; ++k) {
      for (int l = 0; l < kLanes; ++l) chosen[k][l] = p[k][l];
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    m[0][l] = chosen[0][l] + chosen[1][l] + chosen[2][l];
    m[1][l] = chosen[0][l] + chosen[3][l] + chosen[4][l];
    m[2][l] = chosen[1][l] + chosen[3][l] + chosen[5][l];
    m[3][l] = chosen[2][l] + chosen[4][l] + chosen[5][l];
  }
}

// Keep share of a fixed pattern nibble (bit j = column j).
template <class Real, int kLanes>
PK_HD void fixed_mask(const uint32_t (&nibbles)[kLanes], Real (&m)[kGroup][kLanes]) {
  for (int j = 0; j < kGroup; ++j) {
    for (int l = 0; l < kLanes; ++l) m[j][l] = static_cast<Real>(static_cast<int32_t>((nibbles[l] >> j) & 1u));
  }
}

// Mask of a tile with gate d over the pattern mask m.
template <class Real>
PK_HD Real gated_mask(Real d, Real m) {
  return mul_add(Real(1) - d, m, d);
}

// mask * weight, but a mask of exactly zero drops the weight even if it is inf or NaN.
template <class Real>
PK_HD Real masked_value(Real mask, Real weight) {
  return mask == Real(0) ? Real(0) : mask * weight;
}

// Derivatives for one group. g = dL/d(masked weight), w = weight, m = pattern mask, d = forward gate of its tile;
// density_grad = dL/d(sum of mask), norm_grad = dL/d(sum of (mask*weight)^2).
// Gives dL/dmask of the pattern (after the gate) and the group's share of dL/dgate.
template <class Real, int kLanes>
PK_HD void mask_gradient(const Real (&g)[kGroup][kLanes], const Real (&w)[kGroup][kLanes],
                         const Real (&m)[kGroup][kLanes], const Real (&d)[kLanes], Real density_grad, Real norm_grad,
                         Real (&pattern_grad)[kGroup][kLanes], Real (&gate_grad)[kLanes]) {
  for (int l = 0; l < kLanes; ++l) gate_grad[l] = 0;
  for (int j = 0; j < kGroup; ++j) {
    for (int l = 0; l < kLanes; ++l) {
      const Real mask = gated_mask(d[l], m[j][l]);
      const Real difference = w[j][l] - w[j][l];  // 0 for finite weights, NaN else
      const bool dropped = mask == Real(0) && difference != Real(0);
      const Real weight = dropped ? Real(0) : w[j][l];
      const Real mask_grad = mul_add(weight, mul_add(Real(2) * norm_grad * mask, weight, g[j][l]), density_grad);
      pattern_grad[j][l] = (Real(1) - d[l]) * mask_grad;
      gate_grad[l] = mul_add(mask_grad, Real(1) - m[j][l], gate_grad[l]);
    }
  }
}

// dL/dlogits of the six patterns from dL/dmask: softmax derivative, factor = scale/temperature.
template <class Real, int kLanes>
PK_HD void pattern_logit_gradient(const Real (&p)[kPatterns][kLanes], const Real (&pattern_grad)[kGroup][kLanes],
                                  Real factor, Real (&logit_grad)[kPatterns][kLanes]) {
  // Column pairs kept by the patterns 1100 1010 1001 0110 0101 0011.
  constexpr int kColumns[kPatterns][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
  Real mean[kLanes];
  for (int l = 0; l < kLanes; ++l) mean[l] = 0;
  for (int k = 0; k < kPatterns; ++k) {
    for (int l = 0; l < kLanes; ++l) {
      logit_grad[k][l] = pattern_grad[kColumns[k][0]][l] + pattern_grad[kColumns[k][1]][l];
      mean[l] = mul_add(p[k][l], logit_grad[k][l], mean[l]);
    }
  }
  for (int k = 0; k < kPatterns; ++k) {
    for (int l = 0; l < kLanes; ++l) logit_grad[k][l] = factor * p[k][l] * (logit_grad[k][l] - mean[l]);
  }
}

// Element conversions, branch-free so that loops over them vectorise. Storage of 16-bit types is uint16_t.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class Real>
PK_HD Real load_as(BFloat16 x) {
  return static_cast<Real>(bit_cast<float>(static_cast<uint32_t>(x.bits) << 16));
}
template <class Real>
PK_HD Real load_as(Half x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return static_cast<Real>(value);
#else
  // Shift the fields into fp32 position and multiply by 2^112 to correct the exponent: right for subnormals too.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
  const float scaled = bit_cast<float>(magnitude) * 5.192296858534828e33f;
  const uint32_t finite = bit_cast<uint32_t>(scaled);
  const uint32_t special = magnitude | 0x7F800000u;  // inf and NaN keep their payload
  const uint32_t bits = (x.bits & 0x7C00u) == 0x7C00u ? special : finite;
  return static_cast<Real>(bit_cast<float>(bits | static_cast<uint32_t>(x.bits & 0x8000u) << 16));
#endif
}
template <class Real>
PK_HD Real load_as(float x) {
  return static_cast<Real>(x);
}
template <class Real>
PK_HD Real load_as(double x) {
  return static_cast<Real>(x);
}

// Round to nearest even; NaN stays NaN.
PK_HD void store_as(float value, BFloat16& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u | (bits >> 16 & 0x8000u) : rounded);
#endif
}
PK_HD void store_as(float value, Half& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Normal results: rebias the exponent by -112 and round the 13 dropped bits; overflow carries into infinity.
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results (below 2^-14): adding 0.5 makes the FPU round at 2^-24.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? 0x7C00u : result;  // 65536 and above
  result = magnitude > 0x7F800000u ? 0x7E00u : result;   // NaN
  out.bits = static_cast<uint16_t>(sign | result);
#endif
}
// Two values as one word, the first in its lower half.
template <class T>
PK_HD uint32_t pack_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;  // one instruction for both; singly, they would go through the unit that log2 and exp2 need
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  T pair[2];
  store_as(low, pair[0]);
  store_as(high, pair[1]);
  return static_cast<uint32_t>(pair[0].bits) | static_cast<uint32_t>(pair[1].bits) << 16;
#endif
}
PK_HD void store_as(float value, float& out) { out = value; }
PK_HD void store_as(double value, double& out) { out = value; }

}  // namespace
}  // namespace patch_kernels
