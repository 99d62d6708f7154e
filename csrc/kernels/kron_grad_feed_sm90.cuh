// What brings data to the products of kron_grad_sm90.cuh: the rings of chunks, the factors and the producers.
#pragma once

#include <cuda.h>

#include "cuda_common.cuh"
#include "kron_grad_shapes.h"
#include "sm90.cuh"

namespace moka::cuda {

struct GradLaunch {
  CUtensorMap t1[kMaxGradGroups];  // [M, S1, L1] in boxes of tokens x P1 x 64
  CUtensorMap t2[kMaxGradGroups];  // [M, L2 S2 / 64, 64] in boxes of tokens x 64 x 64
  GradPlan plan;
  const void *f1[kMaxGradGroups][2], *f2[kMaxGradGroups][2];  // null: an empty slot
  const void *x, *dy;
  bool factor_fp32;
  int64_t M;
};

constexpr int kGradThreads = 3 * 128;
constexpr int kGradCopyWarps = 3;  // of the producers, for T2

#ifdef MOKA_SM90

// Byte of element (row, column) in a matrix of 64-wide chunks [chunk][rows][64] in the 128-byte swizzle.
__device__ __forceinline__ int swizzled(int rows, int row, int column) {
  return (column / 64 * rows + row) * 128 + ((column / 8 ^ row) & 7) * 16 + column % 8 * 2;
}

// One ring of chunks as one of its readers or its writer sees it.
template <int kSlots, int kBytes>
struct Ring {
  uint32_t data;
  uint64_t *full, *empty;
  int slot = 0, phase = 0;

  __device__ uint32_t at() const { return data + slot * kBytes; }
  __device__ void next() {
    if (++slot == kSlots) slot = 0, phase ^= 1;
  }
};

// A thread block's shared memory.
template <class C>
struct Layout {
  static constexpr int kFactor1 = 0, kFactor2 = kFactor1 + C::kFactor1;
  static constexpr int kMiddle0 = kFactor2 + C::kFactor2, kMiddle1 = kMiddle0 + C::kMiddle0;
  static constexpr int kRing1 = C::kFixed, kRing2 = kRing1 + C::kSlots1 * C::kSlot1;
  static constexpr int kBarriers = kGradSmem - kGradBarriers;
  using Ring1 = Ring<C::kSlots1, C::kSlot1>;
  using Ring2 = Ring<C::kSlots2, C::kSlot2>;

  static __device__ uint64_t* barriers(uint8_t* smem) { return reinterpret_cast<uint64_t*>(smem + kBarriers); }
  // The factors are loaded: until then only one tile is, so that they do not queue behind the rings' filling.
  static __device__ uint64_t* ready(uint8_t* smem) { return barriers(smem) + 2 * (C::kSlots1 + C::kSlots2); }
  static __device__ Ring1 ring1(uint8_t* smem) {
    uint64_t* b = barriers(smem);
    return {shared_address(smem + kRing1), b, b + C::kSlots1};
  }
  static __device__ Ring2 ring2(uint8_t* smem) {
    uint64_t* b = barriers(smem) + 2 * C::kSlots1;
    return {shared_address(smem + kRing2), b, b + C::kSlots2};
  }
};

// F1 or F2 [S, L] of one component into rows row0.. of an operand of `rows` rows; natural: it is stored [S, L].
template <int S, int L, typename TF>
__device__ void load_factor(uint8_t* dst, int rows, int row0, const TF* factor, bool natural) {
  constexpr int kBatch = 64;
  for (int i0 = threadIdx.x % 128; i0 < S * L; i0 += 128 * kBatch) {
    float v[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) v[j] = i0 + j * 128 < S * L ? to_float(__ldg(factor + i0 + j * 128)) : 0.f;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = i0 + j * 128, r = natural ? i / L : i % S, l = natural ? i % L : i / S;
      if (i < S * L)
        *reinterpret_cast<__nv_bfloat16*>(dst + swizzled(rows, row0 + r, l)) = from_acc<__nv_bfloat16>(v[j]);
    }
  }
}

// The same for sizes known at run time. In a loop, since fetching instructions that run once takes longer than they do.
template <typename TF>
__device__ __noinline__ void load_factor(uint8_t* dst, int rows, int row0, const TF* factor, int S, int L,
                                         bool natural) {
  const int thread = threadIdx.x % 128, width = natural ? L : S, rows_on = 128 / width;
  int row = thread / width, column = thread - row * width;
#pragma unroll 8
  for (int i = thread; i < S * L; i += 128) {
    const int r = natural ? row : column, l = natural ? column : row;
    *reinterpret_cast<__nv_bfloat16*>(dst + swizzled(rows, row0 + r, l)) =
        from_acc<__nv_bfloat16>(to_float(__ldg(factor + i)));
    row += rows_on, column += 128 - rows_on * width;
    if (column >= width) column -= width, ++row;
  }
}

// One thread: chunks by bulk copies, of T1 (kOperand 1) or T2.
template <class C, int kOperand, class R>
__device__ void produce_boxes(const CUtensorMap* map, R ring, uint64_t* ready, int chunks, int first, int stride,
                              int tiles) {
  for (int tile = first; tile < tiles; tile += stride) {
    for (int c = 0; c < chunks; ++c) {
      barrier_wait(&ring.empty[ring.slot], ring.phase ^ 1);
      barrier_expect(&ring.full[ring.slot], kOperand == 1 ? C::kSlot1 : C::kSlot2);
      const int x = kOperand == 1 ? c * 64 : 0, y = kOperand == 1 ? 0 : c * 64;
      copy_box(ring.at(), map, x, y, tile * C::kTokens, &ring.full[ring.slot]);
      ring.next();
    }
    if (tile == first) barrier_wait(ready, 0);
  }
}

// One of kGradCopyWarps warps: its share of the chunks of T2 with rows of 16 to 64 bytes, for which bulk copies are
// slow, so that the tokens of a tile lie beside each other. Rows from l2 on are multiplied by zeros and must be finite:
// zeros at first, then what the slot held before.
template <class C, class R>
__device__ void produce_rows(const uint8_t* t2, int l2, int64_t M, R ring, uint64_t* ready, int warp, int first,
                             int stride, int tiles) {
  constexpr int kUnits = C::kS2 / 8, kRows = 32 / kUnits;  // 16-byte units of a row; rows of one access of a warp
  const int lane = threadIdx.x % 32, row = lane / kUnits, unit = lane % kUnits;
  int n = 0;
  for (int tile = first; tile < tiles; tile += stride) {
    for (int c = 0; c * 64 < l2; ++c, ++n, ring.next()) {
      if (n % kGradCopyWarps != warp) continue;
      barrier_wait(&ring.empty[ring.slot], ring.phase ^ 1);
#pragma unroll 1
      for (int t = 0; t < C::kTokens; ++t) {
        const int64_t token = static_cast<int64_t>(tile) * C::kTokens + t;
        const int rows = token < M ? l2 - c * 64 : 0;
        const uint8_t* src = t2 + (token * l2 + c * 64) * C::kS2 * 2 + lane * 16;
        const uint32_t dst = ring.at() + t * C::kS2 / 64 * 8192 + row * 128 + ((t * kUnits + unit ^ row) & 7) * 16;
        if (rows >= 64) {
#pragma unroll
          for (int i = 0; i < 64 / kRows; ++i) copy_async16(dst + i * kRows * 128, src + i * 512, 16);
          continue;
        }
#pragma unroll
        for (int i = 0; i < 64 / kRows; ++i)
          if (row < rows - i * kRows) copy_async16(dst + i * kRows * 128, src + i * 512, 16);
        if (n < C::kSlots2 || token >= M)
#pragma unroll 1
          for (int i = 0; i < 64 / kRows; ++i)
            if (row >= rows - i * kRows) copy_async16(dst + i * kRows * 128, t2, 0);
      }
      barrier_arrive_after_copies(&ring.full[ring.slot]);
    }
    if (tile == first) barrier_wait(ready, 0);
  }
}

#endif  // MOKA_SM90

}  // namespace moka::cuda
