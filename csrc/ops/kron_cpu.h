// Kronecker mixture entry points that other CPU operators call.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace moka {

// y = [add +] sum_i alpha_i (A_i kron B_i) x for every row of x, or with transpose
// sum_i alpha_i (A_i^T kron B_i^T) x; fp32 accumulation (fp64 for fp64), one rounding to x's dtype.
at::Tensor kron_mix_cpu(const at::Tensor& x,                    // [..., K]; [..., N] with transpose
                        const at::Tensor& A,                    // [sum ma*na] fp32 or x's dtype
                        const at::Tensor& B,                    // [sum mb*nb] A's dtype
                        const at::Tensor& alpha,                // [r] fp32 or A's dtype
                        at::IntArrayRef shapes,                 // [5 r]
                        bool transpose,                         //
                        const std::optional<at::Tensor>& add);  // the shape of the result

}  // namespace moka
