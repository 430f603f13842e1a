// The Hopper machine on a GPU: the instructions that gemm/sm90.h is written in. Each function names its section of the
// PTX ISA where the choice of form matters.
#pragma once

#include <cuda.h>

#include "../gemm/sm90.h"
#include "wgmma_instructions.cuh"

namespace patch_kernels::cuda {

// Element is that of OnCard. kStreamWeights: every weight is read once, so L2 should drop it first.
template <class Element, bool kStreamWeights>
class MachineSm90 {
 public:
  using TensorMap = CUtensorMap;

  template <class T, int N>
  struct Regs {
    T v[N];
    __device__ __forceinline__ T* at(int) { return v; }
  };

  __device__ __forceinline__ explicit MachineSm90(const void* smem)
      : smem_(static_cast<uint32_t>(__cvta_generic_to_shared(smem))) {
    if constexpr (kStreamWeights) {
      asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy_));
    }
  }

  __device__ __forceinline__ uint32_t smem_base() const { return smem_; }
  __device__ __forceinline__ int cluster() const {
    uint32_t id;
    asm volatile("mov.u32 %0, %%clusterid.x;\n" : "=r"(id));
    return static_cast<int>(id);
  }
  __device__ __forceinline__ int cluster_rank() const {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
    return static_cast<int>(rank);
  }
  // Warps 0-3 and 4-7 are the consumers, then one warp each for x and the W rings.
  __device__ __forceinline__ int role() const {
    const int warp = __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x) / 32, 0);
    const int role = warp < 8 ? warp / 4 : warp - 6;
    return role < sm90::kIdle ? role : static_cast<int>(sm90::kIdle);
  }
  template <class F>
  __device__ __forceinline__ void one_thread(F&& f) {
    if (threadIdx.x == 0) {
      f();
      asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
    }
    __syncwarp();
  }
  template <class F>
  __device__ __forceinline__ void one_lane(F&& f) {
    uint32_t chosen;  // elect.sync tells the compiler that one lane goes on; a comparison of threadIdx would not
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "elect.sync _|p, 0xFFFFFFFF;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(chosen));
    if (chosen) f();
    __syncwarp();
  }
  template <class F>
  __device__ __forceinline__ void each_thread(F&& f) {
    f(thread());
  }
  // 384 threads start with 168 registers; 2*128*232 + 128*40 <= 65536.
  template <bool kMove>
  __device__ __forceinline__ void consumer_registers() {
    if constexpr (kMove) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;\n");
  }
  template <bool kMove>
  __device__ __forceinline__ void producer_registers() {
    if constexpr (kMove) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;\n");
  }
  __device__ __forceinline__ void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;\n" ::: "memory"); }
  __device__ __forceinline__ void start_next_grid() { asm volatile("griddepcontrol.launch_dependents;\n"); }

  // Barriers.
  __device__ __forceinline__ void init_barrier(uint32_t address, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(address), "r"(count) : "memory");
  }
  // Arriving relaxed spares a fence over the whole GPU: fence.mbarrier_init has published the barriers. A cluster of
  // one is a CTA.
  __device__ __forceinline__ void cluster_arrive(int ctas) {
    if (ctas > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
  }
  __device__ __forceinline__ void cluster_wait(int ctas) {
    if (ctas > 1) {
      asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
    } else {
      __syncthreads();
    }
  }
  __device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    if (threadIdx.x == 0) asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
  }
  __device__ __forceinline__ void consumer_sync(int consumer) {
    if (consumer == 0) {  // 0 is __syncthreads; immediate numbers reserve no more than these two
      asm volatile("bar.sync 1, 128;\n" ::: "memory");
    } else {
      asm volatile("bar.sync 2, 128;\n" ::: "memory");
    }
  }
  // CTA scope: a cluster-scope acquire would drop the L1 cache at each wait. Slots are handed over between wgmma and
  // copies, whose own completion orders the data.
  __device__ __forceinline__ void wait(uint32_t address, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(address),
        "r"(parity)
        : "memory");
  }
  __device__ __forceinline__ void wait_returned(uint32_t address, uint32_t parity) { wait(address, parity); }
  // Called by one thread.
  __device__ __forceinline__ void arrive_expect(uint32_t address, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(address), "r"(bytes) : "memory");
  }
  // One lane of each warp, or one for each CTA of `ranks`. Gives a slot back: what the warp read from it has arrived,
  // so nothing has to be published.
  __device__ __forceinline__ void arrive_cluster(uint32_t address, const sm90::Ranks& ranks) {
    if (ranks.count == 1) {
      if (lane() == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(address) : "memory");
    } else if (lane() < ranks.count) {
      asm volatile(
          "mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(remote(address, ranks.first + lane() * ranks.stride))
          : "memory");
    }
  }
  __device__ __forceinline__ void warp_sync() { __syncwarp(); }

  // Copies into shared memory; they complete on mbarriers.
  __device__ __forceinline__ void copy_x(const TensorMap& map, uint32_t to, int col, int token, int, uint32_t barrier,
                                         const sm90::Ranks& ranks) {
    if (ranks.count > 1) {
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
          "[%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(to),
          "l"(&map), "r"(col), "r"(token), "r"(barrier), "h"(ranks.mask)
          : "memory");
    } else {
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
          "[%0], [%1, {%2, %3}], [%4];\n" ::"r"(to),
          "l"(&map), "r"(col), "r"(token), "r"(barrier)
          : "memory");
    }
  }
  __device__ __forceinline__ void copy_w(uint32_t to, const uint8_t* from, int bytes, uint32_t barrier,
                                         const sm90::Ranks& ranks) {
    const uint64_t source = __cvta_generic_to_global(from);
    if (ranks.count > 1) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
          "[%0], [%1], %2, [%3], %4;\n" ::"r"(to),
          "l"(source), "r"(bytes), "r"(barrier), "h"(ranks.mask)
          : "memory");
    } else if constexpr (kStreamWeights) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
          "[%0], [%1], %2, [%3], %4;\n" ::"r"(to),
          "l"(source), "r"(bytes), "r"(barrier), "l"(policy_)
          : "memory");
    } else {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
          "l"(source), "r"(bytes), "r"(barrier)
          : "memory");
    }
  }

  // Registers.
  template <int N>
  __device__ __forceinline__ void clear(Regs<float, N>& sums) {
#pragma unroll
    for (int i = 0; i < N; ++i) sums.v[i] = 0;
  }
  // Keeps the compiler from moving uses of the accumulators across the wait before.
  template <int N>
  __device__ __forceinline__ void own(Regs<float, N>& sums) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sums.v[i])::"memory");
  }
  __device__ __forceinline__ void load_words(Regs<uint32_t, 2>& words, uint32_t address) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n"
                 : "=r"(words.v[0]), "=r"(words.v[1])
                 : "r"(address + 8 * thread())
                 : "memory");
  }

  // wgmma.
  __device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
  template <int kBn>
  __device__ __forceinline__ void mma_dense(Regs<float, kBn / 2>& sums, uint64_t a, uint64_t b) {
    Wgmma<Element, kBn>::dense(sums.v, a, b);
  }
  template <int kBn, int kSelector>
  __device__ __forceinline__ void mma_sparse(Regs<float, kBn / 2>& sums, uint64_t a, uint64_t b,
                                             Regs<uint32_t, 2>& meta, int word) {
    Wgmma<Element, kBn>::template sparse<kSelector>(sums.v, a, b, meta.v[word]);
  }
  __device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
  template <int kLeft>
  __device__ __forceinline__ void wait_groups() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kLeft) : "memory");
  }

  // Stores of y.
  template <class F>
  __device__ __forceinline__ void store_transposed(uint32_t block, F&& words_of) {
    uint32_t words[4];
    words_of(thread(), words);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                     block + stage_offset(thread())),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
  __device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }
  __device__ __forceinline__ void copy_y(const TensorMap& map, uint32_t from, int row, int token) {
    if (elected()) {
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];\n" ::"l"(&map),
                   "r"(row), "r"(token), "r"(from)
                   : "memory");
    }
  }
  __device__ __forceinline__ void commit_stores() {
    if (elected()) asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
  }
  __device__ __forceinline__ void wait_stores_read() {
    if (elected()) asm volatile("cp.async.bulk.wait_group.read 1;\n" ::: "memory");
  }
  __device__ __forceinline__ void wait_stores() {
    if (elected()) asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory");
  }

  __device__ __forceinline__ uint16_t load_half(uint32_t address) {
    uint16_t bits;
    asm volatile("ld.shared.b16 %0, [%1];\n" : "=h"(bits) : "r"(address) : "memory");
    return bits;
  }
  static __device__ __forceinline__ void store_bits(void* to, int64_t index, uint16_t bits) {
    static_cast<uint16_t*>(to)[index] = bits;
  }

  // Exchange of partial sums. f(i) for i < count, each by a thread of its own.
  template <class F>
  __device__ __forceinline__ void each_of(int count, F&& f) {
    if (thread() < count) f(thread());
  }
  // From here into the shared memory of another CTA of the cluster, completing on its barrier (PTX ISA,
  // "cp.async.bulk", .shared::cta to .shared::cluster). `to` and `barrier` are addresses as in this CTA.
  __device__ __forceinline__ void push(uint32_t to, uint32_t from, int bytes, uint32_t barrier, int rank) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                     remote(to, rank)),
                 "r"(from), "r"(bytes), "r"(remote(barrier, rank))
                 : "memory");
  }
  __device__ __forceinline__ void store_float(uint32_t address, float value) {
    asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(address), "f"(value) : "memory");
  }
  __device__ __forceinline__ void load_four(float (&values)[4], uint32_t address) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
                 : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
                 : "r"(address)
                 : "memory");
  }

  static __device__ __forceinline__ uint32_t load_entry(const uint32_t* entry) { return __ldg(entry); }
  static __device__ __forceinline__ int load_row(const int32_t* row) { return __ldg(row); }
  static __device__ __forceinline__ float load_element(const void* from, int index) {
    return static_cast<float>(static_cast<const Element*>(from)[index]);
  }
  static __device__ __forceinline__ void store_element(void* to, int64_t index, float value) {
    static_cast<Element*>(to)[index] = static_cast<Element>(value);
  }
  // Four values in two words; `index` is a multiple of four.
  static __device__ __forceinline__ void store_four(void* to, int64_t index, uint32_t low, uint32_t high) {
    *reinterpret_cast<uint2*>(static_cast<Element*>(to) + index) = make_uint2(low, high);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.%3x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low), "C"(Ptx<Element>::kType));
    return word;
  }

 private:
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x) & 127; }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) & 31; }
  // The thread that speaks for its warpgroup.
  static __device__ __forceinline__ bool elected() { return thread() == 0; }
  static __device__ __forceinline__ uint32_t remote(uint32_t address, int rank) {
    uint32_t mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
  }

  const uint32_t smem_;
  uint64_t policy_ = 0;
};

}  // namespace patch_kernels::cuda
