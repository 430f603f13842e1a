// Schemas of all ops. Implementations: bindings/cpu.cpp and bindings/cuda.cpp; fakes and autograd:
// patch_kernels/ops. No default arguments: Python passes everything, so autograd sees every input at its place.
#include <string>

#include "bindings/common.h"

namespace patch_kernels {
namespace {

// Several weights of the same K and dtype times one x. An op for each number of them and no lists: every list takes
// half a microsecond on its way through torch, as long as a small layer.
std::string group_schema(int count) {
  std::string inputs, outputs;
  for (int i = 0; i < count; ++i) {
    const std::string n = std::to_string(i);
    inputs += "Tensor payload" + n + ", Tensor tile_is_sparse" + n + ", Tensor? schedule" + n + ", int out_features" +
              n + ", Tensor? bias" + n + ", ";
    outputs += i == 0 ? "Tensor" : ", Tensor";
  }
  return "tile_linear_group" + std::to_string(count) + "(Tensor x, " + inputs + "bool batch_invariant) -> (" + outputs +
         ")";
}

}  // namespace
}  // namespace patch_kernels

STABLE_TORCH_LIBRARY(patch_kernels, m) {
  m.def("pack_tiles(Tensor weight, Tensor keep, Tensor tile_is_sparse) -> Tensor");
  m.def(
      "unpack_tiles(Tensor payload, Tensor tile_is_sparse, Tensor? schedule, int rows, int cols, ScalarType dtype) "
      "-> Tensor");
  m.def("make_schedule(Tensor tile_is_sparse) -> Tensor");
  m.def(
      "tile_linear(Tensor x, Tensor payload, Tensor tile_is_sparse, Tensor? schedule, int out_features, Tensor? bias, "
      "bool batch_invariant) -> Tensor");
  m.def(
      "tile_linear_train(Tensor x, Tensor payload, Tensor tile_is_sparse, Tensor? schedule, int out_features, "
      "Tensor? bias, bool batch_invariant) -> Tensor");
  for (const char* name : {"tile_experts", "tile_experts_train"}) {
    m.def((std::string(name) +
           "(Tensor x, Tensor experts, Tensor payload, Tensor tile_is_sparse, Tensor? schedule, Tensor? begins, "
           "int out_features, int parts, Tensor? bias, bool batch_invariant) -> Tensor")
              .c_str());
  }
  for (int count = patch_kernels::kLeastInGroup; count <= patch_kernels::kMostInGroup; ++count) {
    m.def(patch_kernels::group_schema(count).c_str());
  }
  m.def("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
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
