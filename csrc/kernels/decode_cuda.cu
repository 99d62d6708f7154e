// The few-token kernels; see decode_cuda.h.
//
// mixture_stage1_kernel: per token and component the smaller intermediate, alpha A X [ma, nb] or alpha X B^T [na, mb],
// in fp32. decode_kernel: W x on tensor cores, with the codes decoded in registers by a 256-entry table of pairs, one
// copy per shared-memory bank; block scales are applied to sums over blocks of 64, in fp32; then the second half of
// the mixture and the bias are added and y is rounded once. With both, the second launch overlaps the first.
#include "decode_cuda.h"
#include "decode_mixture.cuh"

namespace moka::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kBlock = 64;   // weights per absmax
constexpr int kChunk = 256;  // columns a warp handles at a time: four blocks of each of its rows
constexpr int kTableBytes = 256 * kLanes * 4;

template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Entry (byte, lane) is the pair of weights that `byte` codes, as two T; rotated writes avoid bank conflicts.
template <typename T>
__device__ void fill_table(uint32_t* table) {
  for (int byte = threadIdx.x; byte < 256; byte += blockDim.x) {
    const T pair[2] = {from_acc<T>(kNf4[byte >> 4]), from_acc<T>(kNf4[byte & 15])};
    const uint32_t v = *reinterpret_cast<const uint32_t*>(pair);
#pragma unroll
    for (int j = 0; j < 8; ++j) reinterpret_cast<uint4*>(table)[byte * 8 + (j + byte) % 8] = make_uint4(v, v, v, v);
  }
}

// What one lane of a warp holds of a chunk: for rows g and g + 8 of each 16-row tile, 8 bytes of each of four
// blocks; and the scale of the block that its position in its group of four names.
template <int MT>
struct Fragment {
  uint2 codes[MT][2][4];
  float absmax[MT][2];  // fp32 absmax, or absmax2 of a nested one
  uint8_t code[MT][2];

  __device__ void load(const Nf4Params& w, int row, int chunk, int shift2, int quad) {
    const int K = static_cast<int>(w.K);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t r = row + m * 16 + h * 8;
        const uint8_t* p = w.packed + r * (K / 2) + chunk * (kChunk / 2) + quad * 8;
#pragma unroll
        for (int b = 0; b < 4; ++b) codes[m][h][b] = __ldcs(reinterpret_cast<const uint2*>(p + b * (kBlock / 2)));
        const int64_t block = r * (K / kBlock) + chunk * 4 + quad;
        if (w.absmax) {
          absmax[m][h] = w.absmax[block];
        } else {
          code[m][h] = w.absmax_q[block];
          absmax[m][h] = w.absmax2[block >> shift2];
        }
      }
  }
};

template <int MT, int NT, int WARPS>
__host__ __device__ constexpr int decode_bytes() {
  const int reduction = WARPS * 16 * MT * (8 * NT + 1) * 4;
  return (reduction > kTableBytes ? reduction : kTableBytes) + 256 * 4;
}

// One thread block computes 16 MT rows of y for up to 8 NT tokens; its warps share out K.
template <typename T, typename TF, int MT, int NT, int WARPS, bool kMixture>
__global__ void __launch_bounds__(WARPS* kLanes, WARPS == 8 ? 2 : 1)
    decode_kernel(const T* x, int tokens, const __grid_constant__ Nf4Params w, int shift2, const T* bias, Factors<TF> f,
                  const __grid_constant__ MixturePlan plan, const float* middle, T* y) {
  extern __shared__ __align__(16) uint8_t smem[];
  constexpr int kRows = 16 * MT, kStride = 8 * NT + 1;
  uint32_t* table = reinterpret_cast<uint32_t*>(smem);
  float* sums = reinterpret_cast<float*>(smem);  // [WARPS][kRows][kStride], after the table's last use
  float* code2 = reinterpret_cast<float*>(smem + decode_bytes<MT, NT, WARPS>() - 256 * 4);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, quad = lane % 4;
  const int K = static_cast<int>(w.K), N = static_cast<int>(w.N), row0 = blockIdx.x * kRows;
  const int chunks = K / kChunk;

  constexpr bool kPrefetch = MT == 1;  // with two row tiles the registers do not suffice
  Fragment<MT> next;
  if (warp < chunks) next.load(w, row0 + g, warp, shift2, quad);
  fill_table<T>(table);
  const bool nested = w.absmax == nullptr;
  const float offset = nested ? *w.offset : 0.f;
  if (nested)
    for (int i = threadIdx.x; i < 256; i += blockDim.x) code2[i] = w.code2[i];
  __syncthreads();

  __shared__ int factor_row[kMixture ? kRows : 1][kMaxDecodeComponents],
      middle_row[kMixture ? kRows : 1][kMaxDecodeComponents];
  __shared__ uint16_t unit_component[kMixture ? kMaxUnits : 1], unit_term[kMixture ? kMaxUnits : 1];
  int units = 0;
  if (kMixture) {
    for (int e = threadIdx.x; e < kRows * plan.r; e += WARPS * kLanes) {
      const int r = e / plan.r, i = e % plan.r;
      const Component& s = plan.c[i];
      const int ia = (row0 + r) / s.mb, ib = (row0 + r) % s.mb;
      factor_row[r][i] = plan.half[i].a_first ? s.b_offset + ib * s.nb : s.a_offset + ia * s.na;
      middle_row[r][i] = plan.half[i].offset + (plan.half[i].a_first ? ia * s.nb : ib * s.na);
    }
    for (int i = 0; i < plan.r; ++i) {
      const int count = plan.half[i].length / 4;
      for (int j = threadIdx.x; j < count; j += WARPS * kLanes) {
        unit_component[units + j] = static_cast<uint16_t>(i);
        unit_term[units + j] = static_cast<uint16_t>(j * 4);
      }
      units += count;
    }
  }

  float acc[MT][NT][4] = {};
  for (int chunk = warp; chunk < chunks; chunk += WARPS) {
    const Fragment<MT> now = next;
    if (kPrefetch && chunk + WARPS < chunks) next.load(w, row0 + g, chunk + WARPS, shift2, quad);
    float scale[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        scale[m][h] = nested ? __fadd_rn(__fmul_rn(code2[now.code[m][h]], now.absmax[m][h]), offset) : now.absmax[m][h];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      asm volatile("" ::: "memory");  // one block's registers at a time
      uint32_t a[MT][4][4];
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int byte = 0; byte < 8; ++byte) {
            const uint32_t word = byte < 4 ? now.codes[m][h][b].x : now.codes[m][h][b].y;
            a[m][byte / 2][byte % 2 * 2 + h] = table[(word >> byte % 4 * 8 & 255) * kLanes + lane];
          }
      float row_scale[MT][2];
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) row_scale[m][h] = __shfl_sync(~0u, scale[m][h], (lane & ~3) + b);
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        uint32_t xs[8] = {};
        const int token = t * 8 + g;
        if (token < tokens) {
          const T* p = x + static_cast<int64_t>(token) * K + chunk * kChunk + b * kBlock + quad * 16;
          const uint4 lo = reinterpret_cast<const uint4*>(p)[0], hi = reinterpret_cast<const uint4*>(p)[1];
          xs[0] = lo.x, xs[1] = lo.y, xs[2] = lo.z, xs[3] = lo.w;
          xs[4] = hi.x, xs[5] = hi.y, xs[6] = hi.z, xs[7] = hi.w;
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          float d[4] = {};
#pragma unroll
          for (int s = 0; s < 4; ++s) mma<T>(d, a[m][s], xs[2 * s], xs[2 * s + 1]);
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][t][i] = fmaf(row_scale[m][i / 2], d[i], acc[m][t][i]);
        }
      }
    }
    if (!kPrefetch && chunk + WARPS < chunks) next.load(w, row0 + g, chunk + WARPS, shift2, quad);
  }
  __syncthreads();  // the table's last use is over
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[(warp * kRows + m * 16 + g + i / 2 * 8) * kStride + t * 8 + quad * 2 + i % 2] = acc[m][t][i];
  __syncthreads();
  for (int o = threadIdx.x; o < kRows * tokens; o += WARPS * kLanes) {
    float* s = sums + o % kRows * kStride + o / kRows;
    float total = 0.f;
#pragma unroll
    for (int v = 0; v < WARPS; ++v) total += s[v * kRows * kStride];
    s[0] = total;
  }
  if (kMixture) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
    __syncthreads();
    // second half of the mixture: kRowLanes lanes per row, every lane the same four-term units for all tokens
    static_assert(WARPS * kLanes == kRows * kRowLanes);
    const int r = threadIdx.x / kRowLanes, sub = threadIdx.x % kRowLanes;
    constexpr int kTokens = 8 * NT;
    float sum[kTokens] = {};
#pragma unroll 5
    for (int u = sub; u < units; u += kRowLanes) {
      const int i = unit_component[u], j = unit_term[u];
      const float4 w4 = load4((plan.half[i].a_first ? f.B : f.A) + factor_row[r][i] + j);
      const float* v = middle + middle_row[r][i] + j;
#pragma unroll
      for (int t = 0; t < kTokens; ++t)
        if (t < tokens)
          sum[t] = dot4(w4, *reinterpret_cast<const float4*>(v + static_cast<int64_t>(t) * plan.total), sum[t]);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int o = 1; o < kRowLanes; o *= 2) sum[t] += __shfl_xor_sync(~0u, sum[t], o);
      if (sub == 0 && t < tokens) sums[r * kStride + t] += sum[t];
    }
  }
  __syncthreads();
  for (int o = threadIdx.x; o < kRows * tokens; o += WARPS * kLanes) {
    const int row = row0 + o % kRows, token = o / kRows;
    float v = sums[o % kRows * kStride + token];
    if (bias) v += to_float(bias[row]);
    y[static_cast<int64_t>(token) * N + row] = from_acc<T>(v);
  }
}

struct DecodeArgs {
  const void* x;
  int tokens;
  const Nf4Params& w;
  int shift2;
  const void* bias;
  const MixtureArgs& mix;
  const MixturePlan& plan;
  float* middle;
  void* y;
  cudaStream_t stream;
};

template <typename T, typename TF, int MT, int NT, int WARPS, bool kMixture>
cudaError_t launch_main(const DecodeArgs& d) {
  constexpr int kBytes = decode_bytes<MT, NT, WARPS>();
  auto* kernel = decode_kernel<T, TF, MT, NT, WARPS, kMixture>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(d.w.N / (16 * MT)));
  config.blockDim = dim3(WARPS * kLanes);
  config.dynamicSmemBytes = kBytes;
  config.stream = d.stream;
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  int device, major;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  config.attrs = &overlap;
  config.numAttrs = kMixture && major >= 9 ? 1 : 0;
  const Factors<TF> f = {static_cast<const TF*>(d.mix.A), static_cast<const TF*>(d.mix.B), d.mix.alpha};
  return cudaLaunchKernelEx(&config, kernel, static_cast<const T*>(d.x), d.tokens, d.w, d.shift2,
                            static_cast<const T*>(d.bias), f, d.plan, static_cast<const float*>(d.middle),
                            static_cast<T*>(d.y));
}

template <typename T, typename TF>
cudaError_t decode_with_mixture(const DecodeArgs& d) {
  const Factors<TF> f = {static_cast<const TF*>(d.mix.A), static_cast<const TF*>(d.mix.B), d.mix.alpha};
  const dim3 grid(static_cast<unsigned>(d.plan.blocks), static_cast<unsigned>(d.tokens));
  mixture_stage1_kernel<T, TF>
      <<<grid, kStage1Threads, 0, d.stream>>>(static_cast<const T*>(d.x), static_cast<int>(d.w.K), f, d.plan, d.middle);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  if (d.tokens <= 8) return launch_main<T, TF, 1, 1, 8, true>(d);
  return d.w.N % 32 == 0 ? launch_main<T, TF, 2, 2, 16, true>(d) : launch_main<T, TF, 1, 2, 8, true>(d);
}

template <typename T>
cudaError_t decode(const DecodeArgs& d) {
  if (d.plan.r > 0)
    return d.mix.factor_dtype == Dtype::kF32 ? decode_with_mixture<T, float>(d) : decode_with_mixture<T, T>(d);
  if (d.tokens <= 8) return launch_main<T, float, 1, 1, 8, false>(d);
  if (d.w.N % 32 == 0) {
    if (d.tokens <= 16) return launch_main<T, float, 2, 2, 16, false>(d);
    if (d.tokens <= 32) return launch_main<T, float, 2, 4, 16, false>(d);
    return launch_main<T, float, 2, 8, 16, false>(d);
  }
  return d.tokens <= 16 ? launch_main<T, float, 1, 2, 8, false>(d) : launch_main<T, float, 1, 8, 8, false>(d);
}

}  // namespace

bool decode_supports(const Nf4Params& w) {
  const bool pow2 = w.absmax || (w.blocksize2 > 0 && (w.blocksize2 & (w.blocksize2 - 1)) == 0);
  return w.blocksize == kBlock && pow2 && w.K % kChunk == 0 && w.N % 16 == 0 && w.N > 0 && w.K > 0 && w.N < INT32_MAX &&
         w.K < INT32_MAX && aligned(w.packed, 8);
}

bool decode_supports(const MixtureArgs& mix) {
  const KronParams& p = mix.shapes;
  if (p.r > kMaxDecodeComponents || !aligned(mix.A, 16) || !aligned(mix.B, 16)) return false;
  const MixturePlan plan = plan_mixture(p);
  bool ok = true;
  int units = 0;
  for (int i = 0; i < plan.r; ++i) {
    const Component& c = plan.c[i];
    ok = ok && c.na % 4 == 0 && c.nb % 4 == 0 && c.a_offset % 4 == 0 && c.b_offset % 4 == 0;
    units += plan.half[i].length / 4;
  }
  return ok && units <= kMaxUnits;
}

int64_t decode_scratch(const KronParams& mixture, int64_t tokens) {
  return mixture.r > 0 ? plan_mixture(mixture).total * tokens : 0;
}

cudaError_t launch_decode(const void* x, Dtype dtype, int64_t tokens, const Nf4Params& w, const void* bias,
                          const MixtureArgs& mix, float* scratch, void* y, cudaStream_t stream) {
  if (tokens == 0 || w.N == 0) return cudaSuccess;
  if (tokens > (mix.shapes.r ? kMaxDecodeTokensMixture : kMaxDecodeTokens)) return cudaErrorInvalidValue;
  const MixturePlan plan = plan_mixture(mix.shapes);
  int shift2 = 0;
  while (!w.absmax && (int64_t{1} << shift2) < w.blocksize2) ++shift2;
  const DecodeArgs d = {x, static_cast<int>(tokens), w, shift2, bias, mix, plan, scratch, y, stream};
  return dtype == Dtype::kBF16 ? decode<__nv_bfloat16>(d) : decode<__half>(d);
}

}  // namespace moka::cuda
