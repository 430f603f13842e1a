// The Hopper machine on a GPU: the instructions that gemm/sm90.h is written in, CUTLASS's where it has them. Each asm
// says what it has instead, and names its section of the PTX ISA where the choice of form matters.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/memory.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90.hpp>

#include "../gemm/sm90.h"
#include "packed_dtype.cuh"

// Nothing here is used elsewhere, and CuTe's wgmma are 160,000 lines. The headers above hold variables that host code
// registers, so it must see them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
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

  __device__ __forceinline__ explicit MachineSm90(const void* smem) : smem_(cute::cast_smem_ptr_to_uint(smem)) {}

  __device__ __forceinline__ uint32_t smem_base() const { return smem_; }
  __device__ __forceinline__ int cluster() const { return static_cast<int>(cute::cluster_id_in_grid().x); }
  __device__ __forceinline__ int cluster_rank() const { return static_cast<int>(cute::block_rank_in_cluster()); }
  // Warps 0-3 and 4-7 are the consumers, then one warp each for x and the W rings.
  __device__ __forceinline__ int role() const {
    const int warp = cutlass::canonical_warp_idx_sync();
    const int role = warp < 8 ? warp / 4 : warp - 6;
    return role < sm90::kIdle ? role : static_cast<int>(sm90::kIdle);
  }
  template <class F>
  __device__ __forceinline__ void one_thread(F&& f) {
    if (threadIdx.x == 0) {
      f();
      cutlass::arch::fence_barrier_init();
    }
    __syncwarp();
  }
  template <class F>
  __device__ __forceinline__ void one_lane(F&& f) {
    if (cute::elect_one_sync()) f();  // tells the compiler that one lane goes on; a comparison of threadIdx would not
    __syncwarp();
  }
  template <class F>
  __device__ __forceinline__ void each_thread(F&& f) {
    f(thread());
  }
  // 384 threads start with 168 registers; 2*128*232 + 128*40 <= 65536.
  template <bool kMove>
  __device__ __forceinline__ void consumer_registers() {
    if constexpr (kMove) cutlass::arch::warpgroup_reg_alloc<232>();
  }
  template <bool kMove>
  __device__ __forceinline__ void producer_registers() {
    if constexpr (kMove) cutlass::arch::warpgroup_reg_dealloc<40>();
  }
  // CUTLASS's are empty without a macro, let the compiler move accesses to memory across, and include its GEMMs.
  __device__ __forceinline__ void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;\n" ::: "memory"); }
  __device__ __forceinline__ void start_next_grid() { asm volatile("griddepcontrol.launch_dependents;\n"); }

  // Barriers.
  __device__ __forceinline__ void init_barrier(uint32_t address, int count) {
    Barrier::init(barrier_at(address), count);
  }
  // Arriving relaxed spares a fence over the whole GPU: fence.mbarrier_init has published the barriers. A cluster of
  // one is a CTA.
  __device__ __forceinline__ void cluster_arrive(int ctas) {
    if (ctas > 1) cute::cluster_arrive_relaxed();
  }
  __device__ __forceinline__ void cluster_wait(int ctas) {
    if (ctas > 1) {
      cute::cluster_wait();
    } else {
      __syncthreads();
    }
  }
  __device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    if (threadIdx.x == 0) cute::prefetch_tma_descriptor(&map);
  }
  __device__ __forceinline__ void consumer_sync(int consumer) {
    if (consumer == 0) {  // immediate numbers reserve no more than these two
      cutlass::arch::NamedBarrier::sync(128, cutlass::arch::ReservedNamedBarriers{1});
    } else {
      cutlass::arch::NamedBarrier::sync(128, cutlass::arch::ReservedNamedBarriers{2});
    }
  }
  // CTA scope: a cluster-scope acquire would drop the L1 cache at each wait. Slots are handed over between wgmma and
  // copies, whose own completion orders the data.
  __device__ __forceinline__ void wait(uint32_t address, uint32_t parity) {
    while (!Barrier::try_wait(barrier_at(address), parity)) {  // wait() adds a time limit: SASS that sleeps
    }
  }
  __device__ __forceinline__ void wait_returned(uint32_t address, uint32_t parity) { wait(address, parity); }
  // Called by one thread.
  __device__ __forceinline__ void arrive_expect(uint32_t address, int bytes) {
    Barrier::arrive_and_expect_tx(barrier_at(address), bytes);
  }
  // One lane of each warp, or one for each CTA of `ranks`. Gives a slot back: what the warp read from it has arrived,
  // so nothing has to be published.
  __device__ __forceinline__ void arrive_cluster(uint32_t address, const sm90::Ranks& ranks) {
    if (ranks.count == 1) {
      if (lane() == 0) Barrier::arrive(barrier_at(address));
    } else if (lane() < ranks.count) {
      Barrier::arrive(barrier_at(address), ranks.first + lane() * ranks.stride, 1);
    }
  }
  __device__ __forceinline__ void warp_sync() { __syncwarp(); }

  // Copies into shared memory; they complete on mbarriers.
  __device__ __forceinline__ void copy_x(const TensorMap& map, uint32_t to, int col, int token, int, uint32_t barrier,
                                         const sm90::Ranks& ranks) {
    constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    if (ranks.count > 1) {
      cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&map, barrier_at(barrier), ranks.mask, kHint, shared_at(to), col, token);
    } else {
      cute::SM90_TMA_LOAD_2D::copy(&map, barrier_at(barrier), kHint, shared_at(to), col, token);
    }
  }
  // CUTLASS's bulk copy knows neither multicast nor a policy of the cache.
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
          "l"(source), "r"(bytes), "r"(barrier), "l"(cute::TMA::CacheHintSm90::EVICT_FIRST)
          : "memory");
    } else {
      cute::SM90_BULK_COPY_G2S::copy(from, barrier_at(barrier), shared_at(to), bytes);
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
    for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(sums.v[i]);
  }
  __device__ __forceinline__ void load_words(Regs<uint32_t, 2>& words, uint32_t address) {
    cutlass::arch::shared_load<8>(words.v, address + 8 * thread());
  }

  // wgmma.
  __device__ __forceinline__ void fence() { cute::warpgroup_arrive(); }
  template <int kBn>
  __device__ __forceinline__ void mma_dense(Regs<float, kBn / 2>& sums, uint64_t a, uint64_t b) {
    wgmma<typename WgmmaOf<Element, kBn>::Dense>(sums.v, a, b, std::make_integer_sequence<int, kBn / 2>());
  }
  template <int kBn, int kSelector>
  __device__ __forceinline__ void mma_sparse(Regs<float, kBn / 2>& sums, uint64_t a, uint64_t b,
                                             Regs<uint32_t, 2>& meta, int word) {
    wgmma<typename WgmmaOf<Element, kBn>::template Sparse<kSelector>>(
        sums.v, a, b, std::make_integer_sequence<int, kBn / 2>(), meta.v[word]);
  }
  __device__ __forceinline__ void commit() { cute::warpgroup_commit_batch(); }
  template <int kLeft>
  __device__ __forceinline__ void wait_groups() {
    cute::warpgroup_wait<kLeft>();
  }

  // Stores of y.
  template <class F>
  __device__ __forceinline__ void store_transposed(uint32_t block, F&& words_of) {
    uint32_t words[4];
    words_of(thread(), words);
    auto& to = *static_cast<cute::uint128_t*>(shared_at(block + stage_offset(thread())));
    cute::SM90_U16x8_STSM_T::copy(words[0], words[1], words[2], words[3], to);
  }
  __device__ __forceinline__ void fence_async_proxy() { cutlass::arch::fence_view_async_shared(); }
  __device__ __forceinline__ void copy_y(const TensorMap& map, uint32_t from, int row, int token) {
    if (elected()) cute::SM90_TMA_STORE_2D::copy(&map, shared_at(from), row, token);
  }
  __device__ __forceinline__ void commit_stores() {
    if (elected()) cute::tma_store_arrive();
  }
  __device__ __forceinline__ void wait_stores_read() {
    if (elected()) cute::tma_store_wait<1>();
  }
  __device__ __forceinline__ void wait_stores() {  // until y is written; CUTLASS's until it is read
    if (elected()) asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory");
  }

  __device__ __forceinline__ uint16_t load_half(uint32_t address) {
    uint16_t bits;
    cutlass::arch::shared_load<2>(&bits, address);
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
  // "cp.async.bulk", .shared::cta to .shared::cluster; CuTe has none). `to` and `barrier` are addresses as in this CTA.
  __device__ __forceinline__ void push(uint32_t to, uint32_t from, int bytes, uint32_t barrier, int rank) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                     remote(to, rank)),
                 "r"(from), "r"(bytes), "r"(remote(barrier, rank))
                 : "memory");
  }
  // CUTLASS's shared_store casts to whole numbers; the casts are hoisted out of the loop over chunks as copies of all
  // accumulators, for which ptxas waits within the loop over tiles (C7517).
  __device__ __forceinline__ void store_float(uint32_t address, float value) {
    asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(address), "f"(value) : "memory");
  }
  __device__ __forceinline__ void load_four(float (&values)[4], uint32_t address) {
    cutlass::arch::shared_load<16>(values, address);
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
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return Bits<Element>::pack(low, high); }

 private:
  using Barrier = cutlass::arch::ClusterTransactionBarrier;

  // CUTLASS takes pointers; the compiler drops both conversions.
  static __device__ __forceinline__ void* shared_at(uint32_t address) { return __cvta_shared_to_generic(address); }
  static __device__ __forceinline__ uint64_t* barrier_at(uint32_t address) {
    return static_cast<uint64_t*>(shared_at(address));
  }
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x) & 127; }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) & 31; }
  // The thread that speaks for its warpgroup.
  static __device__ __forceinline__ bool elected() { return thread() == 0; }
  static __device__ __forceinline__ uint32_t remote(uint32_t address, int rank) {
    return cute::set_block_rank(address, rank);
  }

  const uint32_t smem_;
};

}  // namespace patch_kernels::cuda
#endif
