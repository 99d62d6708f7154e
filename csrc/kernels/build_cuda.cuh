// The kernels behind build_cuda.h, included by one source file per kind of base.
#pragma once

#include "build_cuda.h"
#include "cuda_common.cuh"

namespace moka::cuda {

constexpr int kBuildThreads = 256;
constexpr int kLanes = 32;

// A base yields W in fp32: eight neighbouring entries in two steps, so that the first (loads only) can run ahead
// of the second, or one entry. Loads go through the read-only cache, past earlier stores.
struct Nf4Base {
  Nf4Params w;
  int block_shift, block2_shift;  // log2 of the blocksizes; fast kernels only

  static constexpr int kCopies = 16;  // of the table of decoded bytes: no bank conflicts
  static constexpr int kTable = 2 * 256 * kCopies + 256;  // and code2

  struct Raw {
    uint32_t codes;
    float absmax;  // or absmax2
    int q;
  };

  __device__ void fill(float* table) const {
    for (int byte = threadIdx.x; byte < 256; byte += blockDim.x) {
      const float high = kNf4[byte >> 4], low = kNf4[byte & 15];
#pragma unroll
      for (int j = 0; j < kCopies / 2; ++j)  // rotated by thread, against bank conflicts
        reinterpret_cast<float4*>(table)[byte * (kCopies / 2) + (j + byte) % (kCopies / 2)] =
            make_float4(high, low, high, low);
      if (!w.absmax) table[2 * 256 * kCopies + byte] = __ldg(w.code2 + byte);
    }
  }
  __device__ Raw load(int64_t e) const {
    const uint32_t codes = __ldg(reinterpret_cast<const uint32_t*>(w.packed) + e / 8);
    const int64_t block = e >> block_shift;
    if (w.absmax) return {codes, __ldg(w.absmax + block), 0};
    return {codes, __ldg(w.absmax2 + (block >> block2_shift)), __ldg(w.absmax_q + block)};
  }
  __device__ void decode(const Raw& raw, const float* table, float offset, float (&v)[8]) const {
    const float scale =
        w.absmax ? raw.absmax : __fadd_rn(__fmul_rn(table[2 * 256 * kCopies + raw.q], raw.absmax), offset);
    const float2* mine = reinterpret_cast<const float2*>(table) + threadIdx.x % kCopies;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = mine[(raw.codes >> 8 * i & 255) * kCopies];
      v[2 * i] = __fmul_rn(pair.x, scale);
      v[2 * i + 1] = __fmul_rn(pair.y, scale);
    }
  }
  __device__ float offset() const { return w.absmax ? 0.f : __ldg(w.offset); }
  __device__ float at(int64_t e) const {
    const int byte = w.packed[e / 2];
    return __fmul_rn(kNf4[e % 2 ? byte & 15 : byte >> 4], block_scale(w, e / w.blocksize));
  }
};

template <typename T>
struct DenseBase {
  const T* w;  // null: zero
  static constexpr int kTable = 1;

  struct Raw {
    uint4 bits[sizeof(T) / 2];
  };

  __device__ void fill(float*) const {}
  __device__ Raw load(int64_t e) const {
    Raw raw = {};
    if (w) {
#pragma unroll
      for (size_t i = 0; i < sizeof(T) / 2; ++i) raw.bits[i] = __ldg(reinterpret_cast<const uint4*>(w + e) + i);
    }
    return raw;
  }
  __device__ void decode(const Raw& raw, const float*, float, float (&v)[8]) const {
    const T* t = reinterpret_cast<const T*>(raw.bits);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = to_float(t[i]);
  }
  __device__ float offset() const { return 0.f; }
  __device__ float at(int64_t e) const { return w ? to_float(w[e]) : 0.f; }
};

// W without a mixture, eight entries per step.
template <typename T, class Base>
__global__ void __launch_bounds__(kBuildThreads) copy_kernel(Base base, int64_t numel, T* out) {
  __shared__ __align__(16) float table[Base::kTable];
  base.fill(table);
  __syncthreads();
  const int64_t e0 = (static_cast<int64_t>(blockIdx.x) * kBuildThreads * 4 + threadIdx.x) * 8;
  const float offset = base.offset();
  typename Base::Raw raw[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (e0 + i * kBuildThreads * 8 < numel) raw[i] = base.load(e0 + i * kBuildThreads * 8);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t e = e0 + i * kBuildThreads * 8;
    if (e < numel) {
      float v[8];
      base.decode(raw[i], table, offset, v);
      store8(out + e, v);
    }
  }
}

constexpr int kMaxSlice = 2048;  // entries in one row of every A_i together

// Periodic shapes. Rows n and n + period_n share every ib, columns k and k + period_k every jb, so a thread that
// owns one row phase and eight column phases keeps its entries of alpha_i B_i in registers for the whole kernel. A
// thread block owns eight neighbouring row phases, which share one row of every A_i: it keeps those rows in shared
// memory, and a thread reads R numbers from there for each eight weights.
template <typename T, typename TF, int R, class Base>
__global__ void __launch_bounds__(kBuildThreads, 2)
    build_kernel(Base base, Factors<TF> f, const __grid_constant__ Components comps, int N, int K, int period_n,
                 int period_k, int macro_rows, T* out) {
  __shared__ __align__(16) float table[Base::kTable];
  __shared__ float slice[kMaxSlice];
  base.fill(table);
  const unsigned lane = threadIdx.x % kLanes, groups = period_k / (8 * kLanes), octets = period_n / 8;
  const unsigned q = (blockIdx.x % groups * kLanes + lane) * 8, p0 = blockIdx.x / groups % octets * 8;
  const unsigned p = p0 + threadIdx.x / kLanes;
  const int I0 = blockIdx.x / groups / octets * macro_rows, I1 = min(I0 + macro_rows, N / period_n);

  // Components beyond r repeat component 0 with B = 0, so that no branch keeps loads from running ahead.
  float b[R][8];
  int a_at[R];  // in `slice`
  int slice_at = 0;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const Component& s = comps.c[i];
    const unsigned ib = p % static_cast<unsigned>(s.mb), ja = q / static_cast<unsigned>(s.nb), jb = q - ja * s.nb;
    const float alpha = i < comps.r ? f.alpha[i] : 0.f;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      b[i][c] = 0.f;
      if (i < comps.r)
        b[i][c] = alpha * (s.identity == Identity::kB ? float(ib == jb + c)
                                                      : to_float(f.B[s.b_offset + ib * s.nb + jb + c]));
    }
    a_at[i] = (i < comps.r ? slice_at : 0) + ja;
    slice_at += s.na;
  }
  const float offset = base.offset();
  const int steps = K / period_k;
  for (int I = I0; I < I1; ++I) {
    __syncthreads();
    for (int i = 0, at = 0; i < comps.r; at += comps.c[i].na, ++i) {
      const Component& s = comps.c[i];
      const unsigned ia = (I * period_n + p0) / static_cast<unsigned>(s.mb);
      for (int ja = threadIdx.x; ja < s.na; ja += kBuildThreads)
        slice[at + ja] = s.identity == Identity::kA ? float(static_cast<int>(ia) == ja)
                                                    : to_float(__ldg(f.A + s.a_offset + ia * s.na + ja));
    }
    __syncthreads();
    const int64_t row = static_cast<int64_t>(I * period_n + p) * K + q;
    typename Base::Raw next = base.load(row);
#pragma unroll 1
    for (int J = 0; J < steps; ++J) {
      const int64_t e = row + J * period_k;
      const typename Base::Raw raw = next;
      next = base.load(J + 1 < steps ? e + period_k : e);
      float v[8], sum[8];
#pragma unroll
      for (int i = 0; i < R; ++i) {
        const float a = slice[a_at[i] + J * comps.c[i].a_column_step];
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[c] = i ? fmaf(a, b[i][c], sum[c]) : a * b[i][c];
      }
      base.decode(raw, table, offset, v);
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
  int n = 8, k = 8 * kLanes;
  int64_t slice = 0;  // entries in one row of every A_i
  bool ok = true;

  explicit Periods(const KronParams& p) {
    for (int64_t i = 0; i < p.r; ++i) {
      n = lcm(n, p.components[i].mb);
      k = lcm(k, p.components[i].nb);
      ok = ok && p.components[i].nb % 8 == 0 && p.components[i].mb % 8 == 0;
      slice += p.components[i].na;
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

// Slots beyond r, up to `pad`, repeat component 0.
inline Components by_value(const KronParams& p, int period_n = 0, int period_k = 0, int pad = 0) {
  Components out;
  out.r = static_cast<int>(p.r);
  for (int i = 0; i < out.r; ++i) {
    const KronComponent& c = p.components[i];
    const int ma = static_cast<int>(c.ma), na = static_cast<int>(c.na), mb = static_cast<int>(c.mb);
    const int nb = static_cast<int>(c.nb);
    out.c[i] = {ma, na, mb, nb, c.identity, static_cast<int>(c.a_offset), static_cast<int>(c.b_offset),
                period_n / mb * na, period_k / nb};
  }
  for (int i = out.r; out.r && i < pad; ++i) out.c[i] = out.c[0];
  return out;
}

inline bool has_identity(const KronParams& p) {
  for (int64_t i = 0; i < p.r; ++i)
    if (p.components[i].identity != Identity::kNone) return true;
  return false;
}

template <typename T, typename TF, class Base>
cudaError_t build(Base base, bool vector_base, int64_t N, int64_t K, const MixtureArgs& mix, T* out,
                  cudaStream_t stream) {
  const int64_t numel = N * K;
  if (numel == 0) return cudaSuccess;
  if (mix.shapes.r > kMaxComponents) return cudaErrorInvalidValue;
  const Periods period(mix.shapes);
  const Components comps = by_value(mix.shapes, period.n, period.k, 10);
  const Factors<TF> f = {static_cast<const TF*>(mix.A), static_cast<const TF*>(mix.B), mix.alpha};
  const bool vector = vector_base && numel % 8 == 0 && aligned(out, 16);
  if (vector && comps.r == 0) {
    const int64_t blocks = ceil_div(numel, kBuildThreads * 32);
    copy_kernel<T, Base><<<static_cast<unsigned>(blocks), kBuildThreads, 0, stream>>>(base, numel, out);
    return cudaGetLastError();
  }
  if (vector && period.ok && period.slice <= kMaxSlice && comps.r <= 10) {
    const int macros = static_cast<int>(N / period.n);
    const int64_t warps = int64_t{period.n} * (period.k / (8 * kLanes));
    // as many warps as run at once (16 on each of 132 multiprocessors): long walks amortize what precedes them
    int64_t macro_rows = macros * warps / 2048;
    macro_rows = macro_rows < 1 ? 1 : macro_rows > macros ? macros : macro_rows;
    const int64_t blocks = warps / 8 * ceil_div(macros, macro_rows);
    auto* kernel = comps.r <= 4 ? build_kernel<T, TF, 4, Base> : build_kernel<T, TF, 10, Base>;
    kernel<<<static_cast<unsigned>(blocks), kBuildThreads, 0, stream>>>(
        base, f, comps, static_cast<int>(N), static_cast<int>(K), period.n, period.k, static_cast<int>(macro_rows),
        out);
    return cudaGetLastError();
  }
  const int64_t blocks = ceil_div(numel, kBuildThreads);
  build_generic_kernel<T, TF, Base>
      <<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kBuildThreads, 0, stream>>>(
          base, f, comps, numel, static_cast<int>(K), out);
  return cudaGetLastError();
}

}  // namespace moka::cuda
