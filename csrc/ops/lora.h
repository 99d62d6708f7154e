// y = W x + b + s u B^T with u = x A^T at hand (transposed: W^T x + s u A with u = x B), and gradients with respect to
// u and B: what the backends share.
#pragma once

#include <tuple>

#include "operators.h"

namespace moka {

// x [..., in], A [r, K] and B [N, r] of one dtype, u [tokens, r], all on one device; how many tokens there are.
int64_t check_lora(const at::Tensor& x, int64_t in, const at::Tensor& A, const at::Tensor& B, const at::Tensor& u,
                   int64_t N, int64_t K);

// W's product first, then u's added to it, in `dtype`: two passes over y.
at::Tensor nf4_linear_lora_apart(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                                 const OptionalTensor& absmax2, const OptionalTensor& code2,
                                 const OptionalTensor& offset, int64_t blocksize, int64_t blocksize2, int64_t N,
                                 int64_t K, const OptionalTensor& bias, const at::Tensor& A, const at::Tensor& B,
                                 const at::Tensor& u, double scale, bool transpose, at::ScalarType dtype);

// grad_y [tokens, N], x [tokens, K], A [r, K], B [N, r] and u [tokens, r] of one dtype, all on one device.
void check_lora_grad(const at::Tensor& grad_y, const OptionalTensor& x, const at::Tensor& A, const at::Tensor& B,
                     const OptionalTensor& u);

// grad_u = grad_y B, grad_A = scale grad_u^T x where there is x, grad_B = scale grad_y^T u where there is u.
using LoraGrads = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The same by a product each, in the dtype of the operands.
LoraGrads lora_grad_apart(const at::Tensor& grad_y, const OptionalTensor& x, const at::Tensor& A, const at::Tensor& B,
                          const OptionalTensor& u, double scale, at::ScalarType dtype_A, at::ScalarType dtype_B);

}  // namespace moka
