// Low-rank updates on CUDA: many tokens go through one dense copy of the weight that holds the update, and their
// gradients are read once.
#include <torch/library.h>

#include "choose_cuda.h"
#include "lora.h"
#include "mixture_cuda.h"

namespace moka::cuda {
namespace {

// A [rank, K] and B [N, rank] of `dtype`, of a rank that the kernel takes, with the same product. That of fp32 factors
// is the sum of those of their leading and trailing parts, but for the one of both trailing parts, which is far below
// the rounding of the weight to `dtype`.
std::pair<at::Tensor, at::Tensor> operands(const at::Tensor& A, const at::Tensor& B, at::ScalarType dtype) {
  at::Tensor a = A, b = B;
  if (A.scalar_type() != dtype) {
    const at::Tensor a0 = A.to(dtype), b0 = B.to(dtype);
    a = at::cat({a0, A.sub(a0).to(dtype), a0}, 0);
    b = at::cat({b0, b0, B.sub(b0).to(dtype)}, 1);
  }
  if (const int64_t missing = (4 - a.size(0) % 4) % 4; missing > 0) {
    a = at::constant_pad_nd(a, {0, 0, 0, missing});
    b = at::constant_pad_nd(b, {0, missing});
  }
  return {aligned_rows(a, a.size(1)), aligned_rows(b, b.size(1))};
}

at::Tensor nf4_linear_lora(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                           const OptionalTensor& absmax2, const OptionalTensor& code2, const OptionalTensor& offset,
                           int64_t blocksize, int64_t blocksize2, int64_t N, int64_t K, const OptionalTensor& bias,
                           const at::Tensor& A, const at::Tensor& B, const at::Tensor& u, double scale, bool transpose,
                           at::ScalarType dtype) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const int64_t in = transpose ? N : K, out = transpose ? K : N;
  const int64_t tokens = check_lora(x, in, A, B, u, N, K);
  check_device("packed", packed, "x", x);
  const Nf4Args w(packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K);
  if (!merges_lora(tokens, w.params, A, x.scalar_type(), dtype)) {
    return nf4_linear_lora_apart(x, packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K, bias, A, B, u,
                                 scale, transpose, dtype);
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const auto [a, b] = operands(A, B, dtype);
  const at::Tensor dense = at::empty({N, K}, x.options());
  C10_CUDA_CHECK(launch_build_lora(w.params, a.const_data_ptr(), b.const_data_ptr(), a.size(0),
                                   static_cast<float>(scale), dtype_of(dtype), dense.mutable_data_ptr(),
                                   current_stream()));
  const at::Tensor rows = x.reshape({-1, in}), weight = transpose ? dense : dense.t();
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end() - 1);
  sizes.push_back(out);
  return (bias ? at::addmm(*bias, rows, weight) : at::mm(rows, weight)).view(sizes);
}

LoraGrads lora_grad(const at::Tensor& grad_y, const OptionalTensor& x, const at::Tensor& A, const at::Tensor& B,
                    const OptionalTensor& u, double scale, at::ScalarType dtype_A, at::ScalarType dtype_B) {
  const at::AutoDispatchBelowADInplaceOrView below;
  check_lora_grad(grad_y, x, A, B, u);
  const LoraGradShape shape = {grad_y.size(0), B.size(0), B.size(1)};
  const at::ScalarType dtype = grad_y.scalar_type();
  if (!u || !reads_once(shape, dtype)) return lora_grad_apart(grad_y, x, A, B, u, scale, dtype_A, dtype_B);
  const c10::cuda::CUDAGuard guard(grad_y.device());
  const at::Tensor dy = aligned_rows(grad_y, shape.N), b = aligned_rows(B, shape.rank),
                   rows = aligned_rows(*u, shape.rank);
  const at::Tensor scratch = at::empty({lora_grad_scratch(shape)}, dy.options().dtype(at::kFloat));
  at::Tensor grad_u = at::empty_like(rows);
  // the sums are fp32: where the gradient is to be, they are not rounded to the operands' dtype before
  at::Tensor grad_B = at::empty_like(b, b.options().dtype(dtype_B == at::kFloat ? at::kFloat : dtype));
  C10_CUDA_CHECK(launch_lora_grad(dy.const_data_ptr(), b.const_data_ptr(), rows.const_data_ptr(), shape,
                                  static_cast<float>(scale), dtype_of(dtype), scratch.mutable_data_ptr<float>(),
                                  grad_u.mutable_data_ptr(), dtype_of(grad_B.scalar_type()), grad_B.mutable_data_ptr(),
                                  current_stream()));
  const at::Tensor grad_A = x ? at::addmm(A, grad_u.t(), *x, 0, scale) : at::empty({0}, A.options());
  return {grad_u, grad_A.to(dtype_A), grad_B.to(dtype_B)};
}

}  // namespace

TORCH_LIBRARY_IMPL(moka, CUDA, m) {
  m.impl("nf4_linear_lora", &nf4_linear_lora);
  m.impl("lora_grad", &lora_grad);
}

}  // namespace moka::cuda
