// Schedules and launch plans (plan.h). The times here are a model, not measurements: they only rank plans.
#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <string>
#include <tuple>
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

constexpr int kDecodeTokens = 32;  // up to here a CTA holds all tokens of a single tile row
constexpr int kSm80PrefillTokens = 128;
constexpr int kConsumerThreads = 256;  // of a CTA on sm_90

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

// Cycles of a CTA for a step of 64 columns on Hopper. wgmma.sp takes k32 where wgmma takes k16, in the same time, and
// reads twice the B. Shared memory serves what wgmma reads and what the copies write: a multicast lands whole in every
// SM. Metadata (1 % of a sparse tile's reads) are left out. A CTA without tokens is free, and an item takes the time of
// its cluster's first CTA, which has some.
double sm90_step_cycles(const ModelConstants& c, double sparse_share, bool pairs, int bn) {
  const int rows = pairs ? 2 : 1, blocks = 2 * rows;  // tile rows of the CTA, and their m64 blocks
  const auto cycles = [&](bool is_sparse) {
    const int instructions = blocks * (is_sparse ? 2 : 4), logical_k = is_sparse ? 32 : 16;
    const double products = 64.0 * bn * 16 * instructions;
    const double reads = instructions * (64.0 * 16 + static_cast<double>(bn) * logical_k) * kValueBytes;
    const double writes = rows * tile_bytes(is_sparse) / 2.0 + bn * 64.0 * kValueBytes;
    return std::max(products / c.macs_per_cycle, (reads + c.shared_write_share * writes) / c.shared_bytes_per_cycle);
  };
  // A change of type drains the pipeline; types are taken as independent from tile to tile, of which a step is half.
  const double switches = rows * sparse_share * (1 - sparse_share);
  return cycles(false) + sparse_share * (cycles(true) - cycles(false)) + switches * c.switch_cycles;
}

// Cycles after an item's last product until y has been stored and the next item begins.
double item_end_cycles(const ModelConstants& c, const LaunchPlan& plan) {
  if (plan.family != Family::kSm90 || plan.splits == 1) return c.item_cycles + c.item_token_cycles * plan.bn;
  // Each CTA writes its sums to its shared memory, sends the other CTAs their shares, and adds the parts of its own
  // outputs. Two chunks of tokens are under way at a time.
  const double sums = (plan.pairs ? 2.0 : 1.0) * kTile * plan.bn, outputs = sums / plan.splits;
  const int64_t turns = ceil_div(plan.bn, 2 * exchange_tokens(plan.bn));
  return c.item_cycles + turns * c.exchange_turn_cycles + 2 * 4 * sums / c.shared_bytes_per_cycle +
         4 * (sums - outputs) / c.cluster_bytes_per_cycle + outputs / kConsumerThreads * c.exchange_output_cycles;
}

int multiprocessors(const DeviceLimits& device) { return std::max(device.sm_count, 1); }

// Clusters of a size that run at once; 0: the card cannot run one. A GPU is asked (some SMs of a GPC may be left over);
// without one, assume all fit.
int resident_clusters(const DeviceLimits& device, int size) {
  if (device.clusters_known || device.clusters[size] > 0) return device.clusters[size];
  return std::max(1, multiprocessors(device) / size);
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
                     int fixed_splits, const ModelConstants& constants) {
  LaunchPlan best{};
  double best_time = -1;
  for (const PlanChoice& choice : possible_choices(device, cols, tokens)) {
    if (fixed_splits && choice.splits != fixed_splits) continue;
    const LaunchPlan plan = plan_of(device, choice, rows, cols, tokens);
    const double time = model_time_us(device, plan, rows, cols, tokens, payload_bytes, constants);
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
  const auto add_sm90 = [&](const PlanChoice& choice) {
    const int ctas = choice.token_ctas * choice.row_ctas * choice.splits;
    if (ctas <= kMaxSplits && resident_clusters(device, ctas) > 0) choices.push_back(choice);
  };
  const bool large = device.smem_bytes >= 160 * 1024;
  for (const int splits : {1, 2, 4, 8}) {
    if (splits > 1 && splits > ceil_div(cols, kTile)) break;
    if (device.family == Family::kSm80) {
      const bool decode = tokens <= kDecodeTokens;
      const int bn = decode ? smallest_bn(tokens, 16) : kSm80PrefillTokens;
      if (large) choices.push_back({bn, 1, 1, splits, decode ? 4 : 3});
      choices.push_back({bn, 1, 1, splits, decode ? 2 : 1});
    } else if (device.family == Family::kSm90 && tokens <= kDecodeTokens) {
      add_sm90({smallest_bn(tokens, 8), 1, 1, splits, 0});
    } else if (device.family == Family::kSm90) {
      for (const int bn : {64, 128, 160, 176, 192}) {
        if (bn > 128 && splits > 1) continue;  // no shared memory left for the exchange
        for (const int token_ctas : {2, 1}) {  // of equal times choose_plan takes the one that copies least
          for (const int row_ctas : {2, 1}) {
            if (row_ctas > 1 && splits > 1) continue;  // pairs are cut at different columns
            add_sm90({bn, token_ctas, row_ctas, splits, 0});
          }
        }
      }
    }
  }
  return choices;
}

std::vector<PlanChoice> launch_shapes(const DeviceLimits& device) {
  std::vector<PlanChoice> shapes;
  const auto fields = [](const PlanChoice& c) {
    return std::make_tuple(c.bn, c.token_ctas, c.row_ctas, c.splits, c.depth);
  };
  for (const int tokens : {8, 16, kDecodeTokens, kDecodeTokens + 1}) {  // one of each bn of decode, and prefill
    for (const PlanChoice& choice : possible_choices(device, int64_t{kMaxSplits} * kTile, tokens)) {
      const bool is_there = std::any_of(shapes.begin(), shapes.end(),
                                        [&](const PlanChoice& shape) { return fields(shape) == fields(choice); });
      if (!is_there) shapes.push_back(choice);
    }
  }
  return shapes;
}

std::string family_complaint(const DeviceLimits& device) {
  if (device.family != Family::kSm90 || resident_clusters(device, 1) > 0) return "";
  return "the card, or this slice of it, has no multiprocessor that runs a CTA with the " +
         std::to_string(device.smem_bytes) + " bytes of shared memory that the wgmma kernels take";
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
                     int64_t payload_bytes, const ModelConstants& c) {
  const Layer layer = layer_of(rows, cols, payload_bytes);
  const double steps = 2.0 * layer.tile_cols / plan.splits;
  double moved = payload_bytes + static_cast<double>(kValueBytes) * tokens * (cols + rows), launches = c.launch_cycles;
  double math;
  if (plan.family == Family::kSm90) {
    math = sm90_step_cycles(c, layer.sparse_share, plan.pairs, plan.bn);
  } else {
    math = kTile * 64.0 * plan.bn / c.sm80_macs_per_cycle * (1 - (1 - c.sm80_sparse_share) * layer.sparse_share);
    if (plan.splits > 1) {  // partial sums are written and read
      launches += c.sm80_reduce_cycles;
      moved += 2 * 4.0 * plan.splits * tokens * rows;
    }
  }
  const double row_bytes = kSlotBytes - layer.sparse_share * (kDenseTileBytes - kSparseTileBytes) / 2;
  const double w_bytes = (plan.pairs ? 2 : 1) * row_bytes / plan.token_ctas;
  const double link = (w_bytes + plan.bn * 64.0 * kValueBytes / plan.row_ctas) / c.link_bytes_per_cycle;
  const double memory = moved / (c.memory_bytes_per_cycle * multiprocessors(device) / 132);
  // Producers run ahead of an item's end, which hides behind copies, but for the last one's.
  const int rounds = item_rounds(plan.items);
  const double end = item_end_cycles(c, plan);
  const double copies = std::max(rounds * steps * link, memory) + end;
  const double busy = std::max(copies, rounds * (steps * math + end));
  return (launches + busy) / c.cycles_per_us;
}

LaunchPlan choose_plan(const DeviceLimits& device, int64_t rows, int64_t cols, int64_t tokens, int64_t payload_bytes,
                       bool batch_invariant, const ModelConstants& constants) {
  if (device.family == Family::kUnpack) return {};
  const int splits = batch_invariant ? best_plan(device, rows, cols, 1, payload_bytes, 0, constants).splits : 0;
  return plan_with_splits(device, rows, cols, tokens, payload_bytes, splits, constants);
}

LaunchPlan plan_with_splits(const DeviceLimits& device, int64_t rows, int64_t cols, int64_t tokens,
                            int64_t payload_bytes, int splits, const ModelConstants& constants) {
  const LaunchPlan plan = best_plan(device, rows, cols, tokens, payload_bytes, splits, constants);
  // Two rounds beyond the last item must still fit 32 bits; so must the numbers of rows and tokens.
  const bool fits = item_count(plan.items) < (int64_t{1} << 30) && std::max({rows, cols, tokens}) < (int64_t{1} << 30);
  return fits ? plan : LaunchPlan{};
}

}  // namespace patch_kernels
