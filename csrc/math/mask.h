// A PATCH mask for one group of four weights (PATCH, arXiv 2509.23410, section 3): pattern probabilities, mask, and
// their derivatives. Written once: the CPU runs it on kLanes groups at a time (every loop over lanes is vectorised by
// the compiler), CUDA runs it with one lane per thread.
//
// Forward and backward call the same functions and nothing is contracted behind their back, so both see the same mask
// bit for bit.
#pragma once

#include <cstdint>

#include "arithmetic.h"
#include "philox.h"

namespace patch_kernels {
namespace {  // internal linkage: this header is compiled once per instruction set

constexpr int kPatterns = 6;
constexpr uint32_t kTileStreamBit = 1u << 31;  // of the fourth counter word: tile noise

struct NoiseKey {
  uint64_t seed;
  uint32_t layer;
  uint32_t draw;
  bool enabled;
};

PK_HD NoiseKey noise_key(const int64_t* key, uint32_t layer) {
  if (!key) return {0, layer, 0, false};
  return {static_cast<uint64_t>(key[0]), layer, static_cast<uint32_t>(key[1]), true};
}

// exponent of 2 = logit * scale + log2-noise * noise; of patterns and of tiles.
template <class Real>
struct Factors {
  Real logit;     // log2(e) * scale / temperature
  Real noise;     // 1 / temperature
  Real gradient;  // scale / temperature
};
template <class Real>
PK_HD Factors<Real> make_factors(double inverse_temperature, double scale_over_temperature) {
  return {static_cast<Real>(kLog2E * scale_over_temperature), static_cast<Real>(inverse_temperature),
          static_cast<Real>(scale_over_temperature)};
}

// The dense choice of one tile: d = sigmoid((scale*logit + logistic)/temperature).
template <class Real>
struct TileGate {
  Real forward;  // d, or 0/1 if hard
  Real slope;    // of the soft d over the logit
};

template <class Real>
PK_HD TileGate<Real> tile_gate(Real logit, uint32_t row, uint32_t col, const Factors<Real>& factors, bool hard,
                               const NoiseKey& noise) {
  Real z = factors.logit * logit;
  if (noise.enabled) {
    uint32_t c0[1] = {row}, c1[1] = {col}, c2[1] = {noise.draw}, c3[1] = {noise.layer | kTileStreamBit};
    philox<1>(c0, c1, c2, c3, philox_keys(noise.seed));
    // The logistic variate ln(u) - ln(1 - u); 1 - u is the uniform of the inverted bits.
    const uint32_t bits = c0[0] >> 11;
    const Real logistic = exponential<Real>(~bits & 0x1FFFFFu) - exponential<Real>(bits);
    z = mul_add(logistic, factors.noise, z);
  }
  // sigmoid through 2^-|z|, which neither overflows nor loses the small tail
  const Real e = exp2_nonpositive(z < 0 ? z : -z);
  const Real soft = (z < 0 ? e : Real(1)) * reciprocal(Real(1) + e);
  return {hard ? Real(z > 0 ? 1 : 0) : soft, factors.gradient * soft * (Real(1) - soft)};
}

// Pattern probabilities p[k][lane] of groups first..first+kLanes-1 from their logits l[k][lane]:
// softmax((scale*l + Gumbel)/temperature). With E = -log2(u), Gumbel = -ln(ln2 * E), and the constant cancels.
template <class Real, int kLanes>
PK_HD void pattern_probabilities(const Real (&logits)[kPatterns][kLanes], uint64_t first, const Factors<Real>& factors,
                                 const NoiseKey& noise, Real (&p)[kPatterns][kLanes]) {
  for (int k = 0; k < kPatterns; ++k) {
    for (int l = 0; l < kLanes; ++l) p[k][l] = logits[k][l] * factors.logit;
  }
  if (noise.enabled) {
    uint32_t words[4][kLanes], bits[kPatterns][kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t group = first + static_cast<uint64_t>(l);
      words[0][l] = static_cast<uint32_t>(group);
      words[1][l] = static_cast<uint32_t>(group >> 32);
      words[2][l] = noise.draw;
      words[3][l] = noise.layer;
    }
    philox<kLanes>(words[0], words[1], words[2], words[3], philox_keys(noise.seed));
    for (int l = 0; l < kLanes; ++l) {
      // Six 21-bit fields out of 128 bits, no bit used twice.
      for (int k = 0; k < 4; ++k) bits[k][l] = words[k][l] >> 11;
      bits[4][l] = (words[0][l] & 0x7FFu) << 10 | (words[1][l] & 0x3FFu);
      bits[5][l] = (words[2][l] & 0x7FFu) << 10 | (words[3][l] & 0x3FFu);
    }
    for (int k = 0; k < kPatterns; ++k) {
      for (int l = 0; l < kLanes; ++l) {
        p[k][l] = mul_add(-log2_positive(exponential<Real>(bits[k][l])), factors.noise, p[k][l]);
      }
    }
  }
  Real total[kLanes], highest[kLanes];
  for (int l = 0; l < kLanes; ++l) highest[l] = p[0][l];
  for (int k = 1; k < kPatterns; ++k) {
    for (int l = 0; l < kLanes; ++l) highest[l] = larger(p[k][l], highest[l]);
  }
  for (int k = 0; k < kPatterns; ++k) {
    for (int l = 0; l < kLanes; ++l) {
      p[k][l] = exp2_nonpositive(p[k][l] - highest[l]);
      total[l] = k == 0 ? p[k][l] : total[l] + p[k][l];
    }
  }
  for (int l = 0; l < kLanes; ++l) total[l] = reciprocal(total[l]);
  for (int k = 0; k < kPatterns; ++k) {
    for (int l = 0; l < kLanes; ++l) p[k][l] *= total[l];
  }
}

// Keep share m[j][lane] of the four columns: the expected pattern, or the likeliest one (first of equals) if hard.
template <class Real, int kLanes>
PK_HD void pattern_mask(const Real (&p)[kPatterns][kLanes], bool hard, Real (&m)[kGroup][kLanes]) {
  Real chosen[kPatterns][kLanes];
  if (hard) {
    Real highest[kLanes], taken[kLanes];
    for (int l = 0; l < kLanes; ++l) highest[l] = p[0][l];
    for (int k = 1; k < kPatterns; ++k) {
      for (int l = 0; l < kLanes; ++l) highest[l] = larger(p[k][l], highest[l]);
    }
    for (int l = 0; l < kLanes; ++l) taken[l] = 0;
    for (int k = 0; k < kPatterns; ++k) {
      for (int l = 0; l < kLanes; ++l) {
        chosen[k][l] = (p[k][l] == highest[l] && taken[l] == Real(0)) ? Real(1) : Real(0);
        taken[l] += chosen[k][l];
      }
    }
  } else {
    for (int k = 0; k < kPatterns; ++k) {
      for (int l = 0; l < kLanes; ++l) chosen[k][l] = p[k][l];
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    m[0][l] = chosen[0][l] + chosen[1][l] + chosen[2][l];
    m[1][l] = chosen[0][l] + chosen[3][l] + chosen[4][l];
    m[2][l] = chosen[1][l] + chosen[3][l] + chosen[5][l];
    m[3][l] = chosen[2][l] + chosen[4][l] + chosen[5][l];
  }
}

// Keep share of a fixed pattern nibble (bit j = column j).
template <class Real, int kLanes>
PK_HD void fixed_mask(const uint32_t (&nibbles)[kLanes], Real (&m)[kGroup][kLanes]) {
  for (int j = 0; j < kGroup; ++j) {
    for (int l = 0; l < kLanes; ++l) m[j][l] = static_cast<Real>(static_cast<int32_t>((nibbles[l] >> j) & 1u));
  }
}

// Mask of a tile with gate d over the pattern mask m.
template <class Real>
PK_HD Real gated_mask(Real d, Real m) {
  return mul_add(Real(1) - d, m, d);
}

// mask * weight, but a mask of exactly zero drops the weight even if it is inf or NaN.
template <class Real>
PK_HD Real masked_value(Real mask, Real weight) {
  return mask == Real(0) ? Real(0) : mask * weight;
}

// Derivatives for one group. g = dL/d(masked weight), w = weight, m = pattern mask, d = forward gate of its tile;
// density_grad = dL/d(sum of mask), norm_grad = dL/d(sum of (mask*weight)^2).
// Gives dL/dmask of the pattern (after the gate) and the group's share of dL/dgate.
template <class Real, int kLanes>
PK_HD void mask_gradient(const Real (&g)[kGroup][kLanes], const Real (&w)[kGroup][kLanes],
                         const Real (&m)[kGroup][kLanes], const Real (&d)[kLanes], Real density_grad, Real norm_grad,
                         Real (&pattern_grad)[kGroup][kLanes], Real (&gate_grad)[kLanes]) {
  for (int l = 0; l < kLanes; ++l) gate_grad[l] = 0;
  for (int j = 0; j < kGroup; ++j) {
    for (int l = 0; l < kLanes; ++l) {
      const Real mask = gated_mask(d[l], m[j][l]);
      const bool dropped = mask == Real(0) && !is_finite(w[j][l]);
      const Real weight = dropped ? Real(0) : w[j][l];
      const Real mask_grad = mul_add(weight, mul_add(Real(2) * norm_grad * mask, weight, g[j][l]), density_grad);
      pattern_grad[j][l] = (Real(1) - d[l]) * mask_grad;
      gate_grad[l] = mul_add(mask_grad, Real(1) - m[j][l], gate_grad[l]);
    }
  }
}

// dL/dlogits of the six patterns from dL/dmask: softmax derivative, factor = scale/temperature.
template <class Real, int kLanes>
PK_HD void pattern_logit_gradient(const Real (&p)[kPatterns][kLanes], const Real (&pattern_grad)[kGroup][kLanes],
                                  Real factor, Real (&logit_grad)[kPatterns][kLanes]) {
  // Column pairs kept by the patterns 1100 1010 1001 0110 0101 0011.
  constexpr int kColumns[kPatterns][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
  Real mean[kLanes];
  for (int l = 0; l < kLanes; ++l) mean[l] = 0;
  for (int k = 0; k < kPatterns; ++k) {
    for (int l = 0; l < kLanes; ++l) {
      logit_grad[k][l] = pattern_grad[kColumns[k][0]][l] + pattern_grad[kColumns[k][1]][l];
      mean[l] = mul_add(p[k][l], logit_grad[k][l], mean[l]);
    }
  }
  for (int k = 0; k < kPatterns; ++k) {
    for (int l = 0; l < kLanes; ++l) logit_grad[k][l] = factor * p[k][l] * (logit_grad[k][l] - mean[l]);
  }
}

}  // namespace
}  // namespace patch_kernels
