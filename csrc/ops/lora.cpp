// nf4_linear_lora and lora_grad from the other operators.
#include "lora.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "checks.h"

namespace moka {

namespace {

void check_same(const char* name, const at::Tensor& t, const at::Tensor& grad_y) {
  TORCH_CHECK_TYPE(t.scalar_type() == grad_y.scalar_type(), name, ": expected the dtype of grad_y, ",
                   grad_y.scalar_type(), ", got ", t.scalar_type());
  check_device(name, t, "grad_y", grad_y);
}

}  // namespace

int64_t check_lora(const at::Tensor& x, int64_t in, const at::Tensor& A, const at::Tensor& B, const at::Tensor& u,
                   int64_t N, int64_t K) {
  check_last_dim("x", x, in);
  const int64_t tokens = in ? x.numel() / in : 0;
  TORCH_CHECK_VALUE(A.dim() == 2 && A.size(1) == K && B.dim() == 2 && B.size(0) == N && B.size(1) == A.size(0),
                    "A, B: expected [r, ", K, "] and [", N, ", r], got ", A.sizes(), " and ", B.sizes());
  TORCH_CHECK_VALUE(u.dim() == 2 && u.size(0) == tokens && u.size(1) == A.size(0), "u: expected [", tokens, ", ",
                    A.size(0), "], got ", u.sizes());
  TORCH_CHECK_TYPE(A.scalar_type() == B.scalar_type() && A.scalar_type() == u.scalar_type(),
                   "A, B, u: expected one dtype, got ", A.scalar_type(), ", ", B.scalar_type(), " and ",
                   u.scalar_type());
  check_device("A", A, "x", x);
  check_device("B", B, "x", x);
  check_device("u", u, "x", x);
  return tokens;
}

at::Tensor nf4_linear_lora_apart(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                                 const OptionalTensor& absmax2, const OptionalTensor& code2,
                                 const OptionalTensor& offset, int64_t blocksize, int64_t blocksize2, int64_t N,
                                 int64_t K, const OptionalTensor& bias, const at::Tensor& A, const at::Tensor& B,
                                 const at::Tensor& u, double scale, bool transpose, at::ScalarType dtype) {
  const at::AutoDispatchBelowADInplaceOrView below;
  check_lora(x, transpose ? N : K, A, B, u, N, K);
  const at::Tensor y =
      call_nf4_linear(x, packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K, bias, transpose)
          .to(dtype);
  at::Tensor flat = y.view({-1, y.size(-1)});
  const at::Tensor factor = transpose ? A : B.t();
  if (dtype == u.scalar_type())
    flat.addmm_(u, factor, 1, scale);
  else
    flat.add_(at::mm(u, factor), scale);
  return y;
}

void check_lora_grad(const at::Tensor& grad_y, const OptionalTensor& x, const at::Tensor& A, const at::Tensor& B,
                     const OptionalTensor& u) {
  const bool factors = A.dim() == 2 && B.dim() == 2 && B.size(1) == A.size(0);
  TORCH_CHECK_VALUE(factors && grad_y.dim() == 2 && grad_y.size(1) == B.size(0),
                    "grad_y, A, B: expected [tokens, N], [r, K] and [N, r], got ", grad_y.sizes(), ", ", A.sizes(),
                    " and ", B.sizes());
  const int64_t tokens = grad_y.size(0);
  auto check = [&](const char* name, const OptionalTensor& t, int64_t width) {
    if (!t) return;
    TORCH_CHECK_VALUE(t->dim() == 2 && t->size(0) == tokens && t->size(1) == width, name, ": expected [", tokens, ", ",
                      width, "], got ", t->sizes());
    check_same(name, *t, grad_y);
  };
  check("x", x, A.size(1));
  check("u", u, A.size(0));
  check_same("A", A, grad_y);
  check_same("B", B, grad_y);
}

LoraGrads lora_grad_apart(const at::Tensor& grad_y, const OptionalTensor& x, const at::Tensor& A, const at::Tensor& B,
                          const OptionalTensor& u, double scale, at::ScalarType dtype_A, at::ScalarType dtype_B) {
  const at::AutoDispatchBelowADInplaceOrView below;
  check_lora_grad(grad_y, x, A, B, u);
  const at::Tensor grad_u = at::mm(grad_y, B);
  auto parameter_grad = [&](const at::Tensor& parameter, const at::Tensor& a, const OptionalTensor& b,
                            at::ScalarType dtype) {
    return b ? at::addmm(parameter, a.t(), *b, 0, scale).to(dtype) : at::empty({0}, parameter.options().dtype(dtype));
  };
  return {grad_u, parameter_grad(A, grad_u, x, dtype_A), parameter_grad(B, grad_y, u, dtype_B)};
}

TORCH_LIBRARY_IMPL(moka, CPU, m) {
  m.impl("nf4_linear_lora", &nf4_linear_lora_apart);
  m.impl("lora_grad", &lora_grad_apart);
}

}  // namespace moka
