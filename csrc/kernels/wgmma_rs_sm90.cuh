// The warpgroup product whose first operand comes from registers: d [64, N] += a [64, 16] b [N, 16]^T.
#pragma once

#include "sm90.cuh"

namespace moka::cuda {

#ifdef MOKA_SM90

// Operand numbers, ten at a time: "%10,%11,...,%19" is MOKA_TEN("1").
#define MOKA_TEN(t) "%" t "0,%" t "1,%" t "2,%" t "3,%" t "4,%" t "5,%" t "6,%" t "7,%" t "8,%" t "9"
#define MOKA_N30 MOKA_TEN("") "," MOKA_TEN("1") "," MOKA_TEN("2")
#define MOKA_N60 MOKA_N30 "," MOKA_TEN("3") "," MOKA_TEN("4") "," MOKA_TEN("5")
#define MOKA_N120                                                                                                   \
  MOKA_N60 "," MOKA_TEN("6") "," MOKA_TEN("7") "," MOKA_TEN("8") "," MOKA_TEN("9") "," MOKA_TEN("10") "," MOKA_TEN( \
      "1"                                                                                                           \
      "1")
#define MOKA_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOKA_F16(d, i) MOKA_F4(d, i), MOKA_F4(d, i + 4), MOKA_F4(d, i + 8), MOKA_F4(d, i + 12)
#define MOKA_F32(d, i) MOKA_F16(d, i), MOKA_F16(d, i + 16)
#define MOKA_F64(d, i) MOKA_F32(d, i), MOKA_F32(d, i + 32)

#define MOKA_WGMMA_RS(N, TYPE, REGS, A0, A1, A2, A3, B, ...)                                                          \
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE \
               " {" REGS "}, {%" A0 ",%" A1 ",%" A2 ",%" A3 "}, %" B ", p, 1, 1, 0;\n}\n"                             \
               : __VA_ARGS__                                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define MOKA_WGMMA_RS_SIZES(TYPE)                                                                                     \
  if constexpr (N == 32) {                                                                                            \
    MOKA_WGMMA_RS("32", TYPE, MOKA_TEN("") ",%10,%11,%12,%13,%14,%15", "16", "17", "18", "19", "20", MOKA_F16(d, 0)); \
  } else if constexpr (N == 64) {                                                                                     \
    MOKA_WGMMA_RS("64", TYPE, MOKA_N30 ",%30,%31", "32", "33", "34", "35", "36", MOKA_F32(d, 0));                     \
  } else if constexpr (N == 128) {                                                                                    \
    MOKA_WGMMA_RS("128", TYPE, MOKA_N60 ",%60,%61,%62,%63", "64", "65", "66", "67", "68", MOKA_F64(d, 0));            \
  } else {                                                                                                            \
    MOKA_WGMMA_RS("256", TYPE, MOKA_N120 ",%120,%121,%122,%123,%124,%125,%126,%127", "128", "129", "130", "131",      \
                  "132", MOKA_F64(d, 0), MOKA_F64(d, 64));                                                            \
  }

template <int N, typename T>
__device__ __forceinline__ void wgmma_rs(float* d, const uint32_t (&a)[4], uint64_t b) {
  static_assert(N == 32 || N == 64 || N == 128 || N == 256);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    MOKA_WGMMA_RS_SIZES("bf16")
  } else {
    MOKA_WGMMA_RS_SIZES("f16")
  }
}

#endif  // MOKA_SM90

}  // namespace moka::cuda
