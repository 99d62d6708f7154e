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
const Nf4Kernels kNf4Scalar = {
    &MOKA_SIMD::quantize<float>,
    &MOKA_SIMD::quantize<Bfloat16>,
    &MOKA_SIMD::quantize<Float16>,
    &MOKA_SIMD::dequantize<float>,
    &MOKA_SIMD::dequantize<Bfloat16>,
    &MOKA_SIMD::dequantize<Float16>,
    &MOKA_SIMD::linear,
    &MOKA_SIMD::linear_transposed,
};

}  // namespace moka
