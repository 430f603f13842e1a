// Every launcher on one screen: plain C++ between the torch bindings (csrc/bindings) and the kernels (csrc/cpu,
// csrc/cuda). Pointers are to contiguous row-major memory on the launcher's device; sizes are in elements.
#pragma once

#include <cstdint>
#include <string>

namespace patch_kernels {

enum class DType { kFloat16, kBFloat16, kFloat32, kFloat64 };

// A layer's weight (rows = N = out_features, cols = K = in_features) in packed format v1 (format/layout.h).
struct TiledMatrix {
  const uint8_t* payload;
  const uint8_t* tile_is_sparse;  // ceil(rows/128) x ceil(cols/128), 0 or 1
  int64_t rows;
  int64_t cols;
};

struct TileLinearArgs {
  const void* x;     // (tokens, cols)
  const void* bias;  // (rows) or null
  void* y;           // (tokens, rows)
  int64_t tokens;
  TiledMatrix weight;
  DType dtype;                   // of x, weight, bias and y; fp16 or bf16
  bool batch_invariant = false;  // row i of y has the same bits for any number of tokens
  int threads = 1;               // that work is dealt out for, on a CPU; bits do not depend on it
  // On a CPU tokens may be any rows of x and y, for experts of a mixture:
  const int64_t* x_rows = nullptr;  // (tokens) row of x of each, or null: in order
  const int64_t* y_rows = nullptr;  // (tokens) row of y of each, or null: in order
  int64_t y_stride = 0;             // values from a row of y to the next; 0: the weight's rows
};

// See patch_kernels.masked_weight in Python for the mathematics.
struct MaskedWeightArgs {
  const void* weight;            // (rows, cols), cols % 4 == 0
  const void* pattern_logits;    // (rows*cols/4, 6) or null
  const uint8_t* fixed_pattern;  // two groups a byte, or null
  const void* tile_logits;       // ceil(rows/tile_rows) x ceil(cols/tile_cols), or null
  // What changes from step to step lies in memory of the weight's device: a replayed CUDA graph sees the new values.
  const double* factors;  // (4): 1/temperature and scale/temperature of the patterns, the same of the tiles
  const int64_t* key;     // (2): seed and draw of the noise, or null: no noise
  int64_t rows, cols, tile_rows, tile_cols;
  bool hard_pattern, hard_tile;
  uint32_t layer;
  DType dtype;          // of weight
  DType pattern_dtype;  // of pattern_logits: fp64 if weight is, else fp32 or bf16; tile logits: fp64 or fp32
};

struct MaskedWeightGrads {
  const void* grad_masked;    // like weight
  const double* grad_sums;    // (2)
  void* grad_pattern_logits;  // like pattern_logits, null where there are none
  void* grad_tile_logits;     // like tile_logits, null where there are none
  void* masked;               // the forward result once more, or null
};

constexpr int kAdamWBlock = 256;  // values of an 8-bit moment that share a scale

// Everything of an AdamW step that is the same for all values.
struct AdamWFactors {
  float grad_share, beta2, square_share;  // 1 - beta1, beta2, 1 - beta2
  float decay;                            // 1 - lr * weight_decay
  float step_size, root_factor, eps;      // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
};

// See patch_kernels.adamw_step in Python.
struct AdamWArgs {
  void* param;
  const void* grad;  // like param
  void* exp_avg;
  void* exp_avg_sq;
  float* exp_avg_scale;     // ceil(elems/kAdamWBlock) with 8-bit moments, else null
  float* exp_avg_sq_scale;  // the same
  const float* grad_scale;  // one value, or null
  int64_t elems;
  AdamWFactors factors;
  uint64_t seed;
  uint32_t stream, step;
  DType param_type;  // fp32 or bf16
  int moment_bits;   // 32 (fp32), 16 (bf16) or 8 (codes of math/adamw.h)
};

// First violation found while packing: a sparse tile's group that does not keep exactly two (see pack_tiles).
struct PackError {
  int64_t count;  // offending groups
  int64_t row;    // of the first
  int64_t col;
};

struct DenseLinearArgs {
  const void *x, *weight, *bias;  // (tokens, cols), (rows, cols), (rows) or null
  void* y;                        // (tokens, rows)
  int64_t tokens, rows, cols;
  DType dtype;  // of all; fp16 or bf16
};

// The kernels of tile_linear on a CPU. kTorch: unpacked block by block and multiplied by torch (bindings/cpu.cpp).
enum class CpuKernel { kFew, kMany, kTorch };

// Runs body(begin, end, context) over [0, n) on the threads of the host application.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t n, ParallelBody body, void* context);

// The CPU ops that are compiled once per instruction set: name, parameters, arguments. cpu/isa.h declares each of them
// for every set and cpu/dispatch.cpp picks one.
#define PK_CPU_OPS(OP)                                                                                              \
  OP(choose_kernel, (const TileLinearArgs& call, CpuKernel& kernel), (call, kernel))                                \
  /* weights of the same cols and dtype, each times its tokens; neighbours that share them are one piece of work */ \
  OP(tile_linear, (const TileLinearArgs* calls, int count, CpuKernel kernel, ParallelFor parallel),                 \
     (calls, count, kernel, parallel))                                                                              \
  /* done: false where torch is to do it */                                                                         \
  OP(dense_linear, (const DenseLinearArgs& args, bool& done, ParallelFor parallel), (args, done, parallel))         \
  /* masked like weight; sums (2) fp64 */                                                                           \
  OP(masked_weight, (const MaskedWeightArgs& args, void* masked, double* sums, ParallelFor parallel),               \
     (args, masked, sums, parallel))                                                                                \
  OP(masked_weight_backward, (const MaskedWeightArgs& args, const MaskedWeightGrads& grads, ParallelFor parallel),  \
     (args, grads, parallel))                                                                                       \
  OP(adamw_step, (const AdamWArgs& args, ParallelFor parallel), (args, parallel))

#define PK_DECLARE_OP(name, parameters, arguments) void name parameters;

namespace cpu {
int64_t payload_bytes(const uint8_t* tile_is_sparse, int64_t tiles);
PackError pack_tiles(const uint16_t* weight, const bool* keep, const uint8_t* tile_is_sparse, int64_t rows,
                     int64_t cols, uint8_t* payload, ParallelFor parallel);
void unpack_tiles(const TiledMatrix& matrix, uint16_t* weight, ParallelFor parallel);
PK_CPU_OPS(PK_DECLARE_OP)
// The one that PATCH_KERNELS_CPU_KERNEL names, or that costs least (cpu/costs.h).
CpuKernel kernel_of(const TileLinearArgs& call);
const char* instruction_set();   // in use
std::string instruction_sets();  // that this CPU has, least first, with spaces between
}  // namespace cpu

struct Schedule;  // gemm/plan.h

namespace cuda {
// stream is a cudaStream_t. All throw std::runtime_error with the CUDA error's text if a launch fails.
// payload and weight start at multiples of 16 bytes; schedule: the layer's, or one without tiles.
void unpack_tiles(const TiledMatrix& matrix, const Schedule& schedule, uint16_t* weight, void* stream);
// partial_sums: (tile rows, tile cols, 2) fp64 workspace.
void masked_weight(const MaskedWeightArgs& args, void* masked, double* partial_sums, double* sums, void* stream);
void masked_weight_backward(const MaskedWeightArgs& args, const MaskedWeightGrads& grads, void* stream);
// param, grad and moments start at multiples of 16 bytes.
void adamw_step(const AdamWArgs& args, void* stream);
}  // namespace cuda

}  // namespace patch_kernels
