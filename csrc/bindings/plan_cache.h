// Launch plans of a thread's last calls. choose_plan ranks some twenty plans by their model times, which takes as long
// as all else that a call does on the host.
#pragma once

#include <cstdint>

#include "../gemm/plan.h"

namespace patch_kernels {

// All that a plan follows from, beside the device's limits, which are final once a device is usable. It names no memory
// and no layer, so a cached plan cannot go stale.
struct PlanKey {
  int device;
  bool batch_invariant;
  int splits;  // of plan_with_splits, or 0: choose_plan
  int64_t rows, cols, tokens, payload_bytes;

  bool operator==(const PlanKey& o) const {
    return device == o.device && batch_invariant == o.batch_invariant && splits == o.splits && rows == o.rows &&
           cols == o.cols && tokens == o.tokens && payload_bytes == o.payload_bytes;
  }
};

inline LaunchPlan cached_plan(const DeviceLimits& limits, const PlanKey& key) {
  struct Entry {
    PlanKey key{-1, false, 0, 0, 0, 0, 0};
    LaunchPlan plan{};
  };
  constexpr int kBits = 7;  // a model has some ten kinds of layers, and serving some ten numbers of tokens
  static thread_local Entry entries[1 << kBits];
  uint64_t hash = 0;
  for (const int64_t word : {key.rows, key.cols, key.tokens, key.payload_bytes,
                             int64_t{16 * key.device + 2 * key.splits + key.batch_invariant}}) {
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15u;  // multiplicative hashing by the golden ratio
    hash ^= hash >> 32;
  }
  Entry& entry = entries[hash & ((1 << kBits) - 1)];
  if (!(entry.key == key)) {
    entry.plan = key.splits
                     ? plan_with_splits(limits, key.rows, key.cols, key.tokens, key.payload_bytes, key.splits)
                     : choose_plan(limits, key.rows, key.cols, key.tokens, key.payload_bytes, key.batch_invariant);
    entry.key = key;
  }
  return entry.plan;
}

}  // namespace patch_kernels
