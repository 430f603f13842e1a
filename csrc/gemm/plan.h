// Host decisions of tile_linear: the schedule of a layer (from its tile flags alone, computed once) and the launch
// plan of a call (from sizes alone). No torch, no CUDA; patch_kernels._host shows both to tests and tools.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../format/layout.h"

namespace patch_kernels {

constexpr int kMaxSplits = 8;                   // a portable cluster has at most 8 CTAs
constexpr int kCuts = kMaxSplits + 1;           // cut points of a unit; fewer splits take every 2nd, 4th or 8th
constexpr int kPayloadUnit = 2048;              // every tile's size and offset is a multiple of this
constexpr int32_t kScheduleMagic = 0x504B5331;  // "PKS1"

// Schedule of a layer: one int32 buffer, read by the kernels.
//   header     3 words: magic, tile rows R, tile columns C
//   tiles      R x C: (byte offset of the tile / 2048) << 1 | is_sparse, as uint32 (payloads up to 4 TiB). Tile rows in
//              the order below, so that a kernel finds a unit's tiles without reading the order first.
//   order      R: tile rows by decreasing bytes. Unit u of a kernel that takes single rows is row order[u]; of one that
//              takes pairs it is rows order[2u] and order[2u+1], neighbours in bytes, so its halves balance.
//   row_cuts   R x 9: tile columns at which unit u is cut into 8 shares of about equal bytes
//   pair_cuts  ceil(R/2) x 9: the same for pairs
struct Schedule {
  const uint32_t* tiles;
  const int32_t* order;
  const int32_t* row_cuts;
  const int32_t* pair_cuts;
  int tile_rows;
  int tile_cols;
};

constexpr int kScheduleHeader = 3;

PK_HD constexpr int64_t schedule_words(int64_t tile_rows, int64_t tile_cols) {
  return kScheduleHeader + tile_rows * tile_cols + tile_rows + (tile_rows + (tile_rows + 1) / 2) * kCuts;
}

// The view of a schedule buffer.
PK_HD Schedule schedule_view(const int32_t* words, int tile_rows, int tile_cols) {
  Schedule view{};
  view.tiles = reinterpret_cast<const uint32_t*>(words + kScheduleHeader);
  view.order = words + kScheduleHeader + static_cast<int64_t>(tile_rows) * tile_cols;
  view.row_cuts = view.order + tile_rows;
  view.pair_cuts = view.row_cuts + static_cast<int64_t>(tile_rows) * kCuts;
  view.tile_rows = tile_rows;
  view.tile_cols = tile_cols;
  return view;
}

// Tile entries of row order[position].
PK_HD const uint32_t* row_tiles(const Schedule& schedule, int position) {
  return schedule.tiles + static_cast<int64_t>(position) * schedule.tile_cols;
}

PK_HD constexpr bool entry_is_sparse(uint32_t entry) { return (entry & 1) != 0; }
PK_HD constexpr int64_t entry_offset(uint32_t entry) { return static_cast<int64_t>(entry >> 1) * kPayloadUnit; }

// Tile columns [begin, end) of split z of `splits` (1, 2, 4 or 8), from the unit's nine cuts. May be empty.
struct Range {
  int begin, end;
};
PK_HD Range split_range(const int32_t* cuts, int splits, int z) {
  const int step = kMaxSplits / splits;
  return {cuts[z * step], cuts[(z + 1) * step]};
}

// Fills schedule_words(R, C) words at `words`.
void make_schedule(const uint8_t* tile_is_sparse, int64_t tile_rows, int64_t tile_cols, int32_t* words);

// Work items of a launch: (unit, group of token tiles). The items are dealt to the workers (clusters, or CTAs) in
// snake order: round r gives worker w item r*W + w, or from the other end when r is odd. Units come by decreasing
// bytes, so this is within a few percent of longest-processing-time-first, and needs no table that depends on M.
// Token groups are swept in blocks, so that the x of a block and the weights of a round stay in L2.
struct ItemSpace {
  int units;
  int groups;            // token groups
  int groups_per_block;  // of a raster block
  int workers;
};

struct Item {
  int unit, group;  // unit < 0: this worker has no item in this round
};

PK_HD constexpr int64_t item_count(const ItemSpace& space) { return static_cast<int64_t>(space.units) * space.groups; }
// From here on an item's number fits 31 bits: choose_plan sees to it.
PK_HD int item_rounds(const ItemSpace& space) {
  return static_cast<int>((static_cast<uint32_t>(item_count(space)) + space.workers - 1) / space.workers);
}
PK_HD Item item_of(const ItemSpace& space, int worker, int round) {
  const int place = (round & 1) ? space.workers - 1 - worker : worker;
  const uint32_t index = static_cast<uint32_t>(round) * space.workers + place;
  if (index >= static_cast<uint32_t>(item_count(space))) return {-1, 0};
  const uint32_t block_items = static_cast<uint32_t>(space.units) * space.groups_per_block;
  const uint32_t block = index / block_items, rest = index % block_items;
  const int first = static_cast<int>(block) * space.groups_per_block;
  const int left = space.groups - first;
  const uint32_t width = left < space.groups_per_block ? left : space.groups_per_block;
  return {static_cast<int>(rest / width), first + static_cast<int>(rest % width)};
}

enum class Family { kUnpack, kSm80, kSm90 };

// What a GPU offers to a launch.
struct DeviceLimits {
  Family family;                 // of kernels in use
  int compute_capability;        // 80, 86, 89, 90, 120
  int sm_count;                  // multiprocessors
  int smem_bytes;                // dynamic shared memory one CTA may have
  int clusters[kMaxSplits + 1];  // [size]: clusters of 1, 2, 4, 8 CTAs that run at once, one CTA an SM
  bool clusters_known;           // the card was asked: 0 says that it cannot run this size. Else 0 is unknown
};

// How one call runs. On sm_90 a cluster is token_ctas x row_ctas x splits CTAs; on sm_80 splits are a grid dimension.
struct LaunchPlan {
  Family family;
  bool pairs;      // a unit is a pair of tile rows (one per consumer warpgroup), else one tile row
  int bn;          // tokens of a CTA
  int token_ctas;  // CTAs of a cluster along tokens, which share the weights by multicast
  int row_ctas;    // CTAs of a cluster along weight rows, which share x by multicast; a unit is that many pairs
  int splits;      // CTAs along K, whose sums are added in a fixed order
  int depth;       // sm_80: k64 steps in flight
  ItemSpace items;
  bool overlaps_previous;  // sm_90: copies weights while the kernel before still runs (programmatic dependent launch)
};

// What there is to choose for a call; everything else follows from sizes and device. On sm_90, bn > 32 means pairs.
struct PlanChoice {
  int bn, token_ctas, row_ctas, splits, depth;
};

// Tokens whose sums a split of the Hopper kernels exchanges at once, of a CTA with bn tokens; 0: no kernel splits it.
PK_HD constexpr int exchange_tokens(int bn) { return bn <= 32 ? 8 : bn <= 128 ? 16 : 0; }

// Every choice that has a kernel and clusters that this card runs.
std::vector<PlanChoice> possible_choices(const DeviceLimits& device, int64_t cols, int64_t tokens);
LaunchPlan plan_of(const DeviceLimits& device, const PlanChoice& choice, int64_t rows, int64_t cols, int64_t tokens);

// Every launch shape that possible_choices gives for any sizes, each once: what the self-check has to cover.
std::vector<PlanChoice> launch_shapes(const DeviceLimits& device);

// "", or why the family cannot be used on this card at all.
std::string family_complaint(const DeviceLimits& device);

// The best kernel family for a compute capability (80, 90, ...); kUnpack where there is none.
Family best_family(int compute_capability);

// Units and token groups of a plan, in one raster block and for one worker.
ItemSpace item_space(const LaunchPlan& plan, int64_t rows, int64_t tokens);

// Constants of the model of a call's time. Sources, and the program that measures each on a card:
// docs/inside/gemm.md, "Choosing a plan". Cycles are an SM's.
struct ModelConstants {
  double cycles_per_us = 1700;
  double memory_bytes_per_cycle = 2530;  // device memory of a card with 132 SMs
  double link_bytes_per_cycle = 26;      // from L2 to one SM
  double cluster_bytes_per_cycle = 14;   // from one SM to the others of its cluster
  double shared_bytes_per_cycle = 128;   // shared memory of an SM
  double shared_write_share = 1;         // of the bytes copied in, that wgmma's reads wait for: 0 none, 1 all
  double macs_per_cycle = 2048;          // wgmma: 16-bit products of an SM; a zero of a sparse tile takes no time
  double launch_cycles = 4000;           // a launch, until its first bytes have arrived
  double item_cycles = 1000;             // end of an item and start of the next one, in which no wgmma runs
  double item_token_cycles = 12.5;       // the same, a token: y through shared memory
  double switch_cycles = 50;             // a change between dense and sparse tiles
  double exchange_turn_cycles = 1500;    // latency of exchanging two chunks of partial sums
  double exchange_output_cycles = 30;    // adding and storing one output by a thread of each consumer
  double sm80_macs_per_cycle = 1024;     // mma
  double sm80_sparse_share = 0.6;        // time of a sparse tile over a dense one's
  double sm80_reduce_cycles = 1500;      // the launch that adds the splits
};

// The plan for a (rows x cols) layer with `payload_bytes` of tiles and `tokens` rows of x. batch_invariant: the split
// depends on the layer alone, so row i of y does not depend on the number of rows.
LaunchPlan choose_plan(const DeviceLimits& device, int64_t rows, int64_t cols, int64_t tokens, int64_t payload_bytes,
                       bool batch_invariant, const ModelConstants& constants = {});

// The best plan with that many splits, for layers of one launch: `rows` is the sum of theirs, each rounded up to whole
// tiles. Where every layer's own plan has as many splits, it gives the same bits as a launch for each.
LaunchPlan plan_with_splits(const DeviceLimits& device, int64_t rows, int64_t cols, int64_t tokens,
                            int64_t payload_bytes, int splits, const ModelConstants& constants = {});

// Model time of a plan in microseconds; choose_plan takes the least. Exposed for tests and for tuning on a card.
double model_time_us(const DeviceLimits& device, const LaunchPlan& plan, int64_t rows, int64_t cols, int64_t tokens,
                     int64_t payload_bytes, const ModelConstants& constants = {});

}  // namespace patch_kernels
