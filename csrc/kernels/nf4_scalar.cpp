// NF4 kernels for every CPU: the baseline instruction set.
#include "nf4_codebook.h"
#include "nf4_cpu.h"
#include "simd_vec.h"
// clang-format off: the order matters
#include "nf4_merge_impl.h"
#include "nf4_impl.h"
#include "nf4_gemm_impl.h"
// clang-format on
#include "simd_end.h"

namespace moka {

extern const Nf4Kernels kNf4Scalar;
const Nf4Kernels kNf4Scalar = MOKA_SIMD::nf4_table();

}  // namespace moka
