// How mixture_kernel's results reach W. A warp's part of a row is 16 to 64 bytes: stored directly, that many lines per
// instruction keep the L1 busy. On Hopper a stage's results meet in shared memory, and one bulk tensor copy takes them
// from there.
#pragma once

#include <type_traits>

#include "build_base.cuh"
#include "sm90.cuh"
#include "tensor_map.h"

namespace moka::cuda {

// One of 2-byte results is sent while the next is made; of 4-byte ones there is room for one.
template <typename T>
struct StageOutput {
  static constexpr int kStageBytes = kBuildThreads * 32 * sizeof(T);  // 32 results per thread
  static constexpr int kBuffers = sizeof(T) == 2 ? 2 : 1, kBytes = kBuffers * kStageBytes;
  static constexpr int kLine = 128, kEntries = kLine / sizeof(T);
  static constexpr int kAlign = 1024;  // of the buffers, for the swizzle

  // W [N, K] as [period_k / kEntries, N, macro_columns, kEntries], in boxes of one stage: lines of 128 bytes, in which
  // units of 16 are swizzled by the macro column.
  static bool encode(CUtensorMap* map, T* out, int64_t N, const Walk& walk) {
    constexpr auto kType = sizeof(T) == 4                     ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                           : std::is_same_v<T, __nv_bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const auto u64 = [](int64_t v) { return static_cast<cuuint64_t>(v); };
    const auto u32 = [](int v) { return static_cast<cuuint32_t>(v); };
    const cuuint64_t size[4] = {kEntries, u64(walk.macro_columns), u64(N), u64(walk.period_k / kEntries)};
    const cuuint64_t stride[3] = {u64(walk.period_k) * sizeof(T), u64(walk.K) * sizeof(T), kLine};
    const cuuint32_t box[4] = {kEntries, kStageSteps, u32(walk.rows()), u32(walk.columns() / kEntries)};
    return encode_map<4>(map, out, kType, size, stride, box);
  }

  uint32_t buffers, mine;  // in shared memory; from there to this lane's first octet

  // The lane's octets are those of `column` of `row`, in macro columns j and j + 1 and eight on; j is even.
  __device__ StageOutput(const void* buffers, const Walk& walk, int row, int column, int j)
      : buffers(shared_address(buffers)) {
    const int line = (column / kEntries * walk.rows() + row) * kStageSteps + j;
    mine = line * kLine + (column % kEntries * static_cast<int>(sizeof(T)) / 16 ^ j % 8) * 16;
  }
  // Its octet in macro column j + 8 half + e.
  __device__ __forceinline__ void put(int buffer, int half, int e, const float (&v)[8]) const {
    union {
      T t[8];
      uint4 u[sizeof(T) / 2];
    } x;
#pragma unroll
    for (int i = 0; i < 8; ++i) x.t[i] = from_acc<T>(v[i]);
    const uint32_t at = buffers + buffer * kStageBytes + (8 * half + e) * kLine + (mine ^ 16 * e);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i)
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at ^ 16 * i), "r"(x.u[i].x), "r"(x.u[i].y),
                   "r"(x.u[i].z), "r"(x.u[i].w)
                   : "memory");
  }

#if __CUDA_ARCH__ >= 900
  static constexpr bool kSends = true;
  // All threads, between what they put and the barrier in front of send().
  static __device__ __forceinline__ void finish() {
    proxy_fence();
    wait_until_read();
  }
  static __device__ __forceinline__ void wait_until_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
  // One thread sends a stage of the block of phases that begins at (p, q).
  __device__ __forceinline__ void send(const CUtensorMap& map, int buffer, const Stage& s, const Walk& walk, int p,
                                       int q) const {
    if (threadIdx.x > 0) return;
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n"
        "cp.async.bulk.commit_group;" ::"l"(&map),
        "r"(buffers + buffer * kStageBytes), "r"(0), "r"(s.J), "r"(s.I * walk.period_n + p), "r"(q / kEntries)
        : "memory");
  }
#else
  static constexpr bool kSends = false;
  static __device__ void finish() {}
  static __device__ void wait_until_read() {}
  __device__ void send(const CUtensorMap&, int, const Stage&, const Walk&, int, int) const {}
#endif
};

}  // namespace moka::cuda
