// The kernels behind build_cuda.h, included by one source file per kind of base.
#pragma once

#include "build_cuda.h"
#include "cuda_common.cuh"

namespace moka::cuda {

constexpr int kBuildThreads = 256;
constexpr int kLanes = 32;

// A base yields eight neighbouring entries (fast) or one (generic) of W in fp32.
struct Nf4Base {
  Nf4Params w;
  int block_shift;  // log2 of the blocksize; fast kernels only

  static constexpr int kTable = 16 * kLanes;  // the code book, once per bank

  __device__ void fill(float* table) const {
    for (int i = threadIdx.x; i < kTable; i += blockDim.x) table[i] = kNf4[i / kLanes];
  }
  __device__ void load8(int64_t e, const float* table, float (&v)[8]) const {
    const uint32_t codes = *reinterpret_cast<const uint32_t*>(w.packed + e / 2);
    const float scale = block_scale(w, e >> block_shift);
    const float* mine = table + threadIdx.x % kLanes;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int shift = i / 2 * 8 + (i % 2 ? 0 : 4);
      v[i] = __fmul_rn(mine[(codes >> shift & 15) * kLanes], scale);
    }
  }
  __device__ float at(int64_t e) const {
    const int byte = w.packed[e / 2];
    return __fmul_rn(kNf4[e % 2 ? byte & 15 : byte >> 4], block_scale(w, e / w.blocksize));
  }
};

template <typename T>
struct DenseBase {
  const T* w;  // null: zero
  static constexpr int kTable = 1;

  __device__ void fill(float*) const {}
  __device__ void load8(int64_t e, const float*, float (&v)[8]) const {
    if (w) {
      moka::cuda::load8(w + e, v);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = 0.f;
    }
  }
  __device__ float at(int64_t e) const { return w ? to_float(w[e]) : 0.f; }
};

// W without a mixture, eight entries per step.
template <typename T, class Base>
__global__ void __launch_bounds__(kBuildThreads) copy_kernel(Base base, int64_t numel, T* out) {
  __shared__ float table[Base::kTable];
  base.fill(table);
  __syncthreads();
  const int64_t e0 = (static_cast<int64_t>(blockIdx.x) * kBuildThreads * 4 + threadIdx.x) * 8;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t e = e0 + i * kBuildThreads * 8;
    if (e < numel) {
      float v[8];
      base.load8(e, table, v);
      store8(out + e, v);
    }
  }
}

// Periodic shapes. Rows n and n + period_n share every ib, columns k and k + period_k every jb, so a thread that
// owns one row phase and eight column phases keeps its entries of alpha_i B_i in registers for the whole kernel and
// loads only R entries of the A_i for each eight weights.
template <typename T, typename TF, int R, class Base>
__global__ void __launch_bounds__(kBuildThreads, R > 4 ? 2 : 3)
    build_kernel(Base base, Factors<TF> f, const __grid_constant__ Components comps, int N, int K, int period_n,
                 int period_k, int macro_rows, T* out) {
  __shared__ float table[Base::kTable];
  base.fill(table);
  __syncthreads();
  const int lane = threadIdx.x % kLanes;
  const int groups = period_k / (8 * kLanes);
  int warp = blockIdx.x * (kBuildThreads / kLanes) + threadIdx.x / kLanes;
  const int q = (warp % groups * kLanes + lane) * 8;
  warp /= groups;
  const int p = warp % period_n, I0 = warp / period_n * macro_rows;

  float b[R][8];
  int a_at[R];
#pragma unroll
  for (int i = 0; i < R; ++i) {
#pragma unroll
    for (int c = 0; c < 8; ++c) b[i][c] = 0.f;
    a_at[i] = 0;
    if (i < comps.r) {
      const Component& s = comps.c[i];
      const int ib = p % s.mb, jb = q % s.nb;
      const float alpha = f.alpha[i];
#pragma unroll
      for (int c = 0; c < 8; ++c)
        b[i][c] = alpha * (s.identity == Identity::kB ? float(ib == jb + c)
                                                      : to_float(f.B[s.b_offset + ib * s.nb + jb + c]));
      a_at[i] = s.a_offset + p / s.mb * s.na + q / s.nb;
    }
  }
  const int I1 = min(I0 + macro_rows, N / period_n);
  for (int I = I0; I < I1; ++I) {
    const int64_t row = static_cast<int64_t>(I * period_n + p) * K + q;
#pragma unroll 2
    for (int J = 0; J < K / period_k; ++J) {
      const int64_t e = row + J * period_k;
      float v[8], sum[8] = {};
      base.load8(e, table, v);
#pragma unroll
      for (int i = 0; i < R; ++i) {
        if (i < comps.r) {
          const Component& s = comps.c[i];
          float a;
          if (s.identity == Identity::kA) {
            a = float((I * period_n + p) / s.mb == (J * period_k + q) / s.nb);
          } else {
            a = to_float(f.A[a_at[i] + I * s.a_row_step + J * s.a_column_step]);
          }
#pragma unroll
          for (int c = 0; c < 8; ++c) sum[c] = fmaf(a, b[i][c], sum[c]);
        }
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) v[c] += sum[c];
      store8(out + e, v);
    }
  }
}

// Any shape, any alignment: one entry per thread.
template <typename T, typename TF, class Base>
__global__ void __launch_bounds__(kBuildThreads)
    build_generic_kernel(Base base, Factors<TF> f, const __grid_constant__ Components comps, int64_t numel, int K,
                         T* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBuildThreads;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kBuildThreads + threadIdx.x; e < numel; e += step) {
    const int n = static_cast<int>(e / K), k = static_cast<int>(e % K);
    float sum = 0.f;
    for (int i = 0; i < comps.r; ++i) {
      const Component& s = comps.c[i];
      const int ia = n / s.mb, ib = n % s.mb, ja = k / s.nb, jb = k % s.nb;
      const float a = s.identity == Identity::kA ? float(ia == ja) : to_float(f.A[s.a_offset + ia * s.na + ja]);
      const float b = s.identity == Identity::kB ? float(ib == jb) : to_float(f.B[s.b_offset + ib * s.nb + jb]);
      sum += f.alpha[i] * b * a;
    }
    out[e] = from_acc<T>(base.at(e) + sum);
  }
}

// Periods of the shapes, and whether the periodic kernel takes them.
struct Periods {
  int n = 1, k = 8 * kLanes;
  bool ok = true;

  explicit Periods(const KronParams& p) {
    for (int64_t i = 0; i < p.r; ++i) {
      n = lcm(n, p.components[i].mb);
      k = lcm(k, p.components[i].nb);
      ok = ok && p.components[i].nb % 8 == 0;
    }
    ok = ok && p.N % n == 0 && p.K % k == 0;
  }
  static int lcm(int64_t a, int64_t b) {
    int64_t x = a, y = b;
    while (y) {
      const int64_t t = x % y;
      x = y;
      y = t;
    }
    const int64_t m = a / x * b;
    return m > 1 << 20 ? 1 << 20 : static_cast<int>(m);  // larger periods divide nothing here
  }
};

inline Components by_value(const KronParams& p, int period_n = 0, int period_k = 0) {
  Components out;
  out.r = static_cast<int>(p.r);
  for (int i = 0; i < out.r; ++i) {
    const KronComponent& c = p.components[i];
    const int ma = static_cast<int>(c.ma), na = static_cast<int>(c.na), mb = static_cast<int>(c.mb);
    const int nb = static_cast<int>(c.nb);
    out.c[i] = {ma, na, mb, nb, c.identity, static_cast<int>(c.a_offset), static_cast<int>(c.b_offset),
                period_n / mb * na, period_k / nb};
  }
  return out;
}

template <typename T, typename TF, class Base>
cudaError_t build(Base base, bool vector_base, int64_t N, int64_t K, const MixtureArgs& mix, T* out,
                  cudaStream_t stream) {
  const int64_t numel = N * K;
  if (numel == 0) return cudaSuccess;
  if (mix.shapes.r > kMaxComponents) return cudaErrorInvalidValue;
  const Periods period(mix.shapes);
  const Components comps = by_value(mix.shapes, period.n, period.k);
  const Factors<TF> f = {static_cast<const TF*>(mix.A), static_cast<const TF*>(mix.B), mix.alpha};
  const bool vector = vector_base && numel % 8 == 0 && aligned(out, 16);
  if (vector && comps.r == 0) {
    const int64_t blocks = ceil_div(numel, kBuildThreads * 32);
    copy_kernel<T, Base><<<static_cast<unsigned>(blocks), kBuildThreads, 0, stream>>>(base, numel, out);
    return cudaGetLastError();
  }
  if (vector && period.ok && comps.r <= 10) {
    const int macros = static_cast<int>(N / period.n), warps = period.n * (period.k / (8 * kLanes));
    // long walks amortize the registers' loading, many warps hide latency: about 4096 warps do both
    int macro_rows = static_cast<int>(static_cast<int64_t>(macros) * warps / 4096);
    macro_rows = macro_rows < 1 ? 1 : macro_rows > macros ? macros : macro_rows;
    while (macros % macro_rows) --macro_rows;
    const int64_t total = static_cast<int64_t>(warps) * (macros / macro_rows);
    constexpr int kWarps = kBuildThreads / kLanes;
    if (total % kWarps == 0) {
      auto* kernel = comps.r <= 4 ? build_kernel<T, TF, 4, Base> : build_kernel<T, TF, 10, Base>;
      kernel<<<static_cast<unsigned>(total / kWarps), kBuildThreads, 0, stream>>>(
          base, f, comps, static_cast<int>(N), static_cast<int>(K), period.n, period.k, macro_rows, out);
      return cudaGetLastError();
    }
  }
  const int64_t blocks = ceil_div(numel, kBuildThreads);
  build_generic_kernel<T, TF, Base>
      <<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kBuildThreads, 0, stream>>>(
          base, f, comps, numel, static_cast<int>(K), out);
  return cudaGetLastError();
}

}  // namespace moka::cuda
