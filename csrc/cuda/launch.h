// Turns a failed launch into an exception with CUDA's own words. Right after each launch: the error state belongs to
// our statically linked runtime, not to torch's.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace patch_kernels::cuda {

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(kernel) + ": CUDA launch failed: " + cudaGetErrorString(error) +
                             ". Run `patch-llm info` to see which architectures this build has.");
  }
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

}  // namespace patch_kernels::cuda
