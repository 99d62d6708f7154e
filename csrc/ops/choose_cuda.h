// Which CUDA kernel computes what, decided here and nowhere else. From measurements on an H200;
// benchmarks/bench_cuda.py prints the choices beside the timings.
#pragma once

#include <ATen/cuda/CUDAContext.h>

#include "kernels/decode_cuda.h"
#include "kernels/kron_grad_sm90.h"

namespace moka::cuda {

enum class LinearKernel { kDecode, kBuild };
enum class GradKernel { kFactoredSm90, kContract };

inline const char* name(LinearKernel k) { return k == LinearKernel::kDecode ? "decode" : "build + cuBLAS"; }
inline const char* name(GradKernel k) { return k == GradKernel::kFactoredSm90 ? "factored, wgmma" : "G + contraction"; }

inline bool sixteen_bit(at::ScalarType t) { return t == at::kHalf || t == at::kBFloat16; }

// y = W x: few tokens read the 4-bit weight directly, many go through a dense copy and cuBLAS.
inline LinearKernel choose_linear(int64_t tokens, const Nf4Params& w, const MixtureArgs& mix, at::ScalarType dtype,
                                  bool transpose) {
  const int64_t most = mix.shapes.r ? kMaxDecodeTokensMixture : kMaxDecodeTokens;
  const bool few = tokens <= most && !transpose && sixteen_bit(dtype) && decode_supports(w) && decode_supports(mix);
  return few ? LinearKernel::kDecode : LinearKernel::kBuild;
}

// Parameter gradients: through the factors where the Hopper kernel knows the shapes, else from G = dY^T X.
// `plan` is filled for kFactoredSm90. Its intermediates are rounded to x's dtype, which fp16's range forbids.
inline GradKernel choose_grad(int64_t tokens, const KronParams& mixture, at::ScalarType dtype, GradPlan* plan) {
  const auto* device = at::cuda::getCurrentDeviceProperties();
  const bool factored = device->major == 9 && dtype == at::kBFloat16 && tokens >= 64 &&
                        plan_grad(mixture, device->multiProcessorCount, plan);
  return factored ? GradKernel::kFactoredSm90 : GradKernel::kContract;
}

}  // namespace moka::cuda
