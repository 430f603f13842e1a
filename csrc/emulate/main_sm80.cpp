// Tests the sm_80 kernel body on the CPU emulator.
//   emulate_sm80 exact --cases N --seed S   random problems of small integers: y must equal the rounded integer result
//   emulate_sm80 selfcheck                  the problems and plans that a GPU is checked with at first use
//   emulate_sm80 fault NAME                 0 if the planted error is noticed
//   emulate_sm80 faults                     their names
#include "../check/self_check.h"
#include "command_line.h"
#include "machine_sm80.h"

namespace patch_kernels::emulate {
namespace {

struct Case {
  Sizes sizes;
  DType dtype = DType::kFloat16;
  int bn = 8, depth = 2, splits = 1, workers = 1, groups_per_block = 1;
  int layers = 1;  // more: each with rows of x of its own and a launch
  CopyTime copy_time = CopyTime::kAtWait;
};

const char* name_of(CopyTime time) { return time == CopyTime::kAtWait ? "late" : "early"; }

std::string describe(const Case& c) {
  char text[192];
  snprintf(text, sizeof(text), " %s bn %d depth %d splits %d workers %d groups_per_block %d layers %d copies %s",
           with_packed(c.dtype, [](auto packed) { return packed.kShortName; }), c.bn, c.depth, c.splits, c.workers,
           c.groups_per_block, c.layers, name_of(c.copy_time));
  return describe(c.sizes) + text;
}

// Errors planted in what the kernel is told, beside those of the machine.
enum class Told { kNothing, kCut, kOrder, kType, kNibble, kGridTooSmall, kExtraToken, kShortXRing, kShortWRing };

struct Planted {
  Fault machine = Fault::kNone;
  Told told = Told::kNothing;
  int index = 0;  // of the barrier that is lost
};

// Changes the problem or the launch by the planted error.
template <class Element>
void mislead(Told told, IntegerProblem<Element>& problem, GemmProblem& p, int& grid_x) {
  switch (told) {
    case Told::kCut:
      const_cast<int32_t*>(p.layers[0].schedule.row_cuts)[kMaxSplits] -= 1;
      break;
    case Told::kOrder:
      const_cast<int32_t*>(p.layers[0].schedule.order)[1] = p.layers[0].schedule.order[0];
      break;
    case Told::kType:
      const_cast<uint32_t*>(p.layers[0].schedule.tiles)[problem.is_sparse.size() - 1] ^= 1;
      break;
    case Told::kNibble: {
      uint8_t* tile = problem.payload->data;
      for (int t = 0; !problem.is_sparse[t]; ++t) tile += kDenseTileBytes;
      tile[kSlotBytes + 5] ^= 0x0F;  // a legal nibble inverted is i1 < i0, or equal
      break;
    }
    case Told::kGridTooSmall:
      --grid_x;
      break;
    case Told::kExtraToken:
      ++p.tokens;
      break;
    case Told::kNothing:
    case Told::kShortXRing:  // another Config: run_case
    case Told::kShortWRing:
      break;
  }
}

template <class T>
Memory range(const Aligned<T>& memory) {
  return {reinterpret_cast<const uint8_t*>(memory.data), reinterpret_cast<const uint8_t*>(memory.data + memory.size)};
}

template <class Config, class Element>
std::string run_typed(const Case& c, const Planted& planted) {
  IntegerProblem<Element> problem(c.sizes);
  problem.cut(c.layers);
  if (c.layers > 1) problem.send_tokens();
  const GemmProblem all = problem.view();
  for (int i = 0; i < all.layer_count; ++i) {
    GemmProblem p = alone(all, i);
    p.items = {p.layers[0].schedule.tile_rows, static_cast<int>(ceil_div(p.tokens, c.bn)), c.groups_per_block,
               c.workers};
    p.splits = c.splits;
    int grid_x = c.workers;
    mislead(planted.told, problem, p, grid_x);
    Aligned<float> partials(static_cast<size_t>(sm80_partial_index(p, c.splits, 0, 0)));
    memset(partials.data, 0xFF, partials.size * sizeof(float));
    const Options options{c.copy_time, planted.machine, planted.index};
    const std::string complaint =
        run_sm80<Config, Element>(p, grid_x, partials.data, range(problem.x), range(*problem.payload), options);
    if (!complaint.empty()) return complaint;
  }
  return problem.complaint();
}

template <class Config>
std::string run_config(const Case& c, const Planted& planted) {
  return with_packed(c.dtype, [&](auto packed) { return run_typed<Config, Element<decltype(packed)>>(c, planted); });
}

// Rings one slot short: what the kernel would be if the slot rule in gemm/sm80.h were wrong.
template <class Config>
struct ShortX : Config {
  static constexpr int kXSlots = Config::kXSlots - 1;
};
template <class Config>
struct ShortW : Config {
  static constexpr int kWSlots = Config::kWSlots - 1;
};
template <template <class> class Short>
std::string run_short(const Case& c) {
  return c.bn == 16 ? run_config<Short<Sm80Decode<16, 2>>>(c, {}) : run_config<Short<Sm80Prefill<1>>>(c, {});
}

std::string run_case(const Case& c, const Planted& planted = {}) {
  if (planted.told == Told::kShortXRing) return run_short<ShortX>(c);
  if (planted.told == Told::kShortWRing) return run_short<ShortW>(c);
  switch (1000 * c.depth + c.bn) {
    case 2016:
      return run_config<Sm80Decode<16, 2>>(c, planted);
    case 4016:
      return run_config<Sm80Decode<16, 4>>(c, planted);
    case 2032:
      return run_config<Sm80Decode<32, 2>>(c, planted);
    case 4032:
      return run_config<Sm80Decode<32, 4>>(c, planted);
    case 1128:
      return run_config<Sm80Prefill<1>>(c, planted);
    case 3128:
      return run_config<Sm80Prefill<3>>(c, planted);
  }
  return "no such configuration";
}

Case random_case(std::mt19937& random) {
  constexpr int kBns[] = {16, 32, 128};
  Case c;
  c.dtype = random_packed(random);
  c.bn = kBns[between(random, 0, 2)];
  const bool deep = between(random, 0, 1) != 0;
  c.depth = c.bn == 128 ? (deep ? 3 : 1) : (deep ? 4 : 2);
  c.sizes = random_sizes(random, 300, 520, 130);
  c.sizes.cols = random_size(random, 520, kStepCols);
  if (c.sizes.tokens > 0) c.sizes.tokens = random_size(random, 130, c.bn);
  c.splits = 1 << between(random, 0, 3);
  c.copy_time = between(random, 0, 1) ? CopyTime::kAtWait : CopyTime::kAtIssue;
  const int groups = std::max(1, static_cast<int>(ceil_div(c.sizes.tokens, c.bn)));
  c.workers = between(random, 1, groups * static_cast<int>(ceil_div(c.sizes.rows, kTile)));
  c.groups_per_block = between(random, 1, groups);
  if (between(random, 0, 3) == 0) c.layers = 3;
  return c;
}

int run_exact(int cases, uint32_t seed) {
  return run_cases(cases, seed, [](std::mt19937& random) {
    const Case c = random_case(random);
    return outcome(c, run_case(c));
  });
}

int run_self_check(int, uint32_t) {
  return run_self_checks(Family::kSm80, [](const SelfCheck& check, const LaunchPlan& plan, DType dtype) {
    Case c;
    c.sizes = check.sizes;
    c.dtype = dtype;
    c.bn = plan.bn, c.depth = plan.depth, c.splits = plan.splits;
    c.workers = plan.items.workers, c.groups_per_block = plan.items.groups_per_block;
    return outcome(c, run_case(c));
  });
}

const std::map<std::string, Planted> kFaults = {
    {"lax_wait", {Fault::kLaxWait}},
    {"lost_commit", {Fault::kLostCommit}},
    {"lost_barrier", {Fault::kLostBarrier}},
    {"swapped_selector", {Fault::kSelector}},
    {"tail_garbage", {Fault::kTailGarbage}},
    {"wrong_swizzle", {Fault::kSwizzle}},
    {"stale_metadata", {Fault::kStaleMetadata}},
    {"matrix_order", {Fault::kMatrixOrder}},
    {"partial_slot", {Fault::kPartialSlot}},
    {"cut_off_by_one", {Fault::kNone, Told::kCut}},
    {"row_twice", {Fault::kNone, Told::kOrder}},
    {"wrong_tile_type", {Fault::kNone, Told::kType}},
    {"illegal_metadata", {Fault::kNone, Told::kNibble}},
    {"lost_worker", {Fault::kNone, Told::kGridTooSmall}},
    {"extra_token", {Fault::kNone, Told::kExtraToken}},
    {"short_x_ring", {Fault::kNone, Told::kShortXRing}},
    {"short_w_ring", {Fault::kNone, Told::kShortWRing}},
};

Case fault_case(int bn, CopyTime copy_time, Fault fault) {
  Case c;
  c.sizes.rows = 300, c.sizes.cols = 516, c.sizes.tokens = bn + 3, c.sizes.x_padding = 1;
  c.sizes.bias = true, c.sizes.seed = 7;
  c.bn = bn, c.depth = bn == 128 ? 1 : 2;
  c.splits = fault == Fault::kLostBarrier ? 1 : 2;
  c.workers = 4;  // of 6 items: two rounds
  c.copy_time = copy_time;
  return c;
}

// Loses each barrier of the busiest CTA in turn, but for the last one, which only the next item would need. "" if the
// loss of one is not noticed.
std::string run_lost_barriers(const Case& c) {
  const int steps = 2 * static_cast<int>(ceil_div(c.sizes.cols, kTile)), items = 2, staging = c.bn == 128 ? 2 : 0;
  const int barriers = items * (steps + staging + 1) - 1;
  std::string complaint;
  for (int i = 0; i < barriers; ++i) {
    complaint = run_case(c, {Fault::kLostBarrier, Told::kNothing, i});
    if (complaint.empty()) {
      printf("barrier %d of %d: ", i, barriers);
      break;
    }
  }
  return complaint;
}

// An error must be noticed in decode and in prefill, and with both copy times. The case without it must pass, else its
// detection means nothing.
int run_fault(const char* name, const Planted& planted) {
  bool is_noticed = true;
  for (const int bn : {16, 128}) {
    for (const CopyTime copy_time : {CopyTime::kAtWait, CopyTime::kAtIssue}) {
      const Case c = fault_case(bn, copy_time, planted.machine);
      const std::string sound = run_case(c);
      if (!sound.empty()) {
        printf("the sound kernel fails: %s\n", sound.c_str());
        return 2;
      }
      const std::string complaint =
          planted.machine == Fault::kLostBarrier ? run_lost_barriers(c) : run_case(c, planted);
      printf("%s, bn %d, copies %s: %s\n", name, bn, name_of(copy_time),
             complaint.empty() ? "NOT NOTICED" : complaint.c_str());
      is_noticed &= !complaint.empty();
    }
  }
  return !is_noticed;
}

}  // namespace
}  // namespace patch_kernels::emulate

int main(int argc, char** argv) {
  using namespace patch_kernels::emulate;
  return run_command(argc, argv, {{"exact", run_exact}, {"selfcheck", run_self_check}}, kFaults, run_fault);
}
