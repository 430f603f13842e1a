// AdamW on the CPU: one pass in place, blocks of 256 values in the L1 cache. Compiled once per instruction set.
#include "../math/adamw.h"

#include "isa.h"
#include "parallel.h"

namespace patch_kernels::cpu::PK_ISA {
namespace {

// Philox calls of a block, at once. GCC unrolls loops of 16 or fewer whole and then multiplies one number at a time.
constexpr int kLanes = kAdamWBlock / kRoundings;

struct Block {
  int64_t index;
  int count;  // values, fewer only in the last block
  int64_t first() const { return index * kAdamWBlock; }
};

using Values = float[kAdamWBlock];
using Random = uint16_t[kAdamWBlock];

void draw(const AdamWArgs& args, const PhiloxKeys& keys, Rounded what, const Block& block, Random& random) {
  uint32_t words[4][kLanes], transposed[kLanes][4];
  rounding_words<kLanes>(args, keys, what, static_cast<uint64_t>(block.first()) / kRoundings, words);
  for (int l = 0; l < kLanes; ++l) {
    for (int w = 0; w < 4; ++w) transposed[l][w] = words[w][l];
  }
  memcpy(random, transposed, sizeof(random));  // little endian: the lower half of a word comes first
}

// To the neighbour's bits.
void swap_neighbours(Random& random) {
  for (int i = 0; i < kAdamWBlock; i += 2) {
    const uint16_t first = random[i];
    random[i] = random[i + 1];
    random[i + 1] = first;
  }
}

enum class Tensor { kParam, kExpAvg, kExpAvgSq };

void store(const AdamWArgs&, Tensor, const Block& block, const Values& values, const Random&, float* to) {
  for (int i = 0; i < block.count; ++i) to[i] = values[i];
}
void store(const AdamWArgs&, Tensor, const Block& block, const Values& values, const Random& random, BFloat16* to) {
  for (int i = 0; i < block.count; ++i) store_rounded(values[i], random[i], to[i]);
}

float* scale_of(const AdamWArgs& args, Tensor tensor, const Block& block) {
  return (tensor == Tensor::kExpAvg ? args.exp_avg_scale : args.exp_avg_sq_scale) + block.index;
}
void store(const AdamWArgs& args, Tensor tensor, const Block& block, const Values& values, const Random& random,
           Code8* to) {
  uint32_t largest = 0;
  for (int i = 0; i < block.count; ++i) {
    const uint32_t magnitude = bit_cast<uint32_t>(values[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float scale = block_scale(largest), inverse = 1.0f / scale;
  *scale_of(args, tensor, block) = scale;
  if (tensor == Tensor::kExpAvg) {
    for (int i = 0; i < block.count; ++i) to[i] = encode_exp_avg(values[i], inverse, random[i]);
  } else {
    for (int i = 0; i < block.count; ++i) to[i] = encode_exp_avg_sq(values[i], inverse, random[i]);
  }
}

template <class T>
void load(const AdamWArgs&, Tensor, const Block& block, const T* from, Values& values) {
  for (int i = 0; i < block.count; ++i) values[i] = load_as<float>(from[i]);
}
void load(const AdamWArgs& args, Tensor tensor, const Block& block, const Code8* from, Values& values) {
  const float scale = *scale_of(args, tensor, block);
  if (tensor == Tensor::kExpAvg) {
    for (int i = 0; i < block.count; ++i) values[i] = decode_exp_avg(from[i], scale);
  } else {
    for (int i = 0; i < block.count; ++i) values[i] = decode_exp_avg_sq(from[i], scale);
  }
}

template <class Param, class Moment>
void step_block(const AdamWArgs& args, const PhiloxKeys& keys, const Block& block) {
  Param* const param = static_cast<Param*>(args.param) + block.first();
  const Param* const grad = static_cast<const Param*>(args.grad) + block.first();
  Moment* const exp_avg = static_cast<Moment*>(args.exp_avg) + block.first();
  Moment* const exp_avg_sq = static_cast<Moment*>(args.exp_avg_sq) + block.first();
  const float grad_scale = args.grad_scale ? *args.grad_scale : 1.0f;
  const AdamWFactors factors = args.factors;
  Values p, m, v;
  Random random;
  load(args, Tensor::kParam, block, param, p);
  load(args, Tensor::kExpAvg, block, exp_avg, m);
  load(args, Tensor::kExpAvgSq, block, exp_avg_sq, v);
  for (int i = 0; i < block.count; ++i) {
    adamw_moments(load_as<float>(grad[i]) * grad_scale, factors, m[i], v[i]);
    p[i] = adamw_param(p[i], factors, m[i], v[i]);
  }
  if (sizeof(Param) < sizeof(float)) draw(args, keys, Rounded::kParam, block, random);
  store(args, Tensor::kParam, block, p, random, param);
  if (sizeof(Moment) < sizeof(float)) draw(args, keys, Rounded::kMoments, block, random);
  store(args, Tensor::kExpAvg, block, m, random, exp_avg);
  swap_neighbours(random);
  store(args, Tensor::kExpAvgSq, block, v, random, exp_avg_sq);
}

template <class Param, class Moment>
void step(const AdamWArgs& args, ParallelFor parallel) {
  const PhiloxKeys keys = philox_keys(args.seed);
  parallel_over(parallel, ceil_div(args.elems, kAdamWBlock), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t left = args.elems - b * kAdamWBlock;
      step_block<Param, Moment>(args, keys, {b, static_cast<int>(left < kAdamWBlock ? left : kAdamWBlock)});
    }
  });
}

template <class Param>
void step_param(const AdamWArgs& args, ParallelFor parallel) {
  switch (args.moment_bits) {
    case 32:
      return step<Param, float>(args, parallel);
    case 16:
      return step<Param, BFloat16>(args, parallel);
    case 8:
      return step<Param, Code8>(args, parallel);
  }
}

}  // namespace

void adamw_step(const AdamWArgs& args, ParallelFor parallel) {
  if (args.param_type == DType::kBFloat16) return step_param<BFloat16>(args, parallel);
  step_param<float>(args, parallel);
}

}  // namespace patch_kernels::cpu::PK_ISA
