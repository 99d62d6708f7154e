// The two products with dy that a low-rank update's backward needs, in one pass over dy.
#pragma once

#include <cuda_runtime.h>

#include "build_cuda.h"

namespace moka::cuda {

struct LoraGradShape {
  int64_t tokens, N, rank;
};

// Whether the kernels take these shapes: rank 8 or 16, N a multiple of 8.
bool lora_grad_supports(const LoraGradShape& shape);

// Floats that launch_lora_grad needs for sums of parts of dy.
int64_t lora_grad_scratch(const LoraGradShape& shape);

// grad_u [tokens, rank] = dy B and grad_B [N, rank] = scale dy^T u, summed in fp32 in a fixed order. All are of
// `dtype`, fp16 or bf16, and on 16-byte boundaries; grad_B may be of fp32.
cudaError_t launch_lora_grad(const void* dy, const void* B, const void* u, const LoraGradShape& shape, float scale,
                             Dtype dtype, float* scratch, void* grad_u, Dtype dtype_B, void* grad_B,
                             cudaStream_t stream);

}  // namespace moka::cuda
