// The gate on the CPU.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "gate.h"

namespace moka {
namespace {

at::Tensor gate(const at::Tensor& logits, double scale) {
  const at::Tensor in = gate_input(logits);
  at::Tensor alpha = at::empty_like(in);
  const int64_t r = in.numel();
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "gate", [&] {
    const auto* g = in.const_data_ptr<scalar_t>();
    auto* out = alpha.mutable_data_ptr<scalar_t>();
    scalar_t largest = -std::numeric_limits<scalar_t>::infinity(), total = 0;
    for (int64_t i = 0; i < r; ++i) largest = std::max(largest, g[i]);
    for (int64_t i = 0; i < r; ++i) total += out[i] = std::exp(g[i] - largest);
    for (int64_t i = 0; i < r; ++i) out[i] = static_cast<scalar_t>(scale) * (out[i] / total);
  });
  return alpha;
}

at::Tensor gate_grad(const at::Tensor& alpha, const at::Tensor& grad_alpha, double scale) {
  const auto [a, d] = gate_grad_inputs(alpha, grad_alpha);
  at::Tensor grad = at::empty_like(a);
  const int64_t r = a.numel();
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "gate_grad", [&] {
    const auto *pa = a.const_data_ptr<scalar_t>(), *pd = d.const_data_ptr<scalar_t>();
    auto* out = grad.mutable_data_ptr<scalar_t>();
    scalar_t dot = 0;
    for (int64_t i = 0; i < r; ++i) dot += pa[i] * pd[i];
    dot /= static_cast<scalar_t>(scale);
    for (int64_t i = 0; i < r; ++i) out[i] = pa[i] * (pd[i] - dot);
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(moka, CPU, m) {
  m.impl("gate", &gate);
  m.impl("gate_grad", &gate_grad);
}

}  // namespace moka
