// The fast masked-weight kernels (math/mask_lanes.h) lane by lane on the host, against the CPU op. Between two warp
// barriers the 32 lanes run one after the other, in a random order: whatever needs a barrier that is not there reads
// poison.
//   emulate_mask equal [--cases N] [--seed S]    masked weights and logit gradients bit for bit, sums and the
//                                                gradients of tiles to rounding
//   emulate_mask fault NAME | faults             exit code 0 if the planted error is noticed
#include <algorithm>
#include <cmath>
#include <numeric>

#include "../cpu/isa.h"
#include "../math/mask_lanes.h"
#include "command_line.h"

namespace patch_kernels::emulate {
namespace {

enum class Fault { kNone, kLostChunk, kStaleStage, kNoArrivalBarrier, kNoGradientBarrier, kStageReusedEarly };

enum class Source { kFloat, kBFloat16, kFixed };

void serial(int64_t n, ParallelBody body, void* context) { body(0, n, context); }

// Random inputs of one call and room for its results, 16-byte aligned as torch's memory is.
struct Case {
  MaskedWeightArgs args{};
  Source source = Source::kFloat;
  std::vector<Chunk> weight, grad, logits, masked, masked_again, grad_logits;
  std::vector<uint8_t> nibbles;
  std::vector<float> tile_logits, grad_tiles;
  std::vector<double> factors;
  std::vector<int64_t> key;
  double sums[2] = {}, grad_sums[2] = {};

  MaskedWeightGrads grads() {
    return {grad.data(), grad_sums, args.pattern_logits ? grad_logits.data() : nullptr,
            args.tile_logits ? grad_tiles.data() : nullptr, masked_again.data()};
  }
};

uint16_t random_16_bit(std::mt19937& random, DType dtype) {
  const float value = std::normal_distribution<float>()(random);
  return with_packed(dtype, [&](auto packed) { return Element<decltype(packed)>::round(value); });
}

Case random_case(std::mt19937& random) {
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  std::normal_distribution<float> normal;
  Case c;
  c.source = static_cast<Source>(pick(0, 2));
  const int columns = c.source == Source::kBFloat16 ? 16 : 8;
  MaskedWeightArgs& args = c.args;
  args.rows = pick(1, 300), args.cols = columns * pick(1, 400 / columns);
  args.tile_rows = pick(0, 2) ? kTile : pick(1, 200), args.tile_cols = kTile;
  args.dtype = PackedDtypes::kDTypes[pick(0, PackedDtypes::kCount - 1)];
  args.pattern_dtype = c.source == Source::kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
  args.hard_pattern = pick(0, 3) == 0, args.hard_tile = pick(0, 3) == 0;
  args.layer = static_cast<uint32_t>(pick(0, 99));
  const int64_t weights = args.rows * args.cols, logits = weights / kGroup * kPatterns;
  c.weight.resize(ceil_div(weights, 8)), c.grad.resize(c.weight.size());
  c.masked.resize(c.weight.size()), c.masked_again.resize(c.weight.size());
  args.weight = c.weight.data();
  for (int64_t i = 0; i < weights; ++i) {
    reinterpret_cast<uint16_t*>(c.weight.data())[i] = random_16_bit(random, args.dtype);
    reinterpret_cast<uint16_t*>(c.grad.data())[i] = random_16_bit(random, args.dtype);
  }
  if (c.source == Source::kFixed) {
    c.nibbles.resize(weights / 8);
    for (auto& byte : c.nibbles) byte = static_cast<uint8_t>(pick(0, 255));
    args.fixed_pattern = c.nibbles.data();
  } else {
    const int size = c.source == Source::kFloat ? 4 : 2;
    c.logits.resize(ceil_div(logits * size, 16)), c.grad_logits.resize(c.logits.size());
    for (int64_t i = 0; i < logits; ++i) {
      const float value = 0.3f * normal(random);
      if (size == 4) {
        reinterpret_cast<float*>(c.logits.data())[i] = value;
      } else {
        store_as(value, reinterpret_cast<BFloat16*>(c.logits.data())[i]);
      }
    }
    args.pattern_logits = c.logits.data();
  }
  if (c.source == Source::kFixed || pick(0, 2)) {
    c.tile_logits.resize(ceil_div(args.rows, args.tile_rows) * ceil_div(args.cols, args.tile_cols));
    c.grad_tiles.resize(c.tile_logits.size());
    for (auto& logit : c.tile_logits) logit = 0.3f * normal(random);
    args.tile_logits = c.tile_logits.data();
  } else {
    args.tile_rows = kTile;
  }
  const double temperature = pick(0, 1) ? 1.0 : 0.05;
  c.factors = {1 / temperature, pick(1, 5) / temperature, 1 / temperature, pick(1, 5) / temperature};
  args.factors = c.factors.data();
  if (pick(0, 3)) {
    c.key = {static_cast<int64_t>(random()) << 20, pick(0, 1000)};
    args.key = c.key.data();
  }
  c.grad_sums[0] = 0.3, c.grad_sums[1] = 0.01;
  return c;
}

std::string describe(const Case& c) {
  const MaskedWeightArgs& a = c.args;
  char text[200];
  snprintf(text, sizeof text, "%lldx%lld tile rows %lld source %d dtype %d tiles %d hard %d%d noise %d",
           static_cast<long long>(a.rows), static_cast<long long>(a.cols), static_cast<long long>(a.tile_rows),
           static_cast<int>(c.source), static_cast<int>(a.dtype), a.tile_logits != nullptr, a.hard_pattern, a.hard_tile,
           a.key != nullptr);
  return text;
}

// The steps of cuda/masked_weight.cu's walk_tile for one warp, a phase between barriers at a time.
template <class T, class L>
struct EmulatedWarp {
  std::vector<MaskLane<T, L>> lanes;
  std::vector<Chunk> stages[2];
  std::mt19937& random;
  Fault fault;

  EmulatedWarp(const MaskedWeightArgs& args, uint32_t tile, int warp, std::mt19937& random, Fault fault)
      : random(random), fault(fault) {
    for (int lane = 0; lane < kLaneCount; ++lane) lanes.emplace_back(args, tile, lane, warp);
    // NaN in either type of logit.
    for (auto& stage : stages) stage.assign(std::max(1, LogitChunks<L>::kStepChunks), {{~0u, ~0u, ~0u, ~0u}});
  }

  template <class F>
  void for_lanes(F&& body) {
    int order[kLaneCount];
    std::iota(order, order + kLaneCount, 0);
    std::shuffle(order, order + kLaneCount, random);
    for (int lane : order) body(lanes[lane]);
  }
  void fetch_lane(const MaskLane<T, L>& lane, int step) {
    if (fault == Fault::kStaleStage && step == 2) return;
    if constexpr (MaskLane<T, L>::kLearned) {
      const char* from = lane.own_chunks(lane.args.pattern_logits) + step * lane.chunk_stride();
      lane.for_chunks(step, [&](int i) {
        const int chunk = lane.first_chunk() + kPairsPerRow * i;
        if (fault == Fault::kLostChunk && chunk == 17) return;
        memcpy(&stages[step & 1].at(chunk), from + 16 * kPairsPerRow * i, sizeof(Chunk));
      });
    }
  }
  void fetch(int step) {
    for_lanes([&](auto& lane) { fetch_lane(lane, step); });
  }

  // body(lane, step, stage), then end(lane, step, stage) behind a barrier.
  template <class Body, class End>
  void walk(Body&& body, End&& end) {
    const auto has_row = [&](int step) {
      return std::any_of(lanes.begin(), lanes.end(), [&](const auto& lane) { return lane.has_row(step); });
    };
    if (fault != Fault::kNoArrivalBarrier) fetch(0);
    for (int step = 0; has_row(step); ++step) {
      Chunk* stage = stages[step & 1].data();
      if (fault != Fault::kNoArrivalBarrier) fetch(step + 1);
      if (fault == Fault::kStageReusedEarly) fetch(step + 2);
      for_lanes([&](auto& lane) {
        if (fault == Fault::kNoArrivalBarrier) fetch_lane(lane, step);
        body(lane, step, stage);
        if (fault == Fault::kNoGradientBarrier) end(lane, step, stage);
      });
      if (fault != Fault::kNoGradientBarrier) for_lanes([&](auto& lane) { end(lane, step, stage); });
    }
  }
};

template <class T, class L>
void emulate(Case& c, std::mt19937& random, Fault fault) {
  const MaskedWeightArgs& args = c.args;
  const MaskedWeightGrads grads = c.grads();
  const int64_t tiles = ceil_div(args.rows, args.tile_rows) * ceil_div(args.cols, args.tile_cols);
  const auto density_grad = static_cast<float>(c.grad_sums[0]), norm_grad = static_cast<float>(c.grad_sums[1]);
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    const TileGate<float> gate = gate_of<float>(args, tile);
    double gate_sum = 0.0;
    for (int warp = 0; warp < kMaskWarps; ++warp) {
      EmulatedWarp<T, L> forward(args, tile, warp, random, fault), backward(args, tile, warp, random, fault);
      forward.walk(
          [&](const auto& lane, int step, Chunk* stage) {
            float mask_sum = 0.0f, square_sum = 0.0f;
            const Chunk out = lane.forward(lane.load_weights(args.weight, step), lane.own_logits(stage),
                                           lane.load_nibbles(step), step, gate.forward, mask_sum, square_sum);
            lane.store_weights(out, c.masked.data(), step);
            c.sums[0] += mask_sum, c.sums[1] += square_sum;
          },
          [](const auto&, int, const Chunk*) {});
      backward.walk(
          [&](const auto& lane, int step, Chunk* stage) {
            float gate_grad = 0.0f;
            const Chunk out = lane.backward(
                lane.load_weights(args.weight, step), lane.load_weights(c.grad.data(), step), lane.own_logits(stage),
                lane.load_nibbles(step), step, gate.forward, density_grad, norm_grad, gate_grad, true);
            lane.store_weights(out, c.masked_again.data(), step);
            gate_sum += gate_grad;
          },
          [&](const auto& lane, int step, const Chunk* stage) {
            if constexpr (MaskLane<T, L>::kLearned) {
              char* to = const_cast<char*>(lane.own_chunks(grads.grad_pattern_logits)) + step * lane.chunk_stride();
              lane.for_chunks(step, [&](int i) {
                memcpy(to + 16 * kPairsPerRow * i, stage + lane.first_chunk() + kPairsPerRow * i, sizeof(Chunk));
              });
            }
          });
    }
    if (!args.tile_logits) continue;
    c.grad_tiles[tile] = static_cast<float>(gate_sum) * gate.slope;
  }
}

template <class T>
void emulate_source(Case& c, std::mt19937& random, Fault fault) {
  switch (c.source) {
    case Source::kFloat:
      return emulate<T, float>(c, random, fault);
    case Source::kBFloat16:
      return emulate<T, BFloat16>(c, random, fault);
    case Source::kFixed:
      return emulate<T, FixedPattern>(c, random, fault);
  }
}

bool same_bytes(const std::vector<Chunk>& a, const std::vector<Chunk>& b) {
  return a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(Chunk)) == 0;
}

// Two orders of summation of the same fp32 terms; `scale` is what the terms may add up to.
bool is_near(double a, double b, double scale) { return std::abs(a - b) <= 1e-5 * (scale + std::abs(b)); }

std::string run_case(std::mt19937& random, Fault fault) {
  Case got = random_case(random);
  if (!has_tile_kernel(got.args)) return describe(got) + ": not a case of the tile kernel";
  Case expected = got;
  // The copy's pointers still lead into `got`; only results must be its own.
  cpu::generic::masked_weight(expected.args, expected.masked.data(), expected.sums, serial);
  cpu::generic::masked_weight_backward(expected.args, expected.grads(), serial);
  with_packed(got.args.dtype,
              [&](auto packed) { emulate_source<typename decltype(packed)::Storage>(got, random, fault); });
  std::string complaint;
  if (!same_bytes(got.masked, expected.masked)) complaint += " masked weights differ";
  if (!same_bytes(got.masked_again, expected.masked)) complaint += " masked weights of backward differ";
  if (!same_bytes(got.grad_logits, expected.grad_logits)) complaint += " logit gradients differ";
  for (int i = 0; i < 2; ++i) {
    if (!is_near(got.sums[i], expected.sums[i], 0.0)) complaint += " sums differ";
  }
  const double scale = static_cast<double>(std::min(got.args.tile_rows, got.args.rows) * kTile);
  for (size_t t = 0; t < got.grad_tiles.size(); ++t) {
    const double slope = std::max(1.0, got.factors[3]);
    if (!is_near(got.grad_tiles[t], expected.grad_tiles[t], 0.01 * scale * slope))
      complaint += " tile gradients differ";
  }
  return complaint.empty() ? "" : describe(got) + ":" + complaint;
}

int equal(int cases, uint32_t seed) {
  return run_cases(cases, seed, [](std::mt19937& random) { return run_case(random, Fault::kNone); });
}

// Twenty cases: not every one has several steps, or logits to lose.
int run_fault(const char* name, Fault fault) {
  std::mt19937 random(1);
  for (int i = 0; i < 20; ++i) {
    if (!run_case(random, fault).empty()) return 0;
  }
  printf("%s was not noticed\n", name);
  return 1;
}

}  // namespace
}  // namespace patch_kernels::emulate

int main(int argc, char** argv) {
  using namespace patch_kernels::emulate;
  return run_command<Fault>(argc, argv, {{"equal", equal}},
                            {{"lost_chunk", Fault::kLostChunk},
                             {"stale_stage", Fault::kStaleStage},
                             {"no_arrival_barrier", Fault::kNoArrivalBarrier},
                             {"no_gradient_barrier", Fault::kNoGradientBarrier},
                             {"stage_reused_early", Fault::kStageReusedEarly}},
                            run_fault);
}
