// What clusters and dependent launches offer to decode kernels.
//   active clusters   how many clusters of 2, 4, 8 CTAs run at once
//   placement         multiprocessors that a grid of one CTA for each of them gets, when two CTAs fit one: without and
//                     with the cluster attribute, and with the scheduling policies
//   reduce            cycles of adding the 64x64 fp32 partials of a cluster's CTAs through distributed shared memory
//   launch            time of a kernel in a graph of a chain, with and without programmatic dependent launch
#include <set>

#include "common.cuh"

namespace {
using namespace micro;

constexpr int kPartialBytes = 64 * 64 * 4;
constexpr int kReduceThreads = 256;
constexpr int kReduces = 200;

// Push: bulk copies send slice q of this CTA's partial to CTA q, whose barrier counts the bytes.
// Pull: a remote arrive says that this CTA's partial is complete; each CTA then loads its slice from the others.
template <int kCluster, bool kPush>
__global__ __launch_bounds__(kReduceThreads) void reduce(float* y, long long* cycles) {
  extern __shared__ uint8_t raw[];
  uint8_t* smem = align1024(raw);
  constexpr int kSlice = kPartialBytes / kCluster;
  float4* partial = reinterpret_cast<float4*>(smem);
  uint8_t* received = smem + kPartialBytes;  // kCluster slices, by sender
  const uint32_t barrier = smem_address(received + kPartialBytes);
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    barrier_init(barrier, kPush ? 1 : kCluster);
    barrier_init_fence();
  }
  cluster_sync();
  long long spent = 0;
  for (int round = 0; round < kReduces; ++round) {
    const float value = static_cast<float>(round + rank);  // stands for accumulators
    const long long begin = clock64();
    for (int i = threadIdx.x; i < kPartialBytes / 16; i += kReduceThreads) {
      partial[i] = make_float4(value, value + 1, value + 2, value + 3);
    }
    if constexpr (kPush) {
      async_proxy_fence();
      __syncthreads();
      if (threadIdx.x == 0) arrive_expect_tx(barrier, kPartialBytes);
      if (threadIdx.x < kCluster) {
        const int to = threadIdx.x;  // its own slice too: the sum below then reads one place only
        bulk_copy_to_rank(map_to_rank(smem_address(received) + rank * kSlice, to), smem_address(smem) + to * kSlice,
                          kSlice, map_to_rank(barrier, to));
      }
    } else {
      __syncthreads();
      if (threadIdx.x < kCluster) publish_to_rank(barrier, threadIdx.x);
    }
    wait_parity<!kPush>(barrier, round & 1);
    for (int i = threadIdx.x; i < kSlice / 16; i += kReduceThreads) {
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int from = 0; from < kCluster; ++from) {
        float4 part;
        if constexpr (kPush) {
          part = reinterpret_cast<const float4*>(received + from * kSlice)[i];
        } else {
          asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                       : "=f"(part.x), "=f"(part.y), "=f"(part.z), "=f"(part.w)
                       : "r"(map_to_rank(smem_address(smem) + rank * kSlice, from) + 16 * i)
                       : "memory");
        }
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      reinterpret_cast<float4*>(y + static_cast<size_t>(blockIdx.x) * kSlice / 4)[i] = sum;
    }
    __syncthreads();
    spent += clock64() - begin;
    cluster_sync();  // nobody overwrites a partial or a slice that another still reads; not part of the time
  }
  if (threadIdx.x == 0) cycles[blockIdx.x] = spent / kReduces;
}

template <int kCluster, bool kPush>
void time_reduce(const char* name, int sms) {
  const int ctas = sms / 8 * 8;
  constexpr int kFloats = kPartialBytes / 4 / kCluster;
  float* y = device_array<float>(static_cast<size_t>(ctas) * kFloats);
  long long* cycles = device_array<long long>(ctas);
  launch(reduce<kCluster, kPush>, ctas, kReduceThreads, kAlignSlack + 2 * kPartialBytes + 8, kCluster, y, cycles);
  const std::string head = std::string("reduce ") + name + " cluster " + std::to_string(kCluster);
  emit("cluster", head, median_cycles(cycles, ctas), "cycles");
  int wrong = 0;
  const std::vector<float> sums = download(y, static_cast<size_t>(ctas) * kFloats);
  for (size_t i = 0; i < sums.size(); ++i) {
    const int want = kCluster * (kReduces - 1 + static_cast<int>(i % 4)) + kCluster * (kCluster - 1) / 2;
    wrong += sums[i] != static_cast<float>(want);
  }
  emit("cluster", head + " check", wrong, "mismatches");
  CUDA_CHECK(cudaFree(y));
  CUDA_CHECK(cudaFree(cycles));
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
  time_reduce<2, true>("push", sms);
  time_reduce<4, true>("push", sms);
  time_reduce<8, true>("push", sms);
  time_reduce<2, false>("pull", sms);
  time_reduce<4, false>("pull", sms);
  time_reduce<8, false>("pull", sms);
  for (const bool dependent : {false, true}) {
    const std::string how = dependent ? " dependent launch" : " plain launch";
    emit("cluster", "launch of an empty kernel," + how, chain_us(sms, dependent, 0, 0), "us");
    emit("cluster", "launch of 3000 + 3000 cycles," + how, chain_us(sms, dependent, 3000, 3000), "us");
  }
}
