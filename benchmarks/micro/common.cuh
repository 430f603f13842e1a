// Shared by the micro programs: error checks, JSON lines, and a thin wrapper of each PTX instruction they measure.
// Written from the PTX ISA 9.0 and csrc/format/layout.h. Build: python -m benchmarks.card.build.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "format/layout.h"

namespace micro {
using namespace patch_kernels;  // packed format v1

#define CUDA_CHECK(call)                                                                              \
  do {                                                                                                \
    const cudaError_t status = (call);                                                                \
    if (status != cudaSuccess) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status)); \
      std::exit(1);                                                                                   \
    }                                                                                                 \
  } while (0)

// The first GPU, or one sentence and exit code 2: sm_90a code runs on compute capability 9.0 alone.
inline cudaDeviceProp require_hopper() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    std::fprintf(stderr, "Expected a GPU of compute capability 9.0, found none (%s).\n", cudaGetErrorString(status));
    std::exit(2);
  }
  cudaDeviceProp device{};
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  if (device.major != 9 || device.minor != 0) {
    std::fprintf(stderr, "Expected a GPU of compute capability 9.0, found %s (%d.%d).\n", device.name, device.major,
                 device.minor);
    std::exit(2);
  }
  return device;
}

inline void emit(const char* experiment, const std::string& name, double value, const char* unit) {
  std::printf("{\"experiment\": \"%s\", \"case\": \"%s\", \"value\": %.6g, \"unit\": \"%s\"}\n", experiment,
              name.c_str(), value, unit);
  std::fflush(stdout);
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

template <typename T>
std::vector<T> download(const T* device_data, size_t count) {
  std::vector<T> host(count);
  CUDA_CHECK(cudaMemcpy(host.data(), device_data, count * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}

template <typename T>
T* device_array(size_t count) {
  T* pointer = nullptr;
  CUDA_CHECK(cudaMalloc(&pointer, count * sizeof(T)));
  CUDA_CHECK(cudaMemset(pointer, 0, count * sizeof(T)));
  return pointer;
}

// Median over CTAs of the cycles that each wrote.
inline double median_cycles(const long long* device_cycles, int ctas) {
  const std::vector<long long> cycles = download(device_cycles, ctas);
  return median(std::vector<double>(cycles.begin(), cycles.end()));
}

inline cudaLaunchAttribute cluster_attribute(int ctas) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = ctas;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  return attribute;
}

// Launch with dynamic shared memory and, if cluster > 1, a cluster of that many CTAs. Does not wait: download() or an
// event does, and reports what went wrong meanwhile.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int grid, int threads, int smem_bytes, int cluster, Arguments... arguments) {
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
  cudaLaunchAttribute attribute = cluster_attribute(cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Milliseconds of one `work` by events, least of `repeats` after a warm-up. A sample is several of them: the first
// begins while the host still prepares it.
template <typename Work>
double best_ms(int repeats, Work work) {
  cudaEvent_t begin, end;
  CUDA_CHECK(cudaEventCreate(&begin));
  CUDA_CHECK(cudaEventCreate(&end));
  work();
  constexpr int kPerSample = 8;
  float best = 1e30f;
  for (int i = 0; i < repeats; ++i) {
    CUDA_CHECK(cudaEventRecord(begin));
    for (int j = 0; j < kPerSample; ++j) work();
    CUDA_CHECK(cudaEventRecord(end));
    CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    best = std::min(best, ms / kPerSample);
  }
  CUDA_CHECK(cudaEventDestroy(begin));
  CUDA_CHECK(cudaEventDestroy(end));
  return best;
}

PK_HD uint32_t mix(uint32_t x) {  // integer hash: random-looking data from an index
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Two bf16 values of random sign with magnitude in [0.5, 2): zeros would let the chip draw less power.
PK_HD uint32_t random_bf16x2(uint32_t index) { return (mix(index) & 0x80FF80FFu) | 0x3F003F00u; }

// Eight legal metadata nibbles.
PK_HD uint32_t random_metadata(uint32_t index) {
  uint32_t word = 0;
  for (int i = 0; i < 8; ++i) {
    const uint32_t nibbles = 0xEDC984u;  // the six legal ones
    word |= ((nibbles >> (4 * (mix(8 * index + i) % 6))) & 15u) << (4 * i);
  }
  return word;
}

inline __global__ void fill_random(uint32_t* words, size_t count) {
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    words[i] = random_bf16x2(static_cast<uint32_t>(i));
  }
}

// Random-looking bytes in device memory; `bytes` is a multiple of 4.
inline uint8_t* random_array(size_t bytes) {
  uint32_t* words = nullptr;
  CUDA_CHECK(cudaMalloc(&words, bytes));
  fill_random<<<1024, 256>>>(words, bytes / 4);
  CUDA_CHECK(cudaGetLastError());
  return reinterpret_cast<uint8_t*>(words);
}

// Fills [begin, begin + bytes) of shared memory by the whole CTA. The readers are in the async proxy (wgmma), so call
// async_proxy_fence() and a barrier afterwards.
__device__ inline void fill_values(uint8_t* begin, int bytes, uint32_t seed) {
  uint32_t* words = reinterpret_cast<uint32_t*>(begin);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) words[i] = random_bf16x2(seed + i);
}
__device__ inline void fill_metadata(uint8_t* begin, int bytes, uint32_t seed) {
  uint32_t* words = reinterpret_cast<uint32_t*>(begin);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) words[i] = random_metadata(seed + i);
}

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Dynamic shared memory is at least 16-byte aligned; the 128-byte swizzle needs 1024. Ask for 1024 bytes more.
__device__ __forceinline__ uint8_t* align1024(uint8_t* pointer) {
  return pointer + ((1024 - (smem_address(pointer) & 1023)) & 1023);
}
constexpr int kAlignSlack = 1024;

// Generic-proxy writes to shared memory become visible to wgmma and bulk copies.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Initialised barriers become visible to the async proxy and to the cluster; a CTA or cluster barrier follows.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive_expect_tx(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Address of the same shared variable in CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t map_to_rank(uint32_t address, int rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
// Gives a slot back to CTA `rank`: what was read from it has arrived, so nothing has to be published.
__device__ __forceinline__ void arrive_at_rank(uint32_t barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(map_to_rank(barrier, rank)) : "memory");
}
// After writing shared memory that CTA `rank` will read.
__device__ __forceinline__ void publish_to_rank(uint32_t barrier, int rank) {
  asm volatile(
      "fence.acq_rel.cluster;\n"
      "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(map_to_rank(barrier, rank))
      : "memory");
}
// Waits for the end of the phase with this parity. A protocol mistake traps after some seconds instead of hanging.
// kPublished: for data that other CTAs wrote. Only then at cluster scope, which drops the L1 cache at each wait.
template <bool kPublished = false>
__device__ __forceinline__ void wait_parity(uint32_t barrier, int parity) {
  for (uint32_t tries = 0;; ++tries) {
    uint32_t done;
    if constexpr (kPublished) {
      asm volatile(
          "{\n.reg .pred p;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
          "selp.b32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
    } else {
      asm volatile(
          "{\n.reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.b32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
    }
    if (done) return;
    if (tries > (1u << 23)) __trap();
  }
}

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Barrier of some warps of the CTA.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers of each thread of this warpgroup from here on; a kernel's warpgroups may have 512 together.
template <bool kMore, int kRegisters>
__device__ __forceinline__ void set_registers() {
  if constexpr (kMore) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }
}

__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void bulk_copy_hint(uint32_t to, const void* from, int bytes, uint32_t barrier,
                                               uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
// To the same offset of every CTA in `mask`; each one's own barrier at the same offset counts the bytes.
__device__ __forceinline__ void bulk_copy_multicast(uint32_t to, const void* from, int bytes, uint32_t barrier,
                                                    uint16_t mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier), "h"(mask)
      : "memory");
}
// Shared memory of this CTA to shared memory of another; `to` and `barrier` are mapped addresses of that CTA.
__device__ __forceinline__ void bulk_copy_to_rank(uint32_t to, uint32_t from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "r"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// A ring of slots whose data nobody reads. In each CTA one thread fills, another one (of another warp) retires, each
// with its own copy of the Ring; were they one, every refill would wait for a round trip through the cluster. In a
// cluster of kCluster CTAs each one fetches its share of every slot and multicasts it to all, and a slot is filled
// again once it was full in all of them. All CTAs of a cluster fill and retire the same number of slots, and none exits
// before all.
template <int kCluster>
struct Ring {
  uint32_t slots;     // depth x slot_bytes, 128-byte aligned
  uint32_t barriers;  // depth x (full, empty)
  int slot_bytes;
  int depth;
  int slot = 0;
  int round = 0;

  __device__ uint32_t full() const { return barriers + 16 * slot; }
  __device__ uint32_t empty() const { return barriers + 16 * slot + 8; }

  // By one thread, before a cluster barrier (a CTA barrier without a cluster).
  __device__ void init() const {
    for (int i = 0; i < depth; ++i) {
      barrier_init(barriers + 16 * i, 1);
      barrier_init(barriers + 16 * i + 8, kCluster);
    }
    barrier_init_fence();
  }
  __device__ void advance() {
    if (++slot == depth) slot = 0, ++round;
  }
  __device__ void fill(const uint8_t* from) {
    if (round > 0) wait_parity(empty(), (round - 1) & 1);
    arrive_expect_tx(full(), slot_bytes);
    if constexpr (kCluster > 1) {
      const int share = slot_bytes / kCluster;
      const int begin = cluster_rank() * share;
      bulk_copy_multicast(slots + slot * slot_bytes + begin, from + begin, share, full(), (1 << kCluster) - 1);
    } else {
      bulk_copy(slots + slot * slot_bytes, from, slot_bytes, full());
    }
    advance();
  }
  __device__ void retire() {
    wait_parity(full(), round & 1);
    for (int rank = 0; rank < kCluster; ++rank) arrive_at_rank(empty(), rank);
    advance();
  }
};

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Shared-memory descriptor of a K-major operand in 128-byte rows with the 128-byte swizzle: 1024 bytes between groups
// of eight rows (PTX ISA, "Matrix descriptor"). Add bytes / 16 to move the start.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return ((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
constexpr uint64_t kStep16 = 32 / 16;        // 16 stored columns: dense k16, or the kept half of a sparse k32
constexpr uint64_t kStep32 = 64 / 16;        // 32 columns of B for a sparse k32
constexpr uint64_t kRows64 = 64 * 128 / 16;  // the second m64 block of a 128-row slot

// Lists of ACC accumulator registers: their names %0, %1, ... in the text, and their operands.
#define TEN(t) "%" t "0,%" t "1,%" t "2,%" t "3,%" t "4,%" t "5,%" t "6,%" t "7,%" t "8,%" t "9"
#define NAMES_4 "%0,%1,%2,%3"
#define NAMES_8 NAMES_4 ",%4,%5,%6,%7"
#define NAMES_16 TEN("") ",%10,%11,%12,%13,%14,%15"
#define NAMES_30 TEN("") "," TEN("1") "," TEN("2")
#define NAMES_32 NAMES_30 ",%30,%31"
#define NAMES_60 NAMES_30 "," TEN("3") "," TEN("4") "," TEN("5")
#define NAMES_64 NAMES_60 ",%60,%61,%62,%63"
#define NAMES_80 NAMES_60 "," TEN("6") "," TEN("7")
#define NAMES_88 NAMES_80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define NAMES_90 NAMES_80 "," TEN("8")
#define NAMES_96 NAMES_90 ",%90,%91,%92,%93,%94,%95"
#define NAMES_128 NAMES_90 "," TEN("9") "," TEN("10") "," TEN("11") ",%120,%121,%122,%123,%124,%125,%126,%127"
#define ACC_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACC_8(i) ACC_4(i), ACC_4(i + 4)
#define ACC_16(i) ACC_8(i), ACC_8(i + 8)
#define ACC_32(i) ACC_16(i), ACC_16(i + 16)
#define ACC_64(i) ACC_32(i), ACC_32(i + 32)
#define ACC_80(i) ACC_64(i), ACC_16(i + 64)
#define ACC_88(i) ACC_80(i), ACC_8(i + 80)
#define ACC_96(i) ACC_64(i), ACC_32(i + 64)
#define ACC_128(i) ACC_64(i), ACC_64(i + 64)

// d += A * B, bf16 in, fp32 accumulate, B in shared memory. ss: A in shared memory; rs: A fragments in registers.
// A sparse one takes the metadata register and the selector, which pair of each quad's lanes holds it.
template <int kN>
struct Wgmma;

// P0..P6 are the numbers of the operands that follow the ACC accumulators.
#define DEFINE_WGMMA(N, ACC, P0, P1, P2, P3, P4, P5, P6)                                                              \
  template <>                                                                                                         \
  struct Wgmma<N> {                                                                                                   \
    static __device__ __forceinline__ void dense_ss(float (&d)[ACC], uint64_t a, uint64_t b) {                        \
      asm volatile(                                                                                                   \
          "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                                                  \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES_##ACC "}, %" #P0 ", %" #P1               \
                                                                                   ", p, 1, 1, 0, 0;\n}"              \
          : ACC_##ACC(0)                                                                                              \
          : "l"(a), "l"(b));                                                                                          \
    }                                                                                                                 \
    static __device__ __forceinline__ void dense_rs(float (&d)[ACC], const uint32_t (&a)[4], uint64_t b) {            \
      asm volatile(                                                                                                   \
          "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                                                  \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES_##ACC                                    \
          "}, {%" #P0 ",%" #P1 ",%" #P2 ",%" #P3 "}, %" #P4 ", p, 1, 1, 0;\n}"                                        \
          : ACC_##ACC(0)                                                                                              \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                      \
    }                                                                                                                 \
    template <int kSelector>                                                                                          \
    static __device__ __forceinline__ void sparse_ss(float (&d)[ACC], uint64_t a, uint64_t b, uint32_t metadata) {    \
      asm volatile(                                                                                                   \
          "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                                                  \
          "wgmma.mma_async.sp.sync.aligned.m64n" #N "k32.f32.bf16.bf16 {" NAMES_##ACC "}, %" #P0 ", %" #P1 ", %" #P2  \
                                                                                      ", %" #P3 ", p, 1, 1, 0, 0;\n}" \
          : ACC_##ACC(0)                                                                                              \
          : "l"(a), "l"(b), "r"(metadata), "n"(kSelector));                                                           \
    }                                                                                                                 \
    template <int kSelector>                                                                                          \
    static __device__ __forceinline__ void sparse_rs(float (&d)[ACC], const uint32_t (&a)[4], uint64_t b,             \
                                                     uint32_t metadata) {                                             \
      asm volatile(                                                                                                   \
          "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                                                  \
          "wgmma.mma_async.sp.sync.aligned.m64n" #N "k32.f32.bf16.bf16 {" NAMES_##ACC                                 \
          "}, {%" #P0 ",%" #P1 ",%" #P2 ",%" #P3 "}, %" #P4 ", %" #P5 ", %" #P6 ", p, 1, 1, 0;\n}"                    \
          : ACC_##ACC(0)                                                                                              \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(kSelector));                       \
    }                                                                                                                 \
  };

DEFINE_WGMMA(8, 4, 4, 5, 6, 7, 8, 9, 10)
DEFINE_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)
DEFINE_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
DEFINE_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
DEFINE_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
DEFINE_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
DEFINE_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
DEFINE_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
DEFINE_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

template <int kCount>
__device__ __forceinline__ void zero(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) d[i] = 0.0f;
}
template <int kCount>
__device__ __forceinline__ float total(const float (&d)[kCount]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += d[i];
  return sum;
}

// Two m64 blocks of a tile row times kN tokens. One group of wgmmas stays in flight at the end; wgmma_wait<0>() ends
// it.
template <int kN>
struct TileRow {
  float low[kN / 2], high[kN / 2];
  uint64_t w;         // descriptor of a 128-row slot of weights; both halves of a dense tile read it
  uint64_t x;         // descriptor of two slots of kN tokens x 64 columns
  uint32_t metadata;  // shared address of this thread's metadata of the first m64 block

  __device__ __forceinline__ void init(const uint8_t* w_slot, const uint8_t* x_slots, const uint8_t* metadata_slot) {
    zero(low);
    zero(high);
    w = descriptor(smem_address(w_slot));
    x = descriptor(smem_address(x_slots));
    metadata = smem_address(metadata_slot) + 8 * (threadIdx.x % 128);
  }
  __device__ __forceinline__ void dense() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint64_t b = x + half * (kN * 128 / 16) + step * kStep16;
        Wgmma<kN>::dense_ss(low, w + step * kStep16, b);
        Wgmma<kN>::dense_ss(high, w + kRows64 + step * kStep16, b);
      }
      wgmma_commit();
      wgmma_wait<1>();
    }
  }
  // `words` must stay untouched until the last group has retired, so callers alternate between two of them.
  __device__ __forceinline__ void sparse(uint32_t (&words)[4]) {
    // volatile: the real kernel finds new metadata in every slot.
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(metadata));
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words[2]), "=r"(words[3]) : "r"(metadata + 1024));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t a = w + 2 * half * kStep16;
      const uint64_t b = x + half * (kN * 128 / 16);
      wgmma_fence();
      Wgmma<kN>::template sparse_ss<0>(low, a, b, words[half]);
      Wgmma<kN>::template sparse_ss<0>(high, a + kRows64, b, words[2 + half]);
      Wgmma<kN>::template sparse_ss<1>(low, a + kStep16, b + kStep32, words[half]);
      Wgmma<kN>::template sparse_ss<1>(high, a + kRows64 + kStep16, b + kStep32, words[2 + half]);
      wgmma_commit();
      wgmma_wait<1>();
    }
  }
};

}  // namespace micro
