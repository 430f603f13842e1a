// Schemas of all ops. Implementations: bindings/cpu.cpp and bindings/cuda.cpp; fakes and autograd:
// patch_kernels/ops. No default arguments: Python passes everything, so autograd sees every input at its place.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(patch_kernels, m) {
  m.def("pack_tiles(Tensor weight, Tensor keep, Tensor tile_is_sparse) -> Tensor");
  m.def("unpack_tiles(Tensor payload, Tensor tile_is_sparse, int rows, int cols, ScalarType dtype) -> Tensor");
  m.def("make_schedule(Tensor tile_is_sparse) -> Tensor");
  m.def(
      "tile_linear(Tensor x, Tensor payload, Tensor tile_is_sparse, Tensor? schedule, int out_features, Tensor? bias, "
      "bool batch_invariant) -> Tensor");
  m.def(
      "tile_linear_train(Tensor x, Tensor payload, Tensor tile_is_sparse, Tensor? schedule, int out_features, "
      "Tensor? bias, bool batch_invariant) -> Tensor");
  m.def(
      "tile_linear_group(Tensor x, Tensor[] payloads, Tensor[] tile_is_sparse, Tensor?[] schedules, "
      "int[] out_features, Tensor?[] biases, bool batch_invariant) -> Tensor[]");
  m.def(
      "masked_weight(Tensor weight, Tensor? pattern_logits, Tensor? fixed_pattern, Tensor? tile_logits, "
      "Tensor factors, Tensor? key, int tile_rows, int tile_cols, bool hard_pattern, bool hard_tile, int layer) "
      "-> (Tensor, Tensor)");
  m.def(
      "masked_weight_backward(Tensor grad_masked, Tensor grad_sums, Tensor weight, Tensor? pattern_logits, "
      "Tensor? fixed_pattern, Tensor? tile_logits, Tensor factors, Tensor? key, int tile_rows, int tile_cols, "
      "bool hard_pattern, bool hard_tile, int layer, bool with_masked) -> (Tensor, Tensor, Tensor)");
  m.def(
      "adamw_step(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? exp_avg_scale, "
      "Tensor(e!)? exp_avg_sq_scale, Tensor? grad_scale, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, int step, int seed, int stream) -> ()");
  m.def("has_cuda_shim() -> bool");
}
