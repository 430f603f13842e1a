// What a GEMM kernel is told: for each layer y (tokens x rows) = x (tokens x cols) * weight^T + bias, the weight packed
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

constexpr int kMaxLayers = 8;  // that one launch computes: q, k and v, gate and up, or matrices of experts

// A layer of a launch.
struct GemmLayer {
  const uint8_t* payload;  // packed tiles
  const void* bias;        // (rows) or null
  void* y;                 // (tokens, rows), row stride y_stride elements
  int rows;
  int first_unit;  // units of the launch before its own; 0 for the first
  // The layer's own rows of x: all of them, or those that are sent to an expert. sm_90 alone; elsewhere all.
  int first_token, tokens;
  int y_stride;
  Schedule schedule;
};

struct GemmProblem {
  const void* x;  // (tokens, cols), row stride x_stride elements; 16-byte aligned rows. Of all layers
  int tokens, cols;
  int x_stride;
  ItemSpace items;
  int token_ctas, row_ctas, splits;  // see LaunchPlan
  bool cut_by_pair;  // units of one row are cut along K like their pair: the same sums from every kernel
  int layer_count;   // layers of the same x; the sm_80 family takes one
  GemmLayer layers[kMaxLayers];
};

// Gives every layer all tokens, and rows of y that lie one after the other.
inline void share_tokens(GemmProblem& problem) {
  for (int i = 0; i < problem.layer_count; ++i) {
    GemmLayer& layer = problem.layers[i];
    layer.first_token = 0, layer.tokens = problem.tokens, layer.y_stride = layer.rows;
  }
}

// Numbers the layers' units one after the other; a unit takes `rows_per_unit` tile rows.
inline void place_layers(GemmProblem& problem, int rows_per_unit) {
  int units = 0;
  for (int i = 0; i < problem.layer_count; ++i) {
    problem.layers[i].first_unit = units;
    units += static_cast<int>(ceil_div(problem.layers[i].schedule.tile_rows, rows_per_unit));
  }
  problem.items.units = units;
}

}  // namespace patch_kernels
