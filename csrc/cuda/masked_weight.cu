// Masked weight and its backward on the GPU: one CTA a tile, so the tile's gradient and both sums are local to a CTA,
// need no atomics and are the same bits in every run.
//
// tile_forward and tile_backward are for training: 16-bit weights in tiles of 128 columns (math/mask_lanes.h), logits
// fetched a step ahead by cp.async. any_forward and any_backward take every other tile, alignment and dtype, a group a
// thread.
#include "../math/mask_lanes.h"
#include "launch.h"

namespace patch_kernels::cuda {
namespace {

constexpr int kThreads = kLaneCount * kMaskWarps;

// Sum over a CTA of kWarps in a fixed order; the result is valid in thread 0.
template <int kWarps = kMaskWarps>
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

// Gate of the CTA's tile, in shared memory. The first warp computes it for all.
template <class Real>
__device__ const TileGate<Real>& cta_gate(const MaskedWeightArgs& args) {
  __shared__ TileGate<Real> gate;
  if (threadIdx.x < 32) {
    const TileGate<Real> own = gate_of<Real>(args, blockIdx.x);
    if (threadIdx.x == 0) gate = own;
  }
  __syncthreads();
  return gate;
}

__device__ void write_sums(double mask_sum, double square_sum, double* partial_sums) {
  const double mask_total = block_sum(mask_sum), square_total = block_sum(square_sum);
  if (threadIdx.x == 0) {
    partial_sums[2 * int64_t{blockIdx.x}] = mask_total;
    partial_sums[2 * int64_t{blockIdx.x} + 1] = square_total;
  }
}

template <class Real>
__device__ void write_tile_gradient(const MaskedWeightArgs& args, double gate_sum, const TileGate<Real>& gate,
                                    void* grad_tile_logits) {
  if (!args.tile_logits) return;
  const double total = block_sum(gate_sum);
  if (threadIdx.x == 0) static_cast<Real*>(grad_tile_logits)[blockIdx.x] = static_cast<Real>(total) * gate.slope;
}

// cp.async: 16 bytes past L1 and the registers (PTX ISA, "Non-bulk copy"). Logits are read once.
__device__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
constexpr int kRowBytes = 16 * kPairsPerRow;  // between the chunks of a lane

// All groups but the last have arrived.
__device__ void wait_for_step() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// Walks the CTA's tile. `prepare()` runs once, while the first loads are under way. For each step, `load(step)` gives a
// lane's registers, asked for one step ahead, and `body(step, registers, own, copied)` runs when the step's logits are
// in shared memory for all lanes of the warp: the lane's pair at `own`, the first chunk that it copied at `copied`.
template <class T, class L, class Load, class Prepare, class Body>
__device__ void walk_tile(const MaskLane<T, L>& lane, Load&& load, Prepare&& prepare, Body&& body) {
  constexpr int kStepChunks = LogitChunks<L>::kStepChunks;
  __shared__ Chunk stages[2][kMaskWarps][kStepChunks > 0 ? kStepChunks : 1];
  const char* source = nullptr;
  uint32_t own_stage = 0, first_copied = 0;
  if constexpr (kStepChunks > 0) {
    source = lane.own_chunks(lane.args.pattern_logits);
    own_stage = static_cast<uint32_t>(__cvta_generic_to_shared(lane.own_logits(stages[0][lane.warp])));
    first_copied = static_cast<uint32_t>(__cvta_generic_to_shared(&stages[0][lane.warp][lane.first_chunk()]));
    keep_in_register(source);
    keep_in_register(own_stage);
    keep_in_register(first_copied);
  }
  // Addresses of shared memory have 32 bits: one register each, where pointers would be made anew in every step.
  const auto in_stage = [](uint32_t address, int step) {
    return address + (step & 1) * static_cast<uint32_t>(sizeof(stages[0]));
  };
  // Steps in their order.
  const auto fetch = [&](int step) {
    if constexpr (kStepChunks > 0) {
      const uint32_t to = in_stage(first_copied, step);
      lane.for_chunks(step, [&](int i) { copy_async(to + kRowBytes * i, source + kRowBytes * i); });
      source += lane.chunk_stride();
    }
    commit_copies();
  };
  fetch(0);
  auto registers = load(0);
  prepare();
  // By vote, which takes no register: the warp's second row may be missing in the last step.
  for (int step = 0; __any_sync(0xFFFFFFFFu, lane.has_row(step)); ++step) {
    // Beyond the last step no lane has a row: nothing is loaded, and the empty group keeps the wait's meaning.
    const auto next = load(step + 1);
    fetch(step + 1);
    wait_for_step();
    __syncwarp();
    using Piece = typename MaskLane<T, L>::Piece;
    body(step, registers, static_cast<Piece*>(__cvta_shared_to_generic(in_stage(own_stage, step))),
         static_cast<const Chunk*>(__cvta_shared_to_generic(in_stage(first_copied, step))));
    __syncwarp();  // the stage is free for the step after the next
    registers = next;
  }
}

struct ForwardRegisters {
  Chunk weights;
  uint32_t nibbles;
};
struct BackwardRegisters {
  Chunk weights, grads;
  uint32_t nibbles;
};

template <class T, class L>
__global__ void __launch_bounds__(kThreads, 4)
    tile_forward(const __grid_constant__ MaskedWeightArgs args, T* masked, double* partial_sums) {
  const MaskLane<T, L> lane(args, blockIdx.x, threadIdx.x % kLaneCount, threadIdx.x / kLaneCount);
  float gate = 0.0f, mask_sum = 0.0f, square_sum = 0.0f;
  walk_tile(
      lane, [&](int step) { return ForwardRegisters{lane.load_weights(args.weight, step), lane.load_nibbles(step)}; },
      [&] { gate = cta_gate<float>(args).forward; },
      [&](int step, const ForwardRegisters& r, const auto* own, const Chunk*) {
        const Chunk out = lane.forward(r.weights, own, r.nibbles, step, gate, mask_sum, square_sum);
        lane.store_weights(out, masked, step);
      });
  write_sums(mask_sum, square_sum, partial_sums);
}

template <class T, class L>
__global__ void __launch_bounds__(kThreads, 3)
    tile_backward(const __grid_constant__ MaskedWeightArgs args, const __grid_constant__ MaskedWeightGrads grads) {
  const MaskLane<T, L> lane(args, blockIdx.x, threadIdx.x % kLaneCount, threadIdx.x / kLaneCount);
  char* sink = nullptr;
  if constexpr (MaskLane<T, L>::kLearned) {
    sink = const_cast<char*>(lane.own_chunks(grads.grad_pattern_logits));
    keep_in_register(sink);
    __builtin_assume(__isGlobal(sink));  // else the stores are generic
  }
  // Constants of a tile wait in shared memory: registers are short.
  __shared__ float2 grad_sums;
  if (threadIdx.x == 0) {
    grad_sums = {static_cast<float>(grads.grad_sums[0]), static_cast<float>(grads.grad_sums[1])};
  }
  const TileGate<float>* gate = nullptr;
  float gate_sum = 0.0f;
  walk_tile(
      lane,
      [&](int step) {
        return BackwardRegisters{lane.load_weights(args.weight, step), lane.load_weights(grads.grad_masked, step),
                                 lane.load_nibbles(step)};
      },
      [&] { gate = &cta_gate<float>(args); },
      [&](int step, const BackwardRegisters& r, auto* own, const Chunk* copied) {
        const Chunk out = lane.backward(r.weights, r.grads, own, r.nibbles, step, gate->forward, grad_sums.x,
                                        grad_sums.y, gate_sum, grads.masked != nullptr);
        if (grads.masked) lane.store_weights(out, grads.masked, step);
        if constexpr (MaskLane<T, L>::kLearned) {
          __syncwarp();
          lane.for_chunks(step,
                          [&](int i) { *reinterpret_cast<Chunk*>(sink + kRowBytes * i) = copied[kPairsPerRow * i]; });
          sink += lane.chunk_stride();
        }
      });
  write_tile_gradient(args, gate_sum, *gate, grads.grad_tile_logits);
}

template <class T, class Real>
__device__ void load_group(const T* from, Real (&out)[kGroup][1]) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) out[j][0] = load_as<Real>(from[j]);
}

// Pattern mask m and, where patterns are learned, their soft probabilities p.
template <class Real>
__device__ void group_pattern(const MaskedWeightArgs& args, const Factors<Real>& factors, const NoiseKey& noise,
                              int64_t group, Real (&p)[kPatterns][1], Real (&m)[kGroup][1]) {
  if (args.pattern_logits) {
    Real logits[kPatterns][1];
#pragma unroll
    for (int k = 0; k < kPatterns; ++k) {
      const int64_t i = group * kPatterns + k;
      logits[k][0] = args.pattern_dtype == DType::kBFloat16
                         ? load_as<Real>(static_cast<const BFloat16*>(args.pattern_logits)[i])
                         : static_cast<const Real*>(args.pattern_logits)[i];
    }
    pattern_probabilities<Real, 1>(logits, static_cast<uint64_t>(group), factors, noise, p);
    pattern_mask<Real, 1>(p, args.hard_pattern, m);
    return;
  }
  const uint32_t nibble[1] = {args.fixed_pattern[group / 2] >> (4 * (group & 1)) & 15u};
  fixed_mask<Real, 1>(nibble, m);
}

// Index of the i-th group of the CTA's tile.
__device__ int64_t group_of(const MaskedWeightArgs& args, const TileSpan& span, int i) {
  const int groups = span.cols / kGroup;
  return ((span.row0 + i / groups) * args.cols + span.col0) / kGroup + i % groups;
}

template <class T, class Real>
__global__ void __launch_bounds__(kThreads) any_forward(MaskedWeightArgs args, T* masked, double* partial_sums) {
  const TileSpan span = tile_span(args, blockIdx.x);
  const Real gate = cta_gate<Real>(args).forward;
  const auto factors = make_factors<Real>(args.factors[0], args.factors[1]);
  const NoiseKey noise = noise_key(args.key, args.layer);
  double mask_sum = 0.0, square_sum = 0.0;  // a tile may be a whole layer
  for (int i = threadIdx.x; i < span.rows * (span.cols / kGroup); i += kThreads) {
    const int64_t group = group_of(args, span, i);
    Real w[kGroup][1], m[kGroup][1], p[kPatterns][1];
    load_group(static_cast<const T*>(args.weight) + group * kGroup, w);
    group_pattern(args, factors, noise, group, p, m);
    Real group_mask = 0, group_square = 0;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const Real mask = gated_mask(gate, m[j][0]);
      const Real value = masked_value(mask, w[j][0]);
      group_mask += mask;
      group_square = mul_add(value, value, group_square);
      store_as(value, masked[group * kGroup + j]);
    }
    mask_sum += group_mask, square_sum += group_square;
  }
  write_sums(mask_sum, square_sum, partial_sums);
}

template <class T, class Real>
__global__ void __launch_bounds__(kThreads) any_backward(MaskedWeightArgs args, MaskedWeightGrads grads) {
  const TileSpan span = tile_span(args, blockIdx.x);
  const TileGate<Real> gate = cta_gate<Real>(args);
  const auto factors = make_factors<Real>(args.factors[0], args.factors[1]);
  const NoiseKey noise = noise_key(args.key, args.layer);
  const Real density_grad = static_cast<Real>(grads.grad_sums[0]), norm_grad = static_cast<Real>(grads.grad_sums[1]);
  double gate_sum = 0.0;
  for (int i = threadIdx.x; i < span.rows * (span.cols / kGroup); i += kThreads) {
    const int64_t group = group_of(args, span, i);
    Real w[kGroup][1], g[kGroup][1], m[kGroup][1], p[kPatterns][1], pattern_grad[kGroup][1], gate_grad[1];
    const Real d[1] = {gate.forward};
    load_group(static_cast<const T*>(args.weight) + group * kGroup, w);
    load_group(static_cast<const T*>(grads.grad_masked) + group * kGroup, g);
    group_pattern(args, factors, noise, group, p, m);
    mask_gradient<Real, 1>(g, w, m, d, density_grad, norm_grad, pattern_grad, gate_grad);
    gate_sum += gate_grad[0];
    if (grads.masked) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        store_as(masked_value(gated_mask(gate.forward, m[j][0]), w[j][0]),
                 static_cast<T*>(grads.masked)[group * kGroup + j]);
      }
    }
    if (args.pattern_logits) {
      Real logit_grad[kPatterns][1];
      pattern_logit_gradient<Real, 1>(p, pattern_grad, factors.gradient, logit_grad);
#pragma unroll
      for (int k = 0; k < kPatterns; ++k) {
        const int64_t to = group * kPatterns + k;
        if (args.pattern_dtype == DType::kBFloat16) {
          store_as(static_cast<float>(logit_grad[k][0]), static_cast<BFloat16*>(grads.grad_pattern_logits)[to]);
        } else {
          static_cast<Real*>(grads.grad_pattern_logits)[to] = logit_grad[k][0];
        }
      }
    }
  }
  write_tile_gradient(args, gate_sum, gate, grads.grad_tile_logits);
}

constexpr int kReduceThreads = 1024;

__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const double2* partial_sums, int64_t tiles, double* sums) {
  double mask_sum = 0.0, square_sum = 0.0;
  for (int64_t t = threadIdx.x; t < tiles; t += kReduceThreads) {
    const double2 tile = partial_sums[t];
    mask_sum += tile.x, square_sum += tile.y;
  }
  constexpr int kWarps = kReduceThreads / 32;
  const double mask_total = block_sum<kWarps>(mask_sum), square_total = block_sum<kWarps>(square_sum);
  if (threadIdx.x == 0) sums[0] = mask_total, sums[1] = square_total;
}

template <class T>
constexpr T* null() {
  return nullptr;
}

// Calls body with null pointers of the storage and compute types of a weight dtype.
template <class Body>
void dispatch_any(DType dtype, Body&& body) {
  if (is_packed(dtype)) {
    with_packed(dtype, [&](auto packed) { body(null<typename decltype(packed)::Storage>(), null<float>()); });
  } else if (dtype == DType::kFloat32) {
    body(null<float>(), null<float>());
  } else {
    body(null<double>(), null<double>());
  }
}

// The same with the types of weight and logits, for calls with has_tile_kernel.
template <class Body>
void dispatch_tile(const MaskedWeightArgs& args, Body&& body) {
  const auto with_logits = [&](auto* weight) {
    if (!args.pattern_logits) return body(weight, null<FixedPattern>());
    if (args.pattern_dtype == DType::kBFloat16) return body(weight, null<BFloat16>());
    return body(weight, null<float>());
  };
  with_packed(args.dtype, [&](auto packed) { with_logits(null<typename decltype(packed)::Storage>()); });
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int64_t tile_count(const MaskedWeightArgs& args) {
  return ceil_div(args.rows, args.tile_rows) * ceil_div(args.cols, args.tile_cols);
}

template <class Pointer>
using Pointee = std::remove_pointer_t<Pointer>;

}  // namespace

void masked_weight(const MaskedWeightArgs& args, void* masked, double* partial_sums, double* sums, void* stream_in) {
  const auto stream = static_cast<cudaStream_t>(stream_in);
  const int64_t tiles = tile_count(args);
  const auto grid = static_cast<unsigned>(tiles);
  if (tiles > 0 && has_tile_kernel(args) && is_aligned(args.weight) && is_aligned(args.pattern_logits)) {
    dispatch_tile(args, [&](auto* t, auto* l) {
      using T = Pointee<decltype(t)>;
      tile_forward<T, Pointee<decltype(l)>><<<grid, kThreads, 0, stream>>>(args, static_cast<T*>(masked), partial_sums);
    });
  } else if (tiles > 0) {
    dispatch_any(args.dtype, [&](auto* t, auto* real) {
      using T = Pointee<decltype(t)>;
      any_forward<T, Pointee<decltype(real)>>
          <<<grid, kThreads, 0, stream>>>(args, static_cast<T*>(masked), partial_sums);
    });
  }
  check_launch("masked_weight");
  reduce_kernel<<<1, kReduceThreads, 0, stream>>>(reinterpret_cast<const double2*>(partial_sums), tiles, sums);
  check_launch("masked_weight sums");
}

void masked_weight_backward(const MaskedWeightArgs& args, const MaskedWeightGrads& grads, void* stream_in) {
  const auto stream = static_cast<cudaStream_t>(stream_in);
  const int64_t tiles = tile_count(args);
  const auto grid = static_cast<unsigned>(tiles);
  if (tiles == 0) return;
  if (has_tile_kernel(args) && is_aligned(args.weight) && is_aligned(args.pattern_logits) &&
      is_aligned(grads.grad_masked)) {
    dispatch_tile(args, [&](auto* t, auto* l) {
      tile_backward<Pointee<decltype(t)>, Pointee<decltype(l)>><<<grid, kThreads, 0, stream>>>(args, grads);
    });
  } else {
    dispatch_any(args.dtype, [&](auto* t, auto* real) {
      any_backward<Pointee<decltype(t)>, Pointee<decltype(real)>><<<grid, kThreads, 0, stream>>>(args, grads);
    });
  }
  check_launch("masked_weight_backward");
}

}  // namespace patch_kernels::cuda
