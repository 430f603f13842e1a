// Masked weight and its backward on the GPU: one CTA a tile, one group of four weights a thread at a time, so the tile
// gradient and the sums are local to a CTA, need no atomics and are the same bits in every run.
#include "../mask_math.h"
#include "../ops.h"
#include "launch.h"

namespace patch_kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ NoiseKey noise_key(const MaskedWeightArgs& args) { return {args.seed, args.layer, args.draw, args.noise}; }

// Sum over the CTA in a fixed order; the result is valid in thread 0.
__device__ double block_sum(double value) {
  __shared__ double warp_sums[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  __syncthreads();  // an earlier call may still be reading
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kWarps; ++w) total += warp_sums[w];
  }
  return total;
}

struct TileRange {
  int64_t row0, group0;  // first row, first group of a row
  int rows, groups;      // rows, groups a row
};

__device__ TileRange tile_range(const MaskedWeightArgs& args) {
  const int64_t tile_cols = ceil_div(args.cols, args.tile_cols);
  const int64_t row0 = blockIdx.x / tile_cols * args.tile_rows, col0 = blockIdx.x % tile_cols * args.tile_cols;
  const int64_t rows = args.rows - row0, cols = args.cols - col0;
  return {row0, col0 / kGroup, static_cast<int>(rows < args.tile_rows ? rows : args.tile_rows),
          static_cast<int>((cols < args.tile_cols ? cols : args.tile_cols) / kGroup)};
}

template <class Real>
__device__ TileGate<Real> cta_gate(const MaskedWeightArgs& args) {
  if (!args.tile_logits) return {Real(0), Real(0)};
  const uint32_t tile_cols = static_cast<uint32_t>(ceil_div(args.cols, args.tile_cols));
  return tile_gate<Real>(static_cast<const Real*>(args.tile_logits)[blockIdx.x], blockIdx.x / tile_cols,
                         blockIdx.x % tile_cols, {args.tile_temperature, args.tile_scale, args.hard_tile},
                         noise_key(args));
}

template <class T, class Real>
__device__ void load_group(const T* from, Real (&out)[kGroup][1]) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) out[j][0] = load_as<Real>(from[j]);
}

// Pattern mask m and, where patterns are learned, their soft probabilities p.
template <class Real>
__device__ void group_pattern(const MaskedWeightArgs& args, int64_t group, Real (&p)[kPatterns][1],
                              Real (&m)[kGroup][1]) {
  if (args.pattern_logits) {
    Real logits[kPatterns][1];
    const Real* from = static_cast<const Real*>(args.pattern_logits) + group * kPatterns;
#pragma unroll
    for (int k = 0; k < kPatterns; ++k) logits[k][0] = from[k];
    pattern_probabilities<Real, 1>(logits, static_cast<uint64_t>(group),
                                   {args.pattern_temperature, args.pattern_scale, args.hard_pattern}, noise_key(args),
                                   p);
    pattern_mask<Real, 1>(p, args.hard_pattern, m);
    return;
  }
  const uint32_t nibble[1] = {args.fixed_pattern[group / 2] >> (4 * (group & 1)) & 15u};
  fixed_mask<Real, 1>(nibble, m);
}

template <class T, class Real>
__global__ void __launch_bounds__(kThreads) forward_kernel(MaskedWeightArgs args, T* masked, double* partial_sums) {
  const TileRange range = tile_range(args);
  const Real gate = cta_gate<Real>(args).forward;
  const int64_t row_groups = args.cols / kGroup;
  double mask_sum = 0.0, square_sum = 0.0;
  for (int i = threadIdx.x; i < range.rows * range.groups; i += kThreads) {
    const int64_t group = (range.row0 + i / range.groups) * row_groups + range.group0 + i % range.groups;
    Real w[kGroup][1], m[kGroup][1], p[kPatterns][1];
    load_group(static_cast<const T*>(args.weight) + group * kGroup, w);
    group_pattern(args, group, p, m);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const Real mask = gate + (Real(1) - gate) * m[j][0];
      const Real value = masked_value(mask, w[j][0]);
      mask_sum += static_cast<double>(mask);
      square_sum += static_cast<double>(value) * static_cast<double>(value);
      store_as(value, masked[group * kGroup + j]);
    }
  }
  const double mask_total = block_sum(mask_sum), square_total = block_sum(square_sum);
  if (threadIdx.x == 0) {
    partial_sums[2 * int64_t{blockIdx.x}] = mask_total;
    partial_sums[2 * int64_t{blockIdx.x} + 1] = square_total;
  }
}

__global__ void __launch_bounds__(kThreads) reduce_kernel(const double* partial_sums, int64_t tiles, double* sums) {
  double mask_sum = 0.0, square_sum = 0.0;
  for (int64_t t = threadIdx.x; t < tiles; t += kThreads) {
    mask_sum += partial_sums[2 * t];
    square_sum += partial_sums[2 * t + 1];
  }
  const double mask_total = block_sum(mask_sum), square_total = block_sum(square_sum);
  if (threadIdx.x == 0) sums[0] = mask_total, sums[1] = square_total;
}

template <class T, class Real>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(MaskedWeightArgs args, const T* grad_masked, const double* grad_sums, Real* grad_pattern_logits,
                    Real* grad_tile_logits) {
  const TileRange range = tile_range(args);
  const TileGate<Real> gate = cta_gate<Real>(args);
  const int64_t row_groups = args.cols / kGroup;
  const Real factor = static_cast<Real>(args.pattern_scale / args.pattern_temperature);
  const Real density_grad = static_cast<Real>(grad_sums[0]), norm_grad = static_cast<Real>(grad_sums[1]);
  double gate_sum = 0.0;
  for (int i = threadIdx.x; i < range.rows * range.groups; i += kThreads) {
    const int64_t group = (range.row0 + i / range.groups) * row_groups + range.group0 + i % range.groups;
    Real w[kGroup][1], g[kGroup][1], m[kGroup][1], p[kPatterns][1], pattern_grad[kGroup][1], gate_grad[1];
    const Real d[1] = {gate.forward};
    load_group(static_cast<const T*>(args.weight) + group * kGroup, w);
    load_group(grad_masked + group * kGroup, g);
    group_pattern(args, group, p, m);
    mask_gradient<Real, 1>(g, w, m, d, density_grad, norm_grad, pattern_grad, gate_grad);
    gate_sum += static_cast<double>(gate_grad[0]);
    if (args.pattern_logits) {
      Real logit_grad[kPatterns][1];
      pattern_logit_gradient<Real, 1>(p, pattern_grad, factor, logit_grad);
#pragma unroll
      for (int k = 0; k < kPatterns; ++k) grad_pattern_logits[group * kPatterns + k] = logit_grad[k][0];
    }
  }
  if (!args.tile_logits) return;
  const double total = block_sum(gate_sum);
  if (threadIdx.x == 0) {
    const Real slope = static_cast<Real>(args.tile_scale / args.tile_temperature) * gate.soft * (Real(1) - gate.soft);
    grad_tile_logits[blockIdx.x] = static_cast<Real>(total) * slope;
  }
}

// Calls body with null pointers of the storage and compute types of a weight dtype.
template <class Body>
void dispatch(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat16:
      return body(static_cast<Half*>(nullptr), static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return body(static_cast<BFloat16*>(nullptr), static_cast<float*>(nullptr));
    case DType::kFloat32:
      return body(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
    case DType::kFloat64:
      return body(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
  }
}

int64_t tile_count(const MaskedWeightArgs& args) {
  return ceil_div(args.rows, args.tile_rows) * ceil_div(args.cols, args.tile_cols);
}

}  // namespace

void masked_weight(const MaskedWeightArgs& args, void* masked, double* partial_sums, double* sums, void* stream_in) {
  const auto stream = static_cast<cudaStream_t>(stream_in);
  const int64_t tiles = tile_count(args);
  dispatch(args.dtype, [&](auto* storage, auto* compute) {
    using T = std::remove_pointer_t<decltype(storage)>;
    using Real = std::remove_pointer_t<decltype(compute)>;
    if (tiles == 0) return;
    forward_kernel<T, Real>
        <<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(args, static_cast<T*>(masked), partial_sums);
    check_launch("masked_weight");
  });
  reduce_kernel<<<1, kThreads, 0, stream>>>(partial_sums, tiles, sums);
  check_launch("masked_weight sums");
}

void masked_weight_backward(const MaskedWeightArgs& args, const void* grad_masked, const double* grad_sums,
                            void* grad_pattern_logits, void* grad_tile_logits, void* stream_in) {
  const int64_t tiles = tile_count(args);
  if (tiles == 0) return;
  dispatch(args.dtype, [&](auto* storage, auto* compute) {
    using T = std::remove_pointer_t<decltype(storage)>;
    using Real = std::remove_pointer_t<decltype(compute)>;
    backward_kernel<T, Real><<<static_cast<unsigned>(tiles), kThreads, 0, static_cast<cudaStream_t>(stream_in)>>>(
        args, static_cast<const T*>(grad_masked), grad_sums, static_cast<Real*>(grad_pattern_logits),
        static_cast<Real*>(grad_tile_logits));
    check_launch("masked_weight_backward");
  });
}

}  // namespace patch_kernels::cuda
