#pragma once
#include <ATen/ATen.h>
#include "../checks.h"
namespace moka {
inline at::Tensor dense_mixture(const at::Tensor& A, const at::Tensor& B, const at::Tensor& alpha, const Mixture& mix) {
  const auto dt = A.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor out = at::zeros({mix.N, mix.K}, dt);
  for (size_t i = 0; i < mix.components.size(); ++i) {
    const auto& c = mix.components[i];
    at::Tensor a = c.identity == Identity::kA ? at::eye(c.ma, dt) : A.view(-1).slice(0, c.a_offset, c.a_offset + c.ma * c.na).view({c.ma, c.na}).to(dt);
    at::Tensor b = c.identity == Identity::kB ? at::eye(c.mb, dt) : B.view(-1).slice(0, c.b_offset, c.b_offset + c.mb * c.nb).view({c.mb, c.nb}).to(dt);
    out += alpha.view(-1)[i].to(dt) * at::kron(a.contiguous(), b.contiguous());
  }
  return out;
}
}  // namespace moka
