// The bases the build kernels add a mixture to: NF4, through shared memory, and dense.
#pragma once

#include "build_cuda.h"
#include "cuda_common.cuh"

namespace moka::cuda {

constexpr int kBuildThreads = 256;
constexpr int kLanes = 32;
constexpr int kWarps = kBuildThreads / kLanes;

constexpr int kStageSteps = 16;  // macro columns per stage of mixture_kernel
constexpr int kBuffers = 4;      // stages in shared memory or on their way to it

// How mixture_kernel cuts W [N, K]: a thread block takes `rows` x `columns` phases of the period, each warp a cell
// of 8 >> shift rows and 8 << shift columns, which lies in one entry of every A_i. A stage is 16 macro columns of one
// macro row. As many thread blocks as there are parts share the stages of the same phases; neighbouring ones have
// neighbouring phases, so that all write to the same rows of W at about the same time.
struct Walk {
  int K, period_n, period_k;
  int macro_rows, macro_columns;
  int shift;
  int tiles, blocks;          // thread blocks' phases: side by side, and in all
  int chunks, stages, parts;  // stages of a macro row, of a block of phases; and what they are divided into

  __host__ __device__ int rows() const { return 8 >> shift; }
  __host__ __device__ int columns() const { return 8 * kWarps << shift; }
};

struct Stage {
  int I, J;  // macro row, first macro column

  __device__ void advance(const Walk& w) {
    J += kStageSteps;
    if (J >= w.macro_columns) J = 0, ++I;
  }
  // The entry of W at phase (0, 0).
  __device__ int64_t first_entry(const Walk& w) const {
    return static_cast<int64_t>(I * w.period_n) * w.K + static_cast<int64_t>(J) * w.period_k;
  }
};

// values[i]
template <typename... Values>
__device__ __forceinline__ float pick(int i, Values... values) {
  float out = 0.f;
  ((out = i-- == 0 ? values : out), ...);
  return out;
}

// Codes decode through a table of pairs of values per byte, in 16 copies, so that no two lanes meet in a bank.
struct Nf4Base {
  Nf4Params w;
  int block_shift, block2_shift;  // log2 of the blocksizes; fast kernels only

  static constexpr int kMixtureBlocks = 2;  // of mixture_kernel, per multiprocessor
  static constexpr int kCopies = 16;
  static constexpr int kTableBytes = 256 * kCopies * 8, kCodeBytes = kBuildThreads * 16;
  static constexpr int kScales = kTableBytes + kBuffers * kCodeBytes;
  static constexpr int kSharedBytes = kScales + 2 * kBuildThreads * 4;

  // All threads of a warp, eight warps. Constants indexed by lane would be fetched one by one.
  __device__ void fill(uint8_t* table) const {
    const int byte = threadIdx.x;
    const float low = pick(byte % 16, MOKA_NF4_CODE);
    const float high = __shfl_sync(~0u, low, byte / 16);
#pragma unroll
    for (int j = 0; j < kCopies / 2; ++j)  // rotated by thread, against bank conflicts
      reinterpret_cast<float4*>(table)[byte * (kCopies / 2) + (j + byte) % (kCopies / 2)] =
          make_float4(high, low, high, low);
  }
  // v + W in fp32: the product and the sum are rounded once, the product alone is W exactly.
  __device__ void decode(uint32_t codes, float scale, const uint8_t* table, float (&v)[8]) const {
    const uint8_t* mine = table + threadIdx.x % kCopies * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t at = (i ? codes >> (8 * i - 7) : codes << 7) & 255 << 7;
      const float2 pair = *reinterpret_cast<const float2*>(mine + at);
      v[2 * i] = fmaf(pair.x, scale, v[2 * i]);
      v[2 * i + 1] = fmaf(pair.y, scale, v[2 * i + 1]);
    }
  }

  // A block's scale, as loaded: the loads of several can be under way before the first is put together.
  struct Scale {
    float value;
    int code;
  };
  __device__ Scale load_scale(int64_t block) const {
    if (w.absmax) return {__ldg(w.absmax + block), 0};
    return {__ldg(w.absmax2 + (block >> block2_shift)), __ldg(w.absmax_q + block)};
  }
  __device__ float scale(const Scale& s) const {
    if (w.absmax) return s.value;
    return __fadd_rn(__fmul_rn(__ldg(w.code2 + s.code), s.value), __ldg(w.offset));
  }

  // mixture_kernel. Codes of a stage: 2 halves of 8 steps, [rows][8 steps][columns / 32] units of 16 bytes, one per
  // thread, swizzled; scales: the same halves, [rows][8 steps][scales of the columns], at most one per thread.
  struct Lane {
    int codes_from, scale_from;   // what this thread copies: entries, counted from a stage's first one
    int codes_step, scale_step;   // and the macro column it is of
    int codes_to, codes, scales;  // offsets in shared memory: what it writes, what it reads
    int codes_next, scales_next;  // from a step to the next one
    Scale scale[2];               // of the last two stages fetched
  };
  static __device__ int swizzle(int row, int j) { return j / 2 | row % 2 * 4; }
  // The lane adds to the eight entries at (row, column) of the thread block's phases in steps j and j + 1.
  __device__ Lane lane(const Walk& walk, int row, int column, int j) const {
    const int half = threadIdx.x / 128 * 8, u = threadIdx.x % 128;
    const int shift = max(0, 6 + walk.shift - block_shift);  // log2 of the scales per row and step
    Lane out = {};
    auto entry = [&](int row, int step) { return row * walk.K + step * walk.period_k; };
    {
      const int unit = u & ((2 << walk.shift) - 1), j = u >> (1 + walk.shift) & 7, row = u >> (4 + walk.shift);
      out.codes_step = half + j;
      out.codes_from = entry(row, half + j) + unit * 32;
      out.codes_to = kTableBytes + (threadIdx.x ^ swizzle(row, j)) * 16;
    }
    {
      const int i = u & ((1 << shift) - 1), j = u >> shift & 7, row = u >> (3 + shift);
      out.scale_step = row < walk.rows() ? half + j : kStageSteps;
      out.scale_from = entry(row, half + j) + (i << block_shift);
    }
    const int unit = ((row << 3 | j) << (1 + walk.shift) | column / 32) ^ swizzle(row, j);
    out.codes = kTableBytes + unit * 16 + column / 8 % 4 * 4;
    out.codes_next = (unit & 2 << walk.shift ? -16 : 16) * (2 << walk.shift);  // j is even: one bit of `unit` flips
    out.scales = kScales + (((row << 3 | j) << shift) + (shift ? column >> block_shift : 0)) * 4;
    out.scales_next = 4 << shift;
    return out;
  }
  __device__ void fetch(uint8_t* smem, int buffer, Lane& lane, int64_t first, int steps) const {
    if (lane.codes_step < steps)
      copy_async16(shared_address(smem + lane.codes_to + buffer * kCodeBytes), w.packed + (first + lane.codes_from) / 2,
                   16);
    lane.scale[0] = lane.scale[1];
    if (lane.scale_step < steps) lane.scale[1] = load_scale(first + lane.scale_from >> block_shift);
  }
  // Puts the scales of the last fetch but one together.
  __device__ void finish_fetch(uint8_t* smem, int parity, const Lane& lane) const {
    reinterpret_cast<float*>(smem + kScales)[parity * kBuildThreads + threadIdx.x] = scale(lane.scale[0]);
  }
  struct Entries {
    uint32_t codes;
    float scale;
  };
  __device__ Entries read(const uint8_t* smem, int buffer, int parity, const Lane& lane, int half, int e, bool,
                          int64_t) const {
    const int code = lane.codes + e * lane.codes_next + buffer * kCodeBytes + half * (kCodeBytes / 2);
    const int scale = lane.scales + e * lane.scales_next + (parity * 2 + half) * (kBuildThreads / 2 * 4);
    return {*reinterpret_cast<const uint32_t*>(smem + code), *reinterpret_cast<const float*>(smem + scale)};
  }
  __device__ void add(const Entries& entries, const uint8_t* smem, float (&v)[8]) const {
    decode(entries.codes, entries.scale, smem, v);
  }
  // build_any_kernel: four entries, of whole bytes in one block, or one entry, rounded as `at` rounds them. Blocksizes
  // are powers of two.
  template <int kColumns>
  __device__ void add_columns(int64_t e, const uint8_t* table, float (&v)[kColumns]) const {
    const float2* mine = reinterpret_cast<const float2*>(table) + threadIdx.x % kCopies;
    const float block_scale = scale(load_scale(e >> block_shift));
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) {
      const float2 pair = mine[__ldg(w.packed + (e + i) / 2) * kCopies];
      v[i] += __fmul_rn(kColumns == 1 && e % 2 ? pair.y : pair.x, block_scale);
      if (kColumns > 1) v[(i + 1) % kColumns] += __fmul_rn(pair.y, block_scale);
    }
  }
  __device__ float at(int64_t e) const {
    const int byte = w.packed[e / 2];
    return __fmul_rn(kNf4[e % 2 ? byte & 15 : byte >> 4], block_scale(w, e / w.blocksize));
  }
};

inline Nf4Base nf4_base(const Nf4Params& w) {
  Nf4Base base = {w, 0, 0};
  while ((int64_t{1} << base.block_shift) < w.blocksize) ++base.block_shift;
  while (!w.absmax && (int64_t{1} << base.block2_shift) < w.blocksize2) ++base.block2_shift;
  return base;
}

template <typename T>
struct DenseBase {
  static constexpr int kMixtureBlocks = sizeof(T) == 2 ? 2 : 1;  // two of 4-byte results would spill registers
  static constexpr int kTableBytes = 0, kSharedBytes = 0;
  const T* w;  // null: zero

  __device__ void fill(uint8_t*) const {}
  struct Lane {};
  __device__ Lane lane(const Walk&, int, int, int) const { return {}; }
  __device__ void fetch(uint8_t*, int, Lane&, int64_t, int) const {}
  __device__ void finish_fetch(uint8_t*, int, const Lane&) const {}
  struct Entries {
    alignas(16) T v[8];
  };
  __device__ Entries read(const uint8_t*, int, int, const Lane&, int, int, bool inside, int64_t e) const {
    Entries out = {};
    if (w && inside)
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(out) / 16); ++i)
        reinterpret_cast<uint4*>(out.v)[i] = __ldg(reinterpret_cast<const uint4*>(w + e) + i);
    return out;
  }
  __device__ void add(const Entries& entries, const uint8_t*, float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] += to_float(entries.v[i]);
  }
  template <int kColumns>
  __device__ void add_columns(int64_t e, const uint8_t*, float (&v)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) v[i] += at(e + i);
  }
  __device__ float at(int64_t e) const { return w ? to_float(w[e]) : 0.f; }
};

// How many thread blocks run at once on this device.
inline cudaError_t resident_blocks(int per_processor, int* count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  *count *= per_processor;
  return error;
}

}  // namespace moka::cuda
