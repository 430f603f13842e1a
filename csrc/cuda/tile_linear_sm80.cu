// The sm_80 family on the GPU: kernels for every (tokens of a CTA, depth) and packed dtype, and their launch.
#include "launch.h"
#include "machine_sm80.cuh"
#include "packed_dtype.cuh"
#include "tile_linear_sm80.h"

namespace patch_kernels::cuda {
namespace {

constexpr int kAddThreads = 256;

template <class Config, class Element>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinCtas)
    tile_linear_sm80(const __grid_constant__ GemmProblem problem, float* partials) {
  extern __shared__ __align__(128) uint8_t smem[];
  MachineSm80<Element> machine(smem);
  patch_kernels::sm80_tile_linear<Config>(machine, problem, partials);
}

template <class Element>
__global__ void __launch_bounds__(kAddThreads)
    add_splits_sm80(const __grid_constant__ GemmProblem problem, const float* partials) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (thread < sm80_add_threads(problem)) sm80_add_splits<MachineSm80<Element>>(problem, partials, thread);
}

// Calls f with the configuration of a plan. Depths: one for GPUs with 163 KB of shared memory, one for 99 KB.
template <class F>
void with_config(const LaunchPlan& plan, F f) {
  switch (1000 * plan.depth + plan.bn) {
    case 4016:
      return f(Sm80Decode<16, 4>{});
    case 2016:
      return f(Sm80Decode<16, 2>{});
    case 4032:
      return f(Sm80Decode<32, 4>{});
    case 2032:
      return f(Sm80Decode<32, 2>{});
    case 3128:
      return f(Sm80Prefill<3>{});
    case 1128:
      return f(Sm80Prefill<1>{});
  }
  throw std::runtime_error("tile_linear_sm80: no kernel for " + std::to_string(plan.bn) + " tokens a CTA with depth " +
                           std::to_string(plan.depth));
}

template <class Config, class Element>
void launch(const GemmProblem& problem, float* partials, cudaStream_t stream) {
  const auto kernel = tile_linear_sm80<Config, Element>;
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(kernel, Config::kSmemBytes, allowed, "tile_linear");
  const dim3 grid(static_cast<unsigned>(problem.items.workers), static_cast<unsigned>(problem.splits));
  kernel<<<grid, Config::kThreads, Config::kSmemBytes, stream>>>(problem, partials);
  check_launch("tile_linear_sm80");
  if (problem.splits == 1) return;
  const auto blocks = static_cast<unsigned>(ceil_div(sm80_add_threads(problem), kAddThreads));
  add_splits_sm80<Element><<<blocks, kAddThreads, 0, stream>>>(problem, partials);
  check_launch("add_splits_sm80");
}

}  // namespace

int64_t sm80_partial_floats(const GemmProblem& problem, const LaunchPlan& plan) {
  return plan.splits == 1 ? 0 : sm80_partial_index(problem, plan.splits, 0, 0);
}

void sm80_tile_linear(const GemmProblem& problem, const LaunchPlan& plan, DType dtype, float* partials, void* stream) {
  if (item_count(problem.items) == 0) return;
  with_config(plan, [&](auto config) {
    using Config = decltype(config);
    with_packed(dtype, [&](auto packed) {
      launch<Config, typename OnCard<decltype(packed)>::Element>(problem, partials, static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace patch_kernels::cuda
