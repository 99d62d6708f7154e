// A mixture's tensors checked and made ready for the CUDA kernels, and its plain fp64 formulas.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <optional>

#include "../checks.h"
#include "kernels/build_cuda.h"

namespace moka::cuda {

inline const auto kFloats = {at::kFloat, at::kHalf, at::kBFloat16, at::kDouble};

inline Dtype dtype_of(at::ScalarType t) {
  switch (t) {
    case at::kFloat:
      return Dtype::kF32;
    case at::kHalf:
      return Dtype::kF16;
    case at::kBFloat16:
      return Dtype::kBF16;
    default:
      TORCH_CHECK_TYPE(t == at::kDouble, "expected dtype Float, Half, BFloat16 or Double, got ", t);
      return Dtype::kF64;
  }
}

// Contiguous, of one dimension and of the dtype; each step only where it changes something, since none is free.
inline at::Tensor flat(const at::Tensor& t, at::ScalarType dtype) {
  const at::Tensor row = t.dim() == 1 ? t.contiguous() : t.contiguous().view(-1);
  return row.scalar_type() == dtype ? row : row.to(dtype);
}

// Keep it alive while `args` is used. Factors of a dtype that is neither fp32 nor the result's become fp32.
struct CudaMixture {
  Mixture shapes;
  at::Tensor A, B, alpha;
  bool fp64 = false;  // then only the formulas below apply, not the kernels
  MixtureArgs args{};

  CudaMixture() = default;
  CudaMixture(const at::Tensor& A_, const at::Tensor& B_, const at::Tensor& alpha_, at::IntArrayRef shapes_,
              at::ScalarType result)
      : shapes(parse_shapes(shapes_)) {
    TORCH_CHECK_VALUE(shapes.components.size() <= 64, "shapes: expected at most 64 components, got ",
                      shapes.components.size());
    TORCH_CHECK_VALUE(
        shapes.N <= INT32_MAX && shapes.K <= INT32_MAX && shapes.a_numel <= INT32_MAX && shapes.b_numel <= INT32_MAX,
        "shapes: expected N, K and the factors' entries below 2^31, got ", shapes.N, " x ", shapes.K);
    fp64 = result == at::kDouble || A_.scalar_type() == at::kDouble;
    const at::ScalarType factor = fp64 ? at::kDouble : A_.scalar_type() == result ? result : at::kFloat;
    A = flat(A_, factor);
    B = flat(B_, factor);
    alpha = flat(alpha_, fp64 ? at::kDouble : at::kFloat);
    args = {A.const_data_ptr(), B.const_data_ptr(), fp64 ? nullptr : alpha.const_data_ptr<float>(), dtype_of(factor),
            shapes.params()};
  }

  at::Tensor factor_a(const KronComponent& c) const {
    if (c.identity == Identity::kA) return at::eye(c.ma, A.options());
    return A.narrow(0, c.a_offset, c.ma * c.na).view({c.ma, c.na});
  }
  at::Tensor factor_b(const KronComponent& c) const {
    if (c.identity == Identity::kB) return at::eye(c.mb, B.options());
    return B.narrow(0, c.b_offset, c.mb * c.nb).view({c.mb, c.nb});
  }
  at::Tensor dense_fp64() const {
    at::Tensor sum = at::zeros({shapes.N, shapes.K}, A.options());
    for (size_t i = 0; i < shapes.components.size(); ++i) {
      const KronComponent& c = shapes.components[i];
      sum += alpha[static_cast<int64_t>(i)] * at::kron(factor_a(c), factor_b(c));
    }
    return sum;
  }
};

// [..., width] as contiguous rows on a 16-byte boundary: the same bits then come out whatever the strides were.
inline at::Tensor aligned_rows(const at::Tensor& t, int64_t width) {
  const at::Tensor rows = t.dim() == 2 ? t.contiguous() : t.reshape({-1, width}).contiguous();
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 ? rows.clone() : rows;
}

// a b in fp32.
inline at::Tensor mm_fp32(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == at::kFloat ? at::mm(a, b) : at::mm(a, b, at::kFloat);
}

inline cudaStream_t current_stream() { return at::cuda::getCurrentCUDAStream(); }

}  // namespace moka::cuda
