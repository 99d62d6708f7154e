// The gate on CUDA: in PyTorch's own kernels it takes two launches forward and three backward, here one each.
#include <torch/library.h>

#include "gate.h"
#include "kernels/gate_cuda.h"
#include "mixture_cuda.h"

namespace moka::cuda {
namespace {

at::Tensor gate(const at::Tensor& logits, double scale) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor in = gate_input(logits);
  at::Tensor alpha = at::empty_like(in);
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "gate", [&] {
    C10_CUDA_CHECK(launch_gate(in.const_data_ptr<scalar_t>(), static_cast<scalar_t>(scale),
                               static_cast<int>(in.numel()), alpha.mutable_data_ptr<scalar_t>(), current_stream()));
  });
  return alpha;
}

at::Tensor gate_grad(const at::Tensor& alpha, const at::Tensor& grad_alpha, double scale) {
  const c10::cuda::CUDAGuard guard(alpha.device());
  const auto [a, d] = gate_grad_inputs(alpha, grad_alpha);
  at::Tensor grad = at::empty_like(a);
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "gate_grad", [&, &a = a, &d = d] {
    C10_CUDA_CHECK(launch_gate_grad(a.const_data_ptr<scalar_t>(), d.const_data_ptr<scalar_t>(),
                                    static_cast<scalar_t>(scale), static_cast<int>(a.numel()),
                                    grad.mutable_data_ptr<scalar_t>(), current_stream()));
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(moka, CUDA, m) {
  m.impl("gate", &gate);
  m.impl("gate_grad", &gate_grad);
}

}  // namespace moka::cuda
