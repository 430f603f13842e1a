// Arguments of adamw_step, for the CPU and CUDA bindings: checks, and the factors common to all values.
#pragma once

#include <cmath>

#include "common.h"

namespace patch_kernels {

struct AdamWCall {
  Tensor grad;  // a contiguous copy keeps the pointer alive
  AdamWArgs args;
};

// In double precision, as torch computes them.
inline AdamWFactors adamw_factors(double lr, double beta1, double beta2, double eps, double weight_decay,
                                  int64_t step) {
  const double correction1 = 1.0 - std::pow(beta1, static_cast<double>(step));
  const double correction2 = 1.0 - std::pow(beta2, static_cast<double>(step));
  return {static_cast<float>(1.0 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2),
          static_cast<float>(1.0 - lr * weight_decay),
          static_cast<float>(lr / correction1),
          static_cast<float>(1.0 / std::sqrt(correction2)),
          static_cast<float>(eps)};
}

inline int moment_bits(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return 32;
    case ScalarType::BFloat16:
      return 16;
    case ScalarType::Byte:
      return 8;
    default:
      STD_TORCH_CHECK(false, "adamw_step: moments must be float32, bfloat16 or uint8");
  }
  return 32;
}

inline float* adamw_scale(const Tensor& param, const OptionalTensor& scale, bool is_needed) {
  STD_TORCH_CHECK(scale.has_value() == is_needed, "adamw_step: scales belong to uint8 moments");
  if (!is_needed) return nullptr;
  STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Float && scale->is_contiguous() &&
                      scale->numel() == ceil_div(param.numel(), kAdamWBlock),
                  "adamw_step: scales must be contiguous float32, one per 256 values");
  check_same_device(param, *scale, "adamw_step", "a scale");
  return static_cast<float*>(scale->mutable_data_ptr());
}

inline AdamWCall adamw_call(const Tensor& param, const Tensor& grad_in, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                            const OptionalTensor& exp_avg_scale, const OptionalTensor& exp_avg_sq_scale,
                            const OptionalTensor& grad_scale, const AdamWFactors& factors, int64_t step, int64_t seed,
                            int64_t stream) {
  const ScalarType type = param.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::BFloat16) && param.is_contiguous(),
                  "adamw_step: param must be contiguous float32 or bfloat16");
  STD_TORCH_CHECK(grad_in.scalar_type() == type && grad_in.numel() == param.numel(),
                  "adamw_step: grad must have param's dtype and shape");
  check_same_device(param, grad_in, "adamw_step", "grad");
  for (const Tensor* moment : {&exp_avg, &exp_avg_sq}) {
    STD_TORCH_CHECK(
        moment->scalar_type() == exp_avg.scalar_type() && moment->numel() == param.numel() && moment->is_contiguous(),
        "adamw_step: moments must be contiguous, of one dtype and of param's shape");
    check_same_device(param, *moment, "adamw_step", "a moment");
  }
  if (grad_scale.has_value()) {
    STD_TORCH_CHECK(grad_scale->scalar_type() == ScalarType::Float && grad_scale->numel() == 1,
                    "adamw_step: grad_scale must be one float32 value");
    check_same_device(param, *grad_scale, "adamw_step", "grad_scale");
  }
  const int bits = moment_bits(exp_avg.scalar_type());
  AdamWCall call{torch::stable::contiguous(grad_in), {}};
  call.args = {param.mutable_data_ptr(),
               call.grad.const_data_ptr(),
               exp_avg.mutable_data_ptr(),
               exp_avg_sq.mutable_data_ptr(),
               adamw_scale(param, exp_avg_scale, bits == 8),
               adamw_scale(param, exp_avg_sq_scale, bits == 8),
               static_cast<const float*>(optional_pointer(grad_scale)),
               param.numel(),
               factors,
               static_cast<uint64_t>(seed),
               static_cast<uint32_t>(stream),
               static_cast<uint32_t>(step),
               to_dtype(type, "adamw_step"),
               bits};
  return call;
}

}  // namespace patch_kernels
