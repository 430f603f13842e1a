// The versions of driver and runtime, compared.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <stdexcept>

#include "driver.h"

namespace patch_kernels::cuda {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

// Not by cudaDriverGetVersion, which initialises the driver (seen with runtime 13.0): this is asked when the library is
// loaded, and no process that is forked after that could use CUDA.
int driver_version() {
  int version = 0;
  if (void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL)) {
    if (void* function = dlsym(driver, "cuDriverGetVersion")) reinterpret_cast<int (*)(int*)>(function)(&version);
  }
  return version;
}

std::string driver_complaint(int driver_version, int runtime_version) {
  if (driver_version / 1000 >= runtime_version / 1000) return "";
  const std::string major = std::to_string(runtime_version / 1000);
  const std::string expected = "expected an NVIDIA driver for CUDA " + major +
                               " or newer, as this build's runtime is " + version_text(runtime_version) + ", got ";
  if (driver_version == 0) return expected + "none. Install one, or build with PATCH_KERNELS_CUDA=0.";
  return expected + "one for CUDA " + version_text(driver_version) +
         ". Update the driver, or rebuild with an nvcc of the driver's major version (12.8 or newer).";
}

const std::string& driver_complaint() {
  static const std::string complaint = driver_complaint(driver_version(), CUDART_VERSION);
  return complaint;
}

void require_driver(const char* op) {
  if (!driver_complaint().empty()) throw std::runtime_error(std::string(op) + ": " + driver_complaint());
}

}  // namespace patch_kernels::cuda
