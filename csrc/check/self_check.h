// What the first call on a GPU is checked with. The emulators run the same, so that a failure there means the card.
#pragma once

#include <algorithm>
#include <vector>

#include "../gemm/plan.h"
#include "integer_problem.h"

namespace patch_kernels {

// A problem and the launches that must solve it exactly.
struct SelfCheck {
  Sizes sizes;
  int layers;        // that the weight is cut into; one launch computes them
  bool cut_by_pair;  // as batch-invariant calls are
  bool own_tokens;   // layers have rows of x of their own, as experts do
  std::vector<LaunchPlan> plans;
};

// Ragged problems. In each, K is a multiple of 8 for one type only and N for the other, so that both ways to
// store y are taken.
//   small  5 x 3 tiles, two items or more for each worker: rings, buffers and the deal of items go around
//   long   17 tile columns: every ring goes around many times in an item
//   three  the small one as three layers, cut along K as batch-invariant calls are (sm_90)
//   five   the small one as five layers, each with tokens of its own (sm_90)
//   full   as many clusters as the card runs at once, two rounds or more of items: every multiprocessor works beside
//          others, and clusters come to lie as they do in a real call
// All but the last go through every launch shape that the planner can choose, the last through those of one width.
inline std::vector<SelfCheck> self_checks(const DeviceLimits& device, DType dtype) {
  const bool is_half = dtype == DType::kFloat16, is_sm90 = device.family == Family::kSm90;
  const auto sizes = [&](int rows, int cols, int tokens) {
    Sizes s;
    s.rows = rows + (is_half ? 0 : 3);
    s.cols = cols + (is_half ? 0 : 3);
    s.tokens = tokens;
    s.bias = true;
    s.seed = 1;
    return s;
  };
  const Sizes small = sizes(584, 333, 70);
  std::vector<SelfCheck> checks = {{small, 1, false, false, {}}, {sizes(200, 2133, 41), 1, false, false, {}}};
  if (is_sm90) checks.push_back({small, 3, true, false, {}});
  if (is_sm90) checks.push_back({small, 5, false, true, {}});
  for (const PlanChoice& shape : launch_shapes(device)) {
    for (SelfCheck& check : checks) {
      check.plans.push_back(plan_of(device, shape, check.sizes.rows, check.sizes.cols, check.sizes.tokens));
      ItemSpace& items = check.plans.back().items;
      items.workers = item_count(items) >= 4 ? 2 : 1;
    }
  }
  // Four tile rows, which are two pairs, and tokens for twice as many items as clusters of any size.
  const int full_bn = is_sm90 ? 64 : 16, full_tokens = full_bn * std::max(device.sm_count, 2) / (is_sm90 ? 1 : 2) - 1;
  SelfCheck full = {sizes(488, 133, full_tokens), 1, false, false, {}};
  for (const PlanChoice& shape : launch_shapes(device)) {
    if (shape.bn != full_bn) continue;
    full.plans.push_back(plan_of(device, shape, full.sizes.rows, full.sizes.cols, full.sizes.tokens));
  }
  checks.push_back(full);
  return checks;
}

}  // namespace patch_kernels
