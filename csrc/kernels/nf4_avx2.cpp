// NF4 kernels for AVX2.
#include "nf4_codebook.h"
#include "nf4_cpu.h"
#define MOKA_SIMD_AVX2
#include "simd_vec.h"
// clang-format off: the order matters
#include "nf4_merge_impl.h"
#include "nf4_impl.h"
#include "nf4_gemm_impl.h"
// clang-format on
#include "simd_end.h"

namespace moka {

extern const Nf4Kernels kNf4Avx2;
const Nf4Kernels kNf4Avx2 = MOKA_SIMD::nf4_table();

}  // namespace moka
