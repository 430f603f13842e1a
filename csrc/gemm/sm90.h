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
// x), times `splits` CTAs with different columns. Sums of splits are exchanged through distributed shared memory and
// added in rank order. Nothing lives in global memory between launches: no counters to reset, no workspace, so graphs
// and concurrent streams cannot disturb each other.
//
// M is the machine: device PTX (cuda/machine_sm90.cuh) or an emulator with one host thread a role (emulate/). Control
// flow is uniform in a role; what differs from thread to thread goes through each_thread.
#pragma once

#include "problem.h"
#include "wgmma.h"

namespace patch_kernels::sm90 {

constexpr int kConsumers = 2;
enum Role { kConsumer0, kConsumer1, kLoadX, kLoadW0, kLoadW1, kIdle };

constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// kExchangeTokens: tokens of partial sums exchanged at once by a split launch; 0: the kernel does not split.
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

  // Scratch of a consumer: two staging buffers of 16 tokens for stores of y, or partial sums with rows padded so that
  // the eight rows of a quad group fall into different banks.
  static constexpr int kStageTokens = 16;
  static constexpr int kStageBytes = kConsumerRows * kStageTokens * kValueBytes;
  static constexpr int kExchangeStride = kExchangeTokens + (kExchangeTokens >= 32 ? 8 : 0);
  static constexpr int kExchangeBytes = kConsumerRows * kExchangeStride * 4;
  static constexpr int kStoreBytes = kPairs ? 2 * kStageBytes : 0;
  static constexpr int kScratchBytes = round_up(kExchangeBytes > kStoreBytes ? kExchangeBytes : kStoreBytes, 1024);

  static constexpr int kXOffset = 0;
  static constexpr int kWOffset = kXOffset + kXSlots * kXSlotBytes;
  static constexpr int kScratchOffset = kWOffset + kRings * kWSlots * kSparseTileBytes;
  static constexpr int kBarrierOffset = kScratchOffset + kConsumers * kScratchBytes;
  static constexpr int kBarriers = 2 * kXSlots + 2 * kRings * kWSlots + 2 * kConsumers;
  static constexpr int kSmemBytes = kBarrierOffset + 8 * kBarriers;
  static constexpr int kThreads = kPairs ? 384 : 320;

  static_assert(kXSlotBytes % 1024 == 0 && kSparseTileBytes % 1024 == 0, "the swizzle repeats every 1024 bytes");
  static_assert(kBn % (kExchangeTokens ? kExchangeTokens : 1) == 0, "whole chunks");
  static_assert(kSmemBytes <= (kPairs ? 232448 : 115712), "227 KB a CTA; decode leaves room for the next kernel's CTA");
};

using Decode8 = Config<8, false, 8, 5, 8>;
using Decode16 = Config<16, false, 6, 5, 16>;
using Decode32 = Config<32, false, 4, 4, 32>;
using Prefill64 = Config<64, true, 4, 3, 64>;
using Prefill128 = Config<128, true, 4, 3, 32>;
using Prefill160 = Config<160, true, 3, 4, 0>;
using Prefill176 = Config<176, true, 4, 3, 0>;
using Prefill192 = Config<192, true, 4, 3, 0>;

// Calls f with the configuration of a plan; false if there is none.
template <class F>
bool with_config(bool pairs, int bn, F&& f) {
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
      f(Prefill128{});
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
  PK_BODY uint32_t sums_full(int consumer) const {
    return barrier(2 * C::kXSlots + 2 * C::kRings * C::kWSlots + consumer);
  }
  PK_BODY uint32_t sums_empty(int consumer) const { return sums_full(kConsumers + consumer); }
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
  int row;     // tile row, -1: none (the last pair of an odd number of rows)
  int token0;  // first token of this CTA
  Range k;     // tile columns
};

template <class C>
PK_BODY Work work_of(const GemmProblem& p, const Item& item, const Place& place, int row_of_pair) {
  Work work;
  const int pair = C::kPairs ? item.unit * p.row_ctas + place.row_cta : item.unit / 2;
  const int position = C::kPairs ? 2 * pair + row_of_pair : item.unit;
  work.row = position < p.schedule.tile_rows ? p.schedule.order[position] : -1;
  work.token0 = (item.group * p.token_ctas + place.token_cta) * C::kBn;
  const bool by_pair = C::kPairs || p.cut_by_pair;
  const int32_t* cuts = by_pair ? p.schedule.pair_cuts + pair * kCuts : p.schedule.row_cuts + item.unit * kCuts;
  // CTAs that share x walk all columns together, also one whose pair does not exist.
  work.k = p.splits == 1 ? Range{0, p.schedule.tile_cols} : split_range(cuts, p.splits, place.split);
  return work;
}

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
#pragma unroll 1
    for (int step = 2 * work.k.begin; step < 2 * work.k.end; ++step) {
      // The slot of every CTA that shares x must be free: their consumers arrive here as well.
      m.wait(smem.x_empty(ring.slot), ring.parity ^ 1);
      m.arrive_expect(smem.x_full(ring.slot), C::kXSlotBytes);  // counts zero-filled bytes too
      if (turn == place.row_cta) {
        m.copy_x(x_map, smem.x(ring.slot), 64 * step, work.token0, C::kBn, smem.x_full(ring.slot), ranks);
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
    if (work.row < 0) return;
    const uint32_t* entries = p.schedule.tiles + static_cast<int64_t>(work.row) * p.schedule.tile_cols;
    uint32_t next = work.k.begin < work.k.end ? M::load_entry(entries + work.k.begin) : 0;
    for (int k = work.k.begin; k < work.k.end; ++k) {
      const uint32_t entry = next;
      if (k + 1 < work.k.end) next = M::load_entry(entries + k + 1);  // its latency hides behind the waits below
      const uint8_t* source = p.payload + entry_offset(entry);
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
  uint32_t exchange_parity = 0;
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

  PK_BODY void multiply(const Work& work) {
    for (int b = 0; b < C::kBlocks; ++b) m.clear(sums[b]);
    if (work.row < 0) {  // nothing to multiply, but the other consumer's x slots need this one's consent
      for (int step = 2 * work.k.begin; step < 2 * work.k.end; ++step) {
        m.wait(smem.x_full(x.slot), x.parity);
        m.consumer_sync(index);  // elsewhere wgmma keeps the four warps together
        m.arrive_cluster(smem.x_empty(x.slot), sharing_x(p, place));
        x.advance();
      }
      return;
    }
    const uint32_t* entries = p.schedule.tiles + static_cast<int64_t>(work.row) * p.schedule.tile_cols;
    const int end = work.k.end;
    int k = work.k.begin;
    Kind kind = kind_at(entries, k, end);
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

  PK_BODY float bias_at(int row) const { return row < p.rows ? M::load_element(p.bias, row) : 0.0f; }

  PK_BODY void store_element(int token, int row, float sum) {
    if (token < p.tokens && row < p.rows) M::store_element(p.y, static_cast<int64_t>(token) * p.rows + row, sum);
  }

  PK_BODY void add_bias(int row0) {
#pragma unroll
    for (int b = 0; b < C::kBlocks; ++b) {
      m.each_thread([&](int t) {
        float* sum = sums[b].at(t);
        const int row = row0 + 64 * b + fragment_row(t, 0);
        const float bias[2] = {bias_at(row), bias_at(row + 8)};
#pragma unroll
        for (int i = 0; i < C::kBn / 2; ++i) sum[i] += bias[(i >> 1) & 1];
      });
    }
  }

  // Straight from the registers: few tokens.
  PK_BODY void store_direct(int row0, int token0) {
#pragma unroll
    for (int b = 0; b < C::kBlocks; ++b) {
      m.each_thread([&](int t) {
        const float* sum = sums[b].at(t);
#pragma unroll
        for (int i = 0; i < C::kBn / 2; ++i) {
          store_element(token0 + fragment_token(t, i), row0 + 64 * b + fragment_row(t, i), sum[i]);
        }
      });
    }
  }

  // Transposed through shared memory, 16 tokens at a time. If N is a multiple of 8 the copy engine stores them and
  // clips what lies outside y; else its rows are not aligned as a tensor map needs, and the threads store them.
  PK_BODY void store_staged(const typename M::TensorMap& y_map, int row0, int token0) {
    constexpr int kBlockBytes = C::kStageBytes / C::kBlocks;
    const bool by_tensor = p.rows % 8 == 0;
#pragma unroll
    for (int chunk = 0; chunk < C::kBn / C::kStageTokens; ++chunk) {
      const int first = token0 + chunk * C::kStageTokens;
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
        m.commit_stores();
        continue;
      }
      m.each_thread([&](int t) {  // one weight row a thread
        const uint32_t from = stage + t / 64 * kBlockBytes;
        if (row0 + t >= p.rows) return;
#pragma unroll 1
        for (int i = 0; i < C::kStageTokens && first + i < p.tokens; ++i) {
          const uint16_t bits = m.load_half(from + swizzle128(i, kValueBytes * (t % 64)));
          M::store_bits(p.y, static_cast<int64_t>(first + i) * p.rows + row0 + t, bits);
        }
      });
    }
  }

  // Adds the partial sums of the splits in rank order; each CTA finishes its share of the rows.
  PK_BODY void store_exchanged(int row0, int token0) {
    constexpr int kRows = C::kConsumerRows, kTokens = C::kExchangeTokens, kStride = C::kExchangeStride;
    const uint32_t mine = smem.scratch(index);
    const int rows = kRows / p.splits, first = rows * place.split;
    int shift = 0;  // rows is a power of two
    while (1 << shift < rows) ++shift;
#pragma unroll
    for (int chunk = 0; chunk < C::kBn / kTokens; ++chunk) {
      m.wait(smem.sums_empty(index), exchange_parity ^ 1);
#pragma unroll
      for (int b = 0; b < C::kBlocks; ++b) {
        m.each_thread([&](int t) {
          const float* sum = sums[b].at(t) + chunk * (kTokens / 2);
#pragma unroll
          for (int i = 0; i < kTokens / 2; i += 2) {
            const int place_in_row = (64 * b + fragment_row(t, i)) * kStride + fragment_token(t, i);
            m.store_pair(mine + 4 * place_in_row, sum[i], sum[i + 1]);
          }
        });
      }
      m.consumer_sync(index);
      m.publish_cluster(smem.sums_full(index), sharing_sums(p, place));
      m.wait_published(smem.sums_full(index), exchange_parity);
      m.each_thread([&](int t) {
        for (int i = t; i < rows * kTokens; i += 128) {
          const int row = first + (i & (rows - 1)), token = i >> shift;
          float parts[kMaxSplits];  // all loads first, then the sum in rank order
#pragma unroll
          for (int split = 0; split < kMaxSplits; ++split) {
            if (split < p.splits) {
              parts[split] = m.load_remote(mine + 4 * (row * kStride + token), split * p.token_ctas + place.token_cta);
            }
          }
          float sum = parts[0];
#pragma unroll
          for (int split = 1; split < kMaxSplits; ++split) {
            if (split < p.splits) sum += parts[split];
          }
          if (p.bias) sum += bias_at(row0 + row);
          store_element(token0 + chunk * kTokens + token, row0 + row, sum);
        }
      });
      m.consumer_sync(index);
      m.arrive_cluster(smem.sums_empty(index), sharing_sums(p, place));
      exchange_parity ^= 1;
    }
  }

  PK_BODY void store(const typename M::TensorMap& y_map, int row0, int token0) {
    if constexpr (C::kExchangeTokens > 0) {
      if (p.splits > 1) return store_exchanged(row0, token0);
    }
    if (p.bias) add_bias(row0);
    if constexpr (C::kPairs) {
      store_staged(y_map, row0, token0);
    } else {
      store_direct(row0, token0);
    }
  }

  PK_BODY void run(const typename M::TensorMap& y_map) {
    for_each_item(m, p, [&](const Item& item) {
      const Work work = work_of<C>(p, item, place, index);
      multiply(work);
      const int row0 = work.row < 0 ? p.rows : work.row * kTile + (C::kPairs ? 0 : 64 * index);
      store(y_map, row0, work.token0);
    });
    if (p.splits > 1) m.wait_returned(smem.sums_empty(index), exchange_parity ^ 1);
    if constexpr (C::kPairs) m.wait_stores();
  }
};

template <class C, class M>
PK_BODY void tile_gemm(M& m, const GemmProblem& p, const typename M::TensorMap& x_map,
                       const typename M::TensorMap& y_map) {
  const Smem<C> smem{m.smem_base()};
  const int rank = m.cluster_rank(), row_rank = rank / p.token_ctas;
  const Place place{rank % p.token_ctas, row_rank % p.row_ctas, row_rank / p.row_ctas};
  m.one_thread([&] {
    for (int i = 0; i < C::kXSlots; ++i) {
      m.init_barrier(smem.x_full(i), 1);
      m.init_barrier(smem.x_empty(i), kConsumers * p.row_ctas);
    }
    for (int ring = 0; ring < C::kRings; ++ring) {
      for (int i = 0; i < C::kWSlots; ++i) {
        m.init_barrier(smem.w_full(ring, i), 1);
        m.init_barrier(smem.w_empty(ring, i), C::kPairs ? p.token_ctas : kConsumers);
      }
    }
    for (int c = 0; c < kConsumers; ++c) {
      m.init_barrier(smem.sums_full(c), p.splits);
      m.init_barrier(smem.sums_empty(c), p.splits);
    }
  });
  // No CTA may arrive on or copy into one whose barriers are not there yet.
  const int ctas = p.token_ctas * p.row_ctas * p.splits;
  m.cluster_arrive(ctas);
  m.prefetch_map(x_map);
  if constexpr (C::kPairs) m.prefetch_map(y_map);
  m.start_next_grid();
  m.cluster_wait(ctas);
  const int role = m.role();
  if (role <= kConsumer1) {
    m.template consumer_registers<C::kPairs>();
    Consumer<C, M> consumer(m, p, place, role);
    consumer.run(y_map);
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
