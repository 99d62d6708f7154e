#include "kron_kernels.h"
// clang-format off: the order matters, see simd.h
#include "simd_vec.h"
#include "kron_gemm_impl.h"
#include "kron_impl.h"
// clang-format on

namespace moka {
namespace MOKA_SIMD {
KronKernels<float> kron_kernels() { return kron_table<float>(); }
KronKernels<double> kron_kernels_f64() { return kron_table<double>(); }
}  // namespace MOKA_SIMD

template <>
KronKernels<float> active_kron_kernels<float>() {
  return select_isa(simd_scalar::kron_kernels, simd_avx2::kron_kernels, simd_avx512::kron_kernels)();
}
template <>
KronKernels<double> active_kron_kernels<double>() {
  return simd_scalar::kron_kernels_f64();
}

}  // namespace moka
