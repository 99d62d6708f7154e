// Kronecker mixture operators on the CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../checks.h"
#include "kron_cpu.h"
#include "kron_dense.h"

namespace moka {
namespace {

at::Tensor kron_add(const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B, const at::Tensor& alpha,
                    at::IntArrayRef shapes) {
  at::Tensor d = dense_mixture(A, B, alpha, parse_shapes(shapes));
  return (weight.to(d.scalar_type()) + d).to(weight.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> kron_mix_grad(const at::Tensor& x, const at::Tensor& grad_y,
                                                             const at::Tensor& A, const at::Tensor& B,
                                                             const at::Tensor& alpha, at::IntArrayRef shapes,
                                                             bool need_A, bool need_B, bool need_alpha) {
  const Mixture mix = parse_shapes(shapes);
  const auto dt = A.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor G = at::matmul(grad_y.reshape({-1, mix.N}).t().to(dt), x.reshape({-1, mix.K}).to(dt));
  at::Tensor dA = at::zeros({mix.a_numel}, dt), dB = at::zeros({mix.b_numel}, dt), dalpha = at::zeros({(int64_t)mix.components.size()}, dt);
  for (size_t i = 0; i < mix.components.size(); ++i) {
    const auto& c = mix.components[i];
    at::Tensor a = c.identity == Identity::kA ? at::eye(c.ma, dt) : A.view(-1).slice(0, c.a_offset, c.a_offset + c.ma * c.na).view({c.ma, c.na}).to(dt);
    at::Tensor b = c.identity == Identity::kB ? at::eye(c.mb, dt) : B.view(-1).slice(0, c.b_offset, c.b_offset + c.mb * c.nb).view({c.mb, c.nb}).to(dt);
    at::Tensor g4 = G.view({c.ma, c.mb, c.na, c.nb}), al = alpha.view(-1)[i].to(dt);
    at::Tensor da = at::einsum("pqrs,qs->pr", {g4, b}), db = at::einsum("pqrs,pr->qs", {g4, a});
    dalpha[i].copy_(c.identity == Identity::kA ? (db * b).sum() : (da * a).sum());
    if (c.identity != Identity::kA) dA.slice(0, c.a_offset, c.a_offset + c.ma * c.na).copy_((al * da).view(-1));
    if (c.identity != Identity::kB) dB.slice(0, c.b_offset, c.b_offset + c.mb * c.nb).copy_((al * db).view(-1));
  }
  const at::Tensor none = at::empty({0}, A.options());
  return {need_A ? dA.to(A.scalar_type()).view_as(A) : none, need_B ? dB.to(B.scalar_type()).view_as(B) : none,
          need_alpha ? dalpha.to(alpha.scalar_type()).view_as(alpha) : at::empty({0}, alpha.options())};
}

}  // namespace

at::Tensor kron_mix_cpu(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const at::Tensor& alpha,
                    at::IntArrayRef shapes, bool transpose, const std::optional<at::Tensor>& add) {
  const Mixture mix = parse_shapes(shapes);
  check_factors(mix, A, B, alpha, x, "x");
  check_last_dim("x", x, transpose ? mix.N : mix.K);
  at::Tensor d = dense_mixture(A, B, alpha, mix);
  at::Tensor y = at::matmul(x.to(d.scalar_type()), transpose ? d : d.t());
  if (add) y = y + *add;
  return y.to(x.scalar_type());
}

TORCH_LIBRARY_IMPL(moka, CPU, m) {
  m.impl("kron_add", &kron_add);
  m.impl("kron_mix", &kron_mix_cpu);
  m.impl("kron_mix_grad", &kron_mix_grad);
}

}  // namespace moka
