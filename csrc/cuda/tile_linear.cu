// Device limits, self-check and choice of kernel family for tile_linear. Host code only.
#include <array>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "../check/self_check.h"
#include "launch.h"
#include "tile_linear.h"
#include "tile_linear_sm80.h"
#include "tile_linear_sm90.h"

namespace patch_kernels::cuda {
namespace {

constexpr int kMaxDevices = 64;

struct Device {
  std::mutex mutex;
  bool known = false;
  DeviceLimits limits{};
  GemmState state = GemmState::kUnchecked;
  std::string reason;  // why it is disabled
  std::string note;    // why it is not the best family
};

Device& device_at(int device) {
  static std::array<Device, kMaxDevices> devices;
  if (device < 0 || device >= kMaxDevices) {
    throw std::runtime_error("tile_linear: device number " + std::to_string(device) + " is outside 0..63");
  }
  return devices[device];
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "tile_linear");
  return value;
}

// With the device's lock held.
void read_limits(Device& entry, int device) {
  if (entry.known) return;
  DeviceLimits& limits = entry.limits;
  limits.compute_capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  limits.family = best_family(limits.compute_capability);
  limits.sm_count = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.smem_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const char* option = getenv("PATCH_KERNELS_SPARSE_GEMM");
  if (option != nullptr && std::string(option) == "0") {
    entry.state = GemmState::kDisabled;
    entry.reason = "switched off by PATCH_KERNELS_SPARSE_GEMM=0";
  } else if (limits.family == Family::kUnpack) {
    entry.state = GemmState::kDisabled;
    entry.reason = "no kernel for compute capability " + std::to_string(limits.compute_capability / 10) + "." +
                   std::to_string(limits.compute_capability % 10);
  }
  entry.known = true;
}

// A bump allocator over the workspace.
class Arena {
 public:
  Arena(void* base, int64_t bytes) : next_(static_cast<uint8_t*>(base)), end_(next_ + bytes) {}
  void* take(int64_t bytes) {
    uint8_t* taken = next_;
    next_ += (bytes + 255) / 256 * 256;
    if (next_ > end_) throw std::runtime_error("tile_linear: the self-check's workspace is too small");
    return taken;
  }
  template <class T>
  T* upload(const T* data, size_t count, cudaStream_t stream) {
    T* copy = static_cast<T*>(take(static_cast<int64_t>(count * sizeof(T))));
    check(cudaMemcpyAsync(copy, data, count * sizeof(T), cudaMemcpyHostToDevice, stream), "self-check");
    return copy;
  }

 private:
  uint8_t *next_, *end_;
};

constexpr int64_t kSelfCheckBytes = int64_t{48} << 20;  // x, two y and partial sums of the largest problem

// "" or what was wrong.
template <class Packed>
std::string run_self_check(const SelfCheck& self_check, void* workspace, cudaStream_t stream) {
  constexpr DType dtype = Packed::kDType;
  IntegerProblem<Element<Packed>> problem(self_check.sizes);
  Arena arena(workspace, kSelfCheckBytes);
  GemmProblem p = problem.view();
  p.x = arena.upload(problem.x.data, problem.x.size, stream);
  p.payload = arena.upload(problem.payload->data, problem.payload->size, stream);
  p.bias = arena.upload(problem.bias.data(), problem.bias.size(), stream);
  p.schedule = schedule_view(arena.upload(problem.words.data(), problem.words.size(), stream), problem.tile_rows,
                             problem.tile_cols);
  const size_t y_bytes = problem.y.size * kValueBytes;
  uint16_t* y[2];  // of two launches, the second of which may overlap the first
  for (uint16_t*& each : y) each = static_cast<uint16_t*>(arena.take(static_cast<int64_t>(y_bytes)));
  for (LaunchPlan plan : self_check.plans) {
    Arena rest = arena;
    auto* partials = static_cast<float*>(rest.take(4 * gemm_partial_floats(p, plan)));
    plan.overlaps_previous = true;
    problem.poison();
    for (uint16_t* each : y) {
      check(cudaMemcpyAsync(each, problem.y.data, y_bytes, cudaMemcpyHostToDevice, stream), "self-check");
    }
    for (uint16_t* each : y) {
      p.y = each + problem.kCanaries;
      run_gemm(p, plan, dtype, partials, stream);
    }
    std::string complaint;
    for (uint16_t* each : y) {
      check(cudaMemcpyAsync(problem.y.data, each, y_bytes, cudaMemcpyDeviceToHost, stream), "self-check");
      check(cudaStreamSynchronize(stream), "self-check");
      if (complaint.empty()) complaint = problem.complaint();
    }
    if (!complaint.empty()) {
      return std::string(Packed::kShortName) + ", " + std::to_string(plan.bn) + " tokens a CTA, " +
             std::to_string(plan.token_ctas) + "x" + std::to_string(plan.row_ctas) + "x" + std::to_string(plan.splits) +
             " CTAs, " + std::to_string(problem.tile_cols) + " tile columns: " + complaint;
    }
  }
  return "";
}

std::string check_device(DeviceLimits& limits, void* workspace, cudaStream_t stream) {
  try {
    if (limits.family == Family::kSm90) {
      sm90_count_clusters(limits.clusters);
      limits.clusters_known = true;
    }
    std::string complaint = family_complaint(limits);
    for_each_packed([&](auto packed) {
      for (const SelfCheck& self_check : self_checks(limits, decltype(packed)::kDType)) {
        if (complaint.empty()) complaint = run_self_check<decltype(packed)>(self_check, workspace, stream);
      }
    });
    return complaint;
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace

GemmStatus gemm_status(int device) {
  Device& entry = device_at(device);
  const std::lock_guard<std::mutex> lock(entry.mutex);
  if (!entry.known) return {Family::kUnpack, GemmState::kUnchecked, ""};
  const bool both = !entry.note.empty() && !entry.reason.empty();
  return {entry.limits.family, entry.state, entry.note + (both ? "; " : "") + entry.reason};
}

const DeviceLimits& device_limits(int device) {
  Device& entry = device_at(device);
  const std::lock_guard<std::mutex> lock(entry.mutex);
  read_limits(entry, device);
  return entry.limits;
}

bool gemm_is_usable(int device, void* stream, void* (*allocate)(int64_t, void*), void* context) {
  Device& entry = device_at(device);
  const std::lock_guard<std::mutex> lock(entry.mutex);
  if (entry.state != GemmState::kUnchecked) return entry.state == GemmState::kWorks;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus capture;
  const cudaError_t asked = cudaStreamIsCapturing(cuda_stream, &capture);
  if (asked == cudaErrorStreamCaptureImplicit) {  // the legacy stream, while another one is captured
    cudaGetLastError();
    return false;
  }
  check(asked, "tile_linear");
  if (capture != cudaStreamCaptureStatusNone) return false;
  read_limits(entry, device);
  if (entry.state != GemmState::kUnchecked) return false;
  void* workspace = allocate(kSelfCheckBytes, context);
  entry.reason = check_device(entry.limits, workspace, cuda_stream);
  if (!entry.reason.empty() && entry.limits.family == Family::kSm90) {
    // The portable kernels run on Hopper too.
    entry.note = "the wgmma kernels failed their self-check (" + entry.reason + ")";
    entry.limits.family = Family::kSm80;
    entry.reason = check_device(entry.limits, workspace, cuda_stream);
  }
  entry.state = entry.reason.empty() ? GemmState::kWorks : GemmState::kDisabled;
  return entry.state == GemmState::kWorks;
}

int64_t gemm_partial_floats(const GemmProblem& problem, const LaunchPlan& plan) {
  return plan.family == Family::kSm80 ? sm80_partial_floats(problem, plan) : 0;
}

void run_gemm(GemmProblem problem, const LaunchPlan& plan, DType dtype, float* partials, void* stream) {
  problem.items = plan.items;
  problem.token_ctas = plan.token_ctas;
  problem.row_ctas = plan.row_ctas;
  problem.splits = plan.splits;
  if (plan.family == Family::kSm90) {
    sm90_tile_linear(problem, plan, dtype, stream);
  } else {
    sm80_tile_linear(problem, plan, dtype, partials, stream);
  }
}

}  // namespace patch_kernels::cuda
