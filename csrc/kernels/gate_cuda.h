// The gate of a mixture on the GPU, one small kernel each way; T is float or double.
#pragma once

#include <cuda_runtime.h>

namespace moka::cuda {

// alpha [r] = scale softmax(logits).
template <typename T>
cudaError_t launch_gate(const T* logits, T scale, int r, T* alpha, cudaStream_t stream);

// grad_logits [r] = alpha (grad_alpha - <alpha, grad_alpha> / scale).
template <typename T>
cudaError_t launch_gate_grad(const T* alpha, const T* grad_alpha, T scale, int r, T* grad_logits, cudaStream_t stream);

}  // namespace moka::cuda
