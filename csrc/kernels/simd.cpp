#include "simd.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

namespace moka {
namespace {

bool available(Isa isa) {
#if MOKA_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return isa == Isa::kScalar || (isa == Isa::kAvx2 && avx2) || (isa == Isa::kAvx512 && avx512);
#else
  return isa == Isa::kScalar;
#endif
}

Isa best_isa() { return available(Isa::kAvx512) ? Isa::kAvx512 : available(Isa::kAvx2) ? Isa::kAvx2 : Isa::kScalar; }

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

Isa active_isa() { return current().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "scalar"; }

bool set_isa(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    current() = best_isa();
    return true;
  }
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(name, isa_name(isa)) != 0) continue;
    if (!available(isa)) return false;
    current() = isa;
    return true;
  }
  return false;
}

}  // namespace moka
