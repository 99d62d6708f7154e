// Hopper instructions used by the kernels: mbarriers, bulk tensor copies, asynchronous warpgroup products.
#pragma once

#include <type_traits>

#include "cuda_common.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MOKA_SM90 1
#endif

namespace moka::cuda {

#if __CUDA_ARCH__ >= 900
// Makes ordinary shared-memory stores visible to wgmma and the copy engine.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

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

// The same of a three-dimensional map.
__device__ __forceinline__ void copy_box(uint32_t dst, const void* map, int x, int y, int z, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(dst),
      "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Copies 16 bytes (zeros when `bytes` is 0) to shared memory, and lets `bar` know when this thread's copies are done.
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
template <int kInFlight = 0>  // committed groups that may still run
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers of each thread of this warpgroup, from the share that the kernel was launched with.
template <int kCount>
__device__ __forceinline__ void set_registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void set_registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Rounds a warp's part of an accumulator, 16 x 16, to bf16 and stores it; lane i gives the address of the 16 bytes of
// row i % 16, columns i / 16 * 8 on. kTransposed: of column i / 16 * 8 + i % 8, rows i % 16 / 8 * 8 on.
template <bool kTransposed = false>
__device__ __forceinline__ void store_matrices(uint32_t address, const float* d) {
  const uint32_t v[4] = {pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]), pack_bf16(d[4], d[5]), pack_bf16(d[6], d[7])};
  if constexpr (kTransposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}

#define MOKA_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOKA_D8(i) MOKA_D4(i), MOKA_D4(i + 4)
#define MOKA_D16(i) MOKA_D8(i), MOKA_D8(i + 8)
#define MOKA_D32(i) MOKA_D16(i), MOKA_D16(i + 16)
#define MOKA_D64(i) MOKA_D32(i), MOKA_D32(i + 32)
#define MOKA_R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define MOKA_R16 MOKA_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define MOKA_R32 MOKA_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MOKA_R64                                                         \
  MOKA_R32                                                               \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48" \
  ",%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// The accumulator d of 64 x N floats: N/2 registers of each of the warpgroup's 128 threads.
#define MOKA_WGMMA(N, REGS, OUTPUTS, A, B, P, TRANS, ...)                                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P                                                               \
               ", 0;\n"                                                                                             \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32.bf16.bf16 {" REGS "}, " A ", %" B ", p, 1, 1, " TRANS \
               ";\n}\n"                                                                                             \
               : OUTPUTS                                                                                            \
               : __VA_ARGS__)

// d = a b (+ d) in bf16. a is 64 x 16, with kTransA stored with its 64 rows contiguous; b is N x 16, 16 contiguous,
// or with kTransB the N.
template <int N, int kTransA, int kTransB = 0>
__device__ __forceinline__ void wgmma(float* d, uint64_t a, uint64_t b, int accumulate) {
  static_assert(N == 16 || N == 32 || N == 64 || N == 128);
#define MOKA_IN "l"(a), "l"(b), "r"(accumulate), "n"(kTransA), "n"(kTransB)
  if constexpr (N == 16) {
    MOKA_WGMMA("16", MOKA_R8, MOKA_D8(0), "%8", "9", "10", "%11, %12", MOKA_IN);
  } else if constexpr (N == 32) {
    MOKA_WGMMA("32", MOKA_R16, MOKA_D16(0), "%16", "17", "18", "%19, %20", MOKA_IN);
  } else if constexpr (N == 64) {
    MOKA_WGMMA("64", MOKA_R32, MOKA_D32(0), "%32", "33", "34", "%35, %36", MOKA_IN);
  } else {
    MOKA_WGMMA("128", MOKA_R64, MOKA_D64(0), "%64", "65", "66", "%67, %68", MOKA_IN);
  }
}

// The same with a in registers, laid out like 16 columns of an accumulator after pack_bf16.
template <int N, int kTransB>
__device__ __forceinline__ void wgmma(float* d, const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(N == 64);
  MOKA_WGMMA("64", MOKA_R32, MOKA_D32(0), "{%32, %33, %34, %35}", "36", "37", "%38", "r"(a[0]), "r"(a[1]), "r"(a[2]),
             "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransB));
}

#endif  // MOKA_SM90

}  // namespace moka::cuda
