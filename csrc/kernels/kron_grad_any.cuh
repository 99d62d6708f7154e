// Contraction of G = dY^T X with the factors, for any shapes; see kron_grad_cuda.h.
//
// A warp's lanes are neighbouring columns of G, `across` of them, in 32 / across rows of a block of B (for dA), or in
// as many blocks (for dB). Components of one shape, of which a mixture often has two, read G together.
#pragma once

#include <algorithm>

#include "build_cuda.cuh"

namespace moka::cuda {

constexpr int kAnyContractThreads = 256;
constexpr int kAnyContractWarps = 4096;  // that a factor is divided among at least: what a Hopper GPU runs at once

// The power of two of lanes that side by side take nb columns, at most a warp.
__host__ __device__ inline int lanes_across(int nb) {
  int across = 1;
  while (across < nb && across < kLanes) across *= 2;
  return across;
}

// The terms of an entry of A, a block of G, are divided over ib; those of B, its blocks, over ia and ja: so many sums
// of each entry.
struct Split {
  int of_a, over_a, over_b;

  __host__ __device__ int of_b() const { return over_a * over_b; }
  __host__ __device__ Split(int ma, int na, int mb, int nb) {
    const auto parts = [](int warps) { return (kAnyContractWarps + warps - 1) / warps; };
    const auto at_most = [](int n, int limit) { return n < limit ? n : limit; };
    const int across = lanes_across(nb), wanted = parts(mb * ((nb + across - 1) / across));
    of_a = at_most(parts(ma * na), mb);
    over_a = at_most(wanted, ma);
    over_b = at_most((wanted + over_a - 1) / over_a, na);
  }
};

// Which components go together, and where the sums of each one's factors begin. The only sum of an entry is its
// gradient.
struct AnyContraction {
  int count;
  int8_t first[kMaxComponents], second[kMaxComponents];  // second: of the same shape, or first again
  int sums_a[kMaxComponents], sums_b[kMaxComponents], floats;

  explicit AnyContraction(const Components& comps) : count(0), floats(0) {
    bool taken[kMaxComponents] = {};
    for (int i = 0; i < comps.r; ++i) {
      const Component& a = comps.c[i];
      const Split split(a.ma, a.na, a.mb, a.nb);
      sums_a[i] = floats;
      sums_b[i] = floats += split.of_a > 1 ? split.of_a * a.ma * a.na : 0;
      floats += split.of_b() > 1 ? split.of_b() * a.mb * a.nb : 0;
      if (taken[i]) continue;
      int other = i;
      for (int j = i + 1; j < comps.r && other == i; ++j) {
        const Component& b = comps.c[j];
        const bool same = a.ma == b.ma && a.na == b.na && a.mb == b.mb && a.nb == b.nb && a.identity == b.identity;
        if (same && !taken[j]) other = j;
      }
      taken[other] = true;
      first[count] = static_cast<int8_t>(i);
      second[count++] = static_cast<int8_t>(other);
    }
  }
};

// The first of so many terms that a part has.
__device__ __forceinline__ int border(int size, int part, int parts) {
  return static_cast<int>(int64_t{size} * part / parts);
}

// A sum of many terms by one thread, as exact as that of few: what a sum loses is added to the next term (Kahan).
struct Sum {
  float value = 0.f, lost = 0.f;

  __device__ __forceinline__ void add(float a, float b = 1.f) {
    const float term = fmaf(a, b, -lost), sum = value + term;
    lost = (sum - value) - term;
    value = sum;
  }
};

// Over the lanes that are a multiple of `step` apart.
__device__ __forceinline__ float lane_sum(float v, int step = 1) {
  for (int offset = step; offset < kLanes; offset *= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

// sums: of each component that has several, [Split::of_a, ma, na].
template <typename TF>
__global__ void __launch_bounds__(kAnyContractThreads, 4)
    contract_a_kernel(const float* G, Factors<TF> f, const __grid_constant__ Components comps,
                      const __grid_constant__ AnyContraction plan, int K, float* sums, float* raw_A) {
  const int i = plan.first[blockIdx.y], j = plan.second[blockIdx.y];
  const Component& s = comps.c[i];
  if (s.identity == Identity::kA) return;
  const int parts = Split(s.ma, s.na, s.mb, s.nb).of_a, entries = s.ma * s.na, units = entries * parts;
  const int lane = threadIdx.x % kLanes, across = lanes_across(s.nb), down = kLanes / across;
  const TF *b0 = f.B + s.b_offset, *b1 = f.B + comps.c[j].b_offset;
  const int warps = gridDim.x * (kAnyContractThreads / kLanes);
  for (int u = blockIdx.x * (kAnyContractThreads / kLanes) + threadIdx.x / kLanes; u < units; u += warps) {
    const int e = u / parts, part = u - e * parts, ia = e / s.na, ja = e - ia * s.na;
    const int begin = border(s.mb, part, parts), end = border(s.mb, part + 1, parts);
    const float* g = G + static_cast<int64_t>(ia) * s.mb * K + ja * s.nb;
    Sum sum0, sum1;
    for (int jb = lane % across; jb < s.nb; jb += across)
#pragma unroll 4
      for (int ib = begin + lane / across; ib < end; ib += down) {
        const float v = __ldg(g + static_cast<int64_t>(ib) * K + jb);
        const int at = ib * s.nb + jb;
        const bool identity = s.identity == Identity::kB;
        sum0.add(identity ? float(ib == jb) : to_float(b0[at]), v);
        sum1.add(identity ? float(ib == jb) : to_float(b1[at]), v);
      }
    const float total0 = lane_sum(sum0.value), total1 = lane_sum(sum1.value);
    if (lane > 0) continue;
    const auto put = [&](int component, float total) {
      (parts > 1 ? sums + plan.sums_a[component] + part * entries : raw_A + comps.c[component].a_offset)[e] = total;
    };
    put(i, total0);
    if (j != i) put(j, total1);
  }
}

// sums: of each component that has several, [Split::of_b, mb, nb].
template <typename TF>
__global__ void __launch_bounds__(kAnyContractThreads, 4)
    contract_b_kernel(const float* G, Factors<TF> f, const __grid_constant__ Components comps,
                      const __grid_constant__ AnyContraction plan, int K, float* sums, float* raw_B) {
  const int i = plan.first[blockIdx.y], j = plan.second[blockIdx.y];
  const Component& s = comps.c[i];
  if (s.identity == Identity::kB) return;
  const Split split(s.ma, s.na, s.mb, s.nb);
  const int parts = split.of_b(), lane = threadIdx.x % kLanes, across = lanes_across(s.nb), down = kLanes / across;
  const int chunks = (s.nb + across - 1) / across, units = s.mb * chunks * parts;
  const TF *a0 = f.A + s.a_offset, *a1 = f.A + comps.c[j].a_offset;
  const int warps = gridDim.x * (kAnyContractThreads / kLanes);
  for (int u = blockIdx.x * (kAnyContractThreads / kLanes) + threadIdx.x / kLanes; u < units; u += warps) {
    const int part = u % parts, ib = u / parts / chunks, chunk = u / parts % chunks;
    const int pa = part / split.over_b, pb = part % split.over_b, jb = chunk * across + lane % across;
    const int ia_begin = border(s.ma, pa, split.over_a), ia_end = border(s.ma, pa + 1, split.over_a);
    const int ja_begin = border(s.na, pb, split.over_b), ja_end = border(s.na, pb + 1, split.over_b);
    Sum sum0, sum1;
    for (int ia = ia_begin; ia < ia_end && jb < s.nb; ++ia) {
      const float* g = G + (static_cast<int64_t>(ia) * s.mb + ib) * K + jb;
#pragma unroll 4
      for (int ja = ja_begin + lane / across; ja < ja_end; ja += down) {
        const float v = __ldg(g + ja * s.nb);
        const int at = ia * s.na + ja;
        const bool identity = s.identity == Identity::kA;
        sum0.add(identity ? float(ia == ja) : to_float(a0[at]), v);
        sum1.add(identity ? float(ia == ja) : to_float(a1[at]), v);
      }
    }
    const float total0 = lane_sum(sum0.value, across), total1 = lane_sum(sum1.value, across);
    if (lane >= across || jb >= s.nb) continue;
    const auto put = [&](int component, float total) {
      float* to = parts > 1 ? sums + plan.sums_b[component] + part * s.mb * s.nb : raw_B + comps.c[component].b_offset;
      to[ib * s.nb + jb] = total;
    };
    put(i, total0);
    if (j != i) put(j, total1);
  }
}

// The factors with several sums of an entry: these, added in their order. Grid: entries, components, sides.
__global__ void __launch_bounds__(kAnyContractThreads)
    contract_sums_kernel(const float* sums, const __grid_constant__ Components comps,
                         const __grid_constant__ AnyContraction plan, float* raw_A, float* raw_B) {
  const Component& s = comps.c[blockIdx.y];
  const Split split(s.ma, s.na, s.mb, s.nb);
  const bool side_a = blockIdx.z == 0;
  const int e = blockIdx.x * kAnyContractThreads + threadIdx.x, entries = side_a ? s.ma * s.na : s.mb * s.nb;
  const int parts = side_a ? split.of_a : split.of_b();
  if (s.identity == (side_a ? Identity::kA : Identity::kB) || parts == 1 || e >= entries) return;
  const float* from = sums + (side_a ? plan.sums_a : plan.sums_b)[blockIdx.y] + e;
  Sum sum;
#pragma unroll 8
  for (int part = 0; part < parts; ++part) sum.add(__ldg(from + part * entries));
  (side_a ? raw_A + s.a_offset : raw_B + s.b_offset)[e] = sum.value;
}

inline int64_t any_scratch(const KronParams& p) {
  return p.r > kMaxComponents ? 0 : AnyContraction(by_value(p)).floats;
}

template <typename TF>
cudaError_t contract_any(const float* G, const Factors<TF>& f, const KronParams& p, float* scratch, float* raw_A,
                         float* raw_B, cudaStream_t stream) {
  if (p.r > kMaxComponents) return cudaErrorInvalidValue;
  const Components comps = by_value(p);
  const AnyContraction plan(comps);
  const int K = static_cast<int>(p.K);
  int warps_a = 1, warps_b = 1, to_add = 0;  // the most that a component needs, and entries with several sums
  for (int i = 0; i < comps.r; ++i) {
    const Component& c = comps.c[i];
    const Split split(c.ma, c.na, c.mb, c.nb);
    const int across = lanes_across(c.nb);
    warps_a = std::max(warps_a, c.ma * c.na * split.of_a);
    warps_b = std::max(warps_b, c.mb * ((c.nb + across - 1) / across) * split.of_b());
    if (split.of_a > 1) to_add = std::max(to_add, c.ma * c.na);
    if (split.of_b() > 1) to_add = std::max(to_add, c.mb * c.nb);
  }
  const auto grid = [&](int warps) {
    const int64_t blocks = ceil_div(warps, kAnyContractThreads / kLanes);
    return dim3(static_cast<unsigned>(blocks < 65536 ? blocks : 65536), static_cast<unsigned>(plan.count));
  };
  contract_a_kernel<TF><<<grid(warps_a), kAnyContractThreads, 0, stream>>>(G, f, comps, plan, K, scratch, raw_A);
  contract_b_kernel<TF><<<grid(warps_b), kAnyContractThreads, 0, stream>>>(G, f, comps, plan, K, scratch, raw_B);
  if (to_add) {
    const dim3 all(static_cast<unsigned>(ceil_div(to_add, kAnyContractThreads)), static_cast<unsigned>(comps.r), 2);
    contract_sums_kernel<<<all, kAnyContractThreads, 0, stream>>>(scratch, comps, plan, raw_A, raw_B);
  }
  return cudaGetLastError();
}

}  // namespace moka::cuda
