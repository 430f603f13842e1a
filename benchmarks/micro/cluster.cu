// What clusters and dependent launches offer to decode kernels.
//   active clusters   how many clusters of 2, 4, 8 CTAs run at once
//   placement         multiprocessors that a grid of one CTA for each of them gets, when two CTAs fit one: without and
//                     with the cluster attribute, and with the scheduling policies
//   exchange          cycles of adding the partial sums of the CTAs of a split, as csrc/gemm/sm90.h does it: pushed by
//                     bulk copies. Beside it two ways of pulling: reading the other CTAs' sums
//   launch            time of a kernel in a graph of a chain, with and without programmatic dependent launch
#include <cuda_bf16.h>

#include <map>
#include <set>

#include "common.cuh"
#include "gemm/plan.h"
#include "gemm/wgmma.h"

namespace {
using namespace micro;

constexpr int kConsumers = 2;  // warpgroups of a CTA, each with sums, buffers and barriers of its own
constexpr int kExchangeRounds = 200;
constexpr int kFewSums = 16;  // distinct values: eight of them and of the rounds' add up exactly in bf16

// kPush          one bulk copy for each other CTA, completing on a barrier there
// kPull          an arrival at every CTA says that the chunk is written; each reads its share from the others
// kPullTogether  the same after barrier.cluster
enum How { kPush, kPull, kPullTogether };

// Differs between what may be taken for one another: CTAs, consumers, shares of rows, chunks of tokens.
PK_HD int first_sum(int rank, int consumer, int row, int token) {
  return (row + 5 * (row / 8) + 3 * token + 3 * (token / 8) + 5 * rank + 7 * consumer) % kFewSums;
}

__device__ __forceinline__ void store_float(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
template <bool kOfCluster>
__device__ __forceinline__ float4 load_four(uint32_t address) {
  float4 v;
  if constexpr (kOfCluster) {
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
  }
  return v;
}
__device__ __forceinline__ uint32_t two_bf16(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// A consumer has the sums of kRows rows and kBn tokens in the registers of wgmma's accumulators. It writes a chunk of
// them as [destination][token][row]; two buffers take turns, so that one chunk travels while the next is written. Each
// CTA of the split finishes kRows / splits rows, adding in rank order, and stores them as bf16.
template <int kRows, int kBn, int kHow>
__global__ __launch_bounds__(128 * kConsumers, 1) void exchange(int splits, uint2* y, long long* cycles) {
  constexpr int kTokens = exchange_tokens(kBn), kChunks = kBn / kTokens, kBlocks = kRows / 64;
  constexpr int kChunkBytes = kRows * kTokens * 4;
  extern __shared__ uint8_t raw[];
  const int consumer = threadIdx.x / 128, thread = threadIdx.x % 128, lane = threadIdx.x % 32, rank = cluster_rank();
  const uint32_t base = smem_address(align1024(raw));
  const uint32_t sends = base + consumer * 4 * kChunkBytes, receives = sends + 2 * kChunkBytes;
  const uint32_t full = base + kConsumers * 4 * kChunkBytes + 32 * consumer, empty = full + 16;
  const int rows = kRows / splits, floats = rows * kTokens, bytes = 4 * floats;
  int row_bits = 0;
  while (1 << row_bits < rows) ++row_bits;
  uint2* own_y = y + static_cast<size_t>(blockIdx.x * kConsumers + consumer) * (kBn * rows / 4);
  if (thread == 0) {
    for (int buffer = 0; buffer < 2; ++buffer) {
      barrier_init(full + 8 * buffer, kHow == kPush ? 1 : splits);
      barrier_init(empty + 8 * buffer, 4 * splits);  // a warp each
    }
    barrier_init_fence();
  }
  float sums[kBlocks][kBn / 2];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < kBn / 2; ++i) {
      const int row = 64 * b + fragment_row(thread, i);
      sums[b][i] = static_cast<float>(first_sum(rank, consumer, row, fragment_token(thread, i)) + kFewSums - 1);
    }
  }
  // As slot_index of csrc/gemm/sm90.h: no two lanes of a store meet in a bank.
  const auto place = [&](int token, int row) { return ((token << row_bits) + row) ^ (token >> 1 & 3) << 3; };

  const auto consumer_sync = [&] {
    if (consumer == 0) {  // immediate numbers reserve no more than these two
      named_barrier(1, 128);
    } else {
      named_barrier(2, 128);
    }
  };

  uint32_t chunks = 0;
  const auto write = [&](int chunk) {
    const uint32_t number = chunks + chunk, buffer = number & 1, parity = number >> 1 & 1;
    const uint32_t send = sends + buffer * kChunkBytes;
    if constexpr (kHow != kPullTogether) wait_parity(empty + 8 * buffer, parity ^ 1);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {  // registers have no addresses
      if (c != chunk) continue;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) {
          const int row = 64 * b + fragment_row(thread, i), in_row = row & (rows - 1);
          const int at = (row >> row_bits) * floats + place(fragment_token(thread, i), in_row);
          store_float(send + 4 * at, sums[b][c * (kTokens / 2) + i]);
        }
      }
    }
    if constexpr (kHow == kPush) {
      async_proxy_fence();
      consumer_sync();
      if (thread == rank) {
        arrive_expect_tx(full + 8 * buffer, (splits - 1) * bytes);
      } else if (thread < splits) {  // a copy to oneself is undefined
        bulk_copy_to_rank(map_to_rank(receives + buffer * kChunkBytes + rank * bytes, thread), send + thread * bytes,
                          bytes, map_to_rank(full + 8 * buffer, thread));
      }
    } else if constexpr (kHow == kPull) {
      consumer_sync();
      if (thread < splits) publish_to_rank(full + 8 * buffer, thread);
    } else {
      // Says too that all have added up the chunk before, whose buffer is written next.
      cluster_sync();
    }
  };
  const auto add = [&](int chunk) {
    const uint32_t number = chunks + chunk, buffer = number & 1, parity = number >> 1 & 1;
    const uint32_t send = sends + buffer * kChunkBytes, received = receives + buffer * kChunkBytes;
    if constexpr (kHow != kPullTogether) wait_parity<kHow == kPull>(full + 8 * buffer, parity);
#pragma unroll 1
    for (int i = 4 * thread; i < floats; i += 4 * 128) {
      const int row = i & (rows - 1), token = i >> row_bits;
      const uint32_t at = 4 * place(token, row);
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int split = 0; split < kMaxSplits; ++split) {
        if (split >= splits) break;
        float4 part;
        if (split == rank) {
          part = load_four<false>(send + split * bytes + at);
        } else if constexpr (kHow == kPush) {
          part = load_four<false>(received + split * bytes + at);
        } else {
          part = load_four<true>(map_to_rank(send + rank * bytes + at, split));
        }
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      own_y[((chunk * kTokens + token) * rows + row) / 4] = make_uint2(two_bf16(sum.x, sum.y), two_bf16(sum.z, sum.w));
    }
    if constexpr (kHow != kPullTogether) {
      __syncwarp();
      if (lane < splits) arrive_at_rank(empty + 8 * buffer, lane);
    }
  };

  long long spent = 0;
#pragma unroll 1
  for (int round = 0; round < kExchangeRounds; ++round) {
    const float step = round % kFewSums == 0 ? 1.0f - kFewSums : 1.0f;  // adds round % kFewSums to the first sums
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < kBn / 2; ++i) sums[b][i] += step;
    }
    cluster_sync();  // all begin together; not part of the time
    const long long begin = clock64();
    if constexpr (kHow == kPullTogether) {
#pragma unroll 1
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        write(chunk);
        add(chunk);
      }
    } else {
#pragma unroll 1
      for (int chunk = 0; chunk <= kChunks; ++chunk) {
        if (chunk < kChunks) write(chunk);
        if (chunk > 0) add(chunk - 1);
      }
    }
    chunks += kChunks;
    spent += clock64() - begin;
  }
  if constexpr (kHow != kPullTogether) {  // the last arrivals of others may be on their way
    for (uint32_t number = chunks; number < chunks + 2; ++number) {
      wait_parity(empty + 8 * (number & 1), (number >> 1 & 1) ^ 1);
    }
  }
  cluster_sync();  // nobody leaves while its sums are read
  if (thread == 0) cycles[blockIdx.x * kConsumers + consumer] = spent / kExchangeRounds;
}

// Cycles of exchanging the sums of kRows rows a consumer and kBn tokens; values of y are compared with whole numbers.
template <int kRows, int kBn, int kHow>
double time_exchange(const std::string& name, int splits, int sms) {
  const int ctas = sms / kMaxSplits * kMaxSplits, rows = kRows / splits;
  const size_t values = static_cast<size_t>(ctas) * kConsumers * kBn * rows;
  __nv_bfloat16* y = device_array<__nv_bfloat16>(values);
  long long* cycles = device_array<long long>(ctas * kConsumers);
  constexpr int kBytes = kConsumers * (4 * kRows * exchange_tokens(kBn) * 4 + 32);
  constexpr int kOneCta = 120 << 10;  // of a multiprocessor's shared memory
  static_assert(kAlignSlack + kBytes <= kOneCta);
  launch(exchange<kRows, kBn, kHow>, ctas, 128 * kConsumers, kOneCta, splits, splits, reinterpret_cast<uint2*>(y),
         cycles);
  const double median = median_cycles(cycles, ctas * kConsumers);
  const std::string head = "exchange " + name + ", splits " + std::to_string(splits) + ", " + std::to_string(kBn) +
                           " tokens by " + std::to_string(exchange_tokens(kBn));
  emit("cluster", head, median, "cycles");
  const std::vector<__nv_bfloat16> found = download(y, values);
  int wrong = 0;
  for (size_t at = 0; at < values; ++at) {
    const int in_row = at % rows, token = at / rows % kBn, consumer = at / rows / kBn % kConsumers;
    const int row = static_cast<int>(at / rows / kBn / kConsumers) % splits * rows + in_row;
    int want = splits * ((kExchangeRounds - 1) % kFewSums);
    for (int rank = 0; rank < splits; ++rank) want += first_sum(rank, consumer, row, token);
    wrong += __bfloat162float(found[at]) != static_cast<float>(want);
  }
  emit("cluster", head + " check", wrong, "mismatches");
  CUDA_CHECK(cudaFree(y));
  CUDA_CHECK(cudaFree(cycles));
  return median;
}

// Cycles that two chunks more take, when many are under way: of 64 rows a consumer and 8 tokens a chunk (decode), and
// of 128 rows and 16 tokens (pairs of rows).
struct Turn {
  double decode, pairs;
};

template <int kHow>
std::map<int, Turn> time_turns(const std::string& name, int sms) {
  std::map<int, Turn> turns;
  for (const int splits : {2, 4, 8}) {
    time_exchange<64, 8, kHow>(name, splits, sms);
    const double decode = time_exchange<64, 16, kHow>(name, splits, sms);
    const double pairs = time_exchange<128, 64, kHow>(name, splits, sms);
    turns[splits] = {time_exchange<64, 32, kHow>(name, splits, sms) - decode,
                     (time_exchange<128, 128, kHow>(name, splits, sms) - pairs) / 2};
    const std::string head = "turn " + name + ", splits " + std::to_string(splits);
    emit("cluster", head + ", by 8", turns[splits].decode, "cycles");
    emit("cluster", head + ", by 16", turns[splits].pairs, "cycles");
  }
  return turns;
}

// Constants of csrc/gemm/plan.h by item_end_cycles of csrc/gemm/plan.cpp: of a turn, all but exchange_turn_cycles is in
// proportion to the sums, of which pairs have four times as many.
void emit_constants(const std::map<int, Turn>& turns) {
  std::map<int, double> sums_cycles;  // of pairs
  for (const auto& [splits, turn] : turns) {
    const double latency = (4 * turn.decode - turn.pairs) / 3;
    emit("cluster", "exchange_turn_cycles, splits " + std::to_string(splits), latency, "cycles");
    sums_cycles[splits] = turn.pairs - latency;
  }
  // A CTA sends sums (1 - 1 / splits) and finishes sums / splits, whose terms are told apart by 2 and 8 splits.
  constexpr double kSums = 2 * 128 * 2 * exchange_tokens(128);
  const double shared = 2 * 4 * kSums / ModelConstants().shared_bytes_per_cycle;
  const double two = sums_cycles.at(2) - shared, eight = sums_cycles.at(8) - shared;
  const double per_byte = (4 * eight - two) / (4 * kSums * (4 * 7.0 / 8 - 1.0 / 2));
  emit("cluster", "cluster_bytes_per_cycle", 1 / per_byte, "bytes/cycle");
  const double finished = kSums / 2 / (128 * kConsumers);
  emit("cluster", "exchange_output_cycles", (two - 4 * kSums / 2 * per_byte) / finished, "cycles");
}

__global__ __launch_bounds__(384) void occupant(float* y) {
  extern __shared__ uint8_t raw[];
  if (y != nullptr) y[threadIdx.x] = raw[threadIdx.x];
}

void active_clusters(int sms) {
  for (const int kilobytes : {100, 200}) {
    CUDA_CHECK(cudaFuncSetAttribute(occupant, cudaFuncAttributeMaxDynamicSharedMemorySize, kilobytes << 10));
    for (const int size : {2, 4, 8}) {
      cudaLaunchAttribute attribute = cluster_attribute(size);
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(sms / size * size);
      config.blockDim = dim3(384);
      config.dynamicSmemBytes = kilobytes << 10;
      config.attrs = &attribute;
      config.numAttrs = 1;
      int clusters = 0;
      CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, occupant, &config));
      emit("cluster", "active clusters of " + std::to_string(size) + ", " + std::to_string(kilobytes) + " KB", clusters,
           "clusters");
    }
  }
}

// Where each CTA runs. All of them stay until all have begun, as those of a decode kernel do.
__global__ __launch_bounds__(288) void place(int* sm_of_cta) {
  if (threadIdx.x != 0) return;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm_of_cta[blockIdx.x]));
  const long long begin = clock64();
  while (clock64() - begin < 100000) {
  }
}

void placement(int sms) {
  constexpr int kSmemBytes = 100 << 10;
  CUDA_CHECK(cudaFuncSetAttribute(place, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes));
  int* device_sms = device_array<int>(sms);
  const std::pair<const char*, cudaClusterSchedulingPolicy> policies[] = {
      {"default policy", cudaClusterSchedulingPolicyDefault},
      {"spread", cudaClusterSchedulingPolicySpread},
      {"load balancing", cudaClusterSchedulingPolicyLoadBalancing}};
  for (const int size : {0, 1, 2, 4, 8}) {  // 0: no attribute
    for (const auto& [policy_name, policy] : policies) {
      if (size < 2 && policy != cudaClusterSchedulingPolicyDefault) continue;
      const int ctas = size > 0 ? sms / size * size : sms;
      cudaLaunchAttribute attributes[2] = {cluster_attribute(std::max(size, 1)), {}};
      attributes[1].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
      attributes[1].val.clusterSchedulingPolicyPreference = policy;
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(ctas);
      config.blockDim = dim3(288);
      config.dynamicSmemBytes = kSmemBytes;
      config.attrs = attributes;
      config.numAttrs = size == 0 ? 0 : policy == cudaClusterSchedulingPolicyDefault ? 1 : 2;
      CUDA_CHECK(cudaLaunchKernelEx(&config, place, device_sms));
      const std::vector<int> sm_of_cta = download(device_sms, ctas);
      const std::string head =
          size == 0 ? "no cluster attribute" : "cluster " + std::to_string(size) + ", " + policy_name;
      emit("cluster", "placement of " + std::to_string(ctas) + " CTAs, " + head,
           static_cast<double>(std::set<int>(sm_of_cta.begin(), sm_of_cta.end()).size()), "multiprocessors");
      std::string line = "smid by CTA, " + head + ":";
      for (const int sm : sm_of_cta) line += " " + std::to_string(sm);
      fprintf(stderr, "%s\n", line.c_str());
    }
  }
  CUDA_CHECK(cudaFree(device_sms));
}

constexpr int kChain = 100;

// `before` cycles that do not need the previous kernel, then `after` cycles that do.
__global__ __launch_bounds__(288) void link(int before, int after) {
  asm volatile("griddepcontrol.launch_dependents;");
  const long long begin = clock64();
  while (clock64() - begin < before) {
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const long long middle = clock64();
  while (clock64() - middle < after) {
  }
}

double chain_us(int sms, bool dependent, int before, int after) {
  cudaStream_t stream;
  CUDA_CHECK(cudaStreamCreate(&stream));
  CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(sms);
  config.blockDim = dim3(288);
  config.dynamicSmemBytes = 100 << 10;  // two fit an SM, as D1 kernels do
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  CUDA_CHECK(cudaFuncSetAttribute(link, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10));
  for (int i = 0; i < kChain; ++i) CUDA_CHECK(cudaLaunchKernelEx(&config, link, before, after));
  cudaGraph_t graph;
  CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t ready;
  CUDA_CHECK(cudaGraphInstantiate(&ready, graph, 0));
  cudaEvent_t begin, end;
  CUDA_CHECK(cudaEventCreate(&begin));
  CUDA_CHECK(cudaEventCreate(&end));
  std::vector<double> samples;
  for (int i = 0; i < 12; ++i) {
    CUDA_CHECK(cudaEventRecord(begin, stream));
    CUDA_CHECK(cudaGraphLaunch(ready, stream));
    CUDA_CHECK(cudaEventRecord(end, stream));
    CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i > 1) samples.push_back(1e3 * ms / kChain);
  }
  CUDA_CHECK(cudaGraphExecDestroy(ready));
  CUDA_CHECK(cudaGraphDestroy(graph));
  CUDA_CHECK(cudaStreamDestroy(stream));
  CUDA_CHECK(cudaEventDestroy(begin));
  CUDA_CHECK(cudaEventDestroy(end));
  return median(samples);
}
}  // namespace

int main() {
  const int sms = require_hopper().multiProcessorCount;
  active_clusters(sms);
  placement(sms);
  emit_constants(time_turns<kPush>("push", sms));
  time_turns<kPull>("pull", sms);
  time_turns<kPullTogether>("pull after barrier.cluster", sms);
  for (const bool dependent : {false, true}) {
    const std::string how = dependent ? " dependent launch" : " plain launch";
    emit("cluster", "launch of an empty kernel," + how, chain_us(sms, dependent, 0, 0), "us");
    emit("cluster", "launch of 3000 + 3000 cycles," + how, chain_us(sms, dependent, 3000, 3000), "us");
  }
}
