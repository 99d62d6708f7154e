// y = W x + b + mixture for few tokens, straight from the 4-bit weight.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "build_cuda.h"

namespace moka::cuda {

constexpr int64_t kMaxDecodeTokens = 64;

// Whether the kernels take this weight: K a multiple of 256, N of 16, blocks of 64, of a nested absmax a power of two
// from 4 on, aligned.
bool decode_supports(const Nf4Params& w);

// Whether they take this mixture: at most 16 components, of at most 2^28 entries a factor, and its intermediates of one
// token within shared memory. Fast where na, nb and what is in front of a factor are whole units of 16 bytes.
bool decode_supports(const MixtureArgs& mix);

// Floats of scratch that launch_decode needs for the mixture's intermediates.
int64_t decode_scratch(const KronParams& mixture, int64_t tokens);

// Whether launch_shares takes several tokens and components of it at a time: in bf16, without identities, nb a multiple
// of 8 and mb of 4, one adapter.
bool shares_are_fast(Dtype dtype, int64_t tokens, const MixtureArgs& mix);

// The mixture's shares of y, fp32 [count, tokens, N] in `scratch`, with count at most r; with decode_supports(w), and x
// of fp16 or bf16. The next kernel may start before this one has ended, but not before those in front of it have.
cudaError_t launch_shares(const void* x, Dtype dtype, int64_t tokens, const Nf4Params& w, const MixtureArgs& mix,
                          float* scratch, int* count, cudaStream_t stream);

// x [tokens, K] and y [tokens, N] of `dtype` (fp16 or bf16), bias [N] of it or null; at most two launches.
cudaError_t launch_decode(const void* x, Dtype dtype, int64_t tokens, const Nf4Params& w, const void* bias,
                          const MixtureArgs& mix, float* scratch, void* y, cudaStream_t stream);

}  // namespace moka::cuda
