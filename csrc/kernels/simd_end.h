// Closes the target region that simd_vec.h opened. No include guard: once per kernel file.
#if (defined(MOKA_SIMD_AVX512) || defined(MOKA_SIMD_AVX2)) && MOKA_X86
MOKA_TARGET_END
#endif
