// The Hopper machine on the host: each role of a CTA is a thread, shared memory is plain memory, so that a missing
// synchronisation is a data race for ThreadSanitizer and a wrong result for the test.
//
// What the hardware does later is done later here: wgmma reads its operands (metadata registers too) when its group is
// retired, so a slot given back too early is read after it was overwritten. Copies into shared memory complete on
// mbarriers with counts, transaction bytes and parity. The emulator also refuses what it can see is undefined: two
// instruction shapes in flight on the same accumulators, accumulators touched without fence or wait, illegal metadata,
// addresses outside shared memory, barriers that over-complete. A thread that waits too long reports a deadlock.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "../gemm/sm90.h"
#include "../math/elements.h"
#include "host.h"

namespace patch_kernels::emulate {

// A defect planted into the machine or the schedule; each must be noticed (main_sm90.cpp).
enum class Fault {
  kNone,
  kWrongParity,         // waits for full x slots with the other parity
  kWrongBytes,          // expects 2048 bytes too few of a sparse slot
  kMissingRelease,      // one x slot is never given back
  kEarlyRelease,        // a step retires one group too few before it gives slots back
  kSwappedSelector,     // sparsity selectors 0 and 1 exchanged
  kMissingDrain,        // no drain where dense and sparse meet
  kMissingFence,        // no wgmma fence
  kUnicast,             // weights reach only the CTA that copies them
  kLocalRelease,        // a W slot is given back to its own CTA only
  kLocalCount,          // and the barrier counts only that
  kMissingSumsWait,     // partial sums are read before all are there
  kMissingSumsRelease,  // and overwritten before all are read
  kShortPush,           // a push leaves out the last 16 bytes, though its barrier counts them
  kNoZeroFill,          // garbage beyond the edges of x
  kNoSwizzle,           // x lies unswizzled
  kShiftedMetadata,     // metadata of the neighbouring thread
  kMissingStoreWait,    // a staging buffer is refilled before it was stored
  kMissingProxyFence,   // staged y, or sums to push, are not made visible to the copy engine
  kNotReturned,         // a CTA does not wait for the last arrivals of its peers
  kCutShort,            // a split ends one tile early
  kOtherTokens,         // a layer takes the rows of x of another
  kMoreTokens,          // a layer stores one row of y too many
};

struct FaultPlan {
  Fault fault = Fault::kNone;
  std::chrono::microseconds retire_delay{0};  // lets producers run ahead before a group is retired
  std::chrono::seconds patience{20};          // with a wait before it is called a deadlock
  bool late_arrivals = false;                 // those of other CTAs, and what they push, take a millisecond
};

// mbarrier of the PTX ISA: a phase completes when all arrivals and all transaction bytes are in.
class Barrier {
 public:
  void init(int count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    count_ = pending_ = count;
    bytes_ = 0;
    phase_ = 0;
  }
  void arrive(int64_t expected_bytes = 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    require(count_ > 0, "arrive on a barrier that was not initialised");
    require(pending_ > 0, "more arrivals than the barrier counts");
    --pending_;
    bytes_ += expected_bytes;
    complete_phase();
  }
  void complete_bytes(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    require(count_ > 0, "copy into a barrier that was not initialised");
    bytes_ -= bytes;
    complete_phase();
  }
  // Blocks until the phase of this parity has completed.
  void wait(uint32_t parity, const Watchdog& watchdog) {
    std::unique_lock<std::mutex> lock(mutex_);
    watchdog.wait(lock, condition_, [&] { return (phase_ & 1) != parity; });
  }

 private:
  void complete_phase() {
    if (pending_ != 0 || bytes_ != 0) return;
    pending_ = count_;
    ++phase_;
    condition_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable condition_;
  int count_ = 0, pending_ = 0;
  int64_t bytes_ = 0;
  uint32_t phase_ = 0;
};

// What a barrier guards, so that a fault can pick its victims.
enum BarrierKind { kXFull, kXEmpty, kWFull, kWEmpty, kSumsFull, kSumsEmpty };

template <class Config>
BarrierKind barrier_kind(int index) {
  const sm90::Smem<Config> smem{0};
  const auto before = [&](uint32_t address) { return smem.barrier(index) < address; };
  return before(smem.x_empty(0))         ? kXFull
         : before(smem.w_full(0, 0))     ? kXEmpty
         : before(smem.w_empty(0, 0))    ? kWFull
         : before(smem.sums_full(0, 0))  ? kWEmpty
         : before(smem.sums_empty(0, 0)) ? kSumsFull
                                         : kSumsEmpty;
}

struct Cta {
  static constexpr uint32_t kBase = 4096;  // shared memory does not start at address 0
  Cta(int smem_bytes, int barriers)
      : smem(smem_bytes, 0xFF), barriers(barriers) {}  // 0xFFFF is a NaN in fp16, bf16 and fp32
  std::vector<uint8_t> smem;
  std::deque<Barrier> barriers;
  std::vector<BarrierKind> kinds;
  uint32_t barrier_base = 0;
  std::atomic<int> roles{0};  // that have not ended; a CTA leaves with the last

  uint8_t* at(uint32_t address, int bytes) {
    require(address >= kBase && address - kBase + bytes <= smem.size(), "address outside shared memory");
    return smem.data() + (address - kBase);
  }
  Barrier& barrier(uint32_t address) {
    const uint32_t index = (address - barrier_base) / 8;
    require(address >= barrier_base && address % 8 == 0 && index < barriers.size(), "not the address of a barrier");
    return barriers[index];
  }
};

struct Cluster {
  Cluster(int ctas, int roles, int smem_bytes, int barriers, const FaultPlan& plan)
      : faults(plan), everyone(ctas * roles) {
    watchdog.patience = plan.patience;
    for (int i = 0; i < ctas; ++i) cta.emplace_back(smem_bytes, barriers).roles = roles;
  }

  // What is on its way for a while, as between SMs. f(cta) is done when it gets to the CTA of that rank.
  template <class F>
  void later(int rank, F&& f) {
    const std::lock_guard<std::mutex> lock(mutex_);
    on_the_way_.emplace_back([this, rank, f] {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      try {
        require(cta[rank].roles > 0, "an arrival finds that its CTA has left");
        f(cta[rank]);
      } catch (const Failure& failure) {
        complain(failure.what());
      }
    });
  }
  void complain(const std::string& what) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (complaint_.empty()) complaint_ = what;
    watchdog.stop = true;
  }
  // After all roles have ended: "" or what went wrong.
  std::string verdict() {
    for (std::thread& arrival : on_the_way_) arrival.join();
    return complaint_;
  }

  FaultPlan faults;
  std::deque<Cta> cta;
  Rendezvous everyone;
  Watchdog watchdog;
  std::atomic<int64_t> weight_bytes{0};  // read from global memory

 private:
  std::mutex mutex_;
  std::string complaint_;
  std::vector<std::thread> on_the_way_;
};

template <class Element>
class Machine {
 public:
  struct TensorMap {
    uint16_t* data;
    int64_t rows, cols, stride;  // elements
  };

  template <class T, int N>
  struct Regs {
    T value[128][N];
    bool fenced = false;
    int in_flight = 0;
    T* at(int t) { return value[t]; }
    Regs() { memset(value, 0xFF, sizeof(value)); }
  };

  Machine(Cluster& cluster, int index, int rank, int role)
      : cluster_(cluster), cta_(cluster.cta[rank]), index_(index), rank_(rank), role_(role) {}

  // Where am I.
  int cluster() const { return index_; }
  int cluster_rank() const { return rank_; }
  int role() const { return role_; }
  uint32_t smem_base() const { return Cta::kBase; }
  template <class F>
  void one_thread(F&& f) {
    if (role_ == 0) f();
  }
  template <class F>
  void one_lane(F&& f) {
    f();
  }
  template <class F>
  void each_thread(F&& f) {
    for (int t = 0; t < 128; ++t) f(t);
  }
  template <bool>
  void consumer_registers() {}
  template <bool>
  void producer_registers() {}
  void wait_for_previous_grid() {}
  void start_next_grid() {}

  // Barriers.
  void init_barrier(uint32_t address, int count) {
    if (has(Fault::kLocalCount) && kind(address) == kWEmpty) count = sm90::kWarps;
    if (has(Fault::kLocalCount) && kind(address) == kXEmpty) count = sm90::kWarps * sm90::kConsumers;
    cta_.barrier(address).init(count);
  }
  void cluster_arrive(int) {}
  void cluster_wait(int) { cluster_.everyone.sync(cluster_.watchdog); }
  void prefetch_map(const TensorMap&) {}
  void consumer_sync(int) {}  // a consumer is one thread here
  void wait(uint32_t address, uint32_t parity) {
    if (has(Fault::kWrongParity) && kind(address) == kXFull) parity ^= 1;
    if (has(Fault::kMissingSumsWait) && kind(address) == kSumsFull) return;
    if (has(Fault::kMissingSumsRelease) && kind(address) == kSumsEmpty) return;
    cta_.barrier(address).wait(parity, cluster_.watchdog);
  }
  void arrive_expect(uint32_t address, int bytes) {
    if (has(Fault::kWrongBytes) && bytes == kSparseTileBytes) bytes -= kMetaBytes;
    cta_.barrier(address).arrive(bytes);
  }
  void arrive_cluster(uint32_t address, const sm90::Ranks& ranks) {
    const bool is_shared = kind(address) == kWEmpty || kind(address) == kXEmpty;
    if (has(Fault::kMissingRelease) && kind(address) == kXEmpty && ++releases_ == 3) return;
    for (int i = 0; i < ranks.count; ++i) {
      const int rank = ranks.first + i * ranks.stride;
      if ((has(Fault::kLocalRelease) || has(Fault::kLocalCount)) && is_shared && rank != rank_) continue;
      reach(rank, [address](Cta& cta) {
        for (int warp = 0; warp < sm90::kWarps; ++warp) cta.barrier(address).arrive();
      });
    }
  }
  void warp_sync() {}

  void wait_returned(uint32_t address, uint32_t parity) {
    if (!has(Fault::kNotReturned)) wait(address, parity);
  }

  // Copies into shared memory.
  void copy_x(const TensorMap& map, uint32_t to, int col, int token, int tokens, uint32_t barrier,
              const sm90::Ranks& ranks) {
    for (int t = 0; t < tokens; ++t) {
      for (int c = 0; c < 64; ++c) {
        const bool inside = token + t < map.rows && col + c < map.cols;
        uint16_t value = inside ? map.data[(token + t) * map.stride + col + c] : 0;
        if (!inside && has(Fault::kNoZeroFill)) value = 0x7FFF;
        const int offset = has(Fault::kNoSwizzle) ? 128 * t + 2 * c : swizzle128(t, 2 * c);
        for_each_target(ranks, [&](Cta& cta) { memcpy(cta.at(to + offset, 2), &value, 2); });
      }
    }
    for_each_target(ranks, [&](Cta& cta) { cta.barrier(barrier).complete_bytes(tokens * 128); });
  }
  void copy_w(uint32_t to, const uint8_t* from, int bytes, uint32_t barrier, const sm90::Ranks& ranks) {
    require(to % 16 == 0 && bytes % 16 == 0, "bulk copies are made of aligned 16-byte units");
    cluster_.weight_bytes += bytes;
    for_each_target(ranks, [&](Cta& cta) {
      memcpy(cta.at(to, bytes), from, bytes);
      cta.barrier(barrier).complete_bytes(bytes);
    });
  }

  // Registers.
  template <int N>
  void clear(Regs<float, N>& sums) {
    touch(sums);
    memset(sums.value, 0, sizeof(sums.value));
  }
  template <int N>
  void own(Regs<float, N>& sums) {
    require(sums.in_flight == 0, "accumulators read while an instruction writes them");
    sums.fenced = false;
  }
  void load_words(Regs<uint32_t, 2>& words, uint32_t address) {
    const int shift = has(Fault::kShiftedMetadata) ? 1 : 0;
    for (int t = 0; t < 128; ++t) memcpy(words.value[t], cta_.at(address + 8 * (t ^ shift), 8), 8);
  }

  // wgmma.
  void fence() { fence_pending_ = !has(Fault::kMissingFence); }
  template <int kBn>
  void mma_dense(Regs<float, kBn / 2>& sums, uint64_t a, uint64_t b) {
    issue<kBn>(sums, a, b, nullptr, 0, 0);
  }
  template <int kBn, int kSelector>
  void mma_sparse(Regs<float, kBn / 2>& sums, uint64_t a, uint64_t b, Regs<uint32_t, 2>& meta, int word) {
    issue<kBn>(sums, a, b, &meta, word, has(Fault::kSwappedSelector) ? 1 - kSelector : kSelector);
  }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  template <int kLeft>
  void wait_groups() {
    if (kLeft == 0 && has(Fault::kMissingDrain) && !groups_.empty() && ++drains_ == 1) return;
    const size_t left = kLeft + (kLeft == 1 && has(Fault::kEarlyRelease) ? 1 : 0);
    if (groups_.size() > left && cluster_.faults.retire_delay.count()) {
      std::this_thread::sleep_for(cluster_.faults.retire_delay);
    }
    while (groups_.size() > left) {
      for (auto& run : groups_.front()) run();
      groups_.pop_front();
    }
  }

  // Stores of y.
  template <class F>
  void store_transposed(uint32_t block, F&& words_of) {
    uint32_t words[128][4];
    for (int t = 0; t < 128; ++t) words_of(t, words[t]);
    // stmatrix.trans: matrix j, row r, columns 2c and 2c+1 are in lane 4*r + c; its column i goes to the address that
    // lane 8*j + i gives.
    for (int warp = 0; warp < 4; ++warp) {
      for (int j = 0; j < 4; ++j) {
        for (int i = 0; i < 8; ++i) {
          uint8_t* to = cta_.at(block + stage_offset(32 * warp + 8 * j + i), 16);
          for (int r = 0; r < 8; ++r) {
            const uint32_t word = words[32 * warp + 4 * r + i / 2][j];
            const uint16_t half = static_cast<uint16_t>(i & 1 ? word >> 16 : word);
            memcpy(to + 2 * r, &half, 2);
          }
        }
      }
    }
    unfenced_ = true;
  }
  void fence_async_proxy() {
    if (!has(Fault::kMissingProxyFence)) unfenced_ = false;
  }
  // A store reads its staging buffer when it is waited for, as late as the hardware may.
  void copy_y(const TensorMap& map, uint32_t from, int row, int token) {
    require(!unfenced_, "the copy engine reads shared memory that was not fenced");
    store_open_.push_back({map, from, row, token});
  }
  void commit_stores() {
    store_groups_.push_back(std::move(store_open_));
    store_open_.clear();
  }
  void wait_stores_read() {
    if (!has(Fault::kMissingStoreWait)) finish_stores(1);
  }
  void wait_stores() { finish_stores(0); }

  uint16_t load_half(uint32_t address) {
    uint16_t bits;
    memcpy(&bits, cta_.at(address, 2), 2);
    return bits;
  }
  static void store_bits(void* to, int64_t index, uint16_t bits) { static_cast<uint16_t*>(to)[index] = bits; }

  // Exchange of partial sums.
  template <class F>
  void each_of(int count, F&& f) {
    for (int i = 0; i < count; ++i) f(i);
  }
  void push(uint32_t to, uint32_t from, int bytes, uint32_t barrier, int rank) {
    require(!unfenced_, "the copy engine reads shared memory that was not fenced");
    require(to % 16 == 0 && from % 16 == 0 && bytes % 16 == 0, "bulk copies are made of aligned 16-byte units");
    require(rank != rank_, "a CTA pushes to itself");
    const int copied = bytes - (has(Fault::kShortPush) ? 16 : 0);
    reach(rank, [=, &own = cta_](Cta& cta) {  // this machine may have ended by then, its CTA not
      require(own.roles > 0, "a push reads from a CTA that has left");
      memcpy(cta.at(to, copied), own.at(from, copied), copied);
      cta.barrier(barrier).complete_bytes(bytes);
    });
  }
  void store_float(uint32_t address, float value) {
    memcpy(cta_.at(address, 4), &value, 4);
    unfenced_ = true;
  }
  void load_four(float (&values)[4], uint32_t address) {
    require(address % 16 == 0, "a load of 16 bytes is not aligned");
    memcpy(values, cta_.at(address, 16), 16);
  }

  static uint32_t load_entry(const uint32_t* entry) { return *entry; }
  static int load_row(const int32_t* row) { return *row; }
  static float load_element(const void* from, int index) {
    return Element::widen(static_cast<const uint16_t*>(from)[index]);
  }
  static void store_element(void* to, int64_t index, float value) {
    static_cast<uint16_t*>(to)[index] = Element::round(value);
  }
  static void store_four(void* to, int64_t index, uint32_t low, uint32_t high) {
    require(index % 4 == 0, "a store of 8 bytes is not aligned");
    const uint32_t words[2] = {low, high};
    memcpy(static_cast<uint16_t*>(to) + index, words, 8);
  }
  static uint32_t pack(float low, float high) {
    return static_cast<uint32_t>(Element::round(high)) << 16 | Element::round(low);
  }

 private:
  bool has(Fault fault) const { return cluster_.faults.fault == fault; }
  Cta& peer(int rank) {
    require(rank >= 0 && rank < static_cast<int>(cluster_.cta.size()), "no CTA of that rank in the cluster");
    return cluster_.cta[rank];
  }
  // Does f to a CTA: at once, or after a while if it is another one and the plan says so.
  template <class F>
  void reach(int rank, F&& f) {
    if (rank != rank_ && cluster_.faults.late_arrivals) {
      cluster_.later(rank, f);
    } else {
      f(peer(rank));
    }
  }
  // The CTAs that a copy goes to.
  template <class F>
  void for_each_target(const sm90::Ranks& ranks, F&& f) {
    for (int i = 0; i < ranks.count; ++i) {
      const int rank = ranks.first + i * ranks.stride;
      if (has(Fault::kUnicast) && rank != rank_) continue;
      f(peer(rank));
    }
  }
  BarrierKind kind(uint32_t address) const { return cta_.kinds[(address - cta_.barrier_base) / 8]; }

  template <int N>
  void touch(Regs<float, N>& sums) {
    require(sums.in_flight == 0, "accumulators written while an instruction writes them");
    sums.fenced = false;
    fence_pending_ = false;
  }

  template <int kBn>
  void issue(Regs<float, kBn / 2>& sums, uint64_t a, uint64_t b, Regs<uint32_t, 2>* meta, int word, int selector) {
    if (fence_pending_) sums.fenced = true;
    require(sums.fenced, "wgmma on registers that were not fenced");
    const int shape = meta ? 2 : 1;
    require(sums.in_flight == 0 || sums.in_flight % 4 == shape, "two instruction shapes in flight on one accumulator");
    sums.in_flight = sums.in_flight == 0 ? 4 + shape : sums.in_flight + 4;
    open_.push_back([this, &sums, a, b, meta, word, selector] {
      multiply<kBn>(sums, a, b, meta, word, selector);
      sums.in_flight -= 4;
      if (sums.in_flight < 4) sums.in_flight = 0;
    });
  }

  uint32_t descriptor_address(uint64_t descriptor) const {
    require((descriptor >> 62) == 1 && (descriptor >> 32 & 0x3FFF) == 64, "not a descriptor of 128-byte swizzled rows");
    return static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
  }
  // `bytes` of row r from a descriptor's start: the hardware XORs address bits 4-6 with bits 7-9.
  float element(uint32_t start, int r, int column) {
    uint32_t address = start + 1024 * (r / 8) + 128 * (r % 8) + 2 * column;
    address ^= (address >> 7 & 7) << 4;
    uint16_t bits;
    memcpy(&bits, cta_.at(address, 2), 2);
    return Element::widen(bits);
  }

  // A sparse instruction's column of kept value p in row r: metadata of group p/2 of 8, PTX ISA "Sparse matrix
  // storage".
  static int sparse_column(const Regs<uint32_t, 2>& meta, int word, int selector, int r, int p) {
    const int group = p / 2;                                                           // of four columns
    const int thread = 32 * (r / 16) + 4 * (r % 8) + 2 * selector + (group >> 2 & 1);  // two threads of a quad
    const int nibble = meta.value[thread][word] >> (16 * (r / 8 % 2) + 4 * (group & 3)) & 15;
    require(is_legal_nibble(nibble), "illegal sparse metadata");
    return 4 * group + (p & 1 ? nibble >> 2 : nibble & 3);
  }

  template <int kBn>
  void multiply(Regs<float, kBn / 2>& sums, uint64_t a, uint64_t b, const Regs<uint32_t, 2>* meta, int word,
                int selector) {
    const uint32_t a_start = descriptor_address(a), b_start = descriptor_address(b);
    const int depth = meta ? 32 : 16;
    std::vector<float> x(depth * kBn);  // [column][token]
    for (int token = 0; token < kBn; ++token) {
      for (int k = 0; k < depth; ++k) x[k * kBn + token] = element(b_start, token, k);
    }
    float row_sums[kBn];
    for (int r = 0; r < 64; ++r) {
      for (float& sum : row_sums) sum = 0;
      for (int i = 0; i < 16; ++i) {
        const float value = element(a_start, r, i);
        const float* column = &x[(meta ? sparse_column(*meta, word, selector, r, i) : i) * kBn];
        for (int token = 0; token < kBn; ++token) row_sums[token] += value * column[token];
      }
      for (int token = 0; token < kBn; ++token) {
        const int t = 32 * (r / 16) + 4 * (r % 8) + token % 8 / 2;
        sums.value[t][(token & 1) + 2 * (r / 8 % 2) + 4 * (token / 8)] += row_sums[token];
      }
    }
  }

  struct Store {
    TensorMap map;
    uint32_t from;
    int row, token;
  };
  void finish_stores(size_t left) {
    while (store_groups_.size() > left) {
      for (const Store& store : store_groups_.front()) {
        for (int t = 0; t < 16 && store.token + t < store.map.rows; ++t) {
          for (int c = 0; c < 64 && store.row + c < store.map.cols; ++c) {
            memcpy(&store.map.data[(store.token + t) * store.map.stride + store.row + c],
                   cta_.at(store.from + swizzle128(t, 2 * c), 2), 2);
          }
        }
      }
      store_groups_.pop_front();
    }
  }

  Cluster& cluster_;
  Cta& cta_;
  const int index_, rank_, role_;
  int releases_ = 0, drains_ = 0;
  bool fence_pending_ = false, unfenced_ = false;
  std::vector<std::function<void()>> open_;
  std::deque<std::vector<std::function<void()>>> groups_;
  std::vector<Store> store_open_;
  std::deque<std::vector<Store>> store_groups_;
};

}  // namespace patch_kernels::emulate
