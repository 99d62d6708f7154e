// Dense weights plus a mixture, or the mixture alone as a dense matrix.
#include "build_cuda.cuh"

namespace moka::cuda {
namespace {

template <typename T>
cudaError_t from_dense(const void* w, const MixtureArgs& mix, void* out, cudaStream_t stream) {
  const DenseBase<T> base = {static_cast<const T*>(w)};
  const bool vector = aligned(w, 16);
  if (mix.factor_dtype != Dtype::kF32)
    return build<T, T>(base, vector, mix.shapes.N, mix.shapes.K, mix, static_cast<T*>(out), stream);
  return build<T, float>(base, vector, mix.shapes.N, mix.shapes.K, mix, static_cast<T*>(out), stream);
}

}  // namespace

cudaError_t launch_build_from_dense(const void* base, const MixtureArgs& mix, Dtype dtype, void* out,
                                    cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kF32:
      return from_dense<float>(base, mix, out, stream);
    case Dtype::kF16:
      return from_dense<__half>(base, mix, out, stream);
    case Dtype::kBF16:
      return from_dense<__nv_bfloat16>(base, mix, out, stream);
    default:
      return cudaErrorInvalidValue;  // fp64 mixtures are the operators' business
  }
}

bool build_is_fast(const KronParams& mixture) {
  Walk walk;
  return plan_walk(mixture, &walk);
}

}  // namespace moka::cuda
