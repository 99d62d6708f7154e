// A vector of fp32 lanes for one instruction set, and the start of the target region (see simd.h for the recipe).
//
// Everything is in namespace moka::MOKA_SIMD, which is named after the instruction set, so the three copies of a
// kernel never meet in the linker.
//
//   Vec, kWidth                      16, 8 or 4 lanes
//   zero() set1(s) load(p) store(p, v) add(a, b) mul(a, b) fma(a, b, c) = a * b + c   sum(v) = fixed-order total
//   load(p, n), store(p, v, n)       the first n <= kWidth lanes; nothing beyond is touched, unread lanes are 0
//
// p is a pointer to float, Bfloat16 or Float16, of any alignment. The baseline ("scalar") version uses the compiler's
// generic vectors of four floats, so it runs on every machine; its fma rounds twice.
#include <cstring>

#include "simd.h"
#if MOKA_X86
#include <immintrin.h>
#endif

// On another architecture all three copies are the baseline, and only "scalar" is ever selected.
#define MOKA_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define MOKA_TARGET_BEGIN(list) MOKA_PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define MOKA_TARGET_END MOKA_PRAGMA(clang attribute pop)
#else  // the ignored warnings are about gcc's own intrinsics (gcc bug 105593)
#define MOKA_TARGET_BEGIN(list)                         \
  MOKA_PRAGMA(GCC push_options)                         \
  MOKA_PRAGMA(GCC target(list))                         \
  MOKA_PRAGMA(GCC diagnostic push)                      \
  MOKA_PRAGMA(GCC diagnostic ignored "-Wuninitialized") \
  MOKA_PRAGMA(GCC diagnostic ignored "-Wmaybe-uninitialized")
#define MOKA_TARGET_END MOKA_PRAGMA(GCC diagnostic pop) MOKA_PRAGMA(GCC pop_options)
#endif

#if defined(MOKA_SIMD_AVX512)
#define MOKA_SIMD simd_avx512
#elif defined(MOKA_SIMD_AVX2)
#define MOKA_SIMD simd_avx2
#else
#define MOKA_SIMD simd_scalar
#endif

#if defined(MOKA_SIMD_AVX512) && MOKA_X86
MOKA_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#elif defined(MOKA_SIMD_AVX2) && MOKA_X86
MOKA_TARGET_BEGIN("avx2,fma,f16c")
#endif

#define MOKA_INLINE inline __attribute__((always_inline))

namespace moka {
namespace MOKA_SIMD {

#if defined(MOKA_SIMD_AVX512) && MOKA_X86

using Vec = __m512;
constexpr int kWidth = 16;

MOKA_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
MOKA_INLINE Vec zero() { return _mm512_setzero_ps(); }
MOKA_INLINE Vec set1(float s) { return _mm512_set1_ps(s); }
MOKA_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
MOKA_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
MOKA_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
MOKA_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }

MOKA_INLINE Vec from_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
// To nearest even in integers: VCVTNEPS2BF16 would flush subnormals, and not every AVX-512 CPU has it.
MOKA_INLINE __m256i to_bf16(Vec v) {
  const __m512i x = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

MOKA_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
MOKA_INLINE Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
MOKA_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
MOKA_INLINE void store(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
MOKA_INLINE Vec load(const Bfloat16* p) { return from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
MOKA_INLINE Vec load(const Bfloat16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
MOKA_INLINE void store(Bfloat16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, to_bf16(v)); }
MOKA_INLINE void store(Bfloat16* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(v)); }
MOKA_INLINE Vec load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
MOKA_INLINE Vec load(const Float16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
MOKA_INLINE void store(Float16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, 0)); }
MOKA_INLINE void store(Float16* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, 0)); }

#elif defined(MOKA_SIMD_AVX2) && MOKA_X86

using Vec = __m256;
constexpr int kWidth = 8;

MOKA_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
MOKA_INLINE Vec zero() { return _mm256_setzero_ps(); }
MOKA_INLINE Vec set1(float s) { return _mm256_set1_ps(s); }
MOKA_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
MOKA_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
MOKA_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
MOKA_INLINE float sum(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

MOKA_INLINE Vec from_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
MOKA_INLINE __m128i to_bf16(Vec v) {
  const __m256i x = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i wide = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
MOKA_INLINE __m128i load_16bit(const void* p, int n) {
  uint16_t lanes[8] = {};
  __builtin_memcpy(lanes, p, 2 * static_cast<size_t>(n));
  return _mm_loadu_si128((const __m128i*)lanes);
}
MOKA_INLINE void store_16bit(void* p, __m128i v, int n) {
  uint16_t lanes[8];
  _mm_storeu_si128((__m128i*)lanes, v);
  __builtin_memcpy(p, lanes, 2 * static_cast<size_t>(n));
}

MOKA_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
MOKA_INLINE Vec load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
MOKA_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
MOKA_INLINE void store(float* p, Vec v, int n) { _mm256_maskstore_ps(p, first(n), v); }
MOKA_INLINE Vec load(const Bfloat16* p) { return from_bf16(_mm_loadu_si128((const __m128i*)p)); }
MOKA_INLINE Vec load(const Bfloat16* p, int n) { return from_bf16(load_16bit(p, n)); }
MOKA_INLINE void store(Bfloat16* p, Vec v) { _mm_storeu_si128((__m128i*)p, to_bf16(v)); }
MOKA_INLINE void store(Bfloat16* p, Vec v, int n) { store_16bit(p, to_bf16(v), n); }
MOKA_INLINE Vec load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
MOKA_INLINE Vec load(const Float16* p, int n) { return _mm256_cvtph_ps(load_16bit(p, n)); }
MOKA_INLINE void store(Float16* p, Vec v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, 0)); }
MOKA_INLINE void store(Float16* p, Vec v, int n) { store_16bit(p, _mm256_cvtps_ph(v, 0), n); }

#else

typedef float Vec __attribute__((vector_size(16)));
constexpr int kWidth = 4;

MOKA_INLINE Vec zero() { return Vec{0, 0, 0, 0}; }
MOKA_INLINE Vec set1(float s) { return Vec{s, s, s, s}; }
MOKA_INLINE Vec add(Vec a, Vec b) { return a + b; }
MOKA_INLINE Vec mul(Vec a, Vec b) { return a * b; }
MOKA_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
MOKA_INLINE float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }

MOKA_INLINE uint32_t bits_of(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}
MOKA_INLINE float float_of(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
MOKA_INLINE float to_float(float s) { return s; }
MOKA_INLINE float to_float(Bfloat16 s) { return float_of(static_cast<uint32_t>(s.bits) << 16); }
MOKA_INLINE float to_float(Float16 s) {
  const uint32_t sign = static_cast<uint32_t>(s.bits & 0x8000) << 16, magnitude = s.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return float_of(sign | ((magnitude << 13) + 0x38000000));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}
MOKA_INLINE void from_float(float* p, float f) { *p = f; }
MOKA_INLINE void from_float(Bfloat16* p, float f) {
  const uint32_t u = bits_of(f);
  p->bits = static_cast<uint16_t>(f != f ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
MOKA_INLINE void from_float(Float16* p, float f) {
  const uint32_t u = bits_of(f), magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) {
    h = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    h = 0x7c00;
  } else if (magnitude >= 0x38800000) {  // normal: drop 13 bits, to nearest even
    h = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  } else {  // subnormal: adding 0.5 leaves the wanted bits, rounded, at the bottom of the significand
    h = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  }
  p->bits = static_cast<uint16_t>(u >> 16 & 0x8000) | static_cast<uint16_t>(h);
}

template <typename T>
MOKA_INLINE Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <typename T>
MOKA_INLINE Vec load(const T* p, int n) {
  Vec v = zero();
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}
template <typename T>
MOKA_INLINE void store(T* p, Vec v, int n = kWidth) {
  for (int i = 0; i < n; ++i) from_float(p + i, v[i]);
}

#endif

}  // namespace MOKA_SIMD
}  // namespace moka
