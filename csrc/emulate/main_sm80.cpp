// Tests the sm_80 kernel body on the CPU emulator.
//   main_sm80 exact --cases N --seed S   random problems of small integers: y must equal the rounded integer result
//   main_sm80 fault NAME                 0 if the planted error is found
//   main_sm80 faults                     their names
#include <algorithm>
#include <memory>
#include <random>

#include "../ops.h"
#include "machine_sm80.h"

namespace patch_kernels::emulate {
namespace {

constexpr uint16_t kCanary = 0xABCD;  // around y; no result of these tests
constexpr int kCanaries = 512;

enum class Types { kRandom, kDense, kSparse, kAlternating, kOneSparse };

struct Case {
  bool bfloat = false;
  int rows = 0, cols = 0, tokens = 0, x_padding = 0;
  int bn = 0, depth = 0, splits = 1, workers = 1, groups_per_block = 1;
  Types types = Types::kRandom;
  bool bias = false;
  CopyTime copy_time = CopyTime::kAtWait;
  uint32_t seed = 0;
};

std::string describe(const Case& c) {
  char text[256];
  snprintf(text, sizeof(text),
           "%s rows %d cols %d tokens %d x_padding %d bn %d depth %d splits %d workers %d groups_per_block %d types %d "
           "bias %d copies %s seed %u",
           c.bfloat ? "bf16" : "fp16", c.rows, c.cols, c.tokens, c.x_padding, c.bn, c.depth, c.splits, c.workers,
           c.groups_per_block, static_cast<int>(c.types), c.bias, c.copy_time == CopyTime::kAtWait ? "late" : "early",
           c.seed);
  return text;
}

// An integer rounded to a type of `precision` significant bits, to nearest even, by whole-number arithmetic.
int64_t round_integer(int64_t value, int precision) {
  const int64_t magnitude = value < 0 ? -value : value;
  int shift = 0;
  while (magnitude >> shift >> precision) ++shift;
  if (shift == 0) return value;
  const int64_t half = int64_t{1} << (shift - 1), rest = magnitude & ((int64_t{1} << shift) - 1);
  int64_t kept = magnitude >> shift;
  if (rest > half || (rest == half && (kept & 1))) ++kept;
  return value < 0 ? -(kept << shift) : kept << shift;
}

void serial(int64_t n, ParallelBody body, void* context) { body(0, n, context); }

// 16-byte aligned memory with exactly the wanted end, so that the bounds the machine checks are tight.
template <class T>
struct Aligned {
  explicit Aligned(size_t n) : size(n), memory(new uint8_t[n * sizeof(T) + 16]) {
    data = reinterpret_cast<T*>(memory.get() + (16 - reinterpret_cast<uintptr_t>(memory.get()) % 16) % 16);
  }
  Memory range() const {
    return {reinterpret_cast<const uint8_t*>(data), reinterpret_cast<const uint8_t*>(data + size)};
  }
  size_t size;
  std::unique_ptr<uint8_t[]> memory;
  T* data;
};

// Errors planted in what the kernel is told, beside those of the machine.
enum class Told { kNothing, kCut, kOrder, kType, kNibble, kGridTooSmall, kExtraToken };

struct Planted {
  Fault machine = Fault::kNone;
  int index = 0;
  Told told = Told::kNothing;
};

template <class Config, class Element>
std::string run_case(const Case& c, const Planted& planted) {
  std::mt19937 random(c.seed);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); };
  const int tile_rows = static_cast<int>(ceil_div(c.rows, kTile)),
            tile_cols = static_cast<int>(ceil_div(c.cols, kTile));
  const int tiles = tile_rows * tile_cols;

  std::vector<uint8_t> is_sparse(tiles);
  const int one = below(tiles);
  for (int t = 0; t < tiles; ++t) {
    is_sparse[t] = c.types == Types::kRandom        ? below(2)
                   : c.types == Types::kAlternating ? (t / tile_cols + t) % 2
                   : c.types == Types::kOneSparse   ? t == one
                                                    : c.types == Types::kSparse;
  }

  // Weights and the reference: each token's x times the kept weights, in whole numbers.
  std::vector<uint16_t> weight(static_cast<size_t>(c.rows) * c.cols), bias(c.rows);
  std::vector<int> kept_weight(weight.size()), bias_value(c.rows);
  std::unique_ptr<bool[]> keep(new bool[weight.size()]);
  for (int r = 0; r < c.rows; ++r) {
    for (int k0 = 0; k0 < c.cols; k0 += kGroup) {
      const int real = std::min(kGroup, c.cols - k0);
      int bits = 15;
      if (is_sparse[r / kTile * tile_cols + k0 / kTile] && real > 2) {
        do bits = below(1 << real);
        while (__builtin_popcount(static_cast<unsigned>(bits)) != 2);
      }
      for (int j = 0; j < real; ++j) {
        const size_t at = static_cast<size_t>(r) * c.cols + k0 + j;
        const int value = below(15) - 7;
        weight[at] = Element::round(static_cast<float>(value));
        keep[at] = bits >> j & 1;
        kept_weight[at] = keep[at] ? value : 0;
      }
    }
    bias_value[r] = below(15) - 7;
    bias[r] = Element::round(static_cast<float>(bias_value[r]));
  }
  Aligned<uint8_t> payload(cpu::payload_bytes(is_sparse.data(), tiles));
  const PackError error =
      cpu::pack_tiles(weight.data(), keep.get(), is_sparse.data(), c.rows, c.cols, payload.data, serial);
  if (error.count != 0) return "the test's weights do not fit the format";

  const int x_stride = (c.cols + 7) / 8 * 8 + 8 * c.x_padding;
  Aligned<uint16_t> x(static_cast<size_t>(c.tokens) * x_stride);
  std::fill(x.data, x.data + x.size, 0x7FFF);  // NaN in what is not x
  std::vector<int> x_value(static_cast<size_t>(c.tokens) * c.cols);
  for (int t = 0; t < c.tokens; ++t) {
    for (int k = 0; k < c.cols; ++k) {
      const int value = below(9) - 4;
      x_value[static_cast<size_t>(t) * c.cols + k] = value;
      x.data[static_cast<size_t>(t) * x_stride + k] = Element::round(static_cast<float>(value));
    }
  }

  std::vector<int32_t> words(schedule_words(tile_rows, tile_cols));
  make_schedule(is_sparse.data(), tile_rows, tile_cols, words.data());

  const size_t y_size = static_cast<size_t>(c.tokens) * c.rows;
  Aligned<uint16_t> y(y_size + 2 * kCanaries);
  std::fill(y.data, y.data + y.size, kCanary);
  std::fill(y.data + kCanaries, y.data + kCanaries + y_size, 0x7FFF);

  GemmProblem p{};
  p.x = x.data, p.payload = payload.data, p.y = y.data + kCanaries;
  p.bias = c.bias ? bias.data() : nullptr;
  p.tokens = c.tokens, p.rows = c.rows, p.cols = c.cols, p.x_stride = x_stride;
  p.schedule = schedule_view(words.data(), tile_rows, tile_cols);
  p.items = {tile_rows, static_cast<int>(ceil_div(c.tokens, Config::kBn)), c.groups_per_block, c.workers};
  p.token_ctas = 1, p.splits = c.splits;

  int grid_x = c.workers;
  switch (planted.told) {
    case Told::kNothing:
      break;
    case Told::kCut:
      const_cast<int32_t*>(p.schedule.row_cuts)[kMaxSplits] -= 1;
      break;
    case Told::kOrder:
      const_cast<int32_t*>(p.schedule.order)[1] = p.schedule.order[0];
      break;
    case Told::kType:
      const_cast<uint32_t*>(p.schedule.tiles)[tiles - 1] ^= 1;
      break;
    case Told::kNibble: {
      uint8_t* tile = payload.data;
      for (int t = 0; !is_sparse[t]; ++t) tile += kDenseTileBytes;
      tile[kSlotBytes + 5] ^= 0x0F;  // a legal nibble inverted is i1 < i0, or equal
      break;
    }
    case Told::kGridTooSmall:
      --grid_x;
      break;
    case Told::kExtraToken:
      ++p.tokens;
      break;
  }
  Aligned<float> partials(static_cast<size_t>(sm80_partial_index(p, c.splits, 0, 0)));
  memset(partials.data, 0xFF, partials.size * sizeof(float));

  const Options options{c.copy_time, planted.machine, planted.index};
  const std::string complaint =
      run_sm80<Config, Element>(p, grid_x, partials.data, x.range(), payload.range(), options);
  if (!complaint.empty()) return complaint;

  for (int i = 0; i < kCanaries; ++i) {
    if (y.data[i] != kCanary || y.data[kCanaries + y_size + i] != kCanary) return "write outside y";
  }
  std::vector<int> sums(c.rows);
  for (int t = 0; t < c.tokens; ++t) {
    for (int r = 0; r < c.rows; ++r) {
      int sum = c.bias ? bias_value[r] : 0;
      const int *w = kept_weight.data() + static_cast<size_t>(r) * c.cols,
                *xs = x_value.data() + static_cast<size_t>(t) * c.cols;
      for (int k = 0; k < c.cols; ++k) sum += w[k] * xs[k];
      const int64_t rounded = round_integer(sum, Element::kPrecision);
      const uint16_t want = Element::round(static_cast<float>(rounded));
      const uint16_t got = y.data[kCanaries + static_cast<size_t>(t) * c.rows + r];
      if (got != want) {
        char text[128];
        snprintf(text, sizeof(text), "y[token %d][row %d] is %g, not %g", t, r,
                 static_cast<double>(Element::widen(got)), static_cast<double>(Element::widen(want)));
        return text;
      }
    }
  }
  return "";
}

template <class Config>
std::string run_type(const Case& c, const Planted& planted) {
  return c.bfloat ? run_case<Config, Bfloat16>(c, planted) : run_case<Config, Half>(c, planted);
}

std::string run_config(const Case& c, const Planted& planted) {
  switch (1000 * c.depth + c.bn) {
    case 2008:
      return run_type<Sm80Decode<8, 2>>(c, planted);
    case 4008:
      return run_type<Sm80Decode<8, 4>>(c, planted);
    case 2016:
      return run_type<Sm80Decode<16, 2>>(c, planted);
    case 4016:
      return run_type<Sm80Decode<16, 4>>(c, planted);
    case 2032:
      return run_type<Sm80Decode<32, 2>>(c, planted);
    case 4032:
      return run_type<Sm80Decode<32, 4>>(c, planted);
    case 1128:
      return run_type<Sm80Prefill<1>>(c, planted);
    case 3128:
      return run_type<Sm80Prefill<3>>(c, planted);
  }
  return "no such configuration";
}

constexpr int kBns[] = {8, 16, 32, 128};

Case random_case(std::mt19937& random) {
  const auto between = [&](int low, int high) {
    return low + static_cast<int>(random() % static_cast<uint32_t>(high - low + 1));
  };
  Case c;
  c.bfloat = between(0, 1);
  c.bn = kBns[between(0, 3)];
  c.depth = c.bn == 128 ? (between(0, 1) ? 3 : 1) : (between(0, 1) ? 4 : 2);
  // Sizes at and beside the tile edges as often as any others; multiples of 8 rows take the 16-byte stores.
  const auto size = [&](int low, int high, int edge) {
    const int at_edge = between(1, std::max(1, high / edge)) * edge + between(-1, 1);
    const int any = between(low, high), eights = between(1, high / 8) * 8;
    return std::min(high, std::max(low, between(0, 2) == 0 ? at_edge : between(0, 1) ? any : eights));
  };
  c.rows = size(1, 300, kTile);
  c.cols = size(1, 520, kStepCols);
  c.tokens = size(0, 130, c.bn);
  c.x_padding = between(0, 2);
  c.splits = 1 << between(0, 3);
  c.types = static_cast<Types>(between(0, 4));
  c.bias = between(0, 1);
  c.copy_time = between(0, 1) ? CopyTime::kAtWait : CopyTime::kAtIssue;
  c.seed = static_cast<uint32_t>(random());
  const int groups = std::max(1, static_cast<int>(ceil_div(c.tokens, c.bn)));
  c.workers = between(1, groups * static_cast<int>(ceil_div(c.rows, kTile)));
  c.groups_per_block = between(1, groups);
  return c;
}

int exact(int cases, uint32_t seed) {
  std::mt19937 random(seed);
  int failed = 0;
  for (int i = 0; i < cases; ++i) {
    const Case c = random_case(random);
    const std::string complaint = run_config(c, {});
    if (complaint.empty()) continue;
    ++failed;
    printf("FAILED case %d: %s\n  %s\n", i, complaint.c_str(), describe(c).c_str());
  }
  printf("%d passed, %d failed\n", cases - failed, failed);
  return failed != 0;
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

struct NamedFault {
  const char* name;
  Planted planted;
};
const NamedFault kFaults[] = {
    {"lax_wait", {Fault::kLaxWait, 0, Told::kNothing}},
    {"lost_commit", {Fault::kLostCommit, 0, Told::kNothing}},
    {"swapped_selector", {Fault::kSelector, 0, Told::kNothing}},
    {"tail_garbage", {Fault::kTailGarbage, 0, Told::kNothing}},
    {"wrong_swizzle", {Fault::kSwizzle, 0, Told::kNothing}},
    {"stale_metadata", {Fault::kStaleMetadata, 0, Told::kNothing}},
    {"matrix_order", {Fault::kMatrixOrder, 0, Told::kNothing}},
    {"partial_slot", {Fault::kPartialSlot, 0, Told::kNothing}},
    {"cut_off_by_one", {Fault::kNone, 0, Told::kCut}},
    {"row_twice", {Fault::kNone, 0, Told::kOrder}},
    {"wrong_tile_type", {Fault::kNone, 0, Told::kType}},
    {"illegal_metadata", {Fault::kNone, 0, Told::kNibble}},
    {"lost_worker", {Fault::kNone, 0, Told::kGridTooSmall}},
    {"extra_token", {Fault::kNone, 0, Told::kExtraToken}},
};

// Every fault must be found in decode and prefill, and with both copy times unless the name says otherwise.
constexpr int kFaultBns[] = {16, 128};
constexpr CopyTime kCopyTimes[] = {CopyTime::kAtWait, CopyTime::kAtIssue};

Case fault_case(int bn, CopyTime copy_time) {
  Case c;
  c.rows = 300, c.cols = 516, c.tokens = bn + 3, c.x_padding = 1;
  c.bn = bn, c.depth = bn == 128 ? 1 : 2, c.splits = 2;
  c.workers = 4;  // of 6 items: two rounds
  c.bias = true, c.copy_time = copy_time, c.seed = 7;
  return c;
}

bool found(const char* name, const Case& c, const std::string& complaint) {
  printf("%s, bn %d, copies %s: %s\n", name, c.bn, c.copy_time == CopyTime::kAtWait ? "late" : "early",
         complaint.empty() ? "NOT FOUND" : complaint.c_str());
  return !complaint.empty();
}

// Each barrier of the busiest CTA in turn, but for the last one, which only the next item would need.
bool all_barriers_found(Case c) {
  c.splits = 1;
  const int steps = 10, items = 2, staging = c.bn == 128 ? 2 : 0;
  const int barriers = items * (steps + staging + 1) - 1;
  for (int i = 0; i < barriers; ++i) {
    const std::string complaint = run_config(c, {Fault::kLostBarrier, i, Told::kNothing});
    if (complaint.empty()) printf("barrier %d of %d: ", i, barriers);
    if (complaint.empty() || i == barriers - 1) {
      if (!found("lost_barrier", c, complaint)) return false;
    }
  }
  return true;
}

int fault(const std::string& name) {
  bool known = false, all = true;
  for (const int bn : kFaultBns) {
    for (const CopyTime copy_time : kCopyTimes) {
      const Case c = fault_case(bn, copy_time);
      for (const NamedFault& f : kFaults) {
        if (name != f.name) continue;
        known = true;
        all &= found(f.name, c, run_config(c, f.planted));
      }
      if (name == "lost_barrier") known = true, all &= all_barriers_found(c);
      if (name == "short_x_ring") {
        known = true;
        all &= found("short_x_ring", c,
                     bn == 16 ? run_type<ShortX<Sm80Decode<16, 2>>>(c, {}) : run_type<ShortX<Sm80Prefill<1>>>(c, {}));
      }
      if (name == "short_w_ring") {
        known = true;
        all &= found("short_w_ring", c,
                     bn == 16 ? run_type<ShortW<Sm80Decode<16, 2>>>(c, {}) : run_type<ShortW<Sm80Prefill<1>>>(c, {}));
      }
    }
  }
  if (!known) printf("no fault of that name; see `faults`\n");
  return known && all ? 0 : 1;
}

int main_of(const std::vector<std::string>& args) {
  int cases = 200;
  uint32_t seed = 1;
  for (size_t i = 1; i + 1 < args.size(); i += 2) {
    if (args[i] == "--cases") cases = std::stoi(args[i + 1]);
    if (args[i] == "--seed") seed = static_cast<uint32_t>(std::stoul(args[i + 1]));
  }
  if (!args.empty() && args[0] == "exact") return exact(cases, seed);
  if (args.size() == 2 && args[0] == "fault") return fault(args[1]);
  if (!args.empty() && args[0] == "faults") {
    for (const NamedFault& f : kFaults) printf("%s\n", f.name);
    printf("lost_barrier\nshort_x_ring\nshort_w_ring\n");
    return 0;
  }
  printf("usage: main_sm80 exact [--cases N] [--seed S] | fault NAME | faults\n");
  return 2;
}

}  // namespace
}  // namespace patch_kernels::emulate

int main(int argc, char** argv) { return patch_kernels::emulate::main_of({argv + 1, argv + argc}); }
