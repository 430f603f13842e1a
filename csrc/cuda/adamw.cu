// AdamW on the GPU: one pass in place. A warp takes a block of 256 values, eight neighbours a lane: 16 bytes of bf16,
// 32 of fp32, and one Philox call for each tensor that is rounded.
#include "../math/adamw.h"
#include "launch.h"

namespace patch_kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxCtas = 8192;  // further blocks are taken in turn
constexpr int kValues = kAdamWBlock / 32;
static_assert(kValues == kRoundings, "a lane needs one Philox call a tensor");

// The lane's values; those from `count` on, in the last block, are zero and never stored.
template <class T>
struct Lane {
  using Vector = std::conditional_t<sizeof(T) * kValues >= sizeof(uint4), uint4, uint2>;
  static constexpr int kVectors = sizeof(T) * kValues / sizeof(Vector);
  T values[kValues];

  __device__ void load(const T* from, int count) {
    if (count == kValues) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const Vector vector = reinterpret_cast<const Vector*>(from)[i];
        memcpy(values + i * (kValues / kVectors), &vector, sizeof(Vector));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i] = i < count ? from[i] : T{};
    }
  }
  __device__ void store(T* to, int count) const {
    if (count == kValues) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        Vector vector;
        memcpy(&vector, values + i * (kValues / kVectors), sizeof(Vector));
        // Nothing reads it again in this step. A plain assignment is split into words by nvcc.
        __stcs(reinterpret_cast<Vector*>(to) + i, vector);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        if (i < count) to[i] = values[i];
      }
    }
  }
};

struct Place {
  int64_t block;  // of 256 values
  int64_t first;  // of the lane's values
  int count;
};

struct Random {
  uint32_t words[4][1];
  __device__ Random(const AdamWArgs& args, Rounded what, const Place& place) {
    rounding_words<1>(args, what, static_cast<uint64_t>(place.first) / kRoundings, words);
  }
  __device__ uint32_t operator[](int i) const { return words[i / 2][0] >> 16 * (i % 2) & 0xFFFFu; }
};

__device__ float* scale_of(const AdamWArgs& args, Rounded what, const Place& place) {
  return (what == Rounded::kExpAvg ? args.exp_avg_scale : args.exp_avg_sq_scale) + place.block;
}

template <class T>
__device__ void load(const AdamWArgs& args, Rounded what, const Place& place, const void* from,
                     float (&values)[kValues]) {
  Lane<T> lane;
  lane.load(static_cast<const T*>(from) + place.first, place.count);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if constexpr (std::is_same_v<T, Code8>) {
      const float scale = *scale_of(args, what, place);
      values[i] =
          what == Rounded::kExpAvg ? decode_exp_avg(lane.values[i], scale) : decode_exp_avg_sq(lane.values[i], scale);
    } else {
      values[i] = load_as<float>(lane.values[i]);
    }
  }
}

template <class T>
__device__ void store(const AdamWArgs& args, Rounded what, const Place& place, const float (&values)[kValues],
                      void* to) {
  Lane<T> lane;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) lane.values[i] = values[i];
  } else {
    const Random random(args, what, place);
    if constexpr (std::is_same_v<T, Code8>) {
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < kValues; ++i) largest = max(largest, bit_cast<uint32_t>(values[i]) & 0x7FFFFFFFu);
      for (int offset = 16; offset > 0; offset /= 2) {
        largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, offset));
      }
      const float scale = block_scale(largest), inverse = 1.0f / scale;
      if (threadIdx.x % 32 == 0) *scale_of(args, what, place) = scale;
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        lane.values[i] = what == Rounded::kExpAvg ? encode_exp_avg(values[i], inverse, random[i])
                                                  : encode_exp_avg_sq(values[i], inverse, random[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kValues; ++i) store_rounded(values[i], random[i], lane.values[i]);
    }
  }
  lane.store(static_cast<T*>(to) + place.first, place.count);
}

template <class Param, class Moment>
__global__ void __launch_bounds__(kThreads) adamw_kernel(AdamWArgs args) {
  const int64_t blocks = ceil_div(args.elems, kAdamWBlock);
  const float grad_scale = args.grad_scale ? *args.grad_scale : 1.0f;
  for (int64_t block = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; block < blocks;
       block += int64_t{gridDim.x} * kWarps) {
    const int64_t first = block * kAdamWBlock + threadIdx.x % 32 * kValues, left = args.elems - first;
    const Place place{block, first, static_cast<int>(left < 0 ? 0 : left < kValues ? left : kValues)};
    float p[kValues], g[kValues], m[kValues], v[kValues];
    load<Param>(args, Rounded::kParam, place, args.param, p);
    load<Param>(args, Rounded::kParam, place, args.grad, g);
    load<Moment>(args, Rounded::kExpAvg, place, args.exp_avg, m);
    load<Moment>(args, Rounded::kExpAvgSq, place, args.exp_avg_sq, v);
#pragma unroll
    for (int i = 0; i < kValues; ++i) adamw_value(g[i] * grad_scale, args.factors, p[i], m[i], v[i]);
    store<Param>(args, Rounded::kParam, place, p, args.param);
    store<Moment>(args, Rounded::kExpAvg, place, m, args.exp_avg);
    store<Moment>(args, Rounded::kExpAvgSq, place, v, args.exp_avg_sq);
  }
}

template <class Param, class Moment>
void launch(const AdamWArgs& args, cudaStream_t stream) {
  const int64_t ctas = ceil_div(args.elems, kAdamWBlock * kWarps);
  adamw_kernel<Param, Moment><<<static_cast<unsigned>(ctas < kMaxCtas ? ctas : kMaxCtas), kThreads, 0, stream>>>(args);
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
