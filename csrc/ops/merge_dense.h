// What the autograd nodes, which know no CUDA, ask the CUDA operators.
#pragma once

#include <ATen/core/Tensor.h>

namespace moka::cuda {

// Whether y = W x + the mixture, of a dense W, is best computed by kron_add and one product.
bool merges(const at::Tensor& weight, const at::Tensor& A, at::IntArrayRef shapes);

}  // namespace moka::cuda
