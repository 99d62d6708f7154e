// y = W x + b on Hopper's tensor cores, straight from the 4-bit weight, for a few dozen to a few hundred tokens.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "build_cuda.h"

namespace moka::cuda {

// Whether the kernel takes this weight: K a multiple of 256, N of 8, blocks of 64, aligned.
bool nf4_gemm_supports(const Nf4Params& w);

// x [tokens, K] and y [tokens, N] of `dtype` (fp16 or bf16), bias [N] of it or null; one launch, on a
// Hopper GPU.
cudaError_t launch_nf4_gemm_sm90(const void* x, Dtype dtype, int64_t tokens, const Nf4Params& w, const void* bias,
                                 void* y, cudaStream_t stream);

}  // namespace moka::cuda
