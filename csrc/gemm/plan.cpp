// Schedules and launch plans (plan.h). The times here are a model, not measurements: they only rank plans.
#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <vector>

namespace patch_kernels {
namespace {

// Cut points of a unit: cuts[c] is the column whose prefix of bytes is nearest to c/8 of all (ties to the smaller).
void cut_by_bytes(const std::vector<int64_t>& column_bytes, int32_t* cuts) {
  const int columns = static_cast<int>(column_bytes.size());
  const int64_t total = std::accumulate(column_bytes.begin(), column_bytes.end(), int64_t{0});
  int column = 0;
  int64_t prefix = 0;
  for (int c = 0; c <= kMaxSplits; ++c) {
    // Compared as 8*prefix against c*total, to stay in whole numbers.
    while (column < columns) {
      const int64_t here = std::llabs(kMaxSplits * prefix - c * total);
      const int64_t next = std::llabs(kMaxSplits * (prefix + column_bytes[column]) - c * total);
      if (next >= here) break;
      prefix += column_bytes[column++];
    }
    cuts[c] = column;
  }
}

}  // namespace

void make_schedule(const uint8_t* tile_is_sparse, int64_t tile_rows, int64_t tile_cols, int32_t* words) {
  std::vector<int64_t> row_offset(tile_rows), row_bytes(tile_rows, 0);
  int64_t end = 0;
  for (int64_t r = 0; r < tile_rows; ++r) {
    row_offset[r] = end;
    for (int64_t k = 0; k < tile_cols; ++k) row_bytes[r] += tile_bytes(tile_is_sparse[r * tile_cols + k]);
    end += row_bytes[r];
  }
  words[0] = kScheduleMagic;
  words[1] = static_cast<int32_t>(tile_rows);
  words[2] = static_cast<int32_t>(tile_cols);

  int32_t* order = words + kScheduleHeader + tile_rows * tile_cols;
  std::iota(order, order + tile_rows, 0);
  std::stable_sort(order, order + tile_rows, [&](int32_t a, int32_t b) { return row_bytes[a] > row_bytes[b]; });

  auto* entry = reinterpret_cast<uint32_t*>(words + kScheduleHeader);
  for (int64_t position = 0; position < tile_rows; ++position) {
    const uint8_t* flags = tile_is_sparse + order[position] * tile_cols;
    int64_t offset = row_offset[order[position]];
    for (int64_t k = 0; k < tile_cols; ++k) {
      *entry++ = static_cast<uint32_t>(offset / kPayloadUnit) << 1 | static_cast<uint32_t>(flags[k] != 0);
      offset += tile_bytes(flags[k]);
    }
  }

  int32_t* cuts = order + tile_rows;
  std::vector<int64_t> column_bytes(tile_cols);
  for (const int rows_per_unit : {1, 2}) {
    for (int64_t first = 0; first < tile_rows; first += rows_per_unit) {
      const int64_t last = std::min(first + rows_per_unit, tile_rows);
      for (int64_t k = 0; k < tile_cols; ++k) {
        column_bytes[k] = 0;
        for (int64_t u = first; u < last; ++u) column_bytes[k] += tile_bytes(tile_is_sparse[order[u] * tile_cols + k]);
      }
      cut_by_bytes(column_bytes, cuts);
      cuts += kCuts;
    }
  }
}

namespace {

constexpr double kCyclesPerMicrosecond = 1700;
constexpr double kMemoryBytesPerCycle = 2530;  // whole card: 4.3 TB/s, the copy rate seen on an H200
constexpr double kLinkBytesPerCycle = 26;      // L2 to one SM
constexpr double kLaunchCycles = 3000;
constexpr double kFillCycles = 1000;  // first bytes of a launch
constexpr double kStoreCycles = 300;
constexpr double kSplitCycles = 1500;  // exchange of partial sums
constexpr int kDecodeTokens = 32;      // up to here a CTA holds all tokens of a single tile row
constexpr int kSm80PrefillTokens = 128;

struct Layer {
  int64_t tile_rows, tile_cols;
  double sparse_share;
};

Layer layer_of(int64_t rows, int64_t cols, int64_t payload_bytes) {
  const int64_t tile_rows = ceil_div(rows, kTile), tile_cols = ceil_div(cols, kTile);
  const double tiles = static_cast<double>(std::max<int64_t>(tile_rows * tile_cols, 1));
  return {tile_rows, tile_cols,
          (tiles * kDenseTileBytes - payload_bytes) / (kDenseTileBytes - kSparseTileBytes) / tiles};
}

// Cycles of a 64-column step of one tile row on Hopper: an m64nNk16 takes N/2 cycles, but not less than shared memory
// takes to deliver its operands at 128 bytes a cycle; a sparse m64nNk32 reads twice the B bytes.
double sm90_row_step_cycles(const Layer& layer, int bn) {
  const double dense = 2 * 4 * std::max(bn / 2.0, 16 + bn / 4.0);
  const double sparse = 2 * 2 * (16 + bn / 2.0);
  return dense + layer.sparse_share * (sparse - dense);
}

int multiprocessors(const DeviceLimits& device) { return std::max(device.sm_count, 1); }

// Clusters of a size that run at once. A GPU is asked (some SMs of a GPC may be left over); without one, assume all
// fit.
int resident_clusters(const DeviceLimits& device, int size) {
  return device.clusters[size] > 0 ? device.clusters[size] : std::max(1, multiprocessors(device) / size);
}

int raster_groups(int64_t cols, int tokens_per_group) {
  // The x of a block should take at most half of a 50 MB L2.
  const int64_t bytes = cols * kValueBytes * tokens_per_group;
  return static_cast<int>(std::max<int64_t>(1, (int64_t{24} << 20) / std::max<int64_t>(bytes, 1)));
}

int smallest_bn(int64_t tokens, int bn) {
  while (bn < tokens) bn *= 2;
  return bn;
}

// The choice with the least model time over all splits (fixed_splits = 0), or with a given number of them.
LaunchPlan best_plan(const DeviceLimits& device, int64_t rows, int64_t cols, int64_t tokens, int64_t payload_bytes,
                     int fixed_splits) {
  LaunchPlan best{};
  double best_time = -1;
  for (const PlanChoice& choice : possible_choices(device, cols, tokens)) {
    if (fixed_splits && choice.splits != fixed_splits) continue;
    const LaunchPlan plan = plan_of(device, choice, rows, cols, tokens);
    const double time = model_time_us(device, plan, rows, cols, tokens, payload_bytes);
    if (best_time < 0 || time < best_time) best = plan, best_time = time;
  }
  return best;
}

}  // namespace

Family best_family(int compute_capability) {
  switch (compute_capability) {
    case 80:
    case 86:
    case 87:
    case 89:
    case 120:
    case 121:
      return Family::kSm80;
    case 90:
      return Family::kSm90;
    default:
      return Family::kUnpack;
  }
}

std::vector<PlanChoice> possible_choices(const DeviceLimits& device, int64_t cols, int64_t tokens) {
  std::vector<PlanChoice> choices;
  const bool large = device.smem_bytes >= 160 * 1024;
  for (const int splits : {1, 2, 4, 8}) {
    if (splits > 1 && splits > ceil_div(cols, kTile)) break;
    if (device.family == Family::kSm80) {
      const bool decode = tokens <= kDecodeTokens;
      const int bn = decode ? smallest_bn(tokens, 16) : kSm80PrefillTokens;
      if (large) choices.push_back({bn, 1, 1, splits, decode ? 4 : 3});
      choices.push_back({bn, 1, 1, splits, decode ? 2 : 1});
    } else if (device.family == Family::kSm90 && tokens <= kDecodeTokens) {
      choices.push_back({smallest_bn(tokens, 8), 1, 1, splits, 0});
    } else if (device.family == Family::kSm90) {
      for (const int bn : {64, 128, 160, 176, 192}) {
        if (bn > 128 && splits > 1) continue;  // no shared memory left for the exchange
        for (const int token_ctas : {1, 2}) {
          for (const int row_ctas : {1, 2}) {
            if (row_ctas > 1 && splits > 1) continue;  // pairs are cut at different columns
            if (token_ctas * splits <= kMaxSplits) choices.push_back({bn, token_ctas, row_ctas, splits, 0});
          }
        }
      }
    }
  }
  return choices;
}

LaunchPlan plan_of(const DeviceLimits& device, const PlanChoice& choice, int64_t rows, int64_t cols, int64_t tokens) {
  LaunchPlan plan{};
  plan.family = device.family;
  plan.pairs = device.family == Family::kSm90 && choice.bn > kDecodeTokens;
  plan.bn = choice.bn;
  plan.token_ctas = choice.token_ctas;
  plan.row_ctas = choice.row_ctas;
  plan.splits = choice.splits;
  plan.depth = choice.depth;
  plan.items = item_space(plan, rows, tokens);
  const int raster = raster_groups(cols, choice.bn * choice.token_ctas);
  plan.items.groups_per_block = std::min(std::max(plan.items.groups, 1), raster);
  const int ctas = choice.token_ctas * choice.row_ctas * choice.splits;
  const int workers = device.family == Family::kSm90 ? resident_clusters(device, ctas)
                                                     : std::max(1, multiprocessors(device) / choice.splits);
  plan.items.workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(workers, item_count(plan.items))));
  return plan;
}

ItemSpace item_space(const LaunchPlan& plan, int64_t rows, int64_t tokens) {
  const int64_t units = ceil_div(ceil_div(rows, kTile), plan.pairs ? 2 * plan.row_ctas : 1);
  const int64_t groups = ceil_div(tokens, int64_t{plan.bn} * plan.token_ctas);
  const int width = static_cast<int>(std::min<int64_t>(groups, INT32_MAX));
  return {static_cast<int>(units), width, std::max(width, 1), 1};
}

double model_time_us(const DeviceLimits& device, const LaunchPlan& plan, int64_t rows, int64_t cols, int64_t tokens,
                     int64_t payload_bytes) {
  const Layer layer = layer_of(rows, cols, payload_bytes);
  const int rows_per_unit = plan.pairs ? 2 : 1;
  const double steps = 2.0 * layer.tile_cols / plan.splits;
  const double row_bytes = kSlotBytes * (1 - (1 - double{kSparseTileBytes} / kDenseTileBytes) * layer.sparse_share);
  const double x_bytes = plan.bn * 128.0;
  double math;
  if (plan.family == Family::kSm90) {
    math = rows_per_unit * sm90_row_step_cycles(layer, plan.bn);
  } else {
    // Ampere: half of Hopper's rate, and a sparse step takes about 0.6 of a dense one.
    math = kTile * 64.0 * plan.bn / 1024 * (1 - 0.4 * layer.sparse_share);
  }
  const double link = (rows_per_unit * row_bytes / plan.token_ctas + x_bytes / plan.row_ctas) / kLinkBytesPerCycle;
  // Producers run ahead of an item's end, so its stores and exchange hide behind copies, but for the last one's.
  const int rounds = item_rounds(plan.items);
  const double end = kStoreCycles + 8 * plan.bn + (plan.splits > 1 ? kSplitCycles : 0);
  const double busy = std::max(rounds * steps * link, rounds * (steps * math + end)) + kFillCycles + end;
  const double moved = payload_bytes + 2.0 * tokens * (cols + rows);
  const double memory = moved / (kMemoryBytesPerCycle * multiprocessors(device) / 132);
  return (kLaunchCycles + std::max(busy, memory)) / kCyclesPerMicrosecond;
}

LaunchPlan choose_plan(const DeviceLimits& device, int64_t rows, int64_t cols, int64_t tokens, int64_t payload_bytes,
                       bool batch_invariant) {
  if (device.family == Family::kUnpack) return {};
  const int splits = batch_invariant ? best_plan(device, rows, cols, 1, payload_bytes, 0).splits : 0;
  const LaunchPlan plan = best_plan(device, rows, cols, tokens, payload_bytes, splits);
  // Two rounds beyond the last item must still fit 32 bits; so must the numbers of rows and tokens.
  const bool fits = item_count(plan.items) < (int64_t{1} << 30) && std::max({rows, cols, tokens}) < (int64_t{1} << 30);
  return fits ? plan : LaunchPlan{};
}

}  // namespace patch_kernels
