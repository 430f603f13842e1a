// Element types of tensors: conversions to and from fp32 and fp64 for host and device. Branch-free, so that loops over
// them vectorise.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../format/packed_dtype.h"
#include "arithmetic.h"

namespace patch_kernels {
namespace {  // internal linkage: this header is compiled once per instruction set

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
// The lower or upper half of a word.
template <class T>
PK_HD float half_of(uint32_t word, bool upper) {
  if constexpr (std::is_same_v<T, BFloat16>) {  // nvcc would cut the half out first
    return bit_cast<float>(upper ? word & 0xFFFF0000u : word << 16);
  } else {
    return load_as<float>(T{static_cast<uint16_t>(upper ? word >> 16 : word)});
  }
}
// Two values as one word, the first in its lower half.
template <class T>
PK_HD uint32_t pack_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;  // one instruction for both; singly, they would go through the unit that log2 and exp2 need
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, BFloat16>, "no conversion of a pair to T");
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

// A packed dtype on the host, as bits.
template <class Packed>
struct Element {
  static constexpr int kPrecision = Packed::kPrecision;
  static float widen(uint16_t bits) { return load_as<float>(typename Packed::Storage{bits}); }
  static uint16_t round(float value) {
    typename Packed::Storage out;
    store_as(value, out);
    return out.bits;
  }
};

}  // namespace
}  // namespace patch_kernels
