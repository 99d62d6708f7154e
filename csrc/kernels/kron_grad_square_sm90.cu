// The square layer's kernel, N = K = 4096: the products of kron_grad_sm90.cuh arranged so that reading shared memory
// does not bound them. m64nNk16 takes N/2 cycles, and N/4 for reading b and 16 for a, unless that is in registers.
//   s = 16: as there, N = 32.
//   s = 32: transposed: (component, s) gives the 64 rows, registers hold F for the first product, and the tiles of T1
//           and T2 are b in both.
//   s = 64: P is at once the register operand of P^T T2^T, one product for each component.
#include "kron_grad_sm90.cuh"

namespace moka::cuda {
namespace {

constexpr int kWidth = 4096;
constexpr int kTokenBytes = kWidth * 2;
constexpr int kRingBytes = 20 * kTokenBytes;
constexpr int kOperandBytes = 6 * kTokenBytes;  // factors and intermediates
constexpr int kMaxSlots = 20;
constexpr int kSmem = kRingBytes + kOperandBytes + (2 * kMaxSlots + 1) * 8;

#ifdef MOKA_SM90

enum class Form { kColumns, kRows, kRegisters };  // of the intermediate in the second product

template <int S>
struct Tile {
  static constexpr Form kForm = S == 16 ? Form::kColumns : S == 32 ? Form::kRows : Form::kRegisters;
  static constexpr int L = kWidth / S;
  static constexpr int kTokens = 64 / S;
  static constexpr int kBytes = kTokens * kTokenBytes;  // of T1, and of T2; a slot of the ring
  static constexpr int kSlots = kRingBytes / kBytes;
  static constexpr int kFactor = kForm == Form::kRows ? 0 : 2 * kTokenBytes;      // bytes of a side's operand
  static constexpr int kMiddle = kForm == Form::kRegisters ? 0 : 2 * S * 64 * 2;  // likewise; there are two
  static_assert(2 * kFactor + 4 * kMiddle <= kOperandBytes);
};

// T2 arrives in rows of 128 bytes, 128-byte swizzled. Read as rows of 2s bytes in the swizzle of that width, its row l
// appears as row line<S>(l), and the other way round.
template <int S>
__device__ __forceinline__ int line(int l) {
  return l ^ (l >> 3 & (64 / S - 1));
}

template <int S>
struct Slot {
  int index, phase = 0;

  __device__ void advance(int by) {
    index += by;
    if (index >= Tile<S>::kSlots) index -= Tile<S>::kSlots, phase ^= 1;
  }
};

// What the slots' copies and readers wait for, and the factors.
struct Barriers {
  uint64_t full[kMaxSlots], empty[kMaxSlots], factors;
};

// One thread. T1 of a tile goes to one slot, T2 to the next. After the first tile the factors have the way free.
template <int S>
__device__ void produce(const CUtensorMap* map1, const CUtensorMap* map2, uint32_t ring, Barriers* barriers, int first,
                        int stride, int tiles) {
  using C = Tile<S>;
  Slot<S> slot{0};
  for (int tile = first; tile < tiles; tile += stride) {
    if (tile == first + stride) barrier_wait(&barriers->factors, 0);
    for (int operand = 0; operand < 2; ++operand) {
      barrier_wait(&barriers->empty[slot.index], slot.phase ^ 1);
      uint64_t* bar = &barriers->full[slot.index];
      barrier_expect(bar, C::kBytes);
      const uint32_t to = ring + slot.index * C::kBytes;
      if (operand) {
        copy_box(to, map2, 0, 0, tile * C::kTokens, bar);
      } else {
#pragma unroll
        for (int c = 0; c < C::L / 64; ++c) copy_box(to + c * kTokenBytes, map1, c * 64, 0, tile * C::kTokens, bar);
      }
      slot.advance(1);
    }
  }
}

// One side's two factors F [L, s] in global memory.
struct FactorPair {
  const void *first, *second;  // the latter null: no such component
  bool fp32, natural;          // natural: stored [s, L]
};

// The factors as an operand [(c, s), L] in shared memory, by one warpgroup; of side 1 with the lines of T2.
template <int S, int kSide, typename TF>
__device__ void place_factors(uint8_t* to, const TF* first, const TF* second, bool natural) {
  constexpr int L = Tile<S>::L;
#pragma unroll 16
  for (int e = threadIdx.x % 128; e < kWidth; e += 128) {
    const float v[2] = {to_float(__ldg(first + e)), second ? to_float(__ldg(second + e)) : 0.f};
    const int f = natural ? e / L : e % S, l = natural ? e % L : e / S;
#pragma unroll
    for (int c = 0; c < 2; ++c)
      *reinterpret_cast<__nv_bfloat16*>(to + swizzled(2 * S, c * S + f, kSide ? line<S>(l) : l)) =
          __float2bfloat16_rn(v[c]);
  }
}

// The same as fragments for the registers of a warpgroup whose rows are (c, s).
template <int S, int kSide, typename TF>
__device__ void load_fragments(uint32_t (&to)[Tile<S>::L / 16][4], const TF* F, bool natural, int row0, int column0) {
  constexpr int L = Tile<S>::L;
  const int row_step = natural ? L : 1, step = natural ? 1 : S;
  const TF* from = F + row0 % S * row_step;
#pragma unroll
  for (int k = 0; k < L / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int l = k * 16 + i / 2 * 8 + column0;
      auto value = [&](int at) {
        return to_float(__ldg(from + i % 2 * 8 * row_step + (kSide ? line<S>(at) : at) * step));
      };
      to[k][i] = pack_bf16(value(l), value(l + 1));
    }
}

// One warpgroup: side 0 computes dF2 from P, 1 computes dF1 from V. Leaves the sums of both components at `out`, like
// the factors' gradients; natural: as [s, L].
template <int S, int kSide>
__device__ void consume(const uint8_t* ring, uint8_t* operands, Barriers* barriers, int tiles,
                        const FactorPair& factors, float* out, bool natural) {
  using C = Tile<S>;
  constexpr int L = C::L, kRows = 2 * S;                    // of the factor and the intermediate as operands: (c, s)
  constexpr int kSwizzle2 = S == 64 ? 1 : S == 32 ? 2 : 3;  // of T2, see line()
  constexpr int kSteps1 = C::kForm == Form::kRows ? L / 16 : 1;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int row0 = warp * 16 + lane / 4, column0 = lane % 4 * 2;  // of a thread's part of an accumulator
  const uint32_t ring_at = shared_address(ring);
  const uint32_t factor_at = shared_address(operands) + kSide * C::kFactor;
  const uint32_t middles = shared_address(operands) + 2 * C::kFactor + kSide * 2 * C::kMiddle;
  uint32_t middle_at;  // two take turns, since a slower warp may still read the last one
  float acc[64], d[C::kForm == Form::kRows ? 32 : S];
  uint32_t factor[kSteps1][4] = {}, middle[8][4];
#pragma unroll
  for (float& v : acc) v = 0.f;
#pragma unroll
  for (float& v : d) v = 0.f;

  auto with_factors = [&](auto* type) {
    auto *first = static_cast<decltype(type)>(factors.first), *second = static_cast<decltype(type)>(factors.second);
    if constexpr (C::kForm == Form::kRows) {
      const auto* F = row0 < S ? first : second;
      if (F) load_fragments<S, kSide>(factor, F, factors.natural, row0, column0);
    } else {
      place_factors<S, kSide>(operands + kSide * C::kFactor, first, second, factors.natural);
    }
  };
  if (factors.fp32) {
    with_factors(static_cast<const float*>(nullptr));
  } else {
    with_factors(static_cast<const __nv_bfloat16*>(nullptr));
  }
  if (lane == 0) barrier_arrive(&barriers->factors);
  if constexpr (C::kForm != Form::kRows) {
    proxy_fence();
    named_barrier(1 + kSide, 128);
  }

  auto first_product = [&](int slot) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < L; k += 16) {
      const uint32_t tile = ring_at + slot * C::kBytes + (kSide ? k * S * 2 : k / 64 * kTokenBytes + k % 64 * 2);
      const uint64_t data =
          kSide ? matrix_descriptor(tile, kTokenBytes, 16 * S, kSwizzle2) : matrix_descriptor(tile, 16, 1024, 1);
      if constexpr (C::kForm == Form::kRows) {
        wgmma<64, kSide>(d, factor[k / 16], data, k > 0);
      } else {
        const uint32_t at = factor_at + k / 64 * kRows * 128 + k % 64 * 2;
        wgmma<kRows, kSide>(d, data, matrix_descriptor(at, 16, 1024, 1), k > 0);
      }
    }
    wgmma_commit();
  };
  auto second_product = [&](int slot) {
    const uint32_t tile = ring_at + slot * C::kBytes;
    auto data = [&](int k, int m) {
      return kSide ? matrix_descriptor(tile + m * kTokenBytes + k * 128, kTokenBytes, 1024, 1)
                   : matrix_descriptor(tile + k / S * kTokenBytes + m * 64 * S * 2 + k % S * 2, 16, 16 * S, kSwizzle2);
    };
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
      const uint64_t p = matrix_descriptor(middle_at + k * 2, 16, 1024, 1);
      if constexpr (C::kForm == Form::kColumns) {
#pragma unroll
        for (int m = 0; m < L / 64; ++m) wgmma<kRows, kSide>(acc + m * S, data(k, m), p, 1);
      } else if constexpr (C::kForm == Form::kRows) {
        wgmma<L, 0, kSide>(acc, p, data(k, 0), 1);
      } else {
#pragma unroll
        for (int c = 0; c < 2; ++c) wgmma<S, kSide>(acc + c * 32, middle[c * 4 + k / 16], data(k, 0), 1);
      }
    }
    wgmma_commit();
  };
  // d, rounded, becomes the operand of the second product
  auto convert = [&] {
    if constexpr (C::kForm == Form::kRegisters) {
#pragma unroll
      for (int i = 0; i < 32; ++i) middle[i / 4][i % 4] = pack_bf16(d[2 * i], d[2 * i + 1]);
    } else {
#pragma unroll
      for (int j = 0; j < (C::kForm == Form::kRows ? 64 : kRows); j += 16) {
        if constexpr (C::kForm == Form::kColumns) {  // row (t, r), column (c, f)
          const int row = warp * 16 + lane % 16, column = j + lane / 16 * 8;
          const int at = swizzled(kRows, column / S * S + row % S, row / S * S + column % S);
          store_matrices(middle_at + at, d + j / 2);
        } else {  // row (c, f), column (t, r)
          const int row = warp * 16 + lane % 16 / 8 * 8, column = j + lane / 16 * 8 + lane % 8;
          const int at = swizzled(kRows, row / S * S + column % S, column / S * S + row % S);
          store_matrices<true>(middle_at + at, d + j / 2);
        }
      }
      proxy_fence();
      named_barrier(1 + kSide, 128);
    }
  };

  Slot<S> f{kSide}, g{1 - kSide};  // operands of the first product and the second
  int held = 0;                    // the slot that the last second product may still read
  auto release = [&](int slot) {
    if (lane == 0) barrier_arrive(&barriers->empty[slot]);
  };
  // For s = 32 the sides take turns at the tensor cores: in step, both would leave them idle at once. A turn is one
  // tile's second product and the next one's first.
  constexpr bool kTurns = C::kForm == Form::kRows;
  constexpr int kOwnTurn = 3 + kSide, kOtherTurn = 4 - kSide;
  if (kTurns && kSide == 1 && tiles > 0) named_barrier_arrive(kOtherTurn, 256);
  for (int tile = 0; tile < tiles; ++tile) {
    barrier_wait(&barriers->full[f.index], f.phase);
    first_product(f.index);
    if (kTurns && tile > 0) named_barrier_arrive(kOtherTurn, 256);
    wgmma_wait<1>();
    if (tile > 0) release(held);
    wgmma_wait<0>();
    release(f.index);
    middle_at = middles + tile % 2 * C::kMiddle;
    convert();
    if (kTurns) named_barrier(kOwnTurn, 256);
    barrier_wait(&barriers->full[g.index], g.phase);
    second_product(g.index);
    held = g.index;
    f.advance(2);
    g.advance(2);
  }
  if (kTurns && kSide == 0 && tiles > 0) named_barrier_arrive(kOtherTurn, 256);
  wgmma_wait<0>();

  // two neighbours: columns l, for s = 16 columns r
  constexpr bool kAlongR = C::kForm == Form::kColumns;
  auto leave = [&](int c, int l, int r, float v0, float v1) {
    const int at = kSide ? l : line<S>(l), index = natural ? r * L + at : at * S + r;
    float* to = out + c * kWidth;
    if (natural != kAlongR) {
      const bool swapped = at % 2 && !kAlongR;
      *reinterpret_cast<float2*>(to + (swapped ? index - 1 : index)) = swapped ? float2{v1, v0} : float2{v0, v1};
    } else {
      to[index] = v0;
      to[kAlongR ? index + L : at % 2 ? index - S : index + S] = v1;
    }
  };
#pragma unroll
  for (int i = 0; i < 64; i += 2) {
    const int row = row0 + i % 4 / 2 * 8;
    if constexpr (C::kForm == Form::kColumns) {
      const int column = i % S / 4 * 8 + column0;
      leave(column / S, i / S * 64 + row, column % S, acc[i], acc[i + 1]);
    } else if constexpr (C::kForm == Form::kRows) {
      leave(row / S, i / 4 * 8 + column0, row % S, acc[i], acc[i + 1]);
    } else {
      leave(i / 32, i % 32 / 4 * 8 + column0, row, acc[i], acc[i + 1]);
    }
  }
}

// kRole: 0 and 1 the sides' warpgroups, 2 the copies'.
template <int S, int kRole>
__device__ void run(const GradLaunch& p, int g, uint8_t* smem, float* partial) {
  const GradGroup& group = p.plan.group[g];
  uint8_t* operands = smem + kRingBytes;
  auto* barriers = reinterpret_cast<Barriers*>(operands + kOperandBytes);
  const int tiles = static_cast<int>(ceil_div(p.M, Tile<S>::kTokens));
  const int first = blockIdx.x - group.cta_begin, stride = group.cta_count;
  if constexpr (kRole == 2) {
    let_next_start();
    if (threadIdx.x % 128 == 0) produce<S>(&p.t1[g], &p.t2[g], shared_address(smem), barriers, first, stride, tiles);
  } else {
    const int own = first < tiles ? (tiles - first + stride - 1) / stride : 0;
    const bool natural = kRole == group.mirrored;  // the gradient, stored [s, L]; then the factor is not
    const auto& F = kRole == 0 ? p.f1[g] : p.f2[g];
    float* out = partial + blockIdx.x * p.plan.slab + kRole * 2 * kWidth;
    const FactorPair factors = {F[0], F[1], p.factor_fp32, !natural};
    consume<S, kRole>(smem, operands, barriers, own, factors, out, natural);
  }
}

template <int kRole>
__device__ void run(const GradLaunch& p, uint8_t* smem, float* partial) {
  int g = 0;
  while (g + 1 < p.plan.count && static_cast<int>(blockIdx.x) >= p.plan.group[g + 1].cta_begin) ++g;
  switch (p.plan.group[g].shape) {
    case 0:
      return run<16, kRole>(p, g, smem, partial);
    case 1:
      return run<32, kRole>(p, g, smem, partial);
    default:
      return run<64, kRole>(p, g, smem, partial);
  }
}

#endif  // MOKA_SM90

__global__ void __launch_bounds__(kGradThreads, 1)
    kron_grad_square_kernel(const __grid_constant__ GradLaunch p, float* partial) {
#ifdef MOKA_SM90
  extern __shared__ __align__(1024) uint8_t smem[];
  if (threadIdx.x == 0) {
    auto* barriers = reinterpret_cast<Barriers*>(smem + kRingBytes + kOperandBytes);
    for (int s = 0; s < kMaxSlots; ++s) {
      barrier_init(&barriers->full[s], 1);
      barrier_init(&barriers->empty[s], 8);  // one arrival for each warp that reads
    }
    barrier_init(&barriers->factors, 8);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  wait_for_previous();
  if (threadIdx.x < 128) {
    set_registers_up<232>();
    run<0>(p, smem, partial);
  } else if (threadIdx.x < 256) {
    set_registers_up<232>();
    run<1>(p, smem, partial);
  } else {
    set_registers_down<40>();
    run<2>(p, smem, partial);
  }
#endif
}

}  // namespace

cudaError_t launch_grad_square(const GradLaunch& p, int sms, float* partial, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kron_grad_square_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem);
  if (error != cudaSuccess) return error;
  return launch_overlapping(kron_grad_square_kernel, dim3(sms), kGradThreads, kSmem, stream, true, p, partial);
}

}  // namespace moka::cuda
