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

// That one launch computes: q, k and v; gate and up; gate and up of eight experts. With a tensor map for each the
// kernel's parameters fill their 4 KB.
constexpr int kMaxLayers = 16;

// A layer of a launch.
struct GemmLayer {
  const uint8_t* payload;  // packed tiles
  const void* bias;        // (rows) or null
  void* y;                 // (tokens, rows), row stride y_stride elements, a multiple of rows
  int rows;
  Schedule schedule;
  // The layer's own rows of x: all of them, or those that are sent to an expert. The sm_80 family takes all.
  int first_token = 0, tokens = 0;
  int y_stride = 0;
};

struct GemmProblem {
  const void* x;  // (tokens, cols), row stride x_stride elements; 16-byte aligned rows. Of all layers
  int tokens, cols;
  int x_stride;
  ItemSpace items;
  int token_ctas, row_ctas, splits;  // see LaunchPlan
  bool cut_by_pair;            // units of one row are cut along K like their pair: the same sums from every kernel
  int layer_count;             // layers of the same x; the sm_80 family takes one
  int first_unit[kMaxLayers];  // of each layer: units of those before it. INT32_MAX where there is no layer
  GemmLayer layers[kMaxLayers];
};

// Gives every layer all tokens, and rows of y that lie one after the other.
inline void share_tokens(GemmProblem& problem) {
  for (int i = 0; i < problem.layer_count; ++i) {
    GemmLayer& layer = problem.layers[i];
    layer.first_token = 0, layer.tokens = problem.tokens, layer.y_stride = layer.rows;
  }
}

// A launch of one of the layers, whose rows of x are all there are.
inline GemmProblem alone(const GemmProblem& problem, int index) {
  GemmProblem one = problem;
  GemmLayer& layer = one.layers[0] = problem.layers[index];
  one.layer_count = 1;
  one.tokens = layer.tokens;
  one.x = static_cast<const uint16_t*>(problem.x) + static_cast<int64_t>(layer.first_token) * problem.x_stride;
  layer.first_token = 0;
  return one;
}

// Numbers the layers' units one after the other; a unit takes `rows_per_unit` tile rows.
inline void place_layers(GemmProblem& problem, int rows_per_unit) {
  int units = 0;
  for (int i = 0; i < kMaxLayers; ++i) {
    const bool is_there = i < problem.layer_count;
    problem.first_unit[i] = is_there ? units : INT32_MAX;
    if (is_there) units += static_cast<int>(ceil_div(problem.layers[i].schedule.tile_rows, rows_per_unit));
  }
  problem.items.units = units;
}

}  // namespace patch_kernels
