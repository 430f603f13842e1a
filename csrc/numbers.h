// fp16 and bf16 as host types, by the conversions of the CPU ops.
#pragma once

#include <cstdint>

#include "mask_math.h"

namespace patch_kernels {

// kPrecision: significant bits, the implied one included.
template <class Storage, int kPrecisionBits>
struct Element {
  static constexpr int kPrecision = kPrecisionBits;
  static float widen(uint16_t bits) { return load_as<float>(Storage{bits}); }
  static uint16_t round(float value) {
    Storage out;
    store_as(value, out);
    return out.bits;
  }
};
using HalfElement = Element<Half, 11>;
using BFloat16Element = Element<BFloat16, 8>;

}  // namespace patch_kernels
