// The packed dtypes (format/packed_dtype.h) as CUDA's headers and its driver call them.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../format/packed_dtype.h"

namespace patch_kernels::cuda {

template <class Packed>
struct OnCard;
template <>
struct OnCard<PackedFloat16> {
  using Element = __half;
  static constexpr CUtensorMapDataType kTensorMap = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
};
template <>
struct OnCard<PackedBFloat16> {
  using Element = __nv_bfloat16;
  static constexpr CUtensorMapDataType kTensorMap = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
};

// Bits of elements.
template <class Element>
struct Bits;
template <>
struct Bits<__half> {
  static __device__ __forceinline__ uint16_t round(float value) { return __half_as_ushort(__float2half_rn(value)); }
  static __device__ __forceinline__ float widen(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};
template <>
struct Bits<__nv_bfloat16> {
  static __device__ __forceinline__ uint16_t round(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
  static __device__ __forceinline__ float widen(uint16_t bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

}  // namespace patch_kernels::cuda
