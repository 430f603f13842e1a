// The Hopper kernel body: y = x * weight^T for weights of mixed dense and 2:4 tiles, by wgmma and wgmma.sp.
//
// The sparse operand of wgmma.sp is A, so an instruction's m is a weight row and its n a token (y^T = W x^T). A CTA has
// two consumer warpgroups and up to three producer threads, joined by rings in shared memory:
//   x ring    slots of 64 columns x kBn tokens, by tensor copies; both consumers read each slot
//   W ring    slots of 18432 bytes, by bulk copies. A dense tile takes two slots of 16384 bytes, a sparse tile one.
// Decode (kPairs = false): the consumers share a tile row, 64 rows each, and one W ring.
// Prefill (kPairs = true): each consumer has a tile row and a W ring of its own.
// A cluster is token_ctas CTAs with the same weights and different tokens (each copies its share of every W slot and
// multicasts it), times row_ctas CTAs with the same tokens and different weights (they take turns to copy and multicast
// x), times `splits` CTAs with different columns. Each of those copies its sums to the CTAs that finish them, shared
// memory to shared memory, and they are added in rank order. Nothing lives in global memory between launches: no
// counters to reset, no workspace, so graphs and concurrent streams cannot disturb each other.
//
// M is the machine: the device (cuda/machine_sm90.cuh) or an emulator with one host thread a role (emulate/). Control
// flow is uniform in a role; what differs from thread to thread goes through each_thread.
#pragma once

#include "problem.h"
#include "wgmma.h"

namespace patch_kernels::sm90 {

constexpr int kConsumers = 2;
constexpr int kWarps = 4;  // of a consumer; each arrives for itself on the barriers that give something back
enum Role { kConsumer0, kConsumer1, kLoadX, kLoadW0, kLoadW1, kIdle };

constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// kExchangeTokens: tokens of partial sums copied at once by a split launch; 0: the kernel does not split.
template <int kBn_, bool kPairs_, int kXSlots_, int kWSlots_, int kExchangeTokens_>
struct Config {
  static constexpr int kBn = kBn_;
  static constexpr bool kPairs = kPairs_;
  static constexpr int kXSlots = kXSlots_, kWSlots = kWSlots_;
  static constexpr int kExchangeTokens = kExchangeTokens_;
  static constexpr int kRings = kPairs ? 2 : 1;
  static constexpr int kBlocks = kPairs ? 2 : 1;  // m64 blocks of a consumer
  static constexpr int kConsumerRows = 64 * kBlocks;
  static constexpr int kXSlotBytes = kBn * 128;

  // Scratch of a consumer: two staging buffers of 16 tokens for stores of y, or twice a chunk of partial sums to send
  // and the same received, so that one chunk travels while the next is written.
  static constexpr int kStageTokens = 16;
  static constexpr int kStageBytes = kConsumerRows * kStageTokens * kValueBytes;
  static constexpr int kChunkBytes = kConsumerRows * kExchangeTokens * 4;
  static constexpr int kExchangeBytes = 2 * 2 * kChunkBytes;
  static constexpr int kStoreBytes = kPairs ? 2 * kStageBytes : 0;
  static constexpr int kScratchBytes = round_up(kExchangeBytes > kStoreBytes ? kExchangeBytes : kStoreBytes, 1024);

  static constexpr int kXOffset = 0;
  static constexpr int kWOffset = kXOffset + kXSlots * kXSlotBytes;
  static constexpr int kScratchOffset = kWOffset + kRings * kWSlots * kSparseTileBytes;
  static constexpr int kBarrierOffset = kScratchOffset + kConsumers * kScratchBytes;
  static constexpr int kBarriers = 2 * kXSlots + 2 * kRings * kWSlots + 4 * kConsumers;
  static constexpr int kSmemBytes = kBarrierOffset + 8 * kBarriers;
  static constexpr int kThreads = kPairs ? 384 : 320;

  static_assert(kXSlotBytes % 1024 == 0 && kSparseTileBytes % 1024 == 0, "the swizzle repeats every 1024 bytes");
  static_assert(kBn % (kExchangeTokens ? kExchangeTokens : 1) == 0, "whole chunks");
  static_assert(kSmemBytes <= (kPairs ? 232448 : 115712), "227 KB a CTA; decode leaves room for the next kernel's CTA");
};

using Decode8 = Config<8, false, 8, 4, exchange_tokens(8)>;
using Decode16 = Config<16, false, 6, 4, exchange_tokens(16)>;
using Decode32 = Config<32, false, 4, 4, exchange_tokens(32)>;
using Prefill64 = Config<64, true, 4, 3, exchange_tokens(64)>;
using Prefill128Split = Config<128, true, 3, 3, exchange_tokens(128)>;
using Prefill128 = Config<128, true, 4, 4, 0>;
using Prefill160 = Config<160, true, 3, 4, 0>;
using Prefill176 = Config<176, true, 4, 3, 0>;
using Prefill192 = Config<192, true, 4, 3, 0>;

// Calls f with the configuration of a plan; false if there is none.
template <class F>
bool with_config(bool pairs, int bn, int splits, F&& f) {
  if (!pairs) {
    switch (bn) {
      case 8:
        f(Decode8{});
        return true;
      case 16:
        f(Decode16{});
        return true;
      case 32:
        f(Decode32{});
        return true;
    }
    return false;
  }
  switch (bn) {
    case 64:
      f(Prefill64{});
      return true;
    case 128:
      splits > 1 ? f(Prefill128Split{}) : f(Prefill128{});
      return true;
    case 160:
      f(Prefill160{});
      return true;
    case 176:
      f(Prefill176{});
      return true;
    case 192:
      f(Prefill192{});
      return true;
  }
  return false;
}

// Position in a ring of kSlots: `parity` flips each time around. A consumer waits for full barriers with it; a
// producer waits for empty ones with its opposite, so that the first round passes (PTX ISA, "mbarrier.test_wait").
template <int kSlots>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  PK_BODY void advance() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

// Addresses of a CTA's shared memory.
template <class C>
struct Smem {
  uint32_t base;
  PK_BODY uint32_t x(int slot) const { return base + C::kXOffset + slot * C::kXSlotBytes; }
  PK_BODY uint32_t w(int ring, int slot) const {
    return base + C::kWOffset + (ring * C::kWSlots + slot) * kSparseTileBytes;
  }
  PK_BODY uint32_t scratch(int consumer) const { return base + C::kScratchOffset + consumer * C::kScratchBytes; }
  PK_BODY uint32_t barrier(int index) const { return base + C::kBarrierOffset + 8 * index; }
  PK_BODY uint32_t x_full(int slot) const { return barrier(slot); }
  PK_BODY uint32_t x_empty(int slot) const { return barrier(C::kXSlots + slot); }
  PK_BODY uint32_t w_full(int ring, int slot) const { return barrier(2 * C::kXSlots + ring * C::kWSlots + slot); }
  PK_BODY uint32_t w_empty(int ring, int slot) const {
    return barrier(2 * C::kXSlots + (C::kRings + ring) * C::kWSlots + slot);
  }
  // Chunks of sums take turns in two buffers, each of slots by rank in the split: `send` for that CTA, `received` from
  // it. The own slot of `send` is where the own sums are read from.
  PK_BODY uint32_t send(int consumer, int buffer) const { return scratch(consumer) + buffer * C::kChunkBytes; }
  PK_BODY uint32_t received(int consumer, int buffer) const { return send(consumer, 2 + buffer); }
  PK_BODY uint32_t sums_full(int consumer, int buffer) const {
    return barrier(2 * C::kXSlots + 2 * C::kRings * C::kWSlots + 2 * consumer + buffer);
  }
  PK_BODY uint32_t sums_empty(int consumer, int buffer) const { return sums_full(kConsumers + consumer, buffer); }
};

// This CTA's place: cluster rank = (split * row_ctas + row_cta) * token_ctas + token_cta.
struct Place {
  int token_cta, row_cta, split;
};

// Ranks first, first + stride, ... of a cluster, also as a mask for multicast.
struct Ranks {
  int first, count, stride;
  uint16_t mask;
};
PK_BODY Ranks ranks_of(int first, int count, int stride) {
  uint32_t mask = 0;
  for (int i = 0; i < count; ++i) mask |= 1u << (first + i * stride);
  return {first, count, stride, static_cast<uint16_t>(mask)};
}
PK_BODY Ranks sharing_weights(const GemmProblem& p, const Place& place) {
  return ranks_of((place.split * p.row_ctas + place.row_cta) * p.token_ctas, p.token_ctas, 1);
}
PK_BODY Ranks sharing_x(const GemmProblem& p, const Place& place) {
  return ranks_of(place.split * p.row_ctas * p.token_ctas + place.token_cta, p.row_ctas, p.token_ctas);
}
PK_BODY Ranks sharing_sums(const GemmProblem& p, const Place& place) {  // row_ctas is 1 where K is split
  return ranks_of(place.token_cta, p.splits, p.token_ctas);
}

// One item as a role sees it.
struct Work {
  int layer;
  int position;             // of the tile row in the layer's order; -1: there is nothing to multiply
  const uint32_t* entries;  // of its tiles
  int token0;               // first of the layer's tokens for this CTA
  Range k;                  // tile columns
};

template <class C>
PK_BODY Work work_of(const GemmProblem& p, const Item& item, const Place& place, int row_of_pair) {
  Work work;
  work.layer = 0;
#pragma unroll
  for (int i = 1; i < kMaxLayers; ++i) work.layer += item.unit >= p.first_unit[i];
  const GemmLayer& layer = p.layers[work.layer];
  const int unit = item.unit - p.first_unit[work.layer];
  const int pair = C::kPairs ? unit * p.row_ctas + place.row_cta : unit / 2;
  const int position = C::kPairs ? 2 * pair + row_of_pair : unit;
  const int first_token = item.group * p.token_ctas * C::kBn;  // of the cluster
  // The last pair of an odd number of rows has one row; a layer may have tokens in fewer groups than the launch.
  const bool is_there = position < layer.schedule.tile_rows && first_token < layer.tokens;
  work.position = is_there ? position : -1;
  work.entries = row_tiles(layer.schedule, position);
  work.token0 = first_token + place.token_cta * C::kBn;
  const bool by_pair = C::kPairs || p.cut_by_pair;
  const int32_t* cuts = by_pair ? layer.schedule.pair_cuts + pair * kCuts : layer.schedule.row_cuts + unit * kCuts;
  // CTAs that share x walk all columns together, also one whose pair does not exist.
  work.k = p.splits == 1 ? Range{0, layer.schedule.tile_cols} : split_range(cuts, p.splits, place.split);
  return work;
}

// Whether this CTA has any token of the item. In a cluster along tokens the last CTAs may have none: they pass on their
// share of the weights and do nothing else.
PK_BODY bool has_tokens(const GemmProblem& p, const Work& work) { return work.token0 < p.layers[work.layer].tokens; }

// Runs f(item) over the items of this cluster.
template <class M, class F>
PK_BODY void for_each_item(M& m, const GemmProblem& p, F&& f) {
  const int rounds = item_rounds(p.items);
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const Item item = item_of(p.items, m.cluster(), round);
    if (item.unit >= 0) f(item);
  }
}

template <class C, class M>
PK_BODY void load_x(M& m, const GemmProblem& p, const typename M::TensorMap& x_map, const Place& place) {
  const Smem<C> smem{m.smem_base()};
  Ring<C::kXSlots> ring;
  const Ranks ranks = sharing_x(p, place);
  int turn = 0;  // the CTA that copies the next slot
  // Everything before this line touches weights only: with programmatic dependent launch it runs while the kernel that
  // makes x still does. y is written after x has arrived, so after this line too.
  m.wait_for_previous_grid();
  for_each_item(m, p, [&](const Item& item) {
    const Work work = work_of<C>(p, item, place, 0);
    if (!has_tokens(p, work)) return;
    // Beyond the layer's tokens lie those of another, or zeros: what they make is not stored.
    const int token = p.layers[work.layer].first_token + work.token0;
#pragma unroll 1
    for (int step = 2 * work.k.begin; step < 2 * work.k.end; ++step) {
      // The slot of every CTA that shares x must be free: their consumers arrive here as well.
      m.wait(smem.x_empty(ring.slot), ring.parity ^ 1);
      m.arrive_expect(smem.x_full(ring.slot), C::kXSlotBytes);  // counts zero-filled bytes too
      if (turn == place.row_cta) {
        m.copy_x(x_map, smem.x(ring.slot), 64 * step, token, C::kBn, smem.x_full(ring.slot), ranks);
      }
      if (++turn == p.row_ctas) turn = 0;
      ring.advance();
    }
  });
  // Arrivals of other CTAs may still be on their way: a CTA must not leave before they are there.
  for (int i = 0; i < C::kXSlots; ++i, ring.advance()) m.wait_returned(smem.x_empty(ring.slot), ring.parity ^ 1);
}

template <class C, class M>
PK_BODY void load_w(M& m, const GemmProblem& p, const Place& place, int ring_index) {
  const Smem<C> smem{m.smem_base()};
  Ring<C::kWSlots> ring;
  const Ranks ranks = sharing_weights(p, place);
  const int dense_share = kSlotBytes / p.token_ctas, sparse_share = kSparseTileBytes / p.token_ctas;
  for_each_item(m, p, [&](const Item& item) {
    const Work work = work_of<C>(p, item, place, ring_index);
    if (work.position < 0) return;
    const uint8_t* payload = p.layers[work.layer].payload;
    const uint32_t* entries = work.entries;
    uint32_t next = work.k.begin < work.k.end ? M::load_entry(entries + work.k.begin) : 0;
    for (int k = work.k.begin; k < work.k.end; ++k) {
      const uint32_t entry = next;
      if (k + 1 < work.k.end) next = M::load_entry(entries + k + 1);  // its latency hides behind the waits below
      const uint8_t* source = payload + entry_offset(entry);
      const int slots = entry_is_sparse(entry) ? 1 : 2;
      const int bytes = entry_is_sparse(entry) ? kSparseTileBytes : kSlotBytes;
      const int share = entry_is_sparse(entry) ? sparse_share : dense_share, skip = share * place.token_cta;
#pragma unroll 1
      for (int i = 0; i < slots; ++i, source += bytes) {
        const uint32_t slot = smem.w(ring_index, ring.slot), full = smem.w_full(ring_index, ring.slot);
        // The slot of every CTA that shares the weights must be free: their consumers arrive here as well.
        m.wait(smem.w_empty(ring_index, ring.slot), ring.parity ^ 1);
        m.arrive_expect(full, bytes);
        m.copy_w(slot + skip, source + skip, share, full, ranks);
        ring.advance();
      }
    }
  });
  for (int i = 0; i < C::kWSlots; ++i, ring.advance()) {
    m.wait_returned(smem.w_empty(ring_index, ring.slot), ring.parity ^ 1);
  }
}

// State of a consumer's walk through the rings. A slot is given back one step late: after the wgmma group that read it
// has retired.
template <class C, class M>
struct Consumer {
  template <int N>
  using Floats = typename M::template Regs<float, N>;
  using Words = typename M::template Regs<uint32_t, 2>;

  M& m;
  const GemmProblem& p;
  const Place place;
  const int index;
  const Smem<C> smem;
  Ring<C::kXSlots> x;
  Ring<C::kWSlots> w;
  uint32_t chunks = 0;           // of sums exchanged so far: two buffers take turns, across items too
  int stores = 0;                // chunks stored so far: two staging buffers take turns, across items too
  int used_x = -1, used_w = -1;  // slots read by the newest group
  Floats<C::kBn / 2> sums[C::kBlocks];

  PK_BODY Consumer(M& machine, const GemmProblem& problem, const Place& here, int consumer)
      : m(machine), p(problem), place(here), index(consumer), smem{machine.smem_base()} {}

  PK_BODY int ring() const { return C::kPairs ? index : 0; }
  PK_BODY int block(int b) const { return C::kPairs ? b : index; }  // m64 block in the tile row

  PK_BODY void release() {
    if (used_x >= 0) m.arrive_cluster(smem.x_empty(used_x), sharing_x(p, place));
    if (used_w >= 0) m.arrive_cluster(smem.w_empty(ring(), used_w), sharing_weights(p, place));
    used_x = used_w = -1;
  }

  // Ends a step: its instructions become a group, the one before retires, and its slots go back.
  PK_BODY void end_step(bool ends_w) {
    m.commit();
    m.template wait_groups<1>();
    release();
    used_x = x.slot;
    x.advance();
    if (ends_w) {
      used_w = w.slot;
      w.advance();
    }
  }

  PK_BODY void drain() {
    m.template wait_groups<0>();
    for (int b = 0; b < C::kBlocks; ++b) m.own(sums[b]);
    release();
  }

  PK_BODY void dense_tile() {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      m.wait(smem.w_full(ring(), w.slot), w.parity);
      m.wait(smem.x_full(x.slot), x.parity);
      const uint64_t a = wgmma_descriptor(smem.w(ring(), w.slot)), b = wgmma_descriptor(smem.x(x.slot));
      m.fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int i = 0; i < C::kBlocks; ++i) {
          m.template mma_dense<C::kBn>(sums[i], a + block(i) * kABlockStep + step * kAStep, b + step * kBDenseStep);
        }
      }
      end_step(true);
    }
  }

  PK_BODY void sparse_tile(Words (&meta)[C::kBlocks]) {
    m.wait(smem.w_full(ring(), w.slot), w.parity);
    const uint32_t slot = smem.w(ring(), w.slot);
#pragma unroll
    for (int i = 0; i < C::kBlocks; ++i) {
      m.load_words(meta[i], slot + kSlotBytes + block(i) * kMetaBlockBytes);
    }
    const uint64_t a = wgmma_descriptor(slot);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      m.wait(smem.x_full(x.slot), x.parity);
      const uint64_t b = wgmma_descriptor(smem.x(x.slot));
      m.fence();
#pragma unroll
      for (int i = 0; i < C::kBlocks; ++i) {
        m.template mma_sparse<C::kBn, 0>(sums[i], a + block(i) * kABlockStep + 2 * half * kAStep, b, meta[i], half);
      }
#pragma unroll
      for (int i = 0; i < C::kBlocks; ++i) {
        m.template mma_sparse<C::kBn, 1>(sums[i], a + block(i) * kABlockStep + (2 * half + 1) * kAStep,
                                         b + kBSparseStep, meta[i], half);
      }
      end_step(half == 1);
    }
  }

  // Tile columns of one row as runs of equal type. The kind of the next tile is asked for before this one is
  // multiplied.
  enum Kind { kDense, kSparse, kEnd };
  PK_BODY Kind kind_at(const uint32_t* entries, int k, int end) const {
    return k >= end ? kEnd : entry_is_sparse(M::load_entry(entries + k)) ? kSparse : kDense;
  }
  PK_BODY Kind first_kind(const Work& work) const {
    return work.position < 0 ? kEnd : kind_at(work.entries, work.k.begin, work.k.end);
  }

  // No row to multiply, but the other consumer's x slots need this one's consent.
  PK_BODY void pass_x(const Work& work) {
    for (int step = 2 * work.k.begin; step < 2 * work.k.end; ++step) {
      m.wait(smem.x_full(x.slot), x.parity);
      m.warp_sync();
      m.arrive_cluster(smem.x_empty(x.slot), sharing_x(p, place));
      x.advance();
    }
  }
  // No tokens, but the weights come for the CTAs that share them.
  PK_BODY void pass_weights(const Work& work, Kind kind) {
    for (int k = work.k.begin; kind != kEnd; kind = kind_at(work.entries, ++k, work.k.end)) {
      for (int i = kind == kDense ? 2 : 1; i > 0; --i) {
        m.wait(smem.w_full(ring(), w.slot), w.parity);
        m.warp_sync();
        m.arrive_cluster(smem.w_empty(ring(), w.slot), sharing_weights(p, place));
        w.advance();
      }
    }
  }

  // `kind`: of the item's first tile.
  PK_BODY void multiply(const Work& work, Kind kind) {
    const uint32_t* entries = work.entries;
    const int end = work.k.end;
    int k = work.k.begin;
    for (int b = 0; b < C::kBlocks; ++b) m.clear(sums[b]);
    // wgmmas that share accumulators are ordered only if their shapes are the same (PTX ISA, "wgmma.mma_async"): a
    // change between dense and sparse drains the pipeline.
    while (kind != kEnd) {
      while (kind == kDense) {
        const Kind next = kind_at(entries, ++k, end);
        dense_tile();
        kind = next;
      }
      drain();
      // Two sets of metadata registers take turns: an instruction in flight may still read the other. The ISA forbids
      // changing accumulators and A fragments then and is silent on metadata.
      Words meta[2][C::kBlocks];
      while (kind == kSparse) {
        Kind next = kind_at(entries, ++k, end);
        sparse_tile(meta[0]);
        kind = next;
        if (kind != kSparse) break;
        next = kind_at(entries, ++k, end);
        sparse_tile(meta[1]);
        kind = next;
      }
      drain();
    }
  }

  // Where an item's sums go.
  struct Target {
    const GemmLayer& layer;
    int row0, token0;  // first row of this consumer, first token of this CTA
  };

  PK_BODY float bias_at(const Target& to, int row) const {
    return row < to.layer.rows ? M::load_element(to.layer.bias, row) : 0.0f;
  }
  PK_BODY void store_element(const Target& to, int token, int row, float sum) {
    if (token >= to.layer.tokens || row >= to.layer.rows) return;
    M::store_element(to.layer.y, static_cast<int64_t>(token) * to.layer.y_stride + row, sum);
  }

  PK_BODY void add_bias(const Target& to) {
#pragma unroll
    for (int b = 0; b < C::kBlocks; ++b) {
      m.each_thread([&](int t) {
        float* sum = sums[b].at(t);
        const int row = to.row0 + 64 * b + fragment_row(t, 0);
        const float bias[2] = {bias_at(to, row), bias_at(to, row + 8)};
#pragma unroll
        for (int i = 0; i < C::kBn / 2; ++i) sum[i] += bias[(i >> 1) & 1];
      });
    }
  }

  // Straight from the registers: few tokens.
  PK_BODY void store_direct(const Target& to) {
#pragma unroll
    for (int b = 0; b < C::kBlocks; ++b) {
      m.each_thread([&](int t) {
        const float* sum = sums[b].at(t);
#pragma unroll
        for (int i = 0; i < C::kBn / 2; ++i) {
          store_element(to, to.token0 + fragment_token(t, i), to.row0 + 64 * b + fragment_row(t, i), sum[i]);
        }
      });
    }
  }

  // Transposed through shared memory, 16 tokens at a time. If N is a multiple of 8 the copy engine stores them and
  // clips what lies outside y; else its rows are not aligned as a tensor map needs, and the threads store them.
  PK_BODY void store_staged(const Target& to, const typename M::TensorMap& y_map) {
    constexpr int kBlockBytes = C::kStageBytes / C::kBlocks;
    const int rows = to.layer.rows, row0 = to.row0;
    const bool by_tensor = rows % 8 == 0;
#pragma unroll
    for (int chunk = 0; chunk < C::kBn / C::kStageTokens; ++chunk) {
      const int first = to.token0 + chunk * C::kStageTokens;
      const uint32_t stage = smem.scratch(index) + (stores++ & 1) * C::kStageBytes;
      m.wait_stores_read();  // all but the newest store have left shared memory
      m.consumer_sync(index);
#pragma unroll
      for (int b = 0; b < C::kBlocks; ++b) {
        m.store_transposed(stage + b * kBlockBytes, [&](int t, uint32_t (&words)[4]) {
          const float* sum = sums[b].at(t) + 8 * chunk;
          for (int i = 0; i < 4; ++i) words[i] = M::pack(sum[2 * i], sum[2 * i + 1]);
        });
      }
      if (by_tensor) m.fence_async_proxy();
      m.consumer_sync(index);
      if (by_tensor) {
        for (int b = 0; b < C::kBlocks; ++b) m.copy_y(y_map, stage + b * kBlockBytes, row0 + 64 * b, first);
      }
      m.commit_stores();  // an empty group where nothing was copied: the wait above counts chunks, of all layers
      if (by_tensor) continue;
      m.each_thread([&](int t) {  // one weight row a thread
        const uint32_t from = stage + t / 64 * kBlockBytes;
        if (row0 + t >= rows) return;
#pragma unroll 1
        for (int i = 0; i < C::kStageTokens && first + i < to.layer.tokens; ++i) {
          const uint16_t bits = m.load_half(from + swizzle128(i, kValueBytes * (t % 64)));
          M::store_bits(to.layer.y, static_cast<int64_t>(first + i) * to.layer.y_stride + row0 + t, bits);
        }
      });
    }
  }

  // Exchange of a split's sums: each of its CTAs finishes kConsumerRows / splits rows, and gets the others' sums of
  // them pushed into its shared memory, kExchangeTokens at a time. A push takes one copy a destination and completes on
  // a barrier there, so nothing is published by a fence over the whole GPU, as reading remote sums would need.
  struct Exchange {
    int rows, row_bits;  // finished by each CTA: a power of two, and its logarithm
    int floats, bytes;   // of a slot: the rows of kExchangeTokens tokens
  };
  PK_BODY Exchange exchange() const {
    Exchange e;
    e.rows = C::kConsumerRows / p.splits;
    e.row_bits = 0;
    while (1 << e.row_bits < e.rows) ++e.row_bits;
    e.floats = e.rows * C::kExchangeTokens;
    e.bytes = 4 * e.floats;
    return e;
  }
  // Place of a float in a slot. A store instruction of the fragments covers eight rows of tokens 0, 2, 4, 6 (or 1, 3,
  // 5, 7): the XOR puts those into different banks, and keeps four rows that begin at a multiple of four together.
  static PK_BODY int slot_index(int token, int row, int row_bits) {
    return ((token << row_bits) + row) ^ (token >> 1 & 3) << 3;
  }

  PK_BODY void push_sums(const Exchange& e, int chunk) {
    const uint32_t number = chunks + chunk, buffer = number & 1, parity = number >> 1 & 1;
    const uint32_t send = smem.send(index, buffer), full = smem.sums_full(index, buffer);
    // All have received and added up what was in this buffer before.
    m.wait(smem.sums_empty(index, buffer), parity ^ 1);
    // Registers have no addresses: the chunk is selected, so that the loop over chunks need not be unrolled.
#pragma unroll
    for (int c = 0; c < C::kBn / C::kExchangeTokens; ++c) {
      if (c != chunk) continue;
#pragma unroll
      for (int b = 0; b < C::kBlocks; ++b) {
        m.each_thread([&](int t) {
          const float* sum = sums[b].at(t) + c * (C::kExchangeTokens / 2);
#pragma unroll
          for (int i = 0; i < C::kExchangeTokens / 2; ++i) {
            const int row = 64 * b + fragment_row(t, i), in_row = row & (e.rows - 1);
            const int at = (row >> e.row_bits) * e.floats + slot_index(fragment_token(t, i), in_row, e.row_bits);
            m.store_float(send + 4 * at, sum[i]);
          }
        });
      }
    }
    m.fence_async_proxy();
    m.consumer_sync(index);
    m.each_of(p.splits, [&](int split) {
      if (split == place.split) {
        m.arrive_expect(full, (p.splits - 1) * e.bytes);
      } else {  // a copy to oneself is undefined
        m.push(smem.received(index, buffer) + place.split * e.bytes, send + split * e.bytes, e.bytes, full,
               split * p.token_ctas + place.token_cta);
      }
    });
  }

  PK_BODY void finish_sums(const Exchange& e, const Target& to, int chunk) {
    const uint32_t number = chunks + chunk, buffer = number & 1, parity = number >> 1 & 1;
    const uint32_t own = smem.send(index, buffer), received = smem.received(index, buffer);
    const int first_row = to.row0 + e.rows * place.split, first_token = to.token0 + chunk * C::kExchangeTokens;
    // Rows of y are multiples of eight bytes: y_stride is a multiple of the layer's rows.
    const bool whole = to.layer.rows % 4 == 0;
    m.wait(smem.sums_full(index, buffer), parity);
    m.each_thread([&](int t) {
#pragma unroll 1
      for (int i = 4 * t; i < e.floats; i += 4 * 128) {
        const int in_row = i & (e.rows - 1), in_token = i >> e.row_bits;
        const int row = first_row + in_row, token = first_token + in_token;
        const uint32_t at = 4 * slot_index(in_token, in_row, e.row_bits);
        float sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int split = 0; split < kMaxSplits; ++split) {  // in rank order
          if (split >= p.splits) break;
          float part[4];
          m.load_four(part, (split == place.split ? own : received) + split * e.bytes + at);
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[j] = split == 0 ? part[j] : sum[j] + part[j];
        }
        if (to.layer.bias) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[j] += bias_at(to, row + j);
        }
        if (!whole) {
#pragma unroll
          for (int j = 0; j < 4; ++j) store_element(to, token, row + j, sum[j]);
        } else if (token < to.layer.tokens && row < to.layer.rows) {
          M::store_four(to.layer.y, static_cast<int64_t>(token) * to.layer.y_stride + row, M::pack(sum[0], sum[1]),
                        M::pack(sum[2], sum[3]));
        }
      }
    });
    m.warp_sync();
    m.arrive_cluster(smem.sums_empty(index, buffer), sharing_sums(p, place));
  }

  PK_BODY void store_exchanged(const Target& to) {
    constexpr int kChunks = C::kBn / C::kExchangeTokens;
    const Exchange e = exchange();
#pragma unroll 1
    for (int chunk = 0; chunk <= kChunks; ++chunk) {  // one travels while the next is written
      if (chunk < kChunks) push_sums(e, chunk);
      if (chunk > 0) finish_sums(e, to, chunk - 1);
    }
    chunks += kChunks;
  }

  PK_BODY void store(const Target& to, const typename M::TensorMap& y_map) {
    if constexpr (C::kExchangeTokens > 0) {
      if (p.splits > 1) return store_exchanged(to);
    }
    if (to.layer.bias) add_bias(to);
    if constexpr (C::kPairs) {
      store_staged(to, y_map);
    } else {
      store_direct(to);
    }
  }

  // The next item is looked up before the sums of this one are stored: what it reads arrives meanwhile.
  PK_BODY void run(const typename M::TensorMap* y_maps) {
    const int rounds = item_rounds(p.items);
    Item item;
    Work work;
    Kind kind;
    const auto look_up = [&](int round) {
      item = round < rounds ? item_of(p.items, m.cluster(), round) : Item{-1, 0};
      if (item.unit < 0) return;
      work = work_of<C>(p, item, place, index);
      kind = first_kind(work);
    };
    look_up(0);
#pragma unroll 1
    for (int round = 1; item.unit >= 0; ++round) {
      const bool has_row = work.position >= 0, is_mine = has_row && has_tokens(p, work);
      const GemmLayer& layer = p.layers[work.layer];
      const int row = is_mine ? M::load_row(layer.schedule.order + work.position) : 0;
      if (is_mine) {
        multiply(work, kind);
      } else if (has_row) {
        pass_weights(work, kind);
      } else if (has_tokens(p, work)) {
        pass_x(work);
      }
      const Target target{layer, row * kTile + (C::kPairs ? 0 : 64 * index), work.token0};
      const typename M::TensorMap& y_map = y_maps[work.layer];
      look_up(round);
      if (is_mine) store(target, y_map);
    }
    if constexpr (C::kExchangeTokens > 0) {
      // Peers may still read what was pushed from here, and their last arrivals may be on their way.
      for (uint32_t number = chunks; p.splits > 1 && number < chunks + 2; ++number) {
        m.wait_returned(smem.sums_empty(index, number & 1), (number >> 1 & 1) ^ 1);
      }
    }
    if constexpr (C::kPairs) m.wait_stores();
  }
};

template <class C, class M>
PK_BODY void tile_gemm(M& m, const GemmProblem& p, const typename M::TensorMap& x_map,
                       const typename M::TensorMap* y_maps) {
  const Smem<C> smem{m.smem_base()};
  const int rank = m.cluster_rank(), row_rank = rank / p.token_ctas;
  const Place place{rank % p.token_ctas, row_rank % p.row_ctas, row_rank / p.row_ctas};
  m.one_thread([&] {
    for (int i = 0; i < C::kXSlots; ++i) {
      m.init_barrier(smem.x_full(i), 1);
      m.init_barrier(smem.x_empty(i), kWarps * kConsumers * p.row_ctas);
    }
    for (int ring = 0; ring < C::kRings; ++ring) {
      for (int i = 0; i < C::kWSlots; ++i) {
        m.init_barrier(smem.w_full(ring, i), 1);
        m.init_barrier(smem.w_empty(ring, i), kWarps * (C::kPairs ? p.token_ctas : kConsumers));
      }
    }
    for (int i = 0; i < 2 * kConsumers; ++i) {
      m.init_barrier(smem.sums_full(i / 2, i % 2), 1);
      m.init_barrier(smem.sums_empty(i / 2, i % 2), kWarps * p.splits);
    }
  });
  // No CTA may arrive on or copy into one whose barriers are not there yet.
  const int ctas = p.token_ctas * p.row_ctas * p.splits;
  m.cluster_arrive(ctas);
  m.prefetch_map(x_map);
  for (int i = 0; C::kPairs && i < p.layer_count; ++i) m.prefetch_map(y_maps[i]);
  m.start_next_grid();
  m.cluster_wait(ctas);
  const int role = m.role();
  if (role <= kConsumer1) {
    m.template consumer_registers<C::kPairs>();
    Consumer<C, M> consumer(m, p, place, role);
    consumer.run(y_maps);
  } else {
    m.template producer_registers<C::kPairs>();
    if (role == kLoadX) {
      m.one_lane([&] { load_x<C>(m, p, x_map, place); });
    } else if (role < kLoadX + 1 + C::kRings) {
      m.one_lane([&] { load_w<C>(m, p, place, role - kLoadW0); });
    }
  }
  // Each role has waited for what peers still had to send to this CTA or read from it, so it may leave.
}

}  // namespace patch_kernels::sm90
