// The Kronecker kernels of one instruction set. They run on one thread, on the rows they are given.
#pragma once

#include <cstdint>

#include "kron_plan.h"

namespace moka {

template <class T>
struct KronGroups {  // a plan as the kernels see it
  const KronGroup<T>* groups;
  int64_t count;
  int64_t N, K;  // of the weight
};

template <class T>
struct KronKernels {
  // y[t, :] += sum_i alpha_i (A_i kron B_i) x[t, :]; a kMix plan takes rows of K to rows of N, kMixTranspose N to K.
  // scratch: rows * scratch_per_token elements.
  void (*mix)(const KronGroups<T>& plan, const T* x, T* y, int64_t rows, int64_t in, int64_t out, T* scratch);

  // accumulator += the gradients of these tokens; kGrad plan. scratch: (rows + 1) * scratch_per_token elements.
  void (*grad)(const KronGroups<T>& plan, const T* x, const T* grad_y, int64_t rows, T* accumulator, T* scratch);

  // accumulator += the gradients held in rows [row, row + rows) of G = dY^T X, of one group's A or B; kContract plan.
  // scratch: scratch_per_token elements.
  void (*contract_a)(const KronGroup<T>& group, const T* G, int64_t row, int64_t rows, int64_t K, T* accumulator,
                     T* scratch);
  void (*contract_b)(const KronGroup<T>& group, const T* G, int64_t row, int64_t rows, int64_t K, T* accumulator);

  // w[n, :] += the mixture's rows [row, row + rows); kDense plan.
  void (*add_dense)(const KronGroups<T>& plan, T* w, int64_t row, int64_t rows);
};

namespace simd_scalar {
KronKernels<float> kron_kernels();
KronKernels<double> kron_kernels_f64();
}  // namespace simd_scalar
namespace simd_avx2 {
KronKernels<float> kron_kernels();
}
namespace simd_avx512 {
KronKernels<float> kron_kernels();
}

// fp64 has one version, for checks; fp32 has one per instruction set.
template <class T>
KronKernels<T> active_kron_kernels();
template <>
KronKernels<float> active_kron_kernels<float>();
template <>
KronKernels<double> active_kron_kernels<double>();

}  // namespace moka
