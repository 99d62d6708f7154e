// Which instruction set the CPU kernels use: found once by cpuid, changed only by tests.
//
// A kernel is written once, in `<stem>_impl.h`, against the vector type of simd_vec.h, and compiled three times:
//
//   // <stem>_avx512.cpp                         <stem>_avx2.cpp: MOKA_SIMD_AVX2      <stem>_scalar.cpp: neither
//   #include "<stem>.h"                          // the kernel's table, and every standard header the body needs
//   #define MOKA_SIMD_AVX512
//   #include "simd_vec.h"                        // opens the target region: no #include below except the body
//   #include "<stem>_impl.h"                     // defines everything inside namespace moka::MOKA_SIMD
//   #include "simd_end.h"                        // closes the region
//
// No file needs a compiler flag. Functions of the standard library must not be instantiated inside the region: the
// linker could hand the AVX-512 copy to a CPU that lacks it.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#define MOKA_X86 1
#else
#define MOKA_X86 0
#endif

namespace moka {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// The instruction set in use: the best this CPU has, unless set_isa chose another.
Isa active_isa();

// "scalar", "avx2", "avx512" or "auto"; false, and nothing changed, when unknown or not available on this CPU.
bool set_isa(const char* name);

const char* isa_name(Isa isa);

// The entry of {scalar, avx2, avx512} for the active instruction set.
template <typename F>
F select_isa(F scalar, F avx2, F avx512) {
  const Isa isa = active_isa();
  return isa == Isa::kAvx512 ? avx512 : isa == Isa::kAvx2 ? avx2 : scalar;
}

// 16-bit floating point as stored; the vector loads and stores convert to and from fp32, rounding to nearest even.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace moka
