// Hopper instructions used by the kernels: mbarriers, bulk tensor copies, asynchronous warpgroup products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MOKA_SM90 1
#endif

namespace moka::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

#ifdef MOKA_SM90

__device__ __forceinline__ void barrier_init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count));
}

__device__ __forceinline__ void barrier_expect(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* bar, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra stop;\nbra wait;\nstop:\n}\n" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}

// Copies one box of a two-dimensional tensor map into shared memory; completes on `bar`.
__device__ __forceinline__ void copy_box(void* dst, const void* map, int x, int y, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(dst)),
      "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y)
      : "memory");
}

// Copies 16 bytes (zeros when `bytes` is 0) to shared memory, and lets `bar` know when this thread's copies are done.
__device__ __forceinline__ void copy_async16(uint32_t dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive_after_copies(uint64_t* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}

// Shared-memory matrix descriptor; swizzle: 1 = 128 bytes, 2 = 64, 3 = 32. Offsets in bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, int leading, int stride, int swizzle) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Makes ordinary shared-memory stores visible to wgmma and the copy engine.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#define MOKA_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOKA_D8(d, i) MOKA_D4(d, i), MOKA_D4(d, i + 4)
#define MOKA_D16(d, i) MOKA_D4(d, i), MOKA_D4(d, i + 4), MOKA_D4(d, i + 8), MOKA_D4(d, i + 12)
#define MOKA_R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define MOKA_R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define MOKA_R32 MOKA_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"

// The accumulator d of 64 x N floats: N/2 registers of each of the warpgroup's 128 threads.
#define MOKA_WGMMA(N, TYPE, REGS, OUTPUTS, A, B, P, T)                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P                                                    \
               ", 0;\n"                                                                                  \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGS "}, %" A ", %" B \
               ", p, 1, 1, %" T ", 0;\n}\n"                                                              \
               : OUTPUTS                                                                                 \
               : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA))

// d = a b (+ d): a is 64 x 16, with kTransA stored with its 64 rows contiguous; b is N x 16, 16 contiguous.
template <int N, typename T, int kTransA>
__device__ __forceinline__ void wgmma(float* d, uint64_t a, uint64_t b, int accumulate) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(N == 16 || N == 32 || N == 64);
  if constexpr (N == 16) {
    if constexpr (kBf16)
      MOKA_WGMMA("16", "bf16", MOKA_R8, MOKA_D8(d, 0), "8", "9", "10", "11");
    else
      MOKA_WGMMA("16", "f16", MOKA_R8, MOKA_D8(d, 0), "8", "9", "10", "11");
  } else if constexpr (N == 32) {
    if constexpr (kBf16)
      MOKA_WGMMA("32", "bf16", MOKA_R16, MOKA_D16(d, 0), "16", "17", "18", "19");
    else
      MOKA_WGMMA("32", "f16", MOKA_R16, MOKA_D16(d, 0), "16", "17", "18", "19");
  } else {
#define MOKA_D32 MOKA_D16(d, 0), MOKA_D16(d, 16)
    if constexpr (kBf16)
      MOKA_WGMMA("64", "bf16", MOKA_R32, MOKA_D32, "32", "33", "34", "35");
    else
      MOKA_WGMMA("64", "f16", MOKA_R32, MOKA_D32, "32", "33", "34", "35");
  }
}

#endif  // MOKA_SM90

}  // namespace moka::cuda
