// CUDA implementations of the ops: check, allocate through torch, launch on torch's current stream.
#define USE_CUDA 1
#include "common.h"

// Weak: the symbol lives in libtorch_cuda, which a CPU torch does not have. This library loads on both.
#pragma weak aoti_torch_get_current_cuda_stream

namespace patch_kernels {
namespace {

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

void* current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "patch_kernels: got CUDA tensors, but the torch library that is loaded has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
  return stream;
}

Tensor unpack_tiles(const Tensor& payload, const Tensor& tile_is_sparse, int64_t rows, int64_t cols, ScalarType dtype) {
  STD_TORCH_CHECK(is_16_bit(dtype), "unpack_tiles: dtype must be float16 or bfloat16");
  const TiledMatrix matrix = tiled_matrix(payload, tile_is_sparse, rows, cols, "unpack_tiles");
  const DeviceGuard guard(payload.get_device());
  const Tensor weight = torch::stable::new_empty(payload, {rows, cols}, dtype);
  cuda::unpack_tiles(matrix, static_cast<uint16_t*>(weight.mutable_data_ptr()), current_stream(payload));
  return weight;
}

// Unpack, then torch's own linear (cuBLAS). Right on every GPU; needs room for one dense weight.
Tensor tile_linear(const Tensor& x, const Tensor& payload, const Tensor& tile_is_sparse, int64_t out_features,
                   const OptionalTensor& bias) {
  STD_TORCH_CHECK(is_16_bit(x.scalar_type()) && x.dim() >= 1, "tile_linear: x must be float16 or bfloat16");
  check_same_device(x, payload, "tile_linear", "payload");
  const Tensor weight = unpack_tiles(payload, tile_is_sparse, out_features, x.size(x.dim() - 1), x.scalar_type());
  StableIValue stack[3] = {torch::stable::detail::from(x), torch::stable::detail::from(weight),
                           torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Without tile logits a tile is only a CTA's share of the work.
MaskScalars with_work_tiles(MaskScalars scalars, const OptionalTensor& tile_logits) {
  if (!tile_logits.has_value()) scalars.tile_rows = scalars.tile_cols = kTile;
  return scalars;
}

std::tuple<Tensor, Tensor> masked_weight(const Tensor& weight, const OptionalTensor& pattern_logits,
                                         const OptionalTensor& fixed_pattern, const OptionalTensor& tile_logits,
                                         int64_t tile_rows, int64_t tile_cols, double pattern_temperature,
                                         double pattern_scale, double tile_temperature, double tile_scale,
                                         bool hard_pattern, bool hard_tile, int64_t seed, int64_t layer, int64_t draw,
                                         bool noise) {
  const MaskScalars scalars =
      with_work_tiles({tile_rows, tile_cols, pattern_temperature, pattern_scale, tile_temperature, tile_scale,
                       hard_pattern, hard_tile, seed, layer, draw, noise},
                      tile_logits);
  const DeviceGuard guard(weight.get_device());
  const MaskCall call = mask_call(weight, pattern_logits, fixed_pattern, tile_logits, scalars);
  const Tensor masked = torch::stable::empty_like(call.weight);
  const Tensor sums = torch::stable::new_empty(call.weight, {2}, ScalarType::Double);
  const int64_t tiles = ceil_div(call.args.rows, scalars.tile_rows) * ceil_div(call.args.cols, scalars.tile_cols);
  const Tensor partial = torch::stable::new_empty(call.weight, {tiles, 2}, ScalarType::Double);
  cuda::masked_weight(call.args, masked.mutable_data_ptr(), static_cast<double*>(partial.mutable_data_ptr()),
                      static_cast<double*>(sums.mutable_data_ptr()), current_stream(weight));
  return {masked, sums};
}

std::tuple<Tensor, Tensor> masked_weight_backward(
    const Tensor& grad_masked, const Tensor& grad_sums, const Tensor& weight, const OptionalTensor& pattern_logits,
    const OptionalTensor& fixed_pattern, const OptionalTensor& tile_logits, int64_t tile_rows, int64_t tile_cols,
    double pattern_temperature, double pattern_scale, double tile_temperature, double tile_scale, bool hard_pattern,
    bool hard_tile, int64_t seed, int64_t layer, int64_t draw, bool noise) {
  const MaskScalars scalars =
      with_work_tiles({tile_rows, tile_cols, pattern_temperature, pattern_scale, tile_temperature, tile_scale,
                       hard_pattern, hard_tile, seed, layer, draw, noise},
                      tile_logits);
  const DeviceGuard guard(weight.get_device());
  const MaskCall call = mask_call(weight, pattern_logits, fixed_pattern, tile_logits, scalars);
  check_gradients(call, grad_masked, grad_sums);
  const Tensor grad = torch::stable::contiguous(grad_masked), grad_of_sums = torch::stable::contiguous(grad_sums);
  const Tensor grad_pattern = new_gradient(call.pattern_logits, call), grad_tile = new_gradient(call.tile_logits, call);
  cuda::masked_weight_backward(call.args, grad.const_data_ptr(),
                               static_cast<const double*>(grad_of_sums.const_data_ptr()),
                               grad_pattern.mutable_data_ptr(), grad_tile.mutable_data_ptr(), current_stream(weight));
  return {grad_pattern, grad_tile};
}

}  // namespace
}  // namespace patch_kernels

STABLE_TORCH_LIBRARY_IMPL(patch_kernels, CUDA, m) {
  m.impl("unpack_tiles", TORCH_BOX(&patch_kernels::unpack_tiles));
  m.impl("tile_linear", TORCH_BOX(&patch_kernels::tile_linear));
  m.impl("tile_linear_train", TORCH_BOX(&patch_kernels::tile_linear));
  m.impl("masked_weight", TORCH_BOX(&patch_kernels::masked_weight));
  m.impl("masked_weight_backward", TORCH_BOX(&patch_kernels::masked_weight_backward));
}
