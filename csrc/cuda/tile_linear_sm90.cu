// tile_linear on Hopper: instantiations and launcher of gemm/sm90.h.
#include <atomic>

#include "launch.h"
#include "machine_sm90.cuh"
#include "packed_dtype.cuh"
#include "tile_linear_sm90.h"

namespace patch_kernels::cuda {
namespace {

struct YMaps {
  CUtensorMap of[kMaxLayers];
};

template <class C, class Element>
__global__ void __launch_bounds__(C::kThreads, C::kPairs ? 1 : 2)
    sm90_kernel(const __grid_constant__ GemmProblem p, const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ YMaps y_maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t smem[];
  MachineSm90<Element, !C::kPairs> machine(smem);
  if ((machine.smem_base() & 1023) != 0) __trap();  // the swizzle is a function of the address
  sm90::tile_gemm<C>(machine, p, x_map, y_maps.of);
#endif
}

// The driver makes tensor maps. Asked for at run time: the library must load where there is no driver.
CUtensorMap tensor_map(const void* base, int64_t rows, int64_t cols, int64_t stride, int box_rows,
                       CUtensorMapDataType type) {
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
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * kValueBytes};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, element_strides[2] = {1, 1};
  const CUresult result = encode(&map, type, 2, const_cast<void*>(base), sizes, strides, box, element_strides,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("tile_linear: cuTensorMapEncodeTiled refused a " + std::to_string(rows) + "x" +
                             std::to_string(cols) + " tensor of row stride " + std::to_string(stride) + " (error " +
                             std::to_string(static_cast<int>(result)) + ")");
  }
  return map;
}

// The kernel with its shared memory allowed, and its launch. Attributes: cluster, then overlap with the grid before.
template <class C, class Element>
auto* prepared_kernel() {
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(sm90_kernel<C, Element>, C::kSmemBytes, allowed, "tile_linear");
  return sm90_kernel<C, Element>;
}

template <class C>
cudaLaunchConfig_t launch_config(int clusters, int cluster_ctas, cudaStream_t stream,
                                 cudaLaunchAttribute (&attributes)[2], int count) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(cluster_ctas);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * cluster_ctas));
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = C::kSmemBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = static_cast<unsigned>(count);
  return config;
}

template <class C, class Packed>
void launch(const GemmProblem& p, const LaunchPlan& plan, cudaStream_t stream) {
  constexpr CUtensorMapDataType kType = OnCard<Packed>::kTensorMap;
  auto* kernel = prepared_kernel<C, typename OnCard<Packed>::Element>();
  const CUtensorMap x_map = tensor_map(p.x, p.tokens, p.cols, p.x_stride, C::kBn, kType);
  YMaps y_maps;
  for (int i = 0; i < kMaxLayers; ++i) {
    const GemmLayer& layer = p.layers[i];
    // Prefetched even where it is not used, so it must be a map.
    const bool is_used = C::kPairs && i < p.layer_count && layer.rows % 8 == 0;
    y_maps.of[i] = is_used ? tensor_map(layer.y, p.tokens, layer.rows, layer.rows, C::kStageTokens, kType) : x_map;
  }
  cudaLaunchAttribute attributes[2];
  const int ctas = p.token_ctas * p.row_ctas * p.splits;
  const cudaLaunchConfig_t config =
      launch_config<C>(p.items.workers, ctas, stream, attributes, plan.overlaps_previous ? 2 : 1);
  check(cudaLaunchKernelEx(&config, kernel, p, x_map, y_maps), "tile_linear");
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
    cudaLaunchAttribute attributes[2];
    const cudaLaunchConfig_t config = launch_config<C>(1, size, nullptr, attributes, 1);
    check(cudaOccupancyMaxActiveClusters(&clusters[size], kernel, &config), "tile_linear");
  }
}

}  // namespace patch_kernels::cuda
