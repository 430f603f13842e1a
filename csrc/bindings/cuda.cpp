// CUDA implementations of the ops: check, allocate through torch, launch on torch's current stream.
#define USE_CUDA 1
#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/driver.h"
#include "../cuda/tile_linear.h"
#include "../gemm/plan.h"
#include "adamw.h"
#include "common.h"
#include "plan_cache.h"

// Weak: the symbol lives in libtorch_cuda, which a CPU torch does not have. This library loads on both.
#pragma weak aoti_torch_get_current_cuda_stream

namespace patch_kernels {
namespace {

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

void* current_stream(int device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "patch_kernels: got CUDA tensors, but the torch library that is loaded has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void* current_stream(const Tensor& tensor) { return current_stream(tensor.get_device()); }

Schedule schedule_of(const Tensor& schedule, const Tensor& payload, const Tensor& tile_is_sparse, const char* op) {
  const int64_t tile_rows = tile_is_sparse.size(0), tile_cols = tile_is_sparse.size(1);
  STD_TORCH_CHECK(schedule.scalar_type() == ScalarType::Int && schedule.dim() == 1 && schedule.is_contiguous() &&
                      schedule.numel() == schedule_words(tile_rows, tile_cols),
                  op, ": schedule must come from make_schedule(tile_is_sparse)");
  check_same_device(payload, schedule, op, "schedule");
  return schedule_view(static_cast<const int32_t*>(schedule.const_data_ptr()), static_cast<int>(tile_rows),
                       static_cast<int>(tile_cols));
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

Tensor unpack_tiles(const Tensor& payload, const Tensor& tile_is_sparse, const OptionalTensor& schedule_in,
                    int64_t rows, int64_t cols, ScalarType dtype) {
  STD_TORCH_CHECK(is_packed(dtype), "unpack_tiles: dtype must be ", packed_names());
  cuda::require_driver("unpack_tiles");
  const TiledMatrix matrix = tiled_matrix(payload, tile_is_sparse, rows, cols, "unpack_tiles");
  STD_TORCH_CHECK(is_aligned(matrix.payload), "unpack_tiles: payload must start at a multiple of 16 bytes; clone it");
  Schedule schedule{};
  if (schedule_in.has_value()) schedule = schedule_of(*schedule_in, payload, tile_is_sparse, "unpack_tiles");
  const DeviceGuard guard(payload.get_device());
  const Tensor weight = torch::stable::new_empty(payload, {rows, cols}, dtype);
  cuda::unpack_tiles(matrix, schedule, static_cast<uint16_t*>(weight.mutable_data_ptr()), current_stream(payload));
  return weight;
}

constexpr const char* kTileLinear = "tile_linear";

static_assert(kMostInGroup <= kMaxLayers, "a group is one launch");

// Unpack, then torch's own linear (cuBLAS). Right on every GPU; needs room for one dense weight.
Tensor unpacked_linear(const Tensor& x, const Tensor& payload, const Tensor& tile_is_sparse,
                       const OptionalTensor& schedule, int64_t out_features, const OptionalTensor& bias) {
  STD_TORCH_CHECK(is_packed(x.scalar_type()) && x.dim() >= 1, kTileLinear, ": x must be ", packed_names());
  check_same_device(x, payload, kTileLinear, "payload");
  const Tensor weight =
      unpack_tiles(payload, tile_is_sparse, schedule, out_features, x.size(x.dim() - 1), x.scalar_type());
  StableIValue stack[3] = {torch::stable::detail::from(x), torch::stable::detail::from(weight),
                           torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Rows of x that start at multiples of 16 bytes, as bulk and tensor copies need: x itself, which is contiguous, or a
// copy with longer rows. What lies beyond K in the copy is never read.
struct AlignedRows {
  Tensor owner;
  int64_t stride;  // elements
};

AlignedRows aligned_rows(const Tensor& x, int64_t tokens, int64_t cols) {
  if (cols % 8 == 0 && is_aligned(x.const_data_ptr())) return {x, cols};
  const int64_t stride = ceil_div(cols, 8) * 8;
  Tensor padded = torch::stable::new_empty(x, {tokens, stride});
  Tensor inside = torch::stable::narrow(padded, 1, 0, cols);
  torch::stable::copy_(inside, torch::stable::view(x, {tokens, cols}));
  return {padded, stride};
}

// For benchmarks/ops/bench_plans.py alone: what the next calls use instead of their own choice; bn = 0: nothing.
PlanChoice forced_choice{};

// A layer that the kernels take, with the plan that it has alone.
struct LayerCall {
  LinearCall call;
  GemmLayer layer;
  int64_t payload_bytes;
  LaunchPlan plan;
};

LayerCall layer_call(const DeviceLimits& limits, int device, const Tensor& x, const Tensor& payload,
                     const Tensor& tile_is_sparse, const Tensor& schedule, int64_t out_features,
                     const OptionalTensor& bias, bool batch_invariant) {
  STD_TORCH_CHECK(is_aligned(payload.const_data_ptr()), kTileLinear,
                  ": payload must start at a multiple of 16 bytes; clone it");
  LayerCall layer{linear_call(x, payload, tile_is_sparse, out_features, bias, kTileLinear), {}, payload.numel(), {}};
  const TileLinearArgs& args = layer.call.args;
  layer.layer = {args.weight.payload, args.bias, args.y, static_cast<int>(out_features),
                 schedule_of(schedule, payload, tile_is_sparse, kTileLinear)};
  if (args.tokens == 0 || out_features == 0) return layer;
  const int64_t cols = args.weight.cols;
  layer.plan =
      forced_choice.bn != 0
          ? plan_of(limits, forced_choice, out_features, cols, args.tokens)
          : cached_plan(limits, {device, batch_invariant, 0, out_features, cols, args.tokens, payload.numel()});
  return layer;
}

// Launches a problem whose layers and x are there.
void launch(GemmProblem& problem, const LaunchPlan& plan, const Tensor& x, void* stream) {
  OptionalTensor partials;
  float* partial_data = nullptr;
  if (const int64_t floats = cuda::gemm_partial_floats(problem, plan); floats > 0) {
    partials = torch::stable::new_empty(x, {floats}, ScalarType::Float);
    partial_data = static_cast<float*>(partials->mutable_data_ptr());
  }
  cuda::run_gemm(problem, plan, to_dtype(x.scalar_type(), kTileLinear), partial_data, stream);
}

// One launch for all of them: they have the same x and as many splits.
void launch_layers(const DeviceLimits& limits, int device, void* stream, const LayerCall* const* layers, int count,
                   bool batch_invariant, bool overlaps_previous) {
  const LinearCall& first = layers[0]->call;
  const int64_t tokens = first.args.tokens, cols = first.args.weight.cols;
  const AlignedRows rows_of_x = aligned_rows(first.x, tokens, cols);
  GemmProblem problem{};
  problem.x = rows_of_x.owner.const_data_ptr();
  problem.tokens = static_cast<int>(tokens);
  problem.cols = static_cast<int>(cols);
  problem.x_stride = static_cast<int>(rows_of_x.stride);
  problem.cut_by_pair = batch_invariant;
  problem.layer_count = count;
  LaunchPlan plan = layers[0]->plan;
  if (count > 1) {
    PlanKey key{device, batch_invariant, plan.splits, 0, cols, tokens, 0};
    for (int i = 0; i < count; ++i) {
      key.rows += int64_t{kTile} * layers[i]->layer.schedule.tile_rows;
      key.payload_bytes += layers[i]->payload_bytes;
    }
    plan = cached_plan(limits, key);
    if (plan.family == Family::kUnpack) {  // too many items for one launch
      for (int i = 0; i < count; ++i) {
        launch_layers(limits, device, stream, layers + i, 1, batch_invariant, overlaps_previous);
      }
      return;
    }
  }
  for (int i = 0; i < count; ++i) problem.layers[i] = layers[i]->layer;
  share_tokens(problem);
  plan.overlaps_previous = overlaps_previous;
  launch(problem, plan, first.x, stream);
}

Tensor gemm(const Tensor& x, const Tensor& payload, const Tensor& tile_is_sparse, const OptionalTensor& schedule,
            int64_t out_features, const OptionalTensor& bias, bool batch_invariant, bool overlaps_previous) {
  const int device = payload.get_device();
  const DeviceGuard guard(device);
  void* stream = current_stream(device);
  const DeviceLimits* limits = schedule.has_value() ? cuda::usable_device(device, stream) : nullptr;
  if (limits == nullptr) return unpacked_linear(x, payload, tile_is_sparse, schedule, out_features, bias);
  const LayerCall layer =
      layer_call(*limits, device, x, payload, tile_is_sparse, *schedule, out_features, bias, batch_invariant);
  if (layer.call.args.tokens == 0 || out_features == 0) return layer.call.y;
  if (layer.plan.family == Family::kUnpack)
    return unpacked_linear(x, payload, tile_is_sparse, schedule, out_features, bias);
  const LayerCall* const layers[] = {&layer};
  launch_layers(*limits, device, stream, layers, 1, batch_invariant, overlaps_previous);
  return layer.call.y;
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

// On Hopper one launch for all layers whose own plans have as many splits, so that each gets the bits that it has
// alone; elsewhere a launch for each, and only the step from Python to here is shared.
std::vector<Tensor> tile_linear_group(const Tensor& x_in, const std::vector<GroupItem>& items, bool batch_invariant) {
  const Tensor x = as_contiguous(x_in);
  const int device = items[0].payload.get_device();
  const DeviceGuard guard(device);
  void* stream = current_stream(device);
  const bool have_schedules =
      std::all_of(items.begin(), items.end(), [](const GroupItem& item) { return item.schedule.has_value(); });
  const DeviceLimits* limits = have_schedules ? cuda::usable_device(device, stream) : nullptr;
  std::vector<Tensor> results;
  if (limits == nullptr || limits->family != Family::kSm90 || x.numel() == 0) {
    for (const GroupItem& item : items) {
      results.push_back(tile_linear(x, item.payload, item.tile_is_sparse, item.schedule, item.out_features, item.bias,
                                    batch_invariant));
    }
    return results;
  }
  std::vector<LayerCall> calls;
  for (const GroupItem& item : items) {
    check_same_device(items[0].payload, item.payload, kTileLinear, "payload");
    calls.push_back(layer_call(*limits, device, x, item.payload, item.tile_is_sparse, *item.schedule, item.out_features,
                               item.bias, batch_invariant));
  }
  for (const int splits : {1, 2, 4, 8}) {
    const LayerCall* together[kMaxLayers];
    int count = 0;
    for (const LayerCall& call : calls) {
      if (call.plan.family == Family::kSm90 && call.plan.splits == splits) together[count++] = &call;
    }
    if (count > 0) launch_layers(*limits, device, stream, together, count, batch_invariant, true);
  }
  for (size_t i = 0; i < calls.size(); ++i) {
    const GroupItem& item = items[i];
    const bool too_large = calls[i].plan.family == Family::kUnpack && item.out_features > 0;
    results.push_back(
        too_large ? unpacked_linear(x, item.payload, item.tile_is_sparse, item.schedule, item.out_features, item.bias)
                  : calls[i].call.y);
  }
  return results;
}

constexpr const char* kTileExperts = "tile_experts";

// A matrix of an expert that tokens are sent to, and its rows of the sorted x and y.
struct ExpertMatrix {
  int64_t index, begin, tokens;  // index: expert * parts + part
};

// What all matrices of a call share. x and y are sorted by expert.
struct ExpertsOnCard {
  const DeviceLimits* limits;
  int device;
  void* stream;
  Tensor x, y, payload, tile_is_sparse;
  OptionalTensor schedule, bias;
  const int64_t* begins;  // byte of the payload at which each matrix begins, and its end
  int64_t rows, cols, parts;
  bool batch_invariant, overlaps_previous;

  int64_t matrices() const { return tile_is_sparse.size(0); }
  // Matrices that one launch takes.
  int64_t at_once() const { return limits->family == Family::kSm90 ? std::min<int64_t>(kMaxLayers, matrices()) : 1; }

  // The plan for `count` matrices with at most `tokens` each. Of all their bytes it takes an average matrix's: so the
  // plans of a model are few, and kept.
  LaunchPlan plan_for(int64_t count, int64_t tokens, int splits) const {
    const int64_t padded = kTile * tile_is_sparse.size(1), bytes = payload.numel() / matrices();
    return cached_plan(*limits, {device, batch_invariant, splits, count * padded, cols, tokens, count * bytes});
  }
  // Splits that follow from the layer alone, or 0. A matrix alone would be split to fill the card, which its neighbours
  // in a launch do.
  int fixed_splits() const {
    if (!batch_invariant) return 0;
    return plan_for(at_once(), 1, 0).splits;
  }

  GemmLayer layer_of(const ExpertMatrix& matrix) const {
    const int64_t words = schedule->size(1), column = matrix.index % parts * rows;
    GemmLayer layer;
    layer.payload = static_cast<const uint8_t*>(payload.const_data_ptr()) + begins[matrix.index];
    layer.bias =
        bias.has_value() ? static_cast<const uint16_t*>(bias->const_data_ptr()) + matrix.index * rows : nullptr;
    layer.y = static_cast<uint16_t*>(y.mutable_data_ptr()) + matrix.begin * parts * rows + column;
    layer.rows = static_cast<int>(rows);
    layer.schedule = schedule_view(static_cast<const int32_t*>(schedule->const_data_ptr()) + matrix.index * words,
                                   static_cast<int>(tile_is_sparse.size(1)), static_cast<int>(tile_is_sparse.size(2)));
    layer.first_token = static_cast<int>(matrix.begin);
    layer.tokens = static_cast<int>(matrix.tokens);
    layer.y_stride = static_cast<int>(parts * rows);
    return layer;
  }

  // Unpack, then torch's own linear.
  void run_unpacked(const ExpertMatrix& matrix) const {
    using torch::stable::narrow;
    const auto of_matrix = [&](Tensor all, std::vector<int64_t> sizes) {
      return torch::stable::view(narrow(all, 0, matrix.index, 1), std::move(sizes));
    };
    OptionalTensor words, own_bias;
    if (schedule.has_value()) words = of_matrix(*schedule, {schedule->size(1)});
    if (bias.has_value()) own_bias = of_matrix(torch::stable::view(*bias, {matrices(), rows}), {rows});
    Tensor all_x = x, all_y = y, all_bytes = payload;
    const Tensor result = unpacked_linear(
        narrow(all_x, 0, matrix.begin, matrix.tokens),
        narrow(all_bytes, 0, begins[matrix.index], begins[matrix.index + 1] - begins[matrix.index]),
        of_matrix(tile_is_sparse, {tile_is_sparse.size(1), tile_is_sparse.size(2)}), words, rows, own_bias);
    Tensor rows_of_y = narrow(all_y, 0, matrix.begin, matrix.tokens);
    Tensor place = narrow(rows_of_y, 1, matrix.index % parts * rows, rows);
    torch::stable::copy_(place, result);
  }

  void run(const AlignedRows& rows_of_x, const ExpertMatrix* first, int64_t count, int splits) const {
    int64_t most_tokens = 0;
    for (int64_t i = 0; i < count; ++i) most_tokens = std::max(most_tokens, first[i].tokens);
    LaunchPlan plan = plan_for(count, most_tokens, splits);
    if (plan.family == Family::kUnpack) {  // too many items for one launch
      if (count == 1) return run_unpacked(*first);
      for (int64_t i = 0; i < count; ++i) run(rows_of_x, first + i, 1, splits);
      return;
    }
    GemmProblem problem{};
    problem.x = rows_of_x.owner.const_data_ptr();
    problem.tokens = static_cast<int>(x.size(0));
    problem.cols = static_cast<int>(cols);
    problem.x_stride = static_cast<int>(rows_of_x.stride);
    problem.cut_by_pair = batch_invariant;
    problem.layer_count = static_cast<int>(count);
    for (int64_t i = 0; i < count; ++i) problem.layers[i] = layer_of(first[i]);
    if (plan.family == Family::kSm80) problem = alone(problem, 0);
    plan.overlaps_previous = overlaps_previous;
    launch(problem, plan, x, stream);
  }
};

Tensor select_rows(const Tensor& from, const Tensor& rows) {
  StableIValue stack[3] = {torch::stable::detail::from(from), torch::stable::detail::from(int64_t{0}),
                           torch::stable::detail::from(rows)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void check_experts_on_card(const ExpertsCall& call, const Tensor& payload, const OptionalTensor& schedule,
                           const OptionalTensor& begins, int64_t matrices) {
  STD_TORCH_CHECK(begins.has_value() && begins->is_cpu() && begins->scalar_type() == ScalarType::Long &&
                      begins->dim() == 1 && begins->is_contiguous() && begins->numel() == matrices + 1,
                  kTileExperts, ": begins must be matrix_begins(tile_is_sparse), on the CPU");
  const int64_t end = static_cast<const int64_t*>(begins->const_data_ptr())[matrices];
  STD_TORCH_CHECK(end == payload.numel(), kTileExperts, ": payload has ", payload.numel(),
                  " bytes, but its tile flags need ", end);
  STD_TORCH_CHECK(is_aligned(payload.const_data_ptr()), kTileExperts,
                  ": payload must start at a multiple of 16 bytes; clone it");
  if (!schedule.has_value()) return;
  STD_TORCH_CHECK(schedule->scalar_type() == ScalarType::Int && schedule->dim() == 2 && schedule->is_contiguous() &&
                      schedule->size(0) == matrices &&
                      schedule->size(1) == schedule_words(call.tile_rows, call.tile_cols),
                  kTileExperts, ": schedule must be make_schedules(tile_is_sparse)");
  check_same_device(payload, *schedule, kTileExperts, "schedule");
}

// Rows of x are gathered by expert, and those of y put back. On Hopper kMaxLayers matrices are one launch, those with
// like numbers of tokens together; elsewhere each is one.
Tensor experts_on_card(const Tensor& x_in, const Tensor& experts_in, const Tensor& payload,
                       const Tensor& tile_is_sparse, const OptionalTensor& schedule, const OptionalTensor& begins,
                       int64_t out_features, int64_t parts, const OptionalTensor& bias_in, bool batch_invariant,
                       bool overlaps_previous) {
  cuda::require_driver(kTileExperts);
  const ExpertsCall call = experts_call(x_in, experts_in, payload, tile_is_sparse, out_features, parts, bias_in);
  check_experts_on_card(call, payload, schedule, begins, tile_is_sparse.size(0));
  const int64_t count = call.experts.numel();
  if (count == 0 || out_features == 0) return call.y;
  const int device = payload.get_device();
  const DeviceGuard guard(device);
  void* stream = current_stream(device);
  const std::vector<int64_t> experts =
      cuda::read_on_host(static_cast<const int64_t*>(call.experts.const_data_ptr()), count, stream, kTileExperts);
  const SortedRows sorted(experts.data(), count, call.expert_count, call.fan);
  // Row i of the sorted x is row routes[i] of x, and row p of y is row routes[count + p] of the sorted y.
  std::vector<int64_t> routes = sorted.of_x;
  routes.resize(2 * count);
  for (int64_t i = 0; i < count; ++i) routes[count + sorted.of_y[i]] = i;
  Tensor on_device = torch::stable::new_empty(call.experts, {2 * count});
  cuda::write_on_device(routes, static_cast<int64_t*>(on_device.mutable_data_ptr()), stream, kTileExperts);
  const Tensor x = select_rows(call.x, torch::stable::narrow(on_device, 0, 0, count));
  const ExpertsOnCard on_card{schedule.has_value() ? cuda::usable_device(device, stream) : nullptr,
                              device,
                              stream,
                              x,
                              torch::stable::new_empty(x, {count, parts * out_features}),
                              payload,
                              tile_is_sparse,
                              schedule,
                              call.bias,
                              static_cast<const int64_t*>(begins->const_data_ptr()),
                              out_features,
                              x.size(1),
                              parts,
                              batch_invariant,
                              overlaps_previous};
  std::vector<ExpertMatrix> hit;
  for (int64_t index = 0; index < on_card.matrices(); ++index) {
    const int64_t begin = sorted.begin[index / parts], tokens = sorted.begin[index / parts + 1] - begin;
    if (tokens > 0) hit.push_back({index, begin, tokens});
  }
  if (on_card.limits == nullptr) {
    for (const ExpertMatrix& matrix : hit) on_card.run_unpacked(matrix);
  } else {
    std::stable_sort(hit.begin(), hit.end(),
                     [](const ExpertMatrix& a, const ExpertMatrix& b) { return a.tokens < b.tokens; });
    const AlignedRows rows_of_x = aligned_rows(x, count, on_card.cols);
    const int splits = on_card.fixed_splits();
    const int64_t matrices = static_cast<int64_t>(hit.size()), launches = ceil_div(matrices, on_card.at_once());
    for (int64_t i = 0; i < launches; ++i) {
      const int64_t first = matrices * i / launches, last = matrices * (i + 1) / launches;
      on_card.run(rows_of_x, hit.data() + first, last - first, splits);
    }
  }
  return select_rows(on_card.y, torch::stable::narrow(on_device, 0, count, count));
}

Tensor tile_experts(const Tensor& x, const Tensor& experts, const Tensor& payload, const Tensor& tile_is_sparse,
                    const OptionalTensor& schedule, const OptionalTensor& begins, int64_t out_features, int64_t parts,
                    const OptionalTensor& bias, bool batch_invariant) {
  return experts_on_card(x, experts, payload, tile_is_sparse, schedule, begins, out_features, parts, bias,
                         batch_invariant, true);
}

Tensor tile_experts_train(const Tensor& x, const Tensor& experts, const Tensor& payload, const Tensor& tile_is_sparse,
                          const OptionalTensor& schedule, const OptionalTensor& begins, int64_t out_features,
                          int64_t parts, const OptionalTensor& bias, bool batch_invariant) {
  return experts_on_card(x, experts, payload, tile_is_sparse, schedule, begins, out_features, parts, bias,
                         batch_invariant, false);
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
  cuda::require_driver("masked_weight");
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
  cuda::require_driver("masked_weight_backward");
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
  cuda::require_driver("adamw_step");
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
  m.impl("tile_experts", TORCH_BOX(&patch_kernels::tile_experts));
  m.impl("tile_experts_train", TORCH_BOX(&patch_kernels::tile_experts_train));
  m.impl("masked_weight", TORCH_BOX(&patch_kernels::masked_weight));
  m.impl("masked_weight_backward", TORCH_BOX(&patch_kernels::masked_weight_backward));
  m.impl("adamw_step", TORCH_BOX(&patch_kernels::adamw_step));
}

namespace patch_kernels {
namespace {

// What the exports below return, in JSON and until the thread's next call: Python reads them through ctypes, and no op
// returns a string without leaking it.
const char* json_object(std::initializer_list<std::pair<const char*, std::string>> fields) {
  static thread_local std::string text;
  text = "{";
  for (const auto& [name, value] : fields) {
    text += (text.size() == 1 ? "\"" : ", \"") + std::string(name) + "\": \"";
    for (const char c : value) text += c == '"' || c == '\\' || c < ' ' ? ' ' : c;
    text += '"';
  }
  return (text += "}").c_str();
}

constexpr std::pair<Family, const char*> kFamilyNames[] = {
    {Family::kSm90, "sm90"}, {Family::kSm80, "sm80"}, {Family::kUnpack, "none"}};

Family family_named(const std::string& name) {
  for (const auto& [family, known] : kFamilyNames) {
    if (name == known) return family;
  }
  throw std::runtime_error("expected the family sm90, sm80 or none, got " + name);
}

const char* name_of(Family family) {
  for (const auto& [known, name] : kFamilyNames) {
    if (family == known) return name;
  }
  return "none";
}

}  // namespace
}  // namespace patch_kernels

#define PK_EXPORT extern "C" __attribute__((visibility("default")))

// The GEMM of a device for `patch-llm info` and for warnings. No exception may leave through C.
PK_EXPORT const char* patch_kernels_gemm_status(int device) {
  using namespace patch_kernels;
  cuda::GemmStatus status{Family::kUnpack, cuda::GemmState::kDisabled, ""};
  try {
    status = cuda::gemm_status(device);
  } catch (const std::exception& error) {
    status.reason = error.what();
  }
  const char* state = status.state == cuda::GemmState::kWorks      ? "works"
                      : status.state == cuda::GemmState::kDisabled ? "disabled"
                                                                   : "unchecked";
  return json_object({{"family", name_of(status.family)}, {"state", state}, {"reason", status.reason}});
}

// Why this machine's driver does not serve these kernels, or "", and its version (12040 for 12.4). With versions: why
// such a driver does not serve such a runtime.
PK_EXPORT const char* patch_kernels_driver_complaint(int driver, int runtime) {
  using namespace patch_kernels;
  const std::string complaint = runtime == 0 ? cuda::driver_complaint() : cuda::driver_complaint(driver, runtime);
  return json_object({{"complaint", complaint}, {"driver", std::to_string(cuda::driver_version())}});
}

// The best family for a compute capability (90 for 9.0).
PK_EXPORT const char* patch_kernels_best_family(int compute_capability) {
  using namespace patch_kernels;
  return json_object({{"family", name_of(best_family(compute_capability))}});
}

// For patch_kernels/card_check.py: the self-check of one family, by a process that does nothing else.
PK_EXPORT const char* patch_kernels_check_card(int device, const char* family) {
  using namespace patch_kernels;
  cuda::CardCheck result{false, ""};
  try {
    result = cuda::check_card(device, family_named(family));
  } catch (const std::exception& error) {
    result.complaint = error.what();
  }
  return json_object({{"ran", result.ran ? "yes" : "no"}, {"complaint", result.complaint}});
}

// For patch_kernels/card_check.py: what it found, before the first call on a device. Returns "" or why that is too
// late.
PK_EXPORT const char* patch_kernels_limit_family(int device, const char* family, const char* reason) {
  using namespace patch_kernels;
  std::string refused;
  try {
    if (!cuda::limit_family(device, family_named(family), reason)) refused = "the device was checked before";
  } catch (const std::exception& error) {
    refused = error.what();
  }
  return json_object({{"refused", refused}});
}

// For benchmarks/ops/bench_plans.py: a choice is five ints (bn, token_ctas, row_ctas, splits, depth).
PK_EXPORT void patch_kernels_force_plan(const int* choice) {
  using namespace patch_kernels;
  forced_choice = choice ? PlanChoice{choice[0], choice[1], choice[2], choice[3], choice[4]} : PlanChoice{};
  if (forced_choice.token_ctas * forced_choice.row_ctas * forced_choice.splits > kMaxSplits) forced_choice = {};
}

// Writes the possible choices of a call and the workers that each has, six ints, at most `capacity`, the library's own
// first; returns their number, -1 if there is no such device.
PK_EXPORT int patch_kernels_plan_choices(int device, int64_t rows, int64_t cols, int64_t tokens, int64_t payload_bytes,
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
    const int workers = plan_of(limits, choice, rows, cols, tokens).items.workers;
    const int numbers[6] = {choice.bn, choice.token_ctas, choice.row_ctas, choice.splits, choice.depth, workers};
    std::copy(numbers, numbers + 6, out + 6 * count++);
  }
  return count;
}
