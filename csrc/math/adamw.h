// One step of AdamW on a value, and how its moments are stored below fp32, for host and device.
//
// Only IEEE additions, multiplications, divisions and square roots, compiled without contraction, so CPU and GPU give
// the same bits. What is stored below fp32 is rounded stochastically: 16 random bits are added below the cut and the
// rest is dropped, so the mean of many roundings is the value itself. The bits are Philox words of (element, step,
// stream), a function of these alone. Both moments share a Philox call: the second moment of an element takes the bits
// of its neighbour's first (element ^ 1), so the two of one element are independent.
#pragma once

#include "../ops.h"
#include "elements.h"
#include "philox.h"

namespace patch_kernels {
namespace {

constexpr int kRoundings = 8;                      // of 16 bits, out of one Philox call
constexpr uint32_t kRoundingStreamBit = 1u << 31;  // of the second counter word, which mask noise never sets

enum class Rounded : uint32_t { kParam, kMoments };

// An 8-bit moment: the upper bits of an fp32 number (sign, exponent, three bits of mantissa) after division by its
// block's scale, a power of two. Subnormal codes are fp32 subnormals, so fp32's own gradual underflow makes them.
struct Code8 {
  uint8_t bits;
};
constexpr int kCode8Cut = 20;             // mantissa bits dropped
constexpr float kExpAvgUnit = 0x1p113f;   // first moment, sign and 4 bits of exponent: codes reach up to 4 * scale,
constexpr float kExpAvgSqUnit = 0x1p97f;  // second, 5 bits and no sign; so rounding up the largest value is no overflow

// Words of draws first..first+kLanes-1: draw i rounds elements 8i..8i+7, element 8i+k with bits 16(k%2).. of word k/2.
template <int kLanes>
PK_HD void rounding_words(const AdamWArgs& args, const PhiloxKeys& keys, Rounded what, uint64_t first,
                          uint32_t (&words)[4][kLanes]) {
  for (int l = 0; l < kLanes; ++l) {
    const uint64_t draw = first + static_cast<uint64_t>(l);
    words[0][l] = static_cast<uint32_t>(draw);
    words[1][l] = static_cast<uint32_t>(draw >> 32) | kRoundingStreamBit;
    words[2][l] = args.step;
    words[3][l] = args.stream << 2 | static_cast<uint32_t>(what);
  }
  philox<kLanes>(words[0], words[1], words[2], words[3], keys);
}

PK_HD void adamw_moments(float grad, const AdamWFactors& f, float& exp_avg, float& exp_avg_sq) {
  exp_avg = exp_avg + (grad - exp_avg) * f.grad_share;
  exp_avg_sq = exp_avg_sq * f.beta2 + grad * grad * f.square_share;
}

constexpr float kLeastSquare = 0x1p-100f;  // under the root, far below eps^2; keeps roots and quotients in range

PK_HD float adamw_param(float param, const AdamWFactors& f, float exp_avg, float exp_avg_sq) {
  const float square = exp_avg_sq < kLeastSquare ? kLeastSquare : exp_avg_sq;  // NaN stays NaN
  return param * f.decay - f.step_size * exp_avg / (sqrtf(square) * f.root_factor + f.eps);
}

PK_HD void store_rounded(float value, uint32_t, float& out) { out = value; }

// Finite values stay finite, infinity and NaN stay what they are.
PK_HD void store_rounded(float value, uint32_t random, BFloat16& out) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7FFFFFFFu;
  uint32_t result = (magnitude + random) >> 16;  // a carry into the exponent is the next binade
  result = magnitude < 0x7F800000u && result > 0x7F7Fu ? 0x7F7Fu : result;
  result = magnitude > 0x7F800000u ? 0x7FC0u : result;
  out.bits = static_cast<uint16_t>((bits >> 16 & 0x8000u) | result);
}

// Scale of a block from the largest magnitude (as bits) in it: the power of two at or below. A block with infinity or
// NaN in it becomes NaN.
PK_HD float block_scale(uint32_t largest) {
  if (largest >= 0x7F800000u) return bit_cast<float>(0x7FC00000u);
  const uint32_t power = largest & 0x7F800000u;
  return bit_cast<float>(power > 0x00800000u ? power : 0x00800000u);
}

PK_HD float decode_exp_avg(Code8 code, float scale) {
  const float magnitude = bit_cast<float>((code.bits & 0x7Fu) << kCode8Cut) * kExpAvgUnit * scale;
  return (code.bits & 0x80u) != 0 ? -magnitude : magnitude;
}
PK_HD float decode_exp_avg_sq(Code8 code, float scale) {
  return bit_cast<float>(static_cast<uint32_t>(code.bits) << kCode8Cut) * kExpAvgSqUnit * scale;
}

PK_HD uint32_t round_code(float scaled, uint32_t random) {
  return (bit_cast<uint32_t>(scaled) + (random << (kCode8Cut - 16))) >> kCode8Cut;
}
PK_HD Code8 encode_exp_avg(float value, float inverse_scale, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const float magnitude = bit_cast<float>(bits & 0x7FFFFFFFu);
  const uint32_t code = round_code(magnitude * inverse_scale * (1.0f / kExpAvgUnit), random);
  return {static_cast<uint8_t>((bits >> 24 & 0x80u) | code)};
}
// A positive second moment never becomes 0: the next step would divide by eps alone.
PK_HD Code8 encode_exp_avg_sq(float value, float inverse_scale, uint32_t random) {
  const uint32_t code = round_code(value * inverse_scale * (1.0f / kExpAvgSqUnit), random);
  return {static_cast<uint8_t>(code == 0 && value > 0.0f ? 1u : code)};
}

}  // namespace
}  // namespace patch_kernels
