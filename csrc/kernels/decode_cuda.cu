// The few-token kernels; see decode_cuda.h.
//
// decode_kernel: W x on tensor cores, with the codes decoded in registers by a 256-entry table of pairs, one copy per
// shared-memory bank; block scales are applied to sums over blocks of 64, in fp32; then the mixture's shares and the
// bias are added and y is rounded once. Each launch overlaps the one before it: it fills its table and fetches a
// weight into the L2, and only then waits.
#include "decode_cuda.h"
#include "decode_mixture.cuh"

namespace moka::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kBlock = 64;   // weights per absmax
constexpr int kChunk = 256;  // columns a warp handles at a time: four blocks of each of its rows
constexpr int kTableBytes = 256 * kLanes * 4;
constexpr int kSharedPercent = 44;  // of a multiprocessor's shared memory beside a mixture; the rest caches, on Hopper

// Entry (byte, lane) is the pair of weights that `byte` codes, as two T; rotated writes avoid bank conflicts.
template <typename T>
__device__ void fill_table(uint32_t* table) {
  float code[16] = {MOKA_NF4_CODE};
  const auto halve = [&](int n) {
#pragma unroll
    for (int i = 0; i < n; ++i) code[i] = threadIdx.x & n ? code[i + n] : code[i];
  };
  halve(8), halve(4), halve(2), halve(1);  // now lane i's code[0] is the i-th, and no memory was waited for
  for (int byte = threadIdx.x; byte < 256; byte += blockDim.x) {
    const T pair[2] = {from_acc<T>(__shfl_sync(~0u, code[0], byte >> 4)),
                       from_acc<T>(__shfl_sync(~0u, code[0], byte & 15))};
    const uint32_t v = *reinterpret_cast<const uint32_t*>(pair);
#pragma unroll
    for (int j = 0; j < 8; ++j) reinterpret_cast<uint4*>(table)[byte * 8 + (j + byte) % 8] = make_uint4(v, v, v, v);
  }
}

// The entry for byte `i` of `word`; `table` is the shared address of entry (0, lane).
__device__ __forceinline__ uint32_t look_up(uint32_t table, uint32_t word, int i) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(__byte_perm(word, 0, 0x4440 + i) * (kLanes * 4) + table));
  return v;
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
        for (int b = 0; b < 4; ++b) codes[m][h][b] = __ldcg(reinterpret_cast<const uint2*>(p + b * (kBlock / 2)));
        const int64_t block = r * (K / kBlock) + chunk * 4 + quad;
        if (w.absmax) {
          absmax[m][h] = __ldcg(w.absmax + block);
        } else {
          code[m][h] = __ldcg(w.absmax_q + block);
          absmax[m][h] = __ldcg(w.absmax2 + (block >> shift2));
        }
      }
  }
};

template <int MT, int NT, int WARPS>
__host__ __device__ constexpr int decode_bytes() {
  const int reduction = WARPS * 16 * MT * (8 * NT + 1) * 4;
  return (reduction > kTableBytes ? reduction : kTableBytes) + 256 * 4;
}

// One thread block computes 16 MT rows of y for up to 8 NT tokens, which blockIdx.x and blockIdx.y name; its warps
// share out K. With a mixture the launch before is mixture_kernel, which lets this one start once the kernels before
// it are complete: x may be read then, past the L1, but not yet the shares.
template <typename T, int MT, int NT, int WARPS, bool kMixture>
__global__ void __launch_bounds__(WARPS* kLanes, WARPS* MT == 8    ? 2
                                                 : WARPS * MT == 4 ? 4
                                                                   : 1)
    decode_kernel(const T* x, int tokens, const __grid_constant__ Nf4Params w, int shift2, const T* bias,
                  const float* shares, int components, const int32_t* adapter, bool prefetch, T* y) {
  extern __shared__ __align__(16) uint8_t smem[];
  constexpr int kRows = 16 * MT, kStride = 8 * NT + 1;
  uint32_t* table = reinterpret_cast<uint32_t*>(smem);
  float* sums = reinterpret_cast<float*>(smem);  // [WARPS][kRows][kStride], after the table's last use
  float* code2 = reinterpret_cast<float*>(smem + decode_bytes<MT, NT, WARPS>() - 256 * 4);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, quad = lane % 4;
  const int K = static_cast<int>(w.K), N = static_cast<int>(w.N), row0 = blockIdx.x * kRows;
  const int token0 = blockIdx.y * 8 * NT, count = min(8 * NT, tokens - token0);
  const int chunks = K / kChunk;

  Fragment<MT> next;
  if (kMixture) let_next_start();
  if (prefetch) prefetch_rows(w, shift2, row0, kRows);
  fill_table<T>(table);
  // The kernel in front may have written the weight. With a mixture that is the mixture's, which let this one start
  // only after everything in front of it had ended.
  if (!kMixture) wait_for_previous();
  if (warp < chunks) next.load(w, row0 + g, warp, shift2, quad);
  const bool nested = w.absmax == nullptr;
  const float offset = nested ? __ldcg(w.offset) : 0.f;
  if (nested)
    for (int i = threadIdx.x; i < 256; i += blockDim.x) code2[i] = __ldcg(w.code2 + i);
  __syncthreads();

  if (!kMixture) let_next_start();
  const uint32_t table_lane = shared_address(table + lane);
  x += static_cast<int64_t>(token0 + g) * K + quad * 16;
  float acc[MT][NT][4] = {};
  for (int chunk = warp; chunk < chunks; chunk += WARPS) {
    const Fragment<MT> now = next;
    if (chunk + WARPS < chunks) next.load(w, row0 + g, chunk + WARPS, shift2, quad);
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
            a[m][byte / 2][byte % 2 * 2 + h] = look_up(table_lane, word, byte % 4);
          }
      float row_scale[MT][2];
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) row_scale[m][h] = __shfl_sync(~0u, scale[m][h], (lane & ~3) + b);
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        uint32_t xs[8] = {};
        if (t * 8 + g < count) {
          const uint4* p = reinterpret_cast<const uint4*>(x + int64_t{t} * 8 * K + chunk * kChunk + b * kBlock);
          const uint4 lo = kMixture ? __ldcg(p) : p[0], hi = kMixture ? __ldcg(p + 1) : p[1];
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
  if (kMixture) wait_for_previous();
  for (int o = threadIdx.x; o < kRows * count; o += WARPS * kLanes) {
    const int r = o % kRows, t = o / kRows;
    const int64_t at = static_cast<int64_t>(token0 + t) * N + row0 + r;
    float v = 0.f;
    if (kMixture && !(adapter && __ldcg(adapter + token0 + t) < 0)) {
      float share[kMaxDecodeComponents];  // all are under way before the first is used
#pragma unroll
      for (int i = 0; i < kMaxDecodeComponents; ++i)
        share[i] = i < components ? __ldcg(shares + static_cast<int64_t>(i) * tokens * N + at) : 0.f;
#pragma unroll
      for (int i = 0; i < kMaxDecodeComponents; ++i) v += share[i];
    }
#pragma unroll
    for (int k = 0; k < WARPS; ++k) v += sums[(k * kRows + r) * kStride + t];
    if (bias) v += to_float(bias[row0 + r]);
    y[at] = from_acc<T>(v);
  }
}

struct DecodeArgs {
  const void* x;
  int tokens;
  const Nf4Params& w;
  int shift2 = 0;
  const void* bias;
  const MixtureArgs& mix;
  const MixturePlan& plan;
  float* shares;
  void* y;
  cudaStream_t stream;
  bool overlapping = can_overlap();
  int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);

  DecodeArgs(const void* x, int64_t tokens, const Nf4Params& w, const void* bias, const MixtureArgs& mix,
             const MixturePlan& plan, float* shares, void* y, cudaStream_t stream)
      : x(x),
        tokens(static_cast<int>(tokens)),
        w(w),
        bias(bias),
        mix(mix),
        plan(plan),
        shares(shares),
        y(y),
        stream(stream) {
    while (!w.absmax && (int64_t{1} << shift2) < w.blocksize2) ++shift2;
  }
  bool prefetches() const { return overlapping && w.N * w.K / 2 <= kPrefetchBytes; }
};

template <typename... Params, typename... Args>
cudaError_t launch(const DecodeArgs& d, void (*kernel)(Params...), dim3 grid, int threads, int bytes, Args... args) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && d.plan.r)  // two kernels share a multiprocessor only if they divide its memory alike
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, kSharedPercent);
  if (error != cudaSuccess) return error;
  return launch_overlapping(kernel, grid, threads, bytes, d.stream, d.overlapping, args...);
}

template <typename T, typename TF>
cudaError_t launch_mixture(const DecodeArgs& d) {
  const Factors<TF> f = {static_cast<const TF*>(d.mix.A), static_cast<const TF*>(d.mix.B), d.mix.alpha};
  const Adapters adapters = {d.mix.adapter, d.mix.a_stride, d.mix.b_stride};
  const int fetchers = d.prefetches() ? kPrefetchBlocks : 0;
  const dim3 grid(static_cast<unsigned>(fetchers + d.plan.blocks * d.tokens));
  return launch(d, mixture_kernel<T, TF>, grid, kMixtureThreads, mixture_bytes(d.plan, sizeof(TF)),
                static_cast<const T*>(d.x), d.tokens, f, adapters, d.plan, d.w, d.shift2, fetchers, d.shares);
}

template <typename T, int MT, int NT, int WARPS>
cudaError_t launch_main(const DecodeArgs& d) {
  constexpr bool kMixture = WARPS > 4;  // four warps are for a weight alone
  auto* kernel =
      kMixture && d.plan.r ? decode_kernel<T, MT, NT, WARPS, kMixture> : decode_kernel<T, MT, NT, WARPS, false>;
  const dim3 grid(static_cast<unsigned>(d.w.N / (16 * MT)), static_cast<unsigned>(ceil_div(d.tokens, 8 * NT)));
  return launch(d, kernel, grid, WARPS * kLanes, decode_bytes<MT, NT, WARPS>(), static_cast<const T*>(d.x), d.tokens,
                d.w, d.shift2, static_cast<const T*>(d.bias), d.shares, d.plan.r, d.mix.adapter,
                d.prefetches() && !d.plan.r, static_cast<T*>(d.y));
}

template <typename T>
cudaError_t shares(const DecodeArgs& d) {
  return d.mix.factor_dtype == Dtype::kF32 ? launch_mixture<T, float>(d) : launch_mixture<T, T>(d);
}

template <typename T>
cudaError_t decode(const DecodeArgs& d) {
  if (d.plan.r > 0) {
    const cudaError_t error = shares<T>(d);
    if (error != cudaSuccess) return error;
  }
  // H100: 16 warps halve the time of a thread block, which pays where there is one per multiprocessor at most; two row
  // tiles read x half as often.
  const int64_t row_tiles = d.w.N / 16;
  const bool few_rows = row_tiles <= d.multiprocessors;
  // H200: of thread blocks that come in several waves, smaller ones take turns more evenly
  if (!d.plan.r && row_tiles > 4 * d.multiprocessors && d.tokens <= 16)
    return d.tokens <= 8 ? launch_main<T, 1, 1, 4>(d) : launch_main<T, 1, 2, 4>(d);
  if (d.tokens <= 8) return few_rows ? launch_main<T, 1, 1, 16>(d) : launch_main<T, 1, 1, 8>(d);
  if (few_rows) return launch_main<T, 1, 2, 16>(d);
  return d.w.N % 32 == 0 ? launch_main<T, 2, 2, 8>(d) : launch_main<T, 1, 2, 8>(d);
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
  const int vector = mix.factor_dtype == Dtype::kF32 ? 4 : 8;  // entries in 16 bytes
  bool ok = true;
  for (int i = 0; i < plan.r; ++i) {
    const KronComponent& c = p.components[i];
    ok = ok && c.na % vector == 0 && c.nb % vector == 0 && c.a_offset % vector == 0 && c.b_offset % vector == 0;
  }
  ok = ok && mix.a_stride % vector == 0 && mix.b_stride % vector == 0;
  return ok && p.K < (1 << 20) &&
         mixture_bytes(plan, 16 / vector) <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

int64_t decode_scratch(const KronParams& mixture, int64_t tokens) { return mixture.r * mixture.N * tokens; }

cudaError_t launch_shares(const void* x, Dtype dtype, int64_t tokens, const Nf4Params& w, const MixtureArgs& mix,
                          float* scratch, cudaStream_t stream) {
  const MixturePlan plan = plan_mixture(mix.shapes);
  const DecodeArgs d(x, tokens, w, nullptr, mix, plan, scratch, nullptr, stream);
  return dtype == Dtype::kBF16 ? shares<__nv_bfloat16>(d) : shares<__half>(d);
}

cudaError_t launch_decode(const void* x, Dtype dtype, int64_t tokens, const Nf4Params& w, const void* bias,
                          const MixtureArgs& mix, float* scratch, void* y, cudaStream_t stream) {
  if (tokens == 0 || w.N == 0) return cudaSuccess;
  if (tokens > kMaxDecodeTokens) return cudaErrorInvalidValue;
  const MixturePlan plan = plan_mixture(mix.shapes);
  const DecodeArgs d(x, tokens, w, bias, mix, plan, scratch, y, stream);
  return dtype == Dtype::kBF16 ? decode<__nv_bfloat16>(d) : decode<__half>(d);
}

}  // namespace moka::cuda
