// Kronecker mixture entry points that other CUDA operators call.
#pragma once

#include "mixture_cuda.h"

namespace moka::cuda {

// y = [add +] sum_i alpha_i (A_i kron B_i) x, or with transpose the same for the transposes; [..., K] to [..., N].
at::Tensor kron_mix(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const at::Tensor& alpha,
                    at::IntArrayRef shapes, bool transpose, const std::optional<at::Tensor>& add);

}  // namespace moka::cuda
