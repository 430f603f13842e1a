// The self-check of a kernel family on the card: check/self_check.h, run and compared.
#pragma once

#include <string>

#include "../gemm/plan.h"

namespace patch_kernels::cuda {

struct CardCheck {
  bool ran;               // false: the card could not be had (no memory, taken by another process); says nothing of it
  std::string complaint;  // why it did not run, or what was wrong; "" if every result was exact
};

// Runs every kernel of limits.family on the current device and fills limits.clusters. Any thread may be capturing a
// graph meanwhile. Throws nothing.
CardCheck check_family(DeviceLimits& limits);

}  // namespace patch_kernels::cuda
