// Launcher of the Hopper GEMM.
#pragma once

#include "../gemm/problem.h"
#include "../ops.h"

namespace patch_kernels::cuda {

// Runs a plan of Family::kSm90; p.items, token_ctas and splits are the plan's. Throws std::runtime_error with CUDA's
// text. No allocation, no synchronisation: may be captured into a graph.
void sm90_tile_linear(const GemmProblem& p, const LaunchPlan& plan, DType dtype, void* stream);

// Clusters of 1, 2, 4 and 8 CTAs that the current device runs at once, one CTA an SM; clusters[size].
void sm90_count_clusters(int (&clusters)[kMaxSplits + 1]);

}  // namespace patch_kernels::cuda
