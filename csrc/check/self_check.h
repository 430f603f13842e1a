// What the first call on a GPU is checked with. The emulators run the same, so that a failure there means the card.
#pragma once

#include <vector>

#include "../gemm/plan.h"
#include "integer_problem.h"

namespace patch_kernels {

// 3 x 3 tiles, ragged. K is a multiple of 8 for one type only and N for the other, so that both ways to store y are
// taken.
inline Sizes self_check_sizes(DType dtype) {
  const bool is_half = dtype == DType::kFloat16;
  Sizes sizes;
  sizes.rows = is_half ? 328 : 331;
  sizes.cols = is_half ? 333 : 336;
  sizes.tokens = 70;
  sizes.bias = true;
  sizes.seed = 1;
  return sizes;
}

// Every kernel of a family, with the ways its CTAs can work together.
inline std::vector<LaunchPlan> self_check_plans(Family family) {
  const Sizes sizes = self_check_sizes(DType::kFloat16);  // the grid of tiles is the same for all types
  std::vector<LaunchPlan> plans;
  const auto add = [&](bool pairs, int bn, int token_ctas, int row_ctas, int splits, int depth) {
    LaunchPlan plan{};
    plan.family = family;
    plan.pairs = pairs, plan.bn = bn, plan.depth = depth;
    plan.token_ctas = token_ctas, plan.row_ctas = row_ctas, plan.splits = splits;
    plan.items = item_space(plan, sizes.rows, sizes.tokens);
    plan.items.workers = 2;  // several items for each, so that rings and buffers go around
    plans.push_back(plan);
  };
  if (family == Family::kSm90) {
    for (const int bn : {8, 16, 32}) {
      for (const int splits : {1, 2, 8}) add(false, bn, 1, 1, splits, 0);
    }
    for (const int bn : {64, 128, 160, 176, 192}) {
      for (const int token_ctas : {1, 2}) {
        for (const int row_ctas : {1, 2}) add(true, bn, token_ctas, row_ctas, 1, 0);
      }
      if (bn > 128) continue;
      add(true, bn, 2, 1, 2, 0);
      add(true, bn, 1, 1, 8, 0);
    }
  } else {
    for (const int splits : {1, 4}) {
      for (const int bn : {16, 32}) {
        for (const int depth : {2, 4}) add(false, bn, 1, 1, splits, depth);
      }
      for (const int depth : {1, 3}) add(false, 128, 1, 1, splits, depth);
    }
  }
  return plans;
}

}  // namespace patch_kernels
