// CUDA implementations of the ops: check, allocate through torch, launch on torch's current stream.
#define USE_CUDA 1
#include <algorithm>
#include <vector>

#include "../cuda/tile_linear.h"
#include "../gemm/plan.h"
#include "adamw.h"
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

Tensor unpack_tiles(const Tensor& payload, const Tensor& tile_is_sparse, const OptionalTensor& schedule, int64_t rows,
                    int64_t cols, ScalarType dtype) {
  STD_TORCH_CHECK(is_packed(dtype), "unpack_tiles: dtype must be ", packed_names());
  const TiledMatrix matrix = tiled_matrix(payload, tile_is_sparse, rows, cols, "unpack_tiles");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(matrix.payload) % 16 == 0,
                  "unpack_tiles: payload must start at a multiple of 16 bytes; clone it");
  const uint32_t* entries = nullptr;
  if (schedule.has_value()) {
    const int64_t tile_rows = tile_is_sparse.size(0), tile_cols = tile_is_sparse.size(1);
    STD_TORCH_CHECK(schedule->scalar_type() == ScalarType::Int && schedule->dim() == 1 && schedule->is_contiguous() &&
                        schedule->numel() == schedule_words(tile_rows, tile_cols),
                    "unpack_tiles: schedule must come from make_schedule(tile_is_sparse)");
    check_same_device(payload, *schedule, "unpack_tiles", "schedule");
    entries = schedule_view(static_cast<const int32_t*>(schedule->const_data_ptr()), static_cast<int>(tile_rows),
                            static_cast<int>(tile_cols))
                  .tiles;
  }
  const DeviceGuard guard(payload.get_device());
  const Tensor weight = torch::stable::new_empty(payload, {rows, cols}, dtype);
  cuda::unpack_tiles(matrix, entries, static_cast<uint16_t*>(weight.mutable_data_ptr()), current_stream(payload));
  return weight;
}

// Unpack, then torch's own linear (cuBLAS). Right on every GPU; needs room for one dense weight.
Tensor unpacked_linear(const Tensor& x, const Tensor& payload, const Tensor& tile_is_sparse,
                       const OptionalTensor& schedule, int64_t out_features, const OptionalTensor& bias) {
  const Tensor weight =
      unpack_tiles(payload, tile_is_sparse, schedule, out_features, x.size(x.dim() - 1), x.scalar_type());
  StableIValue stack[3] = {torch::stable::detail::from(x), torch::stable::detail::from(weight),
                           torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Rows of x that start at multiples of 16 bytes, as bulk and tensor copies need: x itself, or a copy with longer rows.
// What lies beyond K in the copy is never read.
Tensor aligned_rows(const Tensor& x, int64_t tokens, int64_t cols) {
  const Tensor rows = torch::stable::reshape(x, {tokens, cols});
  if (cols % 8 == 0 && is_aligned(x.const_data_ptr())) return rows;
  Tensor padded = torch::stable::new_empty(x, {tokens, ceil_div(cols, 8) * 8});
  Tensor inside = torch::stable::narrow(padded, 1, 0, cols);
  torch::stable::copy_(inside, rows);
  return padded;
}

// Memory for the self-check from torch's allocator.
struct Workspace {
  const Tensor& like;
  std::optional<Tensor> memory;
  static void* allocate(int64_t bytes, void* context) {
    auto* self = static_cast<Workspace*>(context);
    self->memory = torch::stable::new_empty(self->like, {bytes}, ScalarType::Byte);
    return self->memory->mutable_data_ptr();
  }
};

// For benchmarks/ops/bench_plans.py alone: what the next calls use instead of their own choice; bn = 0: nothing.
PlanChoice forced_choice{};

Tensor gemm(const Tensor& x, const Tensor& payload, const Tensor& tile_is_sparse, const OptionalTensor& schedule,
            int64_t out_features, const OptionalTensor& bias, bool batch_invariant, bool overlaps_previous) {
  const char* op = "tile_linear";
  STD_TORCH_CHECK(is_packed(x.scalar_type()) && x.dim() >= 1, op, ": x must be ", packed_names());
  check_same_device(x, payload, op, "payload");
  STD_TORCH_CHECK(is_aligned(payload.const_data_ptr()), op, ": payload must start at a multiple of 16 bytes; clone it");
  const int device = payload.get_device();
  const DeviceGuard guard(device);
  void* stream = current_stream(payload);
  Workspace workspace{payload, {}};
  if (!schedule.has_value() || !cuda::gemm_is_usable(device, stream, Workspace::allocate, &workspace)) {
    return unpacked_linear(x, payload, tile_is_sparse, schedule, out_features, bias);
  }
  const LinearCall call = linear_call(x, payload, tile_is_sparse, out_features, bias, op);
  const int64_t tokens = call.args.tokens, cols = call.args.weight.cols;
  const int64_t tile_rows = tile_is_sparse.size(0), tile_cols = tile_is_sparse.size(1);
  STD_TORCH_CHECK(schedule->scalar_type() == ScalarType::Int && schedule->dim() == 1 && schedule->is_contiguous() &&
                      schedule->numel() == schedule_words(tile_rows, tile_cols),
                  op, ": schedule must come from make_schedule(tile_is_sparse)");
  check_same_device(payload, *schedule, op, "schedule");
  if (tokens == 0 || out_features == 0) return call.y;
  const DeviceLimits& limits = cuda::device_limits(device);
  LaunchPlan plan = forced_choice.bn != 0
                        ? plan_of(limits, forced_choice, out_features, cols, tokens)
                        : choose_plan(limits, out_features, cols, tokens, payload.numel(), batch_invariant);
  plan.overlaps_previous = overlaps_previous;
  if (plan.family == Family::kUnpack) return unpacked_linear(x, payload, tile_is_sparse, schedule, out_features, bias);

  const Tensor rows_of_x = aligned_rows(call.x, tokens, cols);
  GemmProblem problem{};
  problem.x = rows_of_x.const_data_ptr();
  problem.payload = call.args.weight.payload;
  problem.bias = call.args.bias;
  problem.y = call.args.y;
  problem.tokens = static_cast<int>(tokens);
  problem.rows = static_cast<int>(out_features);
  problem.cols = static_cast<int>(cols);
  problem.x_stride = static_cast<int>(rows_of_x.size(1));
  problem.schedule = schedule_view(static_cast<const int32_t*>(schedule->const_data_ptr()), static_cast<int>(tile_rows),
                                   static_cast<int>(tile_cols));
  problem.cut_by_pair = batch_invariant;
  const int64_t floats = cuda::gemm_partial_floats(problem, plan);
  OptionalTensor partials;
  if (floats > 0) partials = torch::stable::new_empty(payload, {floats}, ScalarType::Float);
  auto* partial_data = floats > 0 ? static_cast<float*>(partials->mutable_data_ptr()) : nullptr;
  cuda::run_gemm(problem, plan, call.args.dtype, partial_data, stream);
  return call.y;
}

Tensor tile_linear(const Tensor& x, const Tensor& payload, const Tensor& tile_is_sparse, const OptionalTensor& schedule,
                   int64_t out_features, const OptionalTensor& bias, bool batch_invariant) {
  return gemm(x, payload, tile_is_sparse, schedule, out_features, bias, batch_invariant, true);
}

// While training, the kernel before may be one that wrote the weights.
Tensor tile_linear_train(const Tensor& x, const Tensor& payload, const Tensor& tile_is_sparse,
                         const OptionalTensor& schedule, int64_t out_features, const OptionalTensor& bias,
                         bool batch_invariant) {
  return gemm(x, payload, tile_is_sparse, schedule, out_features, bias, batch_invariant, false);
}

// One launch a weight; only the step from Python to here is shared.
std::vector<Tensor> tile_linear_group(const Tensor& x_in, const std::vector<GroupItem>& items, bool batch_invariant) {
  const Tensor x = as_contiguous(x_in);
  std::vector<Tensor> results;
  for (const GroupItem& item : items) {
    results.push_back(tile_linear(x, item.payload, item.tile_is_sparse, item.schedule, item.out_features, item.bias,
                                  batch_invariant));
  }
  return results;
}

// Without tile logits a tile is only a CTA's share of the work.
MaskInputs with_work_tiles(MaskInputs inputs) {
  if (!inputs.tile_logits.has_value()) inputs.tile_rows = inputs.tile_cols = kTile;
  return inputs;
}

std::tuple<Tensor, Tensor> masked_weight(const Tensor& weight, const OptionalTensor& pattern_logits,
                                         const OptionalTensor& fixed_pattern, const OptionalTensor& tile_logits,
                                         const Tensor& factors, const OptionalTensor& key, int64_t tile_rows,
                                         int64_t tile_cols, bool hard_pattern, bool hard_tile, int64_t layer) {
  const DeviceGuard guard(weight.get_device());
  const MaskCall call = mask_call(with_work_tiles({weight, pattern_logits, fixed_pattern, tile_logits, factors, key,
                                                   tile_rows, tile_cols, hard_pattern, hard_tile, layer}));
  const Tensor masked = torch::stable::empty_like(call.weight);
  const Tensor sums = torch::stable::new_empty(call.weight, {2}, ScalarType::Double);
  const int64_t tiles = ceil_div(call.args.rows, call.args.tile_rows) * ceil_div(call.args.cols, call.args.tile_cols);
  const Tensor partial = torch::stable::new_empty(call.weight, {tiles, 2}, ScalarType::Double);
  cuda::masked_weight(call.args, masked.mutable_data_ptr(), static_cast<double*>(partial.mutable_data_ptr()),
                      static_cast<double*>(sums.mutable_data_ptr()), current_stream(weight));
  return {masked, sums};
}

std::tuple<Tensor, Tensor, Tensor> masked_weight_backward(const Tensor& grad_masked, const Tensor& grad_sums,
                                                          const Tensor& weight, const OptionalTensor& pattern_logits,
                                                          const OptionalTensor& fixed_pattern,
                                                          const OptionalTensor& tile_logits, const Tensor& factors,
                                                          const OptionalTensor& key, int64_t tile_rows,
                                                          int64_t tile_cols, bool hard_pattern, bool hard_tile,
                                                          int64_t layer, bool with_masked) {
  const DeviceGuard guard(weight.get_device());
  const MaskCall call = mask_call(with_work_tiles({weight, pattern_logits, fixed_pattern, tile_logits, factors, key,
                                                   tile_rows, tile_cols, hard_pattern, hard_tile, layer}));
  const MaskGradients gradients = mask_gradients(call, grad_masked, grad_sums, with_masked);
  cuda::masked_weight_backward(call.args, gradients.pointers, current_stream(weight));
  return {gradients.grad_pattern, gradients.grad_tile, gradients.masked};
}

void adamw_step(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                const OptionalTensor& exp_avg_scale, const OptionalTensor& exp_avg_sq_scale,
                const OptionalTensor& grad_scale, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step, int64_t seed, int64_t stream) {
  const DeviceGuard guard(param.get_device());
  const AdamWCall call = adamw_call(param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, grad_scale,
                                    adamw_factors(lr, beta1, beta2, eps, weight_decay, step), step, seed, stream);
  for (const Tensor* tensor : {&param, &call.grad, &exp_avg, &exp_avg_sq}) {
    STD_TORCH_CHECK(is_aligned(tensor->const_data_ptr()),
                    "adamw_step: param, grad and moments must start at multiples of 16 bytes; clone them");
  }
  cuda::adamw_step(call.args, current_stream(param));
}

}  // namespace
}  // namespace patch_kernels

STABLE_TORCH_LIBRARY_IMPL(patch_kernels, CUDA, m) {
  m.impl("unpack_tiles", TORCH_BOX(&patch_kernels::unpack_tiles));
  m.impl("tile_linear", TORCH_BOX(&patch_kernels::tile_linear));
  m.impl("tile_linear_train", TORCH_BOX(&patch_kernels::tile_linear_train));
  patch_kernels::register_group<patch_kernels::tile_linear_group>(m);
  m.impl("masked_weight", TORCH_BOX(&patch_kernels::masked_weight));
  m.impl("masked_weight_backward", TORCH_BOX(&patch_kernels::masked_weight_backward));
  m.impl("adamw_step", TORCH_BOX(&patch_kernels::adamw_step));
}

// The GEMM of a device for `patch-llm info` and for warnings, as JSON, read through ctypes.
extern "C" __attribute__((visibility("default"))) const char* patch_kernels_gemm_status(int device) {
  using namespace patch_kernels;
  static thread_local std::string text;
  cuda::GemmStatus status{Family::kUnpack, cuda::GemmState::kDisabled, ""};
  try {  // no exception may leave through C
    status = cuda::gemm_status(device);
  } catch (const std::exception& error) {
    status.reason = error.what();
  }
  const char* family = status.family == Family::kSm90 ? "sm90" : status.family == Family::kSm80 ? "sm80" : "none";
  const char* state = status.state == cuda::GemmState::kWorks      ? "works"
                      : status.state == cuda::GemmState::kDisabled ? "disabled"
                                                                   : "unchecked";
  std::string reason;
  for (const char c : status.reason) reason += c == '"' || c == '\\' || c < ' ' ? ' ' : c;
  text = std::string("{\"family\": \"") + family + "\", \"state\": \"" + state + "\", \"reason\": \"" + reason + "\"}";
  return text.c_str();
}

// For benchmarks/ops/bench_plans.py: a choice is five ints (bn, token_ctas, row_ctas, splits, depth).
extern "C" __attribute__((visibility("default"))) void patch_kernels_force_plan(const int* choice) {
  using namespace patch_kernels;
  forced_choice = choice ? PlanChoice{choice[0], choice[1], choice[2], choice[3], choice[4]} : PlanChoice{};
  if (forced_choice.token_ctas * forced_choice.row_ctas * forced_choice.splits > kMaxSplits) forced_choice = {};
}

// Writes the possible choices of a call, at most `capacity`, the library's own first; returns their number, -1 if there
// is no such device.
extern "C" __attribute__((visibility("default"))) int patch_kernels_plan_choices(int device, int64_t rows, int64_t cols,
                                                                                 int64_t tokens, int64_t payload_bytes,
                                                                                 int* out, int capacity) {
  using namespace patch_kernels;
  DeviceLimits limits{};
  try {
    limits = cuda::device_limits(device);
  } catch (const std::exception&) {
    return -1;
  }
  const LaunchPlan own = choose_plan(limits, rows, cols, tokens, payload_bytes, false);
  std::vector<PlanChoice> choices = possible_choices(limits, cols, tokens);
  choices.insert(choices.begin(), {own.bn, own.token_ctas, own.row_ctas, own.splits, own.depth});
  int count = 0;
  for (const PlanChoice& choice : choices) {
    if (count == capacity) break;
    const int numbers[5] = {choice.bn, choice.token_ctas, choice.row_ctas, choice.splits, choice.depth};
    std::copy(numbers, numbers + 5, out + 5 * count++);
  }
  return count;
}
