// The few-token kernels' launches and what they support; see decode_cuda.h.
#include "decode_cuda.h"
#include "decode_linear.cuh"
#include "decode_mixture_many.cuh"

namespace moka::cuda {
namespace {

// Percent of what a multiprocessor divides between shared memory and cache. Two kernels share one only if they divide
// it alike; mixtures gain from the cache. H200.
constexpr int kSharedPercent = 100;  // two thread blocks of the decode kernel
constexpr int kMixturePercent = 72;  // one, beside those of a mixture
constexpr int kSharesPercent = 44;   // mixture_kernel's, with another kernel to follow

// H200: for up to so many tokens mixture_kernel is faster, and mixture_many_kernel is where a thread block of it has
// room beside one of the decode kernel.
constexpr int kFewTokens = 4;
constexpr int kManyBytes = 88 << 10;

int most_shared() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// For mixture_many_kernel, if that takes the mixture within `room` bytes: x in units of 16 bytes, y by fours. Else for
// mixture_kernel.
MixturePlan choose_plan(Dtype dtype, int64_t tokens, const MixtureArgs& mix, int room) {
  const KronParams& p = mix.shapes;
  bool many = dtype == Dtype::kBF16 && tokens > kFewTokens && !mix.adapter && p.r > 0;
  for (int64_t i = 0; i < p.r; ++i) {
    const KronComponent& c = p.components[i];
    many = many && c.identity == Identity::kNone && c.nb % 8 == 0 && c.mb % 4 == 0;
  }
  const MixturePlan plan = plan_mixture(p, many);
  return many && many_bytes(plan, p.K, 2) > room ? plan_mixture(p, false) : plan;
}

struct DecodeArgs {
  const void* x;
  int tokens;
  const Nf4Params& w;
  int shift2 = 0;
  const void* bias;
  const MixtureArgs& mix;
  MixturePlan plan;
  float* shares;
  void* y;
  cudaStream_t stream;
  bool overlapping = can_overlap();
  int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  int optin = most_shared();
  bool pairs;      // of row tiles per thread block
  int per_device;  // thread blocks of the decode kernel, for one group of tokens
  int percent;

  // room: bytes of shared memory that mixture_many_kernel may take
  DecodeArgs(const void* x, Dtype dtype, int64_t tokens, const Nf4Params& w, const void* bias, const MixtureArgs& mix,
             int room, float* shares, void* y, cudaStream_t stream)
      : x(x),
        tokens(static_cast<int>(tokens)),
        w(w),
        bias(bias),
        mix(mix),
        plan(choose_plan(dtype, tokens, mix, room)),
        shares(shares),
        y(y),
        stream(stream) {
    while (!w.absmax && (int64_t{1} << shift2) < w.blocksize2) ++shift2;
    // Two row tiles read x half as often; a weight of few rows is spread over more thread blocks.
    pairs = w.N % 32 == 0 && w.N / 16 > multiprocessors && resident(decode_bytes<2>()) == 2;
    // H200: one thread block per multiprocessor lets the next launch begin beside it; if there is more to do than that,
    // twice the warps gain more.
    const int64_t tiles = w.N / (pairs ? 32 : 16);
    const int most = multiprocessors * (pairs ? 2 : resident(decode_bytes<1>()));
    per_device = static_cast<int>(tiles < most ? tiles : most);
    percent = plan.r && tiles <= multiprocessors ? kMixturePercent : kSharedPercent;
  }
  // Thread blocks of so much shared memory that a multiprocessor holds, of the two that its registers allow.
  static int resident(int bytes) {
    constexpr int kReserved = 1024;  // per thread block, by the system
    return 2 * (bytes + kReserved) <= device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) ? 2 : 1;
  }
  // Whether so many of its rows are fetched ahead.
  bool prefetches(int64_t rows) const { return overlapping && rows * w.K / 2 <= kPrefetchBytes; }
  // Thread blocks of a mixture's kernel that do so with all of them.
  int fetchers() const { return prefetches(w.N) ? kPrefetchBlocks : 0; }
  // Thread blocks of a mixture's kernel that takes so many tokens at a time.
  dim3 mixture_grid(int each) const {
    return dim3(static_cast<unsigned>(fetchers() + plan.blocks * ceil_div(tokens, each)));
  }

  template <typename TF>
  Factors<TF> factors() const {
    return {static_cast<const TF*>(mix.A), static_cast<const TF*>(mix.B), mix.alpha};
  }
};

template <typename... Params, typename... Args>
cudaError_t launch(const DecodeArgs& d, void (*kernel)(Params...), dim3 grid, int threads, int bytes, Args... args) {
  // the most there is: other threads may launch the kernel with other sizes
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, d.optin);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, d.percent);
  if (error != cudaSuccess) return error;
  return launch_overlapping(kernel, grid, threads, bytes, d.stream, d.overlapping, args...);
}

// Whether mixture_kernel may load factors and x by vectors.
bool is_vector(const MixtureArgs& mix) {
  const int entries = mix.factor_dtype == Dtype::kF32 ? 4 : 8;  // in 16 bytes
  bool ok = aligned(mix.A, 16) && aligned(mix.B, 16) && mix.a_stride % entries == 0 && mix.b_stride % entries == 0;
  for (int64_t i = 0; i < mix.shapes.r; ++i) {
    const KronComponent& c = mix.shapes.components[i];
    ok = ok && c.na % entries == 0 && c.nb % entries == 0 && c.a_offset % entries == 0 && c.b_offset % entries == 0;
  }
  return ok;
}

template <typename T, typename TF, int kTokens>
cudaError_t launch_mixture(const DecodeArgs& d) {
  const Adapters adapters = {d.mix.adapter, d.mix.a_stride, d.mix.b_stride};
  auto* kernel = is_vector(d.mix) ? mixture_kernel<T, TF, kTokens, true> : mixture_kernel<T, TF, kTokens, false>;
  return launch(d, kernel, d.mixture_grid(kTokens), kMixtureThreads, mixture_bytes(d.plan, sizeof(TF), kTokens),
                static_cast<const T*>(d.x), d.tokens, d.factors<TF>(), adapters, d.plan, d.w, d.shift2, d.fetchers(),
                d.shares);
}

template <typename TF, int kTokens>
cudaError_t launch_many(const DecodeArgs& d) {
  const int bytes = many_bytes(d.plan, d.w.K, kTokens);
  auto* kernel = is_vector(d.mix) ? mixture_many_kernel<TF, kTokens, true> : mixture_many_kernel<TF, kTokens, false>;
  return launch(d, kernel, d.mixture_grid(kTokens), kMixtureThreads, bytes, static_cast<const __nv_bfloat16*>(d.x),
                d.tokens, d.factors<TF>(), d.plan, d.w, d.shift2, d.fetchers(), d.shares);
}

template <typename T, int MT, int NT>
cudaError_t launch_main(const DecodeArgs& d) {
  auto* kernel = d.plan.r ? decode_kernel<T, MT, NT, true> : decode_kernel<T, MT, NT, false>;
  const dim3 grid(static_cast<unsigned>(d.per_device), static_cast<unsigned>(ceil_div(d.tokens, 8 * NT)));
  return launch(d, kernel, grid, kDecodeThreads, decode_bytes<MT>(), static_cast<const T*>(d.x), d.tokens, d.w,
                d.shift2, static_cast<const T*>(d.bias), d.shares, d.plan.groups, d.mix.adapter,
                !d.plan.r && d.prefetches(16 * MT * d.per_device), static_cast<T*>(d.y));
}

// The mixture's kernel. H200: beside the decode kernel mixture_many_kernel takes two tokens at a time, alone four.
template <typename T>
cudaError_t shares(const DecodeArgs& d, bool alone) {
  const bool fp32 = d.mix.factor_dtype == Dtype::kF32;
  if (d.plan.many) {
    if (alone && many_bytes(d.plan, d.w.K, 4) <= d.optin)
      return fp32 ? launch_many<float, 4>(d) : launch_many<__nv_bfloat16, 4>(d);
    return fp32 ? launch_many<float, 2>(d) : launch_many<__nv_bfloat16, 2>(d);
  }
  const bool several = d.tokens > kFewTokens && !d.mix.adapter && mixture_bytes(d.plan, fp32 ? 4 : 2, 2) <= d.optin;
  if (fp32) return several ? launch_mixture<T, float, 2>(d) : launch_mixture<T, float, 1>(d);
  return several ? launch_mixture<T, T, 2>(d) : launch_mixture<T, T, 1>(d);
}

template <typename T>
cudaError_t decode(const DecodeArgs& d) {
  if (d.plan.r > 0) {
    const cudaError_t error = shares<T>(d, false);
    if (error != cudaSuccess) return error;
  }
  if (d.pairs) return d.tokens <= 8 ? launch_main<T, 2, 1>(d) : launch_main<T, 2, 2>(d);
  return d.tokens <= 8 ? launch_main<T, 1, 1>(d) : launch_main<T, 1, 2>(d);
}

}  // namespace

bool decode_supports(const Nf4Params& w) {
  // four blocks, those of a chunk's row, share an absmax2
  const bool nested = w.blocksize2 >= 4 && (w.blocksize2 & (w.blocksize2 - 1)) == 0 && aligned(w.absmax_q, 4);
  const bool scales = w.absmax ? aligned(w.absmax, 16) : nested;
  return w.blocksize == kBlock && scales && w.K % kChunk == 0 && w.N % 16 == 0 && w.N > 0 && w.K > 0 &&
         w.N < INT32_MAX && w.K <= 1 << 24 && aligned(w.packed, 16);
}

bool decode_supports(const MixtureArgs& mix) {
  const KronParams& p = mix.shapes;
  if (p.r > kMaxDecodeComponents || p.K >= 1 << 20) return false;
  const MixturePlan plan = plan_mixture(p, false);
  for (int i = 0; i < plan.groups; ++i)
    if (int64_t{plan.half[i].rows} * plan.half[i].middle > kMaxDecodeEntries) return false;
  return mixture_bytes(plan, mix.factor_dtype == Dtype::kF32 ? 4 : 2, 1) <= most_shared();
}

bool shares_are_fast(Dtype dtype, int64_t tokens, const MixtureArgs& mix) {
  return choose_plan(dtype, tokens, mix, most_shared()).many;
}

int64_t decode_scratch(const KronParams& mixture, int64_t tokens) { return mixture.r * mixture.N * tokens; }

cudaError_t launch_shares(const void* x, Dtype dtype, int64_t tokens, const Nf4Params& w, const MixtureArgs& mix,
                          float* scratch, int* count, cudaStream_t stream) {
  DecodeArgs d(x, dtype, tokens, w, nullptr, mix, most_shared(), scratch, nullptr, stream);
  d.percent = d.plan.many ? kSharedPercent : kSharesPercent;
  *count = d.plan.groups;
  return dtype == Dtype::kBF16 ? shares<__nv_bfloat16>(d, true) : shares<__half>(d, true);
}

cudaError_t launch_decode(const void* x, Dtype dtype, int64_t tokens, const Nf4Params& w, const void* bias,
                          const MixtureArgs& mix, float* scratch, void* y, cudaStream_t stream) {
  if (tokens == 0 || w.N == 0) return cudaSuccess;
  if (tokens > kMaxDecodeTokens) return cudaErrorInvalidValue;
  const DecodeArgs d(x, dtype, tokens, w, bias, mix, kManyBytes, scratch, y, stream);
  return dtype == Dtype::kBF16 ? decode<__nv_bfloat16>(d) : decode<__half>(d);
}

}  // namespace moka::cuda
