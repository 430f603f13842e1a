// Tests the Hopper kernel body on the CPU emulator.
//   emulate_sm90 exact --cases N --seed S   random problems of small integers: y must equal the rounded integer result
//   emulate_sm90 invariant --cases N --seed S   rows of y must not depend on the number of tokens (real values)
//   emulate_sm90 selfcheck                  the problems and plans that a GPU is checked with at first use
//   emulate_sm90 fault NAME                 0 if the planted error is noticed
//   emulate_sm90 faults                     their names
#include "../check/self_check.h"
#include "command_line.h"
#include "machine_sm90.h"

namespace patch_kernels::emulate {
namespace {

struct Case {
  Sizes sizes;
  DType dtype = DType::kFloat16;
  bool pairs = false;
  int bn = 8, token_ctas = 1, row_ctas = 1, splits = 1, workers = 1, groups_per_block = 1;
  bool cut_by_pair = false;
  int layers = 1;
  bool own_tokens = false;  // layers have rows of x of their own, as experts do
};

std::string describe(const Case& c) {
  char text[192];
  snprintf(
      text, sizeof(text),
      " %s pairs %d bn %d token_ctas %d row_ctas %d splits %d workers %d groups_per_block %d cut_by_pair %d layers "
      "%d own_tokens %d",
      with_packed(c.dtype, [](auto packed) { return packed.kShortName; }), c.pairs, c.bn, c.token_ctas, c.row_ctas,
      c.splits, c.workers, c.groups_per_block, c.cut_by_pair, c.layers, c.own_tokens);
  return describe(c.sizes) + text;
}

// What has to be read of the weights: a layer's once for each group of its tokens.
int64_t weight_bytes(const GemmProblem& p, int tokens_of_group) {
  int64_t bytes = 0;
  for (int i = 0; i < p.layer_count; ++i) {
    const GemmLayer& layer = p.layers[i];
    const int64_t tiles = int64_t{layer.schedule.tile_rows} * layer.schedule.tile_cols;
    for (int64_t t = 0; t < tiles; ++t) {
      bytes += ceil_div(layer.tokens, tokens_of_group) * tile_bytes(entry_is_sparse(layer.schedule.tiles[t]));
    }
  }
  return bytes;
}

// Runs the grid: clusters one after the other, the roles of a cluster's CTAs as threads. "" or what went wrong.
template <class Config, class Element>
std::string run_grid(const GemmProblem& p, const FaultPlan& faults) {
  using M = Machine<Element>;
  const typename M::TensorMap x_map{static_cast<uint16_t*>(const_cast<void*>(p.x)), p.tokens, p.cols, p.x_stride};
  typename M::TensorMap y_maps[kMaxLayers];
  for (int i = 0; i < p.layer_count; ++i) {
    const GemmLayer& layer = p.layers[i];
    y_maps[i] = {static_cast<uint16_t*>(layer.y), layer.tokens, layer.rows, layer.y_stride};
  }
  const int roles = sm90::kConsumers + 1 + Config::kRings, ctas = p.token_ctas * p.row_ctas * p.splits;
  int64_t read_bytes = 0;
  for (int index = 0; index < p.items.workers; ++index) {
    Cluster cluster(ctas, roles, Config::kBarrierOffset, Config::kBarriers, faults);
    for (Cta& cta : cluster.cta) {
      cta.barrier_base = Cta::kBase + Config::kBarrierOffset;
      for (int i = 0; i < Config::kBarriers; ++i) cta.kinds.push_back(barrier_kind<Config>(i));
    }
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ctas; ++rank) {
      for (int role = 0; role < roles; ++role) {
        threads.emplace_back([&, rank, role] {
          try {
            M machine(cluster, index, rank, role);
            sm90::tile_gemm<Config>(machine, p, x_map, y_maps);
            --cluster.cta[rank].roles;
          } catch (const Failure& failure) {
            cluster.complain(failure.what());
          }
        });
      }
    }
    for (std::thread& thread : threads) thread.join();
    const std::string complaint = cluster.verdict();
    if (!complaint.empty()) return complaint;
    read_bytes += cluster.weight_bytes;
  }
  if (read_bytes != weight_bytes(p, Config::kBn * p.token_ctas)) return "the tokens need other weights than are read";
  return "";
}

template <class Element>
std::string run_plan(const Case& c, GemmProblem p, const FaultPlan& faults) {
  place_layers(p, c.pairs ? 2 * c.row_ctas : 1);
  p.items.groups = static_cast<int>(ceil_div(c.sizes.tokens, c.bn * c.token_ctas));
  p.items.groups_per_block = c.groups_per_block;
  p.items.workers = c.workers;
  p.token_ctas = c.token_ctas;
  p.row_ctas = c.row_ctas;
  p.splits = c.splits;
  p.cut_by_pair = c.cut_by_pair;
  std::string complaint = "no such configuration";
  sm90::with_config(c.pairs, c.bn, c.splits,
                    [&](auto config) { complaint = run_grid<decltype(config), Element>(p, faults); });
  return complaint;
}

template <class Element>
std::string run_typed(const Case& c, const FaultPlan& faults) {
  IntegerProblem<Element> problem(c.sizes);
  problem.cut(c.layers);
  if (c.own_tokens) problem.send_tokens();
  if (faults.fault == Fault::kCutShort) {
    // The last split ends one tile early. (Moving a cut between splits would be no fault.)
    GemmProblem p = problem.view();
    const Schedule& schedule = p.layers[0].schedule;
    const_cast<int32_t*>(c.pairs ? schedule.pair_cuts : schedule.row_cuts)[kMaxSplits] -= 1;
  }
  GemmProblem p = problem.view();
  // What a card would do that takes a layer's rows of x from elsewhere, or one too many.
  if (faults.fault == Fault::kOtherTokens) p.layers[1].first_token = 0;
  if (faults.fault == Fault::kMoreTokens) ++p.layers[0].tokens;
  const std::string complaint = run_plan<Element>(c, p, faults);
  return complaint.empty() ? problem.complaint() : complaint;
}

std::string run_case(const Case& c, const FaultPlan& faults = {}) {
  return with_packed(c.dtype, [&](auto packed) { return run_typed<Element<decltype(packed)>>(c, faults); });
}

int pick(std::mt19937& random, std::initializer_list<int> values) {
  return values.begin()[between(random, 0, static_cast<int>(values.size()) - 1)];
}

Case random_case(std::mt19937& random) {
  Case c;
  c.pairs = between(random, 0, 1) != 0;
  c.dtype = random_packed(random);
  c.bn = c.pairs ? pick(random, {64, 128, 160, 176, 192}) : pick(random, {8, 16, 32});
  c.sizes = random_sizes(random, 420, 640, 130);
  if (between(random, 0, 7) == 0) c.sizes.rows = between(random, 500, 800);  // several units a worker
  c.token_ctas = c.pairs ? pick(random, {1, 2, 2}) : 1;
  c.splits = c.bn <= 128 ? pick(random, {1, 1, 2, 4, 8}) : 1;
  if (c.token_ctas * c.splits > kMaxSplits) c.splits /= 2;
  c.row_ctas = c.pairs && c.splits == 1 ? pick(random, {1, 2, 4}) : 1;
  c.workers = between(random, 1, 3);
  c.groups_per_block = between(random, 1, 4);
  c.cut_by_pair = between(random, 0, 1) != 0;
  c.layers = between(random, 0, 2) == 0 ? between(random, 2, kMaxLayers) : 1;
  c.own_tokens = between(random, 0, 1) != 0;
  if (c.own_tokens && between(random, 0, 7) == 0) {  // as many layers as a launch takes
    c.layers = kMaxLayers;
    c.sizes.rows = kTile * kMaxLayers - between(random, 0, kTile - 1);
    c.sizes.cols = between(random, 1, 260);
  }
  return c;
}

int run_exact(int cases, uint32_t seed) {
  return run_cases(cases, seed, [](std::mt19937& random) {
    const Case c = random_case(random);
    FaultPlan timing;
    timing.late_arrivals = between(random, 0, 15) == 0;
    return outcome(c, run_case(c, timing));
  });
}

// Real values, whose sums depend on their order: y of all tokens at once against y of the first few, by the kernels of
// other token counts with the same splits.
int run_invariant(int cases, uint32_t seed) {
  return run_cases(cases, seed, [](std::mt19937& random) {
    Case wide = random_case(random);
    wide.layers = 1, wide.own_tokens = false;
    wide.dtype = DType::kBFloat16;
    wide.sizes.tokens = between(random, 33, 130);
    wide.pairs = true, wide.cut_by_pair = true;
    wide.bn = pick(random, {64, 128});
    wide.splits = pick(random, {1, 2, 4});
    if (wide.splits > 1) wide.row_ctas = 1;
    Case narrow = wide;
    narrow.sizes.tokens = between(random, 1, 32);
    narrow.pairs = false, narrow.token_ctas = narrow.row_ctas = 1;
    narrow.bn = narrow.sizes.tokens <= 8 ? 8 : narrow.sizes.tokens <= 16 ? 16 : 32;
    using Brain = Element<PackedBFloat16>;
    IntegerProblem<Brain> problem(wide.sizes);
    for (size_t at = 0; at < problem.x.size; ++at) {
      problem.x.data[at] = Brain::round(0.001f * static_cast<float>(between(random, -4000, 4000)));
    }
    GemmProblem p = problem.view();
    std::string complaint = run_plan<Brain>(wide, p, {});
    const auto* y = static_cast<const uint16_t*>(p.layers[0].y);
    const std::vector<uint16_t> first(y, y + static_cast<size_t>(narrow.sizes.tokens) * p.layers[0].rows);
    p.tokens = narrow.sizes.tokens;
    share_tokens(p);
    if (complaint.empty()) complaint = run_plan<Brain>(narrow, p, {});
    if (complaint.empty() && !std::equal(first.begin(), first.end(), y)) complaint = "rows differ";
    return complaint.empty() ? "" : describe(wide) + " and " + describe(narrow) + ": " + complaint;
  });
}

int run_self_check(int, uint32_t) {
  return run_self_checks(Family::kSm90, [](const SelfCheck& check, const LaunchPlan& plan, DType dtype) {
    Case c;
    c.sizes = check.sizes;
    c.layers = check.layers, c.cut_by_pair = check.cut_by_pair, c.own_tokens = check.own_tokens;
    c.dtype = dtype;
    c.pairs = plan.pairs, c.bn = plan.bn;
    c.token_ctas = plan.token_ctas, c.row_ctas = plan.row_ctas, c.splits = plan.splits;
    c.workers = plan.items.workers, c.groups_per_block = plan.items.groups_per_block;
    return outcome(c, run_case(c));
  });
}

struct Planted {
  Fault fault;
  bool pairs;
  int bn, token_ctas, row_ctas, splits;
  bool delay;
  int layers = 1;  // more: each with rows of x of its own
};

const std::map<std::string, Planted> kFaults = {
    {"wrong_parity", {Fault::kWrongParity, false, 16, 1, 1, 1, false}},
    {"wrong_bytes", {Fault::kWrongBytes, false, 16, 1, 1, 1, false}},
    {"missing_release", {Fault::kMissingRelease, false, 16, 1, 1, 1, false}},
    {"early_release", {Fault::kEarlyRelease, true, 160, 1, 1, 1, true}},
    {"swapped_selector", {Fault::kSwappedSelector, false, 16, 1, 1, 1, false}},
    {"missing_drain", {Fault::kMissingDrain, true, 64, 1, 1, 1, false}},
    {"missing_fence", {Fault::kMissingFence, true, 64, 1, 1, 1, false}},
    {"unicast", {Fault::kUnicast, true, 64, 2, 1, 1, false}},
    {"local_release", {Fault::kLocalRelease, true, 64, 2, 1, 1, false}},
    {"local_count", {Fault::kLocalCount, true, 64, 2, 1, 1, true}},
    {"missing_sums_wait", {Fault::kMissingSumsWait, true, 128, 1, 1, 4, true}},
    {"missing_sums_release", {Fault::kMissingSumsRelease, true, 128, 1, 1, 4, true}},
    {"missing_push_fence", {Fault::kMissingProxyFence, false, 32, 1, 1, 4, false}},
    {"short_push", {Fault::kShortPush, true, 64, 2, 1, 2, false}},
    {"no_zero_fill", {Fault::kNoZeroFill, false, 8, 1, 1, 1, false}},
    {"no_swizzle", {Fault::kNoSwizzle, false, 8, 1, 1, 1, false}},
    {"shifted_metadata", {Fault::kShiftedMetadata, false, 8, 1, 1, 1, false}},
    {"missing_store_wait", {Fault::kMissingStoreWait, true, 64, 1, 1, 1, false}},
    {"missing_proxy_fence", {Fault::kMissingProxyFence, true, 64, 1, 1, 1, false}},
    {"cut_short", {Fault::kCutShort, false, 8, 1, 1, 2, false}},
    {"not_returned", {Fault::kNotReturned, true, 64, 2, 1, 1, false}},
    {"other_tokens", {Fault::kOtherTokens, false, 8, 1, 1, 1, false, 4}},
    {"more_tokens", {Fault::kMoreTokens, true, 64, 1, 1, 1, false, 4}},
    {"not_returned_x", {Fault::kNotReturned, true, 64, 1, 2, 1, false}},
    {"not_returned_sums", {Fault::kNotReturned, false, 8, 1, 1, 4, false}},
    {"unicast_x", {Fault::kUnicast, true, 64, 1, 2, 1, false}},
    {"local_release_x", {Fault::kLocalRelease, true, 64, 1, 2, 1, false}},
    {"local_count_x", {Fault::kLocalCount, true, 64, 1, 2, 1, true}},
};

// The case without the fault must pass, else its detection means nothing.
int run_fault(const char* name, const Planted& planted) {
  Case c;
  c.sizes.rows = 520, c.sizes.cols = 1030, c.sizes.tokens = planted.pairs ? 130 : 7;
  c.sizes.seed = 7;
  c.pairs = planted.pairs, c.bn = planted.bn, c.token_ctas = planted.token_ctas, c.row_ctas = planted.row_ctas,
  c.splits = planted.splits;
  c.layers = planted.layers, c.own_tokens = planted.layers > 1;
  c.dtype = DType::kBFloat16;
  FaultPlan plan;
  plan.late_arrivals = planted.fault == Fault::kNotReturned || planted.fault == Fault::kMissingSumsWait ||
                       planted.fault == Fault::kMissingSumsRelease;
  if (planted.delay) plan.retire_delay = std::chrono::microseconds(500);
  const std::string sound = run_case(c, plan);
  if (!sound.empty()) {
    printf("the sound kernel fails: %s\n", sound.c_str());
    return 2;
  }
  plan.fault = planted.fault;
  plan.patience = std::chrono::seconds(2);
  const std::string complaint = run_case(c, plan);
  printf("%s: %s\n", name, complaint.empty() ? "NOT NOTICED" : complaint.c_str());
  return complaint.empty();
}

}  // namespace
}  // namespace patch_kernels::emulate

int main(int argc, char** argv) {
  using namespace patch_kernels::emulate;
  return run_command(argc, argv, {{"exact", run_exact}, {"invariant", run_invariant}, {"selfcheck", run_self_check}},
                     kFaults, run_fault);
}
