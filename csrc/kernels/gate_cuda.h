// The gate of a mixture on the GPU, one small kernel each way.
#pragma once

#include <cuda_runtime.h>

namespace moka::cuda {

// alpha [r] = scale softmax(logits).
cudaError_t launch_gate(const float* logits, float scale, int r, float* alpha, cudaStream_t stream);

// grad_logits [r] = alpha (grad_alpha - <alpha, grad_alpha> / scale).
cudaError_t launch_gate_grad(const float* alpha, const float* grad_alpha, float scale, int r, float* grad_logits,
                             cudaStream_t stream);

}  // namespace moka::cuda
