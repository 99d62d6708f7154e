// W x for few tokens, on tensor cores. The codes come through shared memory, so that loads are under way whose
// registers are not needed yet, and are decoded by a 256-entry table of pairs, one copy per shared-memory bank. Block
// scales are applied to sums over blocks of 64, in fp32; then the mixture's shares and the bias are added and y is
// rounded once. Each launch overlaps the one before it: it fills its table and fetches a weight into the L2, and only
// then waits.
#pragma once

#include "decode_mixture.cuh"

namespace moka::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kDecodeThreads = kWarps * kLanes;
constexpr int kBlock = 64;   // weights per absmax
constexpr int kChunk = 256;  // columns a warp handles at a time: four blocks of each of its rows
constexpr int kStages = 2;   // chunks of a warp in shared memory or on their way to it
constexpr int kTableBytes = 256 * kLanes * 4;

// Entry (byte, lane) is the pair of weights that `byte` codes, as two T; rotated writes avoid bank conflicts.
template <typename T>
__device__ void fill_table(uint32_t* table) {
  float code[16] = {MOKA_NF4_CODE};
  const auto halve = [&](int n) {
#pragma unroll
    for (int i = 0; i < n; ++i) code[i] = threadIdx.x & n ? code[i + n] : code[i];
  };
  halve(8), halve(4), halve(2), halve(1);  // now lane i's code[0] is the i-th, and no memory was waited for
  for (int byte = threadIdx.x; byte < 256; byte += blockDim.x) {
    const T pair[2] = {from_acc<T>(__shfl_sync(~0u, code[0], byte >> 4)),
                       from_acc<T>(__shfl_sync(~0u, code[0], byte & 15))};
    const uint32_t v = *reinterpret_cast<const uint32_t*>(pair);
#pragma unroll
    for (int j = 0; j < 8; ++j) reinterpret_cast<uint4*>(table)[byte * 8 + (j + byte) % 8] = make_uint4(v, v, v, v);
  }
}

// The entry for byte `i` of `word`; `table` is the shared address of entry (0, lane).
__device__ __forceinline__ uint32_t look_up(uint32_t table, uint32_t word, int i) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(__byte_perm(word, 0, 0x4440 + i) * (kLanes * 4) + table));
  return v;
}

// Shared memory by addresses that are worked out once: for generic pointers the compiler does so in every round.
__device__ __forceinline__ uint2 load_shared8(uint32_t at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ float4 load_shared16(uint32_t at) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(at)
               : "memory");
  return v;
}
__device__ __forceinline__ float load_shared4(uint32_t at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared16(uint32_t at, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ void store_shared4(uint32_t at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}

// 16 bytes of x, past the L1 if need be; for pointers of which the compiler does not know that they are global.
template <bool kPast>
__device__ __forceinline__ uint4 load_global16(const void* from) {
  uint4 v;
  if (kPast)
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
  else
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
  return v;
}

// A chunk in shared memory: [rows] codes of 128 bytes, in units of 16 that are swizzled against bank conflicts, then
// [rows] scales of 16 bytes: four of absmax, or four codes and the absmax2 that they share.
template <int MT>
struct Slot {
  static constexpr int kRows = 16 * MT, kCodes = kChunk / 2, kScales = 16, kBytes = kRows * (kCodes + kScales);

  static __device__ __forceinline__ int codes(int row, int unit) { return row * kCodes + (unit ^ row % 4 * 2) * 16; }
  static __device__ __forceinline__ int scales(int row) { return kRows * kCodes + row * kScales; }

  // A lane's share of the copies.
  static __device__ __forceinline__ void fetch(uint32_t slot, const Nf4Params& w, int64_t row0, int chunk, int shift2) {
    const int lane = threadIdx.x % kLanes, K = static_cast<int>(w.K);
    const uint8_t* from = w.packed + (row0 + lane / 8) * (K / 2) + chunk * kCodes + lane % 8 * 16;
    const uint32_t to = slot + codes(lane / 8, lane % 8);
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) copy_async16(to + i * 4 * kCodes, from + int64_t{i} * 4 * (K / 2), 16);
    const int64_t block = (row0 + lane) * (K / kBlock) + chunk * 4;
    const uint32_t scale = slot + scales(lane);
    if (lane >= kRows) return;
    if (w.absmax) {
      copy_async16(scale, w.absmax + block, 16);
    } else {
      copy_async4(scale, w.absmax_q + block);
      copy_async4(scale + 4, w.absmax2 + (block >> shift2));
    }
  }
  // The lane's row: a nested absmax becomes four scales.
  static __device__ __forceinline__ void unnest(uint32_t slot, uint32_t code2, float offset) {
    const int lane = threadIdx.x % kLanes;
    if (lane >= kRows) return;
    const uint2 pair = load_shared8(slot + scales(lane));
    const auto scale = [&](int i) {
      return __fadd_rn(__fmul_rn(load_shared4(code2 + (pair.x >> 8 * i & 255) * 4), __uint_as_float(pair.y)), offset);
    };
    store_shared16(slot + scales(lane), make_float4(scale(0), scale(1), scale(2), scale(3)));
  }
};

template <int MT>
__host__ __device__ constexpr int decode_bytes() {
  return kTableBytes + 256 * 4 + kWarps * kStages * Slot<MT>::kBytes;
}

// A thread block computes tiles of 16 MT rows of y for up to 8 NT tokens, which blockIdx.y names; its warps share out
// K. It takes half of a multiprocessor of Hopper's, so that the next launch can begin beside it. With a mixture the
// launch before is the mixture's, which lets this one start once the kernels before it are complete: x may be read
// then, past the L1, but not yet the shares. (A nested absmax goes through the L1: whatever writes a weight lets
// nothing start before it has ended, and the L1 starts empty.)
template <typename T, int MT, int NT, bool kMixture>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    decode_kernel(const T* x, int tokens, const __grid_constant__ Nf4Params w, int shift2, const T* bias,
                  const float* shares, int components, const int32_t* adapter, bool prefetch, T* y) {
  extern __shared__ __align__(128) uint8_t smem[];
  constexpr int kRows = 16 * MT, kStride = NT > 1 ? 21 : 9, kSlot = Slot<MT>::kBytes;
  constexpr int kAheadX = NT > 1 ? 1 : 4;  // blocks of x in registers
  // a warp's sums, in rows whose lengths spread what is written at once over the banks; a thread per code2
  static_assert(kRows * kStride * 4 <= kSlot && kStride > 8 * NT && kDecodeThreads == 256);
  uint32_t table = shared_address(smem);
  asm("" : "+r"(table));  // opaque, or the compiler works it out again in every round
  const uint32_t code2 = table + kTableBytes;
  const uint32_t slots = code2 + 256 * 4;                      // [kStages, kWarps]
  const int warp = __shfl_sync(~0u, threadIdx.x / kLanes, 0);  // the same for all lanes, which the compiler sees now
  const int lane = threadIdx.x % kLanes, g = lane / 4, quad = lane % 4;
  const int K = static_cast<int>(w.K), N = static_cast<int>(w.N);
  const int token0 = blockIdx.y * 8 * NT, count = min(8 * NT, tokens - token0);
  const int chunks = K / kChunk, tiles = N / kRows, steps = (chunks + kWarps - 1) / kWarps;

  if (prefetch) prefetch_rows(w, shift2, static_cast<int64_t>(blockIdx.x) * kRows, kRows);
  fill_table<T>(reinterpret_cast<uint32_t*>(smem));
  // The kernel in front may have written the weight. With a mixture that is the mixture's, which let this one start
  // only after everything in front of it had ended.
  if (!kMixture) wait_for_previous();
  const bool nested = w.absmax == nullptr;
  const float offset = nested ? __ldcg(w.offset) : 0.f;
  const float code = nested ? __ldcg(w.code2 + threadIdx.x) : 0.f;  // before the many loads that follow

  const T* from[NT];  // the lane's part of x in the chunk that is loaded next
#pragma unroll
  for (int t = 0; t < NT; ++t) from[t] = x + static_cast<int64_t>(token0 + t * 8 + g) * K + quad * 16 + warp * kChunk;
  uint4 xs[kAheadX][NT][2] = {};
  const auto load_x = [&](int i, int block) {
#pragma unroll
    for (int t = 0; t < NT; ++t)
      if (t * 8 + g < count)
#pragma unroll
        for (int j = 0; j < 2; ++j) xs[i][t][j] = load_global16<kMixture>(from[t] + block * kBlock + j * 8);
  };
  if (warp < chunks)
#pragma unroll
    for (int i = 0; i < kAheadX; ++i) load_x(i, i);

  // this warp's chunks, tile after tile: the next to fetch
  int ahead_tile = blockIdx.x, ahead = warp, slot = 0;
  const auto fetch = [&](int to) {
    if (ahead_tile < tiles && ahead < chunks)
      Slot<MT>::fetch(slots + (to * kWarps + warp) * kSlot, w, static_cast<int64_t>(ahead_tile) * kRows, ahead, shift2);
    ahead += kWarps;
    if (ahead >= steps * kWarps) ahead = warp, ahead_tile += gridDim.x;
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (int i = 0; i < kStages; ++i) fetch(i);
  store_shared4(code2 + threadIdx.x * 4, code);
  __syncthreads();
  let_next_start();  // earlier, the next launch's loads are in the way of these

  const uint32_t table_lane = table + lane * 4;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float acc[MT][NT][4] = {};
    for (int step = 0; step < steps; ++step) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
      __syncwarp();
      const uint32_t now = slots + (slot * kWarps + warp) * kSlot;
      const int chunk = step * kWarps + warp, next = chunk + kWarps < chunks ? chunk + kWarps : warp;
      const bool more = next > chunk || tile + static_cast<int>(gridDim.x) < tiles;
      if (chunk < chunks) {
        if (nested) {
          Slot<MT>::unnest(now, code2, offset);
          __syncwarp();
        }
        float4 scale[MT][2];
        uint2 codes[MT][2];  // of the next block
        const auto load_codes = [&](int b) {
#pragma unroll
          for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
              codes[m][h] = load_shared8(now + Slot<MT>::codes(m * 16 + h * 8 + g, b * 2 + quad / 2) + quad % 2 * 8);
        };
        load_codes(0);
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) scale[m][h] = load_shared16(now + Slot<MT>::scales(m * 16 + h * 8 + g));
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          uint2 of[MT][2];
#pragma unroll
          for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) of[m][h] = codes[m][h];
          if (b < 3) load_codes(b + 1);
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            uint32_t a[4][4];
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int byte = 0; byte < 8; ++byte)
                a[byte / 2][byte % 2 * 2 + h] = look_up(table_lane, byte < 4 ? of[m][h].x : of[m][h].y, byte % 4);
            float d[NT][4] = {};
#pragma unroll
            for (int s = 0; s < 4; ++s)
#pragma unroll
              for (int t = 0; t < NT; ++t) {
                const uint4& v = xs[b % kAheadX][t][s / 2];
                mma<T>(d[t], a[s], s % 2 ? v.z : v.x, s % 2 ? v.w : v.y);
              }
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const float4& s = scale[m][i / 2];
                acc[m][t][i] = fmaf(b == 0 ? s.x : b == 1 ? s.y : b == 2 ? s.z : s.w, d[t][i], acc[m][t][i]);
              }
          }
          const int then = b + kAheadX;  // past this chunk, the block of the next one
          if (then == 4)
#pragma unroll
            for (int t = 0; t < NT; ++t) {
              from[t] += (next - chunk) * kChunk;
              asm("" : "+l"(from[t]));  // opaque, or the compiler works it out again for every load
            }
          // for more than 8 tokens the test would spill a register, for a load or two
          if (NT > 1 || then < 4 || more) load_x(b % kAheadX, then % 4);
        }
      }
      __syncwarp();
      if (step + 1 == steps) break;  // the slot takes the sums first
      fetch(slot);
      slot = (slot + 1) % kStages;
    }

    const uint32_t sums = slots + slot * kWarps * kSlot;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          store_shared4(sums + warp * kSlot + ((m * 16 + g + i / 2 * 8) * kStride + t * 8 + quad * 2 + i % 2) * 4,
                        acc[m][t][i]);
    __syncthreads();
    if (kMixture) wait_for_previous();
#pragma unroll 1
    for (int o = threadIdx.x; o < kRows / 2 * count; o += kDecodeThreads) {
      const int r = o % (kRows / 2) * 2, t = o / (kRows / 2), row = tile * kRows + r;
      const int64_t at = static_cast<int64_t>(token0 + t) * N + row;
      float2 v = make_float2(0.f, 0.f);
      if (kMixture && !(adapter && __ldcg(adapter + token0 + t) < 0)) {
        float2 share[kMaxDecodeComponents];  // all are under way before the first is used
#pragma unroll
        for (int i = 0; i < kMaxDecodeComponents; ++i) {
          const float* p = shares + static_cast<int64_t>(i) * tokens * N + at;
          share[i] = i < components ? __ldcg(reinterpret_cast<const float2*>(p)) : make_float2(0.f, 0.f);
        }
#pragma unroll
        for (int i = 0; i < kMaxDecodeComponents; ++i) v.x += share[i].x, v.y += share[i].y;
      }
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        const uint32_t sum = sums + k * kSlot + (r * kStride + t) * 4;
        v.x += load_shared4(sum), v.y += load_shared4(sum + kStride * 4);
      }
      if (bias) v.x += to_float(bias[row]), v.y += to_float(bias[row + 1]);
      const T pair[2] = {from_acc<T>(v.x), from_acc<T>(v.y)};
      *reinterpret_cast<uint32_t*>(y + at) = *reinterpret_cast<const uint32_t*>(pair);
    }
    if (tile + static_cast<int>(gridDim.x) >= tiles) break;
    __syncthreads();
    fetch(slot);
    slot = (slot + 1) % kStages;
  }
}

}  // namespace
}  // namespace moka::cuda
