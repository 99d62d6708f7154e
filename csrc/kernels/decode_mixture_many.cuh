// The mixture beside a product with more than a few tokens, in bf16: as mixture_kernel, but a thread block takes its 16
// slices of several tokens and of two components of one shape, which leave one share. All of what it multiplies is in
// shared memory, in bf16, before it starts, so that it waits for memory once; v is rounded to bf16 too. Its loops are
// rolled where they can be: code that runs once costs more to fetch than to run.
#pragma once

#include "decode_mixture.cuh"

namespace moka::cuda {

__host__ __device__ constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// A matrix of rows of `pitch` bytes in shared memory, its units of 16 bytes swizzled so that those of one column of
// eight rows lie in different banks.
struct Swizzled {
  uint32_t base;
  int pitch, shift;

  __device__ __forceinline__ Swizzled(uint32_t base, int pitch) : base(base), pitch(pitch), shift(3) {
    if ((pitch & (pitch - 1)) == 0 && pitch > 128) shift = 31 - __clz(pitch) - 4;
  }
  __device__ __forceinline__ uint32_t at(int offset) const { return base + (offset ^ (offset >> shift & 0x70)); }
};

// Four consecutive factor entries, the first `count` of them, in bf16. kVector: all four or none, by one load. The
// loads stay where they are: the compiler would delay each until its result is stored, and wait for one after the
// other.
template <typename TF, bool kVector>
struct Four {
  uint32_t bits[4];

  static __device__ __forceinline__ uint32_t entry(const float* p) {
    uint32_t v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
  }
  static __device__ __forceinline__ uint32_t entry(const __nv_bfloat16* p) {
    uint16_t v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
  }
  __device__ __forceinline__ void load(const TF* p, int count) {
    if (!kVector) {
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[i] = i < count ? entry(p + i) : 0;
    } else if (sizeof(TF) == 4) {
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
                   : "l"(p));
    } else {
      asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(bits[0]), "=r"(bits[1]) : "l"(p));
    }
  }
  __device__ __forceinline__ uint2 bf16() const {
    if (sizeof(TF) == 4)
      return make_uint2(pack_bf16(__uint_as_float(bits[0]), __uint_as_float(bits[1])),
                        pack_bf16(__uint_as_float(bits[2]), __uint_as_float(bits[3])));
    return kVector ? make_uint2(bits[0], bits[1]) : make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
  }
};

// One store of four numbers; the compiler makes four of it to save moves.
__device__ __forceinline__ void store16(float* to, float a, float b, float c, float d) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// Where things are in a thread block's shared memory, in bytes.
struct ManyLayout {
  int first, second, v, end;  // after x
  int first_bytes, second_bytes;

  __host__ __device__ ManyLayout(const Half& h, int K, int tokens) {
    first_bytes = kSlices * round_up(h.terms, 16) * 2;
    second_bytes = round_up(h.rows * round_up(h.middle, 16) * 2, 128);
    first = round_up(tokens * K * 2, 128);
    second = first + h.count * first_bytes;
    v = second + h.count * second_bytes;
    end = v + tokens * h.count * round_up(h.middle, 16) * kSlices * 2;
  }
};

// Both factors of the group's components to shared memory, a part of the threads each, their columns padded with zeros
// to multiples of 16. kVector: rows begin at multiples of four entries.
template <typename TF, bool kVector>
__device__ __forceinline__ void stage_factors(const Half& h, const ManyLayout& at, int slices, const TF* factor1,
                                              const TF* factor2, uint8_t* smem) {
  constexpr int kBatch = kVector ? 16 : 4;  // fours under way
  const int each = kMixtureThreads >> h.count, part = threadIdx.x / each, thread = threadIdx.x % each;
  const int c = part & (h.count - 1), second = part >> (h.count - 1);
  const TF* from = second ? factor2 + h.second_offset[c] : factor1 + h.first_offset[c];
  const int rows = second ? h.rows : slices, columns = second ? h.middle : h.terms;
  const int across = round_up(columns, 16) / 4;  // fours
  const Swizzled to(shared_address(smem) + (second ? at.second + c * at.second_bytes : at.first + c * at.first_bytes),
                    across * 8);
  int row = thread / across, four = thread - row * across;
  const int row_step = each / across, four_step = each - row_step * across;
#pragma unroll 1
  for (int left = (rows * across - thread + each - 1) / each; left > 0; left -= kBatch) {
    Four<TF, kVector> r[kBatch];
    int offset[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int column = kVector ? min(four * 4, columns - 4) : four * 4;
      r[i].load(from + min(row, rows - 1) * columns + column, columns - column);
      offset[i] = (row * across + four) * 8 | (four * 4 < columns ? 0 : 1);
      row += row_step, four += four_step;
      if (four >= across) four -= across, ++row;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t keep = offset[i] % 2 == 0 ? ~0u : 0;
      const uint2 two = r[i].bf16();
      if (i < left)
        asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to.at(offset[i] & ~1)), "r"(two.x & keep),
                     "r"(two.y & keep)
                     : "memory");
    }
  }
}

// The thread block's slices of a group, of tokens that are in shared memory: what else they need is loaded, multiplied
// and stored at y, of the first token. Of 16 slices and 16 rows, those that mma has as rows are g and g + 8, those that
// it has as columns, in two products, g / 2 * 4 + g % 2 and two more, which leaves a lane four neighbouring ones of
// them.
template <int kTokens, bool kAFirst>
__device__ __forceinline__ void multiply(int own, int K, const Half& h, const ManyLayout& at, int slices,
                                         const float (&alpha)[2], uint8_t* smem, float* y, int64_t N) {
  constexpr int kWarps = kMixtureThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
  const int matrix = lane / 8, in_matrix = lane % 8, spread = in_matrix / 2 * 4 + in_matrix % 2;
  const uint32_t shared = shared_address(smem);
  const int tiles = (h.middle + 15) / 16, row_tiles = (h.rows + 15) / 16, steps = (h.terms + 15) / 16;
  const int x_rows = kAFirst ? h.terms : h.middle, x_pitch = (kAFirst ? h.middle : h.terms) * 2;

  // [kTokens, count, tiles, lanes]: what a lane has of 16 slices and 16 columns is what it needs of them as 16 terms
  uint4* const v = reinterpret_cast<uint4*>(smem + at.v) + lane;
  const Swizzled x(shared, x_pitch);
#pragma unroll 1
  for (int item = warp; item < h.count * kTokens * tiles; item += kWarps) {
    const int of = item % kTokens, c = item / kTokens & (h.count - 1), tile = item / kTokens >> (h.count - 1);
    if (of >= own) continue;
    const Swizzled first(shared + at.first + c * at.first_bytes, steps * 32);
    int slice_at = (kAFirst ? matrix % 2 * 8 + in_matrix : spread + matrix % 2 * 2) * first.pitch + matrix / 2 * 16;
    const int n = tile * 16 + matrix / 2 * 8, x_at = of * x_rows * x_pitch;  // past the end, the last ones again
    const int row_at = x_at + min(n + in_matrix, x_rows - 1) * x_pitch, unit_at = min(n * 2, x_pitch - 16);
    int k = matrix % 2 * 8;
    float d[2][4] = {};
#pragma unroll 4
    for (int step = 0; step < steps; ++step) {
      uint32_t a[4], b[4];
      load_matrices<false>(a, first.at(slice_at));
      load_matrices<kAFirst>(b, x.at(kAFirst ? x_at + min(k + in_matrix, x_rows - 1) * x_pitch + unit_at
                                             : row_at + min(k * 2, x_pitch - 16)));
      mma<__nv_bfloat16>(d[0], a, b[0], b[1]);
      mma<__nv_bfloat16>(d[1], a, b[2], b[3]);
      slice_at += 32, k += 16;
    }
    const float s = c ? alpha[1] : alpha[0];
    v[((of * h.count + c) * tiles + tile) * 32] =
        make_uint4(pack_bf16(s * d[0][0], s * d[0][1]), pack_bf16(s * d[0][2], s * d[0][3]),
                   pack_bf16(s * d[1][0], s * d[1][1]), pack_bf16(s * d[1][2], s * d[1][3]));
  }
  __syncthreads();

  // A warp takes tiles of 16 rows; where there are few, several warps take one and share out the tokens.
  int share = 1;
#pragma unroll 1
  while (share < kTokens && 2 * share * row_tiles <= kWarps) share *= 2;
  const int each = kTokens / share, begin = warp % share * each, of_token = h.count * tiles * 32;
  const int factor_row = kAFirst ? spread + matrix / 2 * 2 : matrix % 2 * 8 + in_matrix;
  const int unit = (kAFirst ? matrix % 2 : matrix / 2) * 16;
#pragma unroll 1
  for (int tile = warp / share; tile < row_tiles; tile += kWarps / share) {
    float low[kTokens][4] = {}, high[kTokens][4] = {};
    const uint4* from = v + begin * of_token;
#pragma unroll 1
    for (int c = 0; c < h.count; ++c) {
      const Swizzled second(shared + at.second + c * at.second_bytes, tiles * 32);
      int second_at = min(tile * 16 + factor_row, h.rows - 1) * second.pitch + unit;
#pragma unroll 1
      for (int step = 0; step < tiles; ++step, from += 32, second_at += 32) {
        uint32_t f[4];
        load_matrices<false>(f, second.at(second_at));
#pragma unroll
        for (int of = 0; of < kTokens; ++of) {  // what is of no token is not stored
          if (of >= each) break;
          const uint4 terms = from[of * of_token];
          if (kAFirst) {
            const uint32_t a[4] = {terms.x, terms.y, terms.z, terms.w};
            mma<__nv_bfloat16>(low[of], a, f[0], f[1]);
            mma<__nv_bfloat16>(high[of], a, f[2], f[3]);
          } else {
            mma<__nv_bfloat16>(low[of], f, terms.x, terms.z);
            mma<__nv_bfloat16>(high[of], f, terms.y, terms.w);
          }
        }
      }
    }
    // four neighbouring rows of a slice, or slices of a row
    const int major = kAFirst ? g : tile * 16 + g, minor = (kAFirst ? tile * 16 : 0) + quad * 4;
    const int majors = kAFirst ? slices : h.rows, major_step = kAFirst ? h.y_slice : h.y_row;
    float* to = y + begin * N + major * major_step + minor;
#pragma unroll
    for (int of = 0; of < kTokens; ++of, to += N) {
      if (of >= min(each, own - begin) || minor >= (kAFirst ? h.rows : slices)) break;
      if (major < majors) store16(to, low[of][0], low[of][1], high[of][0], high[of][1]);
      if (major + 8 < majors) store16(to + 8 * major_step, low[of][2], low[of][3], high[of][2], high[of][3]);
    }
  }
}

// shares [groups, tokens, N]. After `fetchers` thread blocks that only prefetch the weight, each names kTokens tokens,
// a group of components and its slices. kVector: na, nb and where factors begin are multiples of 16 bytes.
template <typename TF, int kTokens, bool kVector>
__global__ void __launch_bounds__(kMixtureThreads, 2)
    mixture_many_kernel(const __nv_bfloat16* x, int tokens, Factors<TF> f, const __grid_constant__ MixturePlan plan,
                        const __grid_constant__ Nf4Params w, int shift2, int fetchers, float* shares) {
  extern __shared__ __align__(16) uint8_t smem[];
  if (static_cast<int>(blockIdx.x) < fetchers) {
    prefetch_part(w, shift2, fetchers);
    return;
  }
  const int token = (blockIdx.x - fetchers) / plan.blocks * kTokens, block = (blockIdx.x - fetchers) % plan.blocks;
  const int own = min(kTokens, tokens - token), K = static_cast<int>(w.K), thread = threadIdx.x;
  int i = 0;
  while (i + 1 < plan.groups && block >= plan.half[i + 1].first_block) ++i;
  const Half& h = plan.half[i];
  const int slice0 = (block - h.first_block) * kSlices, slices = min(kSlices, h.slices - slice0);
  const TF* first = (h.a_first ? f.A : f.B) + static_cast<int64_t>(slice0) * h.terms;
  const TF* second = h.a_first ? f.B : f.A;

  // only caches may be touched before the kernels before this one are complete
  if (thread < h.count) {
    prefetch_l2(first + h.first_offset[thread], slices * h.terms * static_cast<int>(sizeof(TF)));
    prefetch_l2(second + h.second_offset[thread], h.rows * h.middle * static_cast<int>(sizeof(TF)));
  }
  wait_for_previous();
  let_next_start();

  const ManyLayout at(h, K, kTokens);
  const Swizzled to(shared_address(smem), (h.a_first ? h.middle : h.terms) * 2);
#pragma unroll 1
  for (int u = thread; u < own * (K / 8); u += kMixtureThreads)
    copy_async16(to.at(u * 16), x + static_cast<int64_t>(token) * K + u * 8, 16);
  const float alpha[2] = {f.alpha[h.component[0]], f.alpha[h.component[1]]};
  stage_factors<TF, kVector>(h, at, slices, first, second, smem);
  wait_for_copies();
  __syncthreads();
  float* y = shares + (static_cast<int64_t>(i) * tokens + token) * w.N + slice0 * h.y_slice;
  if (h.a_first)
    multiply<kTokens, true>(own, K, h, at, slices, alpha, smem, y, w.N);
  else
    multiply<kTokens, false>(own, K, h, at, slices, alpha, smem, y, w.N);
}

// Bytes of shared memory that the kernel needs for so many tokens at a time.
inline int many_bytes(const MixturePlan& plan, int64_t K, int tokens) {
  int bytes = 0;
  for (int i = 0; i < plan.groups; ++i)
    bytes = std::max(bytes, ManyLayout(plan.half[i], static_cast<int>(K), tokens).end);
  return bytes;
}

}  // namespace moka::cuda
