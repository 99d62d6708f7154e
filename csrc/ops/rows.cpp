// nf4_linear_rows from the other operators.
#include "rows.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

namespace moka {

using at::Tensor;

Tensor nf4_linear_masked(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
                         const OptionalTensor& code2, const OptionalTensor& offset, int64_t blocksize,
                         int64_t blocksize2, int64_t N, int64_t K, const OptionalTensor& bias, const Tensor& A,
                         const Tensor& B, const Tensor& alpha, const Tensor& adapter, at::IntArrayRef shapes) {
  const at::AutoDispatchBelowADInplaceOrView below;
  parse_rows(x, N, K, A, B, alpha, adapter, shapes);
  static const auto mix = find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, at::IntArrayRef,
                                         bool, const OptionalTensor&)>("moka::kron_mix");
  Tensor y = call_nf4_linear(x, packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K, bias, false);
  for (int64_t i = 0; i < A.size(0); ++i) {
    const Tensor rows = (adapter == i).unsqueeze(1);
    const Tensor own = at::where(rows, x, at::zeros({}, x.options()));
    y = at::where(rows, mix.call(own, A[i], B[i], alpha[i], shapes, false, y), y);
  }
  return y;
}

TORCH_LIBRARY_IMPL(moka, CPU, m) { m.impl("nf4_linear_rows", &nf4_linear_masked); }

}  // namespace moka
