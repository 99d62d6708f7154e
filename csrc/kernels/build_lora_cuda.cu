// NF4 plus a low-rank update, dense; see build_lora_cuda.h.
//
// A warp goes down 64 columns, one NF4 block of each row, 16 rows at a time: the update on tensor cores, with the
// columns of A held in registers, then the codes added to the accumulators in fp32. Which terms and which columns a
// lane's operands stand for, the product need not know: lane 4 g + q has terms 4 q .. 4 q + 3 of every second column
// of two octets of A, and so ends up with columns 8 q .. 8 q + 7 and 32 on of rows g and g + 8: whole octets, which
// four lanes store side by side.
#include "build_base.cuh"
#include "build_lora_cuda.h"

namespace moka::cuda {
namespace {

constexpr int kRows = 16;
constexpr int kColumns = 64;  // an NF4 block
constexpr int kTerms = 16;    // of one product

// Four terms of two rows of B, eight apart: the left operand.
template <typename T>
struct Left {
  uint32_t pairs[4];

  __device__ __forceinline__ void load(const T* row, int eight_rows, bool inside) {
    uint2 low = {}, high = {};
    if (inside) {
      low = __ldg(reinterpret_cast<const uint2*>(row));
      high = __ldg(reinterpret_cast<const uint2*>(row + eight_rows));
    }
    pairs[0] = low.x, pairs[1] = high.x, pairs[2] = low.y, pairs[3] = high.y;
  }
};

// The same terms of an octet of columns of A, every second one: the right operand of four products.
template <typename T>
struct Octet {
  uint32_t pairs[4][2];

  __device__ __forceinline__ void add_to(float (&sum)[4][4], const Left<T>& left) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) mma<T>(sum[i], left.pairs, pairs[i][0], pairs[i][1]);
  }

  __device__ __forceinline__ void load(const T* column, int64_t K, bool inside, int parity) {
    uint4 v[4] = {};
    if (inside)
#pragma unroll
      for (int t = 0; t < 4; ++t) v[t] = __ldg(reinterpret_cast<const uint4*>(column + t * K));
    const uint32_t select = parity ? 0x7632 : 0x5410;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      pairs[0][t] = __byte_perm(v[2 * t].x, v[2 * t + 1].x, select);
      pairs[1][t] = __byte_perm(v[2 * t].y, v[2 * t + 1].y, select);
      pairs[2][t] = __byte_perm(v[2 * t].z, v[2 * t + 1].z, select);
      pairs[3][t] = __byte_perm(v[2 * t].w, v[2 * t + 1].w, select);
    }
  }
};

// The codes and scales of a lane's two rows, and where those of the next ones are.
struct Codes {
  const uint32_t* from;
  int block, eight_rows;  // of scales; there are as many for eight rows
  uint32_t codes[2][2];   // of a row, of an octet
  Nf4Base::Scale scale[2];

  __device__ __forceinline__ void load(const Nf4Base& base) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      codes[h][0] = __ldg(from);
      codes[h][1] = __ldg(from + 4);
      scale[h] = base.load_scale(block);
      from += int64_t{eight_rows} * (kColumns / 8);
      block += eight_rows;
    }
  }
};

// kHeld: how many times 16 terms of A stay in registers; further ones, if it streams, are read again for all rows.
template <typename T, int kHeld, bool kStreams, int kBlocks>
__global__ void __launch_bounds__(kBuildThreads, kBlocks)
    build_lora_kernel(Nf4Base base, const T* A, const T* B, int rank, float scale, int parts, T* out) {
  extern __shared__ __align__(16) uint8_t table[];
  const int lane = threadIdx.x % kLanes, g = lane / 4, q = lane % 4;
  const int K = static_cast<int>(base.w.K), row_blocks = K / kColumns;
  const int tiles = static_cast<int>(base.w.N / kRows);
  // warps side by side take columns side by side; one too many loads what it does not use
  const int warp = blockIdx.x * kWarps + threadIdx.x / kLanes, strip = warp % row_blocks;
  const int part = min(warp / row_blocks, parts - 1);
  const int begin = static_cast<int>(static_cast<int64_t>(part) * tiles / parts);
  const int end = static_cast<int>(static_cast<int64_t>(part + 1) * tiles / parts);
  const int row = begin * kRows + g, block = row * row_blocks + strip;
  Codes next = {reinterpret_cast<const uint32_t*>(base.w.packed) + int64_t{block} * (kColumns / 8) + q,
                block,
                8 * row_blocks,
                {},
                {}};
  next.load(base);
  base.fill(table);
  __syncthreads();
  if (warp >= parts * row_blocks) return;

  const T* a_column = A + strip * kColumns + g / 2 * 8;
  auto octet = [&](int chunk, int half) {
    Octet<T> out;
    const int term = chunk * kTerms + 4 * q;
    out.load(a_column + static_cast<int64_t>(term) * K + half * (kColumns / 2), K, term < rank, g % 2);
    return out;
  };
  Octet<T> a[kHeld][2];
#pragma unroll
  for (int c = 0; c < kHeld; ++c)
#pragma unroll
    for (int half = 0; half < 2; ++half) a[c][half] = octet(c, half);

  const T* b = B + static_cast<int64_t>(row) * rank + 4 * q;
  T* to = out + int64_t{block} * kColumns + 8 * q;
  for (int tile = begin; tile < end; ++tile) {
    const Codes now = next;
    if (tile + 1 < end) next.load(base);
    const float block_scale[2] = {base.scale(now.scale[0]), base.scale(now.scale[1])};
    auto left = [&](int chunk) {
      Left<T> out;
      out.load(b + chunk * kTerms, 8 * rank, chunk * kTerms + 4 * q < rank);
      return out;
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum[4][4] = {};
#pragma unroll
      for (int c = 0; c < kHeld; ++c) a[c][half].add_to(sum, left(c));
      for (int c = kHeld; kStreams && c * kTerms < rank; ++c) octet(c, half).add_to(sum, left(c));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = scale * sum[i / 2][2 * h + i % 2];
        base.decode(now.codes[h][half], block_scale[h], table, v);
        store8(to + (h ? 8 * int64_t{K} : 0) + half * (kColumns / 2), v);
      }
    }
    b += kRows * rank;
    to += kRows * int64_t{K};
  }
}

template <typename T, int kHeld, bool kStreams, int kBlocks>
cudaError_t launch(const Nf4Params& w, const void* A, const void* B, int rank, float scale, void* out,
                   cudaStream_t stream) {
  int resident = 0;
  const cudaError_t error = resident_blocks(kBlocks, &resident);
  if (error != cudaSuccess) return error;
  const int64_t strips = w.K / kColumns, tiles = w.N / kRows, warps = int64_t{resident} * kWarps;
  int64_t parts = warps / strips;  // of the rows: a warp each for what the device holds
  parts = parts < 1 ? 1 : parts > tiles ? tiles : parts;
  build_lora_kernel<T, kHeld, kStreams, kBlocks>
      <<<static_cast<unsigned>(ceil_div(strips * parts, kWarps)), kBuildThreads, Nf4Base::kTableBytes, stream>>>(
          nf4_base(w), static_cast<const T*>(A), static_cast<const T*>(B), rank, scale, static_cast<int>(parts),
          static_cast<T*>(out));
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const Nf4Params& w, const void* A, const void* B, int rank, float scale, void* out,
                   cudaStream_t stream) {
  return rank <= kTerms ? launch<T, 1, false, 3>(w, A, B, rank, scale, out, stream)
                        : launch<T, 4, true, 2>(w, A, B, rank, scale, out, stream);
}

}  // namespace

bool build_lora_supports(const Nf4Params& w, int64_t rank) {
  const bool pow2 = w.absmax || (w.blocksize2 > 0 && (w.blocksize2 & (w.blocksize2 - 1)) == 0);
  return w.blocksize == kColumns && pow2 && w.K % kColumns == 0 && w.N % kRows == 0 && rank % 4 == 0 && rank > 0 &&
         w.K < INT32_MAX && w.N * w.K / kColumns < INT32_MAX && aligned(w.packed, 4);
}

cudaError_t launch_build_lora(const Nf4Params& w, const void* A, const void* B, int64_t rank, float scale, Dtype dtype,
                              void* out, cudaStream_t stream) {
  if (w.N == 0 || w.K == 0) return cudaSuccess;
  const int r = static_cast<int>(rank);
  return dtype == Dtype::kBF16 ? launch<__nv_bfloat16>(w, A, B, r, scale, out, stream)
                               : launch<__half>(w, A, B, r, scale, out, stream);
}

}  // namespace moka::cuda
