// NF4 plus a low-rank update, dense; see build_lora_cuda.h.
//
// A warp makes 16 rows of 64 columns, one NF4 block of each row, at a time: the update on tensor cores, then the codes
// added to its accumulators in fp32. Which terms and which columns a lane's operands stand for, the product need not
// know: lane 4 g + q holds terms 4 q .. 4 q + 3 of columns 8 g .. 8 g + 7 of A, 16 bytes of each row, and so ends up
// with columns 16 q .. 16 q + 15 of rows g and g + 8, eight bytes of codes each.
#include "build_base.cuh"
#include "build_lora_cuda.h"

namespace moka::cuda {
namespace {

constexpr int kRows = 16 * kWarps;  // of a step of a thread block
constexpr int kColumns = 64;        // of a step: an NF4 block
constexpr int kTerms = 16;          // of one product
constexpr int kBlocksPerProcessor = 3;

// The lane's codes and scales of one step.
struct Codes {
  uint2 codes[2];
  Nf4Base::Scale scale[2];
};

template <typename T>
__global__ void __launch_bounds__(kBuildThreads, kBlocksPerProcessor)
    build_lora_kernel(Nf4Base base, const T* A, const T* B, int rank, float scale, int steps, T* out) {
  extern __shared__ __align__(16) uint8_t table[];
  const int lane = threadIdx.x % kLanes, g = lane / 4, q = lane % 4;
  const int N = static_cast<int>(base.w.N), K = static_cast<int>(base.w.K), columns = K / kColumns;
  const int begin = static_cast<int>(static_cast<int64_t>(blockIdx.x) * steps / gridDim.x);
  const int end = static_cast<int>(static_cast<int64_t>(blockIdx.x + 1) * steps / gridDim.x);
  auto row_of = [&](int step) { return step / columns * kRows + static_cast<int>(threadIdx.x) / kLanes * 16 + g; };
  auto entry = [&](int step, int h) {  // of the lane's first column in row h of two
    return static_cast<int64_t>(row_of(step) + 8 * h) * K + step % columns * kColumns + 16 * q;
  };
  Codes next = {};
  auto load = [&](int step) {
    if (step >= end || row_of(step) >= N) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t e = entry(step, h);
      next.codes[h] = __ldg(reinterpret_cast<const uint2*>(base.w.packed + e / 2));
      next.scale[h] = base.load_scale(e / kColumns);
    }
  };
  load(begin);
  base.fill(table);
  __syncthreads();

  for (int step = begin; step < end; ++step) {
    const Codes now = next;
    load(step + 1);
    const int row = row_of(step);
    if (row >= N) continue;  // all of the warp: N is a multiple of 16
    float sum[8][4] = {};
    const T* a_column = A + step % columns * kColumns + 8 * g;
    const T* b_row = B + static_cast<int64_t>(row) * rank;
    for (int term = 4 * q; term - 4 * q < rank; term += kTerms) {
      const bool inside = term < rank;
      uint4 a[4];  // terms
      uint2 b[2] = {};
#pragma unroll
      for (int t = 0; t < 4; ++t)
        a[t] = inside ? __ldg(reinterpret_cast<const uint4*>(a_column + static_cast<int64_t>(term + t) * K))
                      : make_uint4(0, 0, 0, 0);
      if (inside) {
        b[0] = __ldg(reinterpret_cast<const uint2*>(b_row + term));
        b[1] = __ldg(reinterpret_cast<const uint2*>(b_row + 8 * rank + term));
      }
      const uint32_t left[4] = {b[0].x, b[1].x, b[0].y, b[1].y};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t select = i % 2 ? 0x7632 : 0x5410;
        auto word = [&](const uint4& v) { return i / 2 == 0 ? v.x : i / 2 == 1 ? v.y : i / 2 == 2 ? v.z : v.w; };
        mma<T>(sum[i], left, __byte_perm(word(a[0]), word(a[1]), select), __byte_perm(word(a[2]), word(a[3]), select));
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float block_scale = base.scale(now.scale[h]);
      T* to = out + entry(step, h);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = scale * sum[i][2 * h + half];
        base.decode(half ? now.codes[h].y : now.codes[h].x, block_scale, table, v);
        store8(to + 8 * half, v);
      }
    }
  }
}

template <typename T>
cudaError_t launch(const Nf4Params& w, const void* A, const void* B, int rank, float scale, void* out,
                   cudaStream_t stream) {
  int resident = 0;
  cudaError_t error = resident_blocks(kBlocksPerProcessor, &resident);
  if (error != cudaSuccess) return error;
  const int steps = static_cast<int>(ceil_div(w.N, kRows) * (w.K / kColumns));
  const unsigned blocks = steps < resident ? steps : resident;
  build_lora_kernel<T><<<blocks, kBuildThreads, Nf4Base::kTableBytes, stream>>>(
      nf4_base(w), static_cast<const T*>(A), static_cast<const T*>(B), rank, scale, steps, static_cast<T*>(out));
  return cudaGetLastError();
}

}  // namespace

bool build_lora_supports(const Nf4Params& w, int64_t rank) {
  const bool pow2 = w.absmax || (w.blocksize2 > 0 && (w.blocksize2 & (w.blocksize2 - 1)) == 0);
  return w.blocksize == kColumns && pow2 && w.K % kColumns == 0 && w.N % 16 == 0 && rank % 4 == 0 && rank > 0 &&
         w.N < INT32_MAX - kRows && w.K < INT32_MAX && w.N * w.K / kColumns < INT32_MAX && aligned(w.packed, 8);
}

cudaError_t launch_build_lora(const Nf4Params& w, const void* A, const void* B, int64_t rank, float scale, Dtype dtype,
                              void* out, cudaStream_t stream) {
  if (w.N == 0 || w.K == 0) return cudaSuccess;
  const int r = static_cast<int>(rank);
  return dtype == Dtype::kBF16 ? launch<__nv_bfloat16>(w, A, B, r, scale, out, stream)
                               : launch<__half>(w, A, B, r, scale, out, stream);
}

}  // namespace moka::cuda
