// The mixture beside a few-token product: every component's share of y, by a kernel of its own.
//
// A component works on slices that need nothing of each other. With A first, slice ia computes the row
// v[jb] = alpha sum_ja A[ia, ja] X[ja, jb] and from it mb outputs y[ia, ib] = sum_jb B[ib, jb] v[jb]; with B first,
// slice ib computes v[ja] = alpha sum_jb B[ib, jb] X[ja, jb] and y[ia, ib] = sum_ja A[ia, ja] v[ja]. A thread block
// takes 16 slices for up to TG tokens, both halves on tensor cores in tf32, which holds 16-bit activations exactly.
#pragma once

#include <algorithm>

#include "cuda_common.cuh"

namespace moka::cuda {

constexpr int kMaxDecodeComponents = 16;
constexpr int kMixtureThreads = 256;
constexpr int kSlices = 16;  // per thread block

// Lets the next kernel of the stream start, and waits until the kernels before this one are complete; both do
// nothing unless the launch says so.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
// Fetches into the L2; both multiples of 16.
__device__ __forceinline__ void prefetch_l2(const void* p, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}

// One component: `first` [slices, terms] contracts x, `second` [rows, middle] what comes of it.
struct Half {
  int a_first, identity;  // identity: `first` is
  int slices, terms, middle, rows;
  int first_offset, second_offset;  // of the factors
  int x_term, x_middle;             // steps in x
  int y_slice, y_row;               // steps in y
  int first_block;
};

struct MixturePlan {
  int r, blocks;
  Half half[kMaxDecodeComponents];
};

// Floats between the slices of v: a multiple of 16, odd times that against bank conflicts.
__host__ __device__ constexpr int middle_stride(int middle) { return (middle + 15) / 16 * 16 | 16; }

// How many warps share one 8-column tile of v, each taking some of the terms.
__host__ __device__ constexpr int term_parts(int tiles) {
  return tiles < kMixtureThreads / 32 ? kMixtureThreads / 32 / tiles : 1;
}

inline MixturePlan plan_mixture(const KronParams& p) {
  MixturePlan plan;
  plan.r = static_cast<int>(p.r);
  plan.blocks = 0;
  for (int i = 0; i < plan.r; ++i) {
    const KronComponent& c = p.components[i];
    const int ma = static_cast<int>(c.ma), na = static_cast<int>(c.na), mb = static_cast<int>(c.mb);
    const int nb = static_cast<int>(c.nb), a = static_cast<int>(c.a_offset), b = static_cast<int>(c.b_offset);
    bool a_first = c.ma * c.nb * (c.na + c.mb) <= c.na * c.mb * (c.nb + c.ma);
    if (c.identity != Identity::kNone) a_first = c.identity == Identity::kA;
    const int identity = c.identity != Identity::kNone;
    plan.half[i] = a_first ? Half{1, identity, ma, na, nb, mb, a, b, nb, 1, mb, 1, plan.blocks}
                           : Half{0, identity, mb, nb, na, ma, b, a, 1, nb, 1, mb, plan.blocks};
    plan.blocks += static_cast<int>(ceil_div(plan.half[i].slices, kSlices));
  }
  return plan;
}

// Four consecutive factor entries.
__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
template <typename T>
__device__ __forceinline__ float4 load4(const T* p) {
  union {
    uint2 u;
    T t[4];
  } x;
  x.u = *reinterpret_cast<const uint2*>(p);
  return make_float4(to_float(x.t[0]), to_float(x.t[1]), to_float(x.t[2]), to_float(x.t[3]));
}

__device__ __forceinline__ uint32_t tf32(float v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}

// d += a b for 16 rows, 16 terms and 8 columns. A lane holds four neighbouring terms of rows g and g + 8 of a, and
// of column g of b; which terms those are, the product need not know.
__device__ __forceinline__ void mma_tf32(float (&d)[4], float4 low, float4 high, float4 b) {
  const auto step = [&](float a0, float a1, float a2, float a3, float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(tf32(a0)), "r"(tf32(a1)), "r"(tf32(a2)), "r"(tf32(a3)), "r"(tf32(b0)), "r"(tf32(b1)));
  };
  step(low.x, high.x, low.y, high.y, b.x, b.y);
  step(low.z, high.z, low.w, high.w, b.z, b.w);
}

__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The whole thread block copies `count` values, a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void copy_values(T* to, const T* from, int count) {
  constexpr int kVector = 16 / sizeof(T);
  for (int e = threadIdx.x * kVector; e < count; e += blockDim.x * kVector) copy_async(to + e, from + e);
}

// Where a thread block keeps what, in shared memory; bytes.
struct MixtureLayout {
  int second, x, middle, end;

  template <typename TF>
  static __host__ __device__ MixtureLayout of(const Half& h, int K, int TG) {
    const int parts = term_parts((h.middle + 7) / 8);
    MixtureLayout l;
    l.second = h.identity ? 0 : kSlices * h.terms * static_cast<int>(sizeof(TF));
    l.x = l.second + h.rows * h.middle * static_cast<int>(sizeof(TF));
    l.middle = l.x + TG * K * 2;
    l.end = l.middle + (parts > TG ? parts : TG) * kSlices * middle_stride(h.middle) * 4;
    return l;
  }
};

// shares [r, tokens, N]. blockIdx.x names a component and its slices, blockIdx.y the tokens.
template <typename T, typename TF, int TG>
__global__ void __launch_bounds__(kMixtureThreads)
    mixture_kernel(const T* x, int tokens, int K, int N, Factors<TF> f, const __grid_constant__ MixturePlan plan,
                   float* shares) {
  extern __shared__ __align__(16) uint8_t smem[];
  constexpr int kWarps = kMixtureThreads / 32;
  const int thread = threadIdx.x, warp = thread / 32, g = thread % 32 / 4, quad = thread % 4;
  int i = 0;
  while (i + 1 < plan.r && static_cast<int>(blockIdx.x) >= plan.half[i + 1].first_block) ++i;
  const Half h = plan.half[i];
  const MixtureLayout layout = MixtureLayout::of<TF>(h, K, TG);
  TF* const first = reinterpret_cast<TF*>(smem);                    // [kSlices, terms]
  TF* const second = reinterpret_cast<TF*>(smem + layout.second);   // [rows, middle]
  T* const xs = reinterpret_cast<T*>(smem + layout.x);              // [TG, K]
  float* const v = reinterpret_cast<float*>(smem + layout.middle);  // [parts or tokens, kSlices, stride]
  const int slice0 = (blockIdx.x - h.first_block) * kSlices, slices = min(kSlices, h.slices - slice0);
  const int token0 = blockIdx.y * TG, count = min(TG, tokens - token0);
  const int stride = middle_stride(h.middle), columns = (h.middle + 7) / 8, tiles = columns * count;
  const int parts = term_parts(tiles);
  const TF* first_from = (h.a_first ? f.A : f.B) + h.first_offset + static_cast<int64_t>(slice0) * h.terms;
  const TF* second_from = (h.a_first ? f.B : f.A) + h.second_offset;
  const int first_count = h.identity ? 0 : slices * h.terms, second_count = h.rows * h.middle;
  const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);

  // only caches may be touched before the kernels before this one are complete
  if (thread == 0) {
    if (!h.identity) prefetch_l2(first_from, first_count * static_cast<int>(sizeof(TF)));
    prefetch_l2(second_from, second_count * static_cast<int>(sizeof(TF)));
  }
  wait_for_previous();
  let_next_start();

  copy_values(first, first_from, first_count);
  copy_values(xs, x + static_cast<int64_t>(token0) * K, count * K);
  copy_values(second, second_from, second_count);
  const float alpha = f.alpha[i];
  wait_for_copies();
  __syncthreads();

  for (int item = warp; item < tiles * parts && !h.identity; item += kWarps) {
    const int part = item / tiles, tile = item % tiles, token = tile / columns, column = tile % columns * 8;
    const bool low = g < slices, high = g + 8 < slices, inside = column + g < h.middle;
    const T* from = xs + token * K + (column + g) * h.x_middle;
    float sum[4] = {};
#pragma unroll 4
    for (int term = part * 16 + quad * 4; term - quad * 4 < h.terms; term += parts * 16) {
      const bool here = term < h.terms;
      float4 a = zero, b = zero, c = zero;
      if (here && low) a = load4(first + g * h.terms + term);
      if (here && high) b = load4(first + (g + 8) * h.terms + term);
      if (here && inside) {
        const T* p = from + term * h.x_term;
        c = make_float4(to_float(p[0]), to_float(p[h.x_term]), to_float(p[2 * h.x_term]), to_float(p[3 * h.x_term]));
      }
      mma_tf32(sum, a, b, c);
    }
    float* to = v + ((part * count + token) * kSlices + g) * stride + column + quad * 2;
    to[0] = sum[0], to[1] = sum[1], to[8 * stride] = sum[2], to[8 * stride + 1] = sum[3];
  }
  __syncthreads();
  for (int row = warp; row < count * kSlices; row += kWarps) {  // a token's slice each
    const int slice = row % kSlices, token = row / kSlices;
    for (int column = thread % 32; column < stride; column += 32) {
      float sum = 0.f;
      if (column < h.middle && slice < slices) {
        if (h.identity)
          sum = to_float(xs[token * K + (slice0 + slice) * h.x_term + column * h.x_middle]);
        else
          for (int part = 0; part < parts; ++part) sum += v[(part * count * kSlices + row) * stride + column];
      }
      v[row * stride + column] = alpha * sum;
    }
  }
  __syncthreads();
  const int row_tiles = (h.rows + 15) / 16;
  for (int item = warp; item < 2 * row_tiles; item += kWarps) {
    const int row = item % row_tiles * 16 + g, column = item / row_tiles * 8;
    if (column >= slices) break;
    float sum[TG][4] = {};
#pragma unroll 2
    for (int term = quad * 4; term - quad * 4 < h.middle; term += 16) {
      float4 a = zero, b = zero;
      if (term < h.middle && row < h.rows) a = load4(second + row * h.middle + term);
      if (term < h.middle && row + 8 < h.rows) b = load4(second + (row + 8) * h.middle + term);
#pragma unroll
      for (int t = 0; t < TG; ++t)
        if (t < count)
          mma_tf32(sum[t], a, b, *reinterpret_cast<float4*>(v + (t * kSlices + column + g) * stride + term));
    }
    const int slice = column + quad * 2;
#pragma unroll
    for (int t = 0; t < TG; ++t) {
      if (t >= count) break;
      float* y = shares + (static_cast<int64_t>(i) * tokens + token0 + t) * N + slice0 * h.y_slice;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (slice + e % 2 < slices && row + e / 2 * 8 < h.rows)
          y[(slice + e % 2) * h.y_slice + (row + e / 2 * 8) * h.y_row] = sum[t][e];
    }
  }
}

// Bytes of shared memory for TG tokens at once.
template <typename TF>
int mixture_bytes(const MixturePlan& plan, int K, int TG) {
  int bytes = 0;
  for (int i = 0; i < plan.r; ++i) bytes = std::max(bytes, MixtureLayout::of<TF>(plan.half[i], K, TG).end);
  return bytes;
}

}  // namespace moka::cuda
