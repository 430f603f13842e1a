// tile_linear on Hopper: instantiations and launcher of gemm/sm90.h.
#include <atomic>

#include "launch.h"
#include "machine_sm90.cuh"
#include "packed_dtype.cuh"
#include "tile_linear_sm90.h"

namespace patch_kernels::cuda {
namespace {

struct YMaps {
  CUtensorMap layer[kMaxLayers];
};
static_assert(sizeof(GemmProblem) + sizeof(CUtensorMap) + sizeof(YMaps) <= 4000, "4 KB of parameters, with padding");

template <class C, class Element>
__global__ void __launch_bounds__(C::kThreads, C::kPairs ? 1 : 2)
    sm90_kernel(const __grid_constant__ GemmProblem p, const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ YMaps y_of) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t smem[];
  MachineSm90<Element, !C::kPairs> machine(smem);
  if ((machine.smem_base() & 1023) != 0) __trap();  // the swizzle is a function of the address
  sm90::tile_gemm<C>(machine, p, x_map, y_of.layer);
#endif
}

// All that a tensor map follows from: it holds an address and sizes, nothing of what lies there, so a map made for
// memory that was freed is the right one for the next tensor there.
struct MapKey {
  const void* base;
  int64_t rows, cols, stride;
  int box_rows;
  CUtensorMapDataType type;

  bool operator==(const MapKey& o) const {
    return base == o.base && rows == o.rows && cols == o.cols && stride == o.stride && box_rows == o.box_rows &&
           type == o.type;
  }
};

// The driver makes tensor maps. Asked for at run time: the library must load where there is no driver.
CUtensorMap encoded_map(const MapKey& key) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "tile_linear");
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(
          "tile_linear: this driver has no cuTensorMapEncodeTiled. Update it to CUDA 12 or newer.");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(key.cols), static_cast<cuuint64_t>(key.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(key.stride) * kValueBytes};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(key.box_rows)}, element_strides[2] = {1, 1};
  const CUresult result = encode(&map, key.type, 2, const_cast<void*>(key.base), sizes, strides, box, element_strides,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("tile_linear: cuTensorMapEncodeTiled refused a " + std::to_string(key.rows) + "x" +
                             std::to_string(key.cols) + " tensor of row stride " + std::to_string(key.stride) +
                             " (error " + std::to_string(static_cast<int>(result)) + ")");
  }
  return map;
}

// Maps of a thread's last calls: torch's allocator gives a model the same few addresses again and again.
class MapCache {
 public:
  CUtensorMap get(const MapKey& key) {
    uint64_t hash = reinterpret_cast<uintptr_t>(key.base) >> 9;  // torch's blocks start at multiples of 512 bytes
    hash = (hash * 31 + static_cast<uint64_t>(key.rows)) * 31 + static_cast<uint64_t>(key.cols + key.box_rows);
    Entry& entry = entries_[hash * 0x9E3779B97F4A7C15u >> (64 - kBits)];  // multiplicative hashing, golden ratio
    if (!(entry.key == key)) {
      entry.map = encoded_map(key);
      entry.key = key;
    }
    return entry.map;
  }

 private:
  static constexpr int kBits = 6;
  struct Entry {
    MapKey key{};
    CUtensorMap map;
  };
  Entry entries_[1 << kBits];
};

// One for each operand: the x and the y of a call cannot take each other's place.
MapCache& x_maps() {
  static thread_local MapCache maps;
  return maps;
}
MapCache& y_maps() {
  static thread_local MapCache maps;
  return maps;
}

// The kernel with its shared memory allowed.
template <class C, class Element>
auto* prepared_kernel() {
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(sm90_kernel<C, Element>, C::kSmemBytes, allowed, "tile_linear");
  return sm90_kernel<C, Element>;
}

// A launch and its attributes, which cudaLaunchConfig_t points to.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[3];

  Launch(const Launch&) = delete;
  Launch(int threads, int smem_bytes, int clusters, int cluster_ctas, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(clusters * cluster_ctas));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
    config.stream = stream;
    config.attrs = attributes;
  }

  cudaLaunchAttributeValue& add(cudaLaunchAttributeID id) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = id;
    return attribute.val;
  }

  void add_cluster(int ctas) {
    cudaLaunchAttributeValue& value = add(cudaLaunchAttributeClusterDimension);
    value.clusterDim.x = static_cast<unsigned>(ctas);
    value.clusterDim.y = value.clusterDim.z = 1;
  }
};

template <class C, class Packed>
void launch(const GemmProblem& p, const LaunchPlan& plan, cudaStream_t stream) {
  constexpr CUtensorMapDataType kType = OnCard<Packed>::kTensorMap;
  auto* kernel = prepared_kernel<C, typename OnCard<Packed>::Element>();
  const CUtensorMap x_map = x_maps().get({p.x, p.tokens, p.cols, p.x_stride, C::kBn, kType});
  YMaps y_of;
  for (int i = 0; i < p.layer_count; ++i) {
    const GemmLayer& layer = p.layers[i];
    // Prefetched even where it is not used, so it must be a map.
    const bool is_used = C::kPairs && layer.rows % 8 == 0 && layer.tokens > 0;
    y_of.layer[i] =
        is_used ? y_maps().get({layer.y, layer.tokens, layer.rows, layer.y_stride, C::kStageTokens, kType}) : x_map;
  }
  const int ctas = p.token_ctas * p.row_ctas * p.splits;
  Launch launch(C::kThreads, C::kSmemBytes, p.items.workers, ctas, stream);
  // Without the attribute a CTA is a cluster of its own all the same (PTX ISA, %is_explicit_cluster), and is placed as
  // the CTAs of any kernel are.
  if (ctas > 1) launch.add_cluster(ctas);
  // Two CTAs of decode fit an SM. A split is there to use more SMs: the CTAs of a cluster must not share one.
  if (ctas > 1 && !C::kPairs) {
    launch.add(cudaLaunchAttributeClusterSchedulingPolicyPreference).clusterSchedulingPolicyPreference =
        cudaClusterSchedulingPolicySpread;
  }
  if (plan.overlaps_previous) {
    launch.add(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed = 1;
  }
  check(cudaLaunchKernelEx(&launch.config, kernel, p, x_map, y_of), "tile_linear");
}

}  // namespace

void sm90_tile_linear(const GemmProblem& p, const LaunchPlan& plan, DType dtype, void* stream) {
  const bool known = sm90::with_config(plan.pairs, plan.bn, plan.splits, [&](auto config) {
    using C = decltype(config);
    with_packed(dtype, [&](auto packed) { launch<C, decltype(packed)>(p, plan, static_cast<cudaStream_t>(stream)); });
  });
  if (!known)
    throw std::runtime_error("tile_linear: no Hopper kernel for " + std::to_string(plan.bn) + " tokens a CTA");
}

void sm90_count_clusters(int (&clusters)[kMaxSplits + 1]) {
  using C = sm90::Prefill128;  // one CTA an SM
  auto* kernel = prepared_kernel<C, __nv_bfloat16>();
  for (int& count : clusters) count = 0;
  for (int size = 1; size <= kMaxSplits; size *= 2) {
    Launch launch(C::kThreads, C::kSmemBytes, 1, size, nullptr);
    launch.add_cluster(size);
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters[size], kernel, &launch.config);
    if (size > 1 && error == cudaErrorInvalidClusterSize) {  // a slice of a card may not have so many SMs together
      cudaGetLastError();
      clusters[size] = 0;
    } else {
      check(error, "tile_linear");
    }
  }
}

}  // namespace patch_kernels::cuda
