// nf4_linear_lora from the other operators.
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

TORCH_LIBRARY_IMPL(moka, CPU, m) { m.impl("nf4_linear_lora", &nf4_linear_lora_apart); }

}  // namespace moka
