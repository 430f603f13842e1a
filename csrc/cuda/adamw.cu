// AdamW on the GPU: one pass in place. A warp takes a block of 256 values, eight neighbours a lane: 16 bytes of bf16,
// 32 of fp32, and one Philox call for each of parameter and moments if they are rounded.
//
// Memory should be what an H100 waits for: 2.5 KB a block with bf16 parameters and 8-bit moments are as long as 690
// instructions of a warp. So what is common does without branches a value: one check a lane sends what leaves the range
// of the short forms to the definition (math/adamw.h). The bits are the definition's either way.
#include "../math/adamw.h"
#include "launch.h"

namespace patch_kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxCtas = 8192;  // further blocks are taken in turn
constexpr int kValues = kAdamWBlock / 32;
static_assert(kValues == kRoundings, "a lane needs one Philox call");

using Values = float[kValues];

// The lane's place. Of a block that is not whole, the last one, values from `count` on are zero and never stored.
struct Place {
  int64_t block;
  int64_t first;
  int count;
};

// The lane's values as they lie in memory.
template <class T>
struct Lane {
  using Vector = std::conditional_t<sizeof(T) * kValues >= sizeof(uint4), uint4, uint2>;
  static constexpr int kVectors = sizeof(T) * kValues / sizeof(Vector);
  static constexpr int kWords = sizeof(T) * kValues / sizeof(uint32_t);
  union {
    Vector vectors[kVectors];
    uint32_t words[kWords];
    T values[kValues];
  };

  __device__ float value(int i) const {
    if constexpr (std::is_same_v<T, BFloat16>) {  // out of its word: nvcc would cut the half out first
      return bit_cast<float>(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
    } else {
      return values[i];
    }
  }

  template <bool kWhole>
  __device__ void load(const void* base, const Place& place) {
    const T* from = static_cast<const T*>(base) + place.first;
    if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) vectors[i] = reinterpret_cast<const Vector*>(from)[i];
    } else {
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i] = i < place.count ? from[i] : T{};
    }
  }
  template <bool kWhole>
  __device__ void store(void* base, const Place& place) const {
    T* to = static_cast<T*>(base) + place.first;
    if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        // Nothing reads it again in this step. A plain assignment is split into words by nvcc.
        __stcs(reinterpret_cast<Vector*>(to) + i, vectors[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        if (i < place.count) to[i] = values[i];
      }
    }
  }
};

// 16 bits for each value, two values a word.
struct Random {
  uint32_t words[4][1];
  __device__ Random(const AdamWArgs& args, const PhiloxKeys& keys, Rounded what, const Place& place) {
    rounding_words<1>(args, keys, what, static_cast<uint64_t>(place.first) / kRoundings, words);
  }
  __device__ uint32_t operator[](int i) const { return words[i / 2][0] >> 16 * (i % 2) & 0xFFFFu; }
  // The same, eight bits up: for codes in the upper byte of a word.
  __device__ uint32_t raised(int i) const { return __byte_perm(words[i / 2][0], 0, i % 2 ? 0x4324 : 0x4104); }
  __device__ void swap_neighbours() {
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w][0] = __byte_perm(words[w][0], 0, 0x1032);
  }
};

__device__ float larger_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ float smaller_or_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Largest magnitude, NaN if there is one.
__device__ float largest_of(const Values& values) {
  float largest = fabsf(values[0]);
#pragma unroll
  for (int i = 1; i < kValues; ++i) largest = larger_or_nan(largest, fabsf(values[i]));
  return largest;
}
__device__ float smallest_of(const Values& values) {
  float smallest = fabsf(values[0]);
#pragma unroll
  for (int i = 1; i < kValues; ++i) smallest = smaller_or_nan(smallest, fabsf(values[i]));
  return smallest;
}

// Round to nearest for x >= kLeastSquare, else anything: the short form of CUDA's sqrtf, whose range this is.
__device__ float root_in_range(float x) {
  float estimate;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(x));
  const float root = x * estimate;
  return __fmaf_rn(__fmaf_rn(-root, root, x), 0.5f * estimate, root);
}
// Round to nearest for normal a, b, 1 / b and a / b whose remainder is normal too: the short form of CUDA's division.
__device__ float quotient_in_range(float a, float b) {
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(b));
  const float inverse = __fmaf_rn(estimate, __fmaf_rn(-b, estimate, 1.0f), estimate);
  const float quotient = a * inverse;
  return __fmaf_rn(__fmaf_rn(-b, quotient, a), inverse, quotient);
}

// adamw_param by the short forms, with quotients 2^100 times as large so that none is subnormal. Let d be the
// denominator, at least 2^-50, and q the quotient. If every result is at least 2^-48 and below 2^127, all have the
// definition's bits:
//  - |q| >= 2^-76: step_size * exp_avg, |q| d, is normal, so the raised product is exactly 2^100 times as large; its
//    quotient is at least 2^24, the remainder's last bit at least 2^-74. Lowering the quotient is exact, being part of
//    the fused subtraction.
//  - |q| < 2^-76: then the result is param * decay, at least 2^-49, whichever way q is rounded.
// Overflow on the way, infinity and NaN end as infinity or NaN.
constexpr float kRaise = 0x1p100f, kLower = 0x1p-100f;
constexpr float kLeastResult = 0x1p-48f, kResultBound = 0x1p127f;

// True if the results may be rounded in short, too; else they were computed by the definition.
template <bool kInShort>
__device__ bool update_params(const AdamWFactors& f, const Values& exp_avg, const Values& exp_avg_sq, Values& param) {
  if constexpr (!kInShort) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) param[i] = adamw_param(param[i], f, exp_avg[i], exp_avg_sq[i]);
    return false;
  }
  Values fast;
  const float step_size = f.step_size * kRaise;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const float denominator = root_in_range(larger_or_nan(exp_avg_sq[i], kLeastSquare)) * f.root_factor + f.eps;
    const float quotient = quotient_in_range(step_size * exp_avg[i], denominator);
    fast[i] = __fmaf_rn(quotient, -kLower, param[i] * f.decay);
  }
  // No short circuit, which would be a branch.
  const bool in_range = (smallest_of(fast) >= kLeastResult) & (largest_of(fast) < kResultBound);
  if (!in_range) return update_params<false>(f, exp_avg, exp_avg_sq, param);
#pragma unroll
  for (int i = 0; i < kValues; ++i) param[i] = fast[i];
  return true;
}

template <class T>
struct IsRounded : std::true_type {};
template <>
struct IsRounded<float> : std::false_type {};

__device__ void round_values(const Values& values, const Random&, bool, Lane<float>& lane) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) lane.values[i] = values[i];
}
// in_range: all below 2^127 and none NaN, so no sum of bits overflows.
__device__ void round_values(const Values& values, const Random& random, bool in_range, Lane<BFloat16>& lane) {
  if (in_range) {
#pragma unroll
    for (int i = 0; i < kValues; i += 2) {
      lane.words[i / 2] = __byte_perm(bit_cast<uint32_t>(values[i]) + random[i],
                                      bit_cast<uint32_t>(values[i + 1]) + random[i + 1], 0x7632);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) store_rounded(values[i], random[i], lane.values[i]);
  }
}

// Codes by one factor of scale and unit where that is a normal number, else by the definition. Both are powers of two,
// so the bits are the same: of the definition's two products, the first is exact or leads to 0.
template <bool kInShort, bool kIsSquare>
struct CodeOf {
  static constexpr float kUnit = kIsSquare ? kExpAvgSqUnit : kExpAvgUnit;
  static constexpr float kLargestScale = 0x1p126f / kUnit;

  __device__ static void decode(const Lane<Code8>& lane, float scale, Values& values) {
    if (!kInShort || scale > kLargestScale) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        values[i] = kIsSquare ? decode_exp_avg_sq(lane.values[i], scale) : decode_exp_avg(lane.values[i], scale);
      }
      return;
    }
    const float factor = scale * kUnit;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const uint32_t top = lane.words[i / 4] << (24 - 8 * (i % 4));  // the code in the upper byte
      const uint32_t bits =
          kIsSquare ? top >> 4 & 0xFF00000u : static_cast<uint32_t>(static_cast<int32_t>(top) >> 4) & 0x87F00000u;
      values[i] = bit_cast<float>(bits) * factor;
    }
  }

  // Of a block that has the scale.
  __device__ static void encode(const Values& values, float scale, const Random& random, Lane<Code8>& lane) {
    if (!kInShort || !(scale <= kLargestScale)) {
      const float inverse = 1.0f / scale;
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        lane.values[i] = kIsSquare ? encode_exp_avg_sq(values[i], inverse, random[i])
                                   : encode_exp_avg(values[i], inverse, random[i]);
      }
      return;
    }
    constexpr uint32_t kOne = 0x3F800000u;
    const uint32_t divisor = bit_cast<uint32_t>(scale) + (bit_cast<uint32_t>(kUnit) - kOne);  // scale * kUnit, as bits
    const float factor = bit_cast<float>(2 * kOne - divisor);                                 // its inverse
    uint32_t tops[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      tops[i] = (bit_cast<uint32_t>(fabsf(values[i]) * factor) << 4) + random.raised(i);
      if (kIsSquare) {
        tops[i] = values[i] > 0.0f ? max(tops[i], 1u << 24) : tops[i];
      } else {
        tops[i] |= bit_cast<uint32_t>(values[i]) & 0x80000000u;
      }
    }
#pragma unroll
    for (int w = 0; w < kValues / 4; ++w) {
      const uint32_t low = __byte_perm(tops[4 * w], tops[4 * w + 1], 0x0073);
      const uint32_t high = __byte_perm(tops[4 * w + 2], tops[4 * w + 3], 0x0073);
      lane.words[w] = __byte_perm(low, high, 0x5410);
    }
  }
};

template <bool kWhole, bool kIsSquare, class T>
__device__ void load(const void* from, const float* scales, const Place& place, Values& values) {
  Lane<T> lane;
  lane.template load<kWhole>(from, place);
  if constexpr (std::is_same_v<T, Code8>) {
    CodeOf<kWhole, kIsSquare>::decode(lane, scales[place.block], values);
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = lane.value(i);
  }
}

template <bool kWhole, bool kIsSquare, class T>
__device__ void store_moment(const Values& values, const Random& random, void* to, float* scales, const Place& place) {
  Lane<T> lane;
  const float largest = IsRounded<T>::value ? largest_of(values) : 0.0f;
  if constexpr (std::is_same_v<T, Code8>) {
    const float scale = block_scale(__reduce_max_sync(0xFFFFFFFFu, bit_cast<uint32_t>(largest)));
    if (threadIdx.x % 32 == 0) scales[place.block] = scale;
    CodeOf<kWhole, kIsSquare>::encode(values, scale, random, lane);
  } else {
    round_values(values, random, kWhole && largest < kResultBound, lane);
  }
  lane.template store<kWhole>(to, place);
}

template <bool kWhole, class Param, class Moment>
__device__ void step_block(const AdamWArgs& args, const PhiloxKeys& keys, float grad_scale, const Place& place) {
  Values p, g, m, v;
  load<kWhole, false, Param>(args.param, nullptr, place, p);
  load<kWhole, false, Param>(args.grad, nullptr, place, g);
  load<kWhole, false, Moment>(args.exp_avg, args.exp_avg_scale, place, m);
  load<kWhole, true, Moment>(args.exp_avg_sq, args.exp_avg_sq_scale, place, v);
#pragma unroll
  for (int i = 0; i < kValues; ++i) adamw_moments(g[i] * grad_scale, args.factors, m[i], v[i]);
  const bool in_range = update_params<kWhole>(args.factors, m, v, p);
  Lane<Param> lane;
  round_values(p, Random(args, keys, Rounded::kParam, place), in_range, lane);
  lane.template store<kWhole>(args.param, place);
  Random random(args, keys, Rounded::kMoments, place);
  store_moment<kWhole, false, Moment>(m, random, args.exp_avg, args.exp_avg_scale, place);
  random.swap_neighbours();
  store_moment<kWhole, true, Moment>(v, random, args.exp_avg_sq, args.exp_avg_sq_scale, place);
}

// The round keys are operands of the instructions that use them, in constant memory.
template <class Param, class Moment>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ AdamWArgs args, const __grid_constant__ PhiloxKeys keys) {
  const int64_t whole = args.elems / kAdamWBlock;
  const float grad_scale = args.grad_scale ? *args.grad_scale : 1.0f;
  const int own = threadIdx.x % 32 * kValues;  // first value of the lane in a block
  int64_t block = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  for (; block < whole; block += int64_t{gridDim.x} * kWarps) {
    step_block<true, Param, Moment>(args, keys, grad_scale, {block, block * kAdamWBlock + own, kValues});
  }
  const int left = static_cast<int>(args.elems % kAdamWBlock) - own;
  if (block == whole && args.elems % kAdamWBlock > 0) {
    const int count = left < 0 ? 0 : left < kValues ? left : kValues;
    step_block<false, Param, Moment>(args, keys, grad_scale, {block, block * kAdamWBlock + own, count});
  }
}

template <class Param, class Moment>
void launch(const AdamWArgs& args, cudaStream_t stream) {
  const int64_t ctas = ceil_div(args.elems, kAdamWBlock * kWarps);
  const auto grid = static_cast<unsigned>(ctas < kMaxCtas ? ctas : kMaxCtas);
  adamw_kernel<Param, Moment><<<grid, kThreads, 0, stream>>>(args, philox_keys(args.seed));
  check_launch("adamw_step");
}

template <class Param>
void launch_param(const AdamWArgs& args, cudaStream_t stream) {
  switch (args.moment_bits) {
    case 32:
      return launch<Param, float>(args, stream);
    case 16:
      return launch<Param, BFloat16>(args, stream);
    case 8:
      return launch<Param, Code8>(args, stream);
  }
}

}  // namespace

void adamw_step(const AdamWArgs& args, void* stream_in) {
  const auto stream = static_cast<cudaStream_t>(stream_in);
  if (args.elems == 0) return;
  if (args.param_type == DType::kBFloat16) return launch_param<BFloat16>(args, stream);
  launch_param<float>(args, stream);
}

}  // namespace patch_kernels::cuda
