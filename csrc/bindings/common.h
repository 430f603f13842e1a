// Shared by the CPU and CUDA bindings: argument checks and the step from tensors to the plain structs of ops.h.
// Python checks first and speaks to the user; these checks keep memory safe for callers of torch.ops.
#pragma once

#if !defined(TORCH_TARGET_VERSION)
#error "build with -DTORCH_TARGET_VERSION=0x020b000000000000, or the library loads only on the torch it was built with"
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../format/layout.h"
#include "../format/packed_dtype.h"
#include "../ops.h"

namespace patch_kernels {

using Tensor = torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using ScalarType = torch::headeronly::ScalarType;

// Weights of a tile_linear_group op (schema.cpp): there is one for each number.
constexpr int kLeastInGroup = 2, kMostInGroup = 4;

inline std::optional<DType> find_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      return std::nullopt;
  }
}

inline DType to_dtype(ScalarType type, const char* op) {
  const std::optional<DType> dtype = find_dtype(type);
  STD_TORCH_CHECK(dtype.has_value(), op, ": expected a floating-point tensor of 16, 32 or 64 bits");
  return *dtype;
}

inline bool is_packed(ScalarType type) {
  const std::optional<DType> dtype = find_dtype(type);
  return dtype.has_value() && is_packed(*dtype);
}

// "float16 or bfloat16"
inline std::string packed_names() {
  std::string names;
  for_each_packed([&](auto packed) { names += (names.empty() ? "" : " or ") + std::string(packed.kName); });
  return names;
}

inline void check_same_device(const Tensor& a, const Tensor& b, const char* op, const char* name) {
  STD_TORCH_CHECK(a.is_cpu() == b.is_cpu() && a.get_device() == b.get_device(), op, ": ", name,
                  " is on another device than the first tensor");
}

// Geometry of packed tiles. The payload's size is checked where the flags can be read (CPU).
inline TiledMatrix tiled_matrix(const Tensor& payload, const Tensor& tile_is_sparse, int64_t rows, int64_t cols,
                                const char* op) {
  STD_TORCH_CHECK(rows >= 0 && cols >= 1, op, ": expected rows >= 0 and cols >= 1, got ", rows, " and ", cols);
  STD_TORCH_CHECK(payload.scalar_type() == ScalarType::Byte && payload.dim() == 1 && payload.is_contiguous(), op,
                  ": payload must be a contiguous 1-D uint8 tensor");
  STD_TORCH_CHECK(tile_is_sparse.scalar_type() == ScalarType::Byte && tile_is_sparse.dim() == 2 &&
                      tile_is_sparse.is_contiguous() && tile_is_sparse.size(0) == ceil_div(rows, kTile) &&
                      tile_is_sparse.size(1) == ceil_div(cols, kTile),
                  op, ": tile_is_sparse must be contiguous uint8 of shape (ceil(rows/128), ceil(cols/128))");
  check_same_device(payload, tile_is_sparse, op, "tile_is_sparse");
  return {static_cast<const uint8_t*>(payload.const_data_ptr()),
          static_cast<const uint8_t*>(tile_is_sparse.const_data_ptr()), rows, cols};
}

inline void check_payload_on_host(const Tensor& payload, const Tensor& tile_is_sparse, const char* op) {
  const int64_t expected =
      cpu::payload_bytes(static_cast<const uint8_t*>(tile_is_sparse.const_data_ptr()), tile_is_sparse.numel());
  STD_TORCH_CHECK(payload.numel() == expected, op, ": payload has ", payload.numel(),
                  " bytes, but its tile flags need ", expected);
}

// Asks first: the call through torch's dispatcher takes half a microsecond even where nothing is to do.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// y (..., rows) for x (..., cols). By the C function, again for the dispatcher's time.
inline Tensor new_output(const Tensor& x, int64_t rows) {
  const int64_t dims = x.dim();
  std::vector<int64_t> sizes(2 * dims);
  int64_t* strides = sizes.data() + dims;
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    sizes[i] = i == dims - 1 ? rows : x.size(i);
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t dtype, device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle y;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes.data(), strides, dtype, device_type, x.get_device_index(), &y));
  return Tensor(y);
}

struct LinearCall {
  Tensor x;  // contiguous
  std::optional<Tensor> bias;
  Tensor y;
  TileLinearArgs args;
};

inline LinearCall linear_call(const Tensor& x_in, const Tensor& payload, const Tensor& tile_is_sparse,
                              int64_t out_features, const OptionalTensor& bias_in, const char* op) {
  const ScalarType type = x_in.scalar_type();
  STD_TORCH_CHECK(is_packed(type), op, ": x must be ", packed_names());
  const int64_t dims = x_in.dim();
  STD_TORCH_CHECK(dims >= 1, op, ": x needs at least one dimension");
  check_same_device(x_in, payload, op, "payload");
  const int64_t cols = x_in.size(dims - 1);
  const TiledMatrix weight = tiled_matrix(payload, tile_is_sparse, out_features, cols, op);
  const Tensor x = as_contiguous(x_in);
  std::optional<Tensor> bias;
  if (bias_in.has_value()) {
    STD_TORCH_CHECK(bias_in->scalar_type() == type && bias_in->numel() == out_features, op,
                    ": bias must have x's dtype and out_features elements");
    check_same_device(x, *bias_in, op, "bias");
    bias = as_contiguous(*bias_in);
  }
  const Tensor y = new_output(x, out_features);
  const TileLinearArgs args{
      x.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, y.mutable_data_ptr(), x.numel() / cols, weight,
      to_dtype(type, op)};
  return {x, bias, y, args};
}

// x (T, K) and the experts (P,) of its rows, all contiguous; y (P, parts*N).
struct ExpertsCall {
  Tensor x, experts;
  OptionalTensor bias;  // (experts*parts*N)
  Tensor y;
  int64_t expert_count, tile_rows, tile_cols;
  int64_t fan;  // rows of y for each row of x
};

inline ExpertsCall experts_call(const Tensor& x, const Tensor& experts, const Tensor& payload,
                                const Tensor& tile_is_sparse, int64_t out_features, int64_t parts,
                                const OptionalTensor& bias_in) {
  const char* op = "tile_experts";
  STD_TORCH_CHECK(is_packed(x.scalar_type()) && x.dim() == 2 && x.size(1) >= 1, op, ": x must be (T, K) ",
                  packed_names());
  STD_TORCH_CHECK(out_features >= 0 && parts >= 1, op, ": expected out_features >= 0 and parts >= 1, got ",
                  out_features, " and ", parts);
  STD_TORCH_CHECK(payload.scalar_type() == ScalarType::Byte && payload.dim() == 1 && payload.is_contiguous(), op,
                  ": payload must be a contiguous 1-D uint8 tensor");
  const int64_t tokens = x.size(0), tile_rows = ceil_div(out_features, kTile), tile_cols = ceil_div(x.size(1), kTile);
  STD_TORCH_CHECK(tile_is_sparse.scalar_type() == ScalarType::Byte && tile_is_sparse.dim() == 3 &&
                      tile_is_sparse.is_contiguous() && tile_is_sparse.size(0) % parts == 0 &&
                      tile_is_sparse.size(1) == tile_rows && tile_is_sparse.size(2) == tile_cols,
                  op, ": tile_is_sparse must be contiguous uint8 of shape (E*parts, ceil(N/128), ceil(K/128))");
  STD_TORCH_CHECK(experts.scalar_type() == ScalarType::Long && experts.dim() == 1, op, ": experts must be (P,) int64");
  const int64_t rows = experts.size(0), expert_count = tile_is_sparse.size(0) / parts;
  STD_TORCH_CHECK(tokens == 0 ? rows == 0 : rows >= tokens && rows % tokens == 0, op, ": expected a multiple of ",
                  tokens, " experts, as x has rows, got ", rows);
  check_same_device(x, experts, op, "experts");
  check_same_device(x, payload, op, "payload");
  check_same_device(x, tile_is_sparse, op, "tile_is_sparse");
  OptionalTensor bias;
  if (bias_in.has_value()) {
    STD_TORCH_CHECK(bias_in->scalar_type() == x.scalar_type() && bias_in->dim() == 2 &&
                        bias_in->size(0) == expert_count && bias_in->size(1) == parts * out_features,
                    op, ": bias must be (E, parts*N) of x's dtype");
    check_same_device(x, *bias_in, op, "bias");
    bias = torch::stable::view(as_contiguous(*bias_in), {bias_in->numel()});
  }
  return {as_contiguous(x),
          as_contiguous(experts),
          bias,
          torch::stable::new_empty(x, {rows, parts * out_features}),
          expert_count,
          tile_rows,
          tile_cols,
          tokens == 0 ? 1 : rows / tokens};
}

// Rows of y sorted by their expert: those of expert e are rows[begin[e]] to rows[begin[e + 1] - 1], in their order.
struct SortedRows {
  std::vector<int64_t> begin, of_y, of_x;

  SortedRows(const int64_t* experts, int64_t count, int64_t expert_count, int64_t fan)
      : begin(expert_count + 1), of_y(count), of_x(count) {
    for (int64_t p = 0; p < count; ++p) {
      STD_TORCH_CHECK(experts[p] >= 0 && experts[p] < expert_count, "tile_experts: experts must be 0 to ",
                      expert_count - 1, ", got ", experts[p], " in row ", p);
      ++begin[experts[p] + 1];
    }
    for (int64_t e = 0; e < expert_count; ++e) begin[e + 1] += begin[e];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t at = next[experts[p]]++;
      of_y[at] = p;
      of_x[at] = p / fan;
    }
  }
};

// What the tile_linear_group schemas have of every weight, in their order.
struct GroupItem {
  Tensor payload, tile_is_sparse;
  OptionalTensor schedule;
  int64_t out_features;
  OptionalTensor bias;
};
constexpr uint64_t kGroupItemArgs = 5;
using GroupFunction = std::vector<Tensor>(const Tensor& x, const std::vector<GroupItem>& items, bool batch_invariant);

// TORCH_BOX for any number of weights: x, the arguments of each weight, batch_invariant.
template <GroupFunction* kFunction>
void boxed_group(StableIValue* stack, uint64_t args, uint64_t outputs) {
  using torch::stable::detail::to;
  const Tensor x = to<Tensor>(stack[0]);
  std::vector<GroupItem> items;
  items.reserve(outputs);
  for (uint64_t i = 1; i + 1 < args; i += kGroupItemArgs) {
    items.push_back({to<Tensor>(stack[i]), to<Tensor>(stack[i + 1]), to<OptionalTensor>(stack[i + 2]),
                     to<int64_t>(stack[i + 3]), to<OptionalTensor>(stack[i + 4])});
  }
  const std::vector<Tensor> results = kFunction(x, items, to<bool>(stack[args - 1]));
  for (uint64_t i = 0; i < outputs; ++i) stack[i] = torch::stable::detail::from(results[i]);
}

template <GroupFunction* kFunction>
void register_group(torch::stable::detail::StableLibrary& m) {
  for (int count = kLeastInGroup; count <= kMostInGroup; ++count) {
    m.impl(("tile_linear_group" + std::to_string(count)).c_str(), boxed_group<kFunction>);
  }
}

struct MaskCall {
  Tensor weight, factors;
  OptionalTensor pattern_logits, fixed_pattern, tile_logits, key;  // contiguous copies keep the pointers alive
  MaskedWeightArgs args;
  ScalarType pattern_type, tile_type;
};

// Inputs of the masked_weight schemas, in their order.
struct MaskInputs {
  const Tensor& weight;
  const OptionalTensor &pattern_logits, &fixed_pattern, &tile_logits;
  const Tensor& factors;
  const OptionalTensor& key;
  int64_t tile_rows, tile_cols;
  bool hard_pattern, hard_tile;
  int64_t layer;
};

inline const void* optional_pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

inline OptionalTensor optional_contiguous(const OptionalTensor& tensor, const Tensor& weight, ScalarType type,
                                          int64_t numel, const char* name) {
  if (!tensor.has_value()) return tensor;
  STD_TORCH_CHECK(tensor->scalar_type() == type && tensor->numel() == numel, "masked_weight: ", name,
                  " has the wrong dtype or number of elements; expected ", numel, ", got ", tensor->numel());
  check_same_device(weight, *tensor, "masked_weight", name);
  return torch::stable::contiguous(*tensor);
}

inline MaskCall mask_call(const MaskInputs& in) {
  STD_TORCH_CHECK(in.weight.dim() == 2 && in.weight.size(1) % kGroup == 0 && in.weight.size(1) > 0,
                  "masked_weight: weight must be (N, K) with K a positive multiple of 4");
  STD_TORCH_CHECK(in.pattern_logits.has_value() != in.fixed_pattern.has_value(),
                  "masked_weight: give either pattern_logits or fixed_pattern");
  STD_TORCH_CHECK(in.tile_rows >= 1 && in.tile_cols >= kGroup && in.tile_cols % kGroup == 0,
                  "masked_weight: tile must have at least 1 row and a multiple of 4 columns");
  STD_TORCH_CHECK(in.factors.scalar_type() == ScalarType::Double && in.factors.numel() == 4,
                  "masked_weight: factors must be four doubles");
  check_same_device(in.weight, in.factors, "masked_weight", "factors");
  const Tensor weight = torch::stable::contiguous(in.weight);
  const int64_t rows = weight.size(0), cols = weight.size(1), groups = rows * cols / kGroup;
  const bool is_double = weight.scalar_type() == ScalarType::Double;
  const ScalarType tile_type = is_double ? ScalarType::Double : ScalarType::Float;
  const bool short_logits =
      !is_double && in.pattern_logits.has_value() && in.pattern_logits->scalar_type() == ScalarType::BFloat16;
  const ScalarType pattern_type = short_logits ? ScalarType::BFloat16 : tile_type;
  MaskCall call{weight,
                torch::stable::contiguous(in.factors),
                optional_contiguous(in.pattern_logits, weight, pattern_type, groups * 6, "pattern_logits"),
                optional_contiguous(in.fixed_pattern, weight, ScalarType::Byte, (groups + 1) / 2, "fixed_pattern"),
                optional_contiguous(in.tile_logits, weight, tile_type,
                                    ceil_div(rows, in.tile_rows) * ceil_div(cols, in.tile_cols), "tile_logits"),
                optional_contiguous(in.key, weight, ScalarType::Long, 2, "key"),
                {},
                pattern_type,
                tile_type};
  call.args = {weight.const_data_ptr(),
               optional_pointer(call.pattern_logits),
               static_cast<const uint8_t*>(optional_pointer(call.fixed_pattern)),
               optional_pointer(call.tile_logits),
               static_cast<const double*>(call.factors.const_data_ptr()),
               static_cast<const int64_t*>(optional_pointer(call.key)),
               rows,
               cols,
               in.tile_rows,
               in.tile_cols,
               in.hard_pattern,
               in.hard_tile,
               static_cast<uint32_t>(in.layer),
               to_dtype(weight.scalar_type(), "masked_weight"),
               to_dtype(pattern_type, "masked_weight")};
  return call;
}

// Gradients of the logits and the masked weight; an empty tensor stands for "there is none".
struct MaskGradients {
  Tensor grad, sums_grad;  // contiguous
  Tensor grad_pattern, grad_tile, masked;
  MaskedWeightGrads pointers;
};

inline Tensor like_or_empty(const OptionalTensor& tensor, const Tensor& weight, ScalarType type) {
  return tensor.has_value() ? torch::stable::empty_like(*tensor) : torch::stable::new_empty(weight, {0}, type);
}

inline MaskGradients mask_gradients(const MaskCall& call, const Tensor& grad_masked, const Tensor& grad_sums,
                                    bool with_masked) {
  STD_TORCH_CHECK(grad_masked.scalar_type() == call.weight.scalar_type() &&
                      grad_masked.numel() == call.weight.numel() && grad_sums.numel() == 2 &&
                      grad_sums.scalar_type() == ScalarType::Double,
                  "masked_weight_backward: grad_masked must be like weight and grad_sums two doubles");
  check_same_device(call.weight, grad_masked, "masked_weight_backward", "grad_masked");
  check_same_device(call.weight, grad_sums, "masked_weight_backward", "grad_sums");
  MaskGradients g{torch::stable::contiguous(grad_masked),
                  torch::stable::contiguous(grad_sums),
                  like_or_empty(call.pattern_logits, call.weight, call.pattern_type),
                  like_or_empty(call.tile_logits, call.weight, call.tile_type),
                  with_masked ? torch::stable::empty_like(call.weight)
                              : torch::stable::new_empty(call.weight, {0}, call.weight.scalar_type()),
                  {}};
  g.pointers = {g.grad.const_data_ptr(), static_cast<const double*>(g.sums_grad.const_data_ptr()),
                call.pattern_logits.has_value() ? g.grad_pattern.mutable_data_ptr() : nullptr,
                call.tile_logits.has_value() ? g.grad_tile.mutable_data_ptr() : nullptr,
                with_masked ? g.masked.mutable_data_ptr() : nullptr};
  return g;
}

}  // namespace patch_kernels
