#include "kron_kernels.h"
#define MOKA_SIMD_AVX2
// clang-format off: the order matters, see simd.h
#include "simd_vec.h"
#include "kron_gemm_impl.h"
#include "kron_impl.h"
// clang-format on

namespace moka {
namespace MOKA_SIMD {
KronKernels<float> kron_kernels() { return kron_table<float>(); }
}  // namespace MOKA_SIMD
}  // namespace moka
#include "simd_end.h"
