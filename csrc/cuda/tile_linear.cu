// Device limits and choice of kernel family for tile_linear. Host code only.
#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>

#include "driver.h"
#include "launch.h"
#include "tile_linear.h"
#include "tile_linear_sm80.h"
#include "tile_linear_sm90.h"

namespace patch_kernels::cuda {
namespace {

constexpr int kMaxDevices = 64;

struct Device {
  std::atomic<GemmState> state{GemmState::kUnchecked};  // stored last: `limits` do not change after that
  std::mutex mutex;                                     // for all that follows, until then
  bool known = false;
  DeviceLimits limits{};
  Family best = Family::kSm90;  // that may be used
  std::string reason;           // why it is disabled, or was not checked
  std::string note;             // why it is not the best family
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

DeviceLimits limits_of(int device) {
  DeviceLimits limits{};
  limits.compute_capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  limits.family = best_family(limits.compute_capability);
  limits.sm_count = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.smem_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return limits;
}

// The portable kernels run on Hopper too.
Family next_family(Family family) { return family == Family::kSm90 ? Family::kSm80 : Family::kUnpack; }

const char* kernels_of(Family family) { return family == Family::kSm90 ? "the wgmma kernels" : "the mma kernels"; }

void disable(Device& entry, const std::string& reason) {
  entry.reason = reason;
  entry.limits.family = Family::kUnpack;
  entry.state.store(GemmState::kDisabled, std::memory_order_release);
}

// With the device's lock held.
void read_limits(Device& entry, int device) {
  if (entry.known) return;
  const char* option = getenv("PATCH_KERNELS_SPARSE_GEMM");
  if (option != nullptr && std::string(option) == "0") {
    disable(entry, "switched off by PATCH_KERNELS_SPARSE_GEMM=0");
  } else if (!driver_complaint().empty()) {
    disable(entry, driver_complaint());
  } else {
    entry.limits = limits_of(device);
    const int capability = entry.limits.compute_capability;
    if (entry.limits.family == Family::kUnpack) {
      disable(entry, "no kernel for compute capability " + std::to_string(capability / 10) + "." +
                         std::to_string(capability % 10));
    } else if (entry.best == Family::kUnpack) {
      disable(entry, "");  // the note says why
    } else if (entry.best < entry.limits.family) {
      entry.limits.family = entry.best;
    }
  }
  entry.known = true;
}

// The first calls on a device.
void decide(Device& entry, int device, void* stream) {
  const std::lock_guard<std::mutex> lock(entry.mutex);
  if (entry.state.load(std::memory_order_relaxed) != GemmState::kUnchecked) return;
  read_limits(entry, device);
  if (entry.state.load(std::memory_order_relaxed) != GemmState::kUnchecked) return;
  cudaStreamCaptureStatus capture;
  const cudaError_t asked = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture);
  if (asked == cudaErrorStreamCaptureImplicit) {  // the legacy stream, while another one is captured
    cudaGetLastError();
    return;
  }
  check(asked, "tile_linear");
  if (capture != cudaStreamCaptureStatusNone) return;
  while (entry.limits.family != Family::kUnpack) {
    const CardCheck result = check_family(entry.limits);
    if (!result.ran) {
      entry.reason = "the self-check could not run and is tried again at the next call (" + result.complaint + ")";
      return;
    }
    entry.reason.clear();
    if (result.complaint.empty()) {
      entry.state.store(GemmState::kWorks, std::memory_order_release);
      return;
    }
    entry.note += (entry.note.empty() ? "" : "; ") + std::string(kernels_of(entry.limits.family)) +
                  " failed their self-check (" + result.complaint + ")";
    entry.limits.family = next_family(entry.limits.family);
  }
  disable(entry, "");
}

}  // namespace

GemmStatus gemm_status(int device) {
  Device& entry = device_at(device);
  const std::lock_guard<std::mutex> lock(entry.mutex);
  if (!entry.known && !driver_complaint().empty()) return {Family::kUnpack, GemmState::kDisabled, driver_complaint()};
  const bool both = !entry.note.empty() && !entry.reason.empty();
  return {entry.limits.family, entry.state.load(std::memory_order_relaxed),
          entry.note + (both ? "; " : "") + entry.reason};
}

const DeviceLimits& device_limits(int device) {
  Device& entry = device_at(device);
  const std::lock_guard<std::mutex> lock(entry.mutex);
  read_limits(entry, device);
  return entry.limits;
}

const DeviceLimits* usable_device(int device, void* stream) {
  Device& entry = device_at(device);
  if (entry.state.load(std::memory_order_acquire) == GemmState::kUnchecked) decide(entry, device, stream);
  return entry.state.load(std::memory_order_acquire) == GemmState::kWorks ? &entry.limits : nullptr;
}

bool limit_family(int device, Family best, const std::string& reason) {
  Device& entry = device_at(device);
  const std::lock_guard<std::mutex> lock(entry.mutex);
  if (entry.state.load(std::memory_order_relaxed) != GemmState::kUnchecked) return false;
  entry.best = best;
  entry.note = reason;
  entry.known = false;
  return true;
}

CardCheck check_card(int device, Family family) {
  CardCheck result{false, ""};
  try {
    require_driver("self-check");
    check(cudaSetDevice(device), "self-check");
    DeviceLimits limits = limits_of(device);
    limits.family = family;
    return check_family(limits);
  } catch (const std::exception& error) {
    result.complaint = error.what();
  }
  return result;
}

std::vector<int64_t> read_on_host(const int64_t* numbers, int64_t count, void* stream, const char* op) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(cuda_stream, &capture), op);
  if (capture != cudaStreamCaptureStatusNone) {
    throw std::runtime_error(std::string(op) +
                             ": expected a stream that is not captured, got one that is: the experts of the tokens are "
                             "read on the host. Leave mixtures out of the CUDA graph.");
  }
  std::vector<int64_t> result(count);
  check(cudaMemcpyAsync(result.data(), numbers, count * sizeof(int64_t), cudaMemcpyDeviceToHost, cuda_stream), op);
  const RelaxedCapture relaxed;  // another thread may be capturing
  check(cudaStreamSynchronize(cuda_stream), op);
  return result;
}

void write_on_device(const std::vector<int64_t>& numbers, int64_t* to, void* stream, const char* op) {
  // From pageable memory the call returns once the numbers have left it (CUDA Runtime API, "API synchronization").
  check(cudaMemcpyAsync(to, numbers.data(), numbers.size() * sizeof(int64_t), cudaMemcpyHostToDevice,
                        static_cast<cudaStream_t>(stream)),
        op);
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
    place_layers(problem, plan.pairs ? 2 * plan.row_ctas : 1);
    sm90_tile_linear(problem, plan, dtype, stream);
  } else {
    sm80_tile_linear(problem, plan, dtype, partials, stream);
  }
}

}  // namespace patch_kernels::cuda
