// A CUDA runtime that launches nothing: the host side of the GPU ops runs on a machine without a GPU, where its time
// can be measured (benchmarks/ops/bench_host_cost.py) and what it would launch can be seen
// (tests/kernels/test_cuda_host.py). Where it is asked to, it computes what the launch would (bf16, plain loops).
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../../cuda/driver.h"
#include "../../cuda/tile_linear.h"
#include "../../math/elements.h"
#include "../../ops.h"

#define PK_EXPORT extern "C" __attribute__((visibility("default")))

// What a launch was told.
struct FakeLaunch {
  int grid, cluster, spread, overlaps;  // attributes: 0 where there is none
  patch_kernels::GemmProblem problem;
  CUtensorMap x_map, y_maps[patch_kernels::kMaxLayers];
};

namespace {

constexpr int kMapWords = 6;  // of a CUtensorMap that encode() fills
FakeLaunch last_launch;
int launches, encodes, syncs;
bool checks_card;     // else every family passes
bool computes;        // launches have results
std::string failing;  // the function that fails,
cudaError_t failure;  // and how
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
bool is_capturing;

cudaError_t result_of(const char* function) { return failing == function ? failure : cudaSuccess; }

// Stands for the driver's, whose time is not known here: it fills the 128 bytes from its arguments.
CUresult CUDAAPI encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t, void* base, const cuuint64_t* sizes,
                        const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                        CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  ++encodes;
  memset(map, 0, sizeof(*map));
  const cuuint64_t words[kMapWords] = {reinterpret_cast<uintptr_t>(base), sizes[0], sizes[1], strides[0], box[1],
                                       static_cast<cuuint64_t>(type)};
  memcpy(map->opaque, words, sizeof(words));
  return CUDA_SUCCESS;
}

void serially(int64_t n, patch_kernels::ParallelBody body, void* context) { body(0, n, context); }

// The packed weight of a layer, by what kernels read of it.
std::vector<uint16_t> weight_of(const patch_kernels::GemmLayer& layer, int cols) {
  const patch_kernels::Schedule& schedule = layer.schedule;
  std::vector<uint8_t> flags(static_cast<size_t>(schedule.tile_rows) * schedule.tile_cols);
  for (int position = 0; position < schedule.tile_rows; ++position) {
    const uint32_t* entries = patch_kernels::row_tiles(schedule, position);
    for (int k = 0; k < schedule.tile_cols; ++k) {
      flags[schedule.order[position] * schedule.tile_cols + k] = patch_kernels::entry_is_sparse(entries[k]);
    }
  }
  std::vector<uint16_t> weight(static_cast<size_t>(layer.rows) * cols);
  patch_kernels::cpu::unpack_tiles({layer.payload, flags.data(), layer.rows, cols}, weight.data(), serially);
  return weight;
}

void compute(const patch_kernels::GemmProblem& p) {
  using Value = patch_kernels::BFloat16;
  const auto value = [](const uint16_t* at) {
    Value bits;
    memcpy(&bits, at, sizeof(bits));
    return patch_kernels::load_as<float>(bits);
  };
  for (int i = 0; i < p.layer_count; ++i) {
    const patch_kernels::GemmLayer& layer = p.layers[i];
    const std::vector<uint16_t> weight = weight_of(layer, p.cols);
    const auto* bias = static_cast<const uint16_t*>(layer.bias);
    for (int64_t token = 0; token < layer.tokens; ++token) {
      const uint16_t* x = static_cast<const uint16_t*>(p.x) + (layer.first_token + token) * p.x_stride;
      for (int64_t row = 0; row < layer.rows; ++row) {
        float sum = bias ? value(bias + row) : 0.0f;
        for (int64_t k = 0; k < p.cols; ++k) sum += value(weight.data() + row * p.cols + k) * value(x + k);
        patch_kernels::store_as(sum, static_cast<Value*>(layer.y)[token * layer.y_stride + row]);
      }
    }
  }
}

void record(void** args, bool with_maps) {
  ++launches;
  memcpy(&last_launch.problem, args[0], sizeof(last_launch.problem));
  if (computes) compute(last_launch.problem);
  if (!with_maps) return;
  memcpy(&last_launch.x_map, args[1], sizeof(CUtensorMap));
  memcpy(last_launch.y_maps, args[2], sizeof(last_launch.y_maps));
}

struct {
  dim3 grid, block;
  size_t smem;
} configuration;

}  // namespace

// In the order of LAUNCH in benchmarks/ops/cuda_host.py.
PK_EXPORT void fake_last_launch(int64_t* out) {
  const FakeLaunch& l = last_launch;
  const patch_kernels::GemmProblem& p = l.problem;
  const patch_kernels::GemmLayer& layer = p.layers[0];
  const auto address = [](const void* pointer) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)); };
  for (const int64_t value :
       {int64_t{l.grid}, int64_t{l.cluster}, int64_t{l.spread}, int64_t{l.overlaps}, address(p.x),
        address(layer.payload), address(layer.bias), address(layer.y), address(layer.schedule.tiles), int64_t{p.tokens},
        int64_t{layer.rows}, int64_t{p.cols}, int64_t{p.x_stride}, int64_t{p.items.workers}, int64_t{p.token_ctas},
        int64_t{p.row_ctas}, int64_t{p.splits}, int64_t{p.layer_count}, int64_t{p.items.units}}) {
    *out++ = value;
  }
  for (const CUtensorMap* map : {&l.x_map, &l.y_maps[0]}) {
    for (int i = 0; i < kMapWords; ++i) *out++ = static_cast<int64_t>(map->opaque[i]);
  }
}
// In the order of LAYER, one after the other; returns their number.
PK_EXPORT int fake_last_layers(int64_t* out) {
  const patch_kernels::GemmProblem& p = last_launch.problem;
  for (int i = 0; i < p.layer_count; ++i) {
    const patch_kernels::GemmLayer& layer = p.layers[i];
    const auto* map = last_launch.y_maps[i].opaque;
    for (const void* pointer : {static_cast<const void*>(layer.payload), layer.bias, static_cast<const void*>(layer.y),
                                static_cast<const void*>(layer.schedule.tiles)}) {
      *out++ = static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer));
    }
    *out++ = layer.rows, *out++ = p.first_unit[i];
    *out++ = layer.first_token, *out++ = layer.tokens, *out++ = layer.y_stride;
    for (int word = 0; word < 4; ++word) *out++ = static_cast<int64_t>(map[word]);
  }
  return p.layer_count;
}
PK_EXPORT void fake_counts(int* counts) { counts[0] = launches, counts[1] = encodes, counts[2] = syncs; }
PK_EXPORT void fake_checks_card(bool does) { checks_card = does; }
PK_EXPORT void fake_computes(bool does) { computes = does; }
PK_EXPORT void fake_capturing(bool is) { is_capturing = is; }
PK_EXPORT int fake_capture_mode() { return mode; }
PK_EXPORT void fake_failure(const char* function, int error) {
  failing = function;
  failure = static_cast<cudaError_t>(error);
}

extern "C" {
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  // Another thread captures in global mode: only a relaxed one may allocate.
  if (mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  if (result_of("cudaMalloc") != cudaSuccess) return failure;
  *memory = aligned_alloc(256, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  free(memory);
  return mode == cudaStreamCaptureModeRelaxed ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return result_of("cudaMemcpyAsync");
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(*other, mode);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = reinterpret_cast<cudaStream_t>(uintptr_t{64} + flags);  // the user's stream is null
  return result_of("cudaStreamCreateWithFlags");
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  ++syncs;
  return mode == cudaStreamCaptureModeRelaxed ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return result_of("cudaStreamIsCapturing");
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Device 1 is half an H100, device 2 an A100, every other one an H100 SXM.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
  *value = 0;
  if (name == cudaDevAttrComputeCapabilityMajor) *value = device == 2 ? 8 : 9;
  if (name == cudaDevAttrMultiProcessorCount) *value = device == 1 ? 66 : device == 2 ? 108 : 132;
  if (name == cudaDevAttrMaxSharedMemoryPerBlockOptin) *value = device == 2 ? 166912 : 232448;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  *clusters = 128 / static_cast<int>(config->gridDim.x);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string text;
  text = "fake error " + std::to_string(error);
  return text.c_str();
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(encode);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void** args) {
  record(args, true);
  last_launch.grid = static_cast<int>(config->gridDim.x);
  last_launch.cluster = last_launch.spread = last_launch.overlaps = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      last_launch.cluster = static_cast<int>(attribute.val.clusterDim.x);
    } else if (attribute.id == cudaLaunchAttributeClusterSchedulingPolicyPreference) {
      last_launch.spread = attribute.val.clusterSchedulingPolicyPreference == cudaClusterSchedulingPolicySpread;
    } else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      last_launch.overlaps = attribute.val.programmaticStreamSerializationAllowed;
    }
  }
  return result_of("cudaLaunchKernelExC");
}

// What nvcc makes of kernel<<<...>>>(...) and of a file with kernels (crt/host_runtime.h).
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t smem, CUstream_st*) {
  configuration.grid = grid, configuration.block = block, configuration.smem = smem;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* smem, void*) {
  *grid = configuration.grid, *block = configuration.block, *smem = configuration.smem;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void*) {
  *kernel = nullptr;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void** args, size_t smem, cudaStream_t) {
  record(args, false);
  last_launch.grid = static_cast<int>(grid.x);
  return cudaSuccess;
}
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
}  // extern "C"

namespace patch_kernels::cuda {

CardCheck check_family_on_card(DeviceLimits& limits);  // self_check.cu, renamed by CMakeLists.txt
CardCheck check_family(DeviceLimits& limits) {
  if (checks_card) return check_family_on_card(limits);
  if (limits.family == Family::kSm90) {
    for (int size = 1; size <= kMaxSplits; size *= 2) limits.clusters[size] = limits.sm_count / size;
    limits.clusters_known = true;
  }
  return {true, ""};
}

int driver_version() { return CUDART_VERSION; }
std::string driver_complaint(int, int) { return ""; }
const std::string& driver_complaint() {
  static const std::string none;
  return none;
}
void require_driver(const char*) {}

void unpack_tiles(const TiledMatrix& matrix, const Schedule&, uint16_t* weight, void*) {
  if (!computes) throw std::runtime_error("unpacked");
  cpu::unpack_tiles(matrix, weight, serially);
}

// Ops that are not looked at here.
void masked_weight(const MaskedWeightArgs&, void*, double*, double*, void*) { abort(); }
void masked_weight_backward(const MaskedWeightArgs&, const MaskedWeightGrads&, void*) { abort(); }
void adamw_step(const AdamWArgs&, void*) { abort(); }

}  // namespace patch_kernels::cuda
