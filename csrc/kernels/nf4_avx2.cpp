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
const Nf4Kernels kNf4Avx2 = {
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
