// Calls a lambda through the host application's parallel_for.
#pragma once

#include "../ops.h"

namespace patch_kernels {

template <class F>
void parallel_over(ParallelFor parallel, int64_t n, F&& body) {
  if (n <= 0) return;
  parallel(n, [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); }, &body);
}

// A ParallelFor of one thread.
inline void serial(int64_t n, ParallelBody body, void* context) { body(0, n, context); }

}  // namespace patch_kernels
