// The gate's arguments, checked: alpha = scale softmax(logits), and
// grad_logits = alpha (grad_alpha - <alpha, grad_alpha> / scale).
#pragma once

#include <ATen/Dispatch.h>

#include <utility>

#include "../checks.h"

namespace moka {

// In fp32, or fp64 for fp64: at a usual learning rate the changes of a logit are lost in 16 bits.
inline at::Tensor gate_input(const at::Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() == 1, "logits: expected shape [r], got ", logits.sizes());
  check_dtype("logits", logits, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
  const bool wide = logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kDouble;
  return (wide ? logits : logits.to(at::kFloat)).contiguous();
}

inline std::pair<at::Tensor, at::Tensor> gate_grad_inputs(const at::Tensor& alpha, const at::Tensor& grad_alpha) {
  check_dtype("alpha", alpha, {at::kFloat, at::kDouble});
  check_dtype("grad_alpha", grad_alpha, {alpha.scalar_type()});
  check_numel("grad_alpha", grad_alpha, alpha.numel());
  check_device("grad_alpha", grad_alpha, "alpha", alpha);
  return {alpha.contiguous(), grad_alpha.contiguous()};
}

}  // namespace moka
