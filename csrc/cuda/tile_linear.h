// The GEMM of a CUDA device: which kernel family it gets, whether that family was seen working there, and running it.
// No torch here: the binding brings memory and stream.
#pragma once

#include <string>

#include "../gemm/problem.h"
#include "../ops.h"

namespace patch_kernels::cuda {

enum class GemmState {
  kUnchecked,  // no call yet
  kWorks,      // the self-check's results were exact
  kDisabled,   // switched off, failed the self-check, or no kernel for this GPU; see `reason`
};

struct GemmStatus {
  Family family;
  GemmState state;
  std::string reason;  // why it is disabled, or why this is not the best family for the card
};

// Never synchronises and never launches.
GemmStatus gemm_status(int device);

// The device's limits, read once. Must not be called for the first time while a stream is being captured.
const DeviceLimits& device_limits(int device);

// Whether the family of this device may be used on this stream. The first call on a device runs the self-check: small
// integer problems through every kernel of the family, compared bit for bit. It needs self_check_bytes() of device
// memory, which `allocate` returns (called at most once), and waits for the stream. While the stream is captured
// nothing is checked, and an unchecked family is not used.
bool gemm_is_usable(int device, void* stream, void* (*allocate)(int64_t bytes, void* context), void* context);

// fp32 numbers of workspace that run_gemm needs; they need no initialisation.
int64_t gemm_partial_floats(const GemmProblem& problem, const LaunchPlan& plan);

// Launches a plan on a stream. items, token_ctas and splits are taken from the plan.
void run_gemm(GemmProblem problem, const LaunchPlan& plan, DType dtype, float* partials, void* stream);

}  // namespace patch_kernels::cuda
