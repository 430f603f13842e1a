// The dtypes that a packed weight can have: one record each, and the only list of them. What else belongs to one of
// them: the conversions of its storage type (math/elements.h) and what the CUDA toolkit calls it
// (cuda/packed_dtype.cuh). patch_kernels/packed_dtype.py is the list of Python.
#pragma once

#include <cstdint>

#include "../ops.h"
#include "layout.h"

namespace patch_kernels {
namespace {  // internal linkage, as the functions of math/ that take them

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace

// kPrecision: significant bits, the implied one included.
struct PackedFloat16 {
  static constexpr DType kDType = DType::kFloat16;
  static constexpr const char* kName = "float16";
  static constexpr const char* kShortName = "fp16";
  static constexpr int kPrecision = 11;
  using Storage = Half;
};
struct PackedBFloat16 {
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr const char* kName = "bfloat16";
  static constexpr const char* kShortName = "bf16";
  static constexpr int kPrecision = 8;
  using Storage = BFloat16;
};

template <class... Records>
struct PackedList {
  static_assert(((sizeof(typename Records::Storage) == kValueBytes) && ...), "tiles hold 16-bit values");
  static constexpr int kCount = sizeof...(Records);
  static constexpr DType kDTypes[kCount] = {Records::kDType...};
};
using PackedDtypes = PackedList<PackedFloat16, PackedBFloat16>;

// body(record) for each of them in turn.
template <class Body, class... Records>
void for_each_packed(Body&& body, PackedList<Records...>) {
  (body(Records{}), ...);
}
template <class Body>
void for_each_packed(Body&& body) {
  for_each_packed(body, PackedDtypes{});
}

inline bool is_packed(DType dtype) {
  bool found = false;
  for_each_packed([&](auto packed) { found = found || dtype == packed.kDType; });
  return found;
}

// body(record) for the one of `dtype`, for which is_packed holds.
template <class Body, class First, class... Rest>
auto with_packed(DType dtype, Body&& body, PackedList<First, Rest...>) {
  if constexpr (sizeof...(Rest) > 0) {
    if (dtype != First::kDType) return with_packed(dtype, body, PackedList<Rest...>{});
  }
  return body(First{});
}
template <class Body>
auto with_packed(DType dtype, Body&& body) {
  return with_packed(dtype, body, PackedDtypes{});
}

}  // namespace patch_kernels
