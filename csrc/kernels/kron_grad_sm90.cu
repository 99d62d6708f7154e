// Factored parameter gradients, dA_i = sum_t dY_t B_i X_t^T and dB_i = sum_t dY_t^T A_i X_t, as chains of two
// matrix products whose intermediate (dY_t B_i, or A_i X_t) lives in shared memory only.
//
// Written for N = K = 4096 and factors A [s, L], B [L, s] with s L = 4096 (or their transposes, by symmetry). A
// token of T1 = dY is a matrix [s, L], of T2 = X a matrix [L, s]. A thread block works on two components of one
// shape, with F1 = B_c and F2 = A_c^T, both [L, s], by two warpgroups for each:
//   side 0:  P [(t,s), s] = T1 F1            then  dF2 [L, s] += T2 [L, (t,s)] P' [(t,s), s]
//   side 1:  V [(t,s), s] = T2^T F2          then  dF1 [L, s] += T1^T [L, (t,s)] V' [(t,s), s]
// where P' holds the same numbers as P with the two meanings of s exchanged: row (t, f), column r.
// Two more warps stream tiles of 64/s tokens through a ring of shared-memory stages: one by bulk tensor copies, one,
// for the rows of T2 when they are shorter than 128 bytes (bulk copies of such rows are slow), by 16-byte copies.
#include <cuda.h>

#include "cuda_common.cuh"
#include "kron_grad_sm90.h"
#include "sm90.cuh"

namespace moka::cuda {
namespace {

constexpr int kTokenBytes = kGradWidth * 2;
constexpr int kRingBytes = 16 * kTokenBytes;  // 128 KB: 16 / (2 * 64/s) stages of T1 and T2
constexpr int kFactorBytes = 2 * kTokenBytes;
constexpr int kConsumers = 4 * 128;  // warpgroup = 2 side + component
constexpr int kThreads = kConsumers + 2 * 32;

struct GradLaunch {
  CUtensorMap t1[kMaxGradGroups];  // [M s, L] in boxes of 64 x 64
  CUtensorMap t2[kMaxGradGroups];  // [M L, s] in boxes of L x s; s = 64 only
  GradGroup group[kMaxGradGroups];
  int a_offset[kMaxGradGroups][2], b_offset[kMaxGradGroups][2];
  int num_groups;
  const void *x, *dy;
  int64_t M;
};

#ifdef MOKA_SM90

// Element (row, column) of a matrix of 64-wide chunks [chunk][rows][64] in the 128-byte swizzle.
__device__ __forceinline__ int swizzled(int rows, int row, int column) {
  const int chunk = column / 64, unit = (column % 64) / 8;
  return ((chunk * rows + row) * 8 + (unit ^ (row & 7))) * 8 + column % 8;
}

// F [L, s] of one component and side as an [s, L] operand, by one warpgroup; natural: it is stored [s, L].
template <int S, typename T, typename TF>
__device__ void load_factor(T* dst, const TF* factor, bool present, bool natural) {
  constexpr int L = kGradWidth / S, kBatch = 16;
  for (int i0 = threadIdx.x % 128; i0 < kGradWidth; i0 += 128 * kBatch) {
    float v[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) v[j] = present ? to_float(__ldg(factor + i0 + j * 128)) : 0.f;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = i0 + j * 128, r = natural ? i / L : i % S, l = natural ? i % L : i / S;
      dst[swizzled(S, r, l)] = from_acc<T>(v[j]);
    }
  }
}

template <int S>
struct Tile {
  static constexpr int L = kGradWidth / S;
  static constexpr int kTokens = 64 / S;
  static constexpr int kBytes = kTokens * kTokenBytes;  // of T1, and of T2
  static constexpr int kStages = kRingBytes / (2 * kBytes);
  static constexpr bool kSmallRows = S < 64;  // of T2: not by bulk copies
};

// One thread: T1 always, T2 when its rows are 128 bytes.
template <int S>
__device__ void produce_boxes(const CUtensorMap* map1, const CUtensorMap* map2, uint8_t* ring, uint64_t* full,
                              uint64_t* empty, int first, int stride, int tiles) {
  using C = Tile<S>;
  int stage = 0, phase = 0;
  for (int tile = first; tile < tiles; tile += stride) {
    barrier_wait(&empty[stage], phase ^ 1);
    barrier_expect(&full[stage], C::kSmallRows ? C::kBytes : 2 * C::kBytes);
    uint8_t* t1 = ring + stage * 2 * C::kBytes;
#pragma unroll
    for (int c = 0; c < C::L / 64; ++c) copy_box(t1 + c * kTokenBytes, map1, c * 64, tile * 64, &full[stage]);
    if constexpr (!C::kSmallRows) copy_box(t1 + C::kBytes, map2, 0, tile * C::L, &full[stage]);
    if (++stage == C::kStages) stage = 0, phase ^= 1;
  }
}

// One warp: T2 with rows of 32 or 64 bytes, in the swizzle of that width.
template <int S>
__device__ void produce_rows(const uint8_t* t2, int64_t M, uint8_t* ring, uint64_t* full, uint64_t* empty, int first,
                             int stride, int tiles) {
  using C = Tile<S>;
  const int lane = threadIdx.x % 32;
  const int swizzled_lane = lane * 16 ^ (lane / 8 & (S == 32 ? 3 : 1)) << 4;
  int stage = 0, phase = 0;
  for (int tile = first; tile < tiles; tile += stride) {
    barrier_wait(&empty[stage], phase ^ 1);
    const uint32_t dst = shared_address(ring) + stage * 2 * C::kBytes + C::kBytes + swizzled_lane;
    const uint8_t* src = t2 + static_cast<int64_t>(tile) * C::kBytes + lane * 16;
#pragma unroll
    for (int t = 0; t < C::kTokens; ++t) {
      const bool inside = static_cast<int64_t>(tile) * C::kTokens + t < M;
#pragma unroll 8
      for (int i = t * kTokenBytes; i < (t + 1) * kTokenBytes; i += 512)
        copy_async16(dst + i, inside ? src + i : t2, inside ? 16 : 0);
    }
    barrier_arrive_after_copies(&full[stage]);
    if (++stage == C::kStages) stage = 0, phase ^= 1;
  }
}

// One warpgroup: kSide 0 computes dF2 from P, 1 computes dF1 from V. Leaves [L, s] sums, rows 2s apart, at `out`.
template <int S, typename T, int kSide>
__device__ void consume(const uint8_t* ring, const T* factor, T* middle, uint64_t* full, uint64_t* empty, int first,
                        int stride, int tiles, int barrier, float* out) {
  using C = Tile<S>;
  constexpr int L = C::L, kMTiles = L / 64, kRegisters = S / 2;
  constexpr int kSwizzle2 = S == 64 ? 1 : S == 32 ? 2 : 3;  // of T2, whose rows are 2 S bytes
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const uint32_t factor_at = shared_address(factor), middle_at = shared_address(middle);
  const uint32_t ring_at = shared_address(ring);
  float acc[kMTiles][kRegisters], d[kRegisters];
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) d[i] = 0.f;
#pragma unroll
  for (int m = 0; m < kMTiles; ++m)
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) acc[m][i] = 0.f;

  auto first_product = [&](int stage) {
    const uint32_t t1 = ring_at + stage * 2 * C::kBytes, t2 = t1 + C::kBytes;
#pragma unroll
    for (int k = 0; k < L; k += 16) {
      const uint64_t b = matrix_descriptor(factor_at + k / 64 * S * 128 + k % 64 * 2, 16, 1024, 1);
      if constexpr (kSide == 0) {
        wgmma<S, T, 0>(d, matrix_descriptor(t1 + k / 64 * kTokenBytes + k % 64 * 2, 16, 1024, 1), b, k > 0);
      } else {
        wgmma<S, T, 1>(d, matrix_descriptor(t2 + k * S * 2, kTokenBytes, 16 * S, kSwizzle2), b, k > 0);
      }
    }
  };
  auto second_product = [&](int stage) {
    const uint32_t t1 = ring_at + stage * 2 * C::kBytes, t2 = t1 + C::kBytes;
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
      const uint64_t b = matrix_descriptor(middle_at + k * 2, 16, 1024, 1);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        if constexpr (kSide == 0) {
          const uint32_t a = t2 + k / S * kTokenBytes + m * 64 * S * 2 + k % S * 2;
          wgmma<S, T, 0>(acc[m], matrix_descriptor(a, 16, 16 * S, kSwizzle2), b, 1);
        } else {
          wgmma<S, T, 1>(acc[m], matrix_descriptor(t1 + m * kTokenBytes + k * 128, 16, 1024, 1), b, 1);
        }
      }
    }
  };

  proxy_fence();  // the factor's stores
  named_barrier(barrier, 128);
  int stage = 0, phase = 0;
  if (first < tiles) {
    barrier_wait(&full[0], 0);
    if (C::kSmallRows) proxy_fence();  // T2 came by ordinary copies
    wgmma_fence();
    first_product(0);
    wgmma_commit();
    wgmma_wait();
  }
  for (int tile = first; tile < tiles; tile += stride) {
    named_barrier(barrier, 128);  // every warp has finished reading `middle`
                                  // row (t, r), column f of d goes to row r, column (t, f) of `middle`
#pragma unroll
    for (int j = 0; j < S / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + lane / 4 + half * 8, column = j * 8 + lane % 4 * 2;
        const int at = swizzled(S, row % S, row / S * S + column);
        T pair[2] = {from_acc<T>(d[4 * j + 2 * half]), from_acc<T>(d[4 * j + 2 * half + 1])};
        *reinterpret_cast<uint32_t*>(middle + at) = *reinterpret_cast<uint32_t*>(pair);
      }
    proxy_fence();
    named_barrier(barrier, 128);

    const int current = stage;
    const bool more = tile + stride < tiles;
    if (more && ++stage == C::kStages) stage = 0, phase ^= 1;
    if constexpr (C::kStages > 2) {
      // This tile's second product and the next tile's first run together; after the last tile the latter repeats
      // on the current tile, unused, so that no branch splits the pipeline.
      if (more) {
        barrier_wait(&full[stage], phase);
        if (C::kSmallRows) proxy_fence();
      }
      wgmma_fence();
      second_product(current);
      wgmma_commit();
      first_product(stage);
      wgmma_commit();
      wgmma_wait();
      if (lane == 0) barrier_arrive(&empty[current]);
    } else {
      // With two stages this tile's must be given back before the next tile is waited for.
      wgmma_fence();
      second_product(current);
      wgmma_commit();
      wgmma_wait();
      if (lane == 0) barrier_arrive(&empty[current]);
      if (more) {
        barrier_wait(&full[stage], phase);
        if (C::kSmallRows) proxy_fence();
        wgmma_fence();
        first_product(stage);
        wgmma_commit();
        wgmma_wait();
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kMTiles; ++m)
#pragma unroll
    for (int j = 0; j < S / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m * 64 + warp * 16 + lane / 4 + half * 8;
        const float2 v = {acc[m][4 * j + 2 * half], acc[m][4 * j + 2 * half + 1]};
        *reinterpret_cast<float2*>(out + row * 2 * S + j * 8 + lane % 4 * 2) = v;
      }
}

template <int S, typename T, typename TF>
__device__ void run_group(const GradLaunch& p, int g, const TF* A, const TF* B, uint8_t* smem, float* partial) {
  const GradGroup& group = p.group[g];
  uint8_t* ring = smem;
  const int role = threadIdx.x / 128, side = role / 2, component = role % 2;  // consumers only
  T* factor = reinterpret_cast<T*>(smem + kRingBytes) + role * kGradWidth;
  T* middle = reinterpret_cast<T*>(smem + kRingBytes) + 4 * kGradWidth + role * S * 64;
  uint64_t* full = reinterpret_cast<uint64_t*>(smem + kRingBytes + 2 * kFactorBytes + 4 * S * 128);
  uint64_t* empty = full + Tile<S>::kStages;

  if (threadIdx.x == 0) {
    for (int s = 0; s < Tile<S>::kStages; ++s) {
      barrier_init(&full[s], Tile<S>::kSmallRows ? 33 : 1);
      barrier_init(&empty[s], kConsumers / 32);  // one arrival per consumer warp
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  const int tiles = static_cast<int>(ceil_div(p.M, Tile<S>::kTokens));
  const int first = blockIdx.x - group.cta_begin, stride = group.cta_count;
  float* out = partial + blockIdx.x * kGradSlab + side * (kGradSlab / 2) + component * S;
  const bool present = component == 0 || group.second >= 0;
  if (role < 2) {
    load_factor<S>(factor, B + p.b_offset[g][component], present, group.mirrored);
    consume<S, T, 0>(ring, factor, middle, full, empty, first, stride, tiles, 1 + role, out);
  } else if (role < 4) {
    load_factor<S>(factor, A + p.a_offset[g][component], present, !group.mirrored);
    consume<S, T, 1>(ring, factor, middle, full, empty, first, stride, tiles, 1 + role, out);
  } else if (threadIdx.x == kConsumers) {
    produce_boxes<S>(&p.t1[g], &p.t2[g], ring, full, empty, first, stride, tiles);
  } else if (threadIdx.x >= kConsumers + 32 && Tile<S>::kSmallRows) {
    produce_rows<S>(static_cast<const uint8_t*>(group.mirrored ? p.dy : p.x), p.M, ring, full, empty, first, stride,
                    tiles);
  }
}

#endif  // MOKA_SM90

template <typename T, typename TF>
__global__ void __launch_bounds__(kThreads, 1)
    kron_grad_kernel(const __grid_constant__ GradLaunch p, const TF* A, const TF* B, float* partial) {
#ifdef MOKA_SM90
  extern __shared__ __align__(1024) uint8_t smem[];
  int g = 0;
  while (g + 1 < p.num_groups && static_cast<int>(blockIdx.x) >= p.group[g + 1].cta_begin) ++g;
  switch (p.group[g].side) {
    case 16:
      return run_group<16, T>(p, g, A, B, smem, partial);
    case 32:
      return run_group<32, T>(p, g, A, B, smem, partial);
    default:
      return run_group<64, T>(p, g, A, B, smem, partial);
  }
#endif
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

EncodeTiled encode_tiled() {
  static const EncodeTiled fn = [] {
    void* p = nullptr;
    cudaDriverEntryPointQueryResult found;
    const auto e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000, cudaEnableDefault, &found);
    return e == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(p) : nullptr;
  }();
  return fn;
}

bool encode(CUtensorMap* map, const void* base, bool bf16, int64_t rows, int columns, int box_rows) {
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t step[2] = {1, 1};
  return encode_tiled()(map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                        const_cast<void*>(base), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename T, typename TF>
cudaError_t launch(const GradLaunch& p, const void* A, const void* B, int sms, float* partial, cudaStream_t stream) {
  constexpr int kBytes = kRingBytes + 2 * kFactorBytes + 2 * 128 * 128 + 256;
  auto* kernel = kron_grad_kernel<T, TF>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<sms, kThreads, kBytes, stream>>>(p, static_cast<const TF*>(A), static_cast<const TF*>(B), partial);
  return cudaGetLastError();
}

// Relative time of one token in each kind of group, from measurements on an H200.
double group_cost(int side) { return side == 64 ? 8.0 : side == 32 ? 5.7 : 4.0; }

}  // namespace

int plan_grad_groups(const KronParams& mixture, int sms, GradGroup* groups) {
  if (mixture.N != kGradWidth || mixture.K != kGradWidth) return 0;
  int count = 0;
  for (int i = 0; i < mixture.r; ++i) {
    const KronComponent& c = mixture.components[i];
    const bool mirrored = c.ma > c.na;
    const int64_t s = mirrored ? c.na : c.ma;
    const bool fits = (s == 16 || s == 32 || s == 64) && c.ma * c.na == kGradWidth && c.nb == c.ma && c.mb == c.na;
    if (!fits || c.identity != Identity::kNone) return 0;
    int g = 0;
    while (g < count && !(groups[g].side == s && groups[g].mirrored == mirrored && groups[g].second < 0)) ++g;
    if (g < count) {
      groups[g].second = i;
    } else {
      if (count == kMaxGradGroups) return 0;
      groups[count++] = {static_cast<int>(s), mirrored, i, -1, 0, 0};
    }
  }
  if (count > sms) return 0;
  double total = 0, before = 0;
  for (int g = 0; g < count; ++g) total += group_cost(groups[g].side);
  const int spare = sms - count;  // every group has one thread block; the others go by cost
  for (int g = 0; g < count; ++g) {
    const double after = before + group_cost(groups[g].side);
    const int begin = static_cast<int>(before / total * spare + 0.5),
              end = static_cast<int>(after / total * spare + 0.5);
    groups[g].cta_begin = begin + g;
    groups[g].cta_count = end - begin + 1;
    before = after;
  }
  return count;
}

cudaError_t launch_kron_grad_sm90(const void* x, const void* dy, const void* A, const void* B, bool factor_fp32,
                                  bool bf16, int64_t M, const KronParams& mixture, const GradGroup* groups,
                                  int num_groups, int sms, float* partial, cudaStream_t stream) {
  if (encode_tiled() == nullptr) return cudaErrorNotSupported;
  GradLaunch p;
  p.num_groups = num_groups;
  p.M = M;
  p.x = x, p.dy = dy;
  for (int g = 0; g < num_groups; ++g) {
    const GradGroup& group = p.group[g] = groups[g];
    const int s = group.side, L = kGradWidth / s;
    const bool ok = encode(&p.t1[g], group.mirrored ? x : dy, bf16, M * s, L, 64) &&
                    (s < 64 || encode(&p.t2[g], group.mirrored ? dy : x, bf16, M * L, s, L));
    if (!ok) return cudaErrorInvalidValue;
    const int pair[2] = {group.first, group.second < 0 ? group.first : group.second};
    for (int i = 0; i < 2; ++i) {
      p.a_offset[g][i] = static_cast<int>(mixture.components[pair[i]].a_offset);
      p.b_offset[g][i] = static_cast<int>(mixture.components[pair[i]].b_offset);
    }
  }
  if (factor_fp32)
    return bf16 ? launch<__nv_bfloat16, float>(p, A, B, sms, partial, stream)
                : launch<__half, float>(p, A, B, sms, partial, stream);
  return bf16 ? launch<__nv_bfloat16, __nv_bfloat16>(p, A, B, sms, partial, stream)
              : launch<__half, __half>(p, A, B, sms, partial, stream);
}

}  // namespace moka::cuda
