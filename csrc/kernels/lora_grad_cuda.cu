// dy B and dy^T u of a low-rank update in one pass over dy; see lora_grad_cuda.h.
//
// A thread block goes down 256 columns of dy, 32 tokens at a time, which pass through shared memory. Half of its warps
// multiply each piece by B, whose part of these columns they hold in registers: the sums over columns, for these
// tokens. The other half multiply its transpose by u: the sums over tokens, for these columns. Another kernel adds up
// the parts. Both are bound by reading dy.
#include <type_traits>

#include "cuda_common.cuh"
#include "lora_grad_cuda.h"

namespace moka::cuda {
namespace {

constexpr int kTokens = 32;  // of a piece
constexpr int kWidth = 256;  // columns of a thread block
constexpr int kRank = 16;    // the columns of B, u and the sums; beyond the rank they are zeros
constexpr int kStages = 5;   // pieces in shared memory or on their way to it
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTiles = kWidth / (kWarps / 2) / 16;  // 16 columns each, of a warp that sums over tokens
constexpr int kBlocks = 2;                          // per multiprocessor
constexpr int kPieceBytes = kTokens * kWidth * 2, kInnerBytes = kTokens * kRank * 2;
constexpr int kStageBytes = kPieceBytes + kInnerBytes;
constexpr int kSharedBytes = kStages * kStageBytes + kWidth * kRank * 2;

// Byte of 16 of a piece's row, and of a row of u or B: eight rows side by side meet in no bank.
__device__ __forceinline__ int piece_at(int row, int unit) { return row * (kWidth * 2) + (unit ^ row % 8) * 16; }
__device__ __forceinline__ int inner_at(int row, int unit) { return row * (kRank * 2) + (unit ^ row / 4 % 2) * 16; }

// Thread block (slice, part): its columns, its share of the tokens. token_sums [slices, tokens, kRank], column_sums
// [parts, N, kRank].
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    lora_grad_kernel(const T* dy, const T* B, const T* u, int tokens, int N, int rank, float* token_sums,
                     float* column_sums) {
  extern __shared__ __align__(128) uint8_t smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int column0 = blockIdx.x * kWidth, pieces = static_cast<int>(ceil_div(tokens, kTokens));
  const int begin = static_cast<int>(int64_t{blockIdx.y} * pieces / gridDim.y);
  const int end = static_cast<int>(int64_t{blockIdx.y + 1} * pieces / gridDim.y);
  const uint32_t shared = shared_address(smem);
  const uint32_t b_at = shared + kStages * kStageBytes;
  let_next_start();

  // row `from` of u or B, and whether it is there
  auto copy_inner = [&](uint32_t to, const T* matrix, int row, int unit, int64_t from, bool here) {
    here = here && unit * 8 < rank;
    copy_async16(to + inner_at(row, unit), here ? matrix + from * rank + unit * 8 : matrix, here ? 16 : 0);
  };
  auto fetch = [&](int piece) {
    if (piece < end) {
      const uint32_t to = shared + (piece - begin) % kStages * kStageBytes;
      const int token0 = piece * kTokens;
#pragma unroll
      for (int i = 0; i < kTokens * kWidth / 8 / kThreads; ++i) {
        const int row = warp + i * kWarps, column = column0 + lane * 8;
        const bool here = token0 + row < tokens && column < N;
        copy_async16(to + piece_at(row, lane), here ? dy + static_cast<int64_t>(token0 + row) * N + column : dy,
                     here ? 16 : 0);
      }
      if (threadIdx.x < 2 * kTokens) {
        const int row = threadIdx.x / 2;
        copy_inner(to + kPieceBytes, u, row, threadIdx.x % 2, token0 + row, token0 + row < tokens);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = threadIdx.x / 2 + i * (kThreads / 2);
    copy_inner(b_at, B, row, threadIdx.x % 2, column0 + row, column0 + row < N);
  }
  for (int s = 0; s < kStages - 1; ++s) fetch(begin + s);

  // the warp's 16 tokens and 8 columns of B; or its 64 columns of dy, with all of u
  const bool of_tokens = warp < kWarps / 2;
  const int row0 = warp / 2 * 16, half = warp % 2, unit0 = warp % (kWarps / 2) * kTiles * 2;
  int from[kTiles];  // in a piece: of 64 columns, the next ones are 128 bytes on; or of 16 tokens
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    from[i] = of_tokens ? piece_at(row0 + lane % 16, i * 2 + lane / 16)
                        : piece_at(lane / 16 * 8 + lane % 8, unit0 + i * 2 + lane / 8 % 2);
  uint32_t b[kWidth / 32][4];
  float column_sum[kTiles][2][4] = {};
  for (int piece = begin; piece < end; ++piece) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();  // the piece is there, and nobody reads the one before it, in whose place another comes
    fetch(piece + kStages - 1);
    const uint32_t at = shared + (piece - begin) % kStages * kStageBytes;
    if (of_tokens) {
      if (piece == begin)
#pragma unroll
        for (int k = 0; k < kWidth / 32; ++k) load_matrices<true>(b[k], b_at + inner_at(k * 32 + lane, half));
      float sum[2][4] = {};  // two, so that a product need not wait for the one before it
#pragma unroll
      for (int k = 0; k < kWidth / 16; ++k) {
        uint32_t a[4];
        load_matrices<false>(a, at + from[k % 4] + k / 4 * 128);
        mma<T>(sum[k % 2], a, b[k / 2][k % 2 * 2], b[k / 2][k % 2 * 2 + 1]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int token = piece * kTokens + row0 + g + h * 8;
        float* to = token_sums + (static_cast<int64_t>(blockIdx.x) * tokens + token) * kRank + half * 8 + q * 2;
        if (token < tokens)
          *reinterpret_cast<float2*>(to) = {sum[0][2 * h] + sum[1][2 * h], sum[0][2 * h + 1] + sum[1][2 * h + 1]};
      }
    } else {
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        uint32_t inner[4];
        load_matrices<true>(inner, at + kPieceBytes + inner_at(k * 16 + lane % 16, lane / 16));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint32_t a[4];
          load_matrices<true>(a, at + from[tile] + piece_at(k * 16, 0));
          mma<T>(column_sum[tile][0], a, inner[0], inner[1]);
          mma<T>(column_sum[tile][1], a, inner[2], inner[3]);
        }
      }
    }
  }
  if (of_tokens) return;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = column0 + (unit0 + tile * 2 + h) * 8 + g;
      float* to = column_sums + (static_cast<int64_t>(blockIdx.y) * N + column) * kRank + q * 2;
      if (column >= N) continue;
      *reinterpret_cast<float2*>(to) = {column_sum[tile][0][2 * h], column_sum[tile][0][2 * h + 1]};
      *reinterpret_cast<float2*>(to + 8) = {column_sum[tile][1][2 * h], column_sum[tile][1][2 * h + 1]};
    }
}

// to [rows, rank] = scale times the sum of parts [count, rows, kRank], four entries a thread.
template <typename T>
__device__ __forceinline__ void add_parts(const float* parts, int count, int64_t rows, int rank, float scale, T* to,
                                          int64_t thread) {
  constexpr int kBatch = 8;  // loads under way
  const int column = thread % (kRank / 4) * 4;
  if (column >= rank) return;
  const float* from = parts + thread * 4;
  float4 sum = {0.f, 0.f, 0.f, 0.f};
  for (int i0 = 0; i0 < count; i0 += kBatch) {
    float4 v[kBatch];  // beyond the last part its numbers again, unused, so that no branch keeps loads apart
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      v[i] = __ldcg(reinterpret_cast<const float4*>(from + min(i0 + i, count - 1) * rows * kRank));
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (i0 + i < count) sum.x += v[i].x, sum.y += v[i].y, sum.z += v[i].z, sum.w += v[i].w;
  }
  alignas(16) T out[4] = {from_acc<T>(scale * sum.x), from_acc<T>(scale * sum.y), from_acc<T>(scale * sum.z),
                          from_acc<T>(scale * sum.w)};
  using Four = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
  *reinterpret_cast<Four*>(to + thread / (kRank / 4) * rank + column) = *reinterpret_cast<const Four*>(out);
}

template <typename T, typename TB>
__global__ void __launch_bounds__(kThreads)
    finish_lora_grad_kernel(const float* token_sums, int slices, int64_t tokens, const float* column_sums, int parts,
                            int64_t N, int rank, float scale, T* grad_u, TB* grad_B) {
  wait_for_previous();
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t of_tokens = tokens * (kRank / 4);
  if (thread < of_tokens)
    add_parts(token_sums, slices, tokens, rank, 1.f, grad_u, thread);
  else if (thread < of_tokens + N * (kRank / 4))
    add_parts(column_sums, parts, N, rank, scale, grad_B, thread - of_tokens);
}

struct Grid {
  int64_t slices, parts;

  explicit Grid(const LoraGradShape& s) : slices(ceil_div(s.N, kWidth)) {
    const int64_t pieces = ceil_div(s.tokens, kTokens);
    parts = kBlocks * device_attribute(cudaDevAttrMultiProcessorCount) / slices;
    parts = parts < 1 ? 1 : parts > pieces ? pieces : parts;
  }
};

template <typename T, typename TB>
cudaError_t launch(const void* dy, const void* B, const void* u, const LoraGradShape& s, float scale, float* scratch,
                   void* grad_u, void* grad_B, cudaStream_t stream) {
  const Grid grid(s);
  const int tokens = static_cast<int>(s.tokens), N = static_cast<int>(s.N), rank = static_cast<int>(s.rank);
  const int slices = static_cast<int>(grid.slices), parts = static_cast<int>(grid.parts);
  float* column_sums = scratch + grid.slices * s.tokens * kRank;
  const bool overlapping = can_overlap();
  cudaError_t error =
      cudaFuncSetAttribute(lora_grad_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error == cudaSuccess)
    error = launch_overlapping(lora_grad_kernel<T>, dim3(slices, parts), kThreads, kSharedBytes, stream, overlapping,
                               static_cast<const T*>(dy), static_cast<const T*>(B), static_cast<const T*>(u), tokens, N,
                               rank, scratch, column_sums);
  if (error != cudaSuccess) return error;
  const int64_t threads = (s.tokens + s.N) * (kRank / 4);
  return launch_overlapping(finish_lora_grad_kernel<T, TB>, dim3(static_cast<unsigned>(ceil_div(threads, kThreads))),
                            kThreads, 0, stream, overlapping, scratch, slices, s.tokens, column_sums, parts, s.N, rank,
                            scale, static_cast<T*>(grad_u), static_cast<TB*>(grad_B));
}

}  // namespace

bool lora_grad_supports(const LoraGradShape& s) {
  return (s.rank == 8 || s.rank == kRank) && s.N % 8 == 0 && s.N > 0 && s.tokens > 0 && s.N < INT32_MAX / 2 &&
         s.tokens < INT32_MAX / 2 && device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kSharedBytes;
}

int64_t lora_grad_scratch(const LoraGradShape& s) {
  const Grid grid(s);
  return (grid.slices * s.tokens + grid.parts * s.N) * kRank;
}

cudaError_t launch_lora_grad(const void* dy, const void* B, const void* u, const LoraGradShape& shape, float scale,
                             Dtype dtype, float* scratch, void* grad_u, Dtype dtype_B, void* grad_B,
                             cudaStream_t stream) {
  const bool bf16 = dtype == Dtype::kBF16, fp32 = dtype_B == Dtype::kF32;
  auto* chosen = bf16 ? (fp32 ? launch<__nv_bfloat16, float> : launch<__nv_bfloat16, __nv_bfloat16>)
                      : (fp32 ? launch<__half, float> : launch<__half, __half>);
  return chosen(dy, B, u, shape, scale, scratch, grad_u, grad_B, stream);
}

}  // namespace moka::cuda
