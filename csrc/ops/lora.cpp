// nf4_linear_lora and lora_grad from the other operators.
#include "lora.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "checks.h"

namespace moka {

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

void check_lora_grad(const at::Tensor& grad_y, const at::Tensor& B, const at::Tensor& u) {
  TORCH_CHECK_VALUE(grad_y.dim() == 2 && B.dim() == 2 && u.dim() == 2 && B.size(0) == grad_y.size(1) &&
                        u.size(0) == grad_y.size(0) && u.size(1) == B.size(1),
                    "grad_y, B, u: expected [tokens, N], [N, r] and [tokens, r], got ", grad_y.sizes(), ", ", B.sizes(),
                    " and ", u.sizes());
  TORCH_CHECK_TYPE(grad_y.scalar_type() == B.scalar_type() && B.scalar_type() == u.scalar_type(),
                   "grad_y, B, u: expected one dtype, got ", grad_y.scalar_type(), ", ", B.scalar_type(), " and ",
                   u.scalar_type());
  check_device("B", B, "grad_y", grad_y);
  check_device("u", u, "grad_y", grad_y);
}

std::tuple<at::Tensor, at::Tensor> lora_grad_apart(const at::Tensor& grad_y, const at::Tensor& B, const at::Tensor& u,
                                                   double scale) {
  const at::AutoDispatchBelowADInplaceOrView below;
  check_lora_grad(grad_y, B, u);
  return {at::mm(grad_y, B), at::addmm(B, grad_y.t(), u, 0, scale)};
}

TORCH_LIBRARY_IMPL(moka, CPU, m) {
  m.impl("nf4_linear_lora", &nf4_linear_lora_apart);
  m.impl("lora_grad", &lora_grad_apart);
}

}  // namespace moka
