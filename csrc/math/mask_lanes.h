// The fast masked-weight kernels, lane by lane: 128 columns a tile, 16-bit weights. A lane owns pairs of groups (eight
// weights of a row, 16 bytes); a warp's step is 32 pairs, two rows of the tile. Logits lie 24 or 48 bytes a pair, so
// they cross between memory and lanes through shared memory, by 16-byte accesses of consecutive lanes outside.
//
// The CUDA kernels (cuda/masked_weight.cu) call these functions between their warp barriers; the emulator
// (emulate/main_mask.cpp) calls them for 32 lanes in turn.
#pragma once

#include "../ops.h"
#include "elements.h"
#include "mask.h"

namespace patch_kernels {
namespace {

constexpr int kPairColumns = 2 * kGroup;
constexpr int kPairsPerRow = kTile / kPairColumns;
constexpr int kLaneCount = 32;
constexpr int kStepRows = kLaneCount / kPairsPerRow;
constexpr int kMaskWarps = 8;  // of a CTA

struct alignas(16) Chunk {
  uint32_t words[4];
};

struct alignas(8) HalfChunk {
  uint32_t words[2];
};

struct FixedPattern {};  // in place of a logit type: two groups a byte

// Where the logits of one warp step lie, in chunks of 16 bytes. The lanes of a row copy the chunks of that row.
template <class L>
struct LogitChunks {
  static constexpr int kPairBytes = 2 * kPatterns * static_cast<int>(sizeof(L));
  static constexpr int kWeightBytes = kPairBytes / kPairColumns;  // 6 or 3
  static constexpr int kRowChunks = kPairsPerRow * kPairBytes / 16;
  static constexpr int kStepChunks = kStepRows * kRowChunks;
  static constexpr int kPerLane = (kRowChunks + kPairsPerRow - 1) / kPairsPerRow;
};
template <>
struct LogitChunks<FixedPattern> {
  static constexpr int kStepChunks = 0;
};

// Says that a value is best computed once: nvcc would rather do it again at every use.
template <class Value>
PK_HD void keep_in_register([[maybe_unused]] Value& value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Value) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
#endif
}

// Part of the weight that a CTA covers.
struct TileSpan {
  int64_t row0, col0;
  int rows, cols;
};

PK_HD TileSpan tile_span(const MaskedWeightArgs& args, uint32_t tile) {
  const uint32_t tile_cols = static_cast<uint32_t>(ceil_div(args.cols, args.tile_cols));
  const int64_t row0 = tile / tile_cols * args.tile_rows, col0 = tile % tile_cols * args.tile_cols;
  const int64_t rows = args.rows - row0, cols = args.cols - col0;
  return {row0, col0, static_cast<int>(rows < args.tile_rows ? rows : args.tile_rows),
          static_cast<int>(cols < args.tile_cols ? cols : args.tile_cols)};
}

// Gate of a tile; without tile logits, none is dense.
template <class Real>
PK_HD TileGate<Real> gate_of(const MaskedWeightArgs& args, uint32_t tile) {
  if (!args.tile_logits) return {Real(0), Real(0)};
  const uint32_t tile_cols = static_cast<uint32_t>(ceil_div(args.cols, args.tile_cols));
  return tile_gate<Real>(static_cast<const Real*>(args.tile_logits)[tile], tile / tile_cols, tile % tile_cols,
                         make_factors<Real>(args.factors[2], args.factors[3]), args.hard_tile,
                         noise_key(args.key, args.layer));
}

// Whether the functions below serve a call: rows of weights and logits start at multiples of 16 bytes, and offsets
// inside a tile's rows fit 32 bits.
inline bool has_tile_kernel(const MaskedWeightArgs& args) {
  const bool short_logits = args.pattern_logits && args.pattern_dtype == DType::kBFloat16;
  return is_packed(args.dtype) && args.tile_cols == kTile &&
         args.cols % (short_logits ? 2 * kPairColumns : kPairColumns) == 0 &&
         (args.tile_rows < args.rows ? args.tile_rows : args.rows) * args.cols < (int64_t{1} << 28);
}

// What a lane keeps while its warp goes through a tile, for T weights and L logits.
template <class T, class L>
struct MaskLane {
  static constexpr bool kLearned = !std::is_same_v<L, FixedPattern>;
  using Chunks = LogitChunks<L>;
  static constexpr int kRowsAStep = kMaskWarps * kStepRows;  // of all warps
  // What a lane reads of a stage at once: 48 or 24 bytes from lane to lane keep either apart in the banks.
  using Piece = std::conditional_t<std::is_same_v<L, BFloat16>, HalfChunk, Chunk>;
  static constexpr int kPieces = 3;

  const MaskedWeightArgs& args;
  TileSpan span;
  int lane, warp;
  int64_t tile_weight;  // first weight of the tile
  int own_weight;       // the lane's first weight of step 0, from there
  int step_stride;      // weights from a step to the next
  int rows_left;        // of the tile, from the lane's row of step 0 on
  int active_rows;      // the same, 0 if the lane's columns are outside
  int chunks;           // of logits that the lane copies each step
  Factors<float> factors;
  NoiseKey noise;

  PK_HD MaskLane(const MaskedWeightArgs& args, uint32_t tile, int lane, int warp)
      : args(args),
        span(tile_span(args, tile)),
        lane(lane),
        warp(warp),
        tile_weight(span.row0 * args.cols + span.col0),
        own_weight(own_row() * static_cast<int>(args.cols) + col()),
        step_stride(kRowsAStep * static_cast<int>(args.cols)),
        rows_left(span.rows - own_row()),
        active_rows(col() < span.cols ? rows_left : 0),
        chunks(0),
        factors(make_factors<float>(args.factors[0], args.factors[1])),
        noise(noise_key(args.key, args.layer)) {
    if constexpr (kLearned) {
      chunks = (span.cols * Chunks::kWeightBytes / 16 - lane % kPairsPerRow + kPairsPerRow - 1) / kPairsPerRow;
      keep_in_register(chunks);
      keep_in_register(rows_left);
    }
    keep_in_register(own_weight);
    keep_in_register(step_stride);
    keep_in_register(active_rows);
  }

  PK_HD int own_row() const { return warp * kStepRows + lane / kPairsPerRow; }
  PK_HD int col() const { return lane % kPairsPerRow * kPairColumns; }
  PK_HD bool has_row(int step) const { return step * kRowsAStep < rows_left; }
  PK_HD bool is_active(int step) const { return step * kRowsAStep < active_rows; }
  PK_HD int64_t first_weight(int step) const { return tile_weight + (own_weight + step * step_stride); }

  PK_HD Chunk load_weights(const void* base, int step) const {
    if (!is_active(step)) return {};
    return *reinterpret_cast<const Chunk*>(static_cast<const T*>(base) + first_weight(step));
  }
  PK_HD void store_weights(const Chunk& weights, void* base, int step) const {
    if (is_active(step)) *reinterpret_cast<Chunk*>(static_cast<T*>(base) + first_weight(step)) = weights;
  }
  // The pair's fixed patterns; 0 where patterns are learned.
  PK_HD uint32_t load_nibbles(int step) const {
    if constexpr (kLearned) {
      return 0;
    } else {
      return is_active(step) ? args.fixed_pattern[first_weight(step) / kPairColumns] : 0u;
    }
  }

  // The lane's share of a step's logits: `chunks` pieces of 16 bytes, kPairsPerRow pieces apart, at the same places of
  // memory from own_chunks and of a stage from first_chunk.
  PK_HD int first_chunk() const { return lane / kPairsPerRow * Chunks::kRowChunks + lane % kPairsPerRow; }
  PK_HD const char* own_chunks(const void* logits) const {
    return static_cast<const char*>(logits) + (tile_weight + own_weight - col()) * Chunks::kWeightBytes +
           16 * (lane % kPairsPerRow);
  }
  PK_HD int64_t chunk_stride() const { return int64_t{step_stride} * Chunks::kWeightBytes; }

  // Calls copy(i) for each of them that there is: piece i is kPairsPerRow * i pieces from the first.
  template <class Copy>
  PK_HD void for_chunks(int step, Copy&& copy) const {
    if (!has_row(step)) return;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int i = 0; i < Chunks::kPerLane; ++i) {
      if (i < chunks) copy(i);
    }
  }

  // The pair's logits in a stage.
  PK_HD Piece* own_logits(Chunk* stage) const { return reinterpret_cast<Piece*>(stage) + lane * kPieces; }

  // Pattern masks m of the lane's two groups and their soft probabilities p if patterns are learned.
  PK_HD void pair_mask(const Piece* own, uint32_t nibbles, int step, float (&p)[kPatterns][2],
                       float (&m)[kGroup][2]) const {
    if constexpr (kLearned) {
      float logits[kPatterns][2];
      load_logits(own, logits);
      pattern_probabilities<float, 2>(logits, static_cast<uint64_t>(first_weight(step)) / kGroup, factors, noise, p);
      pattern_mask<float, 2>(p, args.hard_pattern, m);
    } else {
      const uint32_t both[2] = {nibbles & 15u, nibbles >> 4 & 15u};
      fixed_mask<float, 2>(both, m);
    }
  }

  // One step forward: the masked weights of the lane's pair, and its share of both sums. `own`: the pair's logits.
  PK_HD Chunk forward(const Chunk& weights, const Piece* own, uint32_t nibbles, int step, float gate, float& mask_sum,
                      float& square_sum) const {
    Chunk out{};
    if (!is_active(step)) return out;
    float p[kPatterns][2], m[kGroup][2], w[kGroup][2], values[kGroup][2];
    pair_mask(own, nibbles, step, p, m);
    widen(weights, w);
    // Under a gate that is not closed no mask is zero: no check a weight.
    const bool may_drop = !(gate > 0.0f);
    for (int l = 0; l < 2; ++l) {
      for (int j = 0; j < kGroup; ++j) {
        const float mask = gated_mask(gate, m[j][l]);
        values[j][l] = may_drop ? masked_value(mask, w[j][l]) : mask * w[j][l];
      }
    }
    for (int l = 0; l < 2; ++l) {
      for (int j = 0; j < kGroup; ++j) {
        if constexpr (!kLearned) mask_sum += gated_mask(gate, m[j][l]);
        square_sum = mul_add(values[j][l], values[j][l], square_sum);
      }
    }
    // The six probabilities add up to 1 and every pattern keeps two columns: m sums to 2 in a group. (NaN logits do not
    // show here, but in the sum of squares.)
    if constexpr (kLearned) mask_sum += mul_add(4.0f, gate, 4.0f);
    return narrow(values);
  }

  // One step backward: gradients of the pair's logits take the logits' place in `own`; the pair's share of the gate's
  // gradient is added; returns the masked weights if they are asked for.
  PK_HD Chunk backward(const Chunk& weights, const Chunk& grads, Piece* own, uint32_t nibbles, int step, float gate,
                       float density_grad, float norm_grad, float& gate_grad, bool with_masked) const {
    Chunk out{};
    if (!is_active(step)) return out;
    const float d[2] = {gate, gate};
    float p[kPatterns][2], m[kGroup][2], w[kGroup][2], g[kGroup][2], pattern_grad[kGroup][2], gate_share[2];
    pair_mask(own, nibbles, step, p, m);
    widen(weights, w);
    widen(grads, g);
    if (with_masked) {
      float values[kGroup][2];
      for (int l = 0; l < 2; ++l) {
        for (int j = 0; j < kGroup; ++j) values[j][l] = masked_value(gated_mask(gate, m[j][l]), w[j][l]);
      }
      out = narrow(values);
    }
    mask_gradient<float, 2>(g, w, m, d, density_grad, norm_grad, pattern_grad, gate_share);
    gate_grad += gate_share[0] + gate_share[1];
    if constexpr (kLearned) {
      float logit_grad[kPatterns][2];
      pattern_logit_gradient<float, 2>(p, pattern_grad, factors.gradient, logit_grad);
      store_logits(logit_grad, own);
    }
    return out;
  }

 private:
  using Groups = float[kGroup][2];
  using Logits = float[kPatterns][2];

  // Logit k of group l is value 6 l + k.
  PK_HD static void load_logits(const Piece* from, Logits& logits) {
    constexpr int kWords = sizeof(Piece) / sizeof(uint32_t);
    uint32_t words[kPieces * kWords];
    for (int i = 0; i < kPieces; ++i) {
      const Piece piece = from[i];
      for (int w = 0; w < kWords; ++w) words[kWords * i + w] = piece.words[w];
    }
    for (int l = 0; l < 2; ++l) {
      for (int k = 0; k < kPatterns; ++k) {
        const int i = kPatterns * l + k;
        if constexpr (std::is_same_v<L, BFloat16>) {
          logits[k][l] = half_of<L>(words[i / 2], i % 2);
        } else {
          logits[k][l] = bit_cast<float>(words[i]);
        }
      }
    }
  }
  PK_HD static void store_logits(const Logits& values, Piece* to) {
    constexpr int kWords = sizeof(Piece) / sizeof(uint32_t);
    constexpr int kValues = 2 * kPatterns / (kPieces * kWords);  // a word
    for (int i = 0; i < kPieces; ++i) {
      Piece piece;
      for (int w = 0; w < kWords; ++w) {
        const int first = kValues * (kWords * i + w), l = first / kPatterns, k = first % kPatterns;
        if constexpr (kValues == 2) {
          piece.words[w] = pack_pair<L>(values[k][l], values[k + 1][l]);
        } else {
          piece.words[w] = bit_cast<uint32_t>(values[k][l]);
        }
      }
      to[i] = piece;
    }
  }

  // Element j of group l is half j % 2 of word 2 l + j / 2.
  PK_HD static void widen(const Chunk& chunk, Groups& values) {
    for (int l = 0; l < 2; ++l) {
      for (int j = 0; j < kGroup; ++j) values[j][l] = half_of<T>(chunk.words[2 * l + j / 2], j % 2);
    }
  }
  PK_HD static Chunk narrow(const Groups& values) {
    return {{pack_pair<T>(values[0][0], values[1][0]), pack_pair<T>(values[2][0], values[3][0]),
             pack_pair<T>(values[0][1], values[1][1]), pack_pair<T>(values[2][1], values[3][1])}};
  }
};

}  // namespace
}  // namespace patch_kernels
