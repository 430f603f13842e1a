// What a GEMM kernel is told: y (tokens x rows) = x (tokens x cols) * weight^T + bias, the weight packed
// (format/layout.h).
#pragma once

#include <cstdint>

#include "plan.h"

// Kernel bodies are written once: device code under nvcc, host code for the emulators (csrc/emulate).
#if defined(__CUDACC__)
#define PK_BODY __device__ __forceinline__
#else
#define PK_BODY inline
#endif

namespace patch_kernels {

struct GemmProblem {
  const void* x;           // (tokens, cols), row stride x_stride elements; 16-byte aligned rows
  const uint8_t* payload;  // packed tiles
  const void* bias;        // (rows) or null
  void* y;                 // (tokens, rows), contiguous
  int tokens, rows, cols;
  int x_stride;
  Schedule schedule;
  ItemSpace items;
  int token_ctas, row_ctas, splits;  // see LaunchPlan
  bool cut_by_pair;  // units of one row are cut along K like their pair: the same sums from every kernel
};

}  // namespace patch_kernels
