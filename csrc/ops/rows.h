// A batch whose rows have mixtures of their own: what the backends share.
#pragma once

#include "../checks.h"
#include "operators.h"

namespace moka {

// A [adapters, entries], B likewise, alpha [adapters, r], adapter [rows of x] int32; x [rows, K].
inline Mixture parse_rows(const at::Tensor& x, int64_t N, int64_t K, const at::Tensor& A, const at::Tensor& B,
                          const at::Tensor& alpha, const at::Tensor& adapter, at::IntArrayRef shapes) {
  TORCH_CHECK_VALUE(A.dim() == 2 && B.dim() == 2 && alpha.dim() == 2 && A.size(0) > 0 && B.size(0) == A.size(0) &&
                        alpha.size(0) == A.size(0),
                    "A, B, alpha: expected [adapters, ...] each, got ", A.sizes(), ", ", B.sizes(), ", ",
                    alpha.sizes());
  TORCH_CHECK_VALUE(x.dim() == 2 && adapter.dim() == 1 && adapter.size(0) == x.size(0),
                    "adapter: expected one number for each row of x, got ", adapter.sizes(), " and x ", x.sizes());
  check_dtype("adapter", adapter, {at::kInt});
  check_device("adapter", adapter, "x", x);
  return parse_mixture(N, K, A[0], B[0], alpha[0], shapes, x.scalar_type(), x, "x");
}

// For any shapes and backend: each mixture runs over all rows, those of the other adapters set to zero.
at::Tensor nf4_linear_masked(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                             const OptionalTensor& absmax2, const OptionalTensor& code2, const OptionalTensor& offset,
                             int64_t blocksize, int64_t blocksize2, int64_t N, int64_t K, const OptionalTensor& bias,
                             const at::Tensor& A, const at::Tensor& B, const at::Tensor& alpha,
                             const at::Tensor& adapter, at::IntArrayRef shapes);

}  // namespace moka
