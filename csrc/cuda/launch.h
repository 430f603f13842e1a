// Turns a failed launch into an exception with CUDA's own words. Right after each launch: the error state belongs to
// our statically linked runtime, not to torch's.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace patch_kernels::cuda {

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // else the next launch would report this one again
    throw std::runtime_error(std::string(kernel) + ": CUDA launch failed: " + cudaGetErrorString(error) +
                             ". Run `patch-llm info` to see which architectures this build has.");
  }
}

// Lets a kernel have more than 48 KB of dynamic shared memory, once a device; `allowed` is a static of the caller's
// kernel.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes, std::atomic<uint64_t>& allowed, const char* name) {
  int device = 0;
  check(cudaGetDevice(&device), name);
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (allowed.load(std::memory_order_relaxed) & bit) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  // All of it, so that a CTA of the next kernel fits beside this one's and no SM has to change its share of L1.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        name);
  allowed.fetch_or(bit, std::memory_order_relaxed);
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// Another thread's capture in global mode forbids this one to allocate and to wait, and would be spoilt by it; relaxed
// mode lifts that (CUDA Runtime API, cudaThreadExchangeStreamCaptureMode).
class RelaxedCapture {
 public:
  RelaxedCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "relaxed capture"); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // of this object first, then the thread's own
};

}  // namespace patch_kernels::cuda
