// Contraction of G = dY^T X with the factors, for any shapes; see kron_grad_cuda.h.
//
// A warp's lanes are neighbouring columns of G, `across` of them, in 32 / across rows of a block of B (for dA), or in
// as many blocks (for dB). Components of one shape, of which a mixture often has two, read G together.
#pragma once

#include "build_cuda.cuh"

namespace moka::cuda {

constexpr int kAnyContractThreads = 256;
constexpr int kAnyContractWarps = 4096;  // that dB is divided among at least: what a Hopper GPU runs at once

// The power of two of lanes that side by side take nb columns, at most a warp.
__host__ __device__ inline int lanes_across(int nb) {
  int across = 1;
  while (across < nb && across < kLanes) across *= 2;
  return across;
}

// dB's terms, the blocks of G, are divided over ia and ja: so many sums of each entry.
struct Split {
  int over_a, over_b;

  __host__ __device__ int count() const { return over_a * over_b; }
  __host__ __device__ Split(int ma, int na, int mb, int nb) {
    const int across = lanes_across(nb), warps = mb * ((nb + across - 1) / across);
    const int wanted = (kAnyContractWarps + warps - 1) / warps;
    over_a = wanted < ma ? wanted : ma;
    const int rest = (wanted + over_a - 1) / over_a;
    over_b = rest < na ? rest : na;
  }
};

// Which components go together, and where the sums of each one's dB begin.
struct AnyContraction {
  int count;
  int8_t first[kMaxComponents], second[kMaxComponents];  // second: of the same shape, or first again
  int sums[kMaxComponents + 1];

  explicit AnyContraction(const Components& comps) : count(0) {
    bool taken[kMaxComponents] = {};
    sums[0] = 0;
    for (int i = 0; i < comps.r; ++i) {
      const Component& a = comps.c[i];
      sums[i + 1] = sums[i] + Split(a.ma, a.na, a.mb, a.nb).count() * a.mb * a.nb;
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

// A sum of many terms by one thread, as exact as that of few: what a sum loses is added to the next term (Kahan).
struct Sum {
  float value = 0.f, lost = 0.f;

  __device__ __forceinline__ void add(float a, float b = 1.f) {
    const float term = fmaf(a, b, -lost), sum = value + term;
    lost = (sum - value) - term;
    value = sum;
  }
};

template <typename TF>
__global__ void __launch_bounds__(kAnyContractThreads, 4)
    contract_a_kernel(const float* G, Factors<TF> f, const __grid_constant__ Components comps,
                      const __grid_constant__ AnyContraction plan, int K, float* raw_A) {
  const int i = plan.first[blockIdx.y], j = plan.second[blockIdx.y];
  const Component& s = comps.c[i];
  if (s.identity == Identity::kA) return;
  const int lane = threadIdx.x % kLanes, across = lanes_across(s.nb), down = kLanes / across;
  const TF *b0 = f.B + s.b_offset, *b1 = f.B + comps.c[j].b_offset;
  const int warps = gridDim.x * (kAnyContractThreads / kLanes);
  for (int e = blockIdx.x * (kAnyContractThreads / kLanes) + threadIdx.x / kLanes; e < s.ma * s.na; e += warps) {
    const int ia = e / s.na, ja = e - ia * s.na;
    const float* g = G + static_cast<int64_t>(ia) * s.mb * K + ja * s.nb;
    Sum sums[2];
    for (int jb = lane % across; jb < s.nb; jb += across)
#pragma unroll 4
      for (int ib = lane / across; ib < s.mb; ib += down) {
        const float v = __ldg(g + static_cast<int64_t>(ib) * K + jb);
        const int at = ib * s.nb + jb;
        const bool identity = s.identity == Identity::kB;
        sums[0].add(identity ? float(ib == jb) : to_float(b0[at]), v);
        sums[1].add(identity ? float(ib == jb) : to_float(b1[at]), v);
      }
    float sum0 = sums[0].value, sum1 = sums[1].value;
#pragma unroll
    for (int offset = kLanes / 2; offset; offset /= 2) {
      sum0 += __shfl_xor_sync(~0u, sum0, offset);
      sum1 += __shfl_xor_sync(~0u, sum1, offset);
    }
    if (lane > 0) continue;
    raw_A[s.a_offset + e] = sum0;
    if (j != i) raw_A[comps.c[j].a_offset + e] = sum1;
  }
}

// parts: of each component [split, mb, nb]
template <typename TF>
__global__ void __launch_bounds__(kAnyContractThreads, 4)
    contract_b_kernel(const float* G, Factors<TF> f, const __grid_constant__ Components comps,
                      const __grid_constant__ AnyContraction plan, int K, float* parts) {
  const int i = plan.first[blockIdx.y], j = plan.second[blockIdx.y];
  const Component& s = comps.c[i];
  if (s.identity == Identity::kB) return;
  const Split split(s.ma, s.na, s.mb, s.nb);
  const int lane = threadIdx.x % kLanes, across = lanes_across(s.nb), down = kLanes / across;
  const int chunks = (s.nb + across - 1) / across, units = s.mb * chunks * split.count();
  const TF *a0 = f.A + s.a_offset, *a1 = f.A + comps.c[j].a_offset;
  const int warps = gridDim.x * (kAnyContractThreads / kLanes);
  for (int u = blockIdx.x * (kAnyContractThreads / kLanes) + threadIdx.x / kLanes; u < units; u += warps) {
    const int part = u % split.count(), ib = u / split.count() / chunks, chunk = u / split.count() % chunks;
    const int pa = part / split.over_b, pb = part % split.over_b, jb = chunk * across + lane % across;
    const auto border = [](int size, int part, int parts) { return static_cast<int>(int64_t{size} * part / parts); };
    const int ia_begin = border(s.ma, pa, split.over_a), ia_end = border(s.ma, pa + 1, split.over_a);
    const int ja_begin = border(s.na, pb, split.over_b), ja_end = border(s.na, pb + 1, split.over_b);
    Sum sums[2];
    for (int ia = ia_begin; ia < ia_end && jb < s.nb; ++ia) {
      const float* g = G + (static_cast<int64_t>(ia) * s.mb + ib) * K + jb;
#pragma unroll 4
      for (int ja = ja_begin + lane / across; ja < ja_end; ja += down) {
        const float v = __ldg(g + ja * s.nb);
        const int at = ia * s.na + ja;
        const bool identity = s.identity == Identity::kA;
        sums[0].add(identity ? float(ia == ja) : to_float(a0[at]), v);
        sums[1].add(identity ? float(ia == ja) : to_float(a1[at]), v);
      }
    }
    float sum0 = sums[0].value, sum1 = sums[1].value;
    for (int offset = across; offset < kLanes; offset *= 2) {
      sum0 += __shfl_xor_sync(~0u, sum0, offset);
      sum1 += __shfl_xor_sync(~0u, sum1, offset);
    }
    if (lane >= across || jb >= s.nb) continue;
    float* to = parts + (part * s.mb + ib) * s.nb + jb;
    to[plan.sums[i]] = sum0;
    if (j != i) to[plan.sums[j]] = sum1;
  }
}

// raw_B: the parts of each entry, added in their order.
__global__ void __launch_bounds__(kAnyContractThreads)
    contract_b_sum_kernel(const float* parts, const __grid_constant__ Components comps,
                          const __grid_constant__ AnyContraction plan, float* raw_B) {
  const Component& s = comps.c[blockIdx.y];
  const int e = blockIdx.x * kAnyContractThreads + threadIdx.x, entries = s.mb * s.nb;
  if (s.identity == Identity::kB || e >= entries) return;
  const float *from = parts + plan.sums[blockIdx.y] + e, *end = parts + plan.sums[blockIdx.y + 1];
  Sum sum;
#pragma unroll 8
  for (; from < end; from += entries) sum.add(__ldg(from));
  raw_B[s.b_offset + e] = sum.value;
}

inline int64_t any_scratch(const KronParams& p) {
  return p.r > kMaxComponents ? 0 : AnyContraction(by_value(p)).sums[p.r];
}

template <typename TF>
cudaError_t contract_any(const float* G, const Factors<TF>& f, const KronParams& p, float* scratch, float* raw_A,
                         float* raw_B, cudaStream_t stream) {
  if (p.r > kMaxComponents) return cudaErrorInvalidValue;
  constexpr int kWarpsEach = kAnyContractThreads / kLanes;
  const Components comps = by_value(p);
  const AnyContraction plan(comps);
  const int K = static_cast<int>(p.K);
  int most_a = 1, most_b = 1, most_units = 1;  // entries of an A and of a B, and warps' worth of sums of a B
  for (int i = 0; i < comps.r; ++i) {
    const Component& c = comps.c[i];
    const int across = lanes_across(c.nb);
    const int units = c.mb * ((c.nb + across - 1) / across) * Split(c.ma, c.na, c.mb, c.nb).count();
    most_a = c.ma * c.na > most_a ? c.ma * c.na : most_a;
    most_b = c.mb * c.nb > most_b ? c.mb * c.nb : most_b;
    most_units = units > most_units ? units : most_units;
  }
  const auto grid = [](int work, int each, int count) {
    const int64_t blocks = ceil_div(work, each);
    return dim3(static_cast<unsigned>(blocks < 65536 ? blocks : 65536), static_cast<unsigned>(count));
  };
  contract_a_kernel<TF>
      <<<grid(most_a, kWarpsEach, plan.count), kAnyContractThreads, 0, stream>>>(G, f, comps, plan, K, raw_A);
  contract_b_kernel<TF>
      <<<grid(most_units, kWarpsEach, plan.count), kAnyContractThreads, 0, stream>>>(G, f, comps, plan, K, scratch);
  const dim3 all(static_cast<unsigned>(ceil_div(most_b, kAnyContractThreads)), static_cast<unsigned>(comps.r));
  contract_b_sum_kernel<<<all, kAnyContractThreads, 0, stream>>>(scratch, comps, plan, raw_B);
  return cudaGetLastError();
}

}  // namespace moka::cuda
