// A dense copy of an NF4 weight with a low-rank update (LoRA) added before the one rounding.
#pragma once

#include <cuda_runtime.h>

#include "build_cuda.h"

namespace moka::cuda {

// Whether the kernel takes this weight and rank: blocks of 64 within the rows, N a multiple of 16, rank of 4, aligned.
bool build_lora_supports(const Nf4Params& w, int64_t rank);

// out [N, K] = round(nf4 + scale B A), summed in fp32; B [N, rank], A [rank, K] and out of `dtype`, fp16 or bf16.
cudaError_t launch_build_lora(const Nf4Params& w, const void* A, const void* B, int64_t rank, float scale, Dtype dtype,
                              void* out, cudaStream_t stream);

}  // namespace moka::cuda
