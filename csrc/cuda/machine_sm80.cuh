// The sm_80 machine on a GPU: the instructions that gemm/sm80.h is written in, one thread's share of a warp.
#pragma once

#include "../gemm/sm80.h"
#include "packed_dtype.cuh"

namespace patch_kernels::cuda {

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

  __device__ __forceinline__ explicit MachineSm80(void* smem)
      : smem_(static_cast<uint32_t>(__cvta_generic_to_shared(smem))) {}

  __device__ __forceinline__ int warp() const { return static_cast<int>(threadIdx.x) / 32; }
  __device__ __forceinline__ int block_x() const { return static_cast<int>(blockIdx.x); }
  __device__ __forceinline__ int block_y() const { return static_cast<int>(blockIdx.y); }
  __device__ __forceinline__ uint32_t smem() const { return smem_; }

  static __device__ __forceinline__ uint16_t round(float value) { return Ptx<Element>::round(value); }
  static __device__ __forceinline__ float widen(uint16_t bits) { return Ptx<Element>::widen(bits); }

  template <class F>
  __device__ __forceinline__ void each_lane(F f) {
    f(lane());
  }
  __device__ __forceinline__ void sync() { __syncthreads(); }

  // Past L1 (cg): weights are used once per CTA, and x is shared between SMs, not within one.
  __device__ __forceinline__ void copy16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n"
                 :
                 : "r"(to), "l"(__cvta_generic_to_global(from))
                 : "memory");
  }
  __device__ __forceinline__ void copy16(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n"
                 :
                 : "r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
  template <int kLeft>
  __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
  }

  template <class Address>
  __device__ __forceinline__ void ldmatrix_x4(Regs<uint32_t, 4>& to, Address address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to.v[0]), "=r"(to.v[1]), "=r"(to.v[2]), "=r"(to.v[3])
                 : "r"(address(lane()))
                 : "memory");
  }
  __device__ __forceinline__ uint32_t load32(uint32_t at) {
    uint32_t value;
    asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(value) : "r"(at) : "memory");
    return value;
  }
  __device__ __forceinline__ Bytes16 load128(uint32_t at) {
    Bytes16 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(value.words[0]), "=r"(value.words[1]), "=r"(value.words[2]), "=r"(value.words[3])
                 : "r"(at)
                 : "memory");
    return value;
  }
  __device__ __forceinline__ void store16(uint32_t at, uint16_t value) {
    asm volatile("st.shared.b16 [%0], %1;\n" ::"r"(at), "h"(value) : "memory");
  }
  __device__ __forceinline__ void store128(uint16_t* at, const Bytes16& value) {
    *reinterpret_cast<Bytes16*>(at) = value;
  }
  __device__ __forceinline__ void store_partial(float* at, float value) { *at = value; }

  __device__ __forceinline__ void mma(Regs<float, 4>& sums, const Regs<uint32_t, 4>& w, const Regs<uint32_t, 4>& x,
                                      int k16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.%10.%10.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(sums.v[0]), "+f"(sums.v[1]), "+f"(sums.v[2]), "+f"(sums.v[3])
        : "r"(w.v[0]), "r"(w.v[1]), "r"(w.v[2]), "r"(w.v[3]), "r"(x.v[2 * k16]), "r"(x.v[2 * k16 + 1]),
          "C"(Ptx<Element>::kType));
  }

  // ::ordered_metadata because plain mma.sp may run much slower on newer GPUs (PTX ISA, "mma.sp").
  template <int kSelector>
  __device__ __forceinline__ void mma_sp(Regs<float, 4>& sums, const Regs<uint32_t, 4>& w, const Regs<uint32_t, 4>& x,
                                         const Regs<uint32_t, 1>& meta) {
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.%14.%14.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
        : "+f"(sums.v[0]), "+f"(sums.v[1]), "+f"(sums.v[2]), "+f"(sums.v[3])
        : "r"(w.v[0]), "r"(w.v[1]), "r"(w.v[2]), "r"(w.v[3]), "r"(x.v[0]), "r"(x.v[1]), "r"(x.v[2]), "r"(x.v[3]),
          "r"(meta.v[0]), "n"(kSelector), "C"(Ptx<Element>::kType));
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

  uint32_t smem_;
};

}  // namespace patch_kernels::cuda
