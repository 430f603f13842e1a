// Turns a failed launch into an exception with CUDA's own words. Right after each launch: the error state belongs to
// our statically linked runtime, not to torch's.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace patch_kernels::cuda {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(kernel) + ": CUDA launch failed: " + cudaGetErrorString(error) +
                             ". Run `patch-llm info` to see which architectures this build has.");
  }
}

}  // namespace patch_kernels::cuda
