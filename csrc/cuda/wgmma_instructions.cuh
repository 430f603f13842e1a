// CuTe's instructions wgmma and wgmma.sp with both operands in shared memory, K-major, and fp32 accumulators, chosen by
// type and tokens, for accumulators in an array.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// CuTe has n of 160 and 176 in headers of their own.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cute/arch/mma_sm90_gmma_sparse.hpp>
#include <utility>

namespace patch_kernels::cuda {

template <class Element, int kBn>
struct WgmmaOf;  // Dense, and Sparse<selector>

#define PK_WGMMA(ELEMENT, TYPES, N)                                                                             \
  template <>                                                                                                   \
  struct WgmmaOf<ELEMENT, N> {                                                                                  \
    using Dense =                                                                                               \
        cute::SM90::GMMA::MMA_64x##N##x16_##TYPES##_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
    template <int kSelector>                                                                                    \
    using Sparse = cute::SM90::GMMA::SPARSE::GMMA_64x##N##x32_##TYPES##_SS<                                     \
        cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K, cute::SM90::GMMA::ScaleIn::One,                 \
        cute::SM90::GMMA::ScaleIn::One, static_cast<cute::SM90::GMMA::SparseSel>(kSelector)>;                   \
  };
#define PK_WGMMA_16_BIT(N)       \
  PK_WGMMA(__half, F32F16F16, N) \
  PK_WGMMA(__nv_bfloat16, F32BF16BF16, N)

PK_WGMMA_16_BIT(8)
PK_WGMMA_16_BIT(16)
PK_WGMMA_16_BIT(32)
PK_WGMMA_16_BIT(64)
PK_WGMMA_16_BIT(128)
PK_WGMMA_16_BIT(160)
PK_WGMMA_16_BIT(176)
PK_WGMMA_16_BIT(192)

#undef PK_WGMMA_16_BIT
#undef PK_WGMMA

// sums += A * B. CuTe's instructions take every accumulator as an argument of its own; `meta` is nothing or the word.
template <class Instruction, int kSums, int... kIndex, class... Meta>
__device__ __forceinline__ void wgmma(float (&sums)[kSums], uint64_t a, uint64_t b,
                                      std::integer_sequence<int, kIndex...>, Meta... meta) {
  Instruction::fma(a, b, sums[kIndex]..., meta...);
}

}  // namespace patch_kernels::cuda
