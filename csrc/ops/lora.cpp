// nf4_linear_lora from the other operators.
#include "lora.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

namespace moka {

at::Tensor nf4_linear_lora_apart(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                                 const OptionalTensor& absmax2, const OptionalTensor& code2,
                                 const OptionalTensor& offset, int64_t blocksize, int64_t blocksize2, int64_t N,
                                 int64_t K, const OptionalTensor& bias, const at::Tensor& A, const at::Tensor& B,
                                 const at::Tensor& u, double scale, bool transpose, at::ScalarType dtype) {
  const at::AutoDispatchBelowADInplaceOrView below;
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
