// Which CUDA kernel computes what, decided here and nowhere else. From measurements on an H100 and an H200;
// benchmarks/bench_cuda.py prints the choices beside the timings.
#pragma once

#include <ATen/cuda/CUDAContext.h>

#include "kernels/build_lora_cuda.h"
#include "kernels/decode_cuda.h"
#include "kernels/kron_grad_sm90.h"
#include "kernels/lora_grad_cuda.h"
#include "kernels/nf4_gemm_sm90.h"
#include "mixture_cuda.h"

namespace moka::cuda {

enum class LinearKernel { kDecode, kGemmSm90, kBuild };
enum class GradKernel { kFactoredSm90, kOuter, kContract };

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
inline const char* name(GradKernel k) {
  switch (k) {
    case GradKernel::kFactoredSm90:
      return "factored, wgmma";
    case GradKernel::kOuter:
      return "low rank";
    default:
      return "G + contraction";
  }
}

inline bool sixteen_bit(at::ScalarType t) { return t == at::kHalf || t == at::kBFloat16; }

// y = W x: few tokens read the 4-bit weight directly, many go through a dense copy and cuBLAS.
inline LinearKernel choose_linear(int64_t tokens, const Nf4Params& w, const MixtureArgs& mix, at::ScalarType dtype,
                                  bool transpose) {
  if (transpose || !sixteen_bit(dtype)) return LinearKernel::kBuild;
  const bool mixed = mix.shapes.r > 0, few = decode_supports(w) && decode_supports(mix);
  const bool gemm = at::cuda::getCurrentDeviceProperties()->major == 9 && nf4_gemm_supports(w);
  // H200: beyond 16 tokens the other kernels read a large weight faster
  if (few && tokens <= (w.N * w.K <= 1 << 24 ? 32 : 16)) return LinearKernel::kDecode;
  // up to 512 tokens, and 128 of a small weight, whose dense copy is quickly made
  if (gemm && !mixed && tokens <= (w.N * w.K < 1 << 23 ? 128 : 512)) return LinearKernel::kGemmSm90;
  // with a mixture up to 64, and 128 of a large weight, if its shares are quickly made and stay in the L2
  const bool shares_fit = tokens <= (w.N * w.K <= 1 << 24 ? 64 : 128) && w.N * tokens <= 1 << 20;
  if (gemm && few && shares_fit && shares_are_fast(dtype_of(dtype), tokens, mix)) return LinearKernel::kGemmSm90;
  if (!few || tokens > kMaxDecodeTokens) return LinearKernel::kBuild;
  // of other mixtures beyond 32 tokens, merging one into a small dense weight is as fast; one per row can't be merged
  const bool apart = !mixed || mix.adapter || tokens <= 32;
  if (gemm && (apart || w.N * w.K > 1 << 24)) return LinearKernel::kGemmSm90;
  return apart ? LinearKernel::kDecode : LinearKernel::kBuild;
}

// The mixture joins a copy of a dense weight, rather than y in a second product, where that copy is quickly made.
// A weight of other strides, or off 16 bytes, would be copied first or take the slow kernel.
inline bool merges_dense(const at::Tensor& weight, const KronParams& mixture, at::ScalarType factors) {
  const bool aligned = weight.storage_offset() * static_cast<int64_t>(weight.itemsize()) % 16 == 0;
  return weight.scalar_type() != at::kDouble && factors != at::kDouble && weight.is_contiguous() && aligned &&
         build_is_fast(mixture);
}

// A low-rank update joins the dense copy that many tokens go through, rather than y in another pass over it.
inline bool merges_lora(int64_t tokens, const Nf4Params& w, const at::Tensor& A, at::ScalarType x,
                        at::ScalarType result) {
  const bool dtypes = sixteen_bit(x) && result == x && (A.scalar_type() == x || A.scalar_type() == at::kFloat);
  return dtypes && tokens > 512 && build_lora_supports(w, 4 * A.size(0));
}

// Both products with dy of a low-rank update's backward in one pass over it.
inline bool reads_once(const LoraGradShape& shape, at::ScalarType dtype) {
  return sixteen_bit(dtype) && shape.tokens > 512 && lora_grad_supports(shape);
}

// Parameter gradients: through the factors where the Hopper kernel knows the shapes, or where all are columns and rows
// (a low-rank update); else from G = dY^T X. `plan` is filled for kFactoredSm90. The first two round their
// intermediates to x's dtype, which fp16's range forbids.
inline GradKernel choose_grad(int64_t tokens, const KronParams& mixture, at::ScalarType dtype, GradPlan* plan) {
  if (tokens < 64 || dtype == at::kHalf) return GradKernel::kContract;
  const auto* device = at::cuda::getCurrentDeviceProperties();
  if (device->major == 9 && dtype == at::kBFloat16 && plan_grad(mixture, device->multiProcessorCount, plan))
    return GradKernel::kFactoredSm90;
  bool outer = true;
  for (int64_t i = 0; i < mixture.r; ++i) {
    const KronComponent& c = mixture.components[i];
    outer = outer && c.na == 1 && c.mb == 1 && c.identity == Identity::kNone && c.a_offset == i * mixture.N &&
            c.b_offset == i * mixture.K;
  }
  return outer ? GradKernel::kOuter : GradKernel::kContract;
}

}  // namespace moka::cuda
