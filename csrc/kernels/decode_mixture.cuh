// The mixture beside a few-token product: how its two halves are laid out, and the kernel of the first half.
#pragma once

#include "cuda_common.cuh"

namespace moka::cuda {

constexpr int kMaxDecodeComponents = 16;
constexpr int kMaxUnits = 512;  // of four terms each, in one row of the mixture's second half
constexpr int kRowLanes = 16;   // lanes that share one row's second half

// One component's two halves. First the smaller intermediate, which lies in `middle` so that the second half
// contracts neighbouring entries:
//   a_first:  V [ma, nb] = alpha A X,      y[ia, ib] = sum_jb B[ib, jb] V[ia, jb]
//   else:     U [mb, na] = alpha B X^T,    y[ia, ib] = sum_ja A[ia, ja] U[ib, ja]
struct Half {
  int a_first;
  int offset;       // of the intermediate, per token
  int length;       // terms of the second half: nb or na
  int first_block;  // of stage 1
};

struct MixturePlan {
  int r, total, blocks;  // intermediate entries per token; thread blocks of stage 1 per token
  Component c[kMaxDecodeComponents];
  Half half[kMaxDecodeComponents];
};

constexpr int kStage1Threads = 256;
constexpr int kStage1Lanes = 8;  // lanes per sum over a row of B

// A first: threads per sum over ja, so that none adds more than about 64 terms.
__host__ __device__ inline int stage1_parts(int na) { return na > 128 ? 4 : na > 64 ? 2 : 1; }

inline MixturePlan plan_mixture(const KronParams& p) {
  MixturePlan plan;
  plan.r = static_cast<int>(p.r);
  plan.total = plan.blocks = 0;
  for (int i = 0; i < plan.r; ++i) {
    const KronComponent& c = p.components[i];
    const int ma = static_cast<int>(c.ma), na = static_cast<int>(c.na), mb = static_cast<int>(c.mb);
    const int nb = static_cast<int>(c.nb);
    plan.c[i] = {ma, na, mb, nb, c.identity, static_cast<int>(c.a_offset), static_cast<int>(c.b_offset), 0, 0};
    bool a_first = c.ma * c.nb * (c.na + c.mb) <= c.na * c.mb * (c.nb + c.ma);
    if (c.identity != Identity::kNone) a_first = c.identity == Identity::kA;
    const int count = a_first ? ma * nb : na * mb;
    const int per_block = a_first ? kStage1Threads / stage1_parts(na) : kStage1Threads / kStage1Lanes;
    plan.half[i] = {a_first, plan.total, a_first ? nb : na, plan.blocks};
    plan.total += count;
    plan.blocks += (count + per_block - 1) / per_block;
  }
  return plan;
}

// Four consecutive factor entries.
__device__ __forceinline__ float4 load4(const float* p) { return __ldg(reinterpret_cast<const float4*>(p)); }
template <typename T>
__device__ __forceinline__ float4 load4(const T* p) {
  union {
    uint2 u;
    T t[4];
  } x;
  x.u = __ldg(reinterpret_cast<const uint2*>(p));
  return make_float4(to_float(x.t[0]), to_float(x.t[1]), to_float(x.t[2]), to_float(x.t[3]));
}
__device__ __forceinline__ float dot4(float4 a, float4 b, float sum) {
  return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
}

// blockIdx.x names a component and some of its intermediate's entries, blockIdx.y the token.
template <typename T, typename TF>
__global__ void __launch_bounds__(kStage1Threads)
    mixture_stage1_kernel(const T* x, int K, Factors<TF> f, const __grid_constant__ MixturePlan plan, float* middle) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
  __shared__ float parts[kStage1Threads];
  int i = 0;
  while (i + 1 < plan.r && static_cast<int>(blockIdx.x) >= plan.half[i + 1].first_block) ++i;
  const Component s = plan.c[i];
  const Half half = plan.half[i];
  const int block = blockIdx.x - half.first_block, thread = threadIdx.x;
  x += static_cast<int64_t>(blockIdx.y) * K;
  middle += static_cast<int64_t>(blockIdx.y) * plan.total + half.offset;
  const float alpha = f.alpha[i];
  if (half.a_first) {
    const int count = stage1_parts(s.na), outputs = kStage1Threads / count;
    const unsigned o = block * outputs + thread % outputs, part = thread / outputs;
    const bool inside = o < static_cast<unsigned>(s.ma * s.nb);
    const unsigned ia = o / static_cast<unsigned>(s.nb), jb = o - ia * s.nb;
    float sum = 0.f;
    if (s.identity == Identity::kA) {
      if (inside && part == 0) sum = to_float(x[o]);
    } else if (inside) {
      const int step = (s.na + count - 1) / count, end = min(s.na, static_cast<int>(part + 1) * step);
      const TF* a = f.A + s.a_offset + ia * s.na;
#pragma unroll 16
      for (int ja = part * step; ja < end; ++ja)
        sum = fmaf(to_float(__ldg(a + ja)), to_float(__ldg(x + ja * s.nb + jb)), sum);
    }
    parts[thread] = sum;
    __syncthreads();
    if (part == 0 && inside) {
      for (int v = 1; v < count; ++v) sum += parts[v * outputs + thread];
      middle[o] = alpha * sum;
    }
  } else {
    const int lane = thread % kStage1Lanes;
    const unsigned o = block * (kStage1Threads / kStage1Lanes) + thread / kStage1Lanes;
    const bool inside = o < static_cast<unsigned>(s.mb * s.na);
    const unsigned ib = o / static_cast<unsigned>(s.na), ja = o - ib * s.na;
    float sum = 0.f;
    if (s.identity == Identity::kB) {
      if (inside && lane == 0) sum = to_float(__ldg(x + ja * s.nb + ib));
    } else if (inside) {
      const TF* b = f.B + s.b_offset + ib * s.nb;
#pragma unroll 8
      for (int jb = lane * 4; jb < s.nb; jb += kStage1Lanes * 4)
        sum = dot4(load4(b + jb), load4(x + ja * s.nb + jb), sum);
    }
#pragma unroll
    for (int offset = 1; offset < kStage1Lanes; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (lane == 0 && inside) middle[o] = alpha * sum;
  }
}

}  // namespace moka::cuda
