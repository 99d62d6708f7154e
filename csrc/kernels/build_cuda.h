// Dense weights on the GPU: NF4 dequantized, with a Kronecker mixture added before the one rounding.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "params.h"

namespace moka::cuda {

enum class Dtype : int32_t { kF32 = 0, kF16 = 1, kBF16 = 2, kF64 = 3 };

// The mixture's tensors: flat factors and alpha (scale times gate), all on the device.
struct MixtureArgs {
  const void* A;
  const void* B;
  const float* alpha;  // [r]
  Dtype factor_dtype;  // kF32, or the dtype of the op's result
  KronParams shapes;   // shapes.r == 0: no mixture

  // For launch_decode alone: adapter [tokens] on the device chooses per token among factors stacked with these
  // strides (in entries) and alpha [adapters, r]; a negative one chooses none. Null: one adapter for all.
  const int32_t* adapter = nullptr;
  int64_t a_stride = 0, b_stride = 0;
};

// packed, absmax [w.numel() / blocksize] from w: the codes and scales bitsandbytes' CUDA kernels produce.
cudaError_t launch_nf4_quantize(const void* w, Dtype dtype, int64_t numel, int64_t blocksize, uint8_t* packed,
                                float* absmax, cudaStream_t stream);

// out [N, K] = round(nf4 + sum_i alpha_i A_i kron B_i), summed in fp32; fp64 out takes no mixture.
cudaError_t launch_build_from_nf4(const Nf4Params& w, const MixtureArgs& mix, Dtype dtype, void* out,
                                  cudaStream_t stream);

// The same on a dense base [N, K] of out's dtype; a null base counts as zero. fp32, fp16, bf16.
cudaError_t launch_build_from_dense(const void* base, const MixtureArgs& mix, Dtype dtype, void* out,
                                    cudaStream_t stream);

// Whether the tensor-core kernel takes these shapes: few of them, and periodic; and a base and `out` on 16 bytes.
bool build_is_fast(const KronParams& mixture);

}  // namespace moka::cuda
