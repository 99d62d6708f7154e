// y = W x + b + mixture on Hopper's tensor cores, straight from the 4-bit weight, for a few dozen to a few hundred
// tokens.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "build_cuda.h"

namespace moka::cuda {

// Whether the kernel takes this weight: K a multiple of 256, N of 8, blocks of 64, aligned.
bool nf4_gemm_supports(const Nf4Params& w);

// x [tokens, K] and y [tokens, N] of `dtype` (fp16 or bf16), bias [N] of it or null; a mixture as launch_decode takes
// it, or none, for which `scratch` may be null. On a Hopper GPU, one launch, and one more for a mixture.
cudaError_t launch_nf4_gemm_sm90(const void* x, Dtype dtype, int64_t tokens, const Nf4Params& w, const void* bias,
                                 const MixtureArgs& mix, float* scratch, void* y, cudaStream_t stream);

}  // namespace moka::cuda
