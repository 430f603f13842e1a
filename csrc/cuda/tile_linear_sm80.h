// Launchers of the sm_80 family (gemm/sm80.h). Declared without CUDA headers, for the bindings.
#pragma once

#include <cstdint>

#include "../gemm/problem.h"
#include "../ops.h"

namespace patch_kernels::cuda {

// fp32 workspace of a call; 0 unless it splits K. Needs no initialisation.
int64_t sm80_partial_floats(const GemmProblem& problem, const LaunchPlan& plan);

// One launch, or two when plan.splits > 1. `partials` is 16-byte aligned, `stream` a cudaStream_t. problem.items and
// problem.splits are the plan's. Nothing is kept between calls. Throws std::runtime_error if a launch fails.
void sm80_tile_linear(const GemmProblem& problem, const LaunchPlan& plan, DType dtype, float* partials, void* stream);

}  // namespace patch_kernels::cuda
