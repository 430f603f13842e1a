// Whether the driver serves the CUDA runtime of this library. The runtime is linked statically, so it can be newer than
// the driver although torch, which brought an older one, works.
#pragma once

#include <string>

namespace patch_kernels::cuda {

// The newest CUDA that the driver serves, 12040 for 12.4; 0: there is none. Does not initialise CUDA.
int driver_version();

// "" or one sentence. Within a major version any runtime works with any driver (CUDA Compatibility, "Minor version
// compatibility").
std::string driver_complaint(int driver_version, int runtime_version);

// The same for this machine, asked once.
const std::string& driver_complaint();

// Throws std::runtime_error with that sentence, if there is one.
void require_driver(const char* op);

}  // namespace patch_kernels::cuda
