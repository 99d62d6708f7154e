// The gate's formulas, for every device and dtype.
#pragma once

#include <ATen/ATen.h>

#include "../checks.h"

namespace moka {

// alpha = scale softmax(logits), at least in fp32.
inline at::Tensor gate(const at::Tensor& logits, double scale) {
  const auto dtype = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return at::softmax(logits, 0, dtype).mul_(scale);
}

inline at::Tensor gate_grad(const at::Tensor& alpha, const at::Tensor& grad_alpha, double scale) {
  return alpha * (grad_alpha - at::dot(alpha, grad_alpha).div_(scale));
}

}  // namespace moka
