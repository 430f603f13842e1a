// CPU implementations of the ops: check, allocate, call csrc/cpu with torch's threads.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "../gemm/plan.h"
#include "adamw.h"
#include "common.h"

#pragma weak aoti_torch_get_current_cuda_stream
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace patch_kernels {
namespace {

void torch_parallel(int64_t n, ParallelBody body, void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

Tensor pack_tiles(const Tensor& weight_in, const Tensor& keep_in, const Tensor& tile_is_sparse) {
  const char* op = "pack_tiles";
  STD_TORCH_CHECK(weight_in.dim() == 2 && is_packed(weight_in.scalar_type()), op, ": weight must be (N, K) ",
                  packed_names());
  STD_TORCH_CHECK(keep_in.scalar_type() == ScalarType::Bool && keep_in.dim() == 2 &&
                      keep_in.size(0) == weight_in.size(0) && keep_in.size(1) == weight_in.size(1),
                  op, ": keep must be a bool tensor of weight's shape");
  const Tensor weight = torch::stable::contiguous(weight_in), keep = torch::stable::contiguous(keep_in);
  const int64_t rows = weight.size(0), cols = weight.size(1);
  const auto* flags = static_cast<const uint8_t*>(tile_is_sparse.const_data_ptr());
  const Tensor payload =
      torch::stable::new_empty(tile_is_sparse, {cpu::payload_bytes(flags, tile_is_sparse.numel())}, ScalarType::Byte);
  tiled_matrix(payload, tile_is_sparse, rows, cols, op);
  const PackError error = cpu::pack_tiles(static_cast<const uint16_t*>(weight.const_data_ptr()),
                                          static_cast<const bool*>(keep.const_data_ptr()), flags, rows, cols,
                                          static_cast<uint8_t*>(payload.mutable_data_ptr()), torch_parallel);
  STD_TORCH_CHECK(error.count == 0, op, ": ", error.count, " groups in sparse tiles do not keep exactly ", kKept,
                  " of ", kGroup, " values, the first at row ", error.row, ", column ", error.col);
  return payload;
}

// A CPU counts flags faster than it reads a schedule.
Tensor unpack_tiles(const Tensor& payload, const Tensor& tile_is_sparse, const OptionalTensor&, int64_t rows,
                    int64_t cols, ScalarType dtype) {
  STD_TORCH_CHECK(is_packed(dtype), "unpack_tiles: dtype must be ", packed_names());
  const TiledMatrix matrix = tiled_matrix(payload, tile_is_sparse, rows, cols, "unpack_tiles");
  check_payload_on_host(payload, tile_is_sparse, "unpack_tiles");
  const Tensor weight = torch::stable::new_empty(payload, {rows, cols}, dtype);
  cpu::unpack_tiles(matrix, static_cast<uint16_t*>(weight.mutable_data_ptr()), torch_parallel);
  return weight;
}

Tensor schedule_of(const Tensor& tile_is_sparse) {
  STD_TORCH_CHECK(
      tile_is_sparse.scalar_type() == ScalarType::Byte && tile_is_sparse.dim() == 2 && tile_is_sparse.is_contiguous(),
      "make_schedule: tile_is_sparse must be a contiguous 2-D uint8 tensor");
  const int64_t tile_rows = tile_is_sparse.size(0), tile_cols = tile_is_sparse.size(1);
  const Tensor words =
      torch::stable::new_empty(tile_is_sparse, {schedule_words(tile_rows, tile_cols)}, ScalarType::Int);
  make_schedule(static_cast<const uint8_t*>(tile_is_sparse.const_data_ptr()), tile_rows, tile_cols,
                static_cast<int32_t*>(words.mutable_data_ptr()));
  return words;
}

Tensor torch_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

OptionalTensor narrow_rows(OptionalTensor tensor, int64_t row, int64_t rows) {
  return tensor.has_value() ? OptionalTensor(torch::stable::narrow(*tensor, 0, row, rows)) : std::nullopt;
}

constexpr int64_t kScratchBytes = 6 << 20;  // of unpacked weight and its part of y

// y from tile rows that are unpacked block by block: the memory of a call stays bounded, and a block is in cache when
// torch reads it.
void multiply_unpacked(const LinearCall& call) {
  const TiledMatrix& all = call.args.weight;
  const int64_t tokens = call.args.tokens, tile_cols = ceil_div(all.cols, kTile);
  const Tensor x = torch::stable::view(call.x, {tokens, all.cols});
  Tensor y = torch::stable::view(call.y, {tokens, all.rows});
  int64_t step = kScratchBytes / (kValueBytes * (all.cols + tokens)) / kTile * kTile;
  step = step < kTile ? kTile : step;
  TiledMatrix part = all;
  for (int64_t row = 0; row < all.rows; row += step) {
    part.rows = all.rows - row < step ? all.rows - row : step;
    const Tensor weight = torch::stable::new_empty(x, {part.rows, all.cols});
    cpu::unpack_tiles(part, static_cast<uint16_t*>(weight.mutable_data_ptr()), torch_parallel);
    Tensor rows_of_y = torch::stable::narrow(y, 1, row, part.rows);
    torch::stable::copy_(rows_of_y, torch_linear(x, weight, narrow_rows(call.bias, row, part.rows)));
    const int64_t tiles = ceil_div(part.rows, kTile) * tile_cols;
    part.payload += cpu::payload_bytes(part.tile_is_sparse, tiles);
    part.tile_is_sparse += tiles;
  }
}

// Calls that share x. Each takes the kernel that it takes alone, and so has the same bits; those of one kernel share a
// parallel region.
void run(const LinearCall* calls, size_t count) {
  std::vector<TileLinearArgs> few, many;
  for (const LinearCall* call = calls; call < calls + count; ++call) {
    if (call->args.tokens == 0) continue;
    switch (cpu::kernel_of(call->args)) {
      case CpuKernel::kFew:
        few.push_back(call->args);
        break;
      case CpuKernel::kMany:
        many.push_back(call->args);
        break;
      case CpuKernel::kTorch:
        multiply_unpacked(*call);
    }
  }
  cpu::tile_linear(few.data(), static_cast<int>(few.size()), CpuKernel::kFew, torch_parallel);
  cpu::tile_linear(many.data(), static_cast<int>(many.size()), CpuKernel::kMany, torch_parallel);
}

void set_how(LinearCall& call, bool batch_invariant) {
  call.args.batch_invariant = batch_invariant;
  call.args.threads = static_cast<int>(torch::stable::get_num_threads());
}

// The schedule is for GPUs.
Tensor tile_linear(const Tensor& x, const Tensor& payload, const Tensor& tile_is_sparse, const OptionalTensor&,
                   int64_t out_features, const OptionalTensor& bias, bool batch_invariant) {
  LinearCall call = linear_call(x, payload, tile_is_sparse, out_features, bias, "tile_linear");
  check_payload_on_host(payload, tile_is_sparse, "tile_linear");
  set_how(call, batch_invariant);
  run(&call, 1);
  return call.y;
}

std::vector<Tensor> tile_linear_group(const Tensor& x_in, const std::vector<GroupItem>& items, bool batch_invariant) {
  const char* op = "tile_linear_group";
  const Tensor x = as_contiguous(x_in);
  std::vector<LinearCall> calls;
  std::vector<Tensor> results;
  calls.reserve(items.size());
  for (const GroupItem& item : items) {
    calls.push_back(linear_call(x, item.payload, item.tile_is_sparse, item.out_features, item.bias, op));
    check_payload_on_host(item.payload, item.tile_is_sparse, op);
    set_how(calls.back(), batch_invariant);
    results.push_back(calls.back().y);
  }
  run(calls.data(), calls.size());
  return results;
}

// A call whose tokens are any rows, by a call on copies of them.
void multiply_unpacked_rows(const TileLinearArgs& args, const Tensor& x, const OptionalTensor& bias) {
  const int64_t cols = args.weight.cols, rows = args.weight.rows;
  LinearCall call{torch::stable::new_empty(x, {args.tokens, cols}), bias,
                  torch::stable::new_empty(x, {args.tokens, rows}), args};
  auto* gathered = static_cast<uint16_t*>(call.x.mutable_data_ptr());
  for (int64_t t = 0; t < args.tokens; ++t) {
    std::copy_n(static_cast<const uint16_t*>(args.x) + args.x_rows[t] * cols, cols, gathered + t * cols);
  }
  multiply_unpacked(call);
  const auto* y = static_cast<const uint16_t*>(call.y.const_data_ptr());
  for (int64_t t = 0; t < args.tokens; ++t) {
    std::copy_n(y + t * rows, rows, static_cast<uint16_t*>(args.y) + args.y_rows[t] * args.y_stride);
  }
}

// Schedule and begins are for GPUs.
Tensor tile_experts(const Tensor& x_in, const Tensor& experts_in, const Tensor& payload, const Tensor& tile_is_sparse,
                    const OptionalTensor&, const OptionalTensor&, int64_t out_features, int64_t parts,
                    const OptionalTensor& bias_in, bool batch_invariant) {
  const ExpertsCall call = experts_call(x_in, experts_in, payload, tile_is_sparse, out_features, parts, bias_in);
  const int64_t tiles = call.tile_rows * call.tile_cols;
  const auto* flags = static_cast<const uint8_t*>(tile_is_sparse.const_data_ptr());
  check_payload_on_host(payload, tile_is_sparse, "tile_experts");
  const SortedRows rows(static_cast<const int64_t*>(call.experts.const_data_ptr()), call.experts.numel(),
                        call.expert_count, call.fan);
  TileLinearArgs args{call.x.const_data_ptr(),
                      nullptr,
                      nullptr,
                      0,
                      {static_cast<const uint8_t*>(payload.const_data_ptr()), flags, out_features, call.x.size(1)},
                      to_dtype(call.x.scalar_type(), "tile_experts"),
                      batch_invariant,
                      static_cast<int>(torch::stable::get_num_threads())};
  args.y_stride = parts * out_features;
  const auto* bias = static_cast<const uint16_t*>(optional_pointer(call.bias));
  auto* y = static_cast<uint16_t*>(call.y.mutable_data_ptr());
  std::vector<TileLinearArgs> few, many;
  for (int64_t e = 0; e < call.expert_count; ++e) {
    args.tokens = rows.begin[e + 1] - rows.begin[e];
    args.x_rows = rows.of_x.data() + rows.begin[e];
    args.y_rows = rows.of_y.data() + rows.begin[e];
    for (int64_t q = 0; q < parts; ++q) {
      if (args.tokens > 0 && out_features > 0) {
        const int64_t column = q * out_features;
        args.y = y + column;
        args.bias = bias ? bias + e * args.y_stride + column : nullptr;
        switch (cpu::kernel_of(args)) {
          case CpuKernel::kFew:
            few.push_back(args);
            break;
          case CpuKernel::kMany:
            many.push_back(args);
            break;
          case CpuKernel::kTorch:
            multiply_unpacked_rows(args, call.x, narrow_rows(call.bias, e * args.y_stride + column, out_features));
        }
      }
      args.weight.payload += cpu::payload_bytes(args.weight.tile_is_sparse, tiles);
      args.weight.tile_is_sparse += tiles;
    }
  }
  cpu::tile_linear(few.data(), static_cast<int>(few.size()), CpuKernel::kFew, torch_parallel);
  cpu::tile_linear(many.data(), static_cast<int>(many.size()), CpuKernel::kMany, torch_parallel);
  return call.y;
}

Tensor dense_linear(const Tensor& x_in, const Tensor& weight, const OptionalTensor& bias) {
  const ScalarType type = x_in.scalar_type();
  const int64_t dims = x_in.dim();
  STD_TORCH_CHECK(is_packed(type) && dims >= 1, "dense_linear: x must be (..., K) ", packed_names());
  const int64_t cols = x_in.size(dims - 1);
  STD_TORCH_CHECK(weight.scalar_type() == type && weight.dim() == 2 && weight.size(1) == cols && cols >= 1,
                  "dense_linear: weight must be (N, K) of x's dtype and K");
  const int64_t rows = weight.size(0);
  STD_TORCH_CHECK(!bias.has_value() || (bias->scalar_type() == type && bias->dim() == 1 && bias->size(0) == rows),
                  "dense_linear: bias must be (N,) of x's dtype");
  bool done = false;
  if (weight.is_contiguous() && weight.is_cpu()) {
    const Tensor x = as_contiguous(x_in), y = new_output(x, rows);
    const OptionalTensor added = bias ? OptionalTensor(as_contiguous(*bias)) : std::nullopt;
    const DenseLinearArgs args{x.const_data_ptr(),
                               weight.const_data_ptr(),
                               added ? added->const_data_ptr() : nullptr,
                               y.mutable_data_ptr(),
                               x.numel() / cols,
                               rows,
                               cols,
                               to_dtype(type, "dense_linear")};
    cpu::dense_linear(args, done, torch_parallel);
    if (done) return y;
  }
  return torch_linear(x_in, weight, bias);
}

// They can be read here without waiting for a device.
void check_factors(const MaskCall& call) {
  const double* f = call.args.factors;
  STD_TORCH_CHECK(f[0] > 0 && f[2] > 0 && std::isfinite(f[0] + f[1] + f[2] + f[3]),
                  "masked_weight: factors must be finite, with positive temperatures; make them by mask_sampling");
}

std::tuple<Tensor, Tensor> masked_weight(const Tensor& weight, const OptionalTensor& pattern_logits,
                                         const OptionalTensor& fixed_pattern, const OptionalTensor& tile_logits,
                                         const Tensor& factors, const OptionalTensor& key, int64_t tile_rows,
                                         int64_t tile_cols, bool hard_pattern, bool hard_tile, int64_t layer) {
  const MaskCall call = mask_call({weight, pattern_logits, fixed_pattern, tile_logits, factors, key, tile_rows,
                                   tile_cols, hard_pattern, hard_tile, layer});
  check_factors(call);
  const Tensor masked = torch::stable::empty_like(call.weight);
  const Tensor sums = torch::stable::new_empty(call.weight, {2}, ScalarType::Double);
  cpu::masked_weight(call.args, masked.mutable_data_ptr(), static_cast<double*>(sums.mutable_data_ptr()),
                     torch_parallel);
  return {masked, sums};
}

std::tuple<Tensor, Tensor, Tensor> masked_weight_backward(const Tensor& grad_masked, const Tensor& grad_sums,
                                                          const Tensor& weight, const OptionalTensor& pattern_logits,
                                                          const OptionalTensor& fixed_pattern,
                                                          const OptionalTensor& tile_logits, const Tensor& factors,
                                                          const OptionalTensor& key, int64_t tile_rows,
                                                          int64_t tile_cols, bool hard_pattern, bool hard_tile,
                                                          int64_t layer, bool with_masked) {
  const MaskCall call = mask_call({weight, pattern_logits, fixed_pattern, tile_logits, factors, key, tile_rows,
                                   tile_cols, hard_pattern, hard_tile, layer});
  check_factors(call);
  const MaskGradients gradients = mask_gradients(call, grad_masked, grad_sums, with_masked);
  cpu::masked_weight_backward(call.args, gradients.pointers, torch_parallel);
  return {gradients.grad_pattern, gradients.grad_tile, gradients.masked};
}

void adamw_step(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                const OptionalTensor& exp_avg_scale, const OptionalTensor& exp_avg_sq_scale,
                const OptionalTensor& grad_scale, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step, int64_t seed, int64_t stream) {
  const AdamWCall call = adamw_call(param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, grad_scale,
                                    adamw_factors(lr, beta1, beta2, eps, weight_decay, step), step, seed, stream);
  cpu::adamw_step(call.args, torch_parallel);
}

bool has_cuda_shim() { return aoti_torch_get_current_cuda_stream != nullptr; }

}  // namespace
}  // namespace patch_kernels

STABLE_TORCH_LIBRARY_IMPL(patch_kernels, CPU, m) {
  m.impl("pack_tiles", TORCH_BOX(&patch_kernels::pack_tiles));
  m.impl("unpack_tiles", TORCH_BOX(&patch_kernels::unpack_tiles));
  m.impl("make_schedule", TORCH_BOX(&patch_kernels::schedule_of));
  m.impl("tile_linear", TORCH_BOX(&patch_kernels::tile_linear));
  m.impl("tile_linear_train", TORCH_BOX(&patch_kernels::tile_linear));
  patch_kernels::register_group<patch_kernels::tile_linear_group>(m);
  m.impl("tile_experts", TORCH_BOX(&patch_kernels::tile_experts));
  m.impl("tile_experts_train", TORCH_BOX(&patch_kernels::tile_experts));
  m.impl("dense_linear", TORCH_BOX(&patch_kernels::dense_linear));
  m.impl("masked_weight", TORCH_BOX(&patch_kernels::masked_weight));
  m.impl("masked_weight_backward", TORCH_BOX(&patch_kernels::masked_weight_backward));
  m.impl("adamw_step", TORCH_BOX(&patch_kernels::adamw_step));
}

STABLE_TORCH_LIBRARY_IMPL(patch_kernels, CompositeExplicitAutograd, m) {
  m.impl("has_cuda_shim", TORCH_BOX(&patch_kernels::has_cuda_shim));
}

// Facts about this build for `patch-llm info`, read through ctypes: no op returns a string without leaking it.
// Changes with the ops' arguments or meaning, so that Python files of another version refuse the library.
#define PK_INTERFACE "3"

extern "C" __attribute__((visibility("default"))) const char* patch_kernels_build_info() {
  static const std::string info =
      std::string("{\"build_id\": \"" PK_BUILD_ID "\", \"interface\": \"" PK_INTERFACE
                  "\", \"cuda_architectures\": \"" PK_CUDA_ARCHITECTURES "\", \"cuda_version\": \"" PK_CUDA_VERSION
                  "\", \"torch_target\": \"2.11\", \"cpu_instruction_set\": \"") +
      patch_kernels::cpu::instruction_set() + "\", \"cpu_instruction_sets\": \"" +
      patch_kernels::cpu::instruction_sets() + "\"}";
  return info.c_str();
}
