// The NF4 product on Hopper's tensor cores; see nf4_gemm_sm90.h.
//
// The transposed product, y^T = W x^T: a thread block computes 64 or 128 rows of W for a tile of tokens. Warpgroups of
// 64 rows each read packed codes from shared memory, decode them by a table of pairs in fp32, scale and round them once
// (so that they are the numbers a dense copy would hold) straight into the register operand of wgmma; x is the other
// operand. One more warp streams codes and x through two rings of bulk copies. The warpgroups and a cluster of thread
// blocks share out K; their sums meet through distributed shared memory, in a fixed order.
#include "decode_cuda.h"
#include "nf4_gemm_sm90.cuh"
#include "nf4_gemm_sm90.h"
#include "tensor_map.h"

namespace moka::cuda {
namespace {

constexpr int kBlock = 64;   // weights per absmax, and columns of x per stage
constexpr int kChunk = 256;  // columns of W per stage: 128 bytes
constexpr int kWStages = 4;

// TOKENS of a tile; ROWS / 64 times SPLIT warpgroups, which share out the rows and the blocks of a chunk.
template <int TOKENS, int ROWS, int SPLIT>
struct Tile {
  static constexpr int kConsumers = ROWS / 64 * SPLIT * 128;
  static constexpr int kThreads = kConsumers + 128;  // registers go by warpgroup, so the copying warp has its own
  static constexpr int kWBytes = ROWS * kChunk / 2, kXBytes = TOKENS * kBlock * 2;  // of a stage
  static constexpr int kXStages = 128 * 1024 / kXBytes > 16 ? 16 : 128 * 1024 / kXBytes;
  static constexpr int kPitch = ROWS + 4;  // floats per token of the sums, which take the rings' place
  static constexpr int kRings = kWStages * kWBytes + kXStages * kXBytes;
  static constexpr int kBytes = kRings + kTableBytes + 16 * (kWStages + kXStages);
  static_assert(SPLIT * TOKENS * kPitch * 4 <= kRings && kXStages >= SPLIT);
};

struct GemmLaunch {
  CUtensorMap codes;  // [N, K / 2] bytes in boxes of 128 x 128
  CUtensorMap x;      // [M, K] in boxes of TOKENS x 64
  Nf4Params w;
  int tokens, shift2, chunks;  // log2 of blocksize2; K / kChunk
  const void* bias;
  Shares shares;
  void* y;
};

#ifdef MOKA_SM90

constexpr int kBlocks = kChunk / kBlock;

__device__ __forceinline__ int first_chunk(const GemmLaunch& p, int rank) {
  return static_cast<int>(rank * static_cast<unsigned>(p.chunks) / gridDim.x);
}

// The block scales of a thread's two rows, a chunk at a time: lane q of four holds those of the chunk's block q.
struct Scales {
  int block, to_second;
  float absmax[2];  // fp32 absmax, or absmax2 of a nested one
  uint8_t code[2];

  __device__ Scales(const GemmLaunch& p, int row, int chunk, int quad) {
    block = ((row < p.w.N ? row : 0) * p.chunks + chunk) * kBlocks + quad;
    to_second = row + 8 < p.w.N ? 8 * p.chunks * kBlocks : 0;
  }
  __device__ void load_next(const GemmLaunch& p) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int b = block + h * to_second;
      if (p.w.absmax) {
        absmax[h] = __ldg(p.w.absmax + b);
      } else {
        code[h] = __ldg(p.w.absmax_q + b);
        absmax[h] = __ldg(p.w.absmax2 + (b >> p.shift2));
      }
    }
    block += kBlocks;
  }
};

template <int TOKENS, int ROWS, int SPLIT>
__device__ void produce(const GemmLaunch& p, uint8_t* smem, uint64_t* w_full, uint64_t* x_full) {
  using C = Tile<TOKENS, ROWS, SPLIT>;
  uint64_t *w_empty = w_full + kWStages, *x_empty = x_full + C::kXStages;
  uint8_t* x_ring = smem + kWStages * C::kWBytes;
  int w_stage = 0, w_phase = 0, x_stage = 0, x_phase = 0;
  const int begin = first_chunk(p, blockIdx.x), end = first_chunk(p, blockIdx.x + 1);
  auto codes = [&](int chunk) {
    if (chunk >= end) return;
    barrier_wait(&w_empty[w_stage], w_phase ^ 1);
    barrier_expect(&w_full[w_stage], C::kWBytes);
    copy_box(smem + w_stage * C::kWBytes, &p.codes, chunk * (kChunk / 2), blockIdx.y * ROWS, &w_full[w_stage]);
    if (++w_stage == kWStages) w_stage = 0, w_phase ^= 1;
  };
  codes(begin);
  for (int chunk = begin; chunk < end; ++chunk) {
    codes(chunk + 1);
    for (int b = 0; b < kBlocks; ++b) {
      barrier_wait(&x_empty[x_stage], x_phase ^ 1);
      barrier_expect(&x_full[x_stage], C::kXBytes);
      copy_box(x_ring + x_stage * C::kXBytes, &p.x, chunk * kChunk + b * kBlock, blockIdx.z * TOKENS, &x_full[x_stage]);
      if (++x_stage == C::kXStages) x_stage = 0, x_phase ^= 1;
    }
  }
}

// One warpgroup: its 64 rows' sums over chunks begin to end.
template <int TOKENS, int ROWS, int SPLIT, typename T>
__device__ void consume(const GemmLaunch& p, const uint8_t* smem, const float2* table, const float* code2,
                        uint64_t* w_full, uint64_t* x_full, float (&d)[TOKENS / 2]) {
  using C = Tile<TOKENS, ROWS, SPLIT>;
  uint64_t *w_empty = w_full + kWStages, *x_empty = x_full + C::kXStages;
  const int warpgroup = threadIdx.x / 128, part = warpgroup / (ROWS / 64);
  const int lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
  const int row_in_tile = warpgroup % (ROWS / 64) * 64 + threadIdx.x % 128 / 32 * 16 + g;
  const uint32_t my_table = shared_address(table + lane % kCopies);
  const uint32_t x_ring = shared_address(smem) + kWStages * C::kWBytes;
  const uint8_t* my_codes = smem + row_in_tile * 128;
  const uint32_t select = 0x4440 + quad;  // byte `quad` of a word, alone
  const bool nested = p.w.absmax == nullptr;
  const float offset = nested ? __ldg(p.w.offset) : 0.f;

#pragma unroll
  for (int i = 0; i < TOKENS / 2; ++i) {
    d[i] = 0.f;
    asm volatile("" : "+f"(d[i]));  // set here, not between products
  }
  int w_stage = 0, w_phase = 0, x_stage = part, x_phase = 0, previous = -1;
  const int begin = first_chunk(p, blockIdx.x), end = first_chunk(p, blockIdx.x + 1);
  Scales next(p, blockIdx.y * ROWS + row_in_tile, begin, quad);
  if (begin < end) next.load_next(p);

  auto multiply = [&](const uint8_t* codes, const float (&scale)[2], int b, bool last) {
    uint32_t a[4][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float s = __shfl_sync(~0u, scale[h], (lane & ~3) + b);
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const uint4 v = *reinterpret_cast<const uint4*>(codes + h * 8 * 128 + ((2 * b + u) ^ g) * 16);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // eight weights; this thread's two are in byte `quad`
          const float2 pair = load_pair(__byte_perm(words[j], 0, select) * (kCopies * 8) + my_table);
          a[2 * u + j / 2][h + j % 2 * 2] = pack<T>(__fmul_rn(pair.x, s), __fmul_rn(pair.y, s));
        }
      }
    }
    if (last) {
      __syncwarp();
      if (lane == 0) barrier_arrive(&w_empty[w_stage]);
    }
    barrier_wait(&x_full[x_stage], x_phase);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; ++s)
      wgmma_rs<TOKENS, T>(d, a[s], matrix_descriptor(x_ring + x_stage * C::kXBytes + s * 32, 16, 1024, 1));
    wgmma_commit();
    wgmma_wait<1>();  // the products of the block before
    if (previous >= 0 && lane == 0) barrier_arrive(&x_empty[previous]);
    previous = x_stage;
    x_stage += SPLIT;
    if (x_stage >= C::kXStages) x_stage -= C::kXStages, x_phase ^= 1;
  };
  auto multiply_chunk = [&](int chunk) {
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      scale[h] = nested ? __fadd_rn(__fmul_rn(code2[next.code[h]], next.absmax[h]), offset) : next.absmax[h];
    if (chunk + 1 < end) next.load_next(p);
    barrier_wait(&w_full[w_stage], w_phase);
#pragma unroll
    for (int b = 0; b < kBlocks; b += SPLIT)
      multiply(my_codes + w_stage * C::kWBytes, scale, b + part, b + SPLIT == kBlocks);
    if (++w_stage == kWStages) w_stage = 0, w_phase ^= 1;
  };
  int chunk = begin;
  for (; chunk + 1 < end; chunk += 2) {  // by two: a product's registers stay while it runs
    multiply_chunk(chunk);
    multiply_chunk(chunk + 1);
  }
  wgmma_wait();
  if (chunk < end) multiply_chunk(chunk);
  wgmma_wait();
}

#endif  // MOKA_SM90

// Grid: cluster ranks, row tiles, token tiles.
template <int TOKENS, int ROWS, int SPLIT, typename T>
__global__ void __launch_bounds__(Tile<TOKENS, ROWS, SPLIT>::kThreads, 1)
    nf4_gemm_kernel(const __grid_constant__ GemmLaunch p) {
#ifdef MOKA_SM90
  using C = Tile<TOKENS, ROWS, SPLIT>;
  extern __shared__ __align__(1024) uint8_t smem[];
  __shared__ float code2[256];
  float2* table = reinterpret_cast<float2*>(smem + C::kRings);
  uint64_t* w_full = reinterpret_cast<uint64_t*>(smem + C::kRings + kTableBytes);
  uint64_t* x_full = w_full + 2 * kWStages;
  const int thread = threadIdx.x;
  cudaTriggerProgrammaticLaunchCompletion();
  if (thread == C::kConsumers) {
    prefetch_map(&p.codes), prefetch_map(&p.x);
    for (int i = 0; i < kWStages; ++i)
      barrier_init(&w_full[i], 1), barrier_init(&w_full[kWStages + i], C::kConsumers / 32);
    for (int i = 0; i < C::kXStages; ++i)
      barrier_init(&x_full[i], 1), barrier_init(&x_full[C::kXStages + i], C::kConsumers / 32 / SPLIT);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    const int begin = first_chunk(p, blockIdx.x), end = first_chunk(p, blockIdx.x + 1);
    for (int chunk = begin; chunk < end && chunk < begin + 2 * kWStages; ++chunk)
      prefetch_box(&p.codes, chunk * (kChunk / 2), blockIdx.y * ROWS);
  } else if (thread >= C::kConsumers + 32) {
    for (int row = thread - C::kConsumers - 32; row < ROWS; row += 96) {
      const int64_t n = static_cast<int64_t>(blockIdx.y) * ROWS + row;
      const int64_t block = (n * p.chunks + first_chunk(p, blockIdx.x)) * kBlocks;
      if (n < p.w.N) prefetch_line(p.w.absmax ? static_cast<const void*>(p.w.absmax + block) : p.w.absmax_q + block);
    }
    fill_table<96>(reinterpret_cast<float4*>(table), thread - C::kConsumers - 32);
  }
  // The kernel in front may have written x. With a mixture that is the mixture's, which let this one start only after
  // everything in front of it had ended; its shares are read last.
  if (p.shares.r == 0) cudaGridDependencySynchronize();
  if (thread < 256 && p.w.absmax == nullptr) code2[thread] = __ldg(p.w.code2 + thread);
  __syncthreads();

  if (thread >= C::kConsumers) {
    set_registers_down<24>();
    if (thread == C::kConsumers) produce<TOKENS, ROWS, SPLIT>(p, smem, w_full, x_full);
    __syncwarp();
    cluster_sync();
  } else {
    set_registers_up<C::kConsumers == 256 ? 240 : 112>();  // of 168 or 96 each
    float d[TOKENS / 2];
    consume<TOKENS, ROWS, SPLIT, T>(p, smem, table, code2, w_full, x_full, d);
    named_barrier(1, C::kConsumers);               // nobody reads the rings any more
    float* sums = reinterpret_cast<float*>(smem);  // [SPLIT][TOKENS][kPitch]
    const int warpgroup = thread / 128, part = warpgroup / (ROWS / 64);
    store_sums<TOKENS>(d, sums + part * TOKENS * C::kPitch + warpgroup % (ROWS / 64) * 64, C::kPitch);
    cluster_sync();
    if (p.shares.r) cudaGridDependencySynchronize();
    const int64_t n0 = static_cast<int64_t>(blockIdx.y) * ROWS;
    reduce_sums<TOKENS, ROWS, SPLIT, C::kConsumers, T>(sums, p.tokens, p.w.N, n0, p.bias, p.shares, p.y);
  }
  cluster_sync_relaxed();  // the sums stay until every rank has read them
#endif
}

template <int TOKENS, int ROWS, int SPLIT, typename T>
Cluster plan(const GemmLaunch& p, double chunk_time) {
  using C = Tile<TOKENS, ROWS, SPLIT>;
  const int64_t tiles = ceil_div(p.w.N, ROWS) * ceil_div(p.tokens, TOKENS);
  return choose_cluster<nf4_gemm_kernel<TOKENS, ROWS, SPLIT, T>>(tiles, p.chunks, chunk_time, C::kThreads, C::kBytes);
}

template <int TOKENS, int ROWS, int SPLIT, typename T>
cudaError_t launch(GemmLaunch& p, const void* x, int ranks, cudaStream_t stream) {
  using C = Tile<TOKENS, ROWS, SPLIT>;
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (ranks == 0) return cudaErrorNotSupported;
  if (!encode_rows(&p.codes, p.w.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.w.N, p.w.K / 2, ROWS) ||
      !encode_rows(&p.x, x, type, 2, p.tokens, p.w.K, TOKENS))
    return cudaErrorInvalidValue;
  ClusterLaunch launch(ranks, ceil_div(p.w.N, ROWS), ceil_div(p.tokens, TOKENS), C::kThreads, C::kBytes, stream);
  return cudaLaunchKernelEx(&launch.config, nf4_gemm_kernel<TOKENS, ROWS, SPLIT, T>, p);
}

// Low or high tiles, by their times per chunk, measured on an H200.
template <int TOKENS, int SPLIT, typename T>
cudaError_t launch_tokens(GemmLaunch& p, const void* x, double low_time, double high_time, cudaStream_t stream) {
  const Cluster low = plan<TOKENS, 64, SPLIT, T>(p, low_time), high = plan<TOKENS, 128, SPLIT / 2, T>(p, high_time);
  return low.time < high.time ? launch<TOKENS, 64, SPLIT, T>(p, x, low.ranks, stream)
                              : launch<TOKENS, 128, SPLIT / 2, T>(p, x, high.ranks, stream);
}

template <typename T>
cudaError_t launch_any(GemmLaunch& p, const void* x, cudaStream_t stream) {
  if (p.tokens <= 32) return launch_tokens<32, 4, T>(p, x, 0.83, 1.5, stream);
  if (p.tokens <= 64) return launch_tokens<64, 4, T>(p, x, 0.93, 1.75, stream);
  if (p.tokens <= 128) return launch_tokens<128, 2, T>(p, x, 1.14, 2.25, stream);
  return launch_tokens<256, 2, T>(p, x, 2.1, 3.3, stream);
}

}  // namespace

bool nf4_gemm_supports(const Nf4Params& w) {
  const bool pow2 = w.absmax || (w.blocksize2 > 0 && (w.blocksize2 & (w.blocksize2 - 1)) == 0);
  return w.blocksize == kBlock && pow2 && w.K % kChunk == 0 && w.N % 8 == 0 && w.N > 0 && w.K > 0 && w.N / 64 < 65536 &&
         w.N * w.K / kBlock < INT32_MAX && aligned(w.packed, 16);
}

cudaError_t launch_nf4_gemm_sm90(const void* x, Dtype dtype, int64_t tokens, const Nf4Params& w, const void* bias,
                                 const MixtureArgs& mix, float* scratch, void* y, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  if (encode_tiled() == nullptr) return cudaErrorNotSupported;
  int shares = 0;
  if (mix.shapes.r > 0) {
    const cudaError_t error = launch_shares(x, dtype, tokens, w, mix, scratch, &shares, stream);
    if (error != cudaSuccess) return error;
  }
  GemmLaunch p;
  p.w = w, p.bias = bias, p.y = y;
  p.shares = {scratch, shares, mix.adapter};
  p.tokens = static_cast<int>(tokens), p.chunks = static_cast<int>(w.K / kChunk), p.shift2 = 0;
  while (!w.absmax && (int64_t{1} << p.shift2) < w.blocksize2) ++p.shift2;
  return dtype == Dtype::kBF16 ? launch_any<__nv_bfloat16>(p, x, stream) : launch_any<__half>(p, x, stream);
}

}  // namespace moka::cuda
