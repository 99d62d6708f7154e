// Which CUDA kernel computes what, decided here and nowhere else. From measurements on an H100 and an H200;
// benchmarks/bench_cuda.py prints the choices beside the timings.
#pragma once

#include <ATen/cuda/CUDAContext.h>

#include "kernels/decode_cuda.h"
#include "kernels/kron_grad_sm90.h"
#include "kernels/nf4_gemm_sm90.h"

namespace moka::cuda {

enum class LinearKernel { kDecode, kGemmSm90, kBuild };
enum class GradKernel { kFactoredSm90, kContract };

inline const char* name(LinearKernel k) {
  switch (k) {
    case LinearKernel::kDecode:
      return "decode";
    case LinearKernel::kGemmSm90:
      return "wgmma";
    default:
      return "build + cuBLAS";
  }
}
inline const char* name(GradKernel k) { return k == GradKernel::kFactoredSm90 ? "factored, wgmma" : "G + contraction"; }

inline bool sixteen_bit(at::ScalarType t) { return t == at::kHalf || t == at::kBFloat16; }

// y = W x: few tokens read the 4-bit weight directly, many go through a dense copy and cuBLAS.
inline LinearKernel choose_linear(int64_t tokens, const Nf4Params& w, const MixtureArgs& mix, at::ScalarType dtype,
                                  bool transpose) {
  if (transpose || !sixteen_bit(dtype)) return LinearKernel::kBuild;
  const bool hopper = at::cuda::getCurrentDeviceProperties()->major == 9, mixed = mix.shapes.r > 0;
  const bool few = decode_supports(w) && decode_supports(mix);
  // merging one mixture into a dense weight pays from 33 tokens; a mixture per row can't be merged
  const int64_t factored = mix.adapter ? kMaxDecodeTokens : 32;
  if (few && tokens <= (mixed ? factored : 16)) return LinearKernel::kDecode;
  // up to 512 tokens, and 128 of a small weight, whose dense copy is quickly made
  if (hopper && !mixed && tokens <= (w.N * w.K < 1 << 23 ? 128 : 512) && nf4_gemm_supports(w))
    return LinearKernel::kGemmSm90;
  return few && !mixed && tokens <= kMaxDecodeTokens ? LinearKernel::kDecode : LinearKernel::kBuild;
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
