// The sm_80 machine on a CPU: one thread is one warp, the CTAs of a grid run one after the other. It does what the PTX
// ISA says of each instruction the kernel uses, from the ISA's own fragment tables, and reports what a GPU would let
// pass: addresses out of bounds, illegal metadata, shared memory read before it has arrived, and races.
//
// Races: between two barriers, two warps must not touch the same 16 bytes of shared memory unless both only read. An
// asynchronous copy is a write from its issue to the wait that retires it; nobody may touch its target in between.
// Whichever access comes second reports it, so the result does not depend on how the threads are scheduled.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../gemm/sm80.h"
#include "host.h"

namespace patch_kernels::emulate {

// Errors that tests plant in the machine, to show that they are found.
enum class Fault {
  kNone,
  kLaxWait,        // cp.async.wait_group leaves one group more in flight
  kLostCommit,     // every fourth commit_group is lost, its copies join the next group
  kLostBarrier,    // barrier number fault_index of each CTA is not executed
  kSelector,       // mma.sp reads the other pair of lanes
  kTailGarbage,    // what src-size leaves out is filled with NaN
  kSwizzle,        // x is copied with neighbouring 16-byte units exchanged in odd rows
  kStaleMetadata,  // a metadata load gives what its address held the first time
  kMatrixOrder,    // ldmatrix gives matrices 1 and 2 exchanged
  kPartialSlot,    // split 1 writes its sums where split 0 does
};

enum class CopyTime { kAtIssue, kAtWait };  // the two extremes of when an asynchronous copy may happen

struct Options {
  CopyTime copy_time = CopyTime::kAtWait;
  Fault fault = Fault::kNone;
  int fault_index = 0;
};

struct Memory {
  const uint8_t *begin, *end;
  bool holds(const void* at, int64_t bytes) const {
    const auto* p = static_cast<const uint8_t*>(at);
    return p >= begin && p + bytes <= end;
  }
};

// What the warps of a CTA share. One object serves all CTAs of a grid in turn.
class Cta {
 public:
  Cta(int warps, int smem_bytes, Memory x, Memory payload, const Options& options)
      : x(x), payload(payload), options(options), everyone(warps), smem_(smem_bytes + 16), records_(smem_bytes / 16) {
    shared = smem_.data() + (16 - reinterpret_cast<uintptr_t>(smem_.data()) % 16) % 16;
    smem_size = smem_bytes;
  }

  void start() {
    memset(shared, 0xFF, smem_size);  // NaN in both types
    for (auto& record : records_) record.store(0, std::memory_order_relaxed);
  }

  void report(const char* what) {
    std::lock_guard<std::mutex> lock(report_mutex_);
    if (error.empty()) error = what;
  }

  enum Access { kRead, kWrite, kCopyIssue, kCopyDone };

  // Notes an access to the 16 bytes at `at` by a warp that has passed `epoch` barriers. The records are relaxed
  // atomics: they must not order the plain accesses that ThreadSanitizer watches.
  void note(uint32_t at, int warp, int64_t epoch, Access access) {
    auto& record = records_[at / 16];
    const uint64_t me = uint64_t{1} << warp, others = 0xFF & ~me, now = static_cast<uint64_t>(epoch) << 24;
    uint64_t old = record.load(std::memory_order_relaxed), next;
    const char* fault;
    do {
      // epoch : 40, copies in flight : 8, writers : 8, readers : 8
      const uint64_t flying = old >> 16 & 0xFF;
      const bool same_epoch = old >> 24 == static_cast<uint64_t>(epoch);
      const uint64_t readers = same_epoch ? old & 0xFF : 0, writers = same_epoch ? old >> 8 & 0xFF : 0;
      fault = nullptr;
      next = now | flying << 16 | writers << 8 | readers;
      if (access == kCopyDone) {
        next = (next | me << 8) & ~(me << 16);
      } else if (flying != 0) {
        fault = access == kRead ? "read of shared memory that a copy has not reached" : "write under a copy in flight";
      } else if (access == kRead) {
        next |= me;
        if (writers & others) fault = "race: read of what another warp wrote since the last barrier";
      } else {
        next |= access == kWrite ? me << 8 : me << 16;
        if ((writers | readers) & others) fault = "race: write of what another warp used since the last barrier";
      }
    } while (next != old && !record.compare_exchange_weak(old, next, std::memory_order_relaxed));
    if (fault != nullptr) report(fault);
  }

  const Memory x, payload;
  const Options options;
  Rendezvous everyone;
  Watchdog watchdog;
  uint8_t* shared;
  int64_t smem_size;
  std::string error;

 private:
  std::vector<uint8_t> smem_;
  std::vector<std::atomic<uint64_t>> records_;
  std::mutex report_mutex_;
};

// The policy of gemm/sm80.h for one warp.
template <class Element>
class MachineSm80 {
 public:
  template <class T, int N>
  struct Regs {
    T v[32][N];
    T* at(int lane) { return v[lane]; }
    const T* at(int lane) const { return v[lane]; }
  };
  struct alignas(16) Bytes16 {
    uint32_t words[4];
  };

  MachineSm80(Cta& cta, int warp) : cta_(cta), warp_(warp) {}

  int warp() const { return warp_; }
  int block_x() const { return block_x_; }
  int block_y() const { return block_y_; }
  uint32_t smem() const { return 0; }
  static uint16_t round(float value) { return Element::round(value); }
  static float widen(uint16_t bits) { return Element::widen(bits); }

  // Between CTAs.
  void enter(int x, int y) {
    if (in_flight() != 0) cta_.report("CTA ended with copies in flight");
    groups_.clear();
    groups_.emplace_back();
    block_x_ = x, block_y_ = y, barriers_ = commits_ = 0;
    cta_.everyone.sync(cta_.watchdog, [&] { cta_.start(); });
    ++epoch_;
  }
  void leave() {
    if (in_flight() != 0) cta_.report("CTA ended with copies in flight");
  }

  template <class F>
  void each_lane(F f) {
    for (int lane = 0; lane < 32; ++lane) f(lane);
  }

  void sync() {
    if (cta_.options.fault == Fault::kLostBarrier && barriers_++ == cta_.options.fault_index) return;
    cta_.everyone.sync(cta_.watchdog);
    ++epoch_;
  }

  void copy16(uint32_t to, const void* from) { copy16(to, from, 16); }
  // cp.async.cg 16: `bytes` bytes from global memory, zeros after them.
  void copy16(uint32_t to, const void* from, int bytes) {
    const Fault fault = cta_.options.fault;
    const bool is_x = cta_.x.holds(from, 0) && !cta_.payload.holds(from, 16);
    if (bytes < 0 || bytes > 16) return cta_.report("cp.async: source size not in 0..16");
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) return cta_.report("cp.async: source not 16-byte aligned");
    if (bytes > 0 && !cta_.x.holds(from, bytes) && !cta_.payload.holds(from, bytes)) {
      return cta_.report("cp.async: read out of bounds");
    }
    if (fault == Fault::kSwizzle && is_x && to / 128 % 2 == 1) to ^= 16;
    if (!check(to, 16)) return;
    cta_.note(to, warp_, epoch_, Cta::kCopyIssue);
    const Copy copy{to, from, bytes};
    if (cta_.options.copy_time == CopyTime::kAtIssue) perform(copy);
    groups_.back().push_back(copy);
  }
  void commit() {
    if (cta_.options.fault == Fault::kLostCommit && ++commits_ % 4 == 0) return;
    groups_.emplace_back();
  }
  // cp.async.wait_group: at most kLeft of the committed groups may stay in flight. The last of groups_ is still open.
  template <int kLeft>
  void wait() {
    const size_t left = kLeft + (cta_.options.fault == Fault::kLaxWait ? 1 : 0);
    while (groups_.size() - 1 > left) {
      for (const Copy& copy : groups_.front()) {
        if (cta_.options.copy_time == CopyTime::kAtWait) perform(copy);
        cta_.note(copy.to, warp_, epoch_, Cta::kCopyDone);
      }
      groups_.pop_front();
    }
  }

  // ldmatrix.x4: lanes 8i..8i+7 give the rows of matrix i, 16 bytes each; lane l receives elements 2(l%4), 2(l%4)+1 of
  // row l/4 of each matrix.
  template <class Address>
  void ldmatrix_x4(Regs<uint32_t, 4>& to, Address address) {
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t at = address(lane);
      const int matrix = lane / 8, row = lane % 8;
      uint32_t words[4] = {};
      if (check(at, 16)) {
        cta_.note(at, warp_, epoch_, Cta::kRead);
        memcpy(words, cta_.shared + at, 16);
      }
      const bool exchanged = cta_.options.fault == Fault::kMatrixOrder && (matrix == 1 || matrix == 2);
      for (int q = 0; q < 4; ++q) to.v[4 * row + q][exchanged ? 3 - matrix : matrix] = words[q];
    }
  }

  uint32_t load32(uint32_t at) {
    uint32_t value = 0;
    if (!check(at, 4)) return 0;
    cta_.note(at, warp_, epoch_, Cta::kRead);
    memcpy(&value, cta_.shared + at, 4);
    if (cta_.options.fault == Fault::kStaleMetadata) {
      for (const auto& seen : first_loads_) {
        if (seen.first == at) return seen.second;
      }
      first_loads_.emplace_back(at, value);
    }
    return value;
  }
  Bytes16 load128(uint32_t at) {
    Bytes16 value{};
    if (!check(at, 16)) return value;
    cta_.note(at, warp_, epoch_, Cta::kRead);
    memcpy(&value, cta_.shared + at, 16);
    return value;
  }
  void store16(uint32_t at, uint16_t value) {
    if (!check(at, 2)) return;
    cta_.note(at, warp_, epoch_, Cta::kWrite);
    memcpy(cta_.shared + at, &value, 2);
  }
  void store128(uint16_t* at, const Bytes16& value) {
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0) return cta_.report("store of y not 16-byte aligned");
    memcpy(at, &value, 16);
  }
  void store_partial(float* at, float value) {
    if (cta_.options.fault == Fault::kPartialSlot && block_y_ == 1) at -= partial_stride;
    *at = value;
  }

  // mma.m16n8k16, B in registers 2*k16 and 2*k16+1 of x.
  void mma(Regs<float, 4>& sums, const Regs<uint32_t, 4>& w, const Regs<uint32_t, 4>& x, int k16) {
    float a[16][16], b[16][8];
    gather_a(w, a);
    gather_b<2>(x, 2 * k16, b);
    add_product(sums, [&](int row, float (&sum)[8]) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) sum[n] += a[row][k] * b[k][n];
      }
    });
  }

  // mma.sp::ordered_metadata.m16n8k32: kept value p of a row belongs to columns 4(p/2)..4(p/2)+3, and its place there
  // is two bits of the metadata. Lanes 2*selector and 2*selector+1 of quad g hold rows g (low half) and g+8 (high
  // half), the first lane columns 0..15, the second 16..31.
  template <int kSelector>
  void mma_sp(Regs<float, 4>& sums, const Regs<uint32_t, 4>& w, const Regs<uint32_t, 4>& x,
              const Regs<uint32_t, 1>& meta) {
    const int selector = cta_.options.fault == Fault::kSelector ? 1 - kSelector : kSelector;
    float a[16][16], b[32][8];
    gather_a(w, a);
    gather_b<4>(x, 0, b);
    bool legal = true;
    add_product(sums, [&](int row, float (&sum)[8]) {
      for (int chunk = 0; chunk < 8; ++chunk) {
        const uint32_t word = meta.v[4 * (row % 8) + 2 * selector + chunk / 4][0];
        const int nibble = word >> (16 * (row / 8) + 4 * (chunk % 4)) & 15, first = nibble & 3, second = nibble >> 2;
        legal &= first < second;
        const float *b0 = b[4 * chunk + first], *b1 = b[4 * chunk + second];
        for (int n = 0; n < 8; ++n) sum[n] += a[row][2 * chunk] * b0[n] + a[row][2 * chunk + 1] * b1[n];
      }
    });
    if (!legal) cta_.report("mma.sp: metadata not in increasing order");
  }

  int64_t partial_stride = 0;  // floats of one split, for Fault::kPartialSlot

 private:
  struct Copy {
    uint32_t to;
    const void* from;
    int bytes;
  };

  size_t in_flight() const {
    size_t copies = 0;
    for (const auto& group : groups_) copies += group.size();
    return copies;
  }

  void perform(const Copy& copy) {
    uint8_t data[16];
    memset(data, cta_.options.fault == Fault::kTailGarbage ? 0xFF : 0, 16);
    memcpy(data, copy.from, copy.bytes);
    memcpy(cta_.shared + copy.to, data, 16);
  }

  bool check(uint32_t at, int bytes) {
    if (at % bytes != 0 || int64_t{at} + bytes > cta_.smem_size) {
      cta_.report("shared memory: address out of bounds or not aligned");
      return false;
    }
    return true;
  }

  static float element(uint32_t word, int i) { return Element::widen(static_cast<uint16_t>(word >> (16 * i))); }

  static void gather_a(const Regs<uint32_t, 4>& w, float (&a)[16][16]) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const int row = lane / 4 + (i % 4 < 2 ? 0 : 8), col = lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8);
        a[row][col] = element(w.v[lane][i / 2], i & 1);
      }
    }
  }
  template <int kRegs>
  static void gather_b(const Regs<uint32_t, 4>& x, int first, float (&b)[8 * kRegs][8]) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 2 * kRegs; ++i) {
        b[lane % 4 * 2 + (i & 1) + i / 2 * 8][lane / 4] = element(x.v[lane][first + i / 2], i & 1);
      }
    }
  }
  template <class Row>
  static void add_product(Regs<float, 4>& sums, Row add_row) {
    for (int row = 0; row < 16; ++row) {
      float sum[8];
      float* lanes[8];
      for (int n = 0; n < 8; ++n) {
        lanes[n] = &sums.v[row % 8 * 4 + n / 2][(n & 1) + (row < 8 ? 0 : 2)];
        sum[n] = *lanes[n];
      }
      add_row(row, sum);
      for (int n = 0; n < 8; ++n) *lanes[n] = sum[n];
    }
  }

  Cta& cta_;
  const int warp_;
  int block_x_ = 0, block_y_ = 0, barriers_ = 0, commits_ = 0;
  int64_t epoch_ = 0;
  std::deque<std::vector<Copy>> groups_;
  std::vector<std::pair<uint32_t, uint32_t>> first_loads_;
};

// The launch: all CTAs of the kernel, then the second kernel that adds the splits. Returns the first complaint.
template <class Config, class Element>
std::string run_sm80(const GemmProblem& p, int grid_x, float* partials, Memory x, Memory payload,
                     const Options& options) {
  using M = MachineSm80<Element>;
  constexpr int kWarps = Config::kThreads / 32;
  Cta cta(kWarps, Config::kSmemBytes, x, payload, options);
  std::vector<std::thread> warps;
  for (int warp = 0; warp < kWarps; ++warp) {
    warps.emplace_back([&, warp] {
      try {
        M m(cta, warp);
        m.partial_stride = sm80_partial_index(p, 1, 0, 0);
        for (int block_y = 0; block_y < p.splits; ++block_y) {
          for (int block_x = 0; block_x < grid_x; ++block_x) {
            m.enter(block_x, block_y);
            sm80_tile_linear<Config>(m, p, partials);
            m.leave();
          }
        }
      } catch (const Failure& failure) {
        cta.report(failure.what());
        cta.watchdog.stop = true;
      }
    });
  }
  for (auto& warp : warps) warp.join();
  if (p.splits > 1 && !cta.watchdog.stop) {
    for (int64_t thread = 0; thread < sm80_add_threads(p); ++thread) sm80_add_splits<M>(p, partials, thread);
  }
  return cta.error;
}

}  // namespace patch_kernels::emulate
