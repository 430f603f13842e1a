// Masked weight and its backward on the CPU: one pass over the weight, nothing of the logits' size kept.
// Compiled once per instruction set (PK_ISA names the namespace); the vectoriser turns lane loops into SIMD.
#include <vector>

#include "../mask_math.h"
#include "isa.h"
#include "parallel.h"

namespace patch_kernels::cpu::PK_ISA {
namespace {

constexpr int kLanes = 16;  // groups per step: 64 columns

NoiseKey noise_key(const MaskedWeightArgs& args) { return {args.seed, args.layer, args.draw, args.noise}; }
PatternParams pattern_params(const MaskedWeightArgs& args) {
  return {args.pattern_temperature, args.pattern_scale, args.hard_pattern};
}
PatternParams tile_params(const MaskedWeightArgs& args) {
  return {args.tile_temperature, args.tile_scale, args.hard_tile};
}

// Gates of one tile row, repeated per group of a weight row and padded to whole steps.
template <class Real>
struct GateRow {
  std::vector<Real> forward;
  std::vector<Real> soft_derivative;  // per tile: d(gate)/d(logit)

  GateRow(const MaskedWeightArgs& args, int64_t tile_row) {
    const int64_t groups = args.cols / kGroup, tile_cols = ceil_div(args.cols, args.tile_cols);
    forward.assign(ceil_div(groups, kLanes) * kLanes, Real(0));
    if (!args.tile_logits) return;
    soft_derivative.resize(tile_cols);
    const Real* logits = static_cast<const Real*>(args.tile_logits) + tile_row * tile_cols;
    for (int64_t c = 0; c < tile_cols; ++c) {
      const auto gate = tile_gate<Real>(logits[c], static_cast<uint32_t>(tile_row), static_cast<uint32_t>(c),
                                        tile_params(args), noise_key(args));
      soft_derivative[c] =
          static_cast<Real>(args.tile_scale / args.tile_temperature) * gate.soft * (Real(1) - gate.soft);
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

template <class Real>
void load_logits(const Real* logits, int lanes, Real (&out)[kPatterns][kLanes]) {
  for (int l = 0; l < kLanes; ++l) {
    for (int k = 0; k < kPatterns; ++k) out[k][l] = l < lanes ? logits[l * kPatterns + k] : Real(0);
  }
}

// Pattern mask m and, where patterns are learned, their soft probabilities p.
template <class Real>
void pattern_step(const MaskedWeightArgs& args, int64_t first, int lanes, Real (&p)[kPatterns][kLanes],
                  Real (&m)[kGroup][kLanes]) {
  if (args.pattern_logits) {
    Real logits[kPatterns][kLanes];
    load_logits(static_cast<const Real*>(args.pattern_logits) + first * kPatterns, lanes, logits);
    pattern_probabilities<Real, kLanes>(logits, static_cast<uint64_t>(first), pattern_params(args), noise_key(args), p);
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

template <class T, class Real>
void forward_row(const MaskedWeightArgs& args, int64_t row, const GateRow<Real>& gates, T* masked, double* sums) {
  const int64_t groups = args.cols / kGroup;
  const T* weight = static_cast<const T*>(args.weight) + row * args.cols;
  T* out = masked + row * args.cols;
  Real mask_sum[kLanes] = {}, square_sum[kLanes] = {};
  for (int64_t g = 0; g < groups; g += kLanes) {
    const int lanes = static_cast<int>(groups - g < kLanes ? groups - g : kLanes);
    Real w[kGroup][kLanes], m[kGroup][kLanes], p[kPatterns][kLanes], z[kGroup][kLanes];
    load_columns(weight, g, lanes, w);
    pattern_step(args, row * groups + g, lanes, p, m);
    const Real* d = gates.forward.data() + g;
    for (int j = 0; j < kGroup; ++j) {
      for (int l = 0; l < kLanes; ++l) {
        const Real mask = d[l] + (Real(1) - d[l]) * m[j][l];
        z[j][l] = masked_value(mask, w[j][l]);
        mask_sum[l] += l < lanes ? mask : Real(0);
        square_sum[l] += z[j][l] * z[j][l];
      }
    }
    T* to = out + g * kGroup;
    if (lanes == kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        for (int j = 0; j < kGroup; ++j) store_as(z[j][l], to[l * kGroup + j]);
      }
    } else {
      for (int l = 0; l < lanes; ++l) {
        for (int j = 0; j < kGroup; ++j) store_as(z[j][l], to[l * kGroup + j]);
      }
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    sums[0] += static_cast<double>(mask_sum[l]);
    sums[1] += static_cast<double>(square_sum[l]);
  }
}

// gate_grads: per group of the row, added to.
template <class T, class Real>
void backward_row(const MaskedWeightArgs& args, int64_t row, const GateRow<Real>& gates, const T* grad_masked,
                  const double* grad_sums, Real* grad_logits, double* gate_grads) {
  const int64_t groups = args.cols / kGroup;
  const T* weight = static_cast<const T*>(args.weight) + row * args.cols;
  const Real factor = static_cast<Real>(args.pattern_scale / args.pattern_temperature);
  for (int64_t g = 0; g < groups; g += kLanes) {
    const int lanes = static_cast<int>(groups - g < kLanes ? groups - g : kLanes);
    Real w[kGroup][kLanes], grad[kGroup][kLanes], m[kGroup][kLanes], p[kPatterns][kLanes], d[kLanes];
    Real pattern_grad[kGroup][kLanes], gate_grad[kLanes];
    load_columns(weight, g, lanes, w);
    load_columns(grad_masked + row * args.cols, g, lanes, grad);
    pattern_step(args, row * groups + g, lanes, p, m);
    for (int l = 0; l < kLanes; ++l) d[l] = gates.forward[g + l];
    mask_gradient<Real, kLanes>(grad, w, m, d, static_cast<Real>(grad_sums[0]), static_cast<Real>(grad_sums[1]),
                                pattern_grad, gate_grad);
    if (args.tile_logits) {
      for (int l = 0; l < kLanes; ++l) gate_grads[g + l] += static_cast<double>(gate_grad[l]);
    }
    if (!args.pattern_logits) continue;
    Real logit_grad[kPatterns][kLanes];
    pattern_logit_gradient<Real, kLanes>(p, pattern_grad, factor, logit_grad);
    Real* to = grad_logits + (row * groups + g) * kPatterns;
    for (int l = 0; l < lanes; ++l) {
      for (int k = 0; k < kPatterns; ++k) to[l * kPatterns + k] = logit_grad[k][l];
    }
  }
}

template <class T, class Real>
void forward(const MaskedWeightArgs& args, T* masked, double* sums, ParallelFor parallel) {
  const int64_t tile_rows = ceil_div(args.rows, args.tile_rows);
  std::vector<double> partial(2 * tile_rows, 0.0);
  parallel_over(parallel, tile_rows, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const GateRow<Real> gates(args, t);
      for (int64_t row = t * args.tile_rows; row < args.rows && row < (t + 1) * args.tile_rows; ++row) {
        forward_row<T, Real>(args, row, gates, masked, &partial[2 * t]);
      }
    }
  });
  sums[0] = sums[1] = 0.0;
  for (int64_t t = 0; t < tile_rows; ++t) sums[0] += partial[2 * t], sums[1] += partial[2 * t + 1];
}

template <class T, class Real>
void backward(const MaskedWeightArgs& args, const T* grad_masked, const double* grad_sums, Real* grad_pattern_logits,
              Real* grad_tile_logits, ParallelFor parallel) {
  const int64_t tile_rows = ceil_div(args.rows, args.tile_rows), tile_cols = ceil_div(args.cols, args.tile_cols);
  const int64_t groups = args.cols / kGroup;
  parallel_over(parallel, tile_rows, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const GateRow<Real> gates(args, t);
      std::vector<double> gate_grads(gates.forward.size(), 0.0);
      for (int64_t row = t * args.tile_rows; row < args.rows && row < (t + 1) * args.tile_rows; ++row) {
        backward_row<T, Real>(args, row, gates, grad_masked, grad_sums, grad_pattern_logits, gate_grads.data());
      }
      if (!args.tile_logits) continue;
      for (int64_t c = 0; c < tile_cols; ++c) {
        double sum = 0.0;
        const int64_t begin_group = c * args.tile_cols / kGroup, end_group = (c + 1) * args.tile_cols / kGroup;
        for (int64_t g = begin_group; g < end_group && g < groups; ++g) sum += gate_grads[g];
        grad_tile_logits[t * tile_cols + c] = static_cast<Real>(sum) * gates.soft_derivative[c];
      }
    }
  });
}

// Tiles only matter where there are tile logits; without them, rows are split evenly for the threads.
MaskedWeightArgs with_row_blocks(MaskedWeightArgs args) {
  if (!args.tile_logits) args.tile_rows = 8, args.tile_cols = args.cols;
  return args;
}

}  // namespace

void masked_weight(const MaskedWeightArgs& given, void* masked, double* sums, ParallelFor parallel) {
  const MaskedWeightArgs args = with_row_blocks(given);
  switch (args.dtype) {
    case DType::kFloat16:
      return forward<Half, float>(args, static_cast<Half*>(masked), sums, parallel);
    case DType::kBFloat16:
      return forward<BFloat16, float>(args, static_cast<BFloat16*>(masked), sums, parallel);
    case DType::kFloat32:
      return forward<float, float>(args, static_cast<float*>(masked), sums, parallel);
    case DType::kFloat64:
      return forward<double, double>(args, static_cast<double*>(masked), sums, parallel);
  }
}

void masked_weight_backward(const MaskedWeightArgs& given, const void* grad_masked, const double* grad_sums,
                            void* grad_pattern_logits, void* grad_tile_logits, ParallelFor parallel) {
  const MaskedWeightArgs args = with_row_blocks(given);
  float* pattern = static_cast<float*>(grad_pattern_logits);
  float* tile = static_cast<float*>(grad_tile_logits);
  switch (args.dtype) {
    case DType::kFloat16:
      return backward<Half, float>(args, static_cast<const Half*>(grad_masked), grad_sums, pattern, tile, parallel);
    case DType::kBFloat16:
      return backward<BFloat16, float>(args, static_cast<const BFloat16*>(grad_masked), grad_sums, pattern, tile,
                                       parallel);
    case DType::kFloat32:
      return backward<float, float>(args, static_cast<const float*>(grad_masked), grad_sums, pattern, tile, parallel);
    case DType::kFloat64:
      return backward<double, double>(args, static_cast<const double*>(grad_masked), grad_sums,
                                      static_cast<double*>(grad_pattern_logits), static_cast<double*>(grad_tile_logits),
                                      parallel);
  }
}

}  // namespace patch_kernels::cpu::PK_ISA
