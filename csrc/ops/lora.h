// y = W x + b + s u B^T with u = x A^T at hand (transposed: W^T x + s u A with u = x B): what the backends share.
#pragma once

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

}  // namespace moka
