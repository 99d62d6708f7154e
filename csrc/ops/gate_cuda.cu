// The gate on CUDA: in PyTorch's own kernels it takes two launches forward and three backward, one each here.
#include <torch/library.h>

#include "gate.h"
#include "kernels/gate_cuda.h"
#include "mixture_cuda.h"

namespace moka::cuda {
namespace {

at::Tensor gate(const at::Tensor& logits, double scale) {
  if (logits.scalar_type() == at::kDouble) return moka::gate(logits, scale);
  TORCH_CHECK_VALUE(logits.dim() == 1, "logits: expected shape [r], got ", logits.sizes());
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor in = logits.to(at::kFloat).contiguous();
  at::Tensor alpha = at::empty_like(in);
  C10_CUDA_CHECK(launch_gate(in.const_data_ptr<float>(), static_cast<float>(scale), static_cast<int>(in.numel()),
                             alpha.mutable_data_ptr<float>(), current_stream()));
  return alpha;
}

at::Tensor gate_grad(const at::Tensor& alpha, const at::Tensor& grad_alpha, double scale) {
  if (alpha.scalar_type() == at::kDouble) return moka::gate_grad(alpha, grad_alpha, scale);
  check_dtype("alpha", alpha, {at::kFloat});
  check_dtype("grad_alpha", grad_alpha, {at::kFloat});
  check_numel("grad_alpha", grad_alpha, alpha.numel());
  const c10::cuda::CUDAGuard guard(alpha.device());
  const at::Tensor a = alpha.contiguous(), d = grad_alpha.contiguous();
  at::Tensor out = at::empty_like(a);
  C10_CUDA_CHECK(launch_gate_grad(a.const_data_ptr<float>(), d.const_data_ptr<float>(), static_cast<float>(scale),
                                  static_cast<int>(a.numel()), out.mutable_data_ptr<float>(), current_stream()));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(moka, CUDA, m) {
  m.impl("gate", &gate);
  m.impl("gate_grad", &gate_grad);
}

}  // namespace moka::cuda
