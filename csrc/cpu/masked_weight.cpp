// Masked weight and its backward on the CPU: one pass over the weight, nothing of the logits' size kept.
// Compiled once per instruction set (PK_ISA names the namespace); the vectoriser turns lane loops into SIMD.
#include <vector>

#include "../math/elements.h"
#include "../math/mask.h"
#include "isa.h"
#include "parallel.h"

namespace patch_kernels::cpu::PK_ISA {
namespace {

constexpr int kLanes = 16;  // groups per step: 64 columns

// The step's numbers, read once.
template <class Real>
struct Sampling {
  Factors<Real> pattern, tile;
  NoiseKey noise;

  explicit Sampling(const MaskedWeightArgs& args)
      : pattern(make_factors<Real>(args.factors[0], args.factors[1])),
        tile(make_factors<Real>(args.factors[2], args.factors[3])),
        noise(noise_key(args.key, args.layer)) {}
};

// Gates of one tile row, repeated per group of a weight row and padded to whole steps.
template <class Real>
struct GateRow {
  std::vector<Real> forward;
  std::vector<Real> slopes;  // per tile

  GateRow(const MaskedWeightArgs& args, const Sampling<Real>& sampling, int64_t tile_row) {
    const int64_t groups = args.cols / kGroup, tile_cols = ceil_div(args.cols, args.tile_cols);
    forward.assign(ceil_div(groups, kLanes) * kLanes, Real(0));
    if (!args.tile_logits) return;
    slopes.resize(tile_cols);
    const Real* logits = static_cast<const Real*>(args.tile_logits) + tile_row * tile_cols;
    for (int64_t c = 0; c < tile_cols; ++c) {
      const auto gate = tile_gate<Real>(logits[c], static_cast<uint32_t>(tile_row), static_cast<uint32_t>(c),
                                        sampling.tile, args.hard_tile, sampling.noise);
      slopes[c] = gate.slope;
      const int64_t begin = c * args.tile_cols / kGroup, stop = (c + 1) * args.tile_cols / kGroup;
      for (int64_t g = begin; g < stop && g < groups; ++g) forward[g] = gate.forward;
    }
  }
};

// One step: up to kLanes groups, columns transposed to [column][lane]. Lanes past the row's end read zeros.
template <class T, class Real>
void load_columns(const T* row, int64_t first_group, int lanes, Real (&out)[kGroup][kLanes]) {
  const T* from = row + first_group * kGroup;
  if (lanes == kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      for (int j = 0; j < kGroup; ++j) out[j][l] = load_as<Real>(from[l * kGroup + j]);
    }
    return;
  }
  for (int j = 0; j < kGroup; ++j) {
    for (int l = 0; l < kLanes; ++l) out[j][l] = l < lanes ? load_as<Real>(from[l * kGroup + j]) : Real(0);
  }
}

template <class T, class Real>
void store_columns(const Real (&values)[kGroup][kLanes], T* row, int64_t first_group, int lanes) {
  T* to = row + first_group * kGroup;
  if (lanes == kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      for (int j = 0; j < kGroup; ++j) store_as(values[j][l], to[l * kGroup + j]);
    }
    return;
  }
  for (int l = 0; l < lanes; ++l) {
    for (int j = 0; j < kGroup; ++j) store_as(values[j][l], to[l * kGroup + j]);
  }
}

template <class L, class Real>
void load_logits(const L* logits, int lanes, Real (&out)[kPatterns][kLanes]) {
  for (int l = 0; l < kLanes; ++l) {
    for (int k = 0; k < kPatterns; ++k) out[k][l] = l < lanes ? load_as<Real>(logits[l * kPatterns + k]) : Real(0);
  }
}

// Pattern mask m and, where patterns are learned (as logits of type L), their soft probabilities p.
template <class L, class Real>
void pattern_step(const MaskedWeightArgs& args, const Sampling<Real>& sampling, int64_t first, int lanes,
                  Real (&p)[kPatterns][kLanes], Real (&m)[kGroup][kLanes]) {
  if (args.pattern_logits) {
    Real logits[kPatterns][kLanes];
    load_logits(static_cast<const L*>(args.pattern_logits) + first * kPatterns, lanes, logits);
    pattern_probabilities<Real, kLanes>(logits, static_cast<uint64_t>(first), sampling.pattern, sampling.noise, p);
    pattern_mask<Real, kLanes>(p, args.hard_pattern, m);
    return;
  }
  uint32_t nibbles[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const int64_t group = first + l;
    nibbles[l] = l < lanes ? args.fixed_pattern[group / 2] >> (4 * (group & 1)) & 15u : 0u;
  }
  fixed_mask<Real, kLanes>(nibbles, m);
}

template <class T, class L, class Real>
void forward_row(const MaskedWeightArgs& args, const Sampling<Real>& sampling, int64_t row, const GateRow<Real>& gates,
                 T* masked, double* sums) {
  const int64_t groups = args.cols / kGroup;
  const T* weight = static_cast<const T*>(args.weight) + row * args.cols;
  Real mask_sum[kLanes] = {}, square_sum[kLanes] = {};
  for (int64_t g = 0; g < groups; g += kLanes) {
    const int lanes = static_cast<int>(groups - g < kLanes ? groups - g : kLanes);
    Real w[kGroup][kLanes], m[kGroup][kLanes], p[kPatterns][kLanes], z[kGroup][kLanes];
    load_columns(weight, g, lanes, w);
    pattern_step<L, Real>(args, sampling, row * groups + g, lanes, p, m);
    const Real* d = gates.forward.data() + g;
    for (int j = 0; j < kGroup; ++j) {
      for (int l = 0; l < kLanes; ++l) {
        const Real mask = gated_mask(d[l], m[j][l]);
        z[j][l] = masked_value(mask, w[j][l]);
        mask_sum[l] += l < lanes ? mask : Real(0);
        square_sum[l] = mul_add(z[j][l], z[j][l], square_sum[l]);
      }
    }
    store_columns(z, masked + row * args.cols, g, lanes);
  }
  for (int l = 0; l < kLanes; ++l) {
    sums[0] += static_cast<double>(mask_sum[l]);
    sums[1] += static_cast<double>(square_sum[l]);
  }
}

// gate_grads: per group of the row, added to.
template <class T, class L, class Real>
void backward_row(const MaskedWeightArgs& args, const Sampling<Real>& sampling, int64_t row, const GateRow<Real>& gates,
                  const MaskedWeightGrads& grads, double* gate_grads) {
  const int64_t groups = args.cols / kGroup;
  const T* weight = static_cast<const T*>(args.weight) + row * args.cols;
  const T* grad_masked = static_cast<const T*>(grads.grad_masked) + row * args.cols;
  const Real density_grad = static_cast<Real>(grads.grad_sums[0]), norm_grad = static_cast<Real>(grads.grad_sums[1]);
  for (int64_t g = 0; g < groups; g += kLanes) {
    const int lanes = static_cast<int>(groups - g < kLanes ? groups - g : kLanes);
    Real w[kGroup][kLanes], grad[kGroup][kLanes], m[kGroup][kLanes], p[kPatterns][kLanes], d[kLanes];
    Real pattern_grad[kGroup][kLanes], gate_grad[kLanes];
    load_columns(weight, g, lanes, w);
    load_columns(grad_masked, g, lanes, grad);
    pattern_step<L, Real>(args, sampling, row * groups + g, lanes, p, m);
    for (int l = 0; l < kLanes; ++l) d[l] = gates.forward[g + l];
    mask_gradient<Real, kLanes>(grad, w, m, d, density_grad, norm_grad, pattern_grad, gate_grad);
    if (args.tile_logits) {
      for (int l = 0; l < kLanes; ++l) gate_grads[g + l] += static_cast<double>(gate_grad[l]);
    }
    if (grads.masked) {
      Real z[kGroup][kLanes];
      for (int j = 0; j < kGroup; ++j) {
        for (int l = 0; l < kLanes; ++l) z[j][l] = masked_value(gated_mask(d[l], m[j][l]), w[j][l]);
      }
      store_columns(z, static_cast<T*>(grads.masked) + row * args.cols, g, lanes);
    }
    if (!args.pattern_logits) continue;
    Real logit_grad[kPatterns][kLanes];
    pattern_logit_gradient<Real, kLanes>(p, pattern_grad, sampling.pattern.gradient, logit_grad);
    L* to = static_cast<L*>(grads.grad_pattern_logits) + (row * groups + g) * kPatterns;
    for (int l = 0; l < lanes; ++l) {
      for (int k = 0; k < kPatterns; ++k) store_as(logit_grad[k][l], to[l * kPatterns + k]);
    }
  }
}

template <class T, class L, class Real>
void forward(const MaskedWeightArgs& args, T* masked, double* sums, ParallelFor parallel) {
  const int64_t tile_rows = ceil_div(args.rows, args.tile_rows);
  const Sampling<Real> sampling(args);
  std::vector<double> partial(2 * tile_rows, 0.0);
  parallel_over(parallel, tile_rows, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const GateRow<Real> gates(args, sampling, t);
      for (int64_t row = t * args.tile_rows; row < args.rows && row < (t + 1) * args.tile_rows; ++row) {
        forward_row<T, L, Real>(args, sampling, row, gates, masked, &partial[2 * t]);
      }
    }
  });
  sums[0] = sums[1] = 0.0;
  for (int64_t t = 0; t < tile_rows; ++t) sums[0] += partial[2 * t], sums[1] += partial[2 * t + 1];
}

template <class T, class L, class Real>
void backward(const MaskedWeightArgs& args, const MaskedWeightGrads& grads, ParallelFor parallel) {
  const int64_t tile_rows = ceil_div(args.rows, args.tile_rows), tile_cols = ceil_div(args.cols, args.tile_cols);
  const int64_t groups = args.cols / kGroup;
  const Sampling<Real> sampling(args);
  parallel_over(parallel, tile_rows, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const GateRow<Real> gates(args, sampling, t);
      std::vector<double> gate_grads(gates.forward.size(), 0.0);
      for (int64_t row = t * args.tile_rows; row < args.rows && row < (t + 1) * args.tile_rows; ++row) {
        backward_row<T, L, Real>(args, sampling, row, gates, grads, gate_grads.data());
      }
      if (!args.tile_logits) continue;
      Real* grad_tile_logits = static_cast<Real*>(grads.grad_tile_logits);
      for (int64_t c = 0; c < tile_cols; ++c) {
        double sum = 0.0;
        const int64_t begin_group = c * args.tile_cols / kGroup, end_group = (c + 1) * args.tile_cols / kGroup;
        for (int64_t g = begin_group; g < end_group && g < groups; ++g) sum += gate_grads[g];
        grad_tile_logits[t * tile_cols + c] = static_cast<Real>(sum) * gates.slopes[c];
      }
    }
  });
}

// Tiles only matter where there are tile logits; without them, rows are split evenly for the threads.
MaskedWeightArgs with_row_blocks(MaskedWeightArgs args) {
  if (!args.tile_logits) args.tile_rows = 8, args.tile_cols = args.cols;
  return args;
}

// Calls body with null pointers of the types of weight, pattern logits and arithmetic.
template <class Body>
void dispatch(const MaskedWeightArgs& args, Body&& body) {
  constexpr auto* kFloat = static_cast<float*>(nullptr);
  constexpr auto* kDouble = static_cast<double*>(nullptr);
  const bool short_logits = args.pattern_dtype == DType::kBFloat16;
  const auto with_logits = [&](auto* weight) {
    short_logits ? body(weight, static_cast<BFloat16*>(nullptr), kFloat) : body(weight, kFloat, kFloat);
  };
  if (is_packed(args.dtype)) {
    with_packed(args.dtype,
                [&](auto packed) { with_logits(static_cast<typename decltype(packed)::Storage*>(nullptr)); });
  } else if (args.dtype == DType::kFloat32) {
    with_logits(kFloat);
  } else {
    body(kDouble, kDouble, kDouble);
  }
}

template <class Pointer>
using Pointee = std::remove_pointer_t<std::decay_t<Pointer>>;

}  // namespace

void masked_weight(const MaskedWeightArgs& args, void* masked, double* sums, ParallelFor parallel) {
  dispatch(args, [&](auto* t, auto* l, auto* real) {
    using T = Pointee<decltype(t)>;
    forward<T, Pointee<decltype(l)>, Pointee<decltype(real)>>(with_row_blocks(args), static_cast<T*>(masked), sums,
                                                              parallel);
  });
}

void masked_weight_backward(const MaskedWeightArgs& args, const MaskedWeightGrads& grads, ParallelFor parallel) {
  dispatch(args, [&](auto* t, auto* l, auto* real) {
    backward<Pointee<decltype(t)>, Pointee<decltype(l)>, Pointee<decltype(real)>>(with_row_blocks(args), grads,
                                                                                  parallel);
  });
}

}  // namespace patch_kernels::cpu::PK_ISA
