// The mixture beside a few-token product: every component's share of y, by a kernel of its own.
//
// A component works on slices that need nothing of each other. With A first, slice ia computes the row
// v[jb] = alpha sum_ja A[ia, ja] X[ja, jb] and from it mb outputs y[ia, ib] = sum_jb B[ib, jb] v[jb]; with B first,
// slice ib computes v[ja] = alpha sum_jb B[ib, jb] X[ja, jb] and y[ia, ib] = sum_ja A[ia, ja] v[ja]. A thread block
// takes 16 slices of one token or two, both halves on tensor cores in tf32, which holds 16-bit activations exactly.
// What both halves read is loaded before the first one starts, as far as there is room.
#pragma once

#include <algorithm>

#include "decode_operands.cuh"

namespace moka::cuda {

constexpr int kMaxDecodeComponents = 16;
constexpr int kMaxDecodeEntries = 1 << 28;  // of a factor, whose bytes, two components' together, are an int
constexpr int kMixtureThreads = 256;        // of at most 128 registers, half of what a multiprocessor has
constexpr int kSlices = 16;                 // per thread block
constexpr int kPrefetchBlocks = 128;        // thread blocks that only fetch the weight for the kernel that follows
constexpr int kPrefetchBytes = 18 << 20;    // more would leave the L2 before it is read

// Fetches into the L2 the 16-byte units that hold these bytes.
__device__ __forceinline__ void prefetch_l2(const void* p, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uintptr_t from = reinterpret_cast<uintptr_t>(p) & ~uintptr_t{15};
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes + 15) & ~uintptr_t{15};
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(static_cast<int>(end - from)) : "memory");
#endif
}
// The thread block fetches rows of the weight, and what their scales need, into the L2. That is allowed before the
// kernels in front are complete: what they write, they write to the L2 too.
__device__ __forceinline__ void prefetch_rows(const Nf4Params& w, int shift2, int64_t row, int rows) {
  const int64_t blocks = w.K / 64, block = row * blocks;
  const int thread = threadIdx.x, count = static_cast<int>(rows * blocks);
  if (thread % 32 == 0) {  // a warp issues these one lane after another
    const int64_t bytes = rows * (w.K / 2), warps = blockDim.x / 32, warp = thread / 32;
    const int64_t from = bytes * warp / warps & ~int64_t{15}, end = bytes * (warp + 1) / warps & ~int64_t{15};
    prefetch_l2(w.packed + row * (w.K / 2) + from, static_cast<int>(end - from));
  }
  const int last = blockDim.x - 1 - thread;  // lanes of the last warp
  if (w.absmax) {
    if (last == 0) prefetch_l2(w.absmax + block, count * 4);
  } else {
    if (last == 0) prefetch_l2(w.absmax_q + block, count);
    if (last == 1)
      prefetch_l2(w.absmax2 + (block >> shift2), (((block + count - 1) >> shift2) - (block >> shift2) + 1) * 4);
    if (last == 2) prefetch_l2(w.code2, 256 * 4);
    if (last == 3) prefetch_l2(w.offset, 4);
  }
}

// One of `parts` thread blocks, the first ones, that fetch the whole weight.
__device__ __forceinline__ void prefetch_part(const Nf4Params& w, int shift2, int parts) {
  const int N = static_cast<int>(w.N), each = static_cast<int>(ceil_div(N, parts)), row = blockIdx.x * each;
  if (row < N) prefetch_rows(w, shift2, row, min(each, N - row));
}

// One component, or two of one shape: `first` [slices, terms] contracts x, `second` [rows, middle] what comes of it.
struct Half {
  int a_first, identity;  // identity: `first` is
  int slices, terms, middle, rows;
  int count, component[2];
  int first_offset[2], second_offset[2];  // of the factors
  int x_term, x_middle;                   // steps in x
  int y_slice, y_row;                     // steps in y
  int first_block;
};

struct MixturePlan {
  int r, groups, blocks;
  Half half[kMaxDecodeComponents];
  bool many;  // mixture_many_kernel's: components of one shape share a group, two at a time
};

// Floats between the slices of v: a multiple of 16, odd times that against bank conflicts.
__host__ __device__ constexpr int middle_stride(int middle) { return (middle + 15) / 16 * 16 | 16; }

// Pieces of the second factor that a warp loads before the first half. For several tokens fewer, so that the thread
// block fits beside one of the decode kernel.
__host__ __device__ constexpr int pieces_ahead(int tokens) { return 4 / tokens; }

// How many warps share 16 columns of v, each taking some of the terms: a power of two.
__host__ __device__ constexpr int term_parts(int middle) {
  const int tiles = (middle + 15) / 16;
  return tiles < kMixtureThreads / 32 ? kMixtureThreads / 32 / tiles : 1;
}

inline MixturePlan plan_mixture(const KronParams& p, bool many) {
  MixturePlan plan;
  plan.many = many;
  plan.r = static_cast<int>(p.r);
  plan.groups = plan.blocks = 0;
  for (int i = 0; i < plan.r; ++i) {
    const KronComponent& c = p.components[i];
    const int ma = static_cast<int>(c.ma), na = static_cast<int>(c.na), mb = static_cast<int>(c.mb);
    const int nb = static_cast<int>(c.nb), a = static_cast<int>(c.a_offset), b = static_cast<int>(c.b_offset);
    bool a_first = c.ma * c.nb * (c.na + c.mb) <= c.na * c.mb * (c.nb + c.ma);
    if (c.identity != Identity::kNone) a_first = c.identity == Identity::kA;
    const int identity = c.identity != Identity::kNone;
    const Half own = a_first ? Half{1, identity, ma, na, nb, mb, 1, {i, i}, {a, a}, {b, b}, nb, 1, mb, 1, plan.blocks}
                             : Half{0, identity, mb, nb, na, ma, 1, {i, i}, {b, b}, {a, a}, 1, nb, 1, mb, plan.blocks};
    int g = many ? 0 : plan.groups;
    const auto takes = [&](const Half& h) {
      return h.count == 1 && h.a_first == own.a_first && h.slices == own.slices && h.terms == own.terms &&
             h.middle == own.middle && h.rows == own.rows;
    };
    while (g < plan.groups && !takes(plan.half[g])) ++g;
    if (g < plan.groups) {
      Half& h = plan.half[g];
      h.count = 2, h.component[1] = i;
      h.first_offset[1] = own.first_offset[0], h.second_offset[1] = own.second_offset[0];
      continue;
    }
    plan.half[plan.groups++] = own;
    plan.blocks += static_cast<int>(ceil_div(own.slices, kSlices));
  }
  return plan;
}

// Which token has which adapter: the factors of adapter i start i strides further, and its alphas i times r. A token
// of a negative adapter has none. A null `of_token`: one adapter for all.
struct Adapters {
  const int32_t* of_token;
  int64_t a_stride, b_stride;
};

// shares [r, tokens, N]. kVector: na, nb and where factors begin are multiples of 16 bytes. After `fetchers` thread
// blocks that only prefetch the weight, each names kTokens tokens, of one adapter, a component and its slices.
template <typename T, typename TF, int kTokens, bool kVector>
__global__ void __launch_bounds__(kMixtureThreads, 2)
    mixture_kernel(const T* x, int tokens, Factors<TF> f, Adapters adapters, const __grid_constant__ MixturePlan plan,
                   const __grid_constant__ Nf4Params w, int shift2, int fetchers, float* shares) {
  extern __shared__ __align__(16) uint8_t smem[];
  constexpr int kWarps = kMixtureThreads / 32, kPiece = kMixtureThreads * 4, kAhead = pieces_ahead(kTokens);
  TF* const ahead = reinterpret_cast<TF*>(smem) + threadIdx.x * 4;  // [kAhead, 2, threads, 4], each thread's own
  // [kTokens, parts, kSlices, stride]
  float* const v = reinterpret_cast<float*>(smem + kAhead * 2 * kPiece * sizeof(TF));
  if (static_cast<int>(blockIdx.x) < fetchers) {
    prefetch_part(w, shift2, fetchers);
    return;
  }
  const int thread = threadIdx.x, warp = thread / 32, g = thread % 32 / 4, quad = thread % 4;
  const int token = (blockIdx.x - fetchers) / plan.blocks * kTokens, block = (blockIdx.x - fetchers) % plan.blocks;
  const int own = min(kTokens, tokens - token);
  int i = 0;
  while (i + 1 < plan.groups && block >= plan.half[i + 1].first_block) ++i;
  const Half& h = plan.half[i];
  const int slice0 = (block - h.first_block) * kSlices, slices = min(kSlices, h.slices - slice0);
  const int stride = middle_stride(h.middle), parts = term_parts(h.middle), tiles = (h.middle + 15) / 16;
  const int steps = (h.terms + 15) / 16, row_tiles = (h.rows + 15) / 16;
  const TF* first = (h.a_first ? f.A : f.B) + h.first_offset[0] + static_cast<int64_t>(slice0) * h.terms;
  const TF* second = (h.a_first ? f.B : f.A) + h.second_offset[0];
  const float* alpha_of = f.alpha + i;
  x += static_cast<int64_t>(token) * w.K;

  // only caches may be touched before the kernels before this one are complete
  if (thread == 0 && !adapters.of_token) {
    if (!h.identity) prefetch_l2(first, slices * h.terms * static_cast<int>(sizeof(TF)));
    prefetch_l2(second, h.rows * h.middle * static_cast<int>(sizeof(TF)));
    prefetch_l2(alpha_of, 4);
  }
  wait_for_previous();
  let_next_start();
  if (adapters.of_token) {
    const int64_t adapter = adapters.of_token[token];
    if (adapter < 0) return;  // the decode kernel leaves these shares out
    first += adapter * (h.a_first ? adapters.a_stride : adapters.b_stride);
    second += adapter * (h.a_first ? adapters.b_stride : adapters.a_stride);
    alpha_of += adapter * plan.r;
  }
  const float alpha = *alpha_of;

  // this warp's pieces of the second factor: 16 middle terms of 16 rows, tile after tile
  const int pieces = warp < row_tiles ? (row_tiles - warp + kWarps - 1) / kWarps * tiles : 0;
  int load_row = warp * 16 + g, load_term = quad * 4;
  const TF* load = second + load_row * h.middle + load_term;
  const auto load_ahead = [&](int count) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (j >= count) break;
      const bool here = load_term < h.middle, low = here && load_row < h.rows, high = here && load_row + 8 < h.rows;
      copy4_async<kVector>(ahead + j * 2 * kPiece, low ? load : second, low, h.middle - load_term);
      copy4_async<kVector>(ahead + (j * 2 + 1) * kPiece, high ? load + 8 * h.middle : second, high,
                           h.middle - load_term);
      load_term += 16, load += 16;
      if (load_term < tiles * 16) continue;
      load_term -= tiles * 16, load_row += kWarps * 16;
      load += kWarps * 16 * h.middle - tiles * 16;
    }
  };
  load_ahead(pieces);

  const int64_t x_step[3] = {h.a_first ? h.x_term : 2, h.a_first ? 2 * h.x_term : h.x_middle,
                             h.a_first ? 3 * h.x_term : h.x_middle + 2};
  for (int item = warp; item < own * tiles * parts && !h.identity; item += kWarps) {
    const int of = item / (tiles * parts), rest = item - of * tiles * parts;
    const int part = rest & (parts - 1), column = (rest >> (31 - __clz(parts))) * 16;
    int term = part * 16 + quad * 4;
    const TF* row = first + g * h.terms + term;
    const T* from = x + of * w.K + static_cast<int64_t>(term) * h.x_term + (column + 2 * g) * h.x_middle;
    const int columns = h.middle - column - 2 * g;
    const bool inside = column + 2 * g < h.middle;
    float even[4] = {}, odd[4] = {};
    for (int step = part; step < steps; step += 2 * parts) {
      Rows<kVector> a[2];
      Columns<T> b[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool here = term < h.terms;
        a[j].load(row, 8 * h.terms, here && g < slices, here && g + 8 < slices, h.terms - term);
        if (kVector)
          b[j].load(from, x_step, here && inside);
        else
          b[j].load(from, h.x_term, h.x_middle, h.terms - term, columns);
        term += parts * 16, row += parts * 16, from += parts * 16 * h.x_term;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint4 low = tf32(a[j].low), high = tf32(a[j].high);
        mma_tf32(even, low, high, b[j].column(!kVector || h.a_first, 0));
        mma_tf32(odd, low, high, b[j].column(!kVector || h.a_first, 1));
      }
    }
    float4* to = reinterpret_cast<float4*>(v + ((of * parts + part) * kSlices + g) * stride + column + quad * 4);
    to[0] = make_float4(even[0], odd[0], even[1], odd[1]);
    to[2 * stride] = make_float4(even[2], odd[2], even[3], odd[3]);
  }
  __syncthreads();
  static_assert(kMixtureThreads == 16 * kSlices);
  const int slice = thread / 16;
  for (int item = thread % 16; item < own * tiles * 4; item += 16) {
    const int of = item / (tiles * 4), column = (item - of * tiles * 4) * 4;
    float4* to = reinterpret_cast<float4*>(v + (of * parts * kSlices + slice) * stride + column);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    if (!h.identity) {
      for (int part = 0; part < parts; ++part) {
        const float4 add = to[part * kSlices * stride / 4];
        sum.x += add.x, sum.y += add.y, sum.z += add.z, sum.w += add.w;
      }
    } else if (slice < slices && column < h.middle) {
      const T* from = x + of * w.K + (slice0 + slice) * h.x_term + column * h.x_middle;
      const auto at = [&](int i) { return kVector || column + i < h.middle ? to_float(from[i * h.x_middle]) : 0.f; };
      sum = make_float4(at(0), at(1), at(2), at(3));
    }
    sum = make_float4(alpha * sum.x, alpha * sum.y, alpha * sum.z, alpha * sum.w);
    *reinterpret_cast<uint4*>(to) = tf32(sum);
  }
  __syncthreads();

  float* const y = shares + (static_cast<int64_t>(i) * tokens + token) * w.N + slice0 * h.y_slice;
  const int column = quad * 4;  // of 16 slices, the first of this lane's four
  const auto store = [&](int of, int row, float4 values) {
    if (row >= h.rows || of >= own) return;
    float* to = y + of * w.N + row * h.y_row + column * h.y_slice;
    if (h.y_slice == 1 && h.slices % 4 == 0) {
      if (column < slices) *reinterpret_cast<float4*>(to) = values;
      return;
    }
    if (column < slices) to[0] = values.x;
    if (column + 1 < slices) to[h.y_slice] = values.y;
    if (column + 2 < slices) to[2 * h.y_slice] = values.z;
    if (column + 3 < slices) to[3 * h.y_slice] = values.w;
  };
  const float* from = v + (g / 2 * 4 + g % 2) * stride + quad * 4;  // column g of the first product; + 2: the second
  float low[kTokens][4] = {}, high[kTokens][4] = {};
  int tile = warp, step = 0;
  for (int piece = 0; piece < pieces; piece += kAhead) {
    if (piece) load_ahead(pieces - piece);
    wait_for_copies();  // this thread's own
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (piece + j >= pieces) break;
      const uint4 a_low = tf32(load4(ahead + j * 2 * kPiece)), a_high = tf32(load4(ahead + (j * 2 + 1) * kPiece));
#pragma unroll
      for (int of = 0; of < kTokens; ++of) {  // what is of no token is not stored
        const float* at = from + of * parts * kSlices * stride + step * 16;
        mma_tf32(low[of], a_low, a_high, *reinterpret_cast<const uint4*>(at));
        mma_tf32(high[of], a_low, a_high, *reinterpret_cast<const uint4*>(at + 2 * stride));
      }
      if (++step < tiles) continue;
#pragma unroll
      for (int of = 0; of < kTokens; ++of) {
        store(of, tile * 16 + g, make_float4(low[of][0], low[of][1], high[of][0], high[of][1]));
        store(of, tile * 16 + g + 8, make_float4(low[of][2], low[of][3], high[of][2], high[of][3]));
#pragma unroll
        for (int e = 0; e < 4; ++e) low[of][e] = high[of][e] = 0.f;
      }
      step = 0, tile += kWarps;
    }
  }
}

// Bytes of shared memory that the kernel needs for factors of so many bytes an entry, and so many tokens at a time.
inline int mixture_bytes(const MixturePlan& plan, int entry, int tokens) {
  int bytes = 0;
  for (int i = 0; i < plan.groups; ++i) {
    const int middle = plan.half[i].middle;
    bytes = std::max(bytes, term_parts(middle) * kSlices * middle_stride(middle) * 4);
  }
  return bytes * tokens + pieces_ahead(tokens) * 2 * kMixtureThreads * 4 * entry;
}

}  // namespace moka::cuda
