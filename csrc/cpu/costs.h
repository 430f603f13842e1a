// Which kernel takes a call: what a tile costs each of them, in microseconds of one thread with the weight in memory.
// Measured on an AMD EPYC of Zen 4, 3.7 GHz, by benchmarks/ops/bench_cpu_kernels.py, where nothing else is said;
// "guess" where no such machine was at hand. Only ratios matter. A table and no measuring at run time: the same call
// takes the same kernel, so it has the same bits.
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
#if defined(PK_AMX)
// Xeon with AMX; many: the line through 16 and 512 tokens; torch, dense: more than one thread takes, so that 512 tokens
// of two threads go to the tile registers, which are faster for them.
template <>
struct CostsOf<BFloat16> {
  static constexpr Costs kCosts = {{0.4f, 0.41f, 1.7f, 0.8f, 20.0f, 0.037f}, {0.2f, 0.42f, 1.9f, 0.8f, 16.6f, 0.027f}};
};
#elif defined(__AVX512BF16__)
template <>
struct CostsOf<BFloat16> {
  static constexpr Costs kCosts = {{0.3f, 0.23f, 0.6f, 2.5f, 8.0f, 0.152f}, {0.1f, 0.26f, 0.7f, 2.2f, 13.4f, 0.155f}};
};
#elif defined(__AVX512BW__)
template <>
struct CostsOf<BFloat16> {  // torch has no fast bf16 without these instructions
  static constexpr Costs kCosts = {{0.3f, 0.36f, 5.0f, 5.0f, kNever, 0}, {0.1f, 0.37f, 7.4f, 3.9f, kNever, 0}};
};
#elif defined(PK_NEON)
template <>
struct CostsOf<BFloat16> {  // guess: AVX2's, and torch's with the matrix instructions that many of these CPUs have
  static constexpr Costs kCosts = {{0.3f, 0.46f, 4.4f, 6.6f, 10.0f, 0.2f}, {0.1f, 0.61f, 6.6f, 4.0f, 14.0f, 0.2f}};
};
#else
template <>
struct CostsOf<BFloat16> {
  static constexpr Costs kCosts = {{0.3f, 0.46f, 4.4f, 6.6f, kNever, 0}, {0.1f, 0.61f, 6.6f, 4.0f, kNever, 0}};
};
#endif
#if defined(__AVX512BW__)
template <>
struct CostsOf<Half> {  // torch: 1.4 us a token
  static constexpr Costs kCosts = {{0.9f, 0.60f, 17.5f, 5.8f, kNever, 0}, {0.6f, 0.55f, 14.4f, 4.3f, kNever, 0}};
};
#else
template <>
struct CostsOf<Half> {
  static constexpr Costs kCosts = {{0.2f, 0.46f, 17.7f, 7.1f, kNever, 0}, {0.2f, 0.80f, 12.7f, 4.2f, kNever, 0}};
};
#endif

}  // namespace
}  // namespace patch_kernels::cpu
