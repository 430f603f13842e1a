// Mixed dense / 2:4 tile GEMM with mma.sync: sm_80, 86, 89, 120, and sm_90 as a fallback. This is the whole kernel, for
// a machine M that is either the GPU (cuda/machine_sm80.cuh) or a CPU emulator (emulate/machine_sm80.h).
//
// The sparse operand of mma.sp is its left one, so y^T = W x^T: instruction rows are weight rows, columns are tokens.
// A CTA takes one tile row (a unit), kBn tokens and the tile columns of its split, and walks them in steps of 64
// columns.
//
// Control flow is the same for all lanes of a warp. What differs per lane goes through m.each_lane, and registers of a
// warp are M::Regs: on the GPU one thread's share, on the CPU the shares of all 32 lanes.
#pragma once

#include "fragments.h"
#include "problem.h"

#if defined(__CUDACC__)
#define PK_DEVICE __device__ __forceinline__
#define PK_UNROLL _Pragma("unroll")
#else
#define PK_DEVICE inline
#define PK_UNROLL
#endif

namespace patch_kernels {

constexpr int kStepCols = 64;

// BN tokens a CTA, as RowWarps x TokenWarps warps, with the loads of Depth steps in flight.
template <int Bn, int RowWarps, int TokenWarps, int Depth>
struct Sm80Config {
  static constexpr int kBn = Bn, kDepth = Depth;
  static constexpr int kRowWarps = RowWarps, kTokenWarps = TokenWarps;
  static constexpr int kThreads = 32 * RowWarps * TokenWarps;
  static constexpr int kRowBlocks = kTile / 16 / RowWarps;  // 16-row blocks of a warp
  static constexpr int kTokenBlocks = Bn / 8 / TokenWarps;  // 8-token blocks of a warp
  static constexpr int kXBytes = Bn * 2 * kStepCols;
  static constexpr int kWBytes = kSparseTileBytes;  // the larger of a dense half tile and a whole sparse tile
  // While step s computes, the loads of steps s+1 .. s+Depth may be under way. A step opens one x slot and at most one
  // w slot (the second half of a sparse tile opens none), so both rings need Depth+1 slots, and no fewer.
  static constexpr int kXSlots = Depth + 1, kWSlots = Depth + 1;
  // Large tiles of y go through shared memory to be stored in whole lines. The padding spreads the banks.
  static constexpr bool kStaged = Bn >= 64;
  static constexpr int kStagedRowBytes = 2 * kTile + 16;
  static constexpr int kSmemBytes = kXSlots * kXBytes + kWSlots * kWBytes;
  static constexpr int kMinCtas = kStaged ? 1 : 2;  // of an SM: bounds the registers
  static_assert(!kStaged || Bn * kStagedRowBytes <= kSmemBytes, "y is staged in the rings");
};

template <int Bn, int Depth>
using Sm80Decode = Sm80Config<Bn, 8, 1, Depth>;
// Depth 1 is for GPUs with 99 KB. One CTA fits an SM there, so it brings two warps a scheduler; they read the weights
// twice as often, which shared memory can bear as those tensor cores have half the A100's rate.
template <int Depth>
using Sm80Prefill = Sm80Config<128, 2, Depth == 1 ? 4 : 2, Depth>;

namespace sm80 {

// A walk over the steps of one row of tiles: which columns come next, and in which ring slots they lie. The loads and
// the arithmetic each follow their own.
template <class Config>
struct Walk {
  const uint32_t* tiles;  // of the tile row
  int column, end;        // in tiles
  int half;               // of the tile
  int x_slot, w_slot;
  uint32_t entry;  // of the current tile, read a step ahead of its use

  PK_DEVICE Walk(const uint32_t* row_tiles, Range range)
      : tiles(row_tiles), column(range.begin), end(range.end), half(0), x_slot(0), w_slot(0) {
    read_entry();
  }
  PK_DEVICE bool done() const { return column >= end; }
  PK_DEVICE bool is_sparse() const { return entry_is_sparse(entry); }
  PK_DEVICE void advance() {
    x_slot = x_slot + 1 == Config::kXSlots ? 0 : x_slot + 1;
    if (half == 1 || !is_sparse()) w_slot = w_slot + 1 == Config::kWSlots ? 0 : w_slot + 1;
    half ^= 1;
    if (half == 0) {
      ++column;
      read_entry();
    }
  }
  PK_DEVICE void read_entry() { entry = done() ? 0 : tiles[column]; }
};

// 64 columns of kBn tokens. What lies outside x arrives as zeros: a weight of zero times leftover NaN would be NaN.
template <class Config, class M>
PK_DEVICE void load_x(M& m, const GemmProblem& p, int token0, int col0, uint32_t slot) {
  constexpr int kUnits = Config::kBn * 8, kPasses = (kUnits + Config::kThreads - 1) / Config::kThreads;
  constexpr int kPassTokens = Config::kThreads / 8;
  const auto* x = static_cast<const uint8_t*>(p.x);
  const int row_bytes = kValueBytes * p.x_stride;
  const bool is_whole = token0 + Config::kBn <= p.tokens && col0 + kStepCols <= p.cols;
  m.each_lane([&](int lane) {
    const int thread = 32 * m.warp() + lane, unit = thread % 8, first = thread / 8;
    if (kUnits < Config::kThreads && thread >= kUnits) return;
    const uint32_t to = slot + swizzle128(first, 16 * unit);
    const uint8_t* column = x + kValueBytes * (col0 + 8 * unit);
    if (is_whole) {
      const uint8_t* from = column + static_cast<int64_t>(token0 + first) * row_bytes;
      PK_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        m.copy16(to + 128 * kPassTokens * pass, from + static_cast<int64_t>(pass * kPassTokens) * row_bytes);
      }
      return;
    }
    // Addresses stay inside x even where nothing is read.
    const int left = p.cols - (col0 + 8 * unit), bytes = left <= 0 ? 0 : left < 8 ? kValueBytes * left : 16;
    if (left <= 0) column = x;
    PK_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      const int token = token0 + first + pass * kPassTokens;
      const int nearest = token < p.tokens ? token : p.tokens - 1;
      m.copy16(to + 128 * kPassTokens * pass, column + static_cast<int64_t>(nearest) * row_bytes,
               token < p.tokens ? bytes : 0);
    }
  });
}

// Packed bytes are already in the order of shared memory.
template <class Config, int kBytes, class M>
PK_DEVICE void copy_bytes(M& m, const uint8_t* from, uint32_t to) {
  constexpr int kUnits = kBytes / 16;
  static_assert(kUnits % Config::kThreads == 0 || kUnits < Config::kThreads, "whole passes");
  m.each_lane([&](int lane) {
    const int thread = 32 * m.warp() + lane;
    if (kUnits < Config::kThreads && thread >= kUnits) return;
    const uint32_t to_lane = to + 16 * thread;
    const uint8_t* from_lane = from + 16 * thread;
    PK_UNROLL
    for (int unit = 0; unit < kUnits; unit += Config::kThreads) m.copy16(to_lane + 16 * unit, from_lane + 16 * unit);
  });
}

template <class Config, class M>
PK_DEVICE void load_w(M& m, const GemmProblem& p, const Walk<Config>& walk, uint32_t slot) {
  if (walk.is_sparse() && walk.half == 1) return;  // came with the first half
  const uint8_t* from = p.layers[0].payload + entry_offset(walk.entry) + walk.half * kSlotBytes;
  copy_bytes<Config, kSlotBytes>(m, from, slot);
  if (walk.is_sparse()) copy_bytes<Config, kMetaBytes>(m, from + kSlotBytes, slot + kSlotBytes);
}

// Loads one step, if any is left, and always closes a group of copies: waits count groups.
template <class Config, class M>
PK_DEVICE void load_step(M& m, const GemmProblem& p, int token0, Walk<Config>& walk) {
  if (!walk.done()) {
    const uint32_t x_slot = m.smem() + walk.x_slot * Config::kXBytes;
    const uint32_t w_slot = m.smem() + Config::kXSlots * Config::kXBytes + walk.w_slot * Config::kWBytes;
    load_x<Config>(m, p, token0, kTile * walk.column + kStepCols * walk.half, x_slot);
    load_w<Config>(m, p, walk, w_slot);
    walk.advance();
  }
  m.commit();
}

template <class Config, class M>
using Sums = typename M::template Regs<float, 4>[Config::kRowBlocks][Config::kTokenBlocks];

// Columns [32 kStep, 32 kStep + 32) of a step. All forms add the columns of a row in the same order, so a token's
// result does not depend on kBn.
template <class Config, bool kSparse, int kStep, class M>
PK_DEVICE void multiply_k32(M& m, Sums<Config, M>& sums, int half, uint32_t x_slot, uint32_t w_slot) {
  const int row0 = m.warp() % Config::kRowWarps * (16 * Config::kRowBlocks);
  const int token0 = m.warp() / Config::kRowWarps * (8 * Config::kTokenBlocks);
  typename M::template Regs<uint32_t, 4> x[Config::kTokenBlocks], w[Config::kRowBlocks];
  PK_UNROLL
  for (int j = 0; j < Config::kTokenBlocks; ++j) {
    m.ldmatrix_x4(x[j], [&](int lane) { return x_slot + token_address(lane, token0 + 8 * j, 4 * kStep); });
  }
  if constexpr (kSparse) {
    typename M::template Regs<uint32_t, 1> meta[Config::kRowBlocks];
    PK_UNROLL
    for (int i = 0; i < Config::kRowBlocks; ++i) {
      const int row = row0 + 16 * i;
      m.ldmatrix_x4(w[i], [&](int lane) { return w_slot + weight_address(lane, row, 4 * half + 2 * kStep); });
      m.each_lane([&](int lane) { meta[i].at(lane)[0] = m.load32(w_slot + meta_address(lane, row, half)); });
    }
    PK_UNROLL
    for (int j = 0; j < Config::kTokenBlocks; ++j) {
      PK_UNROLL
      for (int i = 0; i < Config::kRowBlocks; ++i) m.template mma_sp<kStep>(sums[i][j], w[i], x[j], meta[i]);
    }
  } else {
    PK_UNROLL
    for (int k16 = 0; k16 < 2; ++k16) {
      PK_UNROLL
      for (int i = 0; i < Config::kRowBlocks; ++i) {
        const int row = row0 + 16 * i;
        m.ldmatrix_x4(w[i], [&](int lane) { return w_slot + weight_address(lane, row, 4 * kStep + 2 * k16); });
      }
      PK_UNROLL
      for (int j = 0; j < Config::kTokenBlocks; ++j) {
        PK_UNROLL
        for (int i = 0; i < Config::kRowBlocks; ++i) m.mma(sums[i][j], w[i], x[j], k16);
      }
    }
  }
}

// The bias joins the finished fp32 sums; then comes the only rounding.
template <class Config, class M>
PK_DEVICE void add_bias(M& m, const GemmProblem& p, Sums<Config, M>& sums, int tile_row) {
  const GemmLayer& layer = p.layers[0];
  if (layer.bias == nullptr) return;
  const auto* bias = static_cast<const uint16_t*>(layer.bias);
  const int row0 = tile_row * kTile + m.warp() % Config::kRowWarps * (16 * Config::kRowBlocks);
  m.each_lane([&](int lane) {
    PK_UNROLL
    for (int i = 0; i < Config::kRowBlocks; ++i) {
      PK_UNROLL
      for (int v = 0; v < 4; v += 2) {
        const int row = row0 + 16 * i + sum_row(lane, v);
        const float add = row < layer.rows ? M::widen(bias[row]) : 0.0f;
        PK_UNROLL
        for (int j = 0; j < Config::kTokenBlocks; ++j) {
          sums[i][j].at(lane)[v] += add;
          sums[i][j].at(lane)[v + 1] += add;
        }
      }
    }
  });
}

// store(token, row in the tile, sum) for all sums of the warp. A store instruction covers 4 tokens x 8 rows: whole
// 32-byte sectors if fp32, half sectors if 16-bit.
template <class Config, class M, class Store>
PK_DEVICE void each_sum(M& m, Sums<Config, M>& sums, Store store) {
  const int row0 = m.warp() % Config::kRowWarps * (16 * Config::kRowBlocks);
  const int token0 = m.warp() / Config::kRowWarps * (8 * Config::kTokenBlocks);
  m.each_lane([&](int lane) {
    PK_UNROLL
    for (int i = 0; i < Config::kRowBlocks; ++i) {
      PK_UNROLL
      for (int j = 0; j < Config::kTokenBlocks; ++j) {
        PK_UNROLL
        for (int v = 0; v < 4; ++v) {
          store(token0 + 8 * j + sum_token(lane, v), row0 + 16 * i + sum_row(lane, v), sums[i][j].at(lane)[v]);
        }
      }
    }
  });
}

PK_DEVICE uint16_t* y_at(const GemmProblem& p, int token, int row) {
  return static_cast<uint16_t*>(p.layers[0].y) + static_cast<int64_t>(token) * p.layers[0].y_stride + row;
}

template <class Config, class M>
PK_DEVICE void store_y(M& m, const GemmProblem& p, Sums<Config, M>& sums, int row0, int token0) {
  const int rows = p.layers[0].rows;
  if constexpr (!Config::kStaged) {
    each_sum<Config>(m, sums, [&](int token, int r, float sum) {
      const int row = row0 + r;
      if (token0 + token < p.tokens && row < rows) *y_at(p, token0 + token, row) = M::round(sum);
    });
    return;
  }
  m.sync();  // all warps are done with the rings
  each_sum<Config>(m, sums, [&](int token, int r, float sum) {
    m.store16(m.smem() + token * Config::kStagedRowBytes + 2 * r, M::round(sum));
  });
  m.sync();
  m.each_lane([&](int lane) {
    constexpr int kUnits = kTile / 8;
    const int thread = 32 * m.warp() + lane, row = row0 + thread % kUnits * 8;
    for (int token = thread / kUnits; token < Config::kBn; token += Config::kThreads / kUnits) {
      if (token0 + token >= p.tokens || row >= rows) break;
      const auto eight = m.load128(m.smem() + token * Config::kStagedRowBytes + thread % kUnits * 16);
      uint16_t* y = y_at(p, token0 + token, row);
      if (rows % 8 == 0) {
        m.store128(y, eight);
      } else {
        PK_UNROLL
        for (int i = 0; i < 8; ++i) {
          if (row + i < rows) y[i] = static_cast<uint16_t>(eight.words[i / 2] >> (16 * (i % 2)));
        }
      }
    }
  });
}

}  // namespace sm80

// Workspace of split sums: [split][token][padded row].
PK_HD int64_t sm80_partial_index(const GemmProblem& p, int split, int token, int row) {
  return (static_cast<int64_t>(split) * p.tokens + token) * (int64_t{kTile} * p.layers[0].schedule.tile_rows) + row;
}

// One CTA. With splits > 1 it leaves fp32 sums in `partials`, which sm80_add_splits adds up in a second launch: there
// is no counter, atomic or flag, hence no state between calls, and graphs and concurrent streams need no care.
template <class Config, class M>
PK_DEVICE void sm80_tile_linear(M& m, const GemmProblem& p, float* partials) {
  using namespace sm80;
  const Schedule& schedule = p.layers[0].schedule;
  const int rounds = item_rounds(p.items);
  for (int round = 0; round < rounds; ++round) {
    const Item item = item_of(p.items, m.block_x(), round);
    if (item.unit < 0) return;
    const int tile_row = schedule.order[item.unit], token0 = item.group * Config::kBn;
    const Range range = split_range(schedule.row_cuts + item.unit * kCuts, p.splits, m.block_y());
    const uint32_t* tiles = row_tiles(schedule, item.unit);

    Sums<Config, M> sums = {};
    Walk<Config> load(tiles, range), use(tiles, range);
    for (int i = 0; i < Config::kDepth; ++i) load_step(m, p, token0, load);
    for (; !use.done(); use.advance()) {
      m.template wait<Config::kDepth - 1>();
      m.sync();  // this step has arrived for all warps, and all are done with the slots of the last one
      load_step(m, p, token0, load);
      const uint32_t x_slot = m.smem() + use.x_slot * Config::kXBytes;
      const uint32_t w_slot = m.smem() + Config::kXSlots * Config::kXBytes + use.w_slot * Config::kWBytes;
      if (use.is_sparse()) {
        multiply_k32<Config, true, 0>(m, sums, use.half, x_slot, w_slot);
        multiply_k32<Config, true, 1>(m, sums, use.half, x_slot, w_slot);
      } else {
        multiply_k32<Config, false, 0>(m, sums, use.half, x_slot, w_slot);
        multiply_k32<Config, false, 1>(m, sums, use.half, x_slot, w_slot);
      }
    }
    if (p.splits == 1) {
      add_bias<Config>(m, p, sums, tile_row);
      store_y<Config>(m, p, sums, tile_row * kTile, token0);
    } else {
      const int split = m.block_y();
      each_sum<Config>(m, sums, [&](int token, int r, float sum) {
        if (token0 + token >= p.tokens) return;
        m.store_partial(partials + sm80_partial_index(p, split, token0 + token, tile_row * kTile + r), sum);
      });
    }
    m.sync();  // the next item's loads reuse the rings
  }
}

// Threads of sm80_add_splits: one for four rows of a token.
PK_HD int64_t sm80_add_threads(const GemmProblem& p) {
  return static_cast<int64_t>(p.tokens) * p.layers[0].schedule.tile_rows * (kTile / 4);
}

// y = sum of the splits, always in the order 0, 1, ..., + bias.
template <class M>
PK_DEVICE void sm80_add_splits(const GemmProblem& p, const float* partials, int64_t thread) {
  struct alignas(16) Four {
    float v[4];
  };
  const GemmLayer& layer = p.layers[0];
  const int fours = layer.schedule.tile_rows * (kTile / 4);
  const int token = static_cast<int>(thread / fours), row = static_cast<int>(thread % fours) * 4;
  Four sum = {};
  for (int split = 0; split < p.splits; ++split) {
    const Four part = *reinterpret_cast<const Four*>(partials + sm80_partial_index(p, split, token, row));
    PK_UNROLL
    for (int i = 0; i < 4; ++i) sum.v[i] += part.v[i];
  }
  PK_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (row + i >= layer.rows) return;
    const auto* bias = static_cast<const uint16_t*>(layer.bias);
    const float biased = bias != nullptr ? sum.v[i] + M::widen(bias[row + i]) : sum.v[i];
    *sm80::y_at(p, token, row + i) = M::round(biased);
  }
}

}  // namespace patch_kernels
