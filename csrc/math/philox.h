// The counter-based random stream of masks and of stochastic rounding, and the variates made of its words.
#pragma once

#include <cmath>
#include <cstdint>

#include "arithmetic.h"

namespace patch_kernels {
namespace {  // internal linkage: this header is compiled once per instruction set

constexpr double kLog2E = 1.4426950408889634;

PK_HD uint64_t multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // as C++, nvcc adds the zero upper half of a
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

constexpr int kPhiloxRounds = 10;

// Both key words of every round.
struct PhiloxKeys {
  uint32_t words[kPhiloxRounds][2];
};
PK_HD PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
    keys.words[round][0] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
    keys.words[round][1] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
  }
  return keys;
}

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011). Counters are updated in place.
template <int kLanes>
PK_HD void philox(uint32_t (&c0)[kLanes], uint32_t (&c1)[kLanes], uint32_t (&c2)[kLanes], uint32_t (&c3)[kLanes],
                  const PhiloxKeys& keys) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t product0 = multiply_wide(c0[l], 0xD2511F53u);
      const uint64_t product1 = multiply_wide(c2[l], 0xCD9E8D57u);
      c0[l] = static_cast<uint32_t>(product1 >> 32) ^ c1[l] ^ keys.words[round][0];
      c1[l] = static_cast<uint32_t>(product1);
      c2[l] = static_cast<uint32_t>(product0 >> 32) ^ c3[l] ^ keys.words[round][1];
      c3[l] = static_cast<uint32_t>(product0);
    }
  }
}

// 21 random bits to u = (bits + 0.5) / 2^21: exact in fp32 and strictly inside (0, 1), as is 1 - u.
PK_HD float uniform21(uint32_t bits, float) {
#if defined(__CUDA_ARCH__)
  const uint32_t raised = __funnelshift_l(bits << 11, 0x7Fu, 23);  // one instruction for shift and exponent
#else
  const uint32_t raised = 0x3F800000u | bits << 2;
#endif
  return bit_cast<float>(raised) - 0.99999976158142089844f;  // 1 + bits / 2^21, less 1 - 2^-22
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

}  // namespace
}  // namespace patch_kernels
