// Adds the slabs of the Hopper gradient kernel and finishes the gradients; see kron_grad_cuda.h. Sums have a fixed
// order.
#include <cooperative_groups.h>

#include "cuda_common.cuh"
#include "kron_grad_cuda.h"

namespace moka::cuda {
namespace {

constexpr int kCluster = kFinishDots;  // thread blocks of a component
constexpr int kColumns = 256;          // threads side by side, four entries each
constexpr int kWays = 4;               // threads that share the slabs of an entry
constexpr int kBatch = 8;              // slabs that a thread reads at a time
constexpr int kWarp = 32;

struct SlabComponent {
  int component, cta_begin, cta_count;
  int a, b, a_offset, b_offset;  // entries of A and B, and where they begin
  int a_at, b_at;                // the same in a slab
};

struct SlabComponents {
  SlabComponent c[2 * kMaxGradGroups];
};

template <typename TF>
__global__ void __launch_bounds__(kColumns* kWays, 1)
    finish_slabs_kernel(const float* partial, int64_t slab, const __grid_constant__ SlabComponents p, Factors<TF> f,
                        float* dots, TF* grad_A, TF* grad_B, float* grad_alpha) {
#if __CUDA_ARCH__ >= 900
  const SlabComponent& s = p.c[blockIdx.x / kCluster];
  const int rank = blockIdx.x % kCluster, column = threadIdx.x % kColumns, way = threadIdx.x / kColumns;
  const int entries = s.a + s.b;
  __shared__ float4 sums[kWays][kColumns];
  __shared__ float warp_dots[kColumns / kWarp];
  const float alpha = __ldg(f.alpha + s.component);
  for (int e = (rank * kColumns + column) * 4; e < s.a && way == 0; e += kCluster * kColumns * 4)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(f.A + s.a_offset + e));
  wait_for_previous();  // the slabs are there

  float dot = 0.f;
  for (int e0 = rank * kColumns * 4; e0 < entries; e0 += kCluster * kColumns * 4) {
    const int e = e0 + column * 4;
    const bool side_a = e < s.a;
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    if (e < entries) {
      const float* from = partial + s.cta_begin * slab + (side_a ? s.a_at + e : s.b_at + e - s.a);
      for (int c0 = way; c0 < s.cta_count; c0 += kWays * kBatch) {
        float4 v[kBatch];  // beyond the last slab its numbers again, unused, so that no branch keeps loads apart
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          v[i] = __ldcg(reinterpret_cast<const float4*>(from + min(c0 + i * kWays, s.cta_count - 1) * slab));
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (c0 + i * kWays < s.cta_count) sum.x += v[i].x, sum.y += v[i].y, sum.z += v[i].z, sum.w += v[i].w;
      }
    }
    sums[way][column] = sum;
    __syncthreads();
    if (way == 0 && e < entries) {
      const int at = side_a ? s.a_offset + e : s.b_offset + e - s.a;
      TF* out = (side_a ? grad_A : grad_B) + at;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float v = 0.f;
#pragma unroll
        for (int w = 0; w < kWays; ++w) v += reinterpret_cast<const float*>(&sums[w][column])[i];
        out[i] = from_acc<TF>(alpha * v);
        if (side_a) dot += v * to_float(__ldg(f.A + at + i));
      }
    }
    __syncthreads();
  }

  if (way == 0) {
#pragma unroll
    for (int offset = kWarp / 2; offset; offset /= 2) dot += __shfl_xor_sync(~0u, dot, offset);
    if (column % kWarp == 0) warp_dots[column / kWarp] = dot;
  }
  __syncthreads();
  dots += blockIdx.x - rank;  // of the component's thread blocks
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (float v : warp_dots) total += v;
    dots[rank] = total;
  }
  cooperative_groups::this_cluster().sync();
  if (rank == 0 && threadIdx.x == 0) {
    float total = 0.f;
    for (int i = 0; i < kCluster; ++i) total += __ldcg(dots + i);
    grad_alpha[s.component] = total;
  }
#endif
}

template <typename TF>
cudaError_t finish(const float* partial, const MixtureArgs& mix, const GradPlan& plan, float* dots, void* grad_A,
                   void* grad_B, float* grad_alpha, cudaStream_t stream) {
  SlabComponents p;
  unsigned count = 0;
  for (int g = 0; g < plan.count; ++g) {
    const int pair[2] = {plan.group[g].first, plan.group[g].second};
    for (int copy = 0; copy < 2; ++copy) {
      if (pair[copy] < 0) continue;
      const KronComponent& c = mix.shapes.components[pair[copy]];
      const int a = static_cast<int>(c.ma * c.na), b = static_cast<int>(c.mb * c.nb);
      p.c[count++] = {pair[copy],
                      plan.group[g].cta_begin,
                      plan.group[g].cta_count,
                      a,
                      b,
                      static_cast<int>(c.a_offset),
                      static_cast<int>(c.b_offset),
                      copy * a,
                      2 * a + copy * b};
    }
  }
  // begins while the gradient kernel's last thread blocks run, and waits for them
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kCluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = count * kCluster;
  config.blockDim = kColumns * kWays;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  const Factors<TF> f = {static_cast<const TF*>(mix.A), static_cast<const TF*>(mix.B), mix.alpha};
  return cudaLaunchKernelEx(&config, finish_slabs_kernel<TF>, partial, plan.slab, p, f, dots, static_cast<TF*>(grad_A),
                            static_cast<TF*>(grad_B), grad_alpha);
}

}  // namespace

cudaError_t launch_finish_slabs(const float* partial, const MixtureArgs& mix, const GradPlan& plan, float* dots,
                                void* grad_A, void* grad_B, float* grad_alpha, cudaStream_t stream) {
  return mix.factor_dtype == Dtype::kF32
             ? finish<float>(partial, mix, plan, dots, grad_A, grad_B, grad_alpha, stream)
             : finish<__nv_bfloat16>(partial, mix, plan, dots, grad_A, grad_B, grad_alpha, stream);
}

}  // namespace moka::cuda
