// Arithmetic of the mask kernels, for host and device, written once: functions of one number that give the same bits on
// every CPU, being IEEE additions and multiplications alone. A GPU takes its own log2, exp2 and reciprocal (mul_add and
// the functions below it), which differ from those by about 2^-22.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../format/layout.h"

namespace patch_kernels {
namespace {  // internal linkage: this header is compiled once per instruction set

template <class To, class From>
PK_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
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

PK_HD bool is_finite(float x) {
#if defined(__CUDA_ARCH__)
  return fabsf(x) <= 0x1.FFFFFEp127f;
#else
  return x - x == 0.0f;  // NaN else
#endif
}
PK_HD bool is_finite(double x) { return x - x == 0.0; }

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

}  // namespace
}  // namespace patch_kernels
