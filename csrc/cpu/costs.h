// Which kernel takes a call: what a tile costs each of them, in microseconds of one thread with the weight in memory.
// Measured on an AMD EPYC of Zen 4, 3.7 GHz, by benchmarks/ops/bench_cpu_kernels.py; "guess" where no such machine was
// at hand. Only ratios matter. A table and no measuring at run time: the same call takes the same kernel, so it has the
// same bits.
#pragma once

#include "../math/elements.h"

namespace patch_kernels::cpu {
namespace {

struct TileCost {
  float few, few_token;      // few_tokens.h: of a tile, and of each token
  float many, many_16;       // pairs.h or columns.h: of a tile, and of each 16 tokens begun
  float torch, torch_token;  // unpacked and multiplied by torch
};
struct Costs {
  TileCost dense, sparse;
};

constexpr float kNever = 1e9f;

template <class T>
struct CostsOf;
#if defined(__AVX512BF16__)
template <>
struct CostsOf<BFloat16> {
  static constexpr Costs kCosts = {{0.3f, 0.23f, 0.6f, 2.5f, 8.0f, 0.152f}, {0.1f, 0.26f, 0.7f, 2.2f, 13.4f, 0.155f}};
};
#else
template <>
struct CostsOf<BFloat16> {  // torch has no fast bf16 here
  static constexpr Costs kCosts = {{0.3f, 0.36f, 5.0f, 5.0f, kNever, 0}, {0.1f, 0.37f, 7.4f, 3.9f, kNever, 0}};
};
#endif
template <>
struct CostsOf<Half> {  // nor fp16, 1.4 us a token
  static constexpr Costs kCosts = {{0.9f, 0.60f, 17.5f, 5.8f, kNever, 0}, {0.6f, 0.55f, 14.4f, 4.3f, kNever, 0}};
};

}  // namespace
}  // namespace patch_kernels::cpu
