// Factored parameter gradients, dA_i = sum_t dY_t B_i X_t^T and dB_i = sum_t dY_t^T A_i X_t, as chains of two
// matrix products whose intermediate (dY_t B_i, or A_i X_t) lives in shared memory only.
//
// With A [S1, L2] and B [L1, S2], a token of T1 = dY is a matrix [S1, L1], of T2 = X a matrix [L2, S2]. (The other
// order of the products is the same with the roles of A and B, and of X and dY, exchanged: a mirrored group.) With
// F1 = B and F2 = A^T, of two components of one shape side by side (of one, where registers are too few for two):
//   side 0:  P [(t,S1), 2 S2] = T1 F1          then  dF2 [L2, 2 S1] += T2 [L2, (t,S2)] P' [(t,S2), 2 S1]
//   side 1:  V [(t,S2), 2 S1] = T2^T F2        then  dF1 [L1, 2 S2] += T1^T [L1, (t,S1)] V' [(t,S1), 2 S2]
// where P' holds the same numbers as P: row (t, f) and column (component, r) instead of (t, r) and (component, f).
// S1 is padded with zeros to a power of two. It and L2, A's sides, may be smaller than those a kernel is compiled for.
//
// One warpgroup computes side 0, one side 1. A third streams tiles of tokens through two rings of shared-memory
// chunks, each of which is a block of K in one side's first product and a block of M in the other side's second:
// 64 columns of T1, and 64 rows of T2 of which several tokens share one 128-byte line when they are shorter.
#pragma once

#include "kron_grad_feed_sm90.cuh"

namespace moka::cuda {

#ifdef MOKA_SM90

// What one side of a shape computes with: F is the operand of its first product, G the other one.
template <class C, int kSide>
struct Side {
  static constexpr int kLF = kSide == 0 ? C::kL1 : C::kL2;
  static constexpr int kChunksF = kSide == 0 ? C::kChunks1 : C::kChunks2;
  static constexpr int kChunksG = kSide == 0 ? C::kChunks2 : C::kChunks1;
  static constexpr int kRowsF = kSide == 0 ? C::kRows1 : C::kRows2, kRowsG = kSide == 0 ? C::kRows2 : C::kRows1;
  static constexpr int kF = kSide == 0 ? C::kP1 : C::kS2;         // a row of the first product is (t, kF),
  static constexpr int kG = kSide == 0 ? C::kS2 : C::kP1;         // a column (component, kG)
  static constexpr int kFs = C::kPair * kF, kGs = C::kPair * kG;  // of all components
  static constexpr int kGUsed = kSide == 0 ? C::kS2 : C::kS1;
  // Side 1 reads T with K across the lines. wgmma does that faster for its second operand: then the product's
  // transpose is computed, where the other operand has the 64 rows for it.
  static constexpr bool kSwap1 = kSide == 1 && kGs >= 64, kSwap2 = kSide == 1 && kFs >= 64;
  // wgmma's N, and blocks of 64 x N over the data's and the other operand's dimension, of both products
  static constexpr int kN1 = kSwap1 ? 64 : kGs < 128 ? kGs : 128, kOther1 = kSwap1 ? 64 : kN1;
  static constexpr int kN2 = kSwap2 ? 64 : kFs < 128 ? kFs : 128, kOther2 = kSwap2 ? 64 : kN2;
  static constexpr int kBlocks1 = kRowsF / 64 * (kGs / kOther1), kBlocks2 = kFs / kOther2;
  static constexpr int kPasses = (kBlocks1 * kN1 + 127) / 128, kBlocksPass = kBlocks1 / kPasses;  // 64 registers each
  static constexpr int kStep = kSide == 0 ? 32 : 2048;  // bytes of 16 of K: side 0 has it along the lines, 1 across
};

// d += data other, or its transpose.
template <int N, int kSide, bool kSwap>
__device__ __forceinline__ void product(float* d, uint32_t data, uint32_t other, int accumulate) {
  const uint64_t t = matrix_descriptor(data, 16, 1024, 1), f = matrix_descriptor(other, 16, 1024, 1);
  if constexpr (kSwap) {
    wgmma<N, 0, 1>(d, f, t, accumulate);
  } else {
    wgmma<N, kSide>(d, t, f, accumulate);
  }
}

// One warpgroup. Leaves its sums at `out`, for the two components; natural: as [S, L] matrices.
template <class C, int kSide, class RF, class RG>
__device__ void consume(RF ring_f, RG ring_g, uint32_t factor, uint32_t middle, int first, int stride, int tiles,
                        float* out, bool natural, const GradGroup& group) {
  using D = Side<C, kSide>;
  constexpr bool kCopied = C::kS2 < 64;  // T2 came by ordinary copies
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int chunks2 = (group.l2 + 63) / 64;
  float acc[D::kChunksG][D::kBlocks2][D::kN2 / 2], d[D::kBlocksPass][D::kN1 / 2];
#pragma unroll
  for (int c = 0; c < D::kChunksG; ++c)
#pragma unroll
    for (int b = 0; b < D::kBlocks2; ++b)
#pragma unroll
      for (int i = 0; i < D::kN2 / 2; ++i) acc[c][b][i] = 0.f;
#pragma unroll
  for (int b = 0; b < D::kBlocksPass; ++b)
#pragma unroll
    for (int i = 0; i < D::kN1 / 2; ++i) d[b][i] = 0.f;

  uint64_t* held = nullptr;  // the chunk that products still in flight may read
  auto release = [&] {
    if (held && lane == 0) barrier_arrive(held);
    held = nullptr;
  };

  for (int tile = first; tile < tiles; tile += stride) {
    const RF start = ring_f;
#pragma unroll
    for (int pass = 0; pass < D::kPasses; ++pass) {
      ring_f = start;
#pragma unroll
      for (int c = 0; c < D::kChunksF; ++c) {
        if (kSide == 1 && c >= chunks2) break;
        if (pass == 0) {
          barrier_wait(&ring_f.full[ring_f.slot], ring_f.phase);
          if (kCopied && kSide == 1) proxy_fence();
        }
        const uint32_t chunk = ring_f.at();
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (c * 64 + k * 16 >= D::kLF) continue;
#pragma unroll
          for (int b = 0; b < D::kBlocksPass; ++b) {
            const int block = pass * D::kBlocksPass + b, m = block % (D::kRowsF / 64), n = block / (D::kRowsF / 64);
            product<D::kN1, kSide, D::kSwap1>(d[b], chunk + m * 8192 + k * D::kStep,
                                              factor + (c * D::kGs + n * D::kOther1) * 128 + k * 32, c + k > 0);
          }
        }
        wgmma_commit();
        wgmma_wait<1>();
        release();
        if (pass == D::kPasses - 1) held = &ring_f.empty[ring_f.slot];
        ring_f.next();
      }
      wgmma_wait<0>();
      release();
      if (pass == 0) named_barrier(1 + kSide, 128);  // every warp has finished reading `middle`
      // row (t, r), column (component, f) of the product goes to row (component, r), column (t, f) of `middle`, in
      // pieces of eight r by eight f
#pragma unroll
      for (int b = 0; b < D::kBlocksPass; ++b) {
        const int block = pass * D::kBlocksPass + b, m = block % (D::kRowsF / 64), n = block / (D::kRowsF / 64);
#pragma unroll
        for (int j = 0; j < D::kN1 / 8; j += 2) {
          // the piece of d whose row this lane gives the address of, and its row
          const int d_row = warp * 16 + lane / 8 % 2 * 8, d_column = j * 8 + lane / 16 * 8, i = lane % 8;
          const int row = m * 64 + (D::kSwap1 ? d_column : d_row),
                    column = n * D::kOther1 + (D::kSwap1 ? d_row : d_column);
          const int t = row / D::kF, r = row % D::kF, component = column / D::kG, f = column % D::kG;
          store_matrices<D::kSwap1>(middle + swizzled(D::kFs, component * D::kF + r + i, t * D::kG + f), &d[b][4 * j]);
        }
      }
    }
    proxy_fence();
    named_barrier(1 + kSide, 128);

#pragma unroll
    for (int c = 0; c < D::kChunksG; ++c) {
      if (kSide == 0 && c >= chunks2) break;
      barrier_wait(&ring_g.full[ring_g.slot], ring_g.phase);
      if (kCopied && kSide == 0) proxy_fence();
      const uint32_t chunk = ring_g.at();
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < D::kRowsG / 16; ++k) {
        if (k * 16 % D::kG >= D::kGUsed) continue;  // all padding
#pragma unroll
        for (int n = 0; n < D::kBlocks2; ++n)
          product<D::kN2, kSide, D::kSwap2>(acc[c][n], chunk + k / 4 * 8192 + k % 4 * D::kStep,
                                            middle + (k / 4 * D::kFs + n * D::kOther2) * 128 + k % 4 * 32, 1);
      }
      wgmma_commit();
      wgmma_wait<1>();
      release();
      held = &ring_g.empty[ring_g.slot];
      ring_g.next();
    }
  }
  wgmma_wait<0>();
  release();

  const int l_used = kSide == 0 ? group.l2 : C::kL1, s_used = kSide == 0 ? group.s1 : C::kS2;
  const bool pairs = natural == D::kSwap2 && l_used % 2 == 0 && s_used % 2 == 0;
#pragma unroll
  for (int c = 0; c < D::kChunksG; ++c)
#pragma unroll
    for (int n = 0; n < D::kBlocks2; ++n)
#pragma unroll
      for (int i = 0; i < D::kN2 / 2; i += 2) {
        const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
        const int l = c * 64 + (D::kSwap2 ? column : row), at = n * D::kOther2 + (D::kSwap2 ? row : column);
        const int s = at % D::kF;
        if (l >= l_used || s >= s_used) continue;
        float* to = out + (at < D::kF ? 0 : l_used * s_used) + (natural ? s * l_used + l : l * s_used + s);
        if (pairs) {
          *reinterpret_cast<float2*>(to) = {acc[c][n][i], acc[c][n][i + 1]};
          continue;
        }
        to[0] = acc[c][n][i];
        if (D::kSwap2 ? l + 1 < l_used : s + 1 < s_used)
          to[natural == D::kSwap2 ? 1 : natural ? l_used : s_used] = acc[c][n][i + 1];
      }
}

template <class C>
__device__ void prepare(uint8_t* smem) {
  using Y = Layout<C>;
  if (threadIdx.x == 0) {
    const auto ring1 = Y::ring1(smem);
    const auto ring2 = Y::ring2(smem);
    for (int s = 0; s < C::kSlots1; ++s) {
      barrier_init(&ring1.full[s], 1);
      barrier_init(&ring1.empty[s], 8);  // one arrival per consumer warp
    }
    for (int s = 0; s < C::kSlots2; ++s) {
      barrier_init(&ring2.full[s], C::kS2 < 64 ? 32 : 1);
      barrier_init(&ring2.empty[s], 8);
    }
    barrier_init(Y::ready(smem), 8);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  // the padding of the factors, and of the intermediates
  for (int i = threadIdx.x * 16; i < C::kFixed; i += kGradThreads * 16)
    *reinterpret_cast<uint4*>(smem + i) = uint4{0, 0, 0, 0};
  proxy_fence();
  __syncthreads();
}

// The two consumer warpgroups.
template <class C, int kSide>
__device__ void run_side(const GradLaunch& p, int g, uint8_t* smem, float* partial) {
  using Y = Layout<C>;
  constexpr int P = kSide == 0 ? C::kS2 : C::kP1, kAt = kSide == 0 ? Y::kFactor1 : Y::kFactor2;
  const GradGroup& group = p.plan.group[g];
  const bool mirrored = group.mirrored, natural = kSide == 0 ? mirrored : !mirrored;
  const bool whole = kSide == 0 || (group.s1 == C::kS1 && group.l2 == C::kL2);
  const auto load = [&](int i, const auto* factor) {
    if (whole)
      load_factor<kSide == 0 ? C::kS2 : C::kS1, kSide == 0 ? C::kL1 : C::kL2>(smem + kAt, C::kPair * P, i * P, factor,
                                                                              natural);
    else
      load_factor(smem + kAt, C::kPair * P, i * P, factor, group.s1, group.l2, natural);
  };
  for (int i = 0; i < C::kPair; ++i) {
    const void* factor = kSide == 0 ? p.f1[g][i] : p.f2[g][i];
    if (!factor) continue;
    if (p.factor_fp32)
      load(i, static_cast<const float*>(factor));
    else
      load(i, static_cast<const __nv_bfloat16*>(factor));
  }
  if (threadIdx.x % 32 == 0) barrier_arrive(Y::ready(smem));
  proxy_fence();
  named_barrier(1 + kSide, 128);

  // Side 0 leaves dF2: the slab's A part, A [S1, L2] or mirrored [L2, S1]; side 1 dF1: B [L1, S2] or [S2, L1].
  float* out = partial + blockIdx.x * p.plan.slab + (kSide == 0 ? 0 : 2 * group.s1 * group.l2);
  const int tiles = static_cast<int>(ceil_div(p.M, C::kTokens));
  const int first = blockIdx.x - group.cta_begin, stride = group.cta_count;
  const uint32_t at = shared_address(smem);
  if constexpr (kSide == 0) {
    consume<C, 0>(Y::ring1(smem), Y::ring2(smem), at + Y::kFactor1, at + Y::kMiddle0, first, stride, tiles, out,
                  !mirrored, group);
  } else {
    consume<C, 1>(Y::ring2(smem), Y::ring1(smem), at + Y::kFactor2, at + Y::kMiddle1, first, stride, tiles, out,
                  mirrored, group);
  }
}

template <class C>
__device__ void run_producers(const GradLaunch& p, int g, uint8_t* smem) {
  using Y = Layout<C>;
  const GradGroup& group = p.plan.group[g];
  const int tiles = static_cast<int>(ceil_div(p.M, C::kTokens));
  const int first = blockIdx.x - group.cta_begin, stride = group.cta_count, warp = threadIdx.x / 32 % 4;
  if (warp == 0) {
    if (threadIdx.x % 32 == 0)
      produce_boxes<C, 1>(&p.t1[g], Y::ring1(smem), Y::ready(smem), C::kChunks1, first, stride, tiles);
  } else if constexpr (C::kS2 == 64) {
    if (warp == 1 && threadIdx.x % 32 == 0)
      produce_boxes<C, 2>(&p.t2[g], Y::ring2(smem), Y::ready(smem), (group.l2 + 63) / 64, first, stride, tiles);
  } else {
    const uint8_t* t2 = static_cast<const uint8_t*>(group.mirrored ? p.dy : p.x);
    produce_rows<C>(t2, group.l2, p.M, Y::ring2(smem), Y::ready(smem), warp - 1, first, stride, tiles);
  }
}

// run<Shape>() for the shape with this index.
template <class... Shapes, class Run>
__device__ __forceinline__ void with_shape(int shape, Run run) {
  int i = 0;
  ((shape == i++ ? run(Shapes{}) : void()), ...);
}

#endif  // MOKA_SM90

template <class... Shapes>
__global__ void __launch_bounds__(kGradThreads, 1)
    kron_grad_kernel(const __grid_constant__ GradLaunch p, float* partial) {
#ifdef MOKA_SM90
  extern __shared__ __align__(1024) uint8_t smem[];
  int g = 0;
  while (g + 1 < p.plan.count && static_cast<int>(blockIdx.x) >= p.plan.group[g + 1].cta_begin) ++g;
  const int shape = p.plan.group[g].shape;
  with_shape<Shapes...>(shape, [&](auto c) { prepare<decltype(c)>(smem); });
  wait_for_previous();
  if (threadIdx.x < 128) {
    set_registers_up<232>();
    with_shape<Shapes...>(shape, [&](auto c) { run_side<decltype(c), 0>(p, g, smem, partial); });
  } else if (threadIdx.x < 256) {
    set_registers_up<232>();
    with_shape<Shapes...>(shape, [&](auto c) { run_side<decltype(c), 1>(p, g, smem, partial); });
  } else {
    set_registers_down<40>();
    let_next_start();
    with_shape<Shapes...>(shape, [&](auto c) { run_producers<decltype(c)>(p, g, smem); });
  }
#endif
}

template <class... Shapes>
cudaError_t launch_grad_family(GradFamily<Shapes...>, const GradLaunch& p, int sms, float* partial,
                               cudaStream_t stream) {
  auto* kernel = kron_grad_kernel<Shapes...>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kGradSmem);
  if (error != cudaSuccess) return error;
  return launch_overlapping(kernel, dim3(sms), kGradThreads, kGradSmem, stream, true, p, partial);
}

// One file each, so that they compile in parallel.
cudaError_t launch_grad_square(const GradLaunch& p, int sms, float* partial, cudaStream_t stream);
cudaError_t launch_grad_mlp(const GradLaunch& p, int sms, float* partial, cudaStream_t stream);
cudaError_t launch_grad_kv(const GradLaunch& p, int sms, float* partial, cudaStream_t stream);
cudaError_t launch_grad_medium(const GradLaunch& p, int sms, float* partial, cudaStream_t stream);
cudaError_t launch_grad_mlp43(const GradLaunch& p, int sms, float* partial, cudaStream_t stream);

}  // namespace moka::cuda
