// The kernels behind build_cuda.h, included by one source file per kind of base.
#pragma once

#include "build_any.cuh"
#include "build_mixture.cuh"

namespace moka::cuda {

// Periods of the shapes, multiples of n and k, and whether W has whole ones.
struct Periods {
  int n, k;
  bool ok;

  explicit Periods(const KronParams& p, int n = 8, int k = 8 * kLanes) : n(n), k(k) {
    for (int64_t i = 0; i < p.r; ++i) {
      this->n = lcm(this->n, p.components[i].mb);
      this->k = lcm(this->k, p.components[i].nb);
    }
    ok = p.N % this->n == 0 && p.K % this->k == 0;
  }
  static int lcm(int64_t a, int64_t b) {
    int64_t x = a, y = b;
    while (y) {
      const int64_t t = x % y;
      x = y;
      y = t;
    }
    const int64_t m = a / x * b;
    return m > 1 << 20 ? 1 << 20 : static_cast<int>(m);  // larger periods divide nothing here
  }
};

// Slots beyond r, up to `pad`, repeat component 0.
inline Components by_value(const KronParams& p, int period_n = 0, int period_k = 0, int pad = 0) {
  Components out;
  out.r = static_cast<int>(p.r);
  for (int i = 0; i < out.r; ++i) {
    const KronComponent& c = p.components[i];
    const int ma = static_cast<int>(c.ma), na = static_cast<int>(c.na), mb = static_cast<int>(c.mb);
    const int nb = static_cast<int>(c.nb);
    out.c[i] = {ma,
                na,
                mb,
                nb,
                c.identity,
                static_cast<int>(c.a_offset),
                static_cast<int>(c.b_offset),
                period_n / mb * na,
                period_k / nb};
  }
  for (int i = out.r; out.r && i < pad; ++i) out.c[i] = out.c[0];
  return out;
}

inline bool has_identity(const KronParams& p) {
  for (int64_t i = 0; i < p.r; ++i)
    if (p.components[i].identity != Identity::kNone) return true;
  return false;
}

// How mixture_kernel walks W; false when the shapes are not periodic, or too many.
inline bool plan_walk(const KronParams& p, Walk* walk) {
  if (p.r > kMaxPeriodic) return false;
  for (int shift = 2; shift >= 0; --shift) {  // the widest cells that lie in one entry of every A_i
    *walk = {};
    walk->K = static_cast<int>(p.K);
    walk->shift = shift;
    bool cells = true;
    for (int64_t i = 0; i < p.r; ++i)
      cells = cells && p.components[i].nb % (8 << shift) == 0 && p.components[i].mb % (8 >> shift) == 0;
    const Periods period(p, walk->rows(), walk->columns());
    if (!cells || !period.ok) continue;
    walk->period_n = period.n;
    walk->period_k = period.k;
    walk->macro_rows = static_cast<int>(p.N / period.n);
    walk->macro_columns = static_cast<int>(p.K / period.k);
    walk->tiles = period.k / walk->columns();
    walk->blocks = period.n / walk->rows() * walk->tiles;
    walk->chunks = static_cast<int>(ceil_div(walk->macro_columns, kStageSteps));
    walk->stages = walk->macro_rows * walk->chunks;
    return true;
  }
  return false;
}

// Into how many parts the stages go, if so many thread blocks run at once: as few stages as possible one after another.
inline int choose_parts(const Walk& walk, int resident) {
  constexpr int kStart = 3;  // a thread block's start takes as long as so many stages: 4.5 us and 1.5 us on an H200
  int64_t least = INT64_MAX;
  int best = 1;
  for (int parts = 1; parts <= walk.stages && parts <= resident; ++parts) {
    const int64_t rounds = ceil_div(int64_t{walk.blocks} * parts, resident);
    const int64_t time = rounds * (ceil_div(walk.stages, parts) + kStart);
    if (time < least) least = time, best = parts;
  }
  return best;
}

template <typename T, typename TF, class Base>
cudaError_t build_any(Base base, bool vector, const Factors<TF>& f, const MixtureArgs& mix, int N, int K, T* out,
                      cudaStream_t stream) {
  // four columns, where they are of the same entries of all A's, and aligned
  bool four = K % 4 == 0 && aligned(mix.B, 4 * sizeof(TF)) && aligned(out, 4 * sizeof(T));
  for (int64_t i = 0; i < mix.shapes.r; ++i) {
    const KronComponent& c = mix.shapes.components[i];
    four = four && c.nb % 4 == 0 && c.b_offset % 4 == 0;
  }
  const int columns = four ? 4 : 1;
  int resident = 0;
  const cudaError_t error = resident_blocks(any_blocks(columns), &resident);
  if (error != cudaSuccess) return error;
  const int64_t across = ceil_div(K, kBuildThreads * columns), tiles = ceil_div(N, kAnyRows);
  const int64_t down = resident < across ? 1 : resident / across;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down < tiles ? down : tiles));
  auto* kernel = four ? build_any_kernel<T, TF, 4, Base> : build_any_kernel<T, TF, 1, Base>;
  return launch_overlapping(kernel, grid, kBuildThreads, Base::kTableBytes, stream, can_overlap(), base, f,
                            by_value(mix.shapes), N, K, vector, out);
}

template <typename T, typename TF, class Base>
cudaError_t build(Base base, bool vector_base, int64_t N, int64_t K, const MixtureArgs& mix, T* out,
                  cudaStream_t stream) {
  const int64_t numel = N * K;
  if (numel == 0) return cudaSuccess;
  if (mix.shapes.r > kMaxComponents) return cudaErrorInvalidValue;
  const bool vector = vector_base && aligned(out, 16) && aligned(mix.B, 16);
  const Factors<TF> f = {static_cast<const TF*>(mix.A), static_cast<const TF*>(mix.B), mix.alpha};
  Walk walk;
  if constexpr (sizeof(T) <= 4)
    if (vector && plan_walk(mix.shapes, &walk)) {
      int resident = 0;
      cudaError_t error = resident_blocks(Base::kMixtureBlocks, &resident);
      if (error != cudaSuccess) return error;
      auto* kernel = has_identity(mix.shapes) ? mixture_kernel<T, TF, 3, true, Base>
                     : mix.shapes.r <= 4      ? mixture_kernel<T, TF, 1, false, Base>
                                              : mixture_kernel<T, TF, 3, false, Base>;
      using Output = StageOutput<T>;
      const bool hopper = can_overlap();  // which brought bulk tensor copies too
      CUtensorMap map = {};
      if (hopper && !Output::encode(&map, out, N, walk))
        return encode_tiled() ? cudaErrorInvalidValue : cudaErrorNotSupported;
      const int kBytes = Base::kSharedBytes + (hopper ? Output::kBytes : 0);
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      if (error != cudaSuccess) return error;
      walk.parts = choose_parts(walk, resident);
      return launch_overlapping(kernel, dim3(walk.blocks * walk.parts), kBuildThreads, kBytes, stream, hopper, base, f,
                                by_value(mix.shapes, walk.period_n, walk.period_k, kMaxPeriodic), walk, out, map);
    }
  return build_any<T, TF>(base, vector_base, f, mix, static_cast<int>(N), static_cast<int>(K), out, stream);
}

}  // namespace moka::cuda
