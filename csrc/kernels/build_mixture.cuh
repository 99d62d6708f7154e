// The periodic build kernel: a base plus a mixture, on tensor cores.
//
// Rows n and n + period_n of W share every ib, columns k and k + period_k every jb. So in a cell of phases that lies
// in one entry of every A_i, the mixture is a product: entry (phase, macro position) is the sum over i of
// alpha_i B_i[phase] times A_i[macro position]. A warp keeps the left operand of its cell, 64 phases, in registers,
// and multiplies it by the A's of eight macro columns at a time.
//
// The tensor cores take bf16, so each operand is a sum of kParts bf16 numbers, and every product of parts that
// matters is added, the smallest first: two parts are 2^-17 off, enough before a result of 16 bits, three 2^-25.
#pragma once

#include "build_output.cuh"

namespace moka::cuda {

constexpr int kMaxPeriodic = 12;  // components

// low and high, as sums of bf16 pairs.
template <int kParts>
__device__ __forceinline__ void split(float low, float high, uint32_t (&parts)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    parts[i] = pack_bf16(low, high);
    low -= __uint_as_float(parts[i] << 16);
    high -= __uint_as_float(parts[i] & 0xffff0000u);
  }
}

// A lane's share of the operands: components lane % 4 + 4 i, i < kShare; those beyond r repeat component 0, B = 0. In
// the product, group lane / 4 is a row and an octet of columns of the cell on the left, a macro column on the right;
// tile m holds columns 2 m and 2 m + 1 of the octets, so that a lane ends up with whole octets, in macro columns
// 2 (lane % 4) and 2 (lane % 4) + 1.
template <typename TF, int kShare, int kParts, bool kIdentity>
struct Operands {
  uint32_t left[kParts][4][4];
  int at[kShare];  // of A's entry of this lane: macro row 0, macro column lane / 4

  // The lane's octet begins at phases (p0 + row, q0 + column), in a cell that begins at (p0, q0).
  __device__ void load(const Factors<TF>& f, const Components& comps, unsigned p0, unsigned q0, int row, int column) {
    float v[4][8] = {};
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const Component& c = comps.c[threadIdx.x % 4 + 4 * i];
      const unsigned ia = p0 / static_cast<unsigned>(c.mb), ja = q0 / static_cast<unsigned>(c.nb);
      load_b8<kIdentity>(f, c, p0 + row - ia * c.mb, q0 + column - ja * c.nb, v[i]);
      at[i] = c.a_offset + ia * c.na + ja + threadIdx.x % kLanes / 4 * c.a_column_step;
    }
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int n = threadIdx.x % 4 + 4 * i;
      const float alpha = n < comps.r ? f.alpha[n] : 0.f;
#pragma unroll
      for (int c = 0; c < 8; ++c) v[i][c] *= alpha;
    }
#pragma unroll
    for (int c = 0; c < 8; ++c)
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t parts[kParts];
        split(v[2 * pair][c], v[2 * pair + 1][c], parts);
#pragma unroll
        for (int k = 0; k < kParts; ++k) left[k][c / 2][pair * 2 + c % 2] = parts[k];
      }
  }
};

template <typename T, typename TF, int kShare, bool kIdentity, class Base>
__global__ void __launch_bounds__(kBuildThreads, Base::kMixtureBlocks)
    mixture_kernel(Base base, Factors<TF> f, const __grid_constant__ Components comps, const Walk walk, T* out,
                   const __grid_constant__ CUtensorMap map) {
  constexpr int kParts = sizeof(T) == 2 ? 2 : 3;
  extern __shared__ __align__(StageOutput<T>::kAlign) uint8_t smem[];
  const int lane = threadIdx.x % kLanes, group = lane / 4, t = lane % 4;
  const int row = group >> walk.shift, cell = threadIdx.x / kLanes * (8 << walk.shift);
  const int column = cell + group % (1 << walk.shift) * 8;
  const int part = blockIdx.x / walk.blocks, block = blockIdx.x % walk.blocks;
  const int p = block / walk.tiles * walk.rows(), q = block % walk.tiles * walk.columns();  // the first phase
  const int64_t to_block = static_cast<int64_t>(p) * walk.K + q;
  const int64_t to_lane = to_block + static_cast<int64_t>(row) * walk.K + 2 * t * walk.period_k + column;
  typename Base::Lane mine = base.lane(walk, row, column, 2 * t);

  // What moves A's entry of a component on by a macro row and by a macro column.
  __shared__ int2 steps[kMaxPeriodic];
  if (threadIdx.x < kMaxPeriodic)
    steps[threadIdx.x] = {comps.c[threadIdx.x].a_row_step, comps.c[threadIdx.x].a_column_step};

  // This block's share of the stages. Three are under way to shared memory while one is worked on.
  const int begin = static_cast<int>(int64_t{walk.stages} * part / walk.parts);
  const int end = static_cast<int>(int64_t{walk.stages} * (part + 1) / walk.parts);
  Stage now = {begin / walk.chunks, begin % walk.chunks * kStageSteps}, ahead = now;
  auto fetch = [&](int s) {
    const int steps = s < end ? walk.macro_columns - ahead.J : 0;
    base.fetch(smem, (s - begin) % kBuffers, mine, to_block + ahead.first_entry(walk), steps);
    ahead.advance(walk);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  base.fill(smem);
  wait_for_previous();
  fetch(begin);
  fetch(begin + 1);

  // A's entries of a stage: macro columns lane / 4 and 8 on, this lane's components
  Operands<TF, kShare, kParts, kIdentity> operands;
  float a[2][kShare];
  auto load_a = [&](const Stage& s) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int2 step = steps[t + 4 * i];
      const int at = operands.at[i] + s.I * step.x + s.J * step.y;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int J = s.J + 8 * half + group;
        a[half][i] = 0.f;
        if (J >= walk.macro_columns || t + 4 * i >= comps.r) continue;
        const Component& c = comps.c[t + 4 * i];
        if (kIdentity && c.identity == Identity::kA)
          a[half][i] = (s.I * walk.period_n + p) / c.mb == (J * walk.period_k + q + cell) / c.nb;
        else
          a[half][i] = to_float(__ldg(f.A + (at + 8 * half * step.y)));
      }
    }
  };
  __syncthreads();
  operands.load(f, comps, p, q + cell, row, column - cell);
  load_a(now);
  base.finish_fetch(smem, 0, mine);
  fetch(begin + 2);

  const StageOutput<T> output(smem + Base::kSharedBytes, walk, row, column, 2 * t);
  Stage before = now;
  for (int s = begin; s < end; ++s) {
    const int buffer = (s - begin) % kBuffers, parity = (s - begin) % 2, to_send = (s - begin) % output.kBuffers;
    asm volatile("cp.async.wait_group 2;" ::: "memory");
    output.finish();
    __syncthreads();  // stage s is there, and nobody reads stage s - 1 any more, whose results are all there
    if (s > begin) output.send(map, (s - begin - 1) % output.kBuffers, before, walk, p, q);
    if (output.kSends && output.kBuffers == 1) {
      output.wait_until_read();
      __syncthreads();
    }
    base.finish_fetch(smem, parity ^ 1, mine);
    fetch(s + 3);

    uint32_t right[2][2][kParts];  // [half][components t and t + 4, or t + 8]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      split(a[half][0], kShare > 1 ? a[half][1 % kShare] : 0.f, right[half][0]);
      split(kShare > 2 ? a[half][2 % kShare] : 0.f, 0.f, right[half][1]);
    }
    Stage next = now;
    next.advance(walk);
    if (s + 1 < end) load_a(next);
    const int64_t to = to_lane + now.first_entry(walk);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bool inside[2];
      typename Base::Entries entries[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        inside[e] = now.J + 8 * half + 2 * t + e < walk.macro_columns;
        entries[e] = base.read(smem, buffer, parity, mine, half, e, inside[e], to + (8 * half + e) * walk.period_k);
      }
      float sum[4][4] = {};
#pragma unroll
      for (int order = kParts - 1; order >= 0; --order)
#pragma unroll
        for (int k = 0; k <= order; ++k)
#pragma unroll
          for (int m = 0; m < 4; ++m)
            mma<__nv_bfloat16>(sum[m], operands.left[k][m], right[half][0][order - k], right[half][1][order - k]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float v[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) v[c] = sum[c / 2][c % 2 * 2 + e];
        base.add(entries[e], smem, v);
        if (output.kSends)
          output.put(to_send, half, e, v);
        else if (inside[e])
          store8(out + to + (8 * half + e) * walk.period_k, v);
      }
    }
    before = now;
    now = next;
  }
  output.finish();
  __syncthreads();
  output.send(map, (end - begin - 1) % output.kBuffers, before, walk, p, q);
  output.wait_until_read();
}

}  // namespace moka::cuda
