// The sm_80 machine on a GPU: the instructions that gemm/sm80.h is written in, CUTLASS's where it has them; one
// thread's share of a warp.
#pragma once

#include <cutlass/arch/memory.h>
#include <cutlass/arch/mma_sparse_sm80.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "../gemm/sm80.h"
#include "packed_dtype.cuh"

namespace patch_kernels::cuda {

// CUTLASS's mma and mma.sp of an element. The latter has ::ordered_metadata, plain mma.sp may run much slower on newer
// GPUs (PTX ISA, "mma.sp").
template <class T>
using SparseMma = cutlass::arch::SparseMma<cutlass::gemm::GemmShape<16, 8, 32>, 32, T, cutlass::layout::RowMajor, T,
                                           cutlass::layout::ColumnMajor, float, cutlass::layout::RowMajor,
                                           cutlass::arch::OpMultiplyAdd, cutlass::arch::SPFormatType::Thread>;
template <class Element>
struct MmaOf;
template <>
struct MmaOf<__half> {
  using Dense = cute::SM80_16x8x16_F32F16F16F32_TN;
  using Sparse = SparseMma<cutlass::half_t>;
};
template <>
struct MmaOf<__nv_bfloat16> {
  using Dense = cute::SM80_16x8x16_F32BF16BF16F32_TN;
  using Sparse = SparseMma<cutlass::bfloat16_t>;
};

// Element is that of OnCard.
template <class Element>
class MachineSm80 {
 public:
  template <class T, int N>
  struct Regs {
    T v[N];
    __device__ __forceinline__ T* at(int) { return v; }
    __device__ __forceinline__ const T* at(int) const { return v; }
  };
  struct alignas(16) Bytes16 {
    uint32_t words[4];
  };

  __device__ __forceinline__ explicit MachineSm80(void* smem) : smem_(cute::cast_smem_ptr_to_uint(smem)) {}

  __device__ __forceinline__ int warp() const { return static_cast<int>(threadIdx.x) / 32; }
  __device__ __forceinline__ int block_x() const { return static_cast<int>(blockIdx.x); }
  __device__ __forceinline__ int block_y() const { return static_cast<int>(blockIdx.y); }
  __device__ __forceinline__ uint32_t smem() const { return smem_; }

  static __device__ __forceinline__ uint16_t round(float value) { return Bits<Element>::round(value); }
  static __device__ __forceinline__ float widen(uint16_t bits) { return Bits<Element>::widen(bits); }

  template <class F>
  __device__ __forceinline__ void each_lane(F f) {
    f(lane());
  }
  __device__ __forceinline__ void sync() { __syncthreads(); }

  // Past L1 (cg): weights are used once per CTA, and x is shared between SMs, not within one. CuTe fills with zeros all
  // 16 bytes or none.
  __device__ __forceinline__ void copy16(uint32_t to, const void* from) {
    cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(*static_cast<const cute::uint128_t*>(from), at(to));
  }
  __device__ __forceinline__ void copy16(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n"
                 :
                 : "r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void commit() { cute::cp_async_fence(); }
  template <int kLeft>
  __device__ __forceinline__ void wait() {  // CuTe's for 0 is wait_all, which closes another group
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
  }

  template <class Address>
  __device__ __forceinline__ void ldmatrix_x4(Regs<uint32_t, 4>& to, Address address) {
    cute::SM75_U32x4_LDSM_N::copy(at(address(lane())), to.v[0], to.v[1], to.v[2], to.v[3]);
  }
  __device__ __forceinline__ uint32_t load32(uint32_t at) {
    uint32_t value;
    cutlass::arch::shared_load<4>(&value, at);
    return value;
  }
  __device__ __forceinline__ Bytes16 load128(uint32_t at) {
    Bytes16 value;
    cutlass::arch::shared_load<16>(&value, at);
    return value;
  }
  __device__ __forceinline__ void store16(uint32_t at, uint16_t value) { cutlass::arch::shared_store<2>(at, &value); }
  __device__ __forceinline__ void store128(uint16_t* at, const Bytes16& value) {
    *reinterpret_cast<Bytes16*>(at) = value;
  }
  __device__ __forceinline__ void store_partial(float* at, float value) { *at = value; }

  __device__ __forceinline__ void mma(Regs<float, 4>& sums, const Regs<uint32_t, 4>& w, const Regs<uint32_t, 4>& x,
                                      int k16) {
    MmaOf<Element>::Dense::fma(sums.v[0], sums.v[1], sums.v[2], sums.v[3], w.v[0], w.v[1], w.v[2], w.v[3], x.v[2 * k16],
                               x.v[2 * k16 + 1], sums.v[0], sums.v[1], sums.v[2], sums.v[3]);
  }

  template <int kSelector>
  __device__ __forceinline__ void mma_sp(Regs<float, 4>& sums, const Regs<uint32_t, 4>& w, const Regs<uint32_t, 4>& x,
                                         const Regs<uint32_t, 1>& meta) {
    using Mma = typename MmaOf<Element>::Sparse;
    auto& d = reinterpret_cast<typename Mma::FragmentC&>(sums);
    Mma()(d, reinterpret_cast<const typename Mma::FragmentA&>(w), reinterpret_cast<const typename Mma::FragmentB&>(x),
          d, meta.v[0], kSelector);
  }

 private:
  // CuTe takes references; the compiler drops both conversions.
  static __device__ __forceinline__ cute::uint128_t& at(uint32_t address) {
    return *static_cast<cute::uint128_t*>(__cvta_shared_to_generic(address));
  }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

  uint32_t smem_;
};

}  // namespace patch_kernels::cuda
