// Contraction of G = dY^T X with the factors; see kron_grad_cuda.h. All sums have a fixed order.
#include "kron_grad_any.cuh"
#include "kron_grad_cuda.h"

namespace moka::cuda {
namespace {

constexpr int kTileColumns = 16;
constexpr int kContractThreads = 128;
constexpr int kContractR = 10;  // components per pass over G

// The periodic kernel's view of a mixture: it walks G in macro-tiles of one period each. A warp owns a tile of 16 x 16
// phases, a lane one row and eight columns of it. Across the walk every dB entry of a lane stays in a register; a
// tile lies inside one (ia, ja) of every component (or, with 8-row tiles, half of it does), so each step also
// yields one dA contribution per component.
struct ContractPlan {
  bool ok;
  int period_n, period_k, tile_rows, splits;
  int64_t part_floats, tile_floats;

  explicit ContractPlan(const KronParams& p) {
    const Periods period(p);
    period_n = Periods::lcm(period.n, 16);
    period_k = 1;
    ok = p.r <= kContractR && period.ok && p.N % period_n == 0;
    tile_rows = 16;
    for (int64_t i = 0; i < p.r; ++i) {
      period_k = Periods::lcm(period_k, p.components[i].nb);
      ok = ok && p.components[i].nb % kTileColumns == 0 && p.components[i].mb % 8 == 0;
      if (p.components[i].mb % 16) tile_rows = 8;
    }
    ok = ok && p.K % period_k == 0;
    if (!ok) return;
    const int64_t warps = int64_t{period_n} / 16 * (period_k / kTileColumns);
    const int64_t macros = p.N / period_n * (p.K / period_k);
    splits = static_cast<int>(ceil_div(1056, warps));  // 8 warps on each of 132 multiprocessors
    if (splits > macros) splits = static_cast<int>(macros);
    part_floats = int64_t{splits} * p.r * period_n * period_k;
    tile_floats = p.r * (p.N / tile_rows) * (p.K / kTileColumns);
  }
};

template <typename TF, bool kIdentity>
__global__ void __launch_bounds__(kContractThreads, 2)
    contract_kernel(const float* G, Factors<TF> f, const __grid_constant__ Components comps, int N, int K, int period_n,
                    int period_k, int tile_rows, int splits, float* part, float* tiles) {
  const int lane = threadIdx.x % kLanes;
  const int tiles_k = period_k / kTileColumns, tiles_n = period_n / 16;
  int warp = blockIdx.x * (kContractThreads / kLanes) + threadIdx.x / kLanes;
  const int tk = warp % tiles_k, tn = warp / tiles_k % tiles_n, split = warp / tiles_k / tiles_n;
  if (split >= splits) return;
  const int p = tn * 16 + lane / 2, q = tk * kTileColumns + lane % 2 * 8;

  // components beyond r repeat component 0 with B = 0, so that no branch keeps loads from running ahead
  float b[kContractR][8], acc[kContractR][8];
  int a_at[kContractR];
#pragma unroll
  for (int i = 0; i < kContractR; ++i) {
    const Component& s = comps.c[i];
    a_at[i] = s.a_offset + p / s.mb * s.na + q / s.nb;
    const int ib = p % s.mb, jb = q % s.nb;
    load_b8<kIdentity>(f, s, ib, jb, b[i]);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      acc[i][c] = 0.f;
      if (i >= comps.r) b[i][c] = 0.f;
    }
  }

  const int macros_k = K / period_k;
  const int64_t macros = static_cast<int64_t>(N / period_n) * macros_k;
  const int64_t begin = macros * split / splits, end = macros * (split + 1) / splits;
  float next[8];
  load8(G + (begin / macros_k * period_n + p) * K + begin % macros_k * period_k + q, next);
  for (int64_t m = begin; m < end; ++m) {
    const int I = static_cast<int>(m / macros_k), J = static_cast<int>(m % macros_k);
    const int n = I * period_n + p, k = J * period_k + q;
    float g[8], a[kContractR], dot[kContractR];
#pragma unroll
    for (int c = 0; c < 8; ++c) g[c] = next[c];
    const int64_t ahead = m + 1 < end ? m + 1 : m;
    load8(G + (ahead / macros_k * period_n + p) * K + ahead % macros_k * period_k + q, next);
#pragma unroll
    for (int i = 0; i < kContractR; ++i) {
      const Component& s = comps.c[i];
      a[i] = kIdentity && s.identity == Identity::kA
                 ? float(n / s.mb == k / s.nb)
                 : to_float(__ldg(f.A + a_at[i] + I * s.a_row_step + J * s.a_column_step));
    }
#pragma unroll
    for (int i = 0; i < kContractR; ++i) {
      dot[i] = 0.f;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        dot[i] = fmaf(b[i][c], g[c], dot[i]);
        acc[i][c] = fmaf(a[i], g[c], acc[i][c]);
      }
    }
#pragma unroll
    for (int offset = 1; offset < 16; offset *= 2)
#pragma unroll
      for (int i = 0; i < kContractR; ++i) dot[i] += __shfl_xor_sync(~0u, dot[i], offset);
    if (tile_rows == 16)
#pragma unroll
      for (int i = 0; i < kContractR; ++i) dot[i] += __shfl_xor_sync(~0u, dot[i], 16);
    if (lane % (2 * tile_rows) == 0) {
      float* t = tiles + static_cast<int64_t>(n / tile_rows) * (K / kTileColumns) + k / kTileColumns;
      const int64_t stride = static_cast<int64_t>(N / tile_rows) * (K / kTileColumns);
#pragma unroll
      for (int i = 0; i < kContractR; ++i)
        if (i < comps.r) t[i * stride] = dot[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kContractR; ++i)
    if (i < comps.r) store8(part + ((static_cast<int64_t>(split) * comps.r + i) * period_n + p) * period_k + q, acc[i]);
}

constexpr int kSumLanes = 8;  // lanes per output of contract_sum_kernel

// Adds what contract_kernel left: blockIdx.y is the component, blockIdx.z 0 for A and 1 for B.
__global__ void contract_sum_kernel(const __grid_constant__ Components comps, int N, int K, int period_n, int period_k,
                                    int tile_rows, int splits, const float* part, const float* tiles, float* raw_A,
                                    float* raw_B) {
  const int i = blockIdx.y, lane = threadIdx.x % kSumLanes;
  const int e = (blockIdx.x * blockDim.x + threadIdx.x) / kSumLanes;
  const Component& s = comps.c[i];
  const bool side_a = blockIdx.z == 0;
  if (s.identity == (side_a ? Identity::kA : Identity::kB)) return;
  const int count = side_a ? s.ma * s.na : s.mb * s.nb;
  float sum = 0.f;
  if (e < count) {
    const int width = side_a ? K / kTileColumns : period_k;
    const unsigned rows = side_a ? s.mb / tile_rows : period_n / s.mb,
                   columns = side_a ? s.nb / kTileColumns : period_k / s.nb;
    // term (split, u, v): neighbouring tiles for A, periodic images for B
    const int row0 = side_a ? e / s.na * rows : e / s.nb, column0 = side_a ? e % s.na * columns : e % s.nb;
    const int row_step = side_a ? 1 : s.mb, column_step = side_a ? 1 : s.nb;
    const int64_t slab = side_a ? 0 : static_cast<int64_t>(comps.r) * period_n * period_k;
    const float* from = side_a ? tiles + static_cast<int64_t>(i) * (N / tile_rows) * width
                               : part + static_cast<int64_t>(i) * period_n * period_k;
    const unsigned terms = rows * columns * (side_a ? 1 : splits);
#pragma unroll 8
    for (unsigned t = lane; t < terms; t += kSumLanes) {
      const unsigned v = t % columns, u = t / columns % rows, z = t / columns / rows;
      sum += __ldg(from + z * slab + static_cast<int64_t>(row0 + static_cast<int>(u) * row_step) * width + column0 +
                   static_cast<int>(v) * column_step);
    }
  }
#pragma unroll
  for (int offset = 1; offset < kSumLanes; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (lane == 0 && e < count) (side_a ? raw_A + s.a_offset : raw_B + s.b_offset)[e] = sum;
}

constexpr int kFinishThreads = 1024;

// One thread block per component.
template <typename TF>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const float* raw_A, const float* raw_B, Factors<TF> f, const __grid_constant__ Components comps,
                  TF* grad_A, TF* grad_B, float* grad_alpha) {
  const Component& s = comps.c[blockIdx.x];
  const float alpha = f.alpha[blockIdx.x];
  const bool dot_on_b = s.identity == Identity::kA;
  float dot = 0;
  if (s.identity != Identity::kA) {
#pragma unroll 4
    for (int e = threadIdx.x; e < s.ma * s.na; e += kFinishThreads) {
      const float v = __ldg(raw_A + s.a_offset + e);
      if (grad_A) grad_A[s.a_offset + e] = from_acc<TF>(alpha * v);
      dot += v * to_float(__ldg(f.A + s.a_offset + e));
    }
  }
  if (s.identity != Identity::kB) {
#pragma unroll 4
    for (int e = threadIdx.x; e < s.mb * s.nb; e += kFinishThreads) {
      const float v = __ldg(raw_B + s.b_offset + e);
      if (grad_B) grad_B[s.b_offset + e] = from_acc<TF>(alpha * v);
      if (dot_on_b) dot += v * to_float(f.B[s.b_offset + e]);
    }
  }
  if (!grad_alpha) return;
  __shared__ float sums[kFinishThreads / kLanes];
#pragma unroll
  for (int offset = kLanes / 2; offset; offset /= 2) dot += __shfl_xor_sync(~0u, dot, offset);
  if (threadIdx.x % kLanes == 0) sums[threadIdx.x / kLanes] = dot;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (float v : sums) total += v;
    grad_alpha[blockIdx.x] = total;
  }
}

int largest_factor(const KronParams& p) {
  int64_t most = 1;
  for (int64_t i = 0; i < p.r; ++i) {
    const KronComponent& c = p.components[i];
    most = c.ma * c.na > most ? c.ma * c.na : most;
    most = c.mb * c.nb > most ? c.mb * c.nb : most;
  }
  return static_cast<int>(most);
}

template <typename TF>
Factors<TF> factors(const MixtureArgs& mix) {
  return {static_cast<const TF*>(mix.A), static_cast<const TF*>(mix.B), mix.alpha};
}

template <typename TF>
cudaError_t contract(const float* G, const MixtureArgs& mix, float* scratch, float* raw_A, float* raw_B,
                     cudaStream_t stream) {
  const KronParams& p = mix.shapes;
  const ContractPlan plan(p);
  const Components comps = by_value(p, plan.period_n, plan.period_k, kContractR);
  const int N = static_cast<int>(p.N), K = static_cast<int>(p.K);
  const unsigned r = static_cast<unsigned>(p.r);
  if (plan.ok && aligned(G, 16) && aligned(mix.B, 16)) {
    float *part = scratch, *tiles = scratch + plan.part_floats;
    const int64_t warps = int64_t{plan.period_n} / 16 * (plan.period_k / kTileColumns) * plan.splits;
    auto* kernel = has_identity(p) ? contract_kernel<TF, true> : contract_kernel<TF, false>;
    kernel<<<static_cast<unsigned>(ceil_div(warps, kContractThreads / kLanes)), kContractThreads, 0, stream>>>(
        G, factors<TF>(mix), comps, N, K, plan.period_n, plan.period_k, plan.tile_rows, plan.splits, part, tiles);
    const dim3 grid(static_cast<unsigned>(ceil_div(int64_t{largest_factor(p)} * kSumLanes, 128)), r, 2);
    contract_sum_kernel<<<grid, 128, 0, stream>>>(comps, N, K, plan.period_n, plan.period_k, plan.tile_rows,
                                                  plan.splits, part, tiles, raw_A, raw_B);
    return cudaGetLastError();
  }
  return contract_any(G, factors<TF>(mix), p, scratch, raw_A, raw_B, stream);
}

template <typename TF>
cudaError_t finish(const float* raw_A, const float* raw_B, const MixtureArgs& mix, void* grad_A, void* grad_B,
                   float* grad_alpha, cudaStream_t stream) {
  finish_kernel<TF><<<static_cast<unsigned>(mix.shapes.r), kFinishThreads, 0, stream>>>(
      raw_A, raw_B, factors<TF>(mix), by_value(mix.shapes), static_cast<TF*>(grad_A), static_cast<TF*>(grad_B),
      grad_alpha);
  return cudaGetLastError();
}

}  // namespace

int64_t contract_scratch(const KronParams& mixture) {
  const ContractPlan plan(mixture);
  const int64_t any = any_scratch(mixture), periodic = plan.ok ? plan.part_floats + plan.tile_floats : 0;
  return any > periodic ? any : periodic;  // G and B decide by their alignment which is taken
}

cudaError_t launch_contract(const float* G, const MixtureArgs& mix, float* scratch, float* raw_A, float* raw_B,
                            cudaStream_t stream) {
  switch (mix.factor_dtype) {
    case Dtype::kF16:
      return contract<__half>(G, mix, scratch, raw_A, raw_B, stream);
    case Dtype::kBF16:
      return contract<__nv_bfloat16>(G, mix, scratch, raw_A, raw_B, stream);
    default:
      return contract<float>(G, mix, scratch, raw_A, raw_B, stream);
  }
}

cudaError_t launch_finish_grads(const float* raw_A, const float* raw_B, const MixtureArgs& mix, void* grad_A,
                                void* grad_B, float* grad_alpha, cudaStream_t stream) {
  switch (mix.factor_dtype) {
    case Dtype::kF16:
      return finish<__half>(raw_A, raw_B, mix, grad_A, grad_B, grad_alpha, stream);
    case Dtype::kBF16:
      return finish<__nv_bfloat16>(raw_A, raw_B, mix, grad_A, grad_B, grad_alpha, stream);
    default:
      return finish<float>(raw_A, raw_B, mix, grad_A, grad_B, grad_alpha, stream);
  }
}

}  // namespace moka::cuda
