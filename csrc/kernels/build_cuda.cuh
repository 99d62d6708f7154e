// The kernels behind build_cuda.h, included by one source file per kind of base.
#pragma once

#include "build_cuda.h"
#include "cuda_common.cuh"

namespace moka::cuda {

constexpr int kBuildThreads = 256;
constexpr int kLanes = 32;

constexpr int kStageSteps = 16;  // steps of 256 columns that build_kernel stages at a time

// A base yields W in fp32: eight neighbouring entries straight from memory, or from what a thread block of
// build_kernel staged in shared memory, or one entry.
struct Nf4Base {
  Nf4Params w;
  int block_shift, block2_shift;  // log2 of the blocksizes; fast kernels only

  // copy_kernel: the code book, once per bank. Loads are apart from decoding, so that they can run ahead.
  static constexpr int kSmallTable = 16 * kLanes;
  struct Raw {
    uint32_t codes;
    float scale;
  };
  __device__ void fill_small(float* table) const {
    for (int i = threadIdx.x; i < kSmallTable; i += blockDim.x) table[i] = kNf4[i / kLanes];
  }
  __device__ float scale(int64_t block) const {
    if (w.absmax) return __ldg(w.absmax + block);
    const float v = __ldg(w.code2 + __ldg(w.absmax_q + block));
    return __fadd_rn(__fmul_rn(v, __ldg(w.absmax2 + (block >> block2_shift))), __ldg(w.offset));
  }
  __device__ Raw load(int64_t e) const {
    return {__ldg(reinterpret_cast<const uint32_t*>(w.packed) + e / 8), scale(e >> block_shift)};
  }
  __device__ void decode(const Raw& raw, const float* table, float (&v)[8]) const {
    const float* mine = table + threadIdx.x % kLanes;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int shift = i / 2 * 8 + (i % 2 ? 0 : 4);
      v[i] = __fmul_rn(mine[(raw.codes >> shift & 15) * kLanes], raw.scale);
    }
  }

  // build_kernel: pairs of decoded values per byte in 16 copies (no bank conflicts), then two stages, each of codes
  // [8 rows][steps][128 bytes] and scales [8 rows][steps][kScales].
  static constexpr int kCopies = 16;
  static constexpr int kTableBytes = 256 * kCopies * 8;
  static constexpr int kScales = 8;  // per 256 columns; blocks of 32 or more
  static constexpr int kStageBytes = 8 * kStageSteps * (128 + kScales * 4);
  __device__ void fill(uint8_t* smem) const {
    for (int byte = threadIdx.x; byte < 256; byte += blockDim.x) {
      const float high = kNf4[byte >> 4], low = kNf4[byte & 15];
#pragma unroll
      for (int j = 0; j < kCopies / 2; ++j)  // rotated by thread, against bank conflicts
        reinterpret_cast<float4*>(smem)[byte * (kCopies / 2) + (j + byte) % (kCopies / 2)] =
            make_float4(high, low, high, low);
    }
  }
  // Starts copying `steps` steps of eight rows K apart, the first at entry e, steps `pitch` columns apart.
  __device__ void stage(uint8_t* smem, int buffer, int64_t e, int64_t K, int steps, int pitch) const {
    uint8_t* codes = smem + kTableBytes + buffer * kStageBytes;
    float* scales = reinterpret_cast<float*>(codes + 8 * kStageSteps * 128);
    for (int u = threadIdx.x; u < 8 * 8 * steps; u += kBuildThreads) {
      const int row = u / (8 * steps), step = u / 8 % steps, unit = u % 8;
      const uint8_t* src = w.packed + (e + row * K + static_cast<int64_t>(step) * pitch) / 2 + unit * 16;
      const uint32_t dst =
          static_cast<uint32_t>(__cvta_generic_to_shared(codes + (row * kStageSteps + step) * 128 + unit * 16));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    const int per_step = 256 >> block_shift > 0 ? 256 >> block_shift : 1;
    for (int u = threadIdx.x; u < 8 * steps * per_step; u += kBuildThreads) {
      const int row = u / (steps * per_step), step = u / per_step % steps, i = u % per_step;
      const int64_t at = e + row * K + static_cast<int64_t>(step) * pitch + (static_cast<int64_t>(i) << block_shift);
      scales[(row * kStageSteps + step) * kScales + i] = scale(at >> block_shift);
    }
  }
  __device__ void staged(const uint8_t* smem, int buffer, int row, int step, int64_t, float (&v)[8]) const {
    const int lane = threadIdx.x % kLanes;
    const uint8_t* stage = smem + kTableBytes + buffer * kStageBytes;
    const uint32_t codes = reinterpret_cast<const uint32_t*>(stage + (row * kStageSteps + step) * 128)[lane];
    const float scale = reinterpret_cast<const float*>(
        stage + 8 * kStageSteps * 128)[(row * kStageSteps + step) * kScales + (lane * 8 >> block_shift)];
    const float2* table = reinterpret_cast<const float2*>(smem) + lane % kCopies;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = table[(codes >> 8 * i & 255) * kCopies];
      v[2 * i] = __fmul_rn(pair.x, scale);
      v[2 * i + 1] = __fmul_rn(pair.y, scale);
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
  static constexpr int kSmallTable = 1, kTableBytes = 0, kStageBytes = 0;

  struct Raw {
    float v[8];
  };
  __device__ void fill_small(float*) const {}
  __device__ Raw load(int64_t e) const {
    Raw raw = {};
    if (w) load8(w + e, raw.v);
    return raw;
  }
  __device__ void decode(const Raw& raw, const float*, float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = raw.v[i];
  }
  __device__ void fill(uint8_t*) const {}
  __device__ void stage(uint8_t*, int, int64_t, int64_t, int, int) const {
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  __device__ void staged(const uint8_t*, int, int, int, int64_t e, float (&v)[8]) const { decode(load(e), nullptr, v); }
  __device__ float at(int64_t e) const { return w ? to_float(w[e]) : 0.f; }
};

// W without a mixture, eight entries per step.
template <typename T, class Base>
__global__ void __launch_bounds__(kBuildThreads) copy_kernel(Base base, int64_t numel, T* out) {
  __shared__ float table[Base::kSmallTable];
  base.fill_small(table);
  __syncthreads();
  const int64_t e0 = (static_cast<int64_t>(blockIdx.x) * kBuildThreads * 4 + threadIdx.x) * 8;
  typename Base::Raw raw[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (e0 + i * kBuildThreads * 8 < numel) raw[i] = base.load(e0 + i * kBuildThreads * 8);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t e = e0 + i * kBuildThreads * 8;
    if (e < numel) {
      float v[8];
      base.decode(raw[i], table, v);
      store8(out + e, v);
    }
  }
}

constexpr int kMaxSlice = 2048;  // entries in one row of every A_i together

// Periodic shapes. Rows n and n + period_n share every ib, columns k and k + period_k every jb, so a thread that
// owns one row phase and eight column phases keeps its entries of alpha_i B_i in registers for the whole kernel. A
// thread block owns eight neighbouring row phases, which share one row of every A_i: it keeps those rows in shared
// memory, and a thread reads R numbers from there for each eight weights. The next weights are staged meanwhile.
template <typename T, typename TF, int R, bool kIdentity, class Base>
__global__ void __launch_bounds__(kBuildThreads, 2)
    build_kernel(Base base, Factors<TF> f, const __grid_constant__ Components comps, int N, int K, int period_n,
                 int period_k, int macro_rows, T* out) {
  extern __shared__ __align__(16) uint8_t smem[];
  float* slices = reinterpret_cast<float*>(smem + Base::kTableBytes + 2 * Base::kStageBytes);
  base.fill(smem);
  const unsigned lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const unsigned groups = period_k / (8 * kLanes), octets = period_n / 8;
  const unsigned q0 = blockIdx.x % groups * 8 * kLanes, q = q0 + lane * 8;
  const unsigned p0 = blockIdx.x / groups % octets * 8, p = p0 + warp;
  const int I0 = blockIdx.x / groups / octets * macro_rows, I1 = min(I0 + macro_rows, N / period_n);
  const int steps = K / period_k, stages = (steps + kStageSteps - 1) / kStageSteps;

  // Stage number s of this block: macro row I0 + s / stages, steps from s % stages * kStageSteps.
  auto stage = [&](int s) {
    const int I = I0 + s / stages, J = s % stages * kStageSteps;
    const int64_t e = static_cast<int64_t>(I * period_n + p0) * K + J * period_k + q0;
    base.stage(smem, s % 2, e, K, min(kStageSteps, steps - J), period_k);
    if (s % stages) return;
    float* slice = slices + s / stages % 2 * kMaxSlice;
    for (int i = 0; i < comps.r; ++i) {
      const Component& c = comps.c[i];
      const unsigned ia = (I * period_n + p0) / static_cast<unsigned>(c.mb);
      for (int ja = threadIdx.x; ja < c.na; ja += kBuildThreads)
        slice[ja] = c.identity == Identity::kA ? float(static_cast<int>(ia) == ja)
                                               : to_float(__ldg(f.A + c.a_offset + ia * c.na + ja));
      slice += c.na;
    }
  };
  stage(0);

  // Components beyond r repeat component 0 with B = 0, so that no branch keeps loads from running ahead.
  float b[R][8];
  int a_at[R];  // in a slice
  int slice_at = 0;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const Component& s = comps.c[i];
    const unsigned ib = p % static_cast<unsigned>(s.mb), ja = q / static_cast<unsigned>(s.nb), jb = q - ja * s.nb;
    const float alpha = i < comps.r ? f.alpha[i] : 0.f;
    if (kIdentity && s.identity == Identity::kB) {
#pragma unroll
      for (int c = 0; c < 8; ++c) b[i][c] = float(ib == jb + c);
    } else {
      load8(f.B + s.b_offset + ib * s.nb + jb, b[i]);
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) b[i][c] = i < comps.r ? alpha * b[i][c] : 0.f;
    a_at[i] = (i < comps.r ? slice_at : 0) + ja;
    slice_at += s.na;
  }
  const int total = (I1 - I0) * stages;
  for (int s = 0; s < total; ++s) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();  // stage s is there, and nobody reads stage s - 1 any more
    if (s + 1 < total) stage(s + 1);
    const int I = I0 + s / stages, J0 = s % stages * kStageSteps, J1 = min(J0 + kStageSteps, steps);
    const float* slice = slices + s / stages % 2 * kMaxSlice;
    const int64_t row = static_cast<int64_t>(I * period_n + p) * K + q;
    if (J0 == 0 && s > 0)
#pragma unroll
      for (int i = 0; i < R; ++i) a_at[i] -= steps * comps.c[i].a_column_step;
#pragma unroll 1
    for (int J = J0; J < J1; ++J) {
      const int64_t e = row + J * period_k;
      float v[8], sum[8];
#pragma unroll
      for (int i = 0; i < R; ++i) {
        const float a = slice[a_at[i]];
        a_at[i] += comps.c[i].a_column_step;
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[c] = i ? fmaf(a, b[i][c], sum[c]) : a * b[i][c];
      }
      base.staged(smem, s % 2, warp, J - J0, e, v);
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
    out.c[i] = {ma,
                na,
                mb,
                nb,
                c.identity,
                static_cast<int>(c.a_offset),
                static_cast<int>(c.b_offset),
                period_n / mb * na,
                period_k / nb};
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
  if (vector && period.ok && aligned(mix.B, 16) && period.slice <= kMaxSlice && comps.r <= 10) {
    const int macros = static_cast<int>(N / period.n);
    const int64_t warps = int64_t{period.n} * (period.k / (8 * kLanes));
    // as many warps as run at once (16 on each of 132 multiprocessors): long walks amortize what precedes them
    int64_t macro_rows = macros * warps / 2048;
    macro_rows = macro_rows < 1 ? 1 : macro_rows > macros ? macros : macro_rows;
    const int64_t blocks = warps / 8 * ceil_div(macros, macro_rows);
    auto* kernel = has_identity(mix.shapes) ? build_kernel<T, TF, 10, true, Base>
                   : comps.r <= 4           ? build_kernel<T, TF, 4, false, Base>
                                            : build_kernel<T, TF, 10, false, Base>;
    constexpr int kBytes = Base::kTableBytes + 2 * Base::kStageBytes + 2 * kMaxSlice * 4;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
    kernel<<<static_cast<unsigned>(blocks), kBuildThreads, kBytes, stream>>>(base, f, comps, static_cast<int>(N),
                                                                             static_cast<int>(K), period.n, period.k,
                                                                             static_cast<int>(macro_rows), out);
    return cudaGetLastError();
  }
  const int64_t blocks = ceil_div(numel, kBuildThreads);
  build_generic_kernel<T, TF, Base>
      <<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kBuildThreads, 0, stream>>>(base, f, comps, numel,
                                                                                             static_cast<int>(K), out);
  return cudaGetLastError();
}

}  // namespace moka::cuda
